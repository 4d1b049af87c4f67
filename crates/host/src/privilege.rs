//! What this process may do. Each answer comes from the thing itself, not from who we are.

use std::fs::File;
use std::path::Path;

/// CAP_SYS_PTRACE in the effective set: bit 19 (linux/capability.h).
const CAP_SYS_PTRACE: u32 = 19;

/// Whether we have CAP_SYS_PTRACE.
pub fn can_ptrace_others() -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return false };
    has_capability(&status, CAP_SYS_PTRACE)
}

/// Whether the effective set in the text of `/proc/PID/status` holds capability `number`.
fn has_capability(status: &str, number: u32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set >> number & 1 == 1)
}

/// CAP_IPC_LOCK: bit 14.
const CAP_IPC_LOCK: u32 = 14;

/// Bytes of memory that this process may lock; `None` when there is no limit for it.
pub fn lock_limit() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_capability(&status, CAP_IPC_LOCK) {
        return None;
    }
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

/// `kernel.yama.ptrace_scope`; `None` when the kernel has no Yama.
pub fn yama_scope() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?.trim().parse().ok()
}

/// Whether `/proc` shows other users' processes: process 1 is root's on every host.
pub fn sees_other_users() -> bool {
    Path::new("/proc/1/status").exists()
}

/// Whether the memory of process `pid` can be opened for reading. Reads nothing.
pub fn can_read_memory_of(pid: u32) -> bool {
    File::open(format!("/proc/{pid}/mem")).is_ok()
}

/// Whether the kernel merges equal pages now (`/sys/kernel/mm/ksm/run` is 1).
pub fn ksm_running() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_bits_of_the_effective_set() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000000080000\n";
        assert!(has_capability(status, CAP_SYS_PTRACE));
        assert!(!has_capability(status, 18));
        assert!(!has_capability("CapPrm:\t0000000000080000\n", CAP_SYS_PTRACE));
    }

    #[test]
    fn our_own_memory_can_be_opened() {
        assert!(can_read_memory_of(std::process::id()));
        assert!(!can_read_memory_of(u32::MAX));
    }
}
