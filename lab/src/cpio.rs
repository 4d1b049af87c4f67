//! Initramfs archives: the `newc` format of cpio, as the kernel unpacks it
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Several may stand in a row.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Doing, Result};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// An archive being written. Parents of every entry are added by themselves.
#[derive(Debug)]
pub(crate) struct Cpio<W: Write> {
    out: W,
    written: u64,
    inode: u32,
    seen: BTreeSet<String>,
}

impl<W: Write> Cpio<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 1, seen: BTreeSet::new() }
    }

    /// A directory, with its parents. A second time does nothing.
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        if path.is_empty() || self.seen.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// A regular file with these bytes and permission bits.
    pub(crate) fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, FILE | (mode & 0o7777), (0, 0), bytes)
    }

    /// A regular file with bytes and permissions of one on this machine (symlinks followed).
    pub(crate) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let bytes = fs::read(from).doing(format_args!("reading {}", from.display()))?;
        let mode = fs::metadata(from)?.permissions().mode();
        self.file(path, mode, &bytes)
    }

    /// A symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        self.entry(path, SYMLINK, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.parents(path)?;
        self.entry(path, CHARACTER, (major, minor), &[])
    }

    /// A tree of this machine under `path`, files and directories that `wanted` accepts.
    pub(crate) fn tree(
        &mut self,
        path: &str,
        from: &Path,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        let mut entries: Vec<_> = fs::read_dir(from)
            .doing(format_args!("listing {}", from.display()))?
            .collect::<std::io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let inside = format!("{path}/{name}");
            let (kind, from) = (entry.file_type()?, entry.path());
            if kind.is_dir() {
                self.tree(&inside, &from, wanted)?;
            } else if !wanted(&name) {
                continue;
            } else if kind.is_symlink() {
                self.symlink(&inside, &fs::read_link(&from)?.to_string_lossy())?;
            } else {
                self.copy(&inside, &from)?;
            }
        }
        Ok(())
    }

    /// Writes the trailer.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> Result<()> {
        if !self.seen.insert(path.to_owned()) {
            return Ok(());
        }
        let size = u32::try_from(bytes.len()).doing(format_args!("{path} in an initramfs"))?;
        let name_size = u32::try_from(path.len() + 1)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields =
            [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.inode += 1;
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(b"\0")?;
        self.align()?;
        self.put(bytes)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.written += u64::try_from(bytes.len())?;
        Ok(())
    }

    fn align(&mut self) -> Result<()> {
        while !self.written.is_multiple_of(4) {
            self.put(b"\0")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_parents_once_and_a_trailer() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.file("a/b/one", 0o755, b"hello").expect("written");
        cpio.file("a/b/two", 0o644, b"").expect("written");
        let bytes = cpio.finish().expect("finished");
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5, "a, a/b, one, two, trailer");
        assert!(text.contains("TRAILER!!!") && text.contains("hello"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
