//! How quickly a migration stream is read: from memory, and through a socket that a second thread
//! fills; into nothing, and into a store of the guest's size.
//!
//! ```text
//! cargo run --release -p stillframe-qemu --example stream_speed
//! ```
//! Each figure is in bytes by time and by the reading thread's CPU time: the latter says the same on
//! a host with other work.
#![forbid(unsafe_code)]

use qemu::stream::{self, Block, PAGE, Sink};
use rustix::time::{ClockId, clock_gettime};
use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Pages of the guest: 256 MiB.
const PAGES: usize = 65_536;

/// How often all of them are sent.
const ROUNDS: usize = 16;

/// Keeps pages at their places, or drops them.
struct Store(Vec<u8>);

impl Sink for Store {
    fn blocks(&mut self, _: &[Block]) -> io::Result<()> {
        Ok(())
    }

    fn page(&mut self, _: usize, offset: u64, bytes: &[u8; PAGE]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        if let Some(page) = self.0.get_mut(at..at + PAGE) {
            page.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn zero_page(&mut self, _: usize, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn head() -> Vec<u8> {
    let len = (PAGES * PAGE) as u64;
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    out.extend((len | 4).to_be_bytes());
    out.extend(b"\x06pc.ram");
    out.extend(len.to_be_bytes());
    out.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    out
}

/// One PART with every page, or every page of zeros.
fn part(zeros: bool) -> Vec<u8> {
    let mut out = b"\x02\0\0\0\x02".to_vec();
    for page in 0..PAGES {
        let flags = if zeros { 0x02 } else { 0x08 } | if page == 0 { 0 } else { 0x20 };
        out.extend(((page * PAGE) as u64 | flags).to_be_bytes());
        if page == 0 {
            out.extend(b"\x06pc.ram");
        }
        match zeros {
            true => out.push(0),
            false => out.extend([page.to_le_bytes()[0]; PAGE]),
        }
    }
    out.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    out
}

const TAIL: &[u8] = b"\0\x06\0\0\0\x22{\"page_size\": 4096, \"devices\": []}";

fn measure(name: &str, len: usize, from: impl Read, store: usize) -> Result<(), Box<dyn Error>> {
    // Written, and so faulted in.
    let mut store = Store(vec![1; store]);
    let (begin, begin_cpu) = (Instant::now(), cpu_time()?);
    let rest = stream::read(from, &mut store, 1 << 20)?;
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), (cpu_time()? - begin_cpu).as_secs_f64());
    let pages = rest.pages + rest.zero_pages;
    #[allow(clippy::cast_precision_loss)]
    let (gigabytes, each) = (len as f64 / 1e9, cpu * 1e9 / pages as f64);
    let (by_time, by_cpu) = (gigabytes / seconds, gigabytes / cpu);
    println!("{name:28} {by_time:5.2} GB/s {by_cpu:6.2} GB/s of CPU {each:6.0} ns a page");
    Ok(())
}

fn cpu_time() -> Result<Duration, Box<dyn Error>> {
    Ok(clock_gettime(ClockId::ThreadCPUTime).try_into()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let head = head();
    for (zeros, what) in [(false, "pages"), (true, "zero pages")] {
        let part = part(zeros);
        let len = head.len() + ROUNDS * part.len() + TAIL.len();
        for (store, into) in [(0, "nothing"), (PAGES * PAGE, "a store")] {
            let parts = vec![part.as_slice(); ROUNDS];
            let name = format!("{what}, memory, {into}");
            measure(&name, len, Parts([&[&head[..]], &parts[..], &[TAIL]].concat()), store)?;
            let (mut ours, theirs) = UnixStream::pair()?;
            let sent = std::thread::scope(|scope| {
                let sender = scope.spawn(|| {
                    let mut ours = || {
                        ours.write_all(&head)?;
                        (0..ROUNDS).try_for_each(|_| ours.write_all(&part))?;
                        ours.write_all(TAIL)?;
                        ours.shutdown(std::net::Shutdown::Both)
                    };
                    ours()
                });
                measure(&format!("{what}, socket, {into}"), len, theirs, store)?;
                sender.join().map_err(|_| "the sender panicked".into())
            });
            sent.map_err(|e: Box<dyn Error>| e)??;
        }
    }
    Ok(())
}

/// Slices, one after the other.
struct Parts<'a>(Vec<&'a [u8]>);

impl Read for Parts<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some(first) = self.0.first_mut() {
            match first.read(into)? {
                0 => self.0.remove(0),
                read => return Ok(read),
            };
        }
        Ok(0)
    }
}
