//! The manifest: the record of one acquisition, `manifest.json`.
//!
//! The docs of the types below are the descriptions in the published JSON Schema. Every field is
//! always written; `null` says "not known" or "there is none", as the field's text has it.

use crate::digest::Digest;
use crate::exhibit::{self, image_name, is_file_name};
use crate::format::Format;
use crate::journal::{self, is_utc};
use crate::range::hex;
use crate::record::{self, Span};
use crate::sums;
use crate::{GuestRange, MemoryMap, PageState};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The version of the record that this crate writes and reads.
pub const SCHEMA: &str = "stillframe/manifest/1";

/// Greatest length of `manifest.json` in bytes: a map and losses of 65,536 entries each fit.
pub const MAX_LEN: u64 = 64 << 20;

/// Greatest number of [`Loss`] entries. Losses beyond it are in the block records only.
pub const MAX_LOSSES: usize = 65_536;

/// The sentence that stands among the limitations of every record.
pub const VOLATILE: &str = "The digest proves the image is unchanged since acquisition. \
                            The source was volatile; it cannot be re-read to compare.";

/// How an acquisition ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every block of the map was read and sealed.
    Complete,
    /// It ended early; what was read by then is in the exhibit.
    Partial,
    /// Nothing was read; the exhibit only documents the attempt.
    Failed,
}

/// Consistency of the image as earned, after Ottmann, Breitinger and Freiling (2022).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// All bytes were read while nothing could change them.
    Instantaneous,
    /// All bytes are those of one instant, though some were read later.
    QuasiInstantaneous,
    /// The bytes are of different instants.
    None,
}

/// How guest memory was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Passes over the running VM under soft-dirty tracking, then a hold for the rest.
    Track,
    /// All read into the RAM store during one hold.
    Freeze,
    /// Two passes over the running VM, nothing held.
    Live,
    /// QEMU's background snapshot.
    Snapshot,
    /// QEMU's `pmemsave`, slice by slice.
    Pmemsave,
    /// QEMU's `dump-guest-memory`.
    Dump,
}

impl Class {
    /// The class's word in the record.
    pub fn word(self) -> &'static str {
        match self {
            Class::Instantaneous => "instantaneous",
            Class::QuasiInstantaneous => "quasi-instantaneous",
            Class::None => "none",
        }
    }
}

impl Method {
    /// The method's word on the command line and in the record.
    pub fn word(self) -> &'static str {
        match self {
            Method::Track => "track",
            Method::Freeze => "freeze",
            Method::Live => "live",
            Method::Snapshot => "snapshot",
            Method::Pmemsave => "pmemsave",
            Method::Dump => "dump",
        }
    }
}

impl StoreKind {
    /// The store's word on the command line and in the record.
    pub fn word(self) -> &'static str {
        match self {
            StoreKind::Ram => "ram",
            StoreKind::Disk => "disk",
        }
    }
}

/// Where captured bytes first rested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// Host memory.
    Ram,
    /// A file.
    Disk,
}

/// The record of one acquisition of a virtual machine's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this record. A reader that does not know it must refuse.
    #[schemars(extend("const" = SCHEMA))]
    pub schema: String,
    /// Identifies the acquisition: a UUID in lower case. Its first four digits end the exhibit's
    /// name.
    #[schemars(regex(
        pattern = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    ))]
    pub record_id: String,
    /// How the acquisition ended.
    pub status: Status,
    /// Why it ended early; null exactly when it is complete.
    pub end_reason: Option<String>,
    /// Consistency of the image, as earned.
    pub class: Class,
    /// How memory was read.
    pub method: Method,
    /// The instant that the image shows; null when it shows none, as of `live`.
    pub tau: Option<Tau>,
    /// The last hold of the guest; null when it was never held.
    pub hold: Option<Hold>,
    /// The audit read inside that hold, or of a snapshot's pages while they were protected from
    /// writing; null when there was none.
    pub audit: Option<Audit>,
    /// How written pages were tracked while the guest ran; null when they were not.
    #[serde(default)]
    pub tracking: Option<Tracking>,
    /// What is known of QEMU's snapshot; null for every other method.
    #[serde(default)]
    pub snapshot: Option<Snapshot>,
    /// How QEMU copied its memory in slices; null for every other method than `pmemsave`.
    #[serde(default)]
    pub slices: Option<Slices>,
    /// What is known of QEMU's dump; null for every other method than `dump`.
    #[serde(default)]
    pub dump: Option<Dump>,
    /// The vCPUs' registers, by QEMU's word; null when nobody asked for them.
    #[serde(default)]
    pub registers: Option<Registers>,
    /// What the examiner says of the case.
    pub case: Case,
    /// Who ran the tool.
    pub operator: Operator,
    /// The host's clock.
    pub clock: Clock,
    /// The tool.
    pub tool: Tool,
    /// The processes that the tool ran as, and the rights that each kept.
    pub processes: Vec<Process>,
    /// The host that the VM ran on.
    pub host: Host,
    /// The virtual machine.
    pub vm: Vm,
    /// Guest-physical memory before the first read: regions in ascending order, disjoint. Those
    /// of kind `ram`, `rom` and `device-ram` are in the image.
    pub map: MemoryMap,
    /// The texts that the map was drawn from, and whether it was the same afterwards.
    pub map_check: MapCheck,
    /// What was done with each region of the map, and with memory that lies under something else.
    #[serde(default)]
    pub decisions: Vec<Decided>,
    /// How much memory the guest has, and what moved in it meanwhile; null when QEMU was not asked.
    #[serde(default)]
    pub amount: Option<Amount>,
    /// Parameters of the method as used, by name.
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// From the first to the last read of guest memory; null when nothing was read.
    pub window: Option<Span>,
    /// The passes over memory, numbered from 1.
    pub passes: Vec<Pass>,
    /// How far the two reads of each block agreed; null when no block was read twice, and when the
    /// guest was followed: then only what had been written was read again.
    pub stable: Option<Stable>,
    /// How many bytes of imaged memory are in each state.
    pub states: StateBytes,
    /// What is not known, ascending and disjoint: every unreadable, excluded and not reached range
    /// of imaged memory, up to 65,536 of them; any more are in the block records only.
    #[schemars(length(max = 65_536))]
    pub losses: Vec<Loss>,
    /// Where captured bytes first rested.
    pub store: StoreKind,
    /// The image; null when none was sealed.
    pub image: Option<Image>,
    /// SHA-256 over `start u64le | len u64le | known u8 | sha256[32]` of every recorded block in
    /// address order; null without an image. The same for every method, read size and format.
    pub memory_root: Option<Digest>,
    /// The block records; null without an image.
    pub blocks: Option<BlocksFile>,
    /// The journal.
    pub journal: JournalFile,
    /// Other files of the exhibit, such as registers and device state.
    pub attachments: Vec<FileRecord>,
    /// What the acquisition cost the host.
    pub footprint: Footprint,
    /// Every change that was made to the VM, QEMU or the host, and why.
    pub changes_made: Vec<Change>,
    /// What happened during the acquisition that makes the image one of a machine that did not stay
    /// itself, such as a reset: anything here counts as a loss.
    pub disturbances: Vec<String>,
    /// What may weaken the class: devices that write past the tracking, events in the window.
    pub caveats: Vec<String>,
    /// What this record does not show. Always holds the sentence that the source was volatile.
    pub limitations: Vec<String>,
    /// What went otherwise than it should, without loss.
    pub warnings: Vec<String>,
}

/// The instant that the image shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tau {
    /// Monotonic nanoseconds since the start of the acquisition.
    pub mono_ns: u64,
    /// The same in UTC, RFC 3339 with `Z`.
    pub utc: String,
    /// The true instant is at most this far away, clock error included, in nanoseconds.
    pub bound_ns: u64,
}

/// How the guest was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HoldKind {
    /// QEMU's threads were stopped by ptrace.
    Ptrace,
    /// QEMU was asked by `stop` and `cont`; a VM that was found paused was not asked.
    Stop,
    /// QEMU stopped the guest for its own dump, and let it go on at its end.
    Dump,
}

impl HoldKind {
    /// The kind's word on the command line and in the record.
    pub fn word(self) -> &'static str {
        match self {
            HoldKind::Ptrace => "ptrace",
            HoldKind::Stop => "stop",
            HoldKind::Dump => "dump",
        }
    }
}

/// One hold of the guest. Times are monotonic nanoseconds since the start of the acquisition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// How.
    pub kind: HoldKind,
    /// When the first thread was interrupted, or `stop` or the dump's command was sent: the guest's
    /// stall began then at the earliest.
    pub began_ns: u64,
    /// From here on nothing of the guest ran.
    pub held_ns: u64,
    /// Up to here nothing of the guest ran.
    pub released_ns: u64,
    /// When the last thread was let go, `cont` was answered, or QEMU had told that the guest goes on:
    /// the stall ended then at the latest.
    pub ended_ns: u64,
    /// Threads that were stopped; 0 when QEMU stopped itself.
    pub threads: u32,
    /// Tries that it took: a thread that could not be stopped in time let all others go again.
    pub tries: u32,
    /// Whether it lasted from the first to the last read, as the kernel or QEMU said after the last
    /// read.
    pub lasted: bool,
    /// The stall budget in nanoseconds.
    pub budget_ns: u64,
    /// What was expected beforehand, in nanoseconds.
    pub expected_ns: u64,
}

