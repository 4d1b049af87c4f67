//! The command line, as clap reads it. Values are checked for form only; meaning is given to them
//! once, where a verb builds its request.

use acquire::plan::SLICE_AT_MOST;
use clap::{Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Forensically sound memory images of QEMU/KVM virtual machines, from the host.
#[derive(Debug, Parser)]
#[command(name = "stillframe", version, about, max_term_width = 100)]
pub(crate) struct Args {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show the VMs on this host; opens no monitor
    List(List),
    /// Show a VM's memory: QEMU's graph of regions, the flat view, what the host has behind it
    Map(Map),
    /// Show what would be done, why, and why not otherwise; changes nothing
    Plan(Plan),
    /// Take an image of a running VM's memory
    Acquire(Acquire),
    /// Check an exhibit; names wrong blocks by address; writes nothing
    Verify(Verify),
    /// Put right what killed runs left behind; does nothing when there is nothing
    Recover(Recover),
    /// Show what this host allows, what stands in the way, and the remedy
    Doctor(Doctor),
}

/// `recover`.
#[derive(Debug, clap::Args)]
pub(crate) struct Recover {
    /// The VM, by name or PID; without it, all
    pub(crate) vm: Option<String>,
    /// All VMs: what is done without a VM, too
    #[arg(long, conflicts_with = "vm")]
    pub(crate) all: bool,
    /// Let a VM go on that a run left stopped more than ten minutes ago
    #[arg(long)]
    pub(crate) force: bool,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// `list`.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// `map`.
#[derive(Debug, clap::Args)]
pub(crate) struct Map {
    /// The VM: name, UUID, PID, Proxmox VMID, or the path of a QMP socket
    pub(crate) vm: String,
    /// Write the graph and the flat view as a picture
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) graph: Option<PathBuf>,
    /// Hold the map against the head of QEMU's own dump: QEMU stops the VM for milliseconds
    #[arg(long)]
    pub(crate) probe: bool,
    /// The longest stall of the guest that is allowed for --probe: 100ms, 2s
    #[arg(long, value_parser = duration, default_value = "100ms", value_name = "TIME")]
    pub(crate) stall_budget: Duration,
    /// Also say on which of the host's NUMA nodes the pages lie; the kernel looks at each page for it
    #[arg(long)]
    pub(crate) host_nodes: bool,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

/// `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Verify {
    /// The exhibit's directory
    pub(crate) exhibit: PathBuf,
    /// The verdict as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Threads that read and hash; default: one a CPU
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

/// The flags that `plan` and `acquire` share.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// The VM: name, UUID, PID, or the path of a QMP socket (then that monitor is used)
    pub(crate) vm: String,
    /// How memory is read; default: chosen by what the host allows
    #[arg(long, value_enum, value_name = "METHOD")]
    pub(crate) method: Option<MethodArg>,
    /// What the image must show when no method is named
    #[arg(long, value_enum, default_value = "point-in-time")]
    pub(crate) consistency: ConsistencyArg,
    /// The longest stall of the guest that is allowed: 100ms, 2s
    #[arg(long, value_parser = duration, default_value = "100ms", value_name = "TIME")]
    pub(crate) stall_budget: Duration,
    /// How the guest may be held, by the methods that hold it
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) hold: HoldArg,
    /// How long a device's write may take to reach memory, as track assumes
    #[arg(long, value_parser = duration, default_value = "1s", value_name = "TIME")]
    pub(crate) io_horizon: Duration,
    /// How much QEMU copies at a time, for pmemsave: 4K to 1M
    #[arg(long, value_parser = slice, default_value = "1M", value_name = "SIZE")]
    pub(crate) slice: u64,
    /// Take the vCPUs' registers too, by the head of QEMU's dump: QEMU stops the guest for about 1 ms
    #[arg(long)]
    pub(crate) registers: bool,
    /// The image's format
    #[arg(long, value_enum, default_value = "elf")]
    pub(crate) format: FormatArg,
    /// Where captured bytes rest first; default: ram when they fit, else disk
    #[arg(long, value_enum)]
    pub(crate) store: Option<StoreArg>,
    /// The most host memory that a RAM store may take: 512M, 8G
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_ram: Option<u64>,
    /// Take this too, into files of its own beside the image: nvdimm
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KIND")]
    pub(crate) include: Vec<PartArg>,
    /// Leave this out: rom and device-ram become zeros in the image, and a loss; romd (flash), hidden and nvdimm
    /// have files of their own
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KIND")]
    pub(crate) exclude: Vec<PartArg>,
    /// Read guest memory that the host has swapped out, even when it is much: --swap in
    #[arg(long, conflicts_with = "swap")]
    pub(crate) swap_in: bool,
    /// What is done with guest memory that the host has swapped out; default: read, unless it is much
    #[arg(long, value_enum, value_name = "in|skip")]
    pub(crate) swap: Option<SwapArg>,
    /// Take what the host sees of a confidential guest (SEV, TDX ..): ciphertext, or nothing; live and freeze
    #[arg(long)]
    pub(crate) accept_ciphertext: bool,
    /// Write where there is little room, or beside the VM's own disks
    #[arg(long)]
    pub(crate) force_output: bool,
    /// One JSON object a line on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// `plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Plan {
    /// How.
    #[command(flatten)]
    pub(crate) how: How,
    /// The directory that the exhibit would be made in
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Hold the map against the head of QEMU's own dump: QEMU stops the guest for about 1 ms
    #[arg(long)]
    pub(crate) probe: bool,
    /// The most bytes of guest memory read a second: 500M
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_rate: Option<u64>,
}

