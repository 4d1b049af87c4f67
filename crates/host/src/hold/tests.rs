//! On child processes: this test binary again, with a role to play.

use super::*;
use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Holds of the tests last as long as a busy machine makes them.
const LIMITS: Limits =
    Limits { stop_within: Duration::from_secs(10), hold_at_most: Duration::from_secs(120) };

const PATIENCE: Duration = Duration::from_secs(20);

// Cells of the page that a test and its children share.
const READY: usize = 0;
/// Set by the test: the child leaves the state that it plays.
const LEAVE: usize = 1;
/// Ids of a process and a thread, for the test.
const PID: usize = 2;
const TID: usize = 3;
const SIGNALS: usize = 4;
const COUNTERS: std::ops::Range<usize> = 8..12;

/// A page of counters that two processes see.
struct Shared {
    cells: &'static [AtomicU64],
}

impl Shared {
    fn open(path: &Path) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let file: File = OpenOptions::new().read(true).write(true).open(path).unwrap();
        file.set_len(4096).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, never unmapped; the file
        // keeps its length, so no access faults; all access to it is atomic.
        let cells = unsafe {
            let at = mmap(std::ptr::null_mut(), 4096, prot, MapFlags::SHARED, &file, 0).unwrap();
            std::slice::from_raw_parts(at.cast::<AtomicU64>().cast_const(), 512)
        };
        Self { cells }
    }

    fn get(&self, cell: usize) -> u64 {
        self.cells[cell].load(Ordering::SeqCst)
    }

    fn set(&self, cell: usize, value: u64) {
        self.cells[cell].store(value, Ordering::SeqCst);
    }

    fn counters(&self) -> Vec<u64> {
        COUNTERS.map(|cell| self.get(cell)).collect()
    }

    /// Whether every counter goes on within a time that suffices on a busy machine.
    fn all_move(&self) -> bool {
        let before = self.counters();
        within(PATIENCE, || before.iter().zip(self.counters()).all(|(a, b)| b > *a))
    }

    /// Whether no counter moves, watched for some time slices.
    fn all_still(&self) -> bool {
        let before = self.counters();
        thread::sleep(Duration::from_millis(60));
        before == self.counters()
    }
}