impl Hold {
    /// The longest that the guest can have felt, in nanoseconds.
    pub fn stall_ns(&self) -> u64 {
        self.ended_ns.saturating_sub(self.began_ns)
    }
}

/// Pages read again while nothing could change them, drawn at random: those that had been read, while
/// the guest was still held; of a snapshot, pages that were still protected from writing, held
/// against what QEMU sent of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// Pages read again.
    pub pages: u64,
    /// Of these, pages whose bytes were other ones than those kept: one voids the class.
    pub differing: u64,
    /// Upper bound, at 95 % confidence, of the share of pages that a second read would have found
    /// different: 3 divided by `pages`, 1 at most; null when a page differed or none was read.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub bound_95: Option<f64>,
    /// First guest-physical addresses of pages that differed, at most 64.
    #[schemars(length(max = 64))]
    pub differing_at: Vec<String>,
}

impl Audit {
    /// What reading `pages` pages again showed. `differing_at` are the addresses that differed.
    pub fn new(pages: u64, differing_at: &[u64]) -> Self {
        let differing = u64::try_from(differing_at.len()).unwrap_or(u64::MAX);
        // A sample of at most some thousand pages: exact in f64.
        #[allow(clippy::cast_precision_loss)]
        let bound = (differing == 0 && pages > 0).then(|| (3.0 / pages as f64).min(1.0));
        let listed = differing_at.iter().take(64).map(|gpa| format!("{gpa:#x}"));
        Self { pages, differing, bound_95: bound, differing_at: listed.collect() }
    }
}

/// How `track` followed the guest: the kernel marks the pages that are written (soft-dirty), and
/// each round reads those that were marked. Times are monotonic nanoseconds since the start of the
/// acquisition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tracking {
    /// The I/O horizon in nanoseconds: a device's write is assumed to reach memory within this time
    /// after its page was given to the device. No page was read sooner after it was seen written.
    pub io_horizon_ns: u64,
    /// The longest mean time that QEMU's block devices took for a request between two looks
    /// meanwhile, in nanoseconds; null when there was no request or QEMU did not say.
    pub block_latency_ns: Option<u64>,
    /// Whether the guest was held whenever marks were looked at and cleared, as the class needs.
    pub held: bool,
    /// The first clearing of the marks, with the guest running.
    pub first_clear: Span,
    /// The looks at the marks, in order, each with what followed.
    pub rounds: Vec<Round>,
}

/// One look at the marks of written pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// The guest's stall: from the first thread that was told to stop to the last that was let go.
    pub stall: Span,
    /// The look itself.
    pub scan: Span,
    /// Pages found written, or otherwise not known to be as they were read.
    pub written_pages: u64,
    /// The marks were cleared in this hold, and the pages read afterwards while the guest ran.
    pub clear: Option<Span>,
    /// The pages were read in this hold, the last one.
    pub read: Option<Span>,
}

/// QEMU's background snapshot. Times are monotonic nanoseconds since the start of the acquisition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// QEMU's word for how it ended: `completed`, `failed`, `cancelled`; null when it did not say.
    pub status: Option<String>,
    /// Why it failed, by QEMU's word.
    pub error: Option<String>,
    /// From QEMU's event STOP to its event RESUME, by the host's clock: the guest stood, and the
    /// image shows what its memory was then. Null when QEMU told of no such stop.
    pub stop: Option<Span>,
    /// How long the guest stood by QEMU's own word, in milliseconds.
    pub qemu_downtime_ms: Option<u64>,
    /// From the command to the end by QEMU's own word, in milliseconds.
    pub qemu_total_ms: Option<u64>,
    /// How long the stop was expected to be, in nanoseconds.
    pub expected_ns: u64,
    /// The stall budget in nanoseconds.
    pub budget_ns: u64,
    /// The longest time for which QEMU's stream lay unread, in nanoseconds, to some milliseconds: a
    /// guest that wrote to a protected page may have waited so long for us, beside what QEMU takes.
    pub longest_wait_ns: u64,
    /// QEMU's settings of migration are those that it had before.
    pub restored: bool,
    /// Machine type by the stream; null, as all below, when it was not read to its end.
    pub machine: Option<String>,
    /// Bytes of the stream.
    pub stream_bytes: Option<u64>,
    /// Pages with bytes in the stream.
    pub pages: Option<u64>,
    /// Pages that QEMU found to be zeros.
    pub zero_pages: Option<u64>,
    /// Pages of memory that is not in the image, such as video memory that is not mapped.
    pub other_pages: Option<u64>,
    /// Devices whose state is in the stream, in its order.
    pub devices: Vec<SnapshotDevice>,
    /// The first place where the stream and QEMU's description of it disagree; null when there is
    /// none.
    pub unaccounted: Option<String>,
}

/// Slices that QEMU copied (`pmemsave`). The guest's CPUs wait for each where they need QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Slices {
    /// Who had QEMU copy.
    pub by: SliceWay,
    /// How many.
    pub count: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// The most bytes that one had, at first.
    pub slice_bytes: u64,
    /// And in the end: half as many after each one that took longer than the stall budget, twice as many
    /// after some that took little.
    pub last_bytes: u64,
    /// How long the longest took, in nanoseconds, from the question to QEMU to its answer: the guest
    /// waited no longer.
    pub longest_ns: u64,
    /// All of them together.
    pub total_ns: u64,
    /// The stall budget in nanoseconds.
    pub budget_ns: u64,
    /// How many took longer than that.
    pub over_budget: u64,
}

/// QEMU's own dump (`dump-guest-memory`), written into a socket of ours. The guest stands until it is
/// whole: the hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dump {
    /// QEMU's word for how it ended: `completed`, `failed`; null when QEMU did not say.
    pub status: Option<String>,
    /// QEMU's reason for an end too soon.
    pub error: Option<String>,
    /// The longest that QEMU's bytes lay unread, in nanoseconds.
    pub longest_wait_ns: u64,
    /// Bytes of the stream; null when it was not whole, as all below.
    pub stream_bytes: Option<u64>,
    /// Pages with bytes.
    pub pages: Option<u64>,
    /// Pages of zeros.
    pub zero_pages: Option<u64>,
    /// Pages of memory that the image does not have, such as NVDIMMs.
    pub other_pages: Option<u64>,
}

/// The vCPUs' registers as QEMU's dump gives them: what it writes before memory, in a file of its own.
/// Times are monotonic nanoseconds since the start of the acquisition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    /// Where they are from.
    pub source: RegistersSource,
    /// The guest stood some time between, and the registers are those of that stop.
    pub stood: Span,
    /// They are those of the instant that the image shows.
    pub of_tau: bool,
    /// The guest's instruction set, by the dump's ELF header: `x86-64`, `i386` (the first vCPU is not
    /// in long mode), `aarch64`.
    pub machine: String,
    /// The vCPUs by QEMU's index, in the order of the notes.
    #[schemars(length(max = 65_536))]
    pub cpus: Vec<u32>,
    /// The guest left its own note (vmcoreinfo device) there.
    pub guest_note: bool,
    /// How the ranges of memory that the dump names differ from the map; null when they agree.
    pub map_difference: Option<String>,
    /// The attachment: an ELF core without its memory.
    pub file: String,
}

/// Where registers are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RegistersSource {
    /// The dump that the image is from.
    Dump,
    /// A dump of which nothing but the head was read: QEMU stopped the guest for it.
    HeaderOnlyDump,
}

/// Who has QEMU copy its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SliceWay {
    /// We, by QMP `pmemsave` into a file in memory.
    #[default]
    Pmemsave,
    /// libvirt, by DOMAIN_MEMORY_PEEK: QMP `pmemsave` into a file on the host's disk, which libvirt reads
    /// and removes.
    MemoryPeek,
}

/// A device whose state is in a snapshot's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDevice {
    /// QEMU's name of its section.
    pub name: String,
    /// Number among the sections of that name.
    pub instance: u32,
    /// Version of its fields; null for devices that QEMU does not describe.
    pub version: Option<u32>,
    /// Bytes of its state.
    pub len: u64,
}

/// A process of the tool and the rights that it kept, as it read them back from the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// `guardian`, `capture`, `holder`, `reader` or `seal`.
    pub role: String,
    /// Its process id.
    pub pid: u32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective capabilities, as a mask in hexadecimal.
    pub capabilities: String,
    /// Whether it can gain no rights by exec any more.
    pub no_new_privs: bool,
    /// Version of the kernel's Landlock interface that its ruleset was made for; null without one.
    pub landlock_abi: Option<u32>,
    /// `allow-list` or `deny-list` of ours, else what was found.
    pub seccomp: String,
    /// What was asked for and this host does not have.
    pub missing: Vec<String>,
}

/// What the examiner says of the case; null where nothing was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Number of the case.
    pub number: Option<String>,
    /// Number of the exhibit in the case.
    pub exhibit: Option<String>,
    /// Who is responsible for the acquisition.
    pub examiner: Option<String>,
    /// By what authority it was made: warrant, contract, ticket.
    pub authority: Option<String>,
}

/// Who ran the tool, by the kernel's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// Real user id.
    pub uid: u32,
    /// Effective user id.
    pub euid: u32,
    /// Real group id.
    pub gid: u32,
    /// The user id that logged in, before `su` and `sudo` (`/proc/self/loginuid`); null when the
    /// kernel keeps none or none is set.
    pub loginuid: Option<u32>,
    /// Name of the real user; null when the host has none for it.
    pub user: Option<String>,
    /// `SUDO_USER` of the environment: whoever set it, sudo or not.
    pub sudo_user: Option<String>,
    /// The controlling terminal; null when there was none.
    pub tty: Option<String>,
}

