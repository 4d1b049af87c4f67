//! The rights that a process gives up for good, and what is then in force.
//!
//! Three processes do: [`seal`] is for the one that works on guest bytes and on file descriptors
//! that it was given, [`guardian`] for the one that speaks to QEMU and must never see a guest
//! byte, [`holder`] for the one that stops QEMU's threads and does nothing else. Each is called by a process with one thread, just after it was started: credentials,
//! Landlock and seccomp belong to a thread, and threads started later inherit them.
//!
//! What the kernel does not have, and what takes rights that we do not have, is no error:
//! [`InForce`] says what the kernel shows afterwards, and what is missing.

use crate::kernel_text::field;
use crate::{HostError, Process};
use nix::libc::{self, c_long};
use nix::sys::uio::process_vm_readv;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// "nobody" on every Linux: who a sealed process becomes when it may choose.
const NOBODY: u32 = 65534;

/// What is left to the guardian: it kills a holder that hangs, connects to sockets and writes
/// to directories of other users. No CAP_SYS_PTRACE: it cannot read the guest.
const GUARDIAN_KEEPS: CapabilitySet =
    CapabilitySet::KILL.union(CapabilitySet::DAC_OVERRIDE).union(CapabilitySet::DAC_READ_SEARCH);

/// Which system calls are filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// None: the kernel has no seccomp.
    None,
    /// All but those that are listed fail.
    AllowList,
    /// Those that are listed fail.
    DenyList,
}

impl Filter {
    /// As in the record.
    pub fn as_str(self) -> &'static str {
        match self {
            Filter::None => "none",
            Filter::AllowList => "allow-list",
            Filter::DenyList => "deny-list",
        }
    }
}

/// What confines this process, as the kernel showed it once all was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InForce {
    /// No program that it might start gets more rights (`NoNewPrivs` in `/proc/self/status`).
    pub no_new_privs: bool,
    /// Real, effective, saved and filesystem user id.
    pub uid: u32,
    /// Real, effective, saved and filesystem group id.
    pub gid: u32,
    /// Supplementary groups left.
    pub groups: usize,
    /// The effective capabilities (`CapEff`); the permitted ones are the same.
    pub capabilities: u64,
    /// The version of the kernel's Landlock under which we are; `None` without Landlock.
    pub landlock_abi: Option<u32>,
    /// The filter of system calls.
    pub seccomp: Filter,
    /// What could not be had and why, in words.
    pub missing: Vec<String>,
}

/// Why rights could not be given up. The process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// It has more than one thread: the others would keep their rights.
    #[error("this process has {count} threads, and must have one when it gives up its rights")]
    Threads {
        /// How many.
        count: usize,
    },
    /// A step that the kernel has and that should work did not.
    #[error("{step} failed")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The filter cannot be made.
    #[error("the filter of system calls cannot be made")]
    Filter(#[source] seccompiler::Error),
    /// All steps worked, and the kernel shows something else than was asked for.
    #[error("not in force although it was asked for: {what}")]
    NotInForce {
        /// What.
        what: &'static str,
    },
    /// `/proc/self` cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> SandboxError {
    move |source| SandboxError::Step { step, source: source.into() }
}