fn within(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + time;
    while !done() {
        if Instant::now() > until {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// A child with a role, killed at the end.
struct Actor {
    child: Child,
    process: Process,
    shared: Shared,
    dir: tempfile::TempDir,
}

impl Actor {
    fn start(role: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let page = dir.path().join("page");
        File::create(&page).unwrap();
        let shared = Shared::open(&page);
        let child = command(role, &page).spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let actor = Self { child, process, shared, dir };
        assert!(within(PATIENCE, || actor.shared.get(READY) == 1), "{role} does not start");
        actor
    }

    fn state(&self, tid: u32) -> char {
        Seen::of(&self.process, tid).map_or('-', |seen| seen.state)
    }

    fn signal(&self, signal: c_int) {
        send(self.process.pid(), signal);
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The page's directory lives as long as the child.
        let _ = &self.dir;
    }
}

fn command(role: &str, page: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["hold::tests::plays_a_role", "--exact", "--nocapture", "--test-threads=1"]);
    command.env("HOLD_ROLE", role).env("HOLD_PAGE", page);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn send(pid: u32, signal: c_int) {
    // SAFETY: kill(2) takes two numbers.
    let done = unsafe { libc::kill(pid.cast_signed(), signal) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// What the children run; on its own it does nothing.
#[test]
fn plays_a_role() {
    let Ok(role) = std::env::var("HOLD_ROLE") else { return };
    let page = std::env::var("HOLD_PAGE").unwrap();
    let shared: &'static Shared = Box::leak(Box::new(Shared::open(Path::new(&page))));
    // Nobody is left behind by a test that was killed.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(100));
        std::process::exit(1);
    });
    match role.as_str() {
        "counters" => count(shared),
        "storm" => storm(shared),
        "signals" => signals(shared),
        "vfork" => vfork(shared),
        "first-thread-gone" => first_thread_gone(shared),
        "sqpoll" => io_uring(shared, false),
        "io-worker" => io_uring(shared, true),
        "holder-dies" | "holder-stops-itself" => holder(shared, &role, Path::new(&page)),
        other => panic!("no role {other:?}"),
    }
}

fn counter(shared: &'static Shared, cell: usize, pause: Duration) {
    thread::spawn(move || {
        loop {
            shared.cells[cell].fetch_add(1, Ordering::SeqCst);
            thread::sleep(pause);
        }
    });
}

fn start_counters(shared: &'static Shared) {
    for cell in COUNTERS {
        counter(shared, cell, Duration::from_micros(200));
    }
    assert!(shared.all_move());
}

fn ready(shared: &Shared) -> ! {
    shared.set(READY, 1);
    loop {
        thread::park();
    }
}

fn count(shared: &'static Shared) {
    start_counters(shared);
    ready(shared)
}

/// Threads that start threads and end.
fn storm(shared: &'static Shared) {
    fn next(shared: &'static Shared, cell: usize) {
        shared.cells[cell].fetch_add(1, Ordering::SeqCst);
        // None may be had for a moment: this one goes on.
        while thread::Builder::new().spawn(move || next(shared, cell)).is_err() {}
    }
    for cell in COUNTERS {
        thread::spawn(move || next(shared, cell));
    }
    assert!(shared.all_move());
    ready(shared)
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

fn signals(shared: &'static Shared) {
    extern "C" fn handler(_: c_int) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    for signal in [libc::SIGUSR1, libc::SIGRTMIN() + 3] {
        // SAFETY: the handler touches an atomic only; zero is a valid `sigaction`.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        assert_eq!(done, 0);
    }
    start_counters(shared);
    // All threads take them, this one too.
    shared.set(READY, 1);
    loop {
        shared.set(SIGNALS, HANDLED.load(Ordering::SeqCst));
        thread::sleep(Duration::from_micros(100));
    }
}

/// One thread waits for its vfork child, killable and else uninterruptible: state D.
fn vfork(shared: &'static Shared) {
    extern "C" fn child(shared: *mut libc::c_void) -> c_int {
        // SAFETY: it is the `Shared` that was leaked.
        let shared = unsafe { &*shared.cast::<Shared>().cast_const() };
        for _ in 0..100_000 {
            if shared.get(LEAVE) == 1 {
                break;
            }
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            // SAFETY: reads `pause` only.
            unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
        }
        0
    }
    start_counters(shared);
    thread::Builder::new()
        .name("unstoppable".into())
        .spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
            shared.set(TID, tid.into());
            let mut stack = vec![0_u128; 4096];
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            // SAFETY: the child has a stack of its own that outlives it, for we wait until it
            // has ended; it makes system calls and touches atomics only.
            unsafe {
                let top = stack.as_mut_ptr_range().end.cast();
                let shared = std::ptr::from_ref(shared).cast_mut().cast();
                assert!(libc::clone(child, top, flags, shared) > 0);
            }
            loop {
                thread::park();
            }
        })
        .unwrap();
    let me = Process::open(std::process::id()).unwrap();
    let waits = || {
        u32::try_from(shared.get(TID))
            .is_ok_and(|tid| Seen::of(&me, tid).is_some_and(|seen| seen.state == 'D'))
    };
    assert!(within(PATIENCE, waits));
    ready(shared)
}

fn first_thread_gone(shared: &'static Shared) {
    start_counters(shared);
    // The first thread waits in libtest: it is told by a signal to end itself.
    extern "C" fn end(_: c_int) {
        // SAFETY: ends this thread and runs nothing of it any more.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let pid = std::process::id();
    // SAFETY: `end` makes a system call only; tgkill takes numbers.
    unsafe {
        libc::signal(libc::SIGUSR2, end as *const () as usize);
        libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR2);
    }
    let me = Process::open(pid).unwrap();
    assert!(within(PATIENCE, || Seen::of(&me, pid).is_some_and(|seen| seen.dead())));
    ready(shared)
}

/// A thread of the kernel's io_uring in our process: the one that polls, or a worker that reads.
fn io_uring(shared: &'static Shared, worker: bool) {
    const ENTRIES: usize = 4;
    // struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle,
    // features, wq_fd, resv[3], then offsets of the submission queue: head, tail, ring_mask,
    // ring_entries, flags, dropped, array.
    let mut params = [0_u32; 30];
    const SQPOLL: u32 = 2;
    params[2] = if worker { 0 } else { SQPOLL };
    params[4] = 60_000;
    // SAFETY: 120 bytes are the size of struct io_uring_params.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, params.as_mut_ptr()) };
    if ring < 0 {
        // Forbidden or not there: the test is told.
        shared.set(TID, u64::MAX);
        ready(shared)
    }
    start_counters(shared);
    if worker {
        let ring = c_int::try_from(ring).unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let map = |offset| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let null = std::ptr::null_mut();
            // SAFETY: new mappings of the ring, at the kernel's choice of address.
            let at = unsafe { libc::mmap(null, 4096, prot, libc::MAP_SHARED, ring, offset) };
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>()
        };
        let (queue, entries) = (map(0), map(0x1000_0000));
        let buffer = Box::leak(Box::new([0_u8; 8]));
        use std::os::fd::AsRawFd;
        // SAFETY: the offsets are the kernel's; an entry is 64 bytes: opcode 22 (READ), flags
        // 16 (ASYNC: by a worker), fd at 4, address at 16, length at 24.
        unsafe {
            entries.write(22);
            entries.add(1).write(16);
            entries.add(4).cast::<c_int>().write(pipe.as_raw_fd());
            entries.add(16).cast::<u64>().write(buffer.as_mut_ptr().addr() as u64);
            entries.add(24).cast::<u32>().write(8);
            queue.add(params[16] as usize).cast::<u32>().write(0);
            (*queue.add(params[11] as usize).cast::<AtomicU32>()).store(1, Ordering::SeqCst);
            let (none, nothing) = (std::ptr::null::<u8>(), 0_usize);
            let sent = libc::syscall(libc::SYS_io_uring_enter, ring, 1, 0, 0, none, nothing);
            assert_eq!(sent, 1);
        }
        std::mem::forget((pipe, _writer));
    }
    let me = Process::open(std::process::id()).unwrap();
    let found = || {
        me.threads().unwrap().into_iter().find(|tid| {
            Seen::of(&me, *tid)
                .is_some_and(|s| s.comm.starts_with(if worker { "iou-wrk-" } else { "iou-sqp-" }))
        })
    };
    assert!(within(PATIENCE, || found().is_some()));
    shared.set(TID, found().unwrap().into());
    ready(shared)
}

/// Holds a child of its own, and then comes to grief.
#[expect(clippy::zombie_processes, reason = "it is killed before it could wait for its child")]
fn holder(shared: &'static Shared, role: &str, page: &Path) {
    let child = command("counters", page).spawn().unwrap();
    assert!(within(PATIENCE, || shared.get(READY) == 1));
    let process = Process::open(child.id()).unwrap();
    // Longer than the test takes to look at the child first.
    let at_most = Duration::from_secs(if role == "holder-dies" { 90 } else { 6 });
    let limits = Limits { hold_at_most: at_most, ..LIMITS };
    let held = during(&process, &limits, |hold| {
        assert!(hold.lasted());
        shared.set(PID, process.pid().into());
        if role == "holder-stops-itself" {
            send(std::process::id(), libc::SIGSTOP);
        }
        loop {
            thread::park();
        }
    });
    unreachable!("{held:?}");
}

#[test]
fn all_threads_stand_still_and_go_on() {
    let actor = Actor::start("counters");
    let threads = actor.process.threads().unwrap();
    let (result, held) = during(&actor.process, &LIMITS, |hold| {
        assert!(hold.lasted());
        assert!(actor.shared.all_still());
        assert!(threads.iter().all(|tid| actor.state(*tid) == 't'));
        assert!(hold.began() + hold.elapsed() <= Instant::now());
        assert!(hold.left() <= LIMITS.hold_at_most && hold.left() > Duration::ZERO);
        hold.threads()
    })
    .unwrap();
    assert_eq!((result, held.threads), (threads.len(), threads.len()));
    assert!(held.lasted && !held.found_stopped);
    assert!(held.began <= held.stopped && held.stopped < held.released);
    assert!(threads.iter().all(|tid| Seen::of(&actor.process, *tid).unwrap().tracer == 0));
    assert!(actor.shared.all_move());
}

#[test]
fn the_tracer_is_named_by_its_thread() {
    let actor = Actor::start("counters");
    let tracer = |tid| Seen::of(&actor.process, tid).unwrap().tracer;
    let (tids, _) = during(&actor.process, &LIMITS, |_| {
        let own = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        (own, tracer(actor.process.pid()))
    })
    .unwrap();
    assert_eq!(tids.0, tids.1);
    assert_ne!(tids.0, std::process::id());
}

#[test]
fn threads_that_start_threads_are_all_stopped() {
    let actor = Actor::start("storm");
    for _ in 0..20 {
        let ((), held) = during(&actor.process, &LIMITS, |hold| {
            assert!(actor.shared.all_still());
            assert!(hold.lasted());
        })
        .unwrap();
        assert!(held.lasted);
        assert!(actor.shared.all_move());
    }
}

#[test]
fn no_signal_is_lost() {
    let actor = Actor::start("signals");
    let pid = actor.process.pid();
    let (mut sent, mut caught) = (0, 0);
    let done = &AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut sent = 0;
            // Real-time signals queue, so each is handled once; but only so many fit.
            while !done.load(Ordering::SeqCst) && sent < 100_000 {
                // SAFETY: kill(2) takes two numbers.
                if unsafe { libc::kill(pid.cast_signed(), libc::SIGRTMIN() + 3) } == 0 {
                    sent += 1;
                }
                thread::sleep(Duration::from_micros(20));
            }
            sent
        });
        for _ in 0..300 {
            let ((), held) = during(&actor.process, &LIMITS, |_| ()).unwrap();
            caught += held.signals;
        }
        done.store(true, Ordering::SeqCst);
        sent = sender.join().unwrap();
    });
    assert!(within(PATIENCE, || actor.shared.get(SIGNALS) == sent), "of {sent} sent, {caught}");
    // One that does not queue, QEMU's own, sent within holds and between them.
    for round in 1..=50 {
        let within_hold = round % 2 == 0;
        let send = || actor.signal(libc::SIGUSR1);
        if !within_hold {
            send();
        }
        during(&actor.process, &LIMITS, |_| {
            if within_hold {
                send()
            }
        })
        .unwrap();
        let handled = || actor.shared.get(SIGNALS) == sent + round;
        assert!(within(PATIENCE, handled), "{} of {}", actor.shared.get(SIGNALS), sent + round);
    }
    eprintln!("{caught} signals of {sent} stopped a thread before the hold did");
}

