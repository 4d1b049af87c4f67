//! What to do, decided from facts, map and wish: a pure function, so that `stillframe plan` prints
//! exactly what `stillframe acquire` would do, with the reasons.

use crate::speed::Speed;
use evidence::format::Format;
use evidence::manifest::Class;
pub use evidence::manifest::{HoldKind, Method, SliceWay, StoreKind};
use evidence::state::PAGE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What the operator asks of the image's consistency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The image must show one instant.
    #[default]
    PointInTime,
    /// An image smeared over the time of its reading will do.
    Any,
}

/// How the guest may be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HoldWish {
    /// By ptrace while that is short enough, else by QEMU.
    #[default]
    Auto,
    /// Only by ptrace.
    Ptrace,
    /// Only by QEMU's `stop` and `cont`.
    Stop,
}

/// The longest hold by ptrace: QEMU's virtual clock runs on, and what the guest waits for comes
/// late all at once.
const PTRACE_AT_MOST: Duration = Duration::from_secs(1);

/// Pages that the audit read takes at most.
pub const AUDIT_PAGES: u64 = AUDIT_PAGES_32 as u64;
const AUDIT_PAGES_32: u32 = 4096;

/// What a hold takes beside the reading, as planned: the last measurements are in
/// docs/measurements.md. By ptrace for each thread; by QEMU, which writes its disks out.
const PTRACE_A_THREAD: Duration = Duration::from_micros(100);
const PTRACE_ONCE: Duration = Duration::from_millis(3);
const STOP_ONCE: Duration = Duration::from_millis(20);

/// What QEMU takes to write 1 GiB of a dump into our socket, as planned: docs/measurements.md.
const DUMP_A_GIB_NS: u64 = 2_200_000_000;

/// What QEMU needs for a snapshot while the guest stands, beside protecting its memory: disks are
/// written out, the devices' state is kept.
const SNAPSHOT_ONCE: Duration = Duration::from_millis(25);

/// What bringing back a page from swap may take, as planned: a random read of a slow disk.
const SWAP_PAGE: Duration = Duration::from_micros(200);

/// The most bytes that QEMU copies at a time: a block. docs/methods.md has what it costs the guest.
pub const SLICE_AT_MOST: u64 = 1 << 20;

/// What is done with guest memory that the host has swapped out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SwapWish {
    /// It is read, which brings it back, unless it is much.
    #[default]
    Some,
    /// It is read, however much it is.
    In,
    /// It is left where it is: zeros in the image, and a loss.
    Skip,
}

/// Memory that may be taken or left by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// ROM that is plain memory; in the image.
    Rom,
    /// RAM that a device owns; in the image.
    DeviceRam,
    /// Flash; in files of its own.
    Romd,
    /// NVDIMMs; in files of their own, on request.
    Nvdimm,
    /// RAM that lies under something else; in files of its own.
    Hidden,
}

impl Part {
    /// The part's word on the command line and in the record.
    pub fn word(self) -> &'static str {
        match self {
            Part::Rom => "rom",
            Part::DeviceRam => "device-ram",
            Part::Romd => "romd",
            Part::Nvdimm => "nvdimm",
            Part::Hidden => "hidden",
        }
    }
}

/// The operator's wish.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The method asked for by name: consent to its class.
    pub method: Option<Method>,
    /// What consistency is asked for when no method is named.
    pub consistency: Consistency,
    /// The longest stall of the guest that is allowed.
    pub stall_budget: Duration,
    /// How the guest may be held.
    pub hold: HoldWish,
    /// `track`: the time within which a device's write is assumed to reach memory.
    pub io_horizon: Duration,
    /// `pmemsave`: the most bytes that QEMU copies at a time; at most [`SLICE_AT_MOST`].
    pub slice_bytes: u64,
    /// Take the vCPUs' registers too, by the head of QEMU's dump, for which QEMU stops the guest.
    pub registers: bool,
    /// `track`: so many times the marks of written pages are looked at and cleared with the guest
    /// running, which loses writes. For the control of a benchmark only; the class is then `none`.
    pub rounds_unheld: u32,
    /// The image's format.
    pub format: Format,
    /// The store asked for.
    pub store: Option<StoreKind>,
    /// What is done with guest memory that the host has swapped out.
    pub swap: SwapWish,
    /// Write to a filesystem that has little room or holds the VM's disks.
    pub force_output: bool,
    /// Take what the host sees of a confidential guest: ciphertext, or nothing.
    pub accept_ciphertext: bool,
    /// What is taken that is not taken unasked.
    pub include: Vec<Part>,
    /// What is left out that is taken unasked; wins over `include`.
    pub exclude: Vec<Part>,
}

impl Wish {
    /// Whether this part is taken.
    pub fn wants(&self, part: Part) -> bool {
        !self.excluded(part) && (part != Part::Nvdimm || self.include.contains(&part))
    }

    /// Whether it was asked that this part be left out.
    pub fn excluded(&self, part: Part) -> bool {
        self.exclude.contains(&part)
    }
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            method: None,
            consistency: Consistency::default(),
            stall_budget: Duration::from_millis(100),
            hold: HoldWish::default(),
            io_horizon: Duration::from_secs(1),
            slice_bytes: SLICE_AT_MOST,
            registers: false,
            rounds_unheld: 0,
            format: Format::Elf,
            store: None,
            swap: SwapWish::default(),
            force_output: false,
            accept_ciphertext: false,
            include: Vec::new(),
            exclude: Vec::new(),
        }
    }
}

/// The filesystem that the exhibit shall lie on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputFacts {
    /// The directory.
    pub path: String,
    /// It keeps files in the host's memory: tmpfs, ramfs.
    pub in_memory: bool,
    /// Bytes free to us.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// A disk image of the VM that lies on the same filesystem.
    pub vm_disk: Option<String>,
}

/// What is known of a hold beforehand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HoldFacts {
    /// The process that traces QEMU already, if one does.
    pub traced_by: Option<u32>,
    /// QEMU's threads.
    pub threads: u32,
    /// How fast memory is read; absent when no block was wholly in memory.
    pub speed: Option<Speed>,
    /// Bytes of memory that we may lock, where that is limited (RLIMIT_MEMLOCK).
    pub lock_limit_bytes: Option<u64>,
    /// vhost threads of the kernel that ptrace does not reach (before Linux 6.4); QEMU's `stop`
    /// stops them.
    pub vhost_in_kernel: bool,
    /// What may write guest memory while neither ptrace nor QEMU lets anything run.
    pub writers: Vec<String>,
}

/// What is known of tracking written pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrackFacts {
    /// Why it cannot be done, if it cannot.
    pub unfit: Option<String>,
    /// Nanoseconds to clear the marks of 1 GiB, tried out on memory of our own.
    pub clear_a_gib_ns: u64,
    /// Nanoseconds to look at the marks of 1 GiB, one thread.
    pub scan_a_gib_ns: u64,
}

/// What is known of QEMU's background snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotFacts {
    /// Why it cannot be taken, if it cannot.
    pub unfit: Option<String>,
    /// What would make it possible, if anything would.
    pub remedy: Option<String>,
    /// Nanoseconds to protect 1 GiB from writing, tried out on memory of our own.
    pub protect_a_gib_ns: u64,
    /// Bytes of shared memory that the host has nothing behind: QEMU gives them memory.
    pub shared_hole_bytes: u64,
    /// Block jobs under way.
    pub block_jobs: Vec<String>,
}

/// Everything that the decision rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Facts {
    /// QEMU's run state: `running`, `paused` ...
    pub run_state: String,
    /// Why the guest's memory is encrypted or hidden from the host, if it is.
    pub confidential: Option<String>,
    /// A migration under way, in QEMU's word for its status.
    pub migration: Option<String>,
    /// Commands go through libvirt, which marks the domain as tainted.
    #[serde(default)]
    pub through_libvirt: bool,
    /// Others need the monitor all the time, and we give it back after each question.
    #[serde(default)]
    pub shared_monitor: bool,
    /// What the VM's manager has it locked for.
    #[serde(default)]
    pub locked_for: Option<String>,
    /// Emulated watchdogs, by QEMU's names of their types. QEMU does not show their timeouts.
    pub watchdogs: Vec<String>,
    /// What is known of a hold beforehand.
    pub hold: HoldFacts,
    /// What is known of tracking written pages.
    pub track: TrackFacts,
    /// What is known of QEMU's background snapshot.
    pub snapshot: SnapshotFacts,
    /// Why this user may not look at QEMU's process, if so: nothing can be read but through QEMU.
    #[serde(default)]
    pub unseen: Option<String>,
    /// Why QEMU's dump cannot be used, if it cannot.
    #[serde(default)]
    pub dump_unfit: Option<String>,
    /// The most bytes of guest memory that are read in a second, if the operator set a limit.
    pub max_rate: Option<u64>,
    /// Bytes of guest memory that the image covers.
    pub image_bytes: u64,
    /// Of these, bytes that the host has memory for.
    pub resident_bytes: u64,
    /// Bytes of the blocks that hold them: what store and image set aside.
    pub reserve_bytes: u64,
    /// Of the resident bytes, those that the host has swapped out.
    pub swapped_bytes: u64,
    /// Of these, bytes of shared memory: the kernel does not tell which pages they are.
    #[serde(default)]
    pub swapped_shared_bytes: u64,
    /// Bytes of files that lie beside the image: memory that is hidden, flash, NVDIMMs.
    #[serde(default)]
    pub aside_bytes: u64,
    /// Bytes of memory that the host can give without swapping.
    pub available_bytes: u64,
    /// Bytes that a RAM store may take.
    pub ram_limit_bytes: u64,
    /// What sets that limit.
    pub ram_limit_by: String,
    /// Where the exhibit shall lie; absent when nobody said.
    pub output: Option<OutputFacts>,
    /// Why the image does not fit the format asked for, if it does not.
    pub format_unfit: Option<String>,
}

/// A method that was not taken, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rejected {
    /// The method.
    pub method: Method,
    /// The reason.
    pub reason: String,
}