/// Gives up everything but memory, threads, the clock and the file descriptors at hand.
///
/// As root the process becomes user and group `as_uid`, by default 65534. It loses all
/// capabilities and all access to files, network, other processes and signals by Landlock, and
/// every system call that is not on a short list: those fail with `EPERM`. Files cannot be
/// opened any more, by any path.
///
/// # Errors
/// [`SandboxError`]: the process may be half confined and must end.
pub fn seal(as_uid: Option<u32>) -> Result<InForce, SandboxError> {
    let mut missing = Vec::new();
    let status = before()?;
    bound_capabilities(CapabilitySet::empty(), &mut missing)?;
    let user = change_user(as_uid.unwrap_or(NOBODY), &mut missing)?;
    keep_capabilities(CapabilitySet::empty())?;
    // After the change of user, which sets it anew. Others of that user can then not trace us.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("hiding our memory from others (PR_SET_DUMPABLE)"))?;
    let landlock_abi = landlock(|_, _| true, &mut missing)?;
    if landlock_abi.is_some() {
        landlock_shows()?;
    }
    let filter = allow_list(rustix::process::getpid().as_raw_pid().unsigned_abs());
    let seccomp = install(&filter?, Filter::AllowList, &mut missing)?;
    let keep = CapabilitySet::empty();
    let in_force = InForce::read(&status, keep, landlock_abi, seccomp, missing)?;
    let InForce { uid, gid, groups, .. } = in_force;
    if user.is_some_and(|id| (uid, gid, groups) != (id, id, 0)) {
        return Err(SandboxError::NotInForce { what: "another user" });
    }
    Ok(in_force)
}

/// Gives up every way to another process's memory, and to start programs.
///
/// The user stays: QEMU's sockets and libvirt know it. Of the capabilities CAP_KILL,
/// CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH stay if they are there. Landlock keeps everything
/// in `/proc` away that takes the rights of a tracer (`mem`, `maps`, `fd`, `exe` ..), also for
/// processes of the same user; `stat` and `status` stay readable. Its price: files can be
/// renamed within their directory only.
///
/// # Errors
/// [`SandboxError`]: the process may be half confined and must end.
pub fn guardian() -> Result<InForce, SandboxError> {
    let mut missing = Vec::new();
    let status = before()?;
    bound_capabilities(GUARDIAN_KEEPS, &mut missing)?;
    keep_capabilities(GUARDIAN_KEEPS)?;
    // Any domain keeps a process from tracing those outside of it (kernel:
    // security/landlock/task.c, `hook_ptrace_access_check`). It must refuse something:
    // executing, the lowest bit of the first set, is refused anyway.
    let landlock_abi = landlock(|set, bit| (set, bit) == (0, 0), &mut missing)?;
    let seccomp = install(&deny_list()?, Filter::DenyList, &mut missing)?;
    InForce::read(&status, GUARDIAN_KEEPS, landlock_abi, seccomp, missing)
}

/// Gives up everything but to stop the threads of other processes and to let them go.
///
/// Of the capabilities CAP_SYS_PTRACE stays if it is there. ptrace cannot read or write memory or
/// registers any more, and nothing else of the system calls that look into other processes is left.
/// There is no Landlock: in a domain nobody outside of it can be traced.
///
/// # Errors
/// [`SandboxError`]: the process may be half confined and must end.
pub fn holder() -> Result<InForce, SandboxError> {
    let mut missing = vec!["Landlock: in a domain nobody outside of it can be traced".to_owned()];
    let status = before()?;
    bound_capabilities(CapabilitySet::SYS_PTRACE, &mut missing)?;
    keep_capabilities(CapabilitySet::SYS_PTRACE)?;
    let seccomp = install(&deny_list_of_holder()?, Filter::DenyList, &mut missing)?;
    InForce::read(&status, CapabilitySet::SYS_PTRACE, None, seccomp, missing)
}

