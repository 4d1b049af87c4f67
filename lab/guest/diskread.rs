//! The Linux guest that reads a disk past its own page cache. One static binary, no dependencies.
//!
//! `diskread KEY=VALUE...` reads numbered blocks with O_DIRECT, several at a time, each into a page
//! that is known, and after each read notes the number in a ledger, in another page. The disk's
//! device writes the one, a CPU the other: what an image holds of both says whether it has what
//! devices wrote (src/diskcheck.rs). It prints a line of JSON when it reads (`armed`), and one for
//! every word in the file `command`: `report`, or `end`, after which it ends.
//!
//! Keys, with their defaults: `devices` (/dev/vda; of several, with commas between them, thread t
//! reads number t modulo how many there are), `mib` (12: memory, of which the lowest pages are read
//! into and the highest are the ledgers), `threads` (16), `pages` (2048: K), `command`
//! (/tmp/diskread/command).

mod diskpage;
mod pattern;

use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io::{Error, Seek, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diskpage::Header;
use pattern::PAGE;

/// open(2) on x86-64.
const O_DIRECT: c_int = 0o40000;
/// mlockall(2).
const MCL_CURRENT: c_int = 1;
/// Bit 63 of a pagemap entry: the page is present (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// Bits 0-54 of a pagemap entry: the frame number.
const FRAME: u64 = (1 << 55) - 1;

unsafe extern "C" {
    fn mlockall(flags: c_int) -> c_int;
}

fn main() {
    if let Err(e) = run() {
        eprintln!("diskread: {e}");
        std::process::exit(1);
    }
}

/// What the command line says.
struct Plan {
    devices: Vec<String>,
    mib: usize,
    threads: usize,
    pages: usize,
    command: String,
}

impl Plan {
    fn parse() -> Result<Self, Error> {
        let mut plan = Self {
            devices: vec![String::from("/dev/vda")],
            mib: 12,
            threads: 16,
            pages: 2048,
            command: String::from("/tmp/diskread/command"),
        };
        for arg in std::env::args().skip(1) {
            let bad = || Error::other(format!("not an argument: {arg}"));
            let (key, value) = arg.split_once('=').ok_or_else(bad)?;
            let number = || value.parse::<usize>().map_err(|_| bad());
            match key {
                "devices" => plan.devices = value.split(',').map(str::to_owned).collect(),
                "mib" => plan.mib = number()?,
                "threads" => plan.threads = number()?,
                "pages" => plan.pages = number()?,
                "command" => value.clone_into(&mut plan.command),
                _ => return Err(bad()),
            }
        }
        let each = plan.pages / plan.threads.max(1);
        if plan.threads == 0
            || plan.pages % plan.threads != 0
            || !(2..=diskpage::ENTRIES).contains(&each)
            || plan.pages + plan.threads > plan.mib << 8
        {
            return Err(Error::other("threads, pages or mib out of range"));
        }
        Ok(plan)
    }
}

/// A page of memory.
#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; PAGE]);

/// What the threads tell the main one.
#[derive(Default)]
struct Board {
    reads: AtomicU64,
    slowest_ns: AtomicU64,
    /// A read failed, or brought another block.
    wrong: AtomicU64,
    end: AtomicBool,
}

fn run() -> Result<(), Error> {
    let plan = Plan::parse()?;
    let open = |device: &String| {
        OpenOptions::new().read(true).custom_flags(O_DIRECT).open(device).map_err(|e| {
            Error::other(format!("{device}: {e}"))
        })
    };
    let mut devices = plan.devices.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let lens = devices.iter_mut().map(|device| device.seek(SeekFrom::End(0)));
    let shortest = lens.collect::<Result<Vec<_>, _>>()?.into_iter().min().unwrap_or(0);
    let blocks = shortest / PAGE as u64;
    if blocks == 0 || blocks % plan.pages as u64 != 0 {
        return Err(Error::other(format!("{blocks} blocks are no multiple of the pages")));
    }
    // Written, so that each page has a frame of its own.
    let mut memory = vec![Page([1; PAGE]); plan.mib << 8];
    // SAFETY: changes no memory.
    if unsafe { mlockall(MCL_CURRENT) } != 0 {
        return Err(Error::last_os_error());
    }
    let (at, count) = (memory.as_ptr().addr(), memory.len());
    let frames = frame_numbers(at, count)?;
    // The lowest frames are read into, the ledgers lie in the highest: an image that is made from one
    // end to the other has the ledgers of a later time.
    let mut order: Vec<(u64, &mut Page)> = frames.iter().copied().zip(&mut memory).collect();
    order.sort_unstable_by_key(|(pfn, _)| *pfn);
    order.iter_mut().for_each(|(_, page)| page.0.fill(0));
    let ledgers = order.split_off(count - plan.threads);
    order.truncate(plan.pages);
    let reader = |(thread, ledger)| Reader { thread, ledger, pages: Vec::new() };
    let mut readers: Vec<Reader> = (0..).zip(ledgers).map(reader).collect();
    for (number, (pfn, page)) in order.into_iter().enumerate() {
        // As if it had been read.
        diskpage::block(number as u64, &mut page.0);
        readers[number % plan.threads].pages.push((pfn, page));
    }
    let (board, plan) = (&Board::default(), &plan);
    std::thread::scope(|scope| {
        for (mut reader, device) in readers.into_iter().zip(devices.iter().cycle()) {
            reader.begin(plan, blocks);
            scope.spawn(move || reader.for_ever(plan, device, blocks, board));
        }
        let served = serve(plan, blocks, board, || {
            let now = frame_numbers(at, count)?;
            Ok(now.iter().zip(&frames).filter(|(now, then)| now != then).count())
        });
        board.end.store(true, Ordering::Relaxed);
        served
    })
}

/// Frame number of each of `count` pages from `at` on, as the kernel says.
fn frame_numbers(at: usize, count: usize) -> Result<Vec<u64>, Error> {
    let mut raw = vec![0u8; count * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut raw, (at / PAGE * 8) as u64)?;
    let entry = |raw: &[u8]| u64::from_le_bytes(raw.try_into().expect("8 bytes"));
    let frame = |e| if e & PRESENT != 0 { Ok(e & FRAME) } else { Err(Error::other("page absent")) };
    raw.chunks_exact(8).map(entry).map(frame).collect()
}

/// Tells what there is, then does what the command file says, until it says `end`.
fn serve(
    plan: &Plan,
    blocks: u64,
    board: &Board,
    moved: impl Fn() -> Result<usize, Error>,
) -> Result<(), Error> {
    let of = |number: &AtomicU64| number.load(Ordering::Acquire);
    while of(&board.reads) == 0 && of(&board.wrong) == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (threads, pages) = (plan.threads, plan.pages);
    say(&format!(
        "{{\"armed\":true,\"threads\":{threads},\"pages\":{pages},\"blocks\":{blocks}}}"
    ));
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let Ok(command) = fs::read_to_string(&plan.command) else { continue };
        fs::remove_file(&plan.command)?;
        say(&format!(
            "{{\"reads\":{},\"slowest_ns\":{},\"wrong\":{},\"moved_pages\":{}}}",
            of(&board.reads),
            of(&board.slowest_ns),
            of(&board.wrong),
            moved()?
        ));
        if command.trim() == "end" {
            return Ok(());
        }
    }
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

/// One thread: the only one that uses its pages.
struct Reader<'a> {
    thread: usize,
    ledger: (u64, &'a mut Page),
    pages: Vec<(u64, &'a mut Page)>,
}

impl Reader<'_> {
    /// The ledger as it is before the first read.
    fn begin(&mut self, plan: &Plan, blocks: u64) {
        let (own, page) = &mut self.ledger;
        let header = Header {
            thread: self.thread as u32,
            threads: plan.threads as u32,
            pages: plan.pages as u32,
            blocks: blocks as u32,
            pfn: *own,
        };
        page.0[..diskpage::HEADER].copy_from_slice(&header.encode());
        let entries = page.0[diskpage::ENTRIES_AT..].chunks_exact_mut(diskpage::ENTRY);
        let numbers = (self.thread..).step_by(plan.threads);
        for (entry, (number, (pfn, _))) in entries.zip(numbers.zip(&self.pages)) {
            entry[..8].copy_from_slice(&pfn.to_le_bytes());
            entry[8..].copy_from_slice(&(number as u64).to_le_bytes());
        }
    }

    fn for_ever(self, plan: &Plan, device: &File, blocks: u64, board: &Board) {
        let Self { thread, ledger: (_, ledger), mut pages } = self;
        let ledger = ledger.0.as_mut_ptr();
        let entry = |page: usize| {
            let at = diskpage::ENTRIES_AT + page * diskpage::ENTRY + 8;
            // SAFETY: aligned, inside a page that lives as long as the program runs, and from now on
            // only used as an atomic.
            unsafe { AtomicU64::from_ptr(ledger.add(at).cast::<u64>()) }
        };
        let entries: Vec<&AtomicU64> = (0..pages.len()).map(entry).collect();
        let (mut expected, mut state) = ([0; PAGE], thread as u64 + 1);
        let numbers = (thread as u64..).step_by(plan.threads);
        for (number, page) in numbers.zip((0..pages.len()).cycle()).skip(pages.len()) {
            if board.end.load(Ordering::Relaxed) {
                return;
            }
            let (block, start) = (number % blocks, Instant::now());
            let bytes = &mut pages[page].1.0;
            let read = device.read_exact_at(bytes, block * PAGE as u64);
            // From here on an image must have the block.
            entries[page].store(number, Ordering::Release);
            let took = start.elapsed();
            let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            board.slowest_ns.fetch_max(took_ns, Ordering::Relaxed);
            diskpage::block(block, &mut expected);
            if read.is_err() || *bytes != expected {
                board.wrong.fetch_add(1, Ordering::Release);
            }
            board.reads.fetch_add(1, Ordering::Release);
            // Half as long at most: so the threads do not go in step, and at any time a few reads have
            // just begun, and a few are about to end.
            std::thread::sleep(took * (pattern::next(&mut state) >> 56) as u32 / 512);
        }
    }
}