#[test]
fn a_stopped_process_stays_stopped() {
    let actor = Actor::start("counters");
    actor.signal(libc::SIGSTOP);
    assert!(within(PATIENCE, || actor.state(actor.process.pid()) == 'T'));
    for _ in 0..3 {
        let (lasted, held) = during(&actor.process, &LIMITS, |hold| hold.lasted()).unwrap();
        assert!(lasted && held.found_stopped);
        let threads = actor.process.threads().unwrap();
        let all = || threads.iter().all(|tid| actor.state(*tid) == 'T');
        assert!(within(PATIENCE, all));
        assert!(actor.shared.all_still());
    }
    actor.signal(libc::SIGCONT);
    assert!(actor.shared.all_move());
    assert!(!during(&actor.process, &LIMITS, |_| ()).unwrap().1.found_stopped);
    assert!(actor.shared.all_move());
}

#[test]
fn a_stop_and_its_end_during_the_hold_take_effect_after_it() {
    let actor = Actor::start("counters");
    during(&actor.process, &LIMITS, |hold| {
        actor.signal(libc::SIGSTOP);
        assert!(actor.shared.all_still() && hold.lasted());
    })
    .unwrap();
    assert!(within(PATIENCE, || actor.state(actor.process.pid()) == 'T'));
    assert!(actor.shared.all_still());
    during(&actor.process, &LIMITS, |hold| {
        actor.signal(libc::SIGCONT);
        assert!(actor.shared.all_still() && hold.lasted());
    })
    .unwrap();
    assert!(actor.shared.all_move());
}

