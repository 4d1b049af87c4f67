//! What confined processes can do and cannot.
//!
//! Without libtest, for it has threads: each test starts this program again with a role, and the
//! role confines itself on the first and only thread. The names of the tests that have run are
//! printed as libtest does.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use host::sandbox::{self, Filter, InForce, ThreadRights, of_threads};
use host::{Process, hold};
use nix::libc::{self, c_long};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime};

const EPERM: i32 = libc::EPERM;
const EACCES: i32 = libc::EACCES;
const ENOSYS: i32 = libc::ENOSYS;

fn main() -> ExitCode {
    match std::env::var("SANDBOX_ROLE").ok().as_deref() {
        None => run_tests(),
        Some("refusals") => confined_then(|| sandbox::seal(None), seal_attempts),
        Some("guardian") => confined_then(sandbox::guardian, guardian_attempts),
        Some("other-user") => confined_then(|| sandbox::seal(Some(12345)), Vec::new),
        Some("idle") => confined_then(without_capabilities, Vec::new),
        Some("threads") => with_threads(),
        Some("work") => work(),
        Some("guardian-work") => guardian_work(),
        Some("holder-work") => holder_work(),
        Some("abort") => {
            sandbox::seal(None).unwrap();
            std::process::abort()
        }
        Some("int80") => int80(),
        Some(other) => panic!("no role {other:?}"),
    }
}