/// The steps that come first. Gives our `status`, open: it cannot be opened later.
fn before() -> Result<File, SandboxError> {
    let me = Process::open(std::process::id())?;
    let count = me.threads()?.len();
    if count != 1 {
        return Err(SandboxError::Threads { count });
    }
    let path = "/proc/self/status";
    let status = File::open(path).map_err(|e| HostError::file(path, e))?;
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, nothing)
        .map_err(step("forbidding core dumps (RLIMIT_CORE)"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    Ok(status)
}

fn capabilities() -> Result<CapabilitySets, SandboxError> {
    rustix::thread::capabilities(None).map_err(step("reading our capabilities"))
}

/// Becomes user and group `id`, without further groups; `None` when that cannot be.
fn change_user(id: u32, missing: &mut Vec<String>) -> Result<Option<u32>, SandboxError> {
    let needed = CapabilitySet::SETUID.union(CapabilitySet::SETGID);
    if !capabilities()?.effective.contains(needed) {
        missing.push("another user: that takes CAP_SETUID and CAP_SETGID".into());
        return Ok(None);
    }
    // These change the calling thread; it is the only one.
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    let changed = rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid));
    match changed {
        Ok(()) => return Ok(Some(id)),
        // In a user namespace that does not have that user.
        Err(Errno::INVAL) => missing.push(format!("another user: {id} does not exist here")),
        // In one whose groups are fixed (user_namespaces(7), "setgroups").
        Err(Errno::PERM) => missing.push("another user: refused by the user namespace".into()),
        Err(error) => return Err(step("becoming another user")(error)),
    }
    Ok(None)
}

/// Takes all capabilities but `keep` out of the bounding set, while we may: with the user the
/// right to do so is gone.
fn bound_capabilities(keep: CapabilitySet, missing: &mut Vec<String>) -> Result<(), SandboxError> {
    if !capabilities()?.effective.contains(CapabilitySet::SETPCAP) {
        // It limits what starting a program could give, and none can be started.
        missing.push("bounding set: that takes CAP_SETPCAP".into());
        return Ok(());
    }
    let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    for capability in all.filter(|capability| !keep.contains(*capability)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel has no more of them.
            Err(Errno::INVAL) => break,
            dropped => dropped.map_err(step("PR_CAPBSET_DROP"))?,
        }
    }
    Ok(())
}

/// Drops all capabilities but `keep` from the other sets.
fn keep_capabilities(keep: CapabilitySet) -> Result<(), SandboxError> {
    match rustix::thread::clear_ambient_capability_set() {
        // Before Linux 4.3 there are none.
        Err(Errno::INVAL) => (),
        cleared => cleared.map_err(step("PR_CAP_AMBIENT_CLEAR_ALL"))?,
    }
    let kept = capabilities()?.permitted.intersection(keep);
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(step("dropping capabilities"))
}

/// The three sets of rights that a Landlock ruleset can take charge of: files, network, scopes
/// (linux/landlock.h, `struct landlock_ruleset_attr`).
type Rulesets = [u64; 3];

/// Puts this process into a Landlock domain without any rule, in which the rights `wanted`, by
/// set and bit, are refused as far as the kernel knows them. Gives the kernel's version.
fn landlock(
    wanted: impl Fn(usize, u32) -> bool,
    missing: &mut Vec<String>,
) -> Result<Option<u32>, SandboxError> {
    let Some(abi) = landlock_abi().map_err(step("asking for Landlock's version"))? else {
        missing.push("Landlock: the kernel has none, or it is off".into());
        return Ok(None);
    };
    // Each bit is asked for, so that rights of kernels newer than this program count too.
    let mut all: Rulesets = [0; 3];
    for set in 0..all.len() {
        for bit in (0..u64::BITS).filter(|bit| wanted(set, *bit)) {
            let mut one: Rulesets = [0; 3];
            one[set] = 1 << bit;
            match landlock_ruleset(&one).map_err(|e| (Errno::from_io_error(&e), e)) {
                Ok(_) => all[set] |= one[set],
                // A bit, or a whole set, that this kernel does not know.
                Err((Some(Errno::INVAL | Errno::TOOBIG), _)) => (),
                Err((_, source)) => return Err(step("making a Landlock ruleset")(source)),
            }
        }
    }
    let ruleset = landlock_ruleset(&all).map_err(step("making a Landlock ruleset"))?;
    // SAFETY: two numbers, the first of an open file descriptor.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    number(done).map_err(step("entering the Landlock domain"))?;
    Ok(Some(abi))
}

