//! The Linux guest of the tear benchmark. One static binary, no dependencies.
//!
//! `tearbench KEY=VALUE...` takes `mib` MiB of memory, pins a thread to each CPU, and lets every
//! thread store numbers, one after the other, for ever: what an image holds of them says whether it
//! shows one instant (src/tearcheck.rs). It prints a line of JSON when all of it is written
//! (`armed`), and one for every word in the file `command`: `report`, or `end`, after which it ends.
//!
//! Keys, with their defaults: `run` (32 hex digits), `mib` (64), `threads` (0: all CPUs), `spread`
//! (128 pages), `ledger` (65536 stores from one entry to the next), `ledger_pages` (16), `rate` (0:
//! as fast as can be, else stores a second of each thread), `thp` (0; 1 asks for huge pages),
//! `command` (/tmp/tearbench/command).

mod pattern;
mod tearpage;

use std::arch::x86_64::_rdtsc;
use std::ffi::{c_int, c_long, c_void};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Error, Write as _};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pattern::PAGE;
use tearpage::{Header, Layout, Share};

/// Bit 63 of a pagemap entry: the page is present (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// Bits 0-54 of a pagemap entry: the frame number.
const FRAME: u64 = (1 << 55) - 1;
const HUGE: usize = 2 << 20;

/// Rounds from one look at the TSC to the next.
const BEAT: u64 = 16;
/// Nanoseconds from one look at the clocks to the next.
const CLOCKS_NS: u64 = 250_000;
/// A thread that was not seen for so long was missed.
const GAP_NS: u64 = 1_000_000;

/// The C library's calls that std does not have; it is linked in anyway.
mod c {
    use super::{c_int, c_long, c_void};

    #[repr(C)]
    pub struct Time {
        pub seconds: c_long,
        pub nanoseconds: c_long,
    }

    unsafe extern "C" {
        pub fn mmap(
            at: *mut c_void,
            n: usize,
            p: c_int,
            f: c_int,
            fd: c_int,
            o: i64,
        ) -> *mut c_void;
        pub fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
        pub fn mlockall(flags: c_int) -> c_int;
        pub fn sched_setaffinity(pid: c_int, len: usize, mask: *const u64) -> c_int;
        pub fn clock_gettime(clock: c_int, time: *mut Time) -> c_int;
    }

    pub const READ_WRITE: c_int = 1 | 2;
    pub const PRIVATE_ANONYMOUS: c_int = 0x2 | 0x20;
    pub const MADV_UNMERGEABLE: c_int = 13;
    pub const MADV_HUGEPAGE: c_int = 14;
    pub const MADV_NOHUGEPAGE: c_int = 15;
    pub const MCL_CURRENT: c_int = 1;
    pub const CLOCK_REALTIME: c_int = 0;
    pub const CLOCK_MONOTONIC: c_int = 1;
}

fn main() {
    if let Err(e) = run() {
        eprintln!("tearbench: {e}");
        std::process::exit(1);
    }
}

/// What the command line says.
struct Plan {
    run: [u8; 16],
    mib: usize,
    threads: usize,
    spread: usize,
    ledger: u64,
    ledger_pages: usize,
    rate: u64,
    thp: bool,
    command: String,
}

impl Plan {
    fn parse() -> Result<Self, Error> {
        let mut plan = Self {
            run: [0; 16],
            mib: 64,
            threads: 0,
            spread: 128,
            ledger: 1 << 16,
            ledger_pages: 16,
            rate: 0,
            thp: false,
            command: String::from("/tmp/tearbench/command"),
        };
        for arg in std::env::args().skip(1) {
            let bad = || Error::other(format!("not an argument: {arg}"));
            let (key, value) = arg.split_once('=').ok_or_else(bad)?;
            let number = || value.parse::<usize>().map_err(|_| bad());
            match key {
                "run" => {
                    let run = u128::from_str_radix(value, 16).map_err(|_| bad())?;
                    plan.run = run.to_be_bytes();
                }
                "mib" => plan.mib = number()?,
                "threads" => plan.threads = number()?,
                "spread" => plan.spread = number()?,
                "ledger" => plan.ledger = number()? as u64,
                "ledger_pages" => plan.ledger_pages = number()?,
                "rate" => plan.rate = number()? as u64,
                "thp" => plan.thp = number()? != 0,
                "command" => value.clone_into(&mut plan.command),
                _ => return Err(bad()),
            }
        }
        if plan.threads == 0 {
            plan.threads = std::thread::available_parallelism()?.get();
        }
        if plan.threads > tearpage::THREADS || plan.ledger == 0 || plan.ledger_pages == 0 {
            return Err(Error::other("threads, ledger or ledger_pages out of range"));
        }
        Ok(plan)
    }
}