fn run_tests() -> ExitCode {
    let tests: [(&str, fn()); 9] = [
        ("sealed_threads_are_refused_all_but_what_they_have", sealed_threads_are_refused),
        ("sealed_processes_can_do_their_work", sealed_processes_can_work),
        ("sealed_processes_end_as_others_do", sealed_processes_end),
        ("the_user_can_be_chosen", the_user_can_be_chosen),
        ("threads_that_run_already_are_no_sandbox", threads_are_refused),
        ("calls_of_another_architecture_kill", other_architecture_kills),
        ("guardians_cannot_look_into_others", guardians_cannot_look),
        ("guardians_can_do_their_work", guardians_can_work),
        ("holders_can_hold_and_do_nothing_else", holders_can_hold),
    ];
    // `cargo test NAME` and libtest's flags; of those only what others rely on.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let names: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    if args.iter().any(|arg| arg == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    // As a program the tests are found by its name too.
    let wanted = |name: &str| {
        let whole = format!("sandbox::{name}");
        names.is_empty() || names.iter().any(|part| whole.contains(part.as_str()))
    };
    let chosen: Vec<_> = tests.into_iter().filter(|(name, _)| wanted(name)).collect();
    let mut failed = 0;
    for (name, test) in &chosen {
        let passed = std::panic::catch_unwind(test).is_ok();
        failed += usize::from(!passed);
        println!("test sandbox::{name} ... {}", if passed { "ok" } else { "FAILED" });
    }
    println!("\ntest result: {} passed; {failed} failed\n", chosen.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

// ---- The side that confines itself.

/// An attempt, and the errno that it came to; 0 is success.
type Attempts = Vec<(&'static str, i32)>;

/// Confines this process, then lets three threads try, and says what they came to.
fn confined_then<E: std::fmt::Debug>(
    confine: impl FnOnce() -> Result<InForce, E>,
    attempts: fn() -> Attempts,
) -> ExitCode {
    let in_force = confine().unwrap();
    let InForce { no_new_privs, uid, gid, groups, capabilities, landlock_abi, seccomp, missing } =
        in_force;
    println!("no_new_privs {}", u8::from(no_new_privs));
    println!("uid {uid}\ngid {gid}\ngroups {groups}\ncapabilities {capabilities}");
    println!("landlock {}", landlock_abi.unwrap_or(0));
    println!("seccomp {}\nmissing {}", seccomp.as_str(), missing.len());
    missing.iter().for_each(|reason| eprintln!("missing: {reason}"));
    let done = Arc::new(Barrier::new(3));
    let told = Arc::new(Barrier::new(3));
    let run = move |thread: usize, done: Arc<Barrier>, told: Arc<Barrier>| {
        for (attempt, errno) in attempts() {
            println!("{thread}:{attempt} {errno}");
        }
        done.wait();
        told.wait();
    };
    let others: Vec<_> = (1..3)
        .map(|thread| {
            let (done, told) = (done.clone(), told.clone());
            std::thread::spawn(move || run(thread, done, told))
        })
        .collect();
    for (attempt, errno) in attempts() {
        println!("0:{attempt} {errno}");
    }
    done.wait();
    println!("ready 1");
    // The parent looks at us from outside until it closes the pipe.
    let _ = io::stdin().read(&mut [0]);
    told.wait();
    others.into_iter().for_each(|thread| thread.join().unwrap());
    ExitCode::SUCCESS
}

/// A process of the same user that has no capability: nothing but Landlock keeps others of that
/// user out of its memory.
fn without_capabilities() -> Result<InForce, rustix::io::Errno> {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets)?;
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    Ok(InForce {
        no_new_privs: false,
        uid,
        gid,
        groups: 0,
        capabilities: 0,
        landlock_abi: None,
        seccomp: Filter::None,
        missing: Vec::new(),
    })
}

/// The errno of a raw system call; what it returns is closed if it is a file descriptor.
fn errno_of(call: c_long, args: &[usize]) -> i32 {
    let arg = |i: usize| args.get(i).copied().unwrap_or(0);
    // SAFETY: pointers among the arguments are null, to constants, or to memory of the caller
    // that outlives the call and is large enough.
    let done = unsafe { libc::syscall(call, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) };
    if done == -1 { io::Error::last_os_error().raw_os_error().unwrap_or(-1) } else { 0 }
}

fn int(value: i32) -> usize {
    usize::try_from(i64::from(value).cast_unsigned()).unwrap()
}

/// The sealed may not ask for it, so it is told.
fn parent_id() -> i32 {
    std::env::var("SANDBOX_PARENT").unwrap().parse().unwrap()
}

fn path(path: &'static std::ffi::CStr) -> usize {
    path.as_ptr().addr()
}

fn both() -> Attempts {
    let parent = int(parent_id());
    let me = usize::try_from(std::process::id()).unwrap();
    let (at, t) = (int(libc::AT_FDCWD), path(c"/bin/true"));
    let mut byte = [0_u8; 8];
    let local = [byte.as_mut_ptr().addr(), 8];
    let iov = local.as_ptr().addr();
    let mut attempts = vec![
        ("ptrace traceme", errno_of(libc::SYS_ptrace, &[0])),
        ("ptrace seize", errno_of(libc::SYS_ptrace, &[0x4206, parent])),
        ("execve", errno_of(libc::SYS_execve, &[t])),
        ("execveat", errno_of(libc::SYS_execveat, &[at, t])),
        ("process_vm_readv self", errno_of(libc::SYS_process_vm_readv, &[me, iov, 1, iov, 1])),
        ("process_vm_readv", errno_of(libc::SYS_process_vm_readv, &[parent, iov, 1, iov, 1])),
        ("process_vm_writev", errno_of(libc::SYS_process_vm_writev, &[me, iov, 1, iov, 1])),
        ("pidfd_getfd", errno_of(libc::SYS_pidfd_getfd, &[0, 0])),
        ("kcmp", errno_of(libc::SYS_kcmp, &[me, me])),
        ("userfaultfd", errno_of(libc::SYS_userfaultfd, &[1])),
        ("bpf", errno_of(libc::SYS_bpf, &[])),
        ("perf_event_open", errno_of(libc::SYS_perf_event_open, &[])),
        ("io_uring_setup", errno_of(libc::SYS_io_uring_setup, &[1])),
        ("add_key", errno_of(libc::SYS_add_key, &[])),
        ("keyctl", errno_of(libc::SYS_keyctl, &[])),
        ("open_by_handle_at", errno_of(libc::SYS_open_by_handle_at, &[])),
        ("mount", errno_of(libc::SYS_mount, &[])),
        ("unshare", errno_of(libc::SYS_unshare, &[0])),
        ("setns", errno_of(libc::SYS_setns, &[0])),
    ];
    if cfg!(target_arch = "x86_64") {
        attempts.push(("x32 process_vm_readv", errno_of(0x4000_0000 | 539, &[me, iov, 1, iov, 1])));
        attempts.push(("x32 ptrace", errno_of(0x4000_0000 | 521, &[0])));
    }
    attempts
}

fn seal_attempts() -> Attempts {
    let me = usize::try_from(std::process::id()).unwrap();
    let parent = int(parent_id());
    let (at, passwd) = (int(libc::AT_FDCWD), path(c"/etc/passwd"));
    let how = [0_u64; 3];
    let mut stat = [0_u8; 512];
    let stat = stat.as_mut_ptr().addr();
    let (rwx, rw) = (int(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC), 3);
    let private = int(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let page = vec![0_u8; 8192];
    let page = page.as_ptr().addr().next_multiple_of(4096);
    let limit = [0_u64; 2];
    let mut attempts = both();
    attempts.extend([
        ("openat", errno_of(libc::SYS_openat, &[at, passwd])),
        ("openat2", errno_of(libc::SYS_openat2, &[at, passwd, how.as_ptr().addr(), 24])),
        ("stat", errno_of(libc::SYS_newfstatat, &[at, passwd, stat, 0])),
        ("statx", errno_of(libc::SYS_statx, &[at, passwd, 0, 0, stat])),
        ("truncate", errno_of(libc::SYS_truncate, &[passwd, 1 << 20])),
        ("unlinkat", errno_of(libc::SYS_unlinkat, &[at, path(c"/nowhere")])),
        ("renameat2", errno_of(libc::SYS_renameat2, &[at, path(c"/nowhere"), at, passwd])),
        ("mkdirat", errno_of(libc::SYS_mkdirat, &[at, path(c"/nowhere/at"), 0o700])),
        ("chdir", errno_of(libc::SYS_chdir, &[path(c"/")])),
        ("memfd_create", errno_of(libc::SYS_memfd_create, &[path(c"x")])),
        ("socket", errno_of(libc::SYS_socket, &[1, 1])),
        ("connect", errno_of(libc::SYS_connect, &[0])),
        ("sendmsg", errno_of(libc::SYS_sendmsg, &[0])),
        ("fork", errno_of(libc::SYS_clone, &[int(libc::SIGCHLD)])),
        ("clone3", errno_of(libc::SYS_clone3, &[])),
        ("kill self", errno_of(libc::SYS_kill, &[me, 0])),
        ("kill parent", errno_of(libc::SYS_kill, &[parent, 0])),
        ("tgkill parent", errno_of(libc::SYS_tgkill, &[parent, parent, 0])),
        ("pidfd_open", errno_of(libc::SYS_pidfd_open, &[me])),
        ("mmap executable", errno_of(libc::SYS_mmap, &[0, 4096, rwx, private, int(-1)])),
        ("mmap", errno_of(libc::SYS_mmap, &[0, 4096, rw, private, int(-1)])),
        ("mprotect executable", errno_of(libc::SYS_mprotect, &[page, 4096, rwx])),
        ("pkey_mprotect", errno_of(libc::SYS_pkey_mprotect, &[page, 4096, rw, int(-1)])),
        ("prctl dumpable", errno_of(libc::SYS_prctl, &[int(libc::PR_SET_DUMPABLE), 1])),
        ("fcntl owner", errno_of(libc::SYS_fcntl, &[0, int(libc::F_SETOWN), parent])),
        ("ioctl", errno_of(libc::SYS_ioctl, &[0, 0x5401])),
        ("setuid", errno_of(libc::SYS_setuid, &[0])),
        ("prlimit of parent", errno_of(libc::SYS_prlimit64, &[parent, 4, 0, stat])),
        ("prlimit set", errno_of(libc::SYS_prlimit64, &[0, 4, limit.as_ptr().addr(), 0])),
        ("prlimit", errno_of(libc::SYS_prlimit64, &[0, 4, 0, stat])),
        ("seccomp", errno_of(libc::SYS_seccomp, &[])),
    ]);
    #[cfg(target_arch = "x86_64")]
    attempts.extend([
        ("open", errno_of(libc::SYS_open, &[passwd])),
        ("old fork", errno_of(libc::SYS_fork, &[])),
        ("x32 getpid", errno_of(0x4000_0000 | libc::SYS_getpid, &[])),
    ]);
    attempts
}

fn guardian_attempts() -> Attempts {
    let mut attempts = both();
    let pids = [std::env::var("SANDBOX_PEER").unwrap(), parent_id().to_string()];
    let open = |name: String| File::open(name).map_or_else(|e| e.raw_os_error().unwrap(), |_| 0);
    let names = ["mem of a process without capabilities", "mem of the parent"];
    for (name, pid) in names.into_iter().zip(&pids) {
        attempts.push((name, open(format!("/proc/{pid}/mem"))));
    }
    let fd = format!("/proc/{}/fd/0", pids[0]);
    attempts.push(("fd of another", std::fs::read_link(fd).map_or(EACCES, |_| 0)));
    attempts.push(("status of another", open(format!("/proc/{}/status", pids[0]))));
    attempts.push(("stat of another", open(format!("/proc/{}/stat", pids[0]))));
    attempts
}

fn with_threads() -> ExitCode {
    let (end, ended) = mpsc::channel::<()>();
    let other = std::thread::spawn(move || ended.recv());
    let refused = matches!(sandbox::seal(None), Err(sandbox::SandboxError::Threads { count: 2 }))
        && matches!(sandbox::guardian(), Err(sandbox::SandboxError::Threads { count: 2 }));
    // Nothing was given up.
    let kept = File::open("/etc/passwd").is_ok() && !rustix::thread::no_new_privs().unwrap();
    drop(end);
    let _ = other.join();
    if refused && kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What sealing does: bytes from one file to another, in threads.
fn work() -> ExitCode {
    let number: i32 = std::env::var("SANDBOX_FD").unwrap().parse().unwrap();
    // SAFETY: the parent made it for us and told its number; nobody else here has it.
    let file = unsafe { File::from(OwnedFd::from_raw_fd(number)) };
    sandbox::seal(None).unwrap();

    // Files.
    let mut buffer = vec![0; 1 << 20];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 7));
    file.write_all_at(&buffer, 4 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 5 << 20);
    use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, 1 << 20).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 4 << 20);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 5 << 20);
    file.set_len(6 << 20).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    let second = file.try_clone().unwrap();
    assert!(rustix::fs::fcntl_getfl(&second).unwrap().contains(rustix::fs::OFlags::RDWR));
    drop(second);

    // Memory.
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, within the file's length, used only here and then removed.
    unsafe {
        let null = std::ptr::null_mut();
        let at = mmap(null, 1 << 20, prot, MapFlags::SHARED, &file, 4 << 20).unwrap();
        assert_eq!(at.cast::<u8>().add(5).read(), 7);
        munmap(at, 1 << 20).unwrap();
    }
    let mut large = vec![1_u8; 64 << 20];
    large.resize(128 << 20, 2);
    assert_eq!(large.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 3 * (64 << 20));
    drop(large);
    let small: Vec<_> = (1..20_000_usize).map(|len| vec![1_u8; len % 500]).collect();
    assert_eq!(small.len(), 19_999);

    // Threads.
    assert!(std::thread::available_parallelism().unwrap().get() > 0);
    let (sender, receiver) = mpsc::channel();
    let threads: Vec<_> = (0..16_u64)
        .map(|start| {
            let (sender, file) = (sender.clone(), file.try_clone().unwrap());
            let run = move || {
                // Some work of the kind that digests are.
                let mut sum = start;
                for i in 0..1_000_000_u64 {
                    sum = sum.rotate_left(5) ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                }
                file.write_all_at(&sum.to_le_bytes(), start * 8).unwrap();
                sender.send(sum).unwrap();
            };
            std::thread::Builder::new().name(format!("worker {start}")).spawn(run).unwrap()
        })
        .collect();
    drop(sender);
    assert_eq!(receiver.iter().count(), 16);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let pair = &(Mutex::new(false), Condvar::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(2));
            *pair.0.lock().unwrap() = true;
            pair.1.notify_all();
        });
        let mut guard = pair.0.lock().unwrap();
        while !*guard {
            guard = pair.1.wait_timeout(guard, Duration::from_secs(20)).unwrap().0;
        }
    });
    let sets: std::collections::HashSet<u64> = (0..1000).collect();
    assert_eq!(sets.len(), 1000);
    let now = (Instant::now(), SystemTime::now());
    std::thread::yield_now();
    assert!(now.0.elapsed() < Duration::from_secs(60) && now.1.elapsed().is_ok());

    // Panics, with a backtrace that wants to open files, are caught in any thread.
    assert!(std::panic::catch_unwind(|| panic!("as meant")).is_err());
    assert!(std::thread::spawn(|| panic!("as meant")).join().is_err());
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).unwrap();
    println!("got {line:?}");
    eprintln!("said on stderr");
    std::process::exit(7)
}