/// The version of the kernel's Landlock; `None` when it has none, or it is off.
///
/// # Errors
/// The kernel's.
pub fn landlock_abi() -> io::Result<Option<u32>> {
    const VERSION: u32 = 1;
    let none = std::ptr::null::<Rulesets>();
    // SAFETY: with this flag the kernel reads nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    match number(abi) {
        Ok(abi) => Ok(u32::try_from(abi).ok()),
        // EPERM: a filter around us, as containers have it, does not know the call.
        Err(e) => match Errno::from_io_error(&e) {
            Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
            _ => Err(e),
        },
    }
}

fn landlock_ruleset(rights: &Rulesets) -> io::Result<OwnedFd> {
    let (len, no_flags) = (size_of_val(rights), 0);
    // SAFETY: the kernel reads `len` bytes of `rights`; an older one that knows fewer checks that
    // the rest is zero.
    let fd =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, rights.as_ptr(), len, no_flags) };
    let fd = i32::try_from(number(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a system call returned.
fn number(returned: c_long) -> io::Result<c_long> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Whether the domain is seen to refuse: the root directory cannot be listed.
fn landlock_shows() -> Result<(), SandboxError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open("/", flags, Mode::empty()) {
        Err(Errno::ACCESS) => Ok(()),
        _ => Err(SandboxError::NotInForce { what: "Landlock" }),
    }
}

/// Filters by argument of a call: all conditions of one rule must hold, one rule must.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A rule that holds when each argument (number, width, comparison, value) does.
fn rule(
    conditions: &[(u8, seccompiler::SeccompCmpArgLen, SeccompCmpOp, u64)],
) -> Result<SeccompRule, SandboxError> {
    let condition = |(arg, len, op, value): &(u8, _, SeccompCmpOp, u64)| {
        SeccompCondition::new(*arg, Clone::clone(len), op.clone(), *value)
    };
    let conditions: Result<Vec<_>, _> = conditions.iter().map(condition).collect();
    conditions.and_then(SeccompRule::new).map_err(backend)
}

fn backend(error: impl Into<seccompiler::Error>) -> SandboxError {
    SandboxError::Filter(error.into())
}

/// Calls that are harmless with any arguments: on open file descriptors, own memory, own
/// threads, the clock.
const ALLOWED: &[c_long] = &[
    // Bytes of open files, pipes and connected sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    SYNC_FILE_RANGE,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals to ourselves.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
];

#[cfg(target_arch = "x86_64")]
const SYNC_FILE_RANGE: c_long = libc::SYS_sync_file_range;
/// The number that all newer architectures share (asm-generic/unistd.h); libc lacks it there.
#[cfg(not(target_arch = "x86_64"))]
const SYNC_FILE_RANGE: c_long = 84;

/// What `fcntl` may do: nothing that sends signals, locks or leases.
const FCNTL: [i32; 6] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GET_SEALS,
];

/// The calls of a process `pid` that works on what it has.
fn allow_list(pid: u32) -> Result<BpfProgram, SandboxError> {
    let flag = |flag: i32| u64::from(flag.unsigned_abs());
    let (thread, empty_path) = (flag(libc::CLONE_THREAD), flag(libc::AT_EMPTY_PATH));
    let not_executable = || rule(&[(2, Dword, MaskedEq(flag(libc::PROT_EXEC)), 0)]);
    let mut rules: Rules = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    rules.extend([
        (libc::SYS_mmap, vec![not_executable()?]),
        (libc::SYS_mprotect, vec![not_executable()?]),
        // A thread, not a process.
        (libc::SYS_clone, vec![rule(&[(0, Dword, MaskedEq(thread), thread)])?]),
        // With this flag and an empty path they are fstat. The path cannot be seen here: what
        // is left open is whether a file exists, its size and times.
        (libc::SYS_statx, vec![rule(&[(2, Dword, MaskedEq(empty_path), empty_path)])?]),
        (libc::SYS_newfstatat, vec![rule(&[(3, Dword, MaskedEq(empty_path), empty_path)])?]),
        (libc::SYS_prctl, vec![rule(&[(0, Dword, Eq, flag(libc::PR_SET_NAME))])?]),
        // How abort ends a process.
        (libc::SYS_tgkill, vec![rule(&[(0, Dword, Eq, pid.into())])?]),
        // Reading our own limits, as the C library does for a thread's stack.
        (libc::SYS_prlimit64, vec![rule(&[(0, Dword, Eq, 0), (2, Qword, Eq, 0)])?]),
    ]);
    let commands = FCNTL.iter().map(|command| rule(&[(1, Dword, Eq, flag(*command))]));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    // The flags of clone3 lie in memory, where a filter cannot look. With ENOSYS the C library
    // falls back to clone.
    let clone3 = answer(libc::SYS_clone3, libc::ENOSYS);
    program(rules, SeccompAction::Errno(EPERM), SeccompAction::Allow, &clone3)
}