/// The host's clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    /// UTC at monotonic time 0, the start of the acquisition: RFC 3339 with `Z`.
    pub utc_start: String,
    /// UTC when this record was written.
    pub utc_end: String,
    /// Monotonic nanoseconds since the start of the acquisition when this record was written.
    pub mono_end_ns: u64,
    /// Whether the kernel held its clock for synchronised at the start (`adjtimex`).
    pub synchronised: Option<bool>,
    /// The kernel's estimate of the clock's error in microseconds (`adjtimex` esterror).
    pub estimated_error_us: Option<u64>,
    /// The kernel's bound of the clock's error in microseconds (`adjtimex` maxerror).
    pub max_error_us: Option<u64>,
    /// How much more UTC advanced than monotonic time during the acquisition, in microseconds: not
    /// near 0 when the clock was stepped.
    pub step_us: Option<i64>,
    /// The host's local time minus UTC in seconds.
    pub local_offset_s: Option<i32>,
}

/// The tool that made the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The target that it was built for.
    pub target: String,
    /// SHA-256 of the executable that ran; null when it could not be read.
    pub exe_sha256: Option<Digest>,
    /// Its arguments, itself first; secrets replaced.
    pub argv: Vec<String>,
}

/// The host that the VM ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name.
    pub hostname: String,
    /// Release and version of its kernel.
    pub kernel: String,
    /// Machine of its kernel, such as `x86_64`.
    pub machine: String,
    /// Name of its distribution.
    pub distribution: Option<String>,
    /// Identifies this boot of its kernel.
    pub boot_id: String,
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory in bytes.
    pub mem_total: u64,
}

/// The virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name, as given to QEMU; empty when it has none.
    pub name: String,
    /// Its UUID; null when it has none.
    pub uuid: Option<String>,
    /// QEMU's process id.
    pub pid: u32,
    /// When that process started, in clock ticks since the boot (field 22 of `/proc/PID/stat`).
    /// With boot id and process id it names the process for ever.
    pub start_time_ticks: u64,
    /// Path of QEMU's executable.
    pub exe: String,
    /// SHA-256 of QEMU's executable; null when it was not read.
    pub exe_sha256: Option<Digest>,
    /// QEMU's version and package, by its own word.
    pub qemu_version: String,
    /// The machine type, such as `pc-q35-10.0`.
    pub machine: String,
    /// What the guest runs on: QEMU's target, such as `x86_64`.
    pub arch: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// QEMU's command line, itself first; secrets replaced, bytes that are not UTF-8 replaced.
    pub cmdline: Vec<String>,
    /// How QEMU was asked: the monitor's path or what spoke for it.
    pub monitor: String,
    /// The VM's run state before anything was done, in QEMU's words.
    pub run_state_before: String,
    /// The same when all was done; null when QEMU could not be asked.
    pub run_state_after: Option<String>,
}

/// A file of the exhibit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name in the exhibit.
    #[schemars(regex(pattern = r"^[0-9A-Za-z_][0-9A-Za-z._-]{0,127}$"))]
    pub file: String,
    /// Its length in bytes.
    pub len: u64,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
}

/// QEMU's own texts of the memory map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MapCheck {
    /// The text before the first read: `map-before.txt`; null when the map was not taken.
    pub before: Option<FileRecord>,
    /// The text after the last read: `map-after.txt`; null when it was not taken again.
    pub after: Option<FileRecord>,
    /// Whether the map drawn afterwards equals `map`; null when it was not taken again.
    pub equal: Option<bool>,
}

/// Where memory went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Taken {
    /// Into the image.
    Image,
    /// The image has zeros in its place: it was left out on request, and is a loss.
    Excluded,
    /// Into a file of its own.
    File,
    /// It was not read.
    Nowhere,
}

/// What was done with a piece of memory, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Decided {
    /// First guest-physical address.
    #[serde(with = "hex")]
    #[schemars(with = "String", regex(pattern = r"^0x(0|[1-9a-f][0-9a-f]{0,15})$"))]
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The region's kind, or `hidden`: it lies under something else.
    pub kind: String,
    /// QEMU's name of the MemoryRegion.
    pub name: String,
    /// Offset of its first byte in that region, or its RAMBlock.
    #[serde(with = "hex")]
    #[schemars(with = "String")]
    pub offset: u64,
    /// What answers the guest in its place, by QEMU's name; null when it is not hidden.
    pub under: Option<String>,
    /// Where it went.
    pub taken: Taken,
    /// Its own file, among the attachments; null without one.
    pub file: Option<String>,
    /// Why.
    pub why: String,
    /// When its own file was read: not at the image's instant; null without one.
    pub read: Option<Span>,
    /// All bytes of its own file are known: where some could not be read the file has zeros.
    pub known: bool,
}

/// How much memory the guest has by QEMU's word, before the first read and after the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Amount {
    /// What the machine started with, in bytes.
    pub base_bytes: u64,
    /// What was plugged into it, in bytes: of virtio-mem what the guest has; null when QEMU does not say.
    pub plugged_bytes_before: Option<u64>,
    /// The same after the last read.
    pub plugged_bytes_after: Option<u64>,
    /// The memory devices before the first read.
    pub devices_before: Vec<Plugged>,
    /// The memory devices after the last read; null when they were not asked for again.
    pub devices_after: Option<Vec<Plugged>>,
    /// The balloon; null when there is none, or QEMU did not say.
    pub balloon: Option<Inflation>,
}

/// A memory device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plugged {
    /// QEMU's word: `dimm`, `nvdimm`, `virtio-mem` ..
    pub kind: String,
    /// The id that its user gave it.
    pub id: Option<String>,
    /// Its first guest-physical address.
    #[serde(
        default,
        serialize_with = "hex::optional",
        deserialize_with = "hex::deserialize_optional"
    )]
    #[schemars(with = "Option<String>")]
    pub gpa: Option<u64>,
    /// Bytes that it gives the guest: of virtio-mem what is plugged.
    pub bytes: Option<u64>,
    /// virtio-mem: bytes that it can give.
    pub max_bytes: Option<u64>,
    /// virtio-mem: bytes that the guest was asked to take.
    pub requested_bytes: Option<u64>,
    /// virtio-mem: bytes that are plugged or not as one.
    pub block_bytes: Option<u64>,
}

/// The guest's balloon: how much of its memory it left the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Inflation {
    /// The device, as a path of QEMU's object model; null when it was not found there.
    pub device: Option<String>,
    /// Bytes of RAM left to the guest before the first read; null when the balloon came later.
    pub bytes_before: Option<u64>,
    /// The same after the last read; null when it was not asked again, or the balloon was gone.
    pub bytes_after: Option<u64>,
    /// The device lets the guest report free pages, which QEMU gives back to the host.
    pub free_page_reporting: bool,
    /// The device lets the guest tell a migration which pages are free.
    pub free_page_hint: bool,
    /// What the guest had told of its memory before the first read; null when QEMU does not ask it.
    pub statistics_before: Option<BalloonStatistics>,
    /// The same after the last read.
    pub statistics_after: Option<BalloonStatistics>,
    /// Changes that QEMU told of from the first look to the last, one in a second at most.
    pub changes: Vec<BalloonChange>,
}

/// What a guest told of its memory through its balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatistics {
    /// QEMU asks the guest so often, in seconds.
    pub interval_s: u64,
    /// When the guest told it, in seconds since 1970 by the host's clock; null when it had not.
    pub updated_s: Option<u64>,
    /// The figures by QEMU's names, such as `stat-free-memory`: bytes or counts, as the guest told them.
    pub values: BTreeMap<String, u64>,
}

/// A change of the balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonChange {
    /// When QEMU told of it, in microseconds of UTC; null when it could not read the clock.
    pub utc_us: Option<i64>,
    /// Bytes of RAM left to the guest from then on.
    pub bytes: u64,
}

/// One pass over memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pass {
    /// Its number, from 1.
    pub n: u32,
    /// Its first read: monotonic nanoseconds since the start of the acquisition.
    pub t0_ns: u64,
    /// The end of its last read.
    pub t1_ns: u64,
    /// Bytes that it read from the guest.
    pub bytes: u64,
}

/// How far two reads of memory agreed: two independent reads gave the same bytes, no more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stable {
    /// Pages whose bytes were read twice and were equal. Holes are not read and do not count.
    pub pages_equal: u64,
    /// Pages that were read twice and differed: listed block by block in the block records.
    pub pages_changed: u64,
    /// `pages_equal / (pages_equal + pages_changed)`.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
}

impl Stable {
    /// The stable share of these counts; `None` when no page was read twice.
    pub fn new(pages_equal: u64, pages_changed: u64) -> Option<Self> {
        let all = pages_equal.checked_add(pages_changed).filter(|&all| all > 0)?;
        // Counts of pages stay below 2^52, where f64 is exact.
        #[allow(clippy::cast_precision_loss)]
        let share = pages_equal as f64 / all as f64;
        Some(Self { pages_equal, pages_changed, share })
    }
}