/// What a holder does: it stops another process, and looks whether it could do more.
fn holder_work() -> ExitCode {
    let pid: u32 = std::env::var("SANDBOX_PEER").unwrap().parse().unwrap();
    let in_force = sandbox::holder().unwrap();
    assert!(in_force.no_new_privs && in_force.seccomp == Filter::DenyList, "{in_force:?}");
    let keeps = if root() { 1 << 19 } else { 0 };
    assert_eq!((in_force.capabilities, in_force.missing.len()), (keeps, 1), "{in_force:?}");
    let peer = Process::open(pid).unwrap();
    let (stop_within, hold_at_most) = (Duration::from_secs(20), Duration::from_secs(60));
    let limits = hold::Limits { stop_within, hold_at_most };
    let (errnos, held) = hold::during(&peer, &limits, |hold| {
        let pid = usize::try_from(pid).unwrap();
        let ptrace = |request: libc::c_uint| {
            errno_of(libc::SYS_ptrace, &[usize::try_from(request).unwrap(), pid, 0, 0])
        };
        // Of a thread that it has stopped.
        let requests = [
            libc::PTRACE_PEEKDATA,
            libc::PTRACE_POKEDATA,
            libc::PTRACE_GETREGS,
            libc::PTRACE_SETREGSET,
            libc::PTRACE_CONT,
        ];
        let mut errnos: Vec<i32> = requests.into_iter().map(ptrace).collect();
        for call in [
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_execve,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_kill,
        ] {
            errnos.push(errno_of(call, &[pid]));
        }
        assert!(hold.lasted());
        errnos
    })
    .unwrap();
    assert_eq!(errnos, vec![EPERM; errnos.len()]);
    assert!(held.lasted && held.threads > 0, "{held:?}");
    ExitCode::SUCCESS
}

