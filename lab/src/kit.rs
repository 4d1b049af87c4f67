//! What the lab is made of: where the unpacked kernel, the QEMUs and the initramfs lie.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Doing, Result, failed};

/// A QEMU version that the lab has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Debian 12's own.
    V7_2,
    /// From Debian 12's backports.
    V10_0,
}

/// The cache made by [`crate::setup::run`].
#[derive(Debug, Clone)]
pub struct Kit {
    root: PathBuf,
}

/// `$STILLFRAME_LAB`, or `/var/cache/stillframe-lab` for root, or `~/.cache/stillframe-lab`.
pub fn cache() -> PathBuf {
    if let Some(path) = std::env::var_os("STILLFRAME_LAB") {
        return PathBuf::from(path);
    }
    match std::env::var_os("HOME") {
        Some(home) if !is_root() => PathBuf::from(home).join(".cache/stillframe-lab"),
        _ => PathBuf::from("/var/cache/stillframe-lab"),
    }
}

/// Whether this process runs with uid 0.
pub(crate) fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        uid.and_then(|ids| ids.split_whitespace().nth(1)) == Some("0")
    })
}

impl Kit {
    /// Opens the cache, or says that `cargo xtask setup` has to run first.
    pub fn open() -> Result<Self> {
        let kit = Self::at(cache());
        for part in [kit.kernel(), kit.initramfs(), kit.qemu_binary(Version::V10_0)] {
            if !part.exists() {
                let part = part.display();
                return Err(failed(format_args!("{part} is missing: run `cargo xtask setup`")));
            }
        }
        Ok(kit)
    }

    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The cache directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Debian's cloud kernel.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("kernel/vmlinuz")
    }

    /// Its modules, `lib/modules/VERSION` without the directories above.
    pub fn modules(&self) -> PathBuf {
        self.root.join("kernel/modules")
    }

    /// The guests' initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.root.join("images/guest.cpio")
    }

    /// The outer guest's initramfs, without what a test adds.
    pub fn outer_initramfs(&self) -> PathBuf {
        self.root.join("images/outer.cpio")
    }

    /// The program that is planted in guests.
    pub fn plant(&self) -> PathBuf {
        self.root.join("plant/plant")
    }

    /// The tear benchmark's program for Linux guests.
    pub fn tearbench(&self) -> PathBuf {
        self.root.join("tearbench/tearbench")
    }

    /// The program that reads a disk in Linux guests.
    pub fn diskread(&self) -> PathBuf {
        self.root.join("diskread/diskread")
    }

    /// The ring guest's boot sector, without its parameters.
    pub fn ring(&self) -> PathBuf {
        self.root.join("ring/ring.bin")
    }

    /// A program of the Python environment: `vol`, `pakunoda`.
    pub fn python(&self, program: &str) -> PathBuf {
        self.root.join("venv/bin").join(program)
    }

    /// The QEMU program of this version.
    pub fn qemu_binary(&self, version: Version) -> PathBuf {
        match version {
            Version::V7_2 => PathBuf::from("/usr/bin/qemu-system-x86_64"),
            Version::V10_0 => self.root.join("qemu-10.0/usr/bin/qemu-system-x86_64"),
        }
    }

    /// A command that starts this QEMU with its own firmware and modules, and that dies with the
    /// thread that starts it. The command's PID is QEMU's: `setpriv` replaces itself.
    pub fn qemu(&self, version: Version) -> Command {
        self.qemu_called(version, "qemu-system-x86_64")
    }

    /// The same for another machine's program, which lies beside.
    pub fn qemu_called(&self, version: Version, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        let binary = self.qemu_binary(version).with_file_name(program);
        command.args(["--pdeathsig", "KILL"]).arg(binary);
        if version == Version::V10_0 {
            let usr = self.root.join("qemu-10.0/usr");
            let libraries = usr.join("lib/x86_64-linux-gnu");
            command.env("LD_LIBRARY_PATH", &libraries);
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            command.arg("-L").arg(usr.join("share/qemu"));
            command.arg("-L").arg(usr.join("share/seabios"));
        }
        command
    }

    /// First line of `--version`.
    pub fn qemu_version(&self, version: Version) -> Result<String> {
        let out = self.qemu(version).arg("--version").output().doing("asking QEMU's version")?;
        let text = String::from_utf8_lossy(&out.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}