#[test]
fn a_second_tracer_is_refused_and_named() {
    let actor = Actor::start("counters");
    let (error, held) = during(&actor.process, &LIMITS, |hold| {
        let error = during(&actor.process, &LIMITS, |_| ()).unwrap_err();
        assert!(hold.lasted());
        let own = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        (error, own)
    })
    .unwrap();
    let (error, own) = error;
    assert!(held.lasted);
    let text = error.to_string();
    let HoldError::Traced { pid, tracer, comm, .. } = error else { panic!("{text}") };
    assert_eq!((pid, tracer), (actor.process.pid(), own));
    // Names of threads are cut to 15 bytes.
    assert_eq!(comm, "stillframe-hold");
    assert!(actor.shared.all_move());
}

#[test]
fn we_cannot_hold_ourselves() {
    let me = Process::open(std::process::id()).unwrap();
    let error = during(&me, &LIMITS, |_| ()).unwrap_err();
    assert!(matches!(error, HoldError::Refused { .. }), "{error}");
}

/// The id of the child that a holder told of, freed of its tracer by the holder's death.
fn freed(actor: &mut Actor, killed_by: impl FnOnce(&mut Child)) -> Process {
    assert!(within(PATIENCE, || actor.shared.get(PID) != 0));
    let target = Process::open(u32::try_from(actor.shared.get(PID)).unwrap()).unwrap();
    assert!(actor.shared.all_still());
    killed_by(&mut actor.child);
    let status = actor.child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
    assert!(actor.shared.all_move());
    for tid in target.threads().unwrap() {
        assert_eq!(Seen::of(&target, tid).unwrap().tracer, 0);
    }
    target
}