/// What the guardian does: sockets, files, signals, processes' state.
fn guardian_work() -> ExitCode {
    use std::os::unix::net::UnixStream;
    let dir = std::env::var("SANDBOX_DIR").unwrap();
    let peer: u32 = std::env::var("SANDBOX_PEER").unwrap().parse().unwrap();
    sandbox::guardian().unwrap();
    let worker = std::thread::spawn(move || {
        let mut stream = UnixStream::connect(format!("{dir}/socket")).unwrap();
        let mut got = String::new();
        stream.read_to_string(&mut got).unwrap();
        assert_eq!(got, "greeting");
        let temporary = format!("{dir}/journal.tmp");
        let mut file = File::create_new(&temporary).unwrap();
        file.write_all(b"{}").unwrap();
        file.sync_all().unwrap();
        std::fs::rename(&temporary, format!("{dir}/journal")).unwrap();
        let process = Process::open(peer).unwrap();
        assert!(process.alive() && process.still_same());
        assert!(!process.threads().unwrap().is_empty());
        use rustix::process::{Signal, pidfd_send_signal};
        pidfd_send_signal(process.pidfd(), Signal::KILL).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while process.alive() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    worker.join().unwrap();
    ExitCode::SUCCESS
}

/// `getpid` by the 32-bit entry, where the kernel has it.
fn int80() -> ExitCode {
    sandbox::seal(None).unwrap();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: getpid takes no arguments and changes eax only.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") 20 => _, options(nostack));
    }
    ExitCode::SUCCESS
}

// ---- The side that looks on.

/// A child with a role. It has said what it says before "ready".
struct Actor {
    child: Child,
    stdin: Option<ChildStdin>,
    said: BTreeMap<String, i64>,
    filter: String,
}

fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("SANDBOX_ROLE", role).env("RUST_BACKTRACE", "1");
    command.env("SANDBOX_PARENT", std::process::id().to_string());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Actor {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let stdin = child.stdin.take();
        let (mut said, mut filter) = (BTreeMap::new(), String::new());
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let (name, value) = line.rsplit_once(' ').unwrap();
            match name {
                "ready" => return Self { child, stdin, said, filter },
                "seccomp" => filter = value.into(),
                name => assert_eq!(said.insert(name.into(), value.parse().unwrap()), None),
            }
        }
        panic!("ended early: {:?}", child.wait());
    }

    fn rights(&self) -> Vec<ThreadRights> {
        of_threads(&Process::open(self.child.id()).unwrap()).unwrap()
    }

    /// Every thread said the same of each attempt.
    fn expect(&self, expected: &[(&str, i32)], all_others: i32) {
        let expected: BTreeMap<_, _> = expected.iter().copied().collect();
        for (name, errno) in self.said.iter().filter(|(name, _)| name.contains(':')) {
            let attempt = name.split_once(':').unwrap().1;
            let wanted = expected.get(attempt).copied().unwrap_or(all_others);
            assert_eq!(*errno, i64::from(wanted), "{name}");
        }
    }

    fn end(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

fn sealed_threads_are_refused() {
    let actor = Actor::start(&mut command("refusals"));
    assert_eq!(actor.filter, "allow-list");
    let own = [("mmap", 0), ("prlimit", 0), ("clone3", ENOSYS)];
    actor.expect(&own, EPERM);
    // Three threads, each with more than fifty attempts.
    assert!(actor.said.keys().filter(|name| name.contains(':')).count() > 3 * 50);
    let uid = if root() { 65534 } else { rustix::process::geteuid().as_raw() };
    let rights = actor.rights();
    assert_eq!(rights.len(), 3);
    for thread in rights {
        let ThreadRights { no_new_privs, seccomp, capabilities, .. } = thread;
        assert_eq!((no_new_privs, seccomp, capabilities, thread.uid), (true, 2, 0, uid));
    }
    let said = |name: &str| actor.said[name];
    assert_eq!((said("no_new_privs"), said("capabilities")), (1, 0));
    assert_eq!(said("uid"), i64::from(uid));
    if root() {
        assert_eq!((said("gid"), said("groups"), said("missing")), (65534, 0, 0));
    }
    eprintln!("Landlock's version: {}", said("landlock"));
    // The bounding set is empty, and the memory of a sealed process belongs to root.
    let status = std::fs::read_to_string(format!("/proc/{}/status", actor.child.id())).unwrap();
    assert!(!root() || status.contains("CapBnd:\t0000000000000000\n"), "{status}");
    actor.end();
}

fn sealed_processes_can_work() {
    let memfd = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::empty()).unwrap();
    let file = File::from(memfd);
    file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let mut command = command("work");
    let mut child = command.env("SANDBOX_FD", file.as_raw_fd().to_string()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"by pipe\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "got \"by pipe\\n\"\n");
    assert!(errors.contains("as meant") && errors.ends_with("said on stderr\n"), "{errors}");
    assert_eq!(file.metadata().unwrap().len(), 6 << 20);
}