/// Calls that the guardian has no use for: to look into other processes, to start programs, to
/// reach files by other ways than paths, to change the kernel or its own confinement.
const DENIED: &[c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    // Its requests are not seen by seccomp.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

fn deny_list() -> Result<BpfProgram, SandboxError> {
    let rules = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    program(rules, SeccompAction::Allow, SeccompAction::Errno(EPERM), &[])
}

/// What ptrace is asked by a holder: to seize, to interrupt, to detach, why a thread stopped.
const HOLDING: [libc::c_uint; 4] =
    [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT, libc::PTRACE_DETACH, libc::PTRACE_GETSIGINFO];

/// Calls that a holder has no use for beside those of [`DENIED`].
const DENIED_TO_HOLDER: [c_long; 5] = [
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_kill,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigqueueinfo,
];

fn deny_list_of_holder() -> Result<BpfProgram, SandboxError> {
    let denied = DENIED.iter().chain(&DENIED_TO_HOLDER).filter(|call| **call != libc::SYS_ptrace);
    let mut rules: Rules = denied.map(|call| (*call, Vec::new())).collect();
    // All requests but those: none of these conditions may hold.
    let others = HOLDING.map(|request| (0, Dword, SeccompCmpOp::Ne, u64::from(request)));
    rules.insert(libc::SYS_ptrace, vec![rule(&others)?]);
    program(rules, SeccompAction::Allow, SeccompAction::Errno(EPERM), &[])
}

/// As seccomp wants it.
const EPERM: u32 = libc::EPERM.unsigned_abs();

/// The program: `first`, then the check of the architecture and the rules.
///
/// System calls of another architecture (32 bit) kill the process: only an attacker makes them.
fn program(
    rules: Rules,
    else_: SeccompAction,
    then: SeccompAction,
    first: &[sock_filter],
) -> Result<BpfProgram, SandboxError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(backend)?;
    let filter = SeccompFilter::new(rules, else_, then, arch).map_err(backend)?;
    let filter = BpfProgram::try_from(filter).map_err(backend)?;
    // Jumps are relative, so that instructions can be put in front.
    Ok([&load_number()[..], &no_x32(), first, &filter].concat())
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    // The opcodes are below 256.
    sock_filter { code: u16::try_from(code).unwrap_or_default(), jt, jf, k }
}

fn load_number() -> [sock_filter; 1] {
    // The number is the first field of struct seccomp_data.
    [instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)]
}

/// Returns `errno` when the loaded number compares so with `number`.
fn fail_if(compare: u32, number: u32, errno: i32) -> [sock_filter; 2] {
    let errno = libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
    [
        instruction(libc::BPF_JMP | compare | libc::BPF_K, 0, 1, number),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, errno),
    ]
}

fn answer(call: c_long, errno: i32) -> [sock_filter; 2] {
    // No system call has a number above this.
    fail_if(libc::BPF_JEQ, u32::try_from(call).unwrap_or(u32::MAX), errno)
}