/// Bytes of imaged memory by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateBytes {
    /// In pages that were read and hold a byte that is not zero.
    pub data: u64,
    /// In pages that were read and are all zero.
    pub zero: u64,
    /// In pages that the host had no memory for: never touched, or given back. They read as zero.
    pub hole: u64,
    /// Outside the guest's memory by QEMU's own bitmap: unplugged virtio-mem.
    pub discarded: u64,
    /// In pages that the host could not read; zeros in the image.
    pub unreadable: u64,
    /// In pages left out on request; zeros in the image.
    pub excluded: u64,
}

impl StateBytes {
    /// Counts `len` more bytes in `state`.
    pub fn add(&mut self, state: PageState, len: u64) {
        let count = match state {
            PageState::Data => &mut self.data,
            PageState::Zero => &mut self.zero,
            PageState::Hole => &mut self.hole,
            PageState::Discarded => &mut self.discarded,
            PageState::Unreadable => &mut self.unreadable,
            PageState::Excluded => &mut self.excluded,
        };
        *count = count.saturating_add(len);
    }

    /// Bytes in any state.
    pub fn total(&self) -> u64 {
        [self.data, self.zero, self.hole, self.discarded, self.unreadable, self.excluded]
            .iter()
            .fold(0, |sum, &len| sum.saturating_add(len))
    }
}

/// Why bytes of imaged memory are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// The host could not read them.
    Unreadable,
    /// They were left out on request.
    Excluded,
    /// The acquisition ended before they were read: their blocks have no record.
    NotReached,
}

/// A range of imaged memory whose bytes are not known; zeros in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// First guest-physical address.
    #[serde(with = "hex")]
    #[schemars(with = "String", regex(pattern = r"^0x(0|[1-9a-f][0-9a-f]{0,15})$"))]
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Which kind of loss.
    pub kind: LossKind,
    /// What stood in the way: the kernel's error, the request.
    pub reason: String,
}

/// The image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Its name in the exhibit: `memory.` and the format.
    pub file: String,
    /// How guest memory lies in it.
    pub format: Format,
    /// Its length in bytes.
    pub len: u64,
    /// SHA-256 of the whole file; null when it was left out (`--file-digest no`): the digests of
    /// blocks and of other bytes still cover every byte that is not zero.
    pub sha256: Option<Digest>,
    /// Contiguous ranges of guest memory in it.
    pub segments: u64,
    /// SHA-256 over `offset u64le | len u64le | bytes` of every header and note, by offset. All
    /// bytes that are neither guest memory nor these are zero.
    pub other_bytes_sha256: Digest,
}

/// The block records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlocksFile {
    /// Their name in the exhibit: `blocks.jsonl.zst`.
    pub file: String,
    /// Number of records.
    pub count: u64,
    /// SHA-256 of the file as it is, compressed.
    pub sha256: Digest,
}

/// The journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JournalFile {
    /// Its name in the exhibit: `journal.jsonl`.
    pub file: String,
    /// Number of lines.
    pub lines: u64,
    /// SHA-256 of its last line without the newline. As each line names the digest of the one
    /// before it, this fixes the whole file.
    pub head: Digest,
}

/// What the acquisition cost the host, in bytes; null where it was not measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Footprint {
    /// QEMU's resident memory before the first read.
    pub qemu_rss_before: Option<u64>,
    /// QEMU's resident memory after the last read.
    pub qemu_rss_after: Option<u64>,
    /// QEMU's page tables before the first read.
    pub qemu_page_tables_before: Option<u64>,
    /// QEMU's page tables after the last read.
    pub qemu_page_tables_after: Option<u64>,
    /// Guest memory in the host's swap before the first read.
    pub swapped_before: Option<u64>,
    /// Guest memory in the host's swap after the last read.
    pub swapped_after: Option<u64>,
    /// The host's available memory before the first read.
    pub host_available_before: Option<u64>,
    /// The host's available memory when the record was written.
    pub host_available_after: Option<u64>,
    /// The tool's greatest resident memory, the store not counted.
    pub tool_peak_rss: Option<u64>,
    /// The store's size.
    pub store_bytes: Option<u64>,
}

/// Something that was changed, and why it had to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// What was changed, and whether it was put back.
    pub what: String,
    /// Why it could not be avoided.
    pub why: String,
}

/// Why bytes are not a manifest of this version.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MAX_LEN`].
    #[error("longer than the {MAX_LEN} bytes that a manifest may have")]
    TooLong,
    /// Not JSON, or without a schema version.
    #[error("no manifest: {0}")]
    NoVersion(String),
    /// A version that this crate does not know.
    #[error("its version is {0:?}, this program knows {SCHEMA:?}")]
    UnknownVersion(String),
    /// The fields are not those of the schema.
    #[error("does not follow its schema: {0}")]
    Fields(String),
}

/// A field that contradicts another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// The field, as a path: `image.file`.
    pub field: String,
    /// What is wrong with it.
    pub text: String,
}

