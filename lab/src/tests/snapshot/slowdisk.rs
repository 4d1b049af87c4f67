//! A disk of this machine that is slower than QEMU sends its snapshot: a file system on a loop device, to
//! which a control group lets its processes write so many bytes a second. (dm-delay, as in the outer
//! guest, not every kernel has.)

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lab::{Lab, Result, runner, skipped};
use rustix::fs::{major, minor};

use super::super::faults::Group;
use super::super::run::new_dir;

/// Dropped, it is unmounted, and as quick as it was.
#[derive(Debug)]
pub(super) struct SlowDisk {
    /// Where it is mounted.
    pub(super) dir: PathBuf,
    group: Group,
    /// Its number, as control groups write it.
    number: String,
}

impl SlowDisk {
    /// One of so many MiB, not slow yet.
    pub(super) fn new(lab: &Lab, mib: u64) -> Result<Self> {
        let group = Group::new("blkio", "io")?;
        let (file, dir) = (lab.scratch().join("slow.img"), new_dir(lab, "slow")?);
        File::create(&file)?.set_len(mib << 20)?;
        let done = |command: &mut Command| {
            let mut own = Command::new(command.get_program());
            own.args(command.get_args());
            let cannot = |e| skipped(format_args!("no disk can be made of a file: {e}"));
            let ended = runner::finish(own, Duration::from_secs(30)).map_err(cannot)?;
            ended.expect_code(0).map_err(cannot)
        };
        done(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&file))?;
        done(Command::new("mount").args(["-o", "loop"]).args([&file, &dir]))?;
        let device = fs::metadata(&dir)?.dev();
        let disk = Self { dir, group, number: format!("{}:{}", major(device), minor(device)) };
        disk.set(None)?;
        Ok(disk)
    }

    /// From now on so many bytes a second are written to it; what waits goes on at that rate too.
    pub(super) fn set(&self, bytes_per_s: Option<u64>) -> Result<()> {
        let rate =
            |none: &str| bytes_per_s.map_or_else(|| none.to_owned(), |rate| rate.to_string());
        let first = format!("{} {}", self.number, rate("0"));
        let second = format!("{} wbps={}", self.number, rate("max"));
        self.group.set(("blkio.throttle.write_bps_device", &first), ("io.max", &second))
    }

    /// The command, to be run by whom the disk is slow for.
    pub(super) fn slows(&self, command: &Command) -> Command {
        self.group.within(command)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = self.set(None);
        // One that stays, while somebody has a file in it, would fail every later test.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}