/// x86-64 has a second set of numbers under the same architecture, by which a deny-list could be
/// passed (seccomp(2), "the x32 ABI").
fn no_x32() -> Vec<sock_filter> {
    const X32: u32 = 0x4000_0000;
    let refused = fail_if(libc::BPF_JGE, X32, libc::EPERM);
    if cfg!(target_arch = "x86_64") { refused.to_vec() } else { Vec::new() }
}

fn install(
    program: &BpfProgram,
    filter: Filter,
    missing: &mut Vec<String>,
) -> Result<Filter, SandboxError> {
    match seccompiler::apply_filter(program) {
        Ok(()) => Ok(filter),
        Err(seccompiler::Error::Seccomp(source)) => match Errno::from_io_error(&source) {
            Some(Errno::NOSYS | Errno::INVAL) => {
                missing.push("seccomp: the kernel has no filters".into());
                Ok(Filter::None)
            }
            _ => Err(step("installing the filter of system calls")(source)),
        },
        Err(error) => Err(SandboxError::Filter(error)),
    }
}

impl InForce {
    /// Reads back what the kernel shows in our `status`, and refuses what was not asked for.
    fn read(
        status: &File,
        keep: CapabilitySet,
        landlock_abi: Option<u32>,
        seccomp: Filter,
        missing: Vec<String>,
    ) -> Result<Self, SandboxError> {
        let mut text = vec![0; 1 << 16];
        let got = status.read_at(&mut text, 0).map_err(step("reading our status again"))?;
        let text = String::from_utf8_lossy(&text[..got]);
        let shown = Shown::parse(&text).ok_or_else(|| HostError::Format {
            path: "/proc/self/status".into(),
            what: "fields are missing".into(),
        })?;
        let left = |set: &u64| set & !keep.bits() != 0;
        let checks = [
            ("no_new_privs", shown.no_new_privs),
            ("one user and group", shown.one_uid && shown.one_gid),
            ("fewer capabilities", !shown.capabilities.iter().any(left)),
            ("seccomp", seccomp == Filter::None || (shown.seccomp == 2 && seccomp_shows())),
        ];
        if let Some((what, _)) = checks.into_iter().find(|(_, in_force)| !in_force) {
            return Err(SandboxError::NotInForce { what });
        }
        let [_, _, capabilities, _] = shown.capabilities;
        let Shown { no_new_privs, uid, gid, groups, .. } = shown;
        Ok(Self { no_new_privs, uid, gid, groups, capabilities, landlock_abi, seccomp, missing })
    }
}

/// Whether our filter is seen to refuse; one around us shows in `status` just the same. Both
/// lists refuse this call, which reads nothing.
fn seccomp_shows() -> bool {
    let read = process_vm_readv(nix::unistd::Pid::this(), &mut [], &[]);
    read == Err(nix::errno::Errno::EPERM)
}

/// What `/proc/PID/task/TID/status` says of a thread's rights.
#[derive(Debug)]
struct Shown {
    no_new_privs: bool,
    seccomp: u32,
    uid: u32,
    gid: u32,
    /// All four ids are the same.
    one_uid: bool,
    one_gid: bool,
    groups: usize,
    /// Inheritable, permitted, effective, ambient.
    capabilities: [u64; 4],
}

impl Shown {
    fn parse(status: &str) -> Option<Self> {
        let ids = |name| -> Option<Vec<u32>> {
            field(status, name)?.split_ascii_whitespace().map(|id| id.parse().ok()).collect()
        };
        let set = |name| u64::from_str_radix(field(status, name)?, 16).ok();
        let (uids, gids, groups) = (ids("Uid")?, ids("Gid")?, ids("Groups")?);
        // A kernel without seccomp has no such line.
        let seccomp = field(status, "Seccomp").map_or(Some(0), |mode| mode.parse().ok())?;
        Some(Self {
            no_new_privs: field(status, "NoNewPrivs")? == "1",
            seccomp,
            uid: *uids.get(1)?,
            gid: *gids.get(1)?,
            one_uid: uids.iter().all(|id| *id == uids[0]),
            one_gid: gids.iter().all(|id| *id == gids[0]),
            groups: groups.len(),
            capabilities: [set("CapInh")?, set("CapPrm")?, set("CapEff")?, set("CapAmb")?],
        })
    }
}