fn run() -> Result<(), Error> {
    let plan = Plan::parse()?;
    let memory = Memory::new(plan.mib, plan.thp)?;
    let (frames, layout) = settle(&memory, &plan)?;
    let clock = Ticks::measure();
    let board = Board::default();
    std::thread::scope(|scope| {
        for (number, share) in layout.threads.iter().enumerate() {
            let writer = Writer::new(number, share, &plan, &memory, &board, &clock)?;
            scope.spawn(move || writer.for_ever());
        }
        let served = serve(&plan, &memory, &frames, &layout, &board, &clock);
        board.end.store(true, Ordering::Relaxed);
        served
    })
}

/// Writes every header, and every canary, where the kernel leaves the pages: it may move one, which
/// is then written again.
fn settle(memory: &Memory, plan: &Plan) -> Result<(Vec<u64>, Layout), Error> {
    for _ in 0..10 {
        let frames = memory.frames()?;
        let layout = tearpage::share_out(&frames, plan.threads, plan.spread, plan.ledger_pages);
        let layout = layout.ok_or_else(|| Error::other("too little memory for so many pages"))?;
        for page in 0..memory.pages() {
            memory.fill(page, 0, &[0; PAGE]);
        }
        write_headers(memory, plan, &frames, &layout);
        if memory.frames()? == frames {
            return Ok((frames, layout));
        }
    }
    Err(Error::other("the kernel keeps moving the pages"))
}

fn write_headers(memory: &Memory, plan: &Plan, frames: &[u64], layout: &Layout) {
    let threads = layout.threads.len() as u32;
    let put = |kind: u16, thread: usize, group: u32, groups: u32, pages: &[usize]| {
        for (index, &page) in pages.iter().enumerate() {
            let header = Header {
                kind,
                flags: if plan.thp { tearpage::THP } else { 0 },
                thread: thread as u16,
                run: plan.run,
                group,
                index: index as u32,
                pages: pages.len() as u32,
                groups,
                va: memory.at(page, 0) as u64,
                pfn: frames[page],
                pid: std::process::id(),
            };
            memory.fill(page, 0, &header.encode());
        }
    };
    for (thread, share) in layout.threads.iter().enumerate() {
        let number = thread as u32;
        let (pair, spread) = (tearpage::RINGS * number, tearpage::RINGS * number + 1);
        put(tearpage::RING, thread, pair, tearpage::RINGS * threads, &share.pair);
        put(tearpage::RING, thread, spread, tearpage::RINGS * threads, &share.spread);
        put(tearpage::CLOCK, thread, number, threads, &share.clocks);
        put(tearpage::LEDGER, thread, number, threads, &share.ledger);
        put(tearpage::HEARTBEAT, thread, number, threads, &[share.heartbeat]);
    }
    put(tearpage::CANARY, 0, 0, 1, &layout.canaries);
    let mut body = [0; PAGE - tearpage::BODY_AT];
    for &page in &layout.canaries {
        tearpage::canary_body(&plan.run, frames[page], &mut body);
        memory.fill(page, tearpage::BODY_AT, &body);
    }
}

