//! `dump SOCKET [FILE]`: QEMU's own view of memory and registers, by a header-only dump; with FILE all
//! of memory, each byte at its address. Stops the guest meanwhile.
#![forbid(unsafe_code)]

use qemu::Qmp;
use qemu::dump::{self, Head};
use qemu::qmp::Change;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let socket = args.next().ok_or("usage: dump SOCKET [FILE]")?;
    let file = args.next().map(File::create).transpose()?;
    let mut qmp = Qmp::connect(Path::new(&socket), WAIT)?;
    let (from, to) = std::io::pipe()?;
    qmp.pass("stillframe-dump", to.as_fd(), WAIT)?;
    // QEMU has a copy: that its end is closed must be seen here.
    drop(to);
    let began = Instant::now();
    let reader = thread::spawn(move || {
        let (head, memory) = dump::head(from, 4 << 20)?;
        if let Some(file) = file {
            memory.read(|gpa, bytes| file.write_all_at(bytes, gpa))?;
        }
        Ok::<Head, dump::DumpError>(head)
    });
    let change = Change::DumpToFd { name: "stillframe-dump".into(), detach: false, range: None };
    let answer = qmp.change(&change, WAIT);
    println!("{:?} after {:.1} ms", answer, began.elapsed().as_secs_f64() * 1e3);
    let head = reader.join().map_err(|_| "the reader panicked")??;
    println!("{:?}, {} bytes, of memory {}", head.machine, head.len, head.memory_len());
    for segment in head.segments.list() {
        println!("{:#x} {:#x}", segment.range.start(), segment.range.len());
    }
    for cpu in &head.cpus {
        println!("CPU {}: {:x?}", cpu.index, cpu.registers);
    }
    Ok(())
}
