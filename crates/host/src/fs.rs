//! File systems: space, kind, and opening what another process has open.

use crate::HostError;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `f_type` of hugetlbfs (kernel: include/uapi/linux/magic.h, as all numbers here).
const HUGETLBFS: u64 = 0x9584_58f6;
/// `f_type` of tmpfs, memfd and shm.
const TMPFS: u64 = 0x0102_1994;

/// Space and kind of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Bytes that an ordinary user could still write.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
    /// Its kind: `ext4`, `nfs`, or the magic number in hexadecimal.
    pub kind: String,
    /// Device, as `st_dev`: the same for all files of the file system.
    pub dev: u64,
}

/// The file system that holds `path`.
///
/// # Errors
/// `path` does not exist or may not be looked at.
pub fn file_system(path: &Path) -> Result<FileSystem, HostError> {
    let look = || -> io::Result<FileSystem> {
        let space = rustix::fs::statvfs(path)?;
        let magic = rustix::fs::statfs(path)?.f_type.cast_unsigned();
        Ok(FileSystem {
            free: space.f_bavail.saturating_mul(space.f_frsize),
            total: space.f_blocks.saturating_mul(space.f_frsize),
            kind: kind(magic),
            dev: std::fs::metadata(path)?.dev(),
        })
    };
    look().map_err(|e| HostError::file(path.display().to_string(), e))
}

/// The usual name of a file system's magic number.
fn kind(magic: u64) -> String {
    let known = [
        (0xef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x2fc1_2fc1, "zfs"),
        (0xca45_1a4e, "bcachefs"),
        (0xf2f5_2010, "f2fs"),
        (TMPFS, "tmpfs"),
        (0x8584_58f6, "ramfs"),
        (HUGETLBFS, "hugetlbfs"),
        (0x794c_7630, "overlay"),
        (0x6969, "nfs"),
        (0xff53_4d42, "cifs"),
        (0xfe53_4d42, "smb"),
        (0x6573_5546, "fuse"),
        (0x00c3_6400, "ceph"),
        (0x0102_1997, "9p"),
        (0x4d44, "vfat"),
        (0x2011_bab0, "exfat"),
    ];
    let name = known.iter().find(|(m, _)| *m == magic);
    name.map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).to_owned())
}

fn magic_of(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::fstatfs(file)?.f_type.cast_unsigned())
}

/// Whether `file` lies on hugetlbfs (also a memfd with MFD_HUGETLB).
pub(crate) fn is_hugetlbfs(file: &File) -> io::Result<bool> {
    Ok(magic_of(file)? == HUGETLBFS)
}

/// Whether `file` lives in memory, without a disk behind it.
pub(crate) fn is_in_memory(file: &File) -> io::Result<bool> {
    Ok(matches!(magic_of(file)?, TMPFS | HUGETLBFS | 0x8584_58f6))
}

/// Bytes free for an ordinary user on the file system of `file`.
pub(crate) fn free_beside(file: &File) -> io::Result<u64> {
    let space = rustix::fs::fstatvfs(file)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// Opens `name` under `dir` (a `/proc/PID` directory) for reading and nothing else; does not
/// touch the file's access time where the kernel allows that.
pub(crate) fn open_reading(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = |flags| rustix::fs::openat(dir.as_fd(), name, flags, Mode::empty());
    let fd = match open(flags | OFlags::NOATIME) {
        // Only the owner and CAP_FOWNER may ask for NOATIME.
        Err(Errno::PERM) => open(flags)?,
        result => result?,
    };
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_a_file_system_with_a_number_and_tmp_has_space() {
        assert_eq!(file_system(Path::new("/proc")).unwrap().kind, "0x9fa0");
        let tmp = file_system(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(tmp.total >= tmp.free && tmp.total > 0);
        let error = file_system(Path::new("/proc/no such")).unwrap_err().to_string();
        assert!(error.contains("/proc/no such"), "{error}");
    }

    #[test]
    fn a_memfd_is_in_memory_and_not_hugetlbfs() {
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        assert!(is_in_memory(&file).unwrap() && !is_hugetlbfs(&file).unwrap());
        assert_eq!(kind(magic_of(&file).unwrap()), "tmpfs");
    }
}
