//! A Linux guest that reads numbered blocks past its page cache into known pages
//! (`guest/diskread.rs`), and the disk that it reads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::diskpage;
use crate::error::{Doing, Result, failed};
use crate::guest::Guest;
use crate::initramfs::DISK_MODULES;
use crate::pattern::PAGE;
use crate::program;

/// The program's name.
const NAME: &str = "diskread";

/// Blocks of the disk: 128 MiB. A page is full of the same again after as many reads as there are
/// blocks for each page, which are 16.
const BLOCKS: u64 = 1 << 15;

/// Longest wait for the program's first read.
const ARMING: Duration = Duration::from_secs(60);

/// How QEMU reads a disk that is opened with O_DIRECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// Threads of QEMU's, each waiting for one read.
    Threads,
    /// Linux's own asynchronous reads.
    Native,
    /// io_uring.
    IoUring,
}

impl Aio {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Threads, Self::Native, Self::IoUring];

    /// QEMU's word for it.
    fn word(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Native => "native",
            Self::IoUring => "io_uring",
        }
    }

    /// QEMU's argument for a disk that is read so, past the host's page cache. There may be several of
    /// the same, as nobody writes.
    pub fn drive(self, disk: &Path) -> String {
        let (disk, aio) = (disk.display(), self.word());
        format!("file={disk},format=raw,if=virtio,cache=none,readonly=on,aio={aio}")
    }
}

/// The program, running in a guest whose virtio disks are all of these.
#[derive(Debug)]
pub struct Diskread {
    /// What it said when it was ready: `threads`, `pages`, `blocks`.
    pub armed: Value,
}

impl Diskread {
    /// Starts it on so many disks and waits for the first read.
    pub fn start(guest: &mut Guest, disks: usize) -> Result<Self> {
        let devices = ["/dev/vda", "/dev/vdb", "/dev/vdc"];
        let devices = devices.get(..disks).ok_or_else(|| failed("so many disks"))?;
        let before = format!(
            "for m in {}; do [ -d /sys/module/$m ] || insmod /modules/$m.ko; done
            for d in {}; do while [ ! -b $d ]; do usleep 20000; done; done",
            DISK_MODULES.join(" "),
            devices.join(" ")
        );
        let args = format!("devices={}", devices.join(","));
        Ok(Self { armed: program::start(guest, NAME, &args, &before, ARMING)? })
    }

    /// What it says of itself: `reads`, `slowest_ns`, `wrong`, `moved_pages`. It goes on.
    pub fn report(&self, guest: &mut Guest) -> Result<Value> {
        program::ask(guest, NAME, "report")
    }

    /// The same, and it ends.
    pub fn end(self, guest: &mut Guest) -> Result<Value> {
        program::ask(guest, NAME, "end")
    }
}

/// Writes all blocks of the disk, a file or a device.
pub fn write_disk(path: &Path) -> Result<()> {
    let to = File::options().write(true).create(true).truncate(true).open(path);
    let mut to = BufWriter::with_capacity(1 << 20, to.doing(path.display())?);
    let mut block = [0; PAGE];
    for number in 0..BLOCKS {
        diskpage::block(number, &mut block);
        to.write_all(&block).doing("writing the numbered disk")?;
    }
    to.flush()?;
    Ok(to.get_ref().sync_all()?)
}

/// The same disk in the outer guest, with a latency: a ram disk behind `dm-delay`, which keeps a read
/// for that long and then passes it on. So the data lands in the page at the *end*, as it does on a
/// slow disk. null_blk (memory_backed=1, completion_nsec) and scsi_debug (delay) copy at once and keep
/// only the completion: a page that was given to them long ago is whole, and all images are. There is
/// one for each way to read it, all of the same blocks.
#[derive(Debug)]
pub struct SlowDisk(());

/// Its modules, in the order of dependence.
pub(crate) const SLOW_MODULES: [&str; 3] = ["brd", "dm-mod", "dm-delay"];

impl SlowDisk {
    /// Makes them, as quick as memory yet. They can be there once at a time.
    pub fn new() -> Result<Self> {
        let brd = format!("rd_nr=1 max_part=0 rd_size={}", BLOCKS * 4);
        for (module, settings) in SLOW_MODULES.into_iter().zip([brd.as_str(), "", ""]) {
            let module = format!("/modules/{module}.ko");
            let settings = settings.split_whitespace();
            run(Command::new("insmod").arg(module).args(settings))?;
        }
        let disk = Self(());
        write_disk(Path::new("/dev/ram0"))?;
        for aio in Aio::ALL {
            run(dmsetup("create", aio).args(["--table", &table(Duration::ZERO)]))?;
        }
        Ok(disk)
    }

    /// Where the one for `aio` is.
    pub fn path(&self, aio: Aio) -> PathBuf {
        Path::new("/dev/mapper").join(slow(aio))
    }

    /// From now on each read takes as long as `latency` says for the way. Those that wait are done at
    /// once.
    pub fn set(&self, latency: impl Fn(Aio) -> Duration) -> Result<()> {
        for aio in Aio::ALL {
            run(dmsetup("reload", aio).args(["--table", &table(latency(aio))]))?;
            run(&mut dmsetup("resume", aio))?;
        }
        Ok(())
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        for aio in Aio::ALL {
            let _ = run(dmsetup("remove", aio).arg("--retry"));
        }
        for module in SLOW_MODULES.into_iter().rev() {
            let _ = run(Command::new("rmmod").arg(module));
        }
    }
}

fn table(latency: Duration) -> String {
    format!("0 {} delay /dev/ram0 0 {}", BLOCKS * 8, latency.as_millis())
}

fn slow(aio: Aio) -> String {
    format!("lab-slow-{}", aio.word())
}

/// There is no udev that would make the device's file.
fn dmsetup(command: &str, aio: Aio) -> Command {
    let mut dmsetup = Command::new("dmsetup");
    dmsetup.args([command, &slow(aio)]).env("DM_DISABLE_UDEV", "1");
    dmsetup
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output().doing(format_args!("starting {command:?}"))?;
    match out.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&out.stderr);
            Err(failed(format_args!("{command:?}: {}", said.trim())))
        }
    }
}
