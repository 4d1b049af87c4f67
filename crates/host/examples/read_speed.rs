//! How fast memory of another process comes into the stores, in the methods' own way: blocks of
//! 1 MiB, each read into what the store lends, or into a buffer and put by position; and how fast
//! it is read again and compared with what the store holds.
//!
//! ```text
//! cargo run --release -p stillframe-host --example read_speed [MiB]
//! ```
//! The other process is this program once more, with memory full of noise. Each figure is in bytes
//! by time and by the workers' CPU time: the latter says the same on a host with other work.

use evidence::{BLOCK_LEN, GuestRange, PageState, Segment, Segments};
use host::{DiskStore, GuestMemory, Place, Process, RamStore, Source, Store};
use rustix::time::{ClockId, clock_gettime};
use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn main() -> Result<(), Failed> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("hold") => hold(args.next().ok_or("how many MiB?")?.parse()?),
        size => measure(size.unwrap_or("1024").parse()?),
    }
}

/// The other process: tells where its memory is, and waits for the end of its input.
fn hold(mib: usize) -> Result<(), Failed> {
    let mut state = 88172645463325252u64;
    let mut words: Vec<u64> = Vec::with_capacity((mib + 1) << 17);
    let hva = words.as_ptr().addr();
    let (first, len) = (hva.next_multiple_of(4096), mib << 20);
    let address = words.as_mut_ptr().wrapping_byte_add(first - hva).cast();
    // SAFETY: whole pages of the vector's own memory; asking for huge pages, as QEMU does for
    // its guest's memory, changes no byte.
    unsafe { rustix::mm::madvise(address, len, rustix::mm::Advice::LinuxHugepage) }?;
    words.extend((0..(mib + 1) << 17).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }));
    println!("{first}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn measure(mib: u64) -> Result<(), Failed> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["hold", &mib.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let hva: u64 = line.trim().parse()?;
    let range = GuestRange::new(0, mib << 20).ok_or("no memory")?;
    let process = Process::open(child.id())?;
    let memory = GuestMemory::open(&process, &[Place { range, hva }])?;
    println!("{} by {}", memory.places()[0].vma(), memory.places()[0].reader().word());
    let segments = Segments::new(vec![Segment { range, offset: 0 }])?;

    let start = Instant::now();
    let limit = RamStore::limit(None)?;
    let ram = RamStore::reserve(segments.clone(), &[range], &limit, |_, _| (), || false)?;
    println!("faulting the RAM store in: {:.2} GB/s", rate(range, start.elapsed()));
    let path = std::env::temp_dir().join(format!("read_speed-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    let disk = DiskStore::new(file, segments)?;
    println!("disk store: {:?}, direct {}", disk.reserve(&[range])?, disk.is_direct());

    // Twice: the first round of each is into memory that was not used yet.
    for workers in [1, 2, 1, 2] {
        let time = |what: &str, work: &Work<'_>| -> Result<(), Failed> {
            let start = Instant::now();
            let cpu = each(range, workers, work)?;
            let (took, cpu) = (rate(range, start.elapsed()), rate(range, cpu));
            println!("{workers} worker(s), {what}: {took:.2} GB/s, {cpu:.2} GB per CPU second");
            Ok(())
        };
        time("reading alone", &|at, scratch| scratch.read(&memory, at))?;
        time("reading alone beside the page", &|at, scratch| {
            Ok(memory.read(at, scratch.odd, &mut scratch.states)?)
        })?;
        time("by a buffer into the RAM store", &|at, scratch| {
            scratch.read(&memory, at)?;
            Ok(ram.put(at, scratch.buf)?)
        })?;
        time("straight into the RAM store", &|at, scratch| {
            let states = &mut scratch.states;
            let mut read = Ok(());
            ram.lend(at, &mut |kept| read = memory.read(at, kept, states))?;
            Ok(read?)
        })?;
        time("again, compared by a buffer", &|at, scratch| {
            scratch.read(&memory, at)?;
            ram.get(at, scratch.old)?;
            same(scratch.buf == scratch.old)
        })?;
        time("again, compared in place", &|at, scratch| {
            scratch.read(&memory, at)?;
            let mut equal = false;
            ram.lend(at, &mut |kept| equal = scratch.buf == kept)?;
            same(equal)
        })?;
        time("by a buffer into the disk store", &|at, scratch| {
            scratch.read(&memory, at)?;
            Ok(disk.put(at, scratch.buf)?)
        })?;
        disk.sync()?;
    }
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

/// GB/s.
fn rate(range: GuestRange, took: Duration) -> f64 {
    range.len() as f64 / 1e9 / took.as_secs_f64()
}

/// A worker's buffers, as long as the block that it has.
struct Scratch<'a> {
    buf: &'a mut [u8],
    old: &'a mut [u8],
    /// Begins 16 bytes behind a page's beginning, as what `malloc` gives does.
    odd: &'a mut [u8],
    states: Vec<PageState>,
}

impl Scratch<'_> {
    fn read(&mut self, memory: &GuestMemory, at: GuestRange) -> Result<(), Failed> {
        Ok(memory.read(at, self.buf, &mut self.states)?)
    }
}

type Failed = Box<dyn Error + Send + Sync>;
type Work<'a> = dyn Fn(GuestRange, &mut Scratch<'_>) -> Result<(), Failed> + Sync + 'a;

fn same(equal: bool) -> Result<(), Failed> {
    if equal { Ok(()) } else { Err("the store holds something else".into()) }
}

/// Calls `work` for all blocks of `range`, which are whole, in `workers` threads; gives the CPU
/// time that they took together.
fn each(range: GuestRange, workers: usize, work: &Work<'_>) -> Result<Duration, Failed> {
    let next = AtomicU64::new(0);
    let one = || -> Result<Duration, Failed> {
        let mut room = [16, 0, 0].map(|beside| (beside, vec![1; (1 << 20) + 8192]));
        let [odd, buf, old] = room.each_mut().map(|(beside, room)| {
            let skip = room.as_ptr().align_offset(4096) + *beside;
            &mut room[skip..][..1 << 20]
        });
        let mut scratch = Scratch { buf, old, odd, states: vec![PageState::Hole; 256] };
        loop {
            let block = GuestRange::new(next.fetch_add(BLOCK_LEN, Ordering::Relaxed), BLOCK_LEN);
            let Some(at) = block.filter(|block| range.covers(*block)) else {
                return Ok(Duration::try_from(clock_gettime(ClockId::ThreadCPUTime))?);
            };
            work(at, &mut scratch)?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or(Err("panicked".into()))).sum()
    })
}