/// `acquire`.
#[derive(Debug, clap::Args)]
pub(crate) struct Acquire {
    /// How.
    #[command(flatten)]
    pub(crate) how: How,
    /// The directory that the exhibit is made in; it must exist
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// The most bytes of guest memory read a second: 500M
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_rate: Option<u64>,
    /// Whether the SHA-256 of the whole image file is computed, for `sha256sum -c`
    #[arg(long, value_enum, default_value = "yes", value_name = "yes|no")]
    pub(crate) file_digest: YesNo,
    /// Case number
    #[arg(long, value_name = "TEXT")]
    pub(crate) case: Option<String>,
    /// Exhibit number
    #[arg(long, value_name = "TEXT")]
    pub(crate) exhibit: Option<String>,
    /// Who takes the image
    #[arg(long, value_name = "NAME")]
    pub(crate) examiner: Option<String>,
    /// On whose authority
    #[arg(long, value_name = "TEXT")]
    pub(crate) authority: Option<String>,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum YesNo {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// The methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodArg {
    /// One pass into memory while the guest is held; class instantaneous
    Freeze,
    /// What the running guest writes is followed, then it is held for what is left; class
    /// quasi-instantaneous
    Track,
    /// QEMU stops the guest, protects its memory from writing, lets it go on and sends its memory;
    /// class quasi-instantaneous
    Snapshot,
    /// Two whole passes, the guest never held; class none, the smear measured
    Live,
    /// QEMU's own dump into a socket of ours, the guest stopped throughout; class instantaneous
    Dump,
    /// QEMU copies its memory slice by slice, each held against a read of ours just before; class none
    Pmemsave,
}

impl From<MethodArg> for acquire::plan::Method {
    fn from(arg: MethodArg) -> Self {
        match arg {
            MethodArg::Freeze => Self::Freeze,
            MethodArg::Track => Self::Track,
            MethodArg::Snapshot => Self::Snapshot,
            MethodArg::Live => Self::Live,
            MethodArg::Dump => Self::Dump,
            MethodArg::Pmemsave => Self::Pmemsave,
        }
    }
}

/// What is done with memory in swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SwapArg {
    /// Read it, which brings it back
    In,
    /// Leave it there: zeros in the image, and a loss; live and freeze
    Skip,
}

impl From<SwapArg> for acquire::plan::SwapWish {
    fn from(arg: SwapArg) -> Self {
        match arg {
            SwapArg::In => Self::In,
            SwapArg::Skip => Self::Skip,
        }
    }
}