#[test]
fn death_of_the_holder_lets_the_process_go() {
    let mut actor = Actor::start("holder-dies");
    let target = freed(&mut actor, |holder| holder.kill().unwrap());
    send(target.pid(), libc::SIGKILL);
}

#[test]
fn a_holder_that_hangs_is_killed_by_the_kernel() {
    let mut actor = Actor::start("holder-stops-itself");
    let holder = Process::open(actor.child.id()).unwrap();
    let stopped = || Seen::of(&holder, holder.pid()).is_none_or(|s| s.state == 'T' || s.dead());
    let target = freed(&mut actor, |_| assert!(within(PATIENCE, stopped)));
    send(target.pid(), libc::SIGKILL);
}

#[test]
fn a_panic_lets_the_process_go_first() {
    let actor = Actor::start("counters");
    let caught = catch_unwind(AssertUnwindSafe(|| {
        during(&actor.process, &LIMITS, |hold| {
            assert!(hold.lasted());
            resume_unwind(Box::new("as meant"));
        })
    }));
    assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"as meant"));
    assert_eq!(Seen::of(&actor.process, actor.process.pid()).unwrap().tracer, 0);
    assert!(actor.shared.all_move());
}

#[test]
fn a_process_that_dies_in_the_hold_is_noticed() {
    let mut actor = Actor::start("counters");
    let (lasted, held) = during(&actor.process, &LIMITS, |hold| {
        assert!(hold.lasted());
        actor.signal(libc::SIGKILL);
        assert!(within(PATIENCE, || !hold.lasted()));
        within(Duration::from_millis(20), || hold.lasted())
    })
    .unwrap();
    assert!(!lasted && !held.lasted);
    assert_eq!(actor.child.wait().unwrap().signal(), Some(libc::SIGKILL));
    let error = during(&actor.process, &LIMITS, |_| ()).unwrap_err();
    assert!(matches!(error, HoldError::Exited { .. }), "{error}");
}