impl Manifest {
    /// Reads a manifest of unknown origin: its length first, then its version alone, then the
    /// rest. [`Manifest::contradictions`] looks at what the fields say.
    ///
    /// # Errors
    /// [`ManifestError`]
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        /// The one field that every version has.
        #[derive(Deserialize)]
        struct Version {
            schema: String,
        }
        if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_LEN) {
            return Err(ManifestError::TooLong);
        }
        let Version { schema } = serde_json::from_slice(bytes)
            .map_err(|error| ManifestError::NoVersion(error.to_string()))?;
        if schema != SCHEMA {
            return Err(ManifestError::UnknownVersion(schema));
        }
        serde_json::from_slice(bytes).map_err(|error| ManifestError::Fields(error.to_string()))
    }

    /// The bytes of `manifest.json`: indented JSON with a newline at its end.
    ///
    /// # Errors
    /// Only when a number in `parameters` is none that JSON has.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The files that the manifest names with a digest of their own: map texts, attachments.
    pub fn files(&self) -> impl Iterator<Item = &FileRecord> {
        self.map_check.before.iter().chain(&self.map_check.after).chain(&self.attachments)
    }

    /// Everything that the manifest says wrong about itself.
    pub fn contradictions(&self) -> Vec<Contradiction> {
        let mut out = Out(Vec::new());
        self.check_identity(&mut out);
        self.check_status(&mut out);
        self.check_files(&mut out);
        self.check_times(&mut out);
        self.check_hold(&mut out);
        self.check_amounts(&mut out);
        self.check_losses(&mut out);
        out.0
    }

    fn check_identity(&self, out: &mut Out) {
        let hyphens = [8, 13, 18, 23];
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let uuid = self.record_id.len() == 36
            && self.record_id.bytes().enumerate().all(|(at, b)| match hyphens.contains(&at) {
                true => b == b'-',
                false => digit(b),
            });
        out.unless(uuid, "record_id", "is no UUID in lower case");
        out.unless(
            self.limitations.iter().any(|l| l == VOLATILE),
            "limitations",
            "does not say that the source was volatile",
        );
    }

    fn check_status(&self, out: &mut Out) {
        let complete = self.status == Status::Complete;
        let reason_fits = complete == self.end_reason.is_none();
        out.unless(reason_fits, "end_reason", "must be there exactly when it ended early");
        let sealed = self.image.is_some();
        out.unless(
            sealed == self.blocks.is_some() && sealed == self.memory_root.is_some(),
            "image",
            "image, blocks and memory_root must be there together",
        );
        out.unless(sealed || !complete, "image", "a complete acquisition has one");
        out.unless(
            !sealed || self.status != Status::Failed,
            "image",
            "a failed acquisition has none",
        );
        out.unless(self.window.is_some() || !sealed, "window", "an image has one");
        let taken = self.map_check.before.is_some();
        out.unless(taken || !sealed, "map_check.before", "an image has one");
        let again = self.map_check.after.is_some();
        out.unless(again || !complete, "map_check.after", "a complete acquisition has one");
        out.unless(
            again == self.map_check.equal.is_some(),
            "map_check.equal",
            "must be there exactly when the map was taken again",
        );
        let live = self.method == Method::Live;
        out.unless(!live || self.class == Class::None, "class", "of method live is none");
        out.unless(!live || self.tau.is_none(), "tau", "method live shows no single instant");
        let instant = self.class != Class::None;
        let tau = !instant || self.tau.is_some();
        out.unless(tau, "tau", "the class says that the image shows one instant");
        let by_hold = matches!(self.method, Method::Freeze | Method::Track | Method::Dump);
        let lasted = self.hold.as_ref().is_some_and(|hold| hold.lasted);
        out.unless(!instant || !by_hold || lasted, "hold", "the class needs one that lasted");
        let differs = self.audit.as_ref().is_some_and(|audit| audit.differing > 0);
        out.unless(!instant || !differs, "audit", "a page that differed voids the class");
        let still = self.hold.is_some() || self.snapshot.is_some();
        out.unless(still || self.audit.is_none(), "audit", "there was no hold to read in");
        self.check_tracking(out);
        self.check_snapshot(out);
        self.check_slices(out);
        self.check_dump(out);
    }

    fn check_dump(&self, out: &mut Out) {
        let own = self.method == Method::Dump;
        let by_dump = self.hold.as_ref().is_some_and(|hold| hold.kind == HoldKind::Dump);
        out.unless(
            own || !by_dump,
            "hold.kind",
            "no other method than dump is held by QEMU's dump",
        );
        out.unless(own || self.dump.is_none(), "dump", "is of no other method than dump");
        if own && self.class != Class::None {
            let dump = self.dump.as_ref();
            let whole = dump.is_some_and(|dump| dump.stream_bytes.is_some());
            out.unless(whole, "dump.stream_bytes", "the class needs the whole stream");
            let status = dump.and_then(|dump| dump.status.as_deref());
            out.unless(status == Some("completed"), "dump.status", "the class needs a whole one");
            out.unless(by_dump, "hold.kind", "the class needs that of the dump");
        }
        let Some(registers) = &self.registers else { return };
        let from_dump = registers.source == RegistersSource::Dump;
        out.unless(own == from_dump, "registers.source", "is not that of the method");
        let named = self.attachments.iter().any(|file| file.file == registers.file);
        out.unless(named, "registers.file", "is no attachment");
        let stood = registers.stood;
        let ordered = stood.t0_ns <= stood.t1_ns && stood.t1_ns <= self.clock.mono_end_ns;
        out.unless(ordered, "registers.stood", "runs backwards or ends after the record");
        let instant = !registers.of_tau || self.tau.is_some();
        out.unless(instant, "registers.of_tau", "there is no instant that they could be of");
    }

    fn check_slices(&self, out: &mut Out) {
        let own = self.method == Method::Pmemsave;
        let whole = !own || self.status != Status::Complete || self.slices.is_some();
        out.unless(whole, "slices", "method pmemsave copies in slices");
        out.unless(!own || self.class == Class::None, "class", "of method pmemsave is none");
        let Some(slices) = &self.slices else { return };
        out.unless(own, "slices", "is of no other method than pmemsave");
        let ordered = slices.longest_ns <= slices.total_ns && slices.over_budget <= slices.count;
        out.unless(ordered, "slices", "a part is greater than the whole");
        let fit = slices.bytes <= slices.count.saturating_mul(slices.slice_bytes);
        out.unless(
            fit && slices.last_bytes <= slices.slice_bytes,
            "slices",
            "are longer than said",
        );
    }

    fn check_snapshot(&self, out: &mut Out) {
        let instant = self.class != Class::None && self.method == Method::Snapshot;
        let Some(snapshot) = &self.snapshot else {
            return out.unless(!instant, "snapshot", "the class of method snapshot needs it");
        };
        let own = self.method == Method::Snapshot;
        out.unless(own, "snapshot", "is of no other method than snapshot");
        let class = matches!(self.class, Class::None | Class::QuasiInstantaneous);
        out.unless(class, "class", "of method snapshot is quasi-instantaneous at best");
        let whole = snapshot.stream_bytes.is_some();
        out.unless(!instant || whole, "snapshot.stream_bytes", "the class needs the whole stream");
        let completed = snapshot.status.as_deref() == Some("completed");
        out.unless(!instant || completed, "snapshot.status", "the class needs a whole one");
        let stop = snapshot.stop;
        out.unless(!instant || stop.is_some(), "snapshot.stop", "the class needs it");
        let Some(stop) = stop else { return };
        let ordered = stop.t0_ns <= stop.t1_ns && stop.t1_ns <= self.clock.mono_end_ns;
        out.unless(ordered, "snapshot.stop", "runs backwards or ends after the record");
        if let Some(tau) = &self.tau {
            let inside = (stop.t0_ns..=stop.t1_ns).contains(&tau.mono_ns);
            out.unless(inside, "tau.mono_ns", "does not lie in the snapshot's stop");
            let half = stop.t1_ns.saturating_sub(stop.t0_ns) / 2;
            out.unless(tau.bound_ns >= half, "tau.bound_ns", "is less than half of the stop");
        }
    }

    fn check_tracking(&self, out: &mut Out) {
        let instant = self.class != Class::None && self.method == Method::Track;
        let Some(tracking) = &self.tracking else {
            return out.unless(!instant, "tracking", "the class of method track needs it");
        };
        let track = self.method == Method::Track;
        out.unless(track, "tracking", "is of no other method than track");
        out.unless(self.stable.is_none(), "stable", "not all pages were read twice");
        out.unless(!instant || tracking.held, "tracking.held", "the class needs it");
        let last = tracking.rounds.last();
        let read = last.is_some_and(|round| round.read.is_some());
        out.unless(!instant || read, "tracking.rounds", "the class needs a last one that reads");
        let mut behind = tracking.first_clear;
        for (at, round) in tracking.rounds.iter().enumerate() {
            let field = format!("tracking.rounds[{at}]");
            let parts = [Some(round.scan), round.clear, round.read].into_iter().flatten();
            let mut ordered = behind.t0_ns <= behind.t1_ns && behind.t1_ns <= round.stall.t0_ns;
            let mut end = round.stall.t0_ns;
            for part in parts {
                ordered &= end <= part.t0_ns && part.t0_ns <= part.t1_ns;
                end = part.t1_ns;
            }
            out.unless(ordered && end <= round.stall.t1_ns, &field, "runs backwards");
            let one = round.clear.is_none() || round.read.is_none();
            out.unless(one, &field, "clears after it has read: what was written then is lost");
            behind = round.stall;
        }
    }

    fn check_files(&self, out: &mut Out) {
        if let Some(image) = &self.image {
            let name = image_name(image.format);
            out.unless(image.file == name, "image.file", &format!("is not {name}"));
        }
        if let Some(blocks) = &self.blocks {
            let right = blocks.file == exhibit::BLOCKS;
            out.unless(right, "blocks.file", &format!("is not {}", exhibit::BLOCKS));
        }
        let right = self.journal.file == exhibit::JOURNAL;
        out.unless(right, "journal.file", &format!("is not {}", exhibit::JOURNAL));
        let map_texts = [
            (&self.map_check.before, "map_check.before", exhibit::MAP_BEFORE),
            (&self.map_check.after, "map_check.after", exhibit::MAP_AFTER),
        ];
        for (text, field, name) in map_texts {
            let right = text.as_ref().is_none_or(|text| text.file == name);
            out.unless(right, &format!("{field}.file"), &format!("is not {name}"));
        }
        self.check_attachments(out);
    }

    fn check_attachments(&self, out: &mut Out) {
        let own = [
            exhibit::MANIFEST,
            exhibit::BLOCKS,
            exhibit::JOURNAL,
            exhibit::MAP_BEFORE,
            exhibit::MAP_AFTER,
        ];
        let mut seen = BTreeSet::new();
        for (at, attachment) in self.attachments.iter().enumerate() {
            let name = attachment.file.as_str();
            let image = Format::ALL.iter().any(|&format| name == image_name(format));
            let free = is_file_name(name) && sums::covers(name) && !own.contains(&name) && !image;
            let field = format!("attachments[{at}].file");
            out.unless(free, &field, "is no name that an attachment may have");
            out.unless(seen.insert(name), &field, "stands twice");
        }
    }

    fn check_times(&self, out: &mut Out) {
        let utc =
            [("clock.utc_start", &self.clock.utc_start), ("clock.utc_end", &self.clock.utc_end)];
        for (field, text) in utc.into_iter().chain(self.tau.iter().map(|t| ("tau.utc", &t.utc))) {
            out.unless(is_utc(text), field, "is no UTC time");
        }
        let Some(window) = self.window else {
            return out.unless(self.passes.is_empty(), "passes", "there were reads but no window");
        };
        let ordered = window.t0_ns <= window.t1_ns && window.t1_ns <= self.clock.mono_end_ns;
        out.unless(ordered, "window", "runs backwards or ends after the record was written");
        for (pass, number) in self.passes.iter().zip(1u32..) {
            let field = format!("passes[{}]", number - 1);
            out.unless(pass.n == number, &field, "is not numbered in order");
            let span = Span { t0_ns: pass.t0_ns, t1_ns: pass.t1_ns };
            let inside = window.covers(span) && span.t0_ns <= span.t1_ns;
            out.unless(inside, &field, "runs backwards or out of the window");
        }
    }

    fn check_hold(&self, out: &mut Out) {
        let Some(hold) = &self.hold else { return };
        let times =
            [hold.began_ns, hold.held_ns, hold.released_ns, hold.ended_ns, self.clock.mono_end_ns];
        out.unless(times.is_sorted(), "hold", "runs backwards or ends after the record");
        if let Some(tau) = &self.tau {
            let inside = (hold.held_ns..=hold.released_ns).contains(&tau.mono_ns);
            out.unless(inside, "tau.mono_ns", "does not lie in the hold");
            let half = (hold.released_ns.saturating_sub(hold.held_ns)) / 2;
            out.unless(tau.bound_ns >= half, "tau.bound_ns", "is less than half of the hold");
        }
        if let (Some(window), true) = (self.window, self.class == Class::Instantaneous) {
            let inside = hold.held_ns <= window.t0_ns && window.t1_ns <= hold.released_ns;
            out.unless(inside, "window", "is not within the hold");
        }
        if let Some(audit) = &self.audit {
            let fits = audit.differing <= audit.pages
                && audit.bound_95.is_some() == (audit.differing == 0 && audit.pages > 0);
            out.unless(fits, "audit", "its counts and its bound do not fit each other");
        }
    }

    fn check_amounts(&self, out: &mut Out) {
        if let Some(stable) = self.stable {
            let right = Stable::new(stable.pages_equal, stable.pages_changed)
                .is_some_and(|right| (right.share - stable.share).abs() < 1e-9);
            out.unless(right, "stable.share", "is not that of its page counts");
        }
        if self.image.is_none() {
            let nothing = self.states == StateBytes::default() && self.stable.is_none();
            return out.unless(nothing, "states", "there is no image that they could be of");
        }
        let listed = self.lost(LossKind::NotReached);
        out.unless(
            self.states.total().saturating_add(listed) == self.map.imaged_len()
                || self.losses.len() >= MAX_LOSSES,
            "states",
            "with what was not reached, they are not all of the imaged memory",
        );
    }

    /// Bytes of the losses of one kind.
    pub fn lost(&self, kind: LossKind) -> u64 {
        let of_kind = self.losses.iter().filter(|loss| loss.kind == kind);
        of_kind.fold(0u64, |sum, loss| sum.saturating_add(loss.len))
    }

    /// Imaged memory with neighbouring regions merged: a loss may go over their border.
    fn imaged_memory(&self) -> Vec<GuestRange> {
        let mut out: Vec<GuestRange> = Vec::new();
        for (_, range) in self.map.imaged() {
            match out.last_mut() {
                Some(last) if last.end() == range.start() => {
                    *last = GuestRange::from_ends(last.start(), range.end()).unwrap_or(*last);
                }
                _ => out.push(range),
            }
        }
        out
    }

    fn check_losses(&self, out: &mut Out) {
        out.unless(self.losses.len() <= MAX_LOSSES, "losses", "are more than a record may list");
        let imaged = self.imaged_memory();
        let mut behind = 0;
        for (at, loss) in self.losses.iter().enumerate() {
            let field = || format!("losses[{at}]");
            let Some(range) = GuestRange::new(loss.gpa, loss.len) else {
                out.add(field(), "is empty or wraps");
                continue;
            };
            let ascending = range.start() >= behind;
            out.unless(ascending, &field(), "does not lie behind the one before it");
            behind = range.end();
            let after = imaged.partition_point(|memory| memory.start() <= range.start());
            let memory = after.checked_sub(1).and_then(|at| imaged.get(at));
            let imaged = memory.is_some_and(|memory| memory.covers(range));
            out.unless(imaged, &field(), "does not lie in imaged memory");
        }
        if self.image.is_none() || self.losses.len() >= MAX_LOSSES {
            return;
        }
        let unreadable = self.lost(LossKind::Unreadable) == self.states.unreadable;
        out.unless(unreadable, "losses", "do not add up to the unreadable bytes of states");
        let excluded = self.lost(LossKind::Excluded) == self.states.excluded;
        out.unless(excluded, "losses", "do not add up to the excluded bytes of states");
        let reached = self.lost(LossKind::NotReached) == 0 || self.status == Status::Partial;
        out.unless(reached, "losses", "a complete acquisition reached all memory");
    }
}

