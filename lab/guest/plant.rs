//! The program that the lab plants in its guests. One static binary, no dependencies.
//!
//! `plant park` waits for ever: under another name it is the process that the analyst must find.
//! `plant frames MIB RUN` fills MIB of memory with pages that carry their own frame number, prints
//! `frames N` and waits. `plant noise MIB SEED` fills MIB with incompressible bytes, prints
//! `noise MIB` and waits. `plant dirty MIB PER_SECOND` numbers its pages as `frames` does and
//! goes on writing to each, where the run stands, for ever.

mod pattern;

use std::ffi::c_int;
use std::fs::File;
use std::io::{Error, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use pattern::PAGE;

/// Bit 63 of a pagemap entry: the page is present (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// Bits 0-54 of a pagemap entry: the frame number.
const FRAME: u64 = (1 << 55) - 1;

/// mlockall(2).
const MCL_CURRENT: c_int = 1;

unsafe extern "C" {
    fn mlockall(flags: c_int) -> c_int;
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["park"] => Ok(()),
        ["frames", mib, run] => frames(number(mib), u64::from_str_radix(run, 16).expect("hex run")),
        ["noise", mib, seed] => noise(number(mib), number(seed) as u64),
        ["dirty", mib, per_second] => dirty(number(mib), number(per_second)),
        _ => panic!("usage: plant park | frames MIB RUN | noise MIB SEED | dirty MIB PER_SECOND"),
    };
    if let Err(e) = done {
        eprintln!("plant: {e}");
        std::process::exit(1);
    }
    park();
}

fn number(text: &str) -> usize {
    text.parse().expect("a decimal number")
}

fn park() -> ! {
    loop {
        std::thread::park();
    }
}

/// `mib` MiB of zeroed memory from the first page boundary on; each page is still to be faulted in.
struct Memory {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Memory {
    fn new(mib: usize) -> Self {
        let len = mib << 20;
        let bytes = vec![0u8; len + PAGE];
        let skip = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, skip, len }
    }

    fn pages(&mut self) -> impl Iterator<Item = &mut [u8; PAGE]> {
        let end = self.skip + self.len;
        self.bytes[self.skip..end].chunks_exact_mut(PAGE).map(|page| page.try_into().expect("PAGE"))
    }

    /// Frame number of every page, as the kernel says.
    fn frame_numbers(&self) -> Result<Vec<u64>, Error> {
        let first = self.bytes[self.skip..].as_ptr().addr() / PAGE;
        let mut raw = vec![0u8; self.len / PAGE * 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut raw, first as u64 * 8)?;
        let entry = |raw: &[u8]| u64::from_le_bytes(raw.try_into().expect("8 bytes"));
        let entries = raw.chunks_exact(8).map(entry);
        entries
            .map(
                |e| if e & PRESENT != 0 { Ok(e & FRAME) } else { Err(Error::other("page absent")) },
            )
            .collect()
    }
}

fn frames(mib: usize, run: u64) -> Result<(), Error> {
    let mut memory = Memory::new(mib);
    let count = number_pages(&mut memory, run)?;
    say(format_args!("frames {count}"));
    hold(memory)
}

/// Fills every page with what [`pattern::frame_page`] says of its frame; returns their count.
fn number_pages(memory: &mut Memory, run: u64) -> Result<usize, Error> {
    for page in memory.pages() {
        page[0] = 1; // faults the page in; before that it has no frame
    }
    // What is locked is moved by no compaction (init.sh), as a balloon that grows gives cause for.
    // SAFETY: changes no memory.
    if unsafe { mlockall(MCL_CURRENT) } != 0 {
        return Err(Error::last_os_error());
    }
    // The kernel may have moved a page before. Then it is written again, and looked at again.
    for _ in 0..10 {
        let before = memory.frame_numbers()?;
        for (page, pfn) in memory.pages().zip(&before) {
            pattern::frame_page(run, *pfn, page);
        }
        if memory.frame_numbers()? == before {
            return Ok(before.len());
        }
    }
    Err(Error::other("the kernel keeps moving the pages"))
}

fn noise(mib: usize, seed: u64) -> Result<(), Error> {
    let mut memory = Memory::new(mib);
    let mut pages: Vec<_> = memory.pages().collect();
    let threads = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        for (share, pages) in pages.chunks_mut((mib << 8).div_ceil(threads).max(1)).enumerate() {
            let mut state = (seed << 8 | share as u64) << 1 | 1;
            scope.spawn(move || {
                for word in pages.iter_mut().flat_map(|page| page.chunks_exact_mut(8)) {
                    word.copy_from_slice(&pattern::next(&mut state).to_le_bytes());
                }
            });
        }
    });
    drop(pages);
    say(format_args!("noise {mib}"));
    hold(memory)
}

fn dirty(mib: usize, per_second: usize) -> Result<(), Error> {
    let mut memory = Memory::new(mib);
    number_pages(&mut memory, 0)?;
    say(format_args!("dirty {mib}"));
    let mut round = 0u64;
    loop {
        round += 1;
        for (i, page) in memory.pages().enumerate() {
            page[8..16].copy_from_slice(&round.to_le_bytes());
            // Ten bursts a second: sleeping after each page would cap the rate at the timer's.
            if (i + 1) % per_second.div_ceil(10).max(1) == 0 {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Keeps the memory and the program alive.
fn hold(memory: Memory) -> ! {
    std::mem::forget(memory);
    park()
}

fn say(line: std::fmt::Arguments<'_>) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}