/// A hold as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedHold {
    /// How.
    pub kind: HoldKind,
    /// How long it is expected to be, in nanoseconds.
    pub expected_ns: u64,
    /// When it is ended, done or not, in nanoseconds from its beginning: the stall budget, or less
    /// where the kind of hold allows less.
    pub at_most_ns: u64,
}

/// Following the guest, as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedTracking {
    /// Pages are read no sooner after they were seen written, in nanoseconds.
    pub io_horizon_ns: u64,
    /// The marks of written pages are cleared before the first pass and never again.
    pub clears_once: bool,
    /// How long clearing them is expected to take, in nanoseconds.
    pub clear_expected_ns: u64,
    /// Locked memory for what is read in the last hold, in bytes.
    pub buffer_bytes: u64,
    /// How fast memory is read.
    pub speed: Speed,
    /// [`Wish::rounds_unheld`]
    pub rounds_unheld: u32,
}

/// QEMU's snapshot, as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedSnapshot {
    /// How long the guest is expected to stand, in nanoseconds: disks are written out, the devices'
    /// state is kept, all memory is protected from writing.
    pub expected_ns: u64,
    /// The stall budget in nanoseconds: the stream is broken off when QEMU waits longer for us.
    pub at_most_ns: u64,
}

/// QEMU's dump, as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedDump {
    /// How long the guest is expected to stand, in nanoseconds: until all memory is written.
    pub expected_ns: u64,
    /// The stall budget in nanoseconds: the dump is broken off then, done or not.
    pub at_most_ns: u64,
}

/// QEMU's own copying, as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedSlices {
    /// Who has QEMU copy: libvirt, where it has the monitor.
    pub by: SliceWay,
    /// The most bytes that are asked for at a time.
    pub slice_bytes: u64,
    /// The stall budget in nanoseconds: a slice that takes longer makes the next ones smaller.
    pub at_most_ns: u64,
}

/// What will be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// The method.
    pub method: Method,
    /// The class that it earns.
    pub class: Class,
    /// Why this method.
    pub why: String,
    /// The others, and why not.
    pub rejected: Vec<Rejected>,
    /// The store.
    pub store: StoreKind,
    /// Why this store.
    pub store_why: String,
    /// The image's format.
    pub format: Format,
    /// How the guest is held; absent when it is not.
    pub hold: Option<PlannedHold>,
    /// How the guest is followed; absent when it is not.
    pub tracking: Option<PlannedTracking>,
    /// QEMU's snapshot; absent when it takes none.
    #[serde(default)]
    pub snapshot: Option<PlannedSnapshot>,
    /// QEMU's own copying; absent when it does not copy.
    #[serde(default)]
    pub slices: Option<PlannedSlices>,
    /// QEMU's dump; absent when it writes none.
    #[serde(default)]
    pub dump: Option<PlannedDump>,
    /// A dump of which nothing but the head is read, for the registers: how long it may take at most, in
    /// nanoseconds.
    #[serde(default)]
    pub registers_ns: Option<u64>,
    /// Bytes that the exhibit may need on disk.
    pub output_bytes: u64,
    /// The rights that the method needs beside QEMU's monitor.
    #[serde(default)]
    pub rights: String,
    /// What the run changes on the host or in QEMU.
    pub changes: Vec<String>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Why nothing will be done, and what would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Refusal {
    /// The reason.
    pub reason: String,
    /// The methods that were looked at, when it was for want of one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<Rejected>,
    /// Flags that would be accepted instead, or what to do first.
    pub remedies: Vec<String>,
}

impl Refusal {
    fn new(reason: impl Into<String>, remedies: &[&str]) -> Self {
        Self {
            reason: reason.into(),
            rejected: Vec::new(),
            remedies: remedies.iter().map(|&text| text.to_owned()).collect(),
        }
    }
}

/// Bytes of blocks, journal, map texts and manifest for an image of `image_bytes`: 512 bytes for
/// each MiB and 4 MiB for the rest.
fn record_bytes(image_bytes: u64) -> u64 {
    image_bytes / (1 << 20) * 512 + (4 << 20)
}

/// Bytes that the exhibit may need on disk: the blocks that hold anything, the image's head, what lies beside it, the
/// record.
fn output_bytes(facts: &Facts) -> u64 {
    let image = facts.reserve_bytes.saturating_add(2 << 20);
    image.saturating_add(facts.aside_bytes).saturating_add(record_bytes(facts.image_bytes))
}

/// Decides what to do.
///
/// # Errors
/// [`Refusal`] when nothing that was asked for is possible or safe.
pub fn choose(facts: &Facts, wish: &Wish) -> Result<Plan, Refusal> {
    refuse_unreadable(facts, wish.accept_ciphertext)?;
    refuse_swap(facts, wish)?;
    let unswapped = (wish.swap == SwapWish::Skip).then(|| left_in_swap(facts));
    let left_bytes = unswapped.as_ref().map_or(0, |_| facts.swapped_bytes);
    let facts = unswapped.as_ref().unwrap_or(facts);
    let Choice { method, why, rejected, way } = method(facts, wish)?;
    let Way { hold, tracking, snapshot, slices, dump } = way;
    let registers_ns = registers(facts, wish, method)?;
    if let Some(reason) = &facts.format_unfit {
        return Err(Refusal::new(reason.clone(), &["--format lime", "--format raw"]));
    }
    let output_bytes = output_bytes(facts);
    if let Some(output) = &facts.output
        && !wish.force_output
    {
        refuse_output(output, output_bytes)?;
    }
    let (store, store_why) = store(facts, wish, method)?;
    if !wish.force_output {
        refuse_memory(facts, store, output_bytes)?;
    }
    Ok(Plan {
        method,
        class: match method {
            Method::Freeze | Method::Dump => Class::Instantaneous,
            Method::Track if wish.rounds_unheld == 0 => Class::QuasiInstantaneous,
            Method::Snapshot => Class::QuasiInstantaneous,
            _ => Class::None,
        },
        why,
        rejected,
        store,
        store_why,
        format: wish.format,
        hold,
        tracking,
        snapshot,
        slices,
        dump,
        registers_ns,
        output_bytes,
        rights: rights(method).to_owned(),
        changes: changes(facts, store, way, registers_ns.is_some()),
        warnings: [warnings(facts, hold, snapshot), left_warning(left_bytes)].concat(),
    })
}

fn refuse_unreadable(facts: &Facts, accept_ciphertext: bool) -> Result<(), Refusal> {
    if let Some(what) = &facts.confidential
        && !accept_ciphertext
    {
        return Err(Refusal::new(
            format!("confidential guest ({what}): the host sees only ciphertext or nothing"),
            &[
                "take the memory from inside the guest, or from a guest without that protection",
                "--accept-ciphertext takes what the host sees",
            ],
        ));
    }
    if facts.run_state == "inmigrate" || facts.run_state == "postmigrate" {
        return Err(Refusal::new(
            format!(
                "the VM is in run state {:?}: its memory is arriving from, or has gone to, another host",
                facts.run_state
            ),
            &["take it where the VM runs"],
        ));
    }
    if let Some(status) = &facts.migration {
        return Err(Refusal::new(
            format!("a migration is under way (status {status:?})"),
            &["wait for it to end, or cancel it"],
        ));
    }
    if let Some(lock) = &facts.locked_for {
        return Err(Refusal::new(
            format!("Proxmox has the VM locked ({lock}): it is at work with its monitor"),
            &["wait for it to end; `qm config VMID` shows the lock"],
        ));
    }
    if facts.image_bytes == 0 {
        return Err(Refusal::new("the memory map holds no memory that can be imaged", &[]));
    }
    Ok(())
}

fn refuse_swap(facts: &Facts, wish: &Wish) -> Result<(), Refusal> {
    match wish.swap {
        SwapWish::Some if facts.swapped_bytes > facts.available_bytes / 2 => Err(Refusal::new(
            format!(
                "{} bytes of the guest are swapped out; reading brings them back, and the host has only {} bytes available",
                facts.swapped_bytes, facts.available_bytes
            ),
            &["--swap-in", "--swap skip leaves them out of the image"],
        )),
        SwapWish::Skip if facts.swapped_shared_bytes > 0 => Err(Refusal::new(
            format!(
                "{} bytes of the guest's shared memory are swapped out, and the kernel does not tell which pages \
                 they are: they cannot be left there",
                facts.swapped_shared_bytes
            ),
            &["--swap-in"],
        )),
        _ => Ok(()),
    }
}

/// What the operator should know of memory that is left in swap.
fn left_warning(bytes: u64) -> Vec<String> {
    let text = || {
        format!(
            "{bytes} bytes of the guest are in the host's swap and are left there: zeros in the image, and a loss"
        )
    };
    (bytes > 0).then(text).into_iter().collect()
}

/// The facts without what is left in swap.
fn left_in_swap(facts: &Facts) -> Facts {
    let resident_bytes = facts.resident_bytes.saturating_sub(facts.swapped_bytes);
    Facts { resident_bytes, swapped_bytes: 0, ..facts.clone() }
}

/// Whether the method can leave in swap what is there.
fn refuse_skip(wish: &Wish, method: Method) -> Result<(), Refusal> {
    if wish.swap != SwapWish::Skip || matches!(method, Method::Live | Method::Freeze) {
        return Ok(());
    }
    let why = match method {
        Method::Track => "follows pages that may come back from swap at any time",
        _ => "has QEMU read all of the guest's memory",
    };
    let reason = format!("{} {why}: --swap skip is not possible with it", method.word());
    Err(Refusal::new(reason, &["--method freeze", "--method live", "--swap in"]))
}

/// A method that was taken.
struct Choice {
    method: Method,
    why: String,
    rejected: Vec<Rejected>,
    way: Way,
}

/// How one instant is come by: all absent when it is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Way {
    hold: Option<PlannedHold>,
    tracking: Option<PlannedTracking>,
    snapshot: Option<PlannedSnapshot>,
    slices: Option<PlannedSlices>,
    dump: Option<PlannedDump>,
}