fn sealed_processes_end() {
    let status = command("abort").output().unwrap().status;
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
    assert!(!status.core_dumped());
}

fn the_user_can_be_chosen() {
    if !root() {
        return eprintln!("skipped: takes root");
    }
    let actor = Actor::start(&mut command("other-user"));
    assert!(actor.rights().iter().all(|thread| thread.uid == 12345));
    assert_eq!(actor.said["gid"], 12345);
    actor.end();
}

fn threads_are_refused() {
    let output = command("threads").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn other_architecture_kills() {
    if !cfg!(target_arch = "x86_64") {
        return eprintln!("skipped: not on this architecture");
    }
    let status = command("int80").output().unwrap().status;
    // SIGSEGV: the kernel has no 32-bit entry.
    let signal = status.signal();
    assert!(signal == Some(libc::SIGSYS) || signal == Some(libc::SIGSEGV), "{status}");
    eprintln!("a 32-bit system call ended the process by signal {signal:?}");
}

fn guardians_cannot_look() {
    let peer = Actor::start(&mut command("idle"));
    let pid = peer.child.id().to_string();
    // Without a sandbox its memory can be read, so that the refusal is the sandbox's.
    File::open(format!("/proc/{pid}/mem")).unwrap();
    let actor = Actor::start(command("guardian").env("SANDBOX_PEER", &pid));
    assert_eq!(actor.filter, "deny-list");
    let landlock = actor.said["landlock"] > 0;
    let readable = [("status of another", 0), ("stat of another", 0)];
    let fd = ("fd of another", if landlock { EACCES } else { 0 });
    let without_landlock = if landlock { EACCES } else { 0 };
    let mem = ("mem of a process without capabilities", without_landlock);
    let files = [&readable[..], &[fd, mem, ("mem of the parent", EACCES)]].concat();
    actor.expect(&files, EPERM);
    let keeps = if root() { 0b10_0110 } else { 0 };
    for thread in actor.rights() {
        assert_eq!((thread.no_new_privs, thread.seccomp), (true, 2));
        assert_eq!(thread.capabilities, keeps);
        assert_eq!(thread.uid, rustix::process::geteuid().as_raw());
    }
    actor.end();
    peer.end();
}

fn holders_can_hold() {
    let peer = Actor::start(&mut command("idle"));
    let pid = peer.child.id().to_string();
    let output = command("holder-work").env("SANDBOX_PEER", &pid).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let me = Process::open(peer.child.id()).unwrap();
    assert_eq!(me.tracer().unwrap(), None);
    peer.end();
}

fn guardians_can_work() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let peer = Actor::start(&mut command("idle"));
    let mut command = command("guardian-work");
    command.env("SANDBOX_DIR", dir.path()).env("SANDBOX_PEER", peer.child.id().to_string());
    let child = command.spawn().unwrap();
    listener.accept().unwrap().0.write_all(b"greeting").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(dir.path().join("journal")).unwrap(), b"{}");
}