/// Tells what there is, then does what the command file says, until it says `end`.
fn serve(
    plan: &Plan,
    memory: &Memory,
    frames: &[u64],
    layout: &Layout,
    board: &Board,
    clock: &Ticks,
) -> Result<(), Error> {
    while board.seen.iter().take(plan.threads).any(|seen| seen.load(Ordering::Acquire) == 0) {
        std::thread::sleep(Duration::from_millis(5));
        if board.end.load(Ordering::Relaxed) {
            return Err(Error::other("a thread could not be pinned"));
        }
    }
    let below = frames.iter().filter(|&&pfn| pfn < tearpage::FOUR_GIB).count();
    let heartbeats: Vec<u64> = layout.threads.iter().map(|s| frames[s.heartbeat]).collect();
    let run = plan.run.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    say(&format!(
        "{{\"armed\":true,\"run\":\"{run}\",\"threads\":{},\"pages\":{},\"below_4g\":{below},\
         \"canaries\":{},\"heartbeats\":{heartbeats:?},\"huge_kib\":{},\"tsc_khz\":{}}}",
        plan.threads,
        frames.len(),
        layout.canaries.len(),
        huge_kib()?,
        clock.per_ms
    ));
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let Ok(command) = fs::read_to_string(&plan.command) else { continue };
        fs::remove_file(&plan.command)?;
        let moved = memory.frames()?.iter().zip(frames).filter(|(now, then)| now != then).count();
        let bad = bad_canaries(memory, plan, frames, layout);
        let numbers = |list: &[AtomicU64]| {
            let list = list.iter().take(plan.threads).map(|n| n.load(Ordering::Acquire));
            format!("{:?}", list.collect::<Vec<_>>())
        };
        say(&format!(
            "{{\"stores\":{},\"gaps\":{},\"longest_gap_tsc_ns\":{},\"longest_gap_monotonic_ns\":{},\
             \"canary_ok\":{},\"canaries_bad\":{bad},\"moved_pages\":{moved}}}",
            numbers(&board.seen),
            numbers(&board.gaps),
            numbers(&board.longest_tsc_ns),
            numbers(&board.longest_monotonic_ns),
            bad == 0
        ));
        if command.trim() == "end" {
            return Ok(());
        }
    }
}

/// Canaries that are not what they were when they were written, header and all.
fn bad_canaries(memory: &Memory, plan: &Plan, frames: &[u64], layout: &Layout) -> usize {
    let mut expected = [0; PAGE - tearpage::BODY_AT];
    let whole = |&&page: &&usize| {
        tearpage::canary_body(&plan.run, frames[page], &mut expected);
        let bytes = memory.bytes(page);
        let crc = tearpage::crc32c(&bytes[..tearpage::CRC_AT]).to_le_bytes();
        let rest = &bytes[tearpage::BODY_AT..];
        bytes[..16] == tearpage::magic()
            && bytes[tearpage::CRC_AT..][..4] == crc
            && *rest == expected
    };
    layout.canaries.len() - layout.canaries.iter().filter(whole).count()
}

/// How much of this program's memory lies in huge pages.
fn huge_kib() -> Result<u64, Error> {
    let text = fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0))
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