/// The methods, the one that `auto` likes best first.
const METHODS: [Method; 6] =
    [Method::Freeze, Method::Track, Method::Snapshot, Method::Live, Method::Dump, Method::Pmemsave];

fn method(facts: &Facts, wish: &Wish) -> Result<Choice, Refusal> {
    let Some(method) = wish.method else { return auto(facts, wish) };
    let way = way(facts, wish, method, 1)?;
    let others = METHODS.into_iter().filter(|other| *other != method);
    let rejected = others.map(|method| Rejected {
        method,
        reason: "another method was asked for by name".to_owned(),
    });
    let rejected = rejected.collect();
    let why = format!("asked for by name: --method {}", method.word());
    Ok(Choice { method, why, rejected, way })
}

/// How the guest is held and followed by `method`, when `margin` times what is expected is allowed.
fn way(facts: &Facts, wish: &Wish, method: Method, margin: u32) -> Result<Way, Refusal> {
    let mut way = Way::default();
    refuse_skip(wish, method)?;
    if facts.confidential.is_some() && !matches!(method, Method::Live | Method::Freeze) {
        let reason = format!("{} is not tried on a confidential guest", method.word());
        return Err(Refusal::new(reason, &["--method live", "--method freeze"]));
    }
    if !matches!(method, Method::Dump | Method::Pmemsave) {
        refuse_unseen(facts, method)?;
    }
    match method {
        Method::Freeze => way.hold = Some(freeze(facts, wish, margin)?),
        Method::Track => {
            let (hold, tracking) = track(facts, wish, margin)?;
            (way.hold, way.tracking) = (Some(hold), Some(tracking));
        }
        Method::Snapshot => way.snapshot = Some(snapshot(facts, wish, margin)?),
        Method::Pmemsave => way.slices = Some(slices(facts, wish)?),
        Method::Dump => way.dump = Some(dump(facts, wish)?),
        Method::Live => {}
    }
    Ok(way)
}

/// The rights that a method needs beside QEMU's monitor.
fn rights(method: Method) -> &'static str {
    match method {
        Method::Live => "the right to read QEMU's process (as a tracer)",
        Method::Freeze => {
            "the right to read QEMU's process and to stop its threads (as a tracer), and to lock memory"
        }
        Method::Track => {
            "the right to read QEMU's process and to stop its threads (as a tracer), CAP_SYS_ADMIN for frame \
             numbers, and to lock memory"
        }
        Method::Snapshot => {
            "the right to look at QEMU's process (as a tracer); QEMU needs userfaultfd"
        }
        Method::Dump | Method::Pmemsave => {
            "no right on QEMU's process; with that to read it (as a tracer), what QEMU gives is checked"
        }
    }
}

/// `dump` and `pmemsave` need no right on QEMU's process: what they read, QEMU gives them.
fn refuse_unseen(facts: &Facts, method: Method) -> Result<(), Refusal> {
    let Some(why) = &facts.unseen else { return Ok(()) };
    let reason = format!(
        "{} needs {}, which this user has not ({why}): run as root, or with CAP_SYS_PTRACE",
        method.word(),
        rights(method)
    );
    Err(Refusal::new(reason, &["run as root", "--method dump", "--method pmemsave"]))
}

/// `freeze`, else `track`, else `snapshot`, else what is asked for.
fn auto(facts: &Facts, wish: &Wish) -> Result<Choice, Refusal> {
    let mut rejected: Vec<Rejected> = Vec::new();
    let mut remedies: Vec<String> = Vec::new();
    for (method, why) in [
        (
            Method::Freeze,
            "the shortest way to an image of one instant: its hold is expected to be at most half the \
             stall budget",
        ),
        (
            Method::Track,
            "an image of one instant with the least stall: what the guest writes is followed while it \
             runs, and its last hold is expected to be at most half the stall budget",
        ),
        (
            Method::Snapshot,
            "an image of one instant that QEMU takes itself: the guest stands while its memory is \
             protected from writing, expected to be at most half the stall budget",
        ),
    ] {
        // A prediction can be off by half and the budget still be kept.
        match way(facts, wish, method, 2) {
            Ok(way) => {
                let later = METHODS.into_iter().skip_while(|other| *other != method).skip(1);
                rejected.extend(later.map(|other| Rejected {
                    method: other,
                    reason: format!("{} gives one instant within the stall budget", method.word()),
                }));
                return Ok(Choice { method, why: why.to_owned(), rejected, way });
            }
            Err(refusal) => {
                rejected.push(Rejected { method, reason: refusal.reason });
                let new = refusal.remedies.into_iter().filter(|new| !remedies.contains(new));
                let new: Vec<String> = new.collect();
                remedies.extend(new);
            }
        }
    }
    rejected.push(Rejected {
        method: Method::Dump,
        reason: format!(
            "the guest stands until QEMU has written all of its memory: {}",
            millis(of_gib(DUMP_A_GIB_NS, facts.image_bytes))
        ),
    });
    rejected.push(Rejected {
        method: Method::Pmemsave,
        reason: "its image is smeared as that of live is, and the guest waits for each slice"
            .to_owned(),
    });
    if wish.consistency == Consistency::Any && facts.unseen.is_some() {
        let why = "--consistency any allows a smeared image, and this user may read nothing but through \
                   QEMU";
        let way = way(facts, wish, Method::Pmemsave, 1)?;
        rejected.retain(|other| other.method != Method::Pmemsave);
        if let Err(refusal) = refuse_unseen(facts, Method::Live) {
            rejected.push(Rejected { method: Method::Live, reason: refusal.reason });
        }
        return Ok(Choice { method: Method::Pmemsave, why: why.to_owned(), rejected, way });
    }
    if wish.consistency == Consistency::Any {
        let why = "--consistency any allows a smeared image, and no method gives one instant here";
        let (method, why) = (Method::Live, why.to_owned());
        return Ok(Choice { method, why, rejected, way: Way::default() });
    }
    rejected.push(Rejected {
        method: Method::Live,
        reason: refuse_unseen(facts, Method::Live).err().map_or_else(
            || {
                "its image is smeared over the time of reading, and one instant is asked for"
                    .to_owned()
            },
            |refusal| refusal.reason,
        ),
    });
    remedies.push("--consistency any".to_owned());
    if facts.unseen.is_none() {
        remedies.push("--method live".to_owned());
    }
    let reason = "no method gives an image of one instant within the stall budget here".to_owned();
    Err(Refusal { reason, rejected, remedies })
}

/// Why QEMU's dump is not asked for through libvirt.
const DUMP_OF_DOMAIN: &str =
    "a dump that libvirt did not begin itself ends libvirtd (9.x) when QEMU tells of its end";

/// Whether the VM may be stopped for the head of QEMU's dump.
pub(crate) fn can_probe(facts: &Facts) -> Result<(), Refusal> {
    refuse_unreadable(facts, false)?;
    can_dump(facts)
}

/// Whether QEMU's dump can be asked for at all.
fn can_dump(facts: &Facts) -> Result<(), Refusal> {
    if facts.through_libvirt {
        let remedies = ["--method freeze", "--method snapshot"];
        return Err(Refusal::new(DUMP_OF_DOMAIN, &remedies));
    }
    if let Some(reason) = &facts.dump_unfit {
        return Err(Refusal::new(format!("QEMU's dump cannot be used: {reason}"), &[]));
    }
    Ok(())
}

/// The time that a dump may take of which nothing but the head is read, if that is wished for.
fn registers(facts: &Facts, wish: &Wish, method: Method) -> Result<Option<u64>, Refusal> {
    // A whole dump has them.
    if !wish.registers || method == Method::Dump {
        return Ok(None);
    }
    if facts.confidential.is_some() {
        let reason = "no registers: dump is not tried on a confidential guest";
        return Err(Refusal::new(reason, &["leave --registers out"]));
    }
    can_dump(facts).map_err(|refusal| Refusal {
        reason: format!("no registers: {}", refusal.reason),
        rejected: Vec::new(),
        remedies: vec!["leave --registers out".to_owned()],
    })?;
    Ok(Some(nanos(wish.stall_budget)))
}

/// The longest that a monitor which others need is kept from them.
const SHARED_AT_MOST: Duration = Duration::from_secs(1);

/// Whether the host can spare what QEMU takes when it reads all of the guest's memory.
fn spare_holes(facts: &Facts, word: &str, reads_holes: bool) -> Result<(), Refusal> {
    let holes = facts.snapshot.shared_hole_bytes;
    if !reads_holes || holes <= facts.available_bytes / 2 {
        return Ok(());
    }
    let reason = format!(
        "for {word} QEMU reads all of the guest's memory, which gives shared memory pages that had none: \
         {holes} bytes{}, and the host has {} available",
        if facts.unseen.is_some() { " at most, for it may not be looked at" } else { "" },
        facts.available_bytes
    );
    Err(Refusal::new(reason, &["--method freeze", "--method live"]))
}

/// QEMU's dump.
fn dump(facts: &Facts, wish: &Wish) -> Result<PlannedDump, Refusal> {
    can_dump(facts)?;
    in_memory(facts, wish, Method::Dump)?;
    spare_holes(facts, "dump", true)?;
    let expected = STOP_ONCE + of_gib(DUMP_A_GIB_NS, facts.image_bytes);
    if facts.shared_monitor && expected > SHARED_AT_MOST {
        let reason = format!(
            "dump needs QEMU's only monitor for {}, and Proxmox needs it too",
            millis(expected)
        );
        return Err(Refusal::new(reason, &["--method freeze", "--method snapshot"]));
    }
    let running = facts.run_state == "running";
    if running && expected > wish.stall_budget {
        let reason = format!(
            "the guest stands until QEMU has written all of its memory, which is expected to take {}, and \
             {} is allowed (--stall-budget)",
            millis(expected),
            millis(wish.stall_budget),
        );
        let wanted = expected.mul_f64(1.2);
        let remedies = vec![format!("--stall-budget {}ms", (wanted.as_millis() / 50 + 1) * 50)];
        return Err(Refusal { reason, rejected: Vec::new(), remedies });
    }
    // A guest that is stopped feels nothing; QEMU shall not be kept from its users for ever all the same.
    let allowed = if running { wish.stall_budget } else { wish.stall_budget.max(expected * 4) };
    Ok(PlannedDump { expected_ns: nanos(expected), at_most_ns: nanos(allowed) })
}