/// The rights of one thread, as the kernel shows them to anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadRights {
    /// Its id.
    pub tid: u32,
    /// `NoNewPrivs`.
    pub no_new_privs: bool,
    /// `Seccomp`: 0 none, 1 strict, 2 a filter.
    pub seccomp: u32,
    /// `CapEff`: the effective capabilities.
    pub capabilities: u64,
    /// The effective user id.
    pub uid: u32,
}

/// The rights of each thread of `process`, ascending by id. One that ends meanwhile is left out.
///
/// # Errors
/// [`HostError::Exited`], or a `status` without these fields.
pub fn of_threads(process: &Process) -> Result<Vec<ThreadRights>, HostError> {
    let mut rights = Vec::new();
    for tid in process.threads()? {
        let name = format!("task/{tid}/status");
        let status = match process.small_text(&name) {
            Ok(status) => status,
            Err(HostError::Exited { pid }) if !process.alive() => {
                return Err(HostError::Exited { pid });
            }
            Err(HostError::Exited { .. }) => continue,
            Err(HostError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let shown = Shown::parse(&status).ok_or_else(|| HostError::Format {
            path: process.path(&name),
            what: "fields are missing".into(),
        })?;
        let Shown { no_new_privs, seccomp, uid, capabilities: [_, _, capabilities, _], .. } = shown;
        rights.push(ThreadRights { tid, no_new_privs, seccomp, capabilities, uid });
    }
    Ok(rights)
}

// What a sandbox refuses is tested in tests/sandbox.rs: it takes a process with one thread.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_refused() {
        // The test harness has several; nothing was given up.
        assert!(matches!(seal(None), Err(SandboxError::Threads { count: 2.. })));
        assert!(matches!(guardian(), Err(SandboxError::Threads { count: 2.. })));
        let me = Process::open(std::process::id()).unwrap();
        let ours = rustix::thread::no_new_privs().unwrap();
        assert!(of_threads(&me).unwrap().iter().all(|t| t.no_new_privs == ours));
    }

    #[test]
    fn programs_are_short_and_begin_with_the_numbers_that_no_rule_may_see() {
        let (allow, deny) = (allow_list(1).unwrap(), deny_list().unwrap());
        // BPF_MAXINSNS.
        assert!(allow.len() < 4096 && deny.len() < 4096);
        if cfg!(target_arch = "x86_64") {
            assert_eq!((allow[1].k, deny[1].k), (0x4000_0000, 0x4000_0000));
            assert_eq!((allow[2].k, deny[2].k), (0x0005_0001, 0x0005_0001));
            assert_eq!((allow[3].k, allow[4].k), (435, 0x0005_0000 | 38));
        }
    }

    #[test]
    fn rights_are_read_from_status() {
        let text = "Uid:\t0\t7\t0\t0\nGid:\t5\t5\t5\t5\nGroups:\t1 2 \nCapInh:\t0\nCapPrm:\tff\n\
                    CapEff:\t2a\nCapBnd:\tff\nCapAmb:\t0\nNoNewPrivs:\t1\n";
        let shown = Shown::parse(text).unwrap();
        assert_eq!((shown.uid, shown.gid, shown.groups), (7, 5, 2));
        assert!(!shown.one_uid && shown.one_gid && shown.no_new_privs && shown.seccomp == 0);
        assert_eq!(shown.capabilities, [0, 0xff, 0x2a, 0]);
        assert!(Shown::parse(&text.replace("NoNewPrivs", "Other")).is_none());
    }
}
