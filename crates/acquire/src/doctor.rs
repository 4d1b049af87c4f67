//! What this host allows an acquirer to do, what stands in the way, and the remedy.
//!
//! Every check looks at the thing itself and changes nothing; none goes by a version number.

use crate::undo;
use host::{RamStore, memory, privilege};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing stands in the way.
    Good,
    /// Something works less well.
    Limited,
    /// Acquisition is not possible.
    Blocked,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, when something stands in the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    fn good(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Good, found: found.into(), remedy: None }
    }

    fn bad(name: &str, verdict: Verdict, found: impl Into<String>, remedy: &str) -> Self {
        Self { name: name.into(), verdict, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// All checks, the most basic first.
pub fn examine() -> Vec<Check> {
    let mut checks = vec![architecture(), rights(), yama(), processes(), ram(), ksm(), swap()];
    checks.extend([tracking(), protection(), sandbox(), left_behind()]);
    checks.extend(guests());
    checks
}

fn architecture() -> Check {
    if cfg!(target_arch = "x86_64") {
        Check::good("architecture", "x86-64")
    } else {
        Check::bad(
            "architecture",
            Verdict::Limited,
            std::env::consts::ARCH,
            "methods were measured on x86-64 only; compare an image with QEMU's own dump first",
        )
    }
}

fn rights() -> Check {
    if privilege::can_ptrace_others() {
        Check::good("rights", "CAP_SYS_PTRACE: memory of other users' processes can be read")
    } else {
        Check::bad(
            "rights",
            Verdict::Limited,
            "no CAP_SYS_PTRACE: only VMs of this user can be read, and only if they are dumpable",
            "run as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        )
    }
}

fn yama() -> Check {
    match privilege::yama_scope() {
        Some(3) => Check::bad(
            "yama",
            Verdict::Blocked,
            "kernel.yama.ptrace_scope = 3: nobody may read another process, root included",
            "it cannot be lowered before a reboot: boot with ptrace_scope 2 or less, or use a \
             method inside QEMU",
        ),
        Some(scope) if scope > 0 && !privilege::can_ptrace_others() => Check::bad(
            "yama",
            Verdict::Blocked,
            format!("kernel.yama.ptrace_scope = {scope}: only CAP_SYS_PTRACE may read others"),
            "run as root",
        ),
        Some(scope) => Check::good("yama", format!("kernel.yama.ptrace_scope = {scope}")),
        None => Check::good("yama", "not in this kernel"),
    }
}

fn processes() -> Check {
    if privilege::sees_other_users() {
        Check::good("/proc", "processes of other users are visible")
    } else {
        Check::bad(
            "/proc",
            Verdict::Limited,
            "mounted with hidepid: VMs of other users are invisible",
            "run as root, or in the group that the mount option gid= names",
        )
    }
}

fn ram() -> Check {
    match RamStore::limit(None) {
        Ok(limit) => Check::good(
            "RAM store",
            format!("may take {} MiB, limited by {}", limit.bytes >> 20, limit.bound),
        ),
        Err(error) => Check::bad(
            "RAM store",
            Verdict::Limited,
            format!("its limit cannot be told: {error}"),
            "--store disk",
        ),
    }
}

fn ksm() -> Check {
    if privilege::ksm_running() {
        Check::good("KSM", "on: merged guests are read through /proc/PID/mem, which keeps them so")
    } else {
        Check::good("KSM", "off")
    }
}

fn tracking() -> Check {
    match host::soft_dirty::probe() {
        Ok(probe) => Check::good(
            "tracking of written pages",
            format!(
                "soft-dirty works: clearing takes {} ms a GiB and looking {} ms, tried out on memory of \
                 our own",
                probe.clear_a_gib.as_millis(),
                probe.scan_a_gib.as_millis()
            ),
        ),
        Err(error) => Check::bad(
            "tracking of written pages",
            Verdict::Limited,
            format!("no images by track: {}", crate::told(&error)),
            "a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's are, and root; else freeze",
        ),
    }
}

fn protection() -> Check {
    const NAME: &str = "protecting memory from writing";
    match host::userfault::probe() {
        Ok(probe) => Check::good(
            NAME,
            format!(
                "userfaultfd works: protecting takes {} ms a GiB, tried out on memory of our own; \
                 whether QEMU may use it, plan says for each VM",
                probe.protect_a_gib.as_millis()
            ),
        ),
        Err(error) => Check::bad(
            NAME,
            Verdict::Limited,
            format!("no images by snapshot, as far as we can see: {error}"),
            &format!("run as root; {USERFAULTS}"),
        ),
    }
}

fn swap() -> Check {
    let used = memory::host_memory().map_or(0, |m| m.swap_total.saturating_sub(m.swap_free));
    match used {
        0 => Check::good("swap", "none in use"),
        bytes => Check::bad(
            "swap",
            Verdict::Limited,
            format!("{} MiB in use: guest pages in it come back when they are read", bytes >> 20),
            "`stillframe plan VM` shows how much of a VM is swapped out",
        ),
    }
}

fn sandbox() -> Check {
    match host::sandbox::landlock_abi() {
        Ok(Some(abi)) => Check::good("sandbox", format!("Landlock, version {abi}")),
        Ok(None) | Err(_) => Check::bad(
            "sandbox",
            Verdict::Limited,
            "no Landlock: what parses guest memory is kept from files by its user and seccomp alone",
            "a kernel with Landlock (5.13 or later, lsm=...,landlock)",
        ),
    }
}

/// Files of runs whose processes are all dead: a VM may still be stopped.
fn left_behind() -> Check {
    let left = match undo::Undo::all() {
        Ok(paths) => paths,
        Err(error) => {
            let text = crate::told(&error);
            return Check::bad("left behind", Verdict::Limited, text, "run as root");
        }
    };
    let dead = |path: &&std::path::PathBuf| !undo::Undo::peek(path).has_owner();
    match left.iter().filter(dead).count() {
        0 => Check::good("left behind", "nothing by runs that were killed"),
        count => Check::bad(
            "left behind",
            Verdict::Limited,
            format!("{count} runs were killed and may have left a VM stopped"),
            "stillframe recover",
        ),
    }
}

/// What lets every QEMU protect its memory, and what that costs.
const USERFAULTS: &str = "sysctl vm.unprivileged_userfaultfd=1: it lets every user's programs delay the kernel at chosen places, \
     which exploits use; or give QEMU's user /dev/userfaultfd (Linux 6.1)";

/// Whether each VM's QEMU may do what a snapshot needs; where none may not, there is nothing to say.
fn snapshots(rows: &[crate::find::Row]) -> Vec<Check> {
    let may_not = |row: &&crate::find::Row| {
        let process = host::Process::open(row.pid);
        process.is_ok_and(|process| !host::userfault::is_allowed_to(&process))
    };
    let check = |row: &crate::find::Row| {
        let found = "its QEMU may not use userfaultfd: no images of it by snapshot";
        Check::bad(&format!("VM {}", row.name), Verdict::Limited, found, USERFAULTS)
    };
    rows.iter().filter(may_not).map(check).collect()
}

/// One line for each VM: whether its process can be read, and whether it has a monitor.
fn guests() -> Vec<Check> {
    let Ok(crate::find::Listing { rows, .. }) = crate::find::list() else { return Vec::new() };
    let snapshots = snapshots(&rows);
    rows.iter()
        .map(|row| {
            let name = format!("VM {}", row.name);
            if !privilege::can_read_memory_of(row.pid) {
                return Check::bad(
                    &name,
                    Verdict::Limited,
                    format!("PID {}: its memory cannot be opened", row.pid),
                    "run as root; in a container, with CAP_SYS_PTRACE and the host's PID namespace",
                );
            }
            if let Some(domain) = &row.libvirt {
                let found = format!("PID {}, monitor through libvirt's {}", row.pid, domain.socket);
                return Check::good(&name, found);
            }
            match row.monitors.as_slice() {
                [] => Check::bad(
                    &name,
                    Verdict::Limited,
                    format!("PID {}: no QMP socket on its command line", row.pid),
                    "the map must come from QEMU: start it with -qmp unix:PATH,server=on,wait=off",
                ),
                [first, ..] => Check::good(&name, format!("PID {}, monitor {first}", row.pid)),
            }
        })
        .chain(snapshots)
        .collect()
}
