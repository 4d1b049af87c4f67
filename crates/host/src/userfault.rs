//! userfaultfd's write protection, as QEMU's background snapshot uses it, tried out on memory of our
//! own: whether this kernel has it, and what protecting memory takes.
//!
//! Source: Linux, include/uapi/linux/userfaultfd.h and Documentation/admin-guide/mm/userfaultfd.rst.

use crate::Process;
use crate::own_memory::{OwnMemory, PAGE_BYTES};
use nix::libc;
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// What it takes, as far as memory of our own shows: in QEMU's process KVM's page tables are dropped
/// too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// To protect 1 GiB of small pages.
    pub protect_a_gib: Duration,
}

/// Memory that is tried: 16 MiB.
const LEN: usize = 4096 * PAGE_BYTES;

/// How many times a GiB has it.
const A_GIB: u32 = 64;

/// It is protected so often, and the round in the middle counts: on a busy host one that was put aside for a
/// while would tell of the others' work, 64 times over.
const ROUNDS: usize = 5;

/// `UFFD_API`, the only version.
const API: u64 = 0xaa;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`
const FEATURE_WRITE_PROTECT: u64 = 1 << 0;

/// `UFFDIO_REGISTER_MODE_WP`
const REGISTER_WRITE_PROTECT: u64 = 1 << 1;

/// `UFFDIO_WRITEPROTECT_MODE_WP`
const PROTECT: u64 = 1 << 0;

/// `struct uffdio_api`
#[repr(C)]
pub struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`
#[repr(C)]
pub struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
pub struct WriteProtect {
    range: Range,
    mode: u64,
}

mod calls {
    use super::{API, Api, Register, WriteProtect};
    nix::ioctl_readwrite!(uffdio_api, API, 0x3f, Api);
    nix::ioctl_readwrite!(uffdio_register, API, 0x00, Register);
    nix::ioctl_readwrite!(uffdio_writeprotect, API, 0x06, WriteProtect);
}
use calls::{uffdio_api, uffdio_register, uffdio_writeprotect};

/// Tries it out.
///
/// # Errors
/// What the kernel refused: there is no userfaultfd, it does not protect from writing, or we may not
/// use it (without CAP_SYS_PTRACE it takes `vm.unprivileged_userfaultfd`). QEMU needs the same.
pub fn probe() -> io::Result<Probe> {
    let own = OwnMemory::in_small_pages(LEN)?;
    let range = Range { start: own.address(), len: LEN as u64 };
    // SAFETY: the descriptor serves our own memory only, and only the range registered below, which
    // nobody touches until both are dropped.
    let fd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) }?;
    let mut api = Api { api: API, features: FEATURE_WRITE_PROTECT, ioctls: 0 };
    call(&fd, |fd| {
        // SAFETY: `api` is the structure that the kernel reads and writes.
        unsafe { uffdio_api(fd, &raw mut api) }
    })?;
    if api.features & FEATURE_WRITE_PROTECT == 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    let mut register = Register { range, mode: REGISTER_WRITE_PROTECT, ioctls: 0 };
    call(&fd, |fd| {
        // SAFETY: the structure is as the kernel has it, and the range is our own mapping.
        unsafe { uffdio_register(fd, &raw mut register) }
    })?;
    let set = |mode: u64| {
        let mut protect = WriteProtect { range, mode };
        call(&fd, |fd| {
            // SAFETY: as above; no byte changes, and nobody writes to the range while it is protected.
            unsafe { uffdio_writeprotect(fd, &raw mut protect) }
        })
    };
    let mut rounds = [Duration::ZERO; ROUNDS];
    for round in &mut rounds {
        let began = Instant::now();
        set(PROTECT)?;
        *round = began.elapsed();
        set(0)?;
    }
    rounds.sort_unstable();
    let protect_a_gib = rounds[ROUNDS / 2] * A_GIB;
    // Closing it ends the protection, before the memory goes.
    drop(fd);
    drop(own);
    Ok(Probe { protect_a_gib })
}

/// Whether QEMU's `process` may use userfaultfd with faults of the kernel, which a guest's memory
/// needs: by its capability, by the host's setting, or by the device file (QEMU 8.0 and later).
pub fn is_allowed_to(process: &Process) -> bool {
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    // Before Linux 5.2 there is no such setting, and everybody may.
    if setting.map_or(true, |text| text.trim() == "1") {
        return true;
    }
    let rights = crate::sandbox::of_threads(process).unwrap_or_default();
    let Some(first) = rights.first() else { return true };
    if first.capabilities >> CAP_SYS_PTRACE & 1 == 1 {
        return true;
    }
    let others = |meta: &std::fs::Metadata| {
        let (mode, uid) = (meta.mode(), meta.uid());
        mode & 0o006 == 0o006 || (uid == first.uid && mode & 0o600 == 0o600)
    };
    // By QEMU's own eyes: libvirt gives it a /dev of its own.
    let device = format!("/proc/{}/root/dev/userfaultfd", process.pid());
    std::fs::metadata(device).as_ref().is_ok_and(others)
}

/// Number of the capability.
const CAP_SYS_PTRACE: u32 = 19;

fn call(
    fd: &OwnedFd,
    ioctl: impl FnOnce(libc::c_int) -> nix::Result<libc::c_int>,
) -> io::Result<()> {
    Ok(ioctl(fd.as_raw_fd()).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_protects_says_what_it_takes() {
        match probe() {
            Ok(probe) => assert!(probe.protect_a_gib > Duration::ZERO, "{probe:?}"),
            Err(error) => {
                let refused = [libc::EPERM, libc::ENOSYS, libc::EOPNOTSUPP, libc::EINVAL];
                assert!(error.raw_os_error().is_some_and(|e| refused.contains(&e)), "{error}");
            }
        }
    }
}