/// QEMU's own copying. How long it takes for a slice, only QEMU can show.
fn slices(facts: &Facts, wish: &Wish) -> Result<PlannedSlices, Refusal> {
    if facts.shared_monitor {
        let reason = "pmemsave needs QEMU's only monitor all the time, and Proxmox needs it too";
        return Err(Refusal::new(reason, &["--method live", "--method freeze"]));
    }
    spare_holes(facts, "pmemsave", facts.unseen.is_some())?;
    let slice_bytes = (wish.slice_bytes / PAGE * PAGE).clamp(PAGE, SLICE_AT_MOST);
    let by = match facts.through_libvirt {
        true => SliceWay::MemoryPeek,
        false => SliceWay::Pmemsave,
    };
    Ok(PlannedSlices { by, slice_bytes, at_most_ns: nanos(wish.stall_budget) })
}

/// The least locked memory for the last pass of `track` that is worth trying.
const LEAST_BUFFER: u64 = 4 << 20;

/// What clearing costs in QEMU's process, measured in our own: KVM drops its page tables too.
const CLEAR_IN_QEMU: u32 = 2;

/// The last hold of `track` and what goes before it, when `margin` times what is expected is
/// allowed. How much is left to be read in the hold, only the guest can show.
fn track(
    facts: &Facts,
    wish: &Wish,
    margin: u32,
) -> Result<(PlannedHold, PlannedTracking), Refusal> {
    if let Some(reason) = &facts.track.unfit {
        return Err(Refusal::new(
            format!("what the guest writes cannot be tracked: {reason}"),
            &[],
        ));
    }
    if !facts.hold.writers.is_empty() {
        let reason = format!(
            "{} may write guest memory past QEMU's page tables, which track does not see",
            facts.hold.writers.join(", ")
        );
        return Err(Refusal::new(reason, &[]));
    }
    if let Some(pid) = facts.hold.traced_by {
        let reason = format!("process {pid} traces QEMU already, and track holds by ptrace");
        return Err(Refusal::new(reason, &["end the debugger"]));
    }
    if wish.hold == HoldWish::Stop {
        let reason = "track holds the guest many times, each time shortly: by ptrace only";
        return Err(Refusal::new(reason, &["--hold auto", "--hold ptrace"]));
    }
    let Some(speed) = facts.hold.speed else {
        let reason = "how fast the guest's memory is read could not be measured: no block of it is \
                      wholly in memory";
        return Err(Refusal::new(reason, &[]));
    };
    let scan = of_gib(facts.track.scan_a_gib_ns, facts.image_bytes) / speed.workers.max(1);
    let clear = of_gib(facts.track.clear_a_gib_ns, facts.resident_bytes) * CLEAR_IN_QEMU;
    let audit = Duration::from_nanos(speed.page_ns) * AUDIT_PAGES_32 / speed.workers.max(1);
    let expected = overhead(facts, HoldKind::Ptrace) + scan + clear.max(audit);
    let allowed = wish.stall_budget.min(ptrace_limit(facts));
    if expected * margin > allowed {
        let reason = format!(
            "a hold in which the marks of written pages are looked at and cleared is expected to be \
             {}{}, and {} is allowed",
            millis(expected),
            if margin > 1 { ", and twice that must be allowed" } else { "" },
            millis(allowed),
        );
        let mut remedies = Vec::new();
        let wanted = expected.mul_f64(1.2) * margin;
        if wanted < ptrace_limit(facts) {
            remedies.push(format!("--stall-budget {}ms", (wanted.as_millis() / 50 + 1) * 50));
        }
        return Err(Refusal { reason, rejected: Vec::new(), remedies });
    }
    let buffer_bytes = buffer(facts, wish, allowed, speed)?;
    let hold = PlannedHold {
        kind: HoldKind::Ptrace,
        expected_ns: nanos(expected),
        at_most_ns: nanos(allowed),
    };
    let tracking = PlannedTracking {
        io_horizon_ns: nanos(wish.io_horizon),
        // What a thread of the kernel writes between the look and the clearing would be lost.
        clears_once: facts.hold.vhost_in_kernel,
        clear_expected_ns: nanos(clear),
        buffer_bytes,
        speed,
        rounds_unheld: wish.rounds_unheld,
    };
    Ok((hold, tracking))
}

/// What takes `ns` nanoseconds a GiB, for `bytes`.
fn of_gib(ns: u64, bytes: u64) -> Duration {
    let total = (u128::from(ns) * u128::from(bytes)) >> 30;
    Duration::from_nanos(u64::try_from(total).unwrap_or(u64::MAX))
}

/// Why a snapshot is not chosen for a VM of which something is in swap: docs/measurements.md.
const SWAPPED_SNAPSHOT: &str = "some of the guest is swapped out, and how a guest takes a snapshot on a host that swaps is not known \
     well: in the lab, under a translated CPU, one was reset meanwhile";

/// QEMU's snapshot, when `margin` times the stop that is expected is allowed.
fn snapshot(facts: &Facts, wish: &Wish, margin: u32) -> Result<PlannedSnapshot, Refusal> {
    let known = &facts.snapshot;
    if let Some(reason) = &known.unfit {
        let remedies = known.remedy.iter().cloned().collect();
        let reason = format!("QEMU cannot take a snapshot: {reason}");
        return Err(Refusal { reason, rejected: Vec::new(), remedies });
    }
    if facts.run_state != "running" {
        let reason = format!(
            "QEMU lets the guest go on after a snapshot, and the VM is {:?}: it would not be left so",
            facts.run_state
        );
        return Err(Refusal::new(reason, &["--method freeze"]));
    }
    if !facts.hold.writers.is_empty() {
        let reason = format!(
            "{} may write guest memory past QEMU's page tables, which a snapshot does not see",
            facts.hold.writers.join(", ")
        );
        return Err(Refusal::new(reason, &[]));
    }
    if let Some(job) = known.block_jobs.first() {
        let reason =
            format!("a block job is under way ({job}), which a snapshot's stop would disturb");
        return Err(Refusal::new(reason, &["wait for it to end"]));
    }
    if known.shared_hole_bytes > facts.available_bytes / 2 {
        let reason = format!(
            "QEMU gives all of the guest's shared memory pages before a snapshot: {} bytes more, and \
             the host has {} available",
            known.shared_hole_bytes, facts.available_bytes
        );
        return Err(Refusal::new(reason, &["--method freeze", "--method live"]));
    }
    // Asked for by name it is done, with a warning.
    if facts.swapped_bytes > 0 && margin > 1 {
        return Err(Refusal::new(SWAPPED_SNAPSHOT, &["--method freeze", "--method snapshot"]));
    }
    // QEMU gives every page of the guest an entry first: it is all of them that are protected.
    let protect = of_gib(known.protect_a_gib_ns, facts.image_bytes) * CLEAR_IN_QEMU;
    let expected = SNAPSHOT_ONCE + protect;
    let allowed = wish.stall_budget;
    if expected * margin > allowed {
        let reason = format!(
            "its stop is expected to be {}{}, and {} is allowed (--stall-budget)",
            millis(expected),
            if margin > 1 { ", and twice that must be allowed" } else { "" },
            millis(allowed),
        );
        let wanted = expected.mul_f64(1.2) * margin;
        let remedies = vec![format!("--stall-budget {}ms", (wanted.as_millis() / 50 + 1) * 50)];
        return Err(Refusal { reason, rejected: Vec::new(), remedies });
    }
    Ok(PlannedSnapshot { expected_ns: nanos(expected), at_most_ns: nanos(allowed) })
}

/// Locked memory for what is read in the last hold: as much as can be read in it.
fn buffer(facts: &Facts, wish: &Wish, allowed: Duration, speed: Speed) -> Result<u64, Refusal> {
    let readable = u128::from(speed.bytes_per_s) * allowed.as_nanos() / 1_000_000_000;
    let readable = u64::try_from(readable).unwrap_or(u64::MAX).max(LEAST_BUFFER);
    let in_ram =
        facts.reserve_bytes <= facts.ram_limit_bytes && wish.store != Some(StoreKind::Disk);
    let store = if in_ram { facts.reserve_bytes } else { 0 };
    let room = (facts.ram_limit_bytes - store.min(facts.ram_limit_bytes)).max(LEAST_BUFFER);
    let bytes = readable.min(facts.image_bytes.max(LEAST_BUFFER)).min(room);
    let Some(limit) = facts.hold.lock_limit_bytes.filter(|limit| *limit < bytes) else {
        return Ok(bytes);
    };
    if limit >= LEAST_BUFFER {
        return Ok(limit);
    }
    let reason = format!(
        "track locks {LEAST_BUFFER} bytes in memory at least, and only {limit} may be locked"
    );
    Err(Refusal::new(reason, &["run as root, with CAP_IPC_LOCK, or raise `ulimit -l`"]))
}