struct Out(Vec<Contradiction>);

impl Out {
    fn add(&mut self, field: impl Into<String>, text: &str) {
        self.0.push(Contradiction { field: field.into(), text: text.into() });
    }

    fn unless(&mut self, right: bool, field: &str, text: &str) {
        if !right {
            self.add(field, text);
        }
    }
}

/// The JSON Schemas of an exhibit's files, each with the name of the file in `docs/schema` that
/// publishes it.
pub fn schemas() -> [(&'static str, schemars::Schema); 3] {
    let named = |id: &str, mut schema: schemars::Schema| {
        schema.insert("$id".into(), id.into());
        schema
    };
    [
        (
            "manifest-1.schema.json",
            named("urn:stillframe:manifest:1", schemars::schema_for!(Manifest)),
        ),
        ("block-record-1.schema.json", named("urn:stillframe:block-record:1", record::schema())),
        ("journal-line-1.schema.json", named("urn:stillframe:journal-line:1", journal::schema())),
    ]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::digest::sha256;
    use crate::map::tests::ram;
    use serde_json::{Value, json};
    use std::path::Path;

    /// A complete `live` acquisition of 3 MiB.
    pub(crate) fn example() -> Manifest {
        let file = |name: &str| FileRecord {
            file: name.into(),
            len: u64::try_from(name.len()).unwrap(),
            sha256: sha256(name.as_bytes()),
        };
        Manifest {
            schema: SCHEMA.into(),
            record_id: "3f2a9c1e-0000-7000-8000-000000000001".into(),
            status: Status::Complete,
            end_reason: None,
            class: Class::None,
            method: Method::Live,
            tau: None,
            hold: None,
            audit: None,
            tracking: None,
            snapshot: None,
            slices: None,
            dump: None,
            registers: None,
            case: Case { number: Some("2026-117".into()), ..Case::default() },
            operator: Operator {
                uid: 1000,
                euid: 0,
                gid: 1000,
                loginuid: Some(1000),
                user: Some("examiner".into()),
                sudo_user: None,
                tty: Some("/dev/pts/0".into()),
            },
            clock: Clock {
                utc_start: "2026-11-22T21:30:00.000000001Z".into(),
                utc_end: "2026-11-22T21:30:09Z".into(),
                mono_end_ns: 9_000_000_000,
                synchronised: Some(true),
                estimated_error_us: Some(20),
                max_error_us: Some(2_000),
                step_us: Some(-1),
                local_offset_s: Some(3600),
            },
            tool: Tool {
                name: "stillframe".into(),
                version: "0.1.0".into(),
                target: "x86_64-unknown-linux-gnu".into(),
                exe_sha256: Some(sha256(b"stillframe")),
                argv: vec!["stillframe".into(), "acquire".into(), "web-07".into()],
            },
            processes: vec![Process {
                role: "seal".into(),
                pid: 4713,
                uid: 65534,
                capabilities: "0x0".into(),
                no_new_privs: true,
                landlock_abi: Some(4),
                seccomp: "allow-list".into(),
                missing: Vec::new(),
            }],
            host: Host {
                hostname: "host-1".into(),
                kernel: "6.1.0-28-amd64".into(),
                machine: "x86_64".into(),
                distribution: Some("Debian GNU/Linux 12".into()),
                boot_id: "1d0c3a52-6f3c-4b8e-9b44-0f4f4f4a4b4c".into(),
                cpus: 8,
                mem_total: 64 << 30,
            },
            vm: Vm {
                name: "web-07".into(),
                uuid: None,
                pid: 4711,
                start_time_ticks: 123_456,
                exe: "/usr/bin/qemu-system-x86_64".into(),
                exe_sha256: None,
                qemu_version: "10.0.2".into(),
                machine: "pc-q35-10.0".into(),
                arch: "x86_64".into(),
                accelerator: "kvm".into(),
                cpus: 2,
                cmdline: vec!["qemu-system-x86_64".into()],
                monitor: "/run/web-07.qmp".into(),
                run_state_before: "running".into(),
                run_state_after: Some("running".into()),
            },
            map: MemoryMap::new(vec![ram(0, 2 << 20), ram(4 << 30, 1 << 20)]).unwrap(),
            map_check: MapCheck {
                before: Some(file(exhibit::MAP_BEFORE)),
                after: Some(file(exhibit::MAP_AFTER)),
                equal: Some(true),
            },
            decisions: vec![
                Decided {
                    gpa: 0,
                    len: 2 << 20,
                    kind: "ram".into(),
                    name: "pc.ram".into(),
                    offset: 0,
                    under: None,
                    taken: Taken::Image,
                    file: None,
                    why: "the guest's RAM".into(),
                    read: None,
                    known: false,
                },
                Decided {
                    gpa: 0xa_0000,
                    len: 0x2_0000,
                    kind: "hidden".into(),
                    name: "pc.ram".into(),
                    offset: 0xa_0000,
                    under: Some("vga-lowmem".into()),
                    taken: Taken::File,
                    file: Some("hidden-0xa0000-pc.ram.bin".into()),
                    why: "the guest does not see it".into(),
                    read: Some(Span { t0_ns: 3_000_000, t1_ns: 3_100_000 }),
                    known: true,
                },
            ],
            amount: Some(Amount {
                base_bytes: 2 << 20,
                plugged_bytes_before: Some(1 << 20),
                plugged_bytes_after: Some(1 << 20),
                devices_before: vec![Plugged {
                    kind: "dimm".into(),
                    id: Some("d0".into()),
                    gpa: Some(4 << 30),
                    bytes: Some(1 << 20),
                    max_bytes: None,
                    requested_bytes: None,
                    block_bytes: None,
                }],
                devices_after: None,
                balloon: Some(Inflation {
                    device: Some("/machine/peripheral/balloon0".into()),
                    bytes_before: Some(2 << 20),
                    bytes_after: Some(3 << 20),
                    free_page_reporting: true,
                    free_page_hint: false,
                    statistics_before: None,
                    statistics_after: Some(BalloonStatistics {
                        interval_s: 10,
                        updated_s: Some(1_764_000_000),
                        values: BTreeMap::from([("stat-free-memory".into(), 4096)]),
                    }),
                    changes: vec![BalloonChange { utc_us: Some(7), bytes: 3 << 20 }],
                }),
            }),
            parameters: serde_json::from_value(json!({"passes": 2})).unwrap(),
            window: Some(Span { t0_ns: 1_000, t1_ns: 5_000 }),
            passes: vec![
                Pass { n: 1, t0_ns: 1_000, t1_ns: 3_000, bytes: 3 << 20 },
                Pass { n: 2, t0_ns: 3_000, t1_ns: 5_000, bytes: 3 << 20 },
            ],
            stable: Stable::new(700, 68),
            states: StateBytes { data: 2 << 20, hole: 1 << 20, ..StateBytes::default() },
            losses: vec![],
            store: StoreKind::Ram,
            image: Some(Image {
                file: "memory.elf".into(),
                format: Format::Elf,
                len: 5 << 20,
                sha256: Some(sha256(b"image")),
                segments: 2,
                other_bytes_sha256: sha256(b"headers"),
            }),
            memory_root: Some(sha256(b"root")),
            blocks: Some(BlocksFile {
                file: exhibit::BLOCKS.into(),
                count: 3,
                sha256: sha256(b"blocks"),
            }),
            journal: JournalFile {
                file: exhibit::JOURNAL.into(),
                lines: 9,
                head: sha256(b"last line"),
            },
            attachments: vec![file("registers.json")],
            footprint: Footprint { qemu_rss_before: Some(3 << 20), ..Footprint::default() },
            changes_made: vec![Change {
                what: "a monitor connection".into(),
                why: "the map comes from QEMU".into(),
            }],
            disturbances: Vec::new(),
            caveats: vec![],
            limitations: vec![VOLATILE.into()],
            warnings: vec![],
        }
    }

    fn partial() -> Manifest {
        let mut manifest = example();
        manifest.status = Status::Partial;
        manifest.end_reason = Some("interrupted".into());
        manifest.states =
            StateBytes { data: 1 << 20, unreadable: 1 << 20, ..StateBytes::default() };
        let loss = |gpa, kind| Loss { gpa, len: 1 << 20, kind, reason: "EIO".into() };
        manifest.losses =
            vec![loss(1 << 20, LossKind::Unreadable), loss(4 << 30, LossKind::NotReached)];
        manifest
    }

    /// A complete `freeze`.
    fn freeze() -> Manifest {
        let mut manifest = example();
        (manifest.method, manifest.class) = (Method::Freeze, Class::Instantaneous);
        manifest.tau = Some(Tau {
            mono_ns: 2_100,
            utc: "2026-11-22T21:30:00.000002100Z".into(),
            bound_ns: 2_001_200,
        });
        manifest.hold = Some(Hold {
            kind: HoldKind::Ptrace,
            began_ns: 800,
            held_ns: 900,
            released_ns: 3_300,
            ended_ns: 3_400,
            threads: 5,
            tries: 1,
            lasted: true,
            budget_ns: 100_000_000,
            expected_ns: 3_000,
        });
        manifest.audit = Some(Audit::new(4096, &[]));
        manifest.window = Some(Span { t0_ns: 1_000, t1_ns: 3_000 });
        manifest.passes.truncate(1);
        manifest.stable = None;
        manifest
    }

    fn track() -> Manifest {
        let mut manifest = freeze();
        (manifest.method, manifest.class) = (Method::Track, Class::QuasiInstantaneous);
        let span = |t0_ns, t1_ns| Span { t0_ns, t1_ns };
        manifest.window = Some(span(300, 3_300));
        manifest.passes = vec![
            Pass { n: 1, t0_ns: 300, t1_ns: 400, bytes: 3 << 20 },
            Pass { n: 2, t0_ns: 600, t1_ns: 700, bytes: 8192 },
            Pass { n: 3, t0_ns: 2_000, t1_ns: 3_000, bytes: 4096 },
        ];
        manifest.tracking = Some(Tracking {
            io_horizon_ns: 100,
            block_latency_ns: Some(7),
            held: true,
            first_clear: span(100, 150),
            rounds: vec![
                Round {
                    stall: span(450, 550),
                    scan: span(460, 500),
                    written_pages: 2,
                    clear: Some(span(500, 540)),
                    read: None,
                },
                Round {
                    stall: span(800, 3_400),
                    scan: span(900, 1_900),
                    written_pages: 1,
                    clear: None,
                    read: Some(span(2_000, 3_000)),
                },
            ],
        });
        manifest
    }

    #[test]
    fn contradictions_of_tracking_are_named() {
        type Edit = fn(&mut Tracking);
        let cases: [(Edit, &str); 7] = [
            (|t| t.held = false, "tracking.held"),
            (|t| t.rounds.truncate(1), "tracking.rounds"),
            (|t| t.rounds[1].read = None, "tracking.rounds"),
            (|t| t.rounds[0].read = Some(t.rounds[0].scan), "tracking.rounds[0]"),
            (|t| t.rounds[0].clear = Some(t.first_clear), "tracking.rounds[0]"),
            (|t| t.rounds[0].stall.t0_ns = 120, "tracking.rounds[0]"),
            (|t| t.rounds[1].stall.t1_ns = 2_500, "tracking.rounds[1]"),
        ];
        for (number, (edit, field)) in cases.into_iter().enumerate() {
            let mut manifest = track();
            edit(manifest.tracking.as_mut().unwrap());
            let named: Vec<_> = manifest.contradictions().into_iter().map(|c| c.field).collect();
            assert!(named.iter().any(|named| named == field), "{number}: {named:?}");
        }
        let mut without = track();
        without.tracking = None;
        assert!(without.contradictions().iter().any(|c| c.field == "tracking"));
        let mut stable = track();
        stable.stable = Stable::new(7, 1);
        assert!(stable.contradictions().iter().any(|c| c.field == "stable"));
        let mut other = freeze();
        other.tracking = track().tracking;
        assert!(other.contradictions().iter().any(|c| c.field == "tracking"));
    }

    #[test]
    fn contradictions_of_slices_are_named() {
        type Edit = fn(&mut Manifest);
        let cases: [(Edit, &str); 6] = [
            (|m| m.slices = None, "slices"),
            (|m| m.method = Method::Live, "slices"),
            (|m| m.class = Class::Instantaneous, "class"),
            (|m| m.slices.as_mut().unwrap().longest_ns = 7_001, "slices"),
            (|m| m.slices.as_mut().unwrap().bytes = 8193, "slices"),
            (|m| m.slices.as_mut().unwrap().over_budget = 3, "slices"),
        ];
        let mut whole = example();
        whole.method = Method::Pmemsave;
        whole.slices = Some(Slices {
            by: SliceWay::Pmemsave,
            count: 2,
            bytes: 8192,
            slice_bytes: 4096,
            last_bytes: 4096,
            longest_ns: 4_000,
            total_ns: 7_000,
            budget_ns: 9_000,
            over_budget: 0,
        });
        assert_eq!(whole.contradictions(), []);
        for (number, (edit, field)) in cases.into_iter().enumerate() {
            let mut manifest = whole.clone();
            edit(&mut manifest);
            let named: Vec<_> = manifest.contradictions().into_iter().map(|c| c.field).collect();
            assert!(named.iter().any(|named| named == field), "{number}: {named:?}");
        }
    }

    fn snapshot() -> Manifest {
        let mut manifest = freeze();
        (manifest.method, manifest.class) = (Method::Snapshot, Class::QuasiInstantaneous);
        manifest.hold = None;
        manifest.snapshot = Some(Snapshot {
            status: Some("completed".into()),
            error: None,
            stop: Some(Span { t0_ns: 900, t1_ns: 3_100 }),
            qemu_downtime_ms: Some(1),
            qemu_total_ms: Some(9),
            expected_ns: 2_000,
            budget_ns: 9_000,
            longest_wait_ns: 10,
            restored: true,
            machine: Some("pc-q35-10.0".into()),
            stream_bytes: Some(5 << 20),
            pages: Some(700),
            zero_pages: Some(68),
            other_pages: Some(0),
            devices: vec![],
            unaccounted: None,
        });
        manifest
    }

    #[test]
    fn contradictions_of_a_snapshot_are_named() {
        assert_eq!(snapshot().contradictions(), []);
        type Edit = fn(&mut Manifest, &mut Snapshot);
        let cases: [(Edit, &str); 6] = [
            (|_, s| s.status = Some("failed".into()), "snapshot.status"),
            (|_, s| s.stop = None, "snapshot.stop"),
            (|_, s| s.stream_bytes = None, "snapshot.stream_bytes"),
            (|_, s| s.stop = Some(Span { t0_ns: 3_000, t1_ns: 3_100 }), "tau.mono_ns"),
            (|m, _| m.class = Class::Instantaneous, "class"),
            (|m, _| m.tau.as_mut().unwrap().bound_ns = 1, "tau.bound_ns"),
        ];
        for (number, (edit, field)) in cases.into_iter().enumerate() {
            let mut manifest = snapshot();
            let mut part = manifest.snapshot.take().unwrap();
            edit(&mut manifest, &mut part);
            manifest.snapshot = Some(part);
            let named: Vec<_> = manifest.contradictions().into_iter().map(|c| c.field).collect();
            assert!(named.iter().any(|named| named == field), "{number}: {named:?}");
        }
        let mut without = snapshot();
        without.snapshot = None;
        assert!(without.contradictions().iter().any(|c| c.field == "snapshot"));
        let mut other = freeze();
        other.snapshot = snapshot().snapshot;
        assert!(other.contradictions().iter().any(|c| c.field == "snapshot"));
    }

    fn failed() -> Manifest {
        let mut manifest = example();
        manifest.status = Status::Failed;
        manifest.end_reason = Some("the VM vanished".into());
        (manifest.image, manifest.blocks, manifest.memory_root) = (None, None, None);
        (manifest.window, manifest.stable, manifest.passes) = (None, None, vec![]);
        manifest.states = StateBytes::default();
        manifest
    }

    #[test]
    fn sound_records_do_not_contradict_themselves() {
        for manifest in [example(), partial(), freeze(), track(), failed()] {
            assert_eq!(manifest.contradictions(), []);
            let json = manifest.to_json().unwrap();
            assert_eq!(Manifest::parse(&json).unwrap(), manifest);
            assert!(json.ends_with(b"}\n"));
        }
    }

    #[test]
    fn contradictions_are_named_by_field() {
        type Edit = fn(&mut Manifest);
        let cases: [(Edit, &str); 27] = [
            (|m| m.record_id = m.record_id.to_uppercase(), "record_id"),
            (|m| m.limitations.clear(), "limitations"),
            (|m| m.end_reason = Some("x".into()), "end_reason"),
            (|m| m.status = Status::Partial, "end_reason"),
            (|m| m.blocks = None, "image"),
            (|m| m.memory_root = None, "image"),
            (|m| m.map_check.after = None, "map_check.after"),
            (|m| m.map_check.equal = None, "map_check.equal"),
            (|m| m.class = Class::Instantaneous, "class"),
            (|m| m.method = Method::Track, ""),
            (|m| (m.method, m.class) = (Method::Track, Class::QuasiInstantaneous), "tau"),
            (|m| m.image.as_mut().unwrap().format = Format::Raw, "image.file"),
            (|m| m.blocks.as_mut().unwrap().file = "../x".into(), "blocks.file"),
            (|m| m.journal.file = "x".into(), "journal.file"),
            (|m| m.map_check.before.as_mut().unwrap().file = "x".into(), "map_check.before.file"),
            (|m| m.attachments[0].file = "../x".into(), "attachments[0].file"),
            (|m| m.attachments[0].file = "report.html".into(), "attachments[0].file"),
            (|m| m.attachments[0].file = "memory.raw".into(), "attachments[0].file"),
            (|m| m.attachments.push(m.attachments[0].clone()), "attachments[1].file"),
            (|m| m.clock.utc_start = "yesterday".into(), "clock.utc_start"),
            (|m| m.window = None, "window"),
            (|m| m.clock.mono_end_ns = 4_999, "window"),
            (|m| m.passes[1].n = 3, "passes[1]"),
            (|m| m.passes[0].t0_ns = 999, "passes[0]"),
            (|m| m.stable.as_mut().unwrap().share = 1.0, "stable.share"),
            (|m| m.states.zero = 1, "states"),
            (|m| (m.states.hole, m.states.excluded) = (0, 1 << 20), "losses"),
        ];
        for (edit, field) in cases {
            let mut manifest = example();
            edit(&mut manifest);
            let found = manifest.contradictions();
            assert_eq!(found.is_empty(), field.is_empty(), "{field}: {found:?}");
            assert!(field.is_empty() || found.iter().any(|c| c.field == field), "{found:?}");
        }
    }

    #[test]
    fn one_instant_needs_a_hold_that_lasted() {
        type Edit = fn(&mut Manifest);
        let cases: [(Edit, &str); 10] = [
            (|m| m.hold = None, "hold"),
            (|m| m.hold.as_mut().unwrap().lasted = false, "hold"),
            (|m| m.hold.as_mut().unwrap().held_ns = 700, "hold"),
            (|m| m.audit = Some(Audit::new(9, &[0x1000])), "audit"),
            (|m| m.audit.as_mut().unwrap().bound_95 = None, "audit"),
            (|m| m.tau = None, "tau"),
            (|m| m.tau.as_mut().unwrap().mono_ns = 899, "tau.mono_ns"),
            (|m| m.tau.as_mut().unwrap().bound_ns = 1_199, "tau.bound_ns"),
            (|m| m.window = Some(Span { t0_ns: 899, t1_ns: 3_000 }), "window"),
            (|m| m.hold.as_mut().unwrap().released_ns = 2_999, "window"),
        ];
        for (edit, field) in cases {
            let mut manifest = freeze();
            edit(&mut manifest);
            let found = manifest.contradictions();
            assert!(found.iter().any(|c| c.field == field), "{field}: {found:?}");
        }
        let void = Manifest { class: Class::None, ..freeze() };
        assert_eq!(void.contradictions(), []);
    }

    #[test]
    fn the_bound_of_an_audit_is_that_of_its_sample() {
        assert_eq!(Audit::new(300, &[]).bound_95, Some(0.01));
        assert_eq!(Audit::new(2, &[]).bound_95, Some(1.0));
        assert_eq!(Audit::new(0, &[]).bound_95, None);
        let differs = Audit::new(300, &[0x1000, 0x2000]);
        assert_eq!((differs.differing, differs.bound_95), (2, None));
        assert_eq!(differs.differing_at, ["0x1000", "0x2000"]);
    }

    #[test]
    fn losses_lie_in_imaged_memory_in_order() {
        type Edit = fn(&mut Manifest);
        let cases: [(Edit, &str); 4] = [
            (|m| m.losses.reverse(), "losses[1]"),
            (|m| m.losses[0].len = 0, "losses[0]"),
            (|m| m.losses[1].gpa = 8 << 30, "losses[1]"),
            (|m| m.losses[1].kind = LossKind::Excluded, "losses"),
        ];
        for (edit, field) in cases {
            let mut manifest = partial();
            edit(&mut manifest);
            let found = manifest.contradictions();
            assert!(found.iter().any(|c| c.field == field), "{field}: {found:?}");
        }
    }

    #[test]
    fn a_loss_may_go_over_the_border_of_two_regions() {
        let mut manifest = partial();
        let regions = vec![ram(0, 0x18_0000), ram(0x18_0000, 0x8_0000), ram(4 << 30, 1 << 20)];
        manifest.map = MemoryMap::new(regions).unwrap();
        assert_eq!(manifest.contradictions(), []);
    }

    #[test]
    fn the_version_is_read_before_the_rest() {
        let parse = |json: Value| Manifest::parse(json.to_string().as_bytes());
        // A future record with fields that we do not know is refused by its version.
        let future = parse(json!({"schema": "stillframe/manifest/2", "pages": {}}));
        assert!(matches!(future, Err(ManifestError::UnknownVersion(v)) if v.ends_with("/2")));
        assert!(matches!(parse(json!({"x": 1})), Err(ManifestError::NoVersion(_))));
        assert!(matches!(parse(json!({"schema": SCHEMA})), Err(ManifestError::Fields(_))));
        assert!(matches!(Manifest::parse(b"\xff"), Err(ManifestError::NoVersion(_))));
        let mut unknown = serde_json::to_value(example()).unwrap();
        unknown["vm"]["colour"] = json!("red");
        assert!(matches!(parse(unknown), Err(ManifestError::Fields(_))));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(matches!(Manifest::parse(deep.as_bytes()), Err(ManifestError::NoVersion(_))));
    }

    /// With `UPDATE_SCHEMA=1` writes the published schemas, else compares them.
    #[test]
    fn the_published_schemas_are_those_of_the_code() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schema");
        for (name, schema) in schemas() {
            let text = format!("{}\n", serde_json::to_string_pretty(&schema).unwrap());
            let path = dir.join(name);
            if std::env::var_os("UPDATE_SCHEMA").is_some() {
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(&path, &text).unwrap();
            }
            let published = std::fs::read_to_string(&path).unwrap();
            assert!(published == text, "{name} differs; UPDATE_SCHEMA=1 writes it anew");
        }
    }

    fn validator(name: &str) -> jsonschema::Validator {
        let (_, schema) = schemas().into_iter().find(|(n, _)| *n == name).unwrap();
        jsonschema::validator_for(&serde_json::to_value(schema).unwrap()).unwrap()
    }

    #[test]
    fn what_is_written_follows_the_published_schema() {
        let manifests = validator("manifest-1.schema.json");
        for manifest in [example(), partial(), freeze(), track(), failed()] {
            let json = serde_json::to_value(&manifest).unwrap();
            let errors: Vec<_> = manifests.iter_errors(&json).map(|e| e.to_string()).collect();
            assert_eq!(errors, Vec::<String>::new());
        }
        let blocks = validator("block-record-1.schema.json");
        let record = serde_json::to_value(crate::record::tests::changed_record()).unwrap();
        assert!(blocks.is_valid(&record));
        let lines = validator("journal-line-1.schema.json");
        let mut journal = crate::journal::Journal::new(Vec::new());
        let data = serde_json::from_value(json!({"path": "/run/a"})).unwrap();
        journal.append(7, "2026-11-22T21:30:00Z", "map-taken", data).unwrap();
        assert!(lines.is_valid(&serde_json::from_slice(&journal.into_inner()).unwrap()));
    }

    #[test]
    fn the_schema_refuses_what_the_reader_refuses() {
        let manifests = validator("manifest-1.schema.json");
        let edits: [(&str, Value); 8] = [
            ("/schema", json!("stillframe/manifest/2")),
            ("/record_id", json!("x")),
            ("/status", json!("done")),
            ("/image/sha256", json!("ABC")),
            ("/map/0/gpa", json!(0)),
            ("/attachments/0/file", json!("../x")),
            ("/vm", json!({})),
            ("/stable/share", json!(1.5)),
        ];
        for (pointer, value) in edits {
            let mut json = serde_json::to_value(example()).unwrap();
            assert!(manifests.is_valid(&json));
            *json.pointer_mut(pointer).unwrap() = value;
            assert!(!manifests.is_valid(&json), "{pointer}");
        }
    }
}