/// Anonymous memory, all of it faulted in and locked. It is written through raw pointers only.
struct Memory {
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory stays mapped for as long as the program runs, and each page that is written
// while several threads run is written by one of them only (`Writer`).
unsafe impl Sync for Memory {}

impl Memory {
    fn new(mib: usize, thp: bool) -> Result<Self, Error> {
        let len = mib << 20;
        let (none, fd) = (std::ptr::null_mut(), -1);
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let at = unsafe { c::mmap(none, len + HUGE, c::READ_WRITE, c::PRIVATE_ANONYMOUS, fd, 0) };
        if at.addr() == usize::MAX {
            return Err(Error::last_os_error());
        }
        let start = at.cast::<u8>();
        // SAFETY: the mapping is longer by as much as this goes on at most.
        let start = unsafe { start.add(start.align_offset(HUGE)) };
        let memory = Self { start, len };
        memory.advise(if thp { c::MADV_HUGEPAGE } else { c::MADV_NOHUGEPAGE })?;
        memory.advise(c::MADV_UNMERGEABLE)?;
        for page in 0..memory.pages() {
            memory.fill(page, 0, &[1]);
        }
        // SAFETY: changes no memory.
        if unsafe { c::mlockall(c::MCL_CURRENT) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(memory)
    }

    fn advise(&self, advice: c_int) -> Result<(), Error> {
        // SAFETY: none of the advices used changes what the memory holds.
        match unsafe { c::madvise(self.start.cast::<c_void>(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(Error::other(format!("madvise {advice}: {}", Error::last_os_error()))),
        }
    }

    fn pages(&self) -> usize {
        self.len / PAGE
    }

    fn at(&self, page: usize, offset: usize) -> *mut u8 {
        assert!(page < self.pages() && offset < PAGE);
        // SAFETY: inside the mapping, by the line above.
        unsafe { self.start.add(page * PAGE + offset) }
    }

    fn fill(&self, page: usize, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE);
        // SAFETY: inside one page of the mapping; no other thread writes there, nor holds a slice.
        unsafe { self.at(page, offset).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// A canary's bytes, which nobody writes any more.
    fn bytes(&self, page: usize) -> &[u8; PAGE] {
        // SAFETY: inside the mapping, and not written while it is looked at.
        unsafe { &*self.at(page, 0).cast::<[u8; PAGE]>() }
    }

    /// A word of a page, for a writer.
    fn word(&self, page: usize, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: aligned, inside the mapping, and from now on only used as an atomic.
        unsafe { AtomicU64::from_ptr(self.at(page, offset).cast::<u64>()) }
    }

    /// Frame number of every page, as the kernel says.
    fn frames(&self) -> Result<Vec<u64>, Error> {
        let first = self.start.addr() / PAGE;
        let mut raw = vec![0u8; self.pages() * 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut raw, first as u64 * 8)?;
        let entry = |raw: &[u8]| u64::from_le_bytes(raw.try_into().expect("8 bytes"));
        let frame =
            |e| if e & PRESENT != 0 { Ok(e & FRAME) } else { Err(Error::other("page absent")) };
        raw.chunks_exact(8).map(entry).map(frame).collect()
    }
}

/// What the threads tell each other and the main thread.
#[derive(Default)]
struct Board {
    /// Each thread's last store; 0 before its first lap is done.
    seen: [AtomicU64; tearpage::THREADS],
    gaps: [AtomicU64; tearpage::THREADS],
    longest_tsc_ns: [AtomicU64; tearpage::THREADS],
    longest_monotonic_ns: [AtomicU64; tearpage::THREADS],
    end: AtomicBool,
}

/// How fast the TSC counts.
struct Ticks {
    per_ms: u64,
}

impl Ticks {
    fn measure() -> Self {
        let (tsc, time) = Self::both();
        std::thread::sleep(Duration::from_millis(200));
        let (later, now) = Self::both();
        let (ticks, passed) = (later - tsc, now - time);
        let per_ms = u128::from(ticks) * 1_000_000 / u128::from(passed.max(1));
        Self { per_ms: (per_ms as u64).max(1) }
    }

    /// The TSC and CLOCK_MONOTONIC at one time: of many tries the one that took least, as a busy host
    /// comes between the two.
    fn both() -> (u64, u64) {
        let look = || {
            let before = ticks();
            let time = nanoseconds(c::CLOCK_MONOTONIC);
            let took = ticks().saturating_sub(before);
            (took, (before + took / 2, time))
        };
        (0..100).map(|_| look()).min().expect("a hundred").1
    }

    fn of_ns(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.per_ms) / 1_000_000) as u64
    }

    fn to_ns(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.per_ms)) as u64
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has it, and Linux lets programs use it.
    unsafe { _rdtsc() }
}

fn nanoseconds(clock: c_int) -> u64 {
    let mut time = c::Time { seconds: 0, nanoseconds: 0 };
    // SAFETY: `time` is a timespec of our own.
    unsafe { c::clock_gettime(clock, &mut time) };
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

/// One thread: the only one that writes its pages.
struct Writer<'a> {
    thread: usize,
    pair: [[&'a AtomicU64; 3]; 2],
    spread: Vec<[&'a AtomicU64; 3]>,
    clocks: Vec<Vec<&'a AtomicU64>>,
    ledger: Vec<&'a AtomicU64>,
    heartbeat: Vec<&'a AtomicU64>,
    board: &'a Board,
    threads: usize,
    /// Stores from one ledger entry to the next.
    every: u64,
    /// Ticks that a round may take; 0 without a limit.
    round: u64,
    tick: &'a Ticks,
    gap: u64,
    look: u64,
    /// The number of the last store.
    stored: u64,
    last_tsc: u64,
    looked_tsc: u64,
    looked_monotonic: u64,
    beats: u64,
    gaps: u64,
    longest: (u64, u64),
    entries: usize,
}

impl<'a> Writer<'a> {
    fn new(
        thread: usize,
        share: &Share,
        plan: &Plan,
        memory: &'a Memory,
        board: &'a Board,
        tick: &'a Ticks,
    ) -> Result<Self, Error> {
        let words = |&page: &usize| tearpage::WORDS.map(|offset| memory.word(page, offset));
        let all = |page: usize, from: usize| {
            (from..PAGE).step_by(8).map(|offset| memory.word(page, offset)).collect::<Vec<_>>()
        };
        let entry_words = tearpage::ENTRIES * tearpage::ENTRY / 8;
        let entries = |page: &usize| all(*page, tearpage::BODY_AT).into_iter().take(entry_words);
        let pair: Vec<_> = share.pair.iter().map(words).collect();
        let round_ns = (plan.rate > 0).then(|| tearpage::ROUND * 1_000_000_000 / plan.rate);
        Ok(Self {
            thread,
            pair: pair.try_into().map_err(|_| Error::other("no pair"))?,
            spread: share.spread.iter().map(words).collect(),
            clocks: share.clocks.iter().map(|page| all(*page, tearpage::CLOCK_AT)).collect(),
            ledger: share.ledger.iter().flat_map(entries).collect(),
            heartbeat: all(share.heartbeat, 0),
            board,
            threads: plan.threads,
            every: plan.ledger,
            round: round_ns.map_or(0, |ns| tick.of_ns(ns)),
            tick,
            gap: tick.of_ns(GAP_NS),
            look: tick.of_ns(CLOCKS_NS),
            stored: 0,
            last_tsc: 0,
            looked_tsc: 0,
            looked_monotonic: 0,
            beats: 0,
            gaps: 0,
            longest: (0, 0),
            entries: 0,
        })
    }

    fn for_ever(mut self) {
        let mask = 1u64 << self.thread;
        // SAFETY: `mask` is a CPU set of one word, of our own.
        if unsafe { c::sched_setaffinity(0, size_of::<u64>(), &mask) } != 0 {
            self.board.end.store(true, Ordering::Relaxed);
            return;
        }
        let lap = self.spread.len() as u64;
        // The first round is number K: so no word ever holds 0, and the round's page is its number
        // modulo K from the start.
        self.first_lap(lap);
        (self.last_tsc, self.looked_monotonic) = (ticks(), nanoseconds(c::CLOCK_MONOTONIC));
        self.looked_tsc = self.last_tsc;
        self.board.seen[self.thread].store(self.stored, Ordering::Release);
        let (mut round, mut due, mut entry) = (2 * lap, ticks(), self.stored);
        while !self.board.end.load(Ordering::Relaxed) {
            if self.round > 0 {
                // The next round has its time, late or not: a thread that was held catches up.
                due += self.round;
                while self.last_tsc < due && !self.board.end.load(Ordering::Relaxed) {
                    self.beat();
                }
            }
            self.stores(round, lap);
            round += 1;
            if round % BEAT == 0 {
                self.beat();
            }
            if self.stored >= entry {
                self.write_entry();
                entry += self.every;
            }
        }
    }

    fn first_lap(&mut self, lap: u64) {
        for round in lap..2 * lap {
            self.stores(round, lap);
        }
    }

    /// One round: nine stores, each with the next number, in this order and no other.
    fn stores(&mut self, round: u64, lap: u64) {
        let mut number = round * tearpage::ROUND;
        let page = &self.spread[(round % lap) as usize];
        for word in self.pair.iter().flatten().chain(page) {
            word.store(number, Ordering::Release);
            number += 1;
        }
        self.stored = number - 1;
    }

    /// Tells how far this thread is, and looks whether it was missed; now and then looks at the
    /// clocks and at the other threads.
    fn beat(&mut self) {
        self.board.seen[self.thread].store(self.stored, Ordering::Release);
        let tsc = ticks();
        let missed = tsc.saturating_sub(self.last_tsc);
        let before = std::mem::replace(&mut self.last_tsc, tsc);
        if missed > self.gap || tsc.saturating_sub(self.looked_tsc) > self.look {
            self.look_at_clocks(tsc, before, missed);
            self.merge();
        }
    }

    fn look_at_clocks(&mut self, tsc: u64, before: u64, missed: u64) {
        let monotonic = nanoseconds(c::CLOCK_MONOTONIC);
        let realtime = nanoseconds(c::CLOCK_REALTIME);
        self.beats += 1;
        let at = tearpage::BEAT_AT / 8;
        let beat = [self.beats, tsc, monotonic, realtime, self.stored, self.beats];
        for (word, value) in self.heartbeat[at..].iter().zip(beat) {
            word.store(value, Ordering::Release);
        }
        if missed > self.gap {
            self.note_gap([before, missed, monotonic - self.looked_monotonic, self.stored]);
        }
        (self.looked_tsc, self.looked_monotonic) = (tsc, monotonic);
    }

    fn note_gap(&mut self, gap: [u64; 4]) {
        let at = tearpage::GAP_LOG_AT / 8 + (self.gaps as usize % tearpage::GAP_LOG) * 4;
        self.gaps += 1;
        self.longest = (self.longest.0.max(gap[1]), self.longest.1.max(gap[2]));
        let sums = [self.gaps, self.longest.0, self.longest.1];
        let sums_at = tearpage::GAPS_AT / 8;
        for (word, value) in self.heartbeat[at..].iter().zip(gap) {
            word.store(value, Ordering::Release);
        }
        for (word, value) in self.heartbeat[sums_at..].iter().zip(sums) {
            word.store(value, Ordering::Release);
        }
        let (board, thread) = (self.board, self.thread);
        board.longest_tsc_ns[thread].store(self.tick.to_ns(self.longest.0), Ordering::Release);
        board.longest_monotonic_ns[thread].store(self.longest.1, Ordering::Release);
        board.gaps[thread].store(self.gaps, Ordering::Release);
    }

    /// Takes the other threads' clocks in: whatever this thread stores from now on came after what
    /// they had stored. So each entry for itself must be found in an image that has this one.
    fn merge(&mut self) {
        let seen = self.board.seen.iter().take(self.threads);
        let clock: Vec<u64> = seen.map(|seen| seen.load(Ordering::Acquire)).collect();
        let page = &self.clocks[self.beats as usize % self.clocks.len()];
        for (word, value) in page.iter().zip(clock) {
            word.store(value, Ordering::Release);
        }
    }

    /// Appends to the ledger; the oldest entry makes room.
    fn write_entry(&mut self) {
        let (tsc, monotonic) = (ticks(), nanoseconds(c::CLOCK_MONOTONIC));
        let realtime = nanoseconds(c::CLOCK_REALTIME);
        let entry = tearpage::ledger_entry(self.stored, tsc, monotonic, realtime);
        let at = self.entries * (tearpage::ENTRY / 8);
        for (word, value) in self.ledger[at..].iter().zip(entry.chunks_exact(8)) {
            let value = u64::from_le_bytes(value.try_into().expect("8 bytes"));
            word.store(value, Ordering::Release);
        }
        self.entries = (self.entries + 1) % (self.ledger.len() / (tearpage::ENTRY / 8));
    }
}