/// The hold of `freeze`, when `margin` times its expected length is within the stall budget.
fn freeze(facts: &Facts, wish: &Wish, margin: u32) -> Result<PlannedHold, Refusal> {
    in_memory(facts, wish, Method::Freeze)?;
    if let Some(limit) = facts.hold.lock_limit_bytes.filter(|limit| *limit < facts.reserve_bytes) {
        let reason = format!(
            "freeze locks its store of {} bytes in memory, and only {limit} may be locked",
            facts.reserve_bytes
        );
        return Err(Refusal::new(
            reason,
            &["run as root, with CAP_IPC_LOCK, or raise `ulimit -l`"],
        ));
    }
    let Some(reading) = reading(facts) else {
        let reason = "how fast the guest's memory is read could not be measured: no block of it is \
                      wholly in memory";
        return Err(Refusal::new(reason, &[]));
    };
    let kind = hold_kind(facts, wish, reading, margin)?;
    let expected = reading + overhead(facts, kind);
    let allowed = match kind {
        HoldKind::Ptrace => wish.stall_budget.min(ptrace_limit(facts)),
        HoldKind::Stop | HoldKind::Dump => wish.stall_budget,
    };
    if expected * margin > allowed {
        let reason = format!(
            "its hold is expected to be {}{}, and {} is allowed ({})",
            millis(expected),
            if margin > 1 { ", and twice that must be allowed".to_owned() } else { String::new() },
            millis(allowed),
            if allowed < wish.stall_budget { "by ptrace, here" } else { "--stall-budget" },
        );
        let mut remedies = Vec::new();
        if allowed < wish.stall_budget {
            remedies.push("--hold stop".to_owned());
        }
        // Rounded up to what reads well, and a little more: the next measurement is another one.
        let wanted = expected.mul_f64(1.2) * margin;
        let steps = wanted.as_millis() / 50 + 1;
        remedies.push(format!("--stall-budget {}ms", steps * 50));
        return Err(Refusal { reason, rejected: Vec::new(), remedies });
    }
    Ok(PlannedHold { kind, expected_ns: nanos(expected), at_most_ns: nanos(allowed) })
}

/// While the guest is held nothing is written to a disk.
fn in_memory(facts: &Facts, wish: &Wish, method: Method) -> Result<(), Refusal> {
    let word = method.word();
    if wish.store == Some(StoreKind::Disk) {
        let reason = format!(
            "{word} reads into memory: nothing is written to a disk while the guest is held"
        );
        return Err(Refusal::new(reason, &["--store ram"]));
    }
    if facts.reserve_bytes > facts.ram_limit_bytes {
        let reason = format!(
            "{word} needs a RAM store of {} bytes, and {} is the limit ({})",
            facts.reserve_bytes, facts.ram_limit_bytes, facts.ram_limit_by
        );
        return Err(Refusal::new(reason, &["--max-ram N where it is --max-ram that limits"]));
    }
    Ok(())
}

/// How long reading all that is resident takes, with a quarter more for what others do meanwhile.
fn reading(facts: &Facts) -> Option<Duration> {
    if facts.resident_bytes == 0 {
        return Some(Duration::ZERO);
    }
    let speed = facts.hold.speed?;
    let rate = facts.max_rate.map_or(speed.bytes_per_s, |max| max.min(speed.bytes_per_s)).max(1);
    let read = u128::from(facts.resident_bytes) * 1_250_000_000 / u128::from(rate);
    let audit =
        u128::from(speed.page_ns) * u128::from(AUDIT_PAGES) / u128::from(speed.workers.max(1));
    let total = u64::try_from(read + audit).unwrap_or(u64::MAX);
    let pages = u32::try_from(facts.swapped_bytes / PAGE).unwrap_or(u32::MAX);
    Some(Duration::from_nanos(total).saturating_add(SWAP_PAGE.saturating_mul(pages)))
}

fn overhead(facts: &Facts, kind: HoldKind) -> Duration {
    match kind {
        HoldKind::Ptrace => PTRACE_ONCE + PTRACE_A_THREAD * facts.hold.threads,
        HoldKind::Stop | HoldKind::Dump => STOP_ONCE,
    }
}

/// The longest hold by ptrace that no watchdog of this machine notices: a third of the shortest
/// timeout that Linux's driver of the device sets, for the one that the guest has set is not shown.
fn ptrace_limit(facts: &Facts) -> Duration {
    let third = |name: &String| match name.as_str() {
        // drivers/watchdog: i6300esb.c 1 s; ib700wdt.c 2 s; iTCO_wdt.c 4 ticks of 0.6 s.
        "ib700" => Duration::from_millis(666),
        "ICH9-LPC" => Duration::from_millis(800),
        _ => Duration::from_millis(333),
    };
    facts.watchdogs.iter().map(third).min().unwrap_or(PTRACE_AT_MOST).min(PTRACE_AT_MOST)
}

fn hold_kind(
    facts: &Facts,
    wish: &Wish,
    reading: Duration,
    margin: u32,
) -> Result<HoldKind, Refusal> {
    let traced = facts.hold.traced_by.map(|pid| format!("process {pid} traces QEMU already"));
    let limit = ptrace_limit(facts);
    let expected = reading + overhead(facts, HoldKind::Ptrace);
    let long = expected > limit;
    match wish.hold {
        HoldWish::Stop => Ok(HoldKind::Stop),
        HoldWish::Auto if traced.is_some() || facts.hold.vhost_in_kernel => Ok(HoldKind::Stop),
        // With the margin: what QEMU's `stop` can do is not refused for what ptrace may not.
        HoldWish::Auto if expected * margin > limit => Ok(HoldKind::Stop),
        HoldWish::Auto => Ok(HoldKind::Ptrace),
        HoldWish::Ptrace => match traced {
            Some(reason) => Err(Refusal::new(reason, &["--hold stop", "end the debugger"])),
            None if long => {
                let why = match facts.watchdogs.first() {
                    Some(watchdog) if limit < PTRACE_AT_MOST => format!("the watchdog {watchdog}"),
                    _ => "QEMU's clock, which runs on".to_owned(),
                };
                let reason = format!(
                    "reading takes {}, and a hold by ptrace may last {} ({why})",
                    millis(reading),
                    millis(limit)
                );
                Err(Refusal::new(reason, &["--hold stop", "--hold auto"]))
            }
            None => Ok(HoldKind::Ptrace),
        },
    }
}

