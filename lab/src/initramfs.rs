//! The guests' root: busybox, the planted programs, the virtio modules, a scripted init.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use crate::cpio::Cpio;
use crate::error::{Doing, Result};
use crate::kit::Kit;

/// Name of the process that waits in every guest, for the analyst's tools to find. The kernel
/// keeps 15 bytes of a process name.
pub const CANARY: &str = "still-canary";

/// Modules that a guest may load with `insmod /modules/NAME.ko`, in the order of dependence.
pub const GUEST_MODULES: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
    "virtio_mem",
];

/// Those that a guest loads for a virtio disk, in the order of dependence.
pub const DISK_MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
];

const BUSYBOX: &str = "/bin/busybox";
pub(crate) const INIT: &str = include_str!("../guest/init.sh");

/// Writes the guests' initramfs to `to`.
pub(crate) fn guest(kit: &Kit, to: &Path) -> Result<()> {
    let mut cpio = Cpio::new(create(to)?);
    base(&mut cpio)?;
    cpio.file("init", 0o755, INIT.replace("CANARY", CANARY).as_bytes())?;
    cpio.copy("bin/plant", &kit.plant())?;
    cpio.copy("bin/tearbench", &kit.tearbench())?;
    cpio.copy("bin/diskread", &kit.diskread())?;
    // A copy, not a link: the kernel names a process after the file that it runs.
    cpio.copy(&format!("bin/{CANARY}"), &kit.plant())?;
    let mut names = [&GUEST_MODULES[..], &DISK_MODULES].concat();
    names.sort_unstable();
    names.dedup();
    modules(&mut cpio, kit, &names)?;
    cpio.finish()?;
    Ok(())
}

/// Busybox with a link for each of its applets, the directories to mount on, the console.
pub(crate) fn base<W: Write>(cpio: &mut Cpio<W>) -> Result<()> {
    for directory in ["proc", "sys", "dev", "tmp", "run", "root", "mnt"] {
        cpio.directory(directory)?;
    }
    cpio.device("dev/console", 5, 1)?;
    cpio.device("dev/null", 1, 3)?;
    cpio.copy("bin/busybox", Path::new(BUSYBOX))?;
    let list = Command::new(BUSYBOX).arg("--list").output().doing("asking busybox's applets")?;
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        if applet != "busybox" {
            cpio.symlink(&format!("bin/{applet}"), "busybox")?;
        }
    }
    cpio.symlink("sbin", "bin")
}

/// The named modules as `modules/NAME.ko`.
pub(crate) fn modules<W: Write>(cpio: &mut Cpio<W>, kit: &Kit, names: &[&str]) -> Result<()> {
    for name in names {
        let found = find(&kit.modules(), &format!("{name}.ko"))?;
        let found = found.ok_or_else(|| crate::failed(format_args!("no module {name}")))?;
        cpio.copy(&format!("modules/{name}.ko"), &found)?;
    }
    Ok(())
}

pub(crate) fn create(to: &Path) -> Result<BufWriter<File>> {
    let file = File::create(to).doing(format_args!("creating {}", to.display()))?;
    Ok(BufWriter::with_capacity(1 << 20, file))
}

fn find(under: &Path, name: &str) -> Result<Option<std::path::PathBuf>> {
    for entry in std::fs::read_dir(under).doing(format_args!("listing {}", under.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