#[test]
fn a_thread_that_cannot_be_stopped_is_named_and_the_others_run_between_tries() {
    let actor = Actor::start("vfork");
    let limits = Limits { stop_within: Duration::from_millis(200), ..LIMITS };
    let (mut in_vain, mut ran) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let error = during(&actor.process, &limits, |_| ()).unwrap_err();
        let from = Instant::now();
        assert!(actor.shared.all_move());
        ran.push((from, Instant::now()));
        eprintln!("{error}");
        let HoldError::NotStopped { stragglers, stall: Some(stall), .. } = error else {
            panic!("{error}");
        };
        // On a busy machine others may be late too.
        let unstoppable = |s: &&Straggler| u64::from(s.tid) == actor.shared.get(TID);
        let straggler = stragglers.iter().find(unstoppable).unwrap();
        assert_eq!((straggler.comm.as_str(), straggler.state), ("unstoppable", 'D'));
        in_vain.push(stall);
    }
    for (pair, (from, to)) in in_vain.windows(2).zip(&ran) {
        assert!(pair[0].released <= *from && *to <= pair[1].began, "{pair:?} {from:?} {to:?}");
    }
    // The interrupt that it did not follow is forgotten with its tracer.
    for tid in actor.process.threads().unwrap() {
        assert_eq!(Seen::of(&actor.process, tid).unwrap().tracer, 0);
    }
    assert!(actor.shared.all_move());
    // Once it can be stopped, a later try succeeds.
    actor.shared.set(LEAVE, 1);
    let try_once = || during(&actor.process, &limits, |hold| hold.lasted()).ok();
    let mut held = None;
    assert!(within(PATIENCE, || {
        held = held.take().or_else(try_once);
        held.is_some()
    }));
    assert!(held.is_some_and(|(lasted, held)| lasted && held.lasted));
    assert!(actor.shared.all_move());
}

#[test]
fn a_first_thread_that_has_ended_does_not_hinder() {
    let actor = Actor::start("first-thread-gone");
    let (lasted, held) = during(&actor.process, &LIMITS, |hold| {
        assert!(actor.shared.all_still());
        hold.lasted()
    })
    .unwrap();
    assert!(lasted && held.lasted);
    assert_eq!(held.threads, actor.process.threads().unwrap().len() - 1);
    assert!(actor.shared.all_move());
}

#[test]
fn io_uring_threads_are_held_like_others() {
    for role in ["sqpoll", "io-worker"] {
        let actor = Actor::start(role);
        let Ok(tid) = u32::try_from(actor.shared.get(TID)) else {
            eprintln!("skipped: io_uring is not to be had here");
            return;
        };
        let (state, held) = during(&actor.process, &LIMITS, |hold| {
            assert!(hold.lasted());
            actor.state(tid)
        })
        .unwrap();
        assert_eq!((state, held.lasted), ('t', true), "{role}");
        assert_ne!(actor.state(tid), 't');
        assert!(actor.shared.all_move());
    }
}

#[test]
fn statuses_are_read_as_ptrace_documents_them() {
    let stopped = |signal: c_int, event: c_int| report(event << 16 | signal << 8 | 0x7f);
    let at = |at, by_others| Report { at, by_others };
    assert_eq!(stopped(libc::SIGTRAP, 128), at(At::Stopped(0), false));
    assert_eq!(stopped(libc::SIGSTOP, 128), at(At::Stopped(0), true));
    assert_eq!(stopped(libc::SIGUSR1, 0), at(At::Stopped(libc::SIGUSR1), false));
    // A real-time signal is one like all others.
    assert_eq!(stopped(40, 0), at(At::Stopped(40), false));
    assert_eq!(report(0), at(At::Gone, false));
    assert_eq!(report(libc::SIGKILL), at(At::Gone, false));
}

#[test]
fn errors_say_which_thread_and_where() {
    let straggler =
        Straggler { tid: 7, comm: "iothread1".into(), state: 'D', wchan: Some("io_wait".into()) };
    let error = |stragglers| HoldError::NotStopped {
        pid: 5,
        within: Duration::from_millis(20),
        stragglers,
        stall: None,
    };
    let text = "process 5 did not stop within 20ms: ";
    let named = "thread 7 (\"iothread1\") in state D at io_wait";
    assert_eq!(error(vec![straggler]).to_string(), format!("{text}{named}"));
    assert_eq!(error(vec![]).to_string(), format!("{text}new threads kept appearing"));
}