/// Memory that may be taken or left by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartArg {
    /// ROM that is plain memory to the host; in the image
    Rom,
    /// RAM that a device owns, such as VGA memory; in the image
    DeviceRam,
    /// Flash, such as UEFI's variables; in files of its own
    Romd,
    /// NVDIMMs; in files of their own, only with --include
    Nvdimm,
    /// RAM that lies under something else, such as under the VGA window; in files of its own
    Hidden,
}

impl From<PartArg> for acquire::plan::Part {
    fn from(arg: PartArg) -> Self {
        match arg {
            PartArg::Rom => Self::Rom,
            PartArg::DeviceRam => Self::DeviceRam,
            PartArg::Romd => Self::Romd,
            PartArg::Nvdimm => Self::Nvdimm,
            PartArg::Hidden => Self::Hidden,
        }
    }
}

/// How the guest may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HoldArg {
    /// By ptrace while that is short enough, else by QEMU's stop and cont
    Auto,
    /// QEMU's threads stopped from outside: no event, no disk flush; at most 1 s
    Ptrace,
    /// QEMU's stop and cont: the guest's clock stands too
    Stop,
}

impl From<HoldArg> for acquire::plan::HoldWish {
    fn from(arg: HoldArg) -> Self {
        match arg {
            HoldArg::Auto => Self::Auto,
            HoldArg::Ptrace => Self::Ptrace,
            HoldArg::Stop => Self::Stop,
        }
    }
}

/// What consistency is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConsistencyArg {
    /// One instant, or a refusal
    PointInTime,
    /// A smeared image will do
    Any,
}

impl From<ConsistencyArg> for acquire::plan::Consistency {
    fn from(arg: ConsistencyArg) -> Self {
        match arg {
            ConsistencyArg::PointInTime => Self::PointInTime,
            ConsistencyArg::Any => Self::Any,
        }
    }
}

/// Image formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// ELF core: Volatility, crash, drgn, gdb, MemProcFS
    Elf,
    /// Sparse file, offset = guest-physical address
    Raw,
    /// LiME v1
    Lime,
}

impl From<FormatArg> for evidence::format::Format {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Elf => Self::Elf,
            FormatArg::Raw => Self::Raw,
            FormatArg::Lime => Self::Lime,
        }
    }
}

/// Stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreArg {
    /// Host memory: the shortest window
    Ram,
    /// The image file itself
    Disk,
}

impl From<StoreArg> for acquire::plan::StoreKind {
    fn from(arg: StoreArg) -> Self {
        match arg {
            StoreArg::Ram => Self::Ram,
            StoreArg::Disk => Self::Disk,
        }
    }
}

/// `512`, `512K`, `8G`: powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.to_ascii_uppercase().trim_end_matches("IB").chars().last() {
        Some('K') => (1, 10),
        Some('M') => (1, 20),
        Some('G') => (1, 30),
        Some('T') => (1, 40),
        _ => (0, 0),
    };
    let upper = text.to_ascii_uppercase();
    let body = upper.trim_end_matches("IB");
    let number = body.get(..body.len() - digits).unwrap_or("");
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size; say 512M or 8G"))?;
    number
        .checked_mul(1 << shift)
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("{text:?} is out of range; say a size between 1 and 16 EiB"))
}

/// A size that QEMU copies at a time: whole pages.
fn slice(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    match (4096..=SLICE_AT_MOST).contains(&bytes) && bytes % 4096 == 0 {
        true => Ok(bytes),
        false => Err("whole pages of 4K, at most 1M".to_owned()),
    }
}

/// `100ms`, `2s`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; say 100ms or 2s");
    if let Some(number) = text.strip_suffix("ms") {
        return number.parse().map(Duration::from_millis).map_err(|_| wrong());
    }
    let number = text.strip_suffix('s').ok_or_else(wrong)?;
    number.parse().map(Duration::from_secs).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_finds_no_contradiction() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_and_times() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("512m"), Ok(512 << 20));
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        for bad in ["", "G", "0", "-1", "1.5G", "99999999T", "8 G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("2s"), Ok(Duration::from_secs(2)));
        for bad in ["", "s", "ms", "100", "1.5s", "-1s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
