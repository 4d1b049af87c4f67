//! How fast memory of another process comes into the stores, in the method's own way: blocks of
//! 1 MiB, each read into a buffer and put by position.
//!
//! ```text
//! cargo run --release -p stillframe-host --example read_speed [MiB]
//! ```
//! The other process is this program once more, with memory full of noise.

use evidence::{BLOCK_LEN, GuestRange, PageState, Segment, Segments};
use host::{DiskStore, GuestMemory, Place, Process, RamStore, Source, Store};
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("hold") => hold(args.next().ok_or("how many MiB?")?.parse()?),
        size => measure(size.unwrap_or("1024").parse()?),
    }
}

/// The other process: tells where its memory is, and waits for the end of its input.
fn hold(mib: usize) -> Result<(), Box<dyn Error>> {
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

fn measure(mib: u64) -> Result<(), Box<dyn Error>> {
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
    report("faulting the RAM store in", range, start);
    let path = std::env::temp_dir().join(format!("read_speed-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    let disk = DiskStore::new(file, segments)?;
    println!("disk store: {:?}, direct {}", disk.reserve(&[range])?, disk.is_direct());

    for workers in [1, 2] {
        let start = Instant::now();
        copy(&memory, None, range, workers)?;
        report(&format!("reading alone, {workers} worker(s)"), range, start);
        let start = Instant::now();
        copy(&memory, Some(&ram), range, workers)?;
        report(&format!("into the RAM store, {workers} worker(s)"), range, start);
        let start = Instant::now();
        copy(&memory, Some(&disk), range, workers)?;
        disk.sync()?;
        report(&format!("into the disk store, {workers} worker(s)"), range, start);
    }
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

fn report(what: &str, range: GuestRange, start: Instant) {
    let rate = range.len() as f64 / 1e9 / start.elapsed().as_secs_f64();
    let _ = writeln!(std::io::stdout(), "{what}: {rate:.2} GB/s");
}

/// Copies all blocks of `range` by `workers` threads.
fn copy(
    memory: &GuestMemory,
    store: Option<&dyn Store>,
    range: GuestRange,
    workers: usize,
) -> Result<(), Box<dyn Error>> {
    let next = AtomicU64::new(0);
    let work = || -> Result<(), String> {
        let mut buf = vec![0; 1 << 20];
        let mut states = vec![PageState::Hole; 257];
        loop {
            let cell = range.start() / BLOCK_LEN + next.fetch_add(1, Ordering::Relaxed);
            let block = GuestRange::new(cell * BLOCK_LEN, BLOCK_LEN);
            let Some(at) = block.and_then(|b| b.intersect(range)) else { return Ok(()) };
            let len = usize::try_from(at.len()).map_err(|e| e.to_string())?;
            let pages = usize::try_from(evidence::state::page_count(at)).unwrap_or(0);
            let (buf, states) = (&mut buf[..len], &mut states[..pages]);
            memory.read(at, buf, states).map_err(|e| e.to_string())?;
            if let Some(store) = store {
                store.put(at, buf).map_err(|e| e.to_string())?;
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or(Err("panicked".into())))
    })?;
    Ok(())
}