fn millis(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn refuse_output(output: &OutputFacts, needed: u64) -> Result<(), Refusal> {
    let with_margin = needed.saturating_add(needed / 10);
    if output.free_bytes < with_margin {
        return Err(Refusal::new(
            format!(
                "{} has {} bytes free; the exhibit may need {needed} and a tenth more",
                output.path, output.free_bytes
            ),
            &["-o DIR on a filesystem with more room", "--force-output"],
        ));
    }
    if let Some(disk) = &output.vm_disk
        && output.free_bytes - needed < output.total_bytes / 10
    {
        return Err(Refusal::new(
            format!(
                "{} holds the VM's disk {disk} and would be left with less than a tenth free: a full \
                 filesystem stops the VM",
                output.path
            ),
            &["-o DIR on another filesystem", "--force-output"],
        ));
    }
    Ok(())
}

/// An output that is the host's memory counts as memory, beside a RAM store.
fn refuse_memory(facts: &Facts, store: StoreKind, output: u64) -> Result<(), Refusal> {
    let Some(place) = facts.output.as_ref().filter(|output| output.in_memory) else {
        return Ok(());
    };
    let store = if store == StoreKind::Ram { facts.reserve_bytes } else { 0 };
    let needed = output.saturating_add(store);
    if needed > facts.ram_limit_bytes {
        return Err(Refusal::new(
            format!(
                "{} keeps files in memory: exhibit and store together may take {needed} bytes, and \
                 {} is the limit ({})",
                place.path, facts.ram_limit_bytes, facts.ram_limit_by
            ),
            &["-o DIR on a disk", "--force-output"],
        ));
    }
    Ok(())
}

fn store(facts: &Facts, wish: &Wish, method: Method) -> Result<(StoreKind, String), Refusal> {
    let fits = facts.reserve_bytes <= facts.ram_limit_bytes;
    let limit = format!("{} bytes, set by {}", facts.ram_limit_bytes, facts.ram_limit_by);
    match wish.store {
        Some(StoreKind::Ram) if !fits => Err(Refusal::new(
            format!("a RAM store needs {} bytes and may take {limit}", facts.reserve_bytes),
            &["--store disk", "--max-ram N where it is --max-ram that limits"],
        )),
        Some(kind) => Ok((kind, format!("asked for: --store {}", kind.word()))),
        None if matches!(method, Method::Freeze | Method::Dump) => Ok((
            StoreKind::Ram,
            format!("nothing is written to a disk while the guest is held ({limit})"),
        )),
        None if fits => {
            Ok((StoreKind::Ram, format!("the resident memory fits the limit ({limit})")))
        }
        None => Ok((
            StoreKind::Disk,
            format!("{} bytes do not fit a RAM store ({limit})", facts.reserve_bytes),
        )),
    }
}

/// What it leaves behind to ask a domain's QEMU anything.
pub const TAINT: &str = "commands are passed to QEMU through libvirt, which marks the domain as tainted (custom-monitor) in its \
     log and its status until it is shut off";

fn changes(facts: &Facts, store: StoreKind, way: Way, registers: bool) -> Vec<String> {
    let Way { hold, tracking, snapshot, slices, dump } = way;
    let queries = match hold {
        _ if dump.is_some() => {
            "QEMU is told to dump into a socket of ours (dump-guest-memory): it stops the guest, its clock \
             with it, writes its disks out, reads every page, lets the guest go on, and tells all its \
             monitors; its query-dump tells of this dump from then on"
        }
        _ if snapshot.is_some() => {
            "QEMU's settings of migration are changed for the time of the snapshot and put back; QEMU \
             stops the guest and lets it go on, writes its disks out, and tells all its monitors; its \
             query-migrate tells of this snapshot from then on"
        }
        _ if slices.is_some_and(|slices| slices.by == SliceWay::MemoryPeek) => {
            "libvirt has QEMU copy the guest's memory, a slice at a time (DOMAIN_MEMORY_PEEK), into a file \
             on the host's disk that it reads and removes; the guest waits for QEMU where it needs it; \
             beside that only queries are sent"
        }
        _ if slices.is_some() => {
            "QEMU is given a file of ours in memory, copies the guest's memory into it a slice at a time \
             (pmemsave), while which the guest waits for it where it needs QEMU, and gives it back; \
             beside that only queries are sent"
        }
        Some(PlannedHold { kind: HoldKind::Stop, .. }) if facts.run_state == "running" => {
            "QEMU is told to stop the guest and to let it go on: its clock stands meanwhile, its disks \
             are written out, QEMU tells all its monitors; beside that only queries are sent"
        }
        _ => "queries are sent to QEMU's monitor; no command that changes anything",
    };
    let mut changes = vec![
        queries.to_owned(),
        "host CPU time and memory bandwidth are used while memory is read".to_owned(),
    ];
    if registers {
        changes.push(
            "QEMU is told to dump, and the dump is broken off behind the registers: it stops the guest for \
             about a millisecond, writes its disks out, tells all its monitors, and its query-dump tells of \
             a failed dump from then on"
                .to_owned(),
        );
    }
    if facts.unseen.is_some() {
        changes.push(
            "QEMU reads all of its guest's memory, which may give pages to memory that had none: this user \
             may not look at the process, and cannot know"
                .to_owned(),
        );
    } else if dump.is_some() && facts.snapshot.shared_hole_bytes > 0 {
        changes.push(format!(
            "{} bytes of shared memory that had no pages are given some by QEMU's reading",
            facts.snapshot.shared_hole_bytes
        ));
    }
    if facts.through_libvirt {
        changes.push(TAINT.to_owned());
    }
    if facts.through_libvirt && snapshot.is_some() {
        changes.push(
            "QEMU's own stop makes libvirt give up the leases of the domain's disks, where it has a lock \
             manager (virtlockd), and it does not take them again by itself: `virsh suspend` and `virsh \
             resume` afterwards do"
                .to_owned(),
        );
    }
    if let Some(PlannedHold { kind: HoldKind::Ptrace, .. }) = hold {
        changes.push(
            "QEMU's threads stand still during the hold; the guest's clock jumps by as much"
                .to_owned(),
        );
    }
    if tracking.is_some() {
        changes.push(
            "the kernel's marks of written pages (soft-dirty) of QEMU's process are cleared: whoever \
             else uses them, such as CRIU, is misled; the guest's first write to each page after that \
             takes a page fault"
                .to_owned(),
        );
    }
    if snapshot.is_some() {
        changes.push(format!(
            "QEMU looks at every page of the guest first, which fills page tables, and gives {} bytes \
             of shared memory pages that had none; the guest's first write to each page waits until \
             QEMU has sent it",
            facts.snapshot.shared_hole_bytes
        ));
    }
    if facts.swapped_bytes > 0 {
        changes.push(format!(
            "{} bytes of the guest come back from swap by being read",
            facts.swapped_bytes
        ));
    }
    if store == StoreKind::Ram {
        changes.push(format!(
            "about {} bytes of host memory are taken until the image is written",
            facts.reserve_bytes
        ));
    }
    changes
}

/// What an image of a confidential guest is.
pub fn ciphertext(what: &str) -> String {
    format!(
        "confidential guest ({what}): the image has what the host sees, which is ciphertext, or nothing, but for \
         pages that the guest shares"
    )
}

/// What may weaken the claim of one instant.
pub fn hold_caveats(facts: &Facts, hold: Option<PlannedHold>) -> Vec<String> {
    let Some(hold) = hold else { return Vec::new() };
    let mut caveats: Vec<String> = facts
        .hold
        .writers
        .iter()
        .map(|writer| format!("{writer} may write guest memory while the guest is held"))
        .collect();
    if facts.hold.vhost_in_kernel && hold.kind == HoldKind::Ptrace {
        caveats.push(
            "vhost threads of the kernel may write guest memory while QEMU's threads are held by \
             ptrace; --hold stop stops them"
                .to_owned(),
        );
    }
    caveats
}

fn warnings(
    facts: &Facts,
    hold: Option<PlannedHold>,
    snapshot: Option<PlannedSnapshot>,
) -> Vec<String> {
    let mut warnings = hold_caveats(facts, hold);
    if let Some(why) = &facts.unseen {
        warnings.push(format!(
            "QEMU's process may not be looked at ({why}): its word on its memory is not held against the \
             host's, nothing is read a second time from outside, holes are read as zeros, and whether the \
             exhibit would lie beside the VM's disks is not known"
        ));
    }
    if snapshot.is_some() && facts.max_rate.is_some() {
        warnings.push(
            "--max-rate is not kept: a snapshot is read as fast as QEMU sends it, for the guest may wait \
             for it"
                .to_owned(),
        );
    }
    if snapshot.is_some() && facts.swapped_bytes > 0 {
        warnings.push(SWAPPED_SNAPSHOT.to_owned());
    }
    if let Some(what) = &facts.confidential {
        warnings.push(ciphertext(what));
    }
    if facts.run_state != "running" {
        warnings.push(format!("the VM's run state is {:?}; it is left so", facts.run_state));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            run_state: "running".into(),
            confidential: None,
            migration: None,
            through_libvirt: false,
            shared_monitor: false,
            locked_for: None,
            watchdogs: Vec::new(),
            track: TrackFacts { unfit: Some("not here".into()), ..TrackFacts::default() },
            snapshot: SnapshotFacts { unfit: Some("nor that".into()), ..SnapshotFacts::default() },
            unseen: None,
            dump_unfit: None,
            hold: HoldFacts {
                threads: 5,
                speed: Some(Speed {
                    bytes_per_s: 10 << 30,
                    page_ns: 4_000,
                    sampled_bytes: 24 << 20,
                    workers: 2,
                }),
                ..HoldFacts::default()
            },
            max_rate: None,
            image_bytes: 4 << 30,
            resident_bytes: 3 << 30,
            reserve_bytes: 3 << 30,
            swapped_bytes: 0,
            swapped_shared_bytes: 0,
            aside_bytes: 0,
            available_bytes: 16 << 30,
            ram_limit_bytes: 8 << 30,
            ram_limit_by: "half of MemAvailable".into(),
            output: Some(OutputFacts {
                path: "/evidence".into(),
                in_memory: false,
                free_bytes: 100 << 30,
                total_bytes: 200 << 30,
                vm_disk: None,
            }),
            format_unfit: None,
        }
    }

    fn live() -> Wish {
        Wish { method: Some(Method::Live), ..Wish::default() }
    }

    #[track_caller]
    fn refused(facts: &Facts, wish: &Wish, word: &str) -> Refusal {
        let refusal = choose(facts, wish).unwrap_err();
        assert!(refusal.reason.contains(word), "{refusal:?}");
        refusal
    }

    #[test]
    fn one_instant_is_never_quietly_given_up() {
        let refusal = refused(&facts(), &Wish::default(), "one instant");
        assert!(refusal.remedies.contains(&"--method live".to_owned()));
        let any = Wish { consistency: Consistency::Any, ..Wish::default() };
        let plan = choose(&facts(), &any).unwrap();
        assert_eq!((plan.method, plan.class), (Method::Live, Class::None));
        // All but the one that was taken.
        assert_eq!(plan.rejected.len(), METHODS.len() - 1);
        let freeze = plan.rejected.iter().find(|r| r.method == Method::Freeze).unwrap();
        assert!(freeze.reason.contains("ms"), "{freeze:?}");
    }

    #[test]
    fn qemu_copies_where_its_monitor_is_ours_and_libvirt_where_it_is_libvirts() {
        let wish = Wish {
            method: Some(Method::Pmemsave),
            slice_bytes: 9000,
            stall_budget: Duration::from_millis(7),
            ..Wish::default()
        };
        let plan = choose(&facts(), &wish).unwrap();
        let slices = plan.slices.unwrap();
        assert_eq!((slices.by, slices.slice_bytes), (SliceWay::Pmemsave, 8192));
        assert_eq!((plan.class, slices.at_most_ns), (Class::None, 7_000_000));
        let libvirt = Facts { through_libvirt: true, ..facts() };
        let plan = choose(&libvirt, &wish).unwrap();
        assert_eq!(plan.slices.unwrap().by, SliceWay::MemoryPeek);
        assert!(plan.changes.iter().any(|change| change == TAINT), "{:?}", plan.changes);
        refused(&Facts { shared_monitor: true, ..facts() }, &wish, "Proxmox");
    }

    #[test]
    fn a_vm_that_its_manager_is_at_work_with_is_left_alone() {
        let locked = Facts { locked_for: Some("backup".into()), ..facts() };
        let any = Wish { consistency: Consistency::Any, ..Wish::default() };
        let refusal = refused(&locked, &any, "backup");
        assert!(!refusal.remedies.is_empty());
    }

    /// 3 GiB at 10 GiB/s take 300 ms, and a quarter more.
    fn within(ms: u64) -> Wish {
        Wish { stall_budget: Duration::from_millis(ms), ..Wish::default() }
    }

    fn by_name(wish: Wish) -> Wish {
        Wish { method: Some(Method::Freeze), ..wish }
    }

    #[test]
    fn freeze_is_taken_when_twice_its_hold_is_allowed() {
        let plan = choose(&facts(), &within(900)).unwrap();
        assert_eq!((plan.method, plan.class), (Method::Freeze, Class::Instantaneous));
        assert_eq!(plan.store, StoreKind::Ram);
        let hold = plan.hold.unwrap();
        assert_eq!((hold.kind, hold.at_most_ns), (HoldKind::Ptrace, 900_000_000));
        assert!((375_000_000..450_000_000).contains(&hold.expected_ns), "{hold:?}");
        // By name it is consent, and once is enough.
        assert!(choose(&facts(), &within(700)).is_err());
        assert!(choose(&facts(), &by_name(within(700))).is_ok());
        refused(&facts(), &by_name(within(100)), "100 ms is allowed");
    }

    #[test]
    fn what_a_refusal_advises_is_accepted() {
        for wish in [within(100), by_name(within(100)), by_name(within(1))] {
            let refusal = choose(&facts(), &wish).unwrap_err();
            let advice = refusal.remedies.iter().find_map(|r| r.strip_prefix("--stall-budget "));
            let ms = advice.unwrap().strip_suffix("ms").unwrap().parse().unwrap();
            let wish = Wish { stall_budget: Duration::from_millis(ms), ..wish };
            assert_eq!(choose(&facts(), &wish).unwrap().method, Method::Freeze, "{ms} ms");
        }
    }

    /// A host that tracks: 12 ms to look at 1 GiB, 5 ms to clear it.
    fn tracked() -> Facts {
        let track =
            TrackFacts { unfit: None, clear_a_gib_ns: 5_000_000, scan_a_gib_ns: 12_000_000 };
        Facts { track, ..facts() }
    }

    fn track_by_name(wish: Wish) -> Wish {
        Wish { method: Some(Method::Track), ..wish }
    }

    #[test]
    fn track_is_taken_where_freeze_takes_too_long() {
        // 4 GiB are looked at in 24 ms, and 3 GiB cleared in 30.
        let plan = choose(&tracked(), &within(150)).unwrap();
        assert_eq!((plan.method, plan.class), (Method::Track, Class::QuasiInstantaneous));
        let (hold, tracking) = (plan.hold.unwrap(), plan.tracking.unwrap());
        assert_eq!((hold.kind, hold.at_most_ns), (HoldKind::Ptrace, 150_000_000));
        assert!((55_000_000..60_000_000).contains(&hold.expected_ns), "{hold:?}");
        // What is read in 150 ms at 10 GiB/s.
        assert_eq!(tracking.buffer_bytes, (10 << 30) * 150 / 1000);
        assert_eq!((tracking.io_horizon_ns, tracking.clears_once), (1_000_000_000, false));
        assert!(plan.changes.iter().any(|change| change.contains("soft-dirty")));
        let freeze = plan.rejected.iter().find(|r| r.method == Method::Freeze).unwrap();
        assert!(freeze.reason.contains("ms"), "{freeze:?}");
        // Freeze comes first, and twice what is expected must be allowed.
        assert_eq!(choose(&tracked(), &within(900)).unwrap().method, Method::Freeze);
        let refusal = choose(&tracked(), &within(100)).unwrap_err();
        let advised: Vec<u64> = refusal
            .remedies
            .iter()
            .filter_map(|r| r.strip_prefix("--stall-budget ")?.strip_suffix("ms")?.parse().ok())
            .collect();
        for ms in advised {
            assert!(choose(&tracked(), &within(ms)).is_ok(), "{ms} ms of {refusal:?}");
        }
        assert_eq!(choose(&tracked(), &track_by_name(within(60))).unwrap().method, Method::Track);
        refused(&tracked(), &track_by_name(within(50)), "50 ms is allowed");
    }

    #[test]
    fn track_is_refused_where_it_would_lie() {
        refused(&facts(), &track_by_name(within(900)), "not here");
        let with = |hold: HoldFacts| Facts { hold, ..tracked() };
        let writers = with(HoldFacts { writers: vec!["vhost-user".into()], ..tracked().hold });
        refused(&writers, &track_by_name(within(900)), "vhost-user");
        let traced = with(HoldFacts { traced_by: Some(7), ..tracked().hold });
        refused(&traced, &track_by_name(within(900)), "process 7");
        let stop = Wish { hold: HoldWish::Stop, ..track_by_name(within(900)) };
        refused(&tracked(), &stop, "ptrace only");
        let unmeasured = with(HoldFacts { speed: None, ..tracked().hold });
        refused(&unmeasured, &track_by_name(within(900)), "measured");
        let unlocked = with(HoldFacts { lock_limit_bytes: Some(64 << 10), ..tracked().hold });
        refused(&unlocked, &track_by_name(within(900)), "may be locked");
        // Threads of the kernel write between a look and a clearing: there is one clearing only.
        let vhost = with(HoldFacts { vhost_in_kernel: true, ..tracked().hold });
        let plan = choose(&vhost, &track_by_name(within(900))).unwrap();
        assert!(plan.tracking.unwrap().clears_once);
        assert!(plan.warnings[0].contains("vhost"), "{:?}", plan.warnings);
        // A control gets no class.
        let control = Wish { rounds_unheld: 1, ..track_by_name(within(900)) };
        assert_eq!(choose(&tracked(), &control).unwrap().class, Class::None);
    }

    #[test]
    fn the_last_pass_of_track_is_kept_within_the_memory_that_is_allowed() {
        let buffer = |facts: &Facts, wish: &Wish| {
            choose(facts, &track_by_name(wish.clone())).unwrap().tracking.unwrap().buffer_bytes
        };
        let tight = Facts { ram_limit_bytes: (3 << 30) + (64 << 20), ..tracked() };
        assert_eq!(buffer(&tight, &within(900)), 64 << 20);
        // On disk the store takes no memory.
        let disk = Wish { store: Some(StoreKind::Disk), ..within(100) };
        assert_eq!(buffer(&tight, &disk), (10 << 30) / 10);
        let small = Facts { image_bytes: 1 << 20, resident_bytes: 1 << 20, ..tracked() };
        assert_eq!(buffer(&small, &within(900)), LEAST_BUFFER);
    }

    #[test]
    fn a_long_hold_is_qemus() {
        let slow = Facts { max_rate: Some(1 << 30), ..facts() };
        let hold = |facts: &Facts, wish: &Wish| choose(facts, wish).map(|p| p.hold.unwrap().kind);
        assert_eq!(hold(&slow, &by_name(within(9000))), Ok(HoldKind::Stop));
        let ptrace = Wish { hold: HoldWish::Ptrace, ..by_name(within(9000)) };
        refused(&slow, &ptrace, "QEMU's clock");
        assert_eq!(hold(&facts(), &ptrace), Ok(HoldKind::Ptrace));
        let capped = choose(&facts(), &ptrace).unwrap().hold.unwrap();
        assert_eq!(capped.at_most_ns, 1_000_000_000);
        let stop = Wish { hold: HoldWish::Stop, ..by_name(within(900)) };
        assert_eq!(hold(&facts(), &stop), Ok(HoldKind::Stop));
        assert!(choose(&facts(), &stop).unwrap().changes[0].contains("its clock stands"));
    }

    #[test]
    fn auto_leaves_ptrace_the_margin_too() {
        // 6 GiB are expected to take 758 ms: twice that is no hold by ptrace.
        let large = Facts { resident_bytes: 6 << 30, reserve_bytes: 6 << 30, ..facts() };
        let kind = |wish: &Wish| choose(&large, wish).unwrap().hold.unwrap().kind;
        assert_eq!(kind(&within(9000)), HoldKind::Stop);
        assert_eq!(kind(&by_name(within(9000))), HoldKind::Ptrace);
    }

    #[test]
    fn a_watchdog_shortens_what_ptrace_may_hold() {
        let watched = |name: &str| Facts { watchdogs: vec![name.into()], ..facts() };
        let kind = |facts: &Facts| choose(facts, &by_name(within(900))).unwrap().hold.unwrap().kind;
        assert_eq!(kind(&watched("i6300esb")), HoldKind::Stop);
        assert_eq!(kind(&watched("ICH9-LPC")), HoldKind::Ptrace);
        let ptrace = Wish { hold: HoldWish::Ptrace, ..by_name(within(900)) };
        refused(&watched("i6300esb"), &ptrace, "i6300esb");
        let unknown = choose(&watched("a-new-one"), &by_name(within(900))).unwrap();
        assert_eq!(unknown.hold.unwrap().kind, HoldKind::Stop);
    }

    #[test]
    fn freeze_needs_memory_a_measurement_and_nobody_at_the_process() {
        let disk = Wish { store: Some(StoreKind::Disk), ..by_name(within(900)) };
        refused(&facts(), &disk, "disk");
        let small = Facts { ram_limit_bytes: 1 << 30, ..facts() };
        refused(&small, &by_name(within(900)), "RAM store");
        let unmeasured = Facts { hold: HoldFacts { speed: None, ..facts().hold }, ..facts() };
        refused(&unmeasured, &by_name(within(900)), "measured");
        let empty = Facts { resident_bytes: 0, ..unmeasured };
        assert!(choose(&empty, &within(100)).is_ok());
        let traced = Facts { hold: HoldFacts { traced_by: Some(7), ..facts().hold }, ..facts() };
        let ptrace = Wish { hold: HoldWish::Ptrace, ..by_name(within(900)) };
        refused(&traced, &ptrace, "process 7");
        assert_eq!(
            choose(&traced, &by_name(within(900))).unwrap().hold.unwrap().kind,
            HoldKind::Stop
        );
        let unlocked = HoldFacts { lock_limit_bytes: Some(8 << 20), ..facts().hold };
        let unlocked = Facts { hold: unlocked, ..facts() };
        refused(&unlocked, &by_name(within(900)), "may be locked");
        let any = Wish { consistency: Consistency::Any, ..within(900) };
        assert_eq!(choose(&unlocked, &any).unwrap().method, Method::Live);
        let vhost = HoldFacts { vhost_in_kernel: true, ..facts().hold };
        let vhost = Facts { hold: vhost, ..facts() };
        let plan = choose(&vhost, &by_name(within(900))).unwrap();
        assert_eq!((plan.hold.unwrap().kind, plan.warnings), (HoldKind::Stop, vec![]));
        assert!(choose(&vhost, &ptrace).unwrap().warnings[0].contains("vhost"));
        let writers = HoldFacts { writers: vec!["/dev/vfio/7".into()], ..facts().hold };
        let writers = Facts { hold: writers, ..facts() };
        assert!(
            choose(&writers, &by_name(within(900))).unwrap().warnings[0].contains("/dev/vfio/7")
        );
        // A page in swap is waited for.
        let swapped = Facts { swapped_bytes: 1 << 30, ..facts() };
        refused(&swapped, &by_name(within(900)), "expected");
    }

    #[test]
    fn the_store_is_ram_when_it_fits() {
        assert_eq!(choose(&facts(), &live()).unwrap().store, StoreKind::Ram);
        let small = Facts { ram_limit_bytes: (3 << 30) - 1, ..facts() };
        assert_eq!(choose(&small, &live()).unwrap().store, StoreKind::Disk);
        let ram = Wish { store: Some(StoreKind::Ram), ..live() };
        assert!(refused(&small, &ram, "RAM store").remedies.contains(&"--store disk".to_owned()));
    }

    #[test]
    fn a_full_output_is_refused_unless_forced() {
        let mut tight = facts();
        let needed = output_bytes(&tight);
        if let Some(output) = &mut tight.output {
            output.free_bytes = needed + needed / 10 - 1;
        }
        refused(&tight, &live(), "bytes free");
        assert!(choose(&tight, &Wish { force_output: true, ..live() }).is_ok());
    }

    #[test]
    fn the_vms_own_disk_keeps_a_tenth_of_its_filesystem() {
        let mut shared = facts();
        let needed = output_bytes(&shared);
        let output = shared.output.as_mut().unwrap();
        output.vm_disk = Some("/evidence/web-07.qcow2".into());
        output.free_bytes = output.total_bytes / 10 + needed;
        assert!(choose(&shared, &live()).is_ok());
        shared.output.as_mut().unwrap().free_bytes -= 1;
        refused(&shared, &live(), "web-07.qcow2");
        assert!(choose(&shared, &Wish { force_output: true, ..live() }).is_ok());
    }

    #[test]
    fn an_output_in_memory_counts_as_memory() {
        let mut facts = facts();
        facts.output.as_mut().unwrap().in_memory = true;
        assert!(choose(&facts, &live()).is_ok());
        facts.ram_limit_bytes = 5 << 30;
        refused(&facts, &live(), "in memory");
        assert!(choose(&facts, &Wish { store: Some(StoreKind::Disk), ..live() }).is_ok());
        assert!(choose(&facts, &Wish { force_output: true, ..live() }).is_ok());
    }

    /// 4 GiB that take 5 ms a GiB to protect, twice that in QEMU, and 25 ms for the rest.
    fn shootable() -> Facts {
        let snapshot = SnapshotFacts { protect_a_gib_ns: 5_000_000, ..SnapshotFacts::default() };
        Facts { snapshot, ..facts() }
    }

    #[test]
    fn a_snapshot_is_taken_within_the_budget_and_refused_where_it_would_lie() {
        let wish = Wish { method: Some(Method::Snapshot), ..Wish::default() };
        let plan = choose(&shootable(), &wish).unwrap();
        assert_eq!(plan.class, Class::QuasiInstantaneous);
        assert_eq!(plan.snapshot.unwrap().expected_ns, 65_000_000);
        assert!(plan.hold.is_none() && plan.changes[0].contains("put back"), "{:?}", plan.changes);
        let limited = Facts { max_rate: Some(1), ..shootable() };
        assert!(choose(&limited, &wish).unwrap().warnings[0].contains("--max-rate"));
        let short = Wish { stall_budget: Duration::from_millis(50), ..wish.clone() };
        let refusal = refused(&shootable(), &short, "65 ms");
        assert_eq!(refusal.remedies, ["--stall-budget 100ms"]);
        // auto allows for twice that.
        let auto = refused(&shootable(), &Wish::default(), "one instant");
        assert!(auto.remedies.contains(&"--stall-budget 200ms".to_owned()), "{auto:?}");
        let wide = Wish { stall_budget: Duration::from_millis(130), ..Wish::default() };
        assert_eq!(choose(&shootable(), &wide).unwrap().method, Method::Snapshot);

        let with = |edit: fn(&mut Facts)| {
            let mut facts = shootable();
            edit(&mut facts);
            facts
        };
        refused(&with(|f| f.run_state = "paused".into()), &wish, "paused");
        refused(&with(|f| f.hold.writers.push("/dev/vfio/9".into())), &wish, "vfio");
        refused(&with(|f| f.snapshot.block_jobs.push("mirror".into())), &wish, "mirror");
        refused(&with(|f| f.snapshot.shared_hole_bytes = 9 << 30), &wish, "shared");
        let setting = with(|f| {
            f.snapshot.unfit = Some("userfaultfd".into());
            f.snapshot.remedy = Some("sysctl".into());
        });
        assert_eq!(refused(&setting, &wish, "userfaultfd").remedies, ["sysctl"]);
    }

    #[test]
    fn what_cannot_be_read_truly_is_refused() {
        refused(&Facts { confidential: Some("SEV-SNP".into()), ..facts() }, &live(), "SEV-SNP");
        refused(&Facts { run_state: "inmigrate".into(), ..facts() }, &live(), "inmigrate");
        refused(&Facts { migration: Some("active".into()), ..facts() }, &live(), "migration");
        refused(&Facts { image_bytes: 0, ..facts() }, &live(), "no memory");
        let swapped = Facts { swapped_bytes: (8 << 30) + 1, ..facts() };
        refused(&swapped, &live(), "swapped");
        assert!(choose(&swapped, &Wish { swap: SwapWish::In, ..live() }).is_ok());
        let skip = Wish { swap: SwapWish::Skip, ..live() };
        let plan = choose(&swapped, &skip).unwrap();
        assert!(
            plan.warnings.iter().any(|text| text.contains("left there")),
            "{:?}",
            plan.warnings
        );
        assert!(!plan.changes.iter().any(|text| text.contains("come back from swap")));
        let track = Wish { method: Some(Method::Track), ..skip.clone() };
        refused(&swapped, &track, "--swap skip is not possible");
        let shared = Facts { swapped_shared_bytes: 1, ..swapped };
        refused(&shared, &skip, "the kernel does not tell which");
        let hidden = Facts { confidential: Some("SEV".into()), ..facts() };
        let accept = Wish { accept_ciphertext: true, ..live() };
        let plan = choose(&hidden, &accept).unwrap();
        assert!(
            plan.warnings.iter().any(|text| text.contains("ciphertext")),
            "{:?}",
            plan.warnings
        );
        let dump = Wish { method: Some(Method::Dump), ..accept };
        refused(&hidden, &dump, "not tried on a confidential guest");
        let registers = Wish { registers: true, accept_ciphertext: true, ..live() };
        refused(&hidden, &registers, "not tried on a confidential guest");
    }

    #[test]
    fn a_dump_stands_within_the_budget_or_not_at_all() {
        let wish = |budget| Wish {
            method: Some(Method::Dump),
            stall_budget: Duration::from_secs(budget),
            ..Wish::default()
        };
        let plan = choose(&facts(), &wish(9)).unwrap();
        let dump = plan.dump.unwrap();
        assert_eq!(dump.expected_ns, nanos(STOP_ONCE) + 4 * DUMP_A_GIB_NS);
        assert_eq!((dump.at_most_ns, plan.class), (9_000_000_000, Class::Instantaneous));
        assert_eq!((plan.store, plan.hold), (StoreKind::Ram, None));
        let refused = choose(&facts(), &wish(8)).unwrap_err();
        assert!(refused.remedies[0].starts_with("--stall-budget "), "{:?}", refused.remedies);
        // A guest that stands anyway feels nothing.
        let paused = Facts { run_state: "paused".into(), ..facts() };
        assert!(choose(&paused, &wish(0)).is_ok());
        for refused in [
            Facts { through_libvirt: true, ..facts() },
            Facts { shared_monitor: true, ..facts() },
            Facts { dump_unfit: Some("odd".into()), ..facts() },
            Facts { ram_limit_bytes: 1 << 30, ..facts() },
            Facts {
                snapshot: SnapshotFacts { shared_hole_bytes: 9 << 30, ..SnapshotFacts::default() },
                ..facts()
            },
        ] {
            assert!(choose(&refused, &wish(60)).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn a_snapshot_of_a_swapped_guest_is_only_taken_by_name() {
        let swapped = Facts {
            swapped_bytes: 1 << 20,
            snapshot: SnapshotFacts::default(),
            hold: HoldFacts { speed: None, ..facts().hold },
            ..facts()
        };
        let wish = budget(60);
        let refusal = choose(&swapped, &wish).unwrap_err();
        let told =
            |one: &Rejected| one.method == Method::Snapshot && one.reason == SWAPPED_SNAPSHOT;
        assert!(refusal.rejected.iter().any(told), "{:?}", refusal.rejected);
        let unswapped = Facts { swapped_bytes: 0, ..swapped.clone() };
        assert_eq!(choose(&unswapped, &wish).unwrap().method, Method::Snapshot);
        let plan = choose(&swapped, &Wish { method: Some(Method::Snapshot), ..wish }).unwrap();
        assert_eq!(plan.warnings, [SWAPPED_SNAPSHOT]);
    }

    #[test]
    fn registers_are_refused_where_a_dump_is() {
        let wish = Wish { method: Some(Method::Live), registers: true, ..Wish::default() };
        let plan = choose(&facts(), &wish).unwrap();
        assert_eq!(plan.registers_ns, Some(nanos(wish.stall_budget)));
        assert!(plan.changes.iter().any(|text| text.contains("broken off behind the registers")));
        let domain = Facts { through_libvirt: true, ..facts() };
        assert!(choose(&domain, &wish).unwrap_err().reason.starts_with("no registers"));
    }

    #[test]
    fn who_may_not_look_is_offered_what_qemu_gives() {
        let unseen = Facts {
            unseen: Some("permission denied".into()),
            hold: HoldFacts { speed: None, ..facts().hold },
            ..facts()
        };
        let by = |method| choose(&unseen, &Wish { method, ..budget(60) });
        for method in [Method::Live, Method::Freeze, Method::Track, Method::Snapshot] {
            let refusal = by(Some(method)).unwrap_err();
            assert!(refusal.reason.contains("this user has not"), "{}", refusal.reason);
            assert!(refusal.remedies.iter().any(|text| text == "--method dump"));
        }
        for method in [Method::Dump, Method::Pmemsave] {
            let plan = by(Some(method)).unwrap();
            assert!(plan.warnings[0].contains("may not be looked at"), "{:?}", plan.warnings);
        }
        assert!(by(None).is_err(), "one instant is never quietly given up");
        let any = Wish { consistency: Consistency::Any, ..budget(60) };
        assert_eq!(choose(&unseen, &any).unwrap().method, Method::Pmemsave);
    }

    fn budget(seconds: u64) -> Wish {
        Wish { stall_budget: Duration::from_secs(seconds), ..Wish::default() }
    }
}
