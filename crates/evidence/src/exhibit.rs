//! The exhibit: the directory that holds image and manifest, and how its files are called.

use crate::format::Format;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::sync::Arc;

/// The record.
pub const MANIFEST: &str = "manifest.json";
/// The record's signature.
pub const MANIFEST_SIG: &str = "manifest.json.sig";
/// The block records.
pub const BLOCKS: &str = "blocks.jsonl.zst";
/// The journal of the acquisition.
pub const JOURNAL: &str = "journal.jsonl";
/// What was done with the exhibit since.
pub const CUSTODY: &str = "custody.jsonl";
/// Digests of the files, for `sha256sum -c`.
pub const SUMS: &str = "SHA256SUMS";
/// QEMU's own text of the memory map, taken before the first read.
pub const MAP_BEFORE: &str = "map-before.txt";
/// The same, taken after the last read.
pub const MAP_AFTER: &str = "map-after.txt";
/// State of devices and vCPUs at the instant: the stream of a snapshot without its pages.
pub const DEVICE_STATE: &str = "device-state.bin";
/// What QEMU's dump has before memory: ELF header, program headers, and the notes with the registers of
/// the vCPUs.
pub const DUMP_HEAD: &str = "dump-head.bin";
/// The report, for a browser.
pub const REPORT_HTML: &str = "report.html";
/// The report as text.
pub const REPORT_TXT: &str = "report.txt";

/// Files that may be added or written anew after the exhibit was sealed. Neither the manifest nor
/// `SHA256SUMS` names them.
pub const ADDED_LATER: [&str; 4] = [CUSTODY, MANIFEST_SIG, REPORT_HTML, REPORT_TXT];

/// Greatest number of entries in the directory of an exhibit.
pub const MAX_ENTRIES: usize = 4096;

/// The image's name: `memory.elf`, `memory.raw`, `memory.lime`.
pub fn image_name(format: Format) -> String {
    format!("memory.{}", format.extension())
}

/// Whether `name` may be a file of an exhibit: 1 to 128 ASCII letters, digits, `.`, `_`, `-`, not
/// beginning with `.` or `-`. Such a name is one component of a path and no option.
pub fn is_file_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.len() <= 128
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-'])
        && !name.is_empty()
}

/// What an entry of the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// Anything else: a directory, a symbolic link, a device.
    Other,
}

/// One entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name; bytes that are not UTF-8 replaced.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
    /// Length of a file in bytes.
    pub len: u64,
}

/// An open file of an exhibit.
pub trait ExhibitFile: Read + Seek + Send {
    /// The first offset at or behind `offset` that may hold anything but zeros; `None` when there
    /// is none up to the end of the file (`SEEK_DATA`). Only a hint that saves time: the default,
    /// `offset` itself, is always right. The position afterwards is undefined.
    ///
    /// # Errors
    /// The file's.
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

/// The directory of an exhibit, read-only.
pub trait ExhibitDir: Sync {
    /// All entries, in any order, without `.` and `..`.
    ///
    /// # Errors
    /// The directory's; also more than [`MAX_ENTRIES`] entries.
    fn list(&self) -> io::Result<Vec<Entry>>;

    /// Opens a regular file by its name, which [`is_file_name`] accepts. Follows no symbolic link.
    ///
    /// # Errors
    /// The file's.
    fn open(&self, name: &str) -> io::Result<Box<dyn ExhibitFile>>;
}

/// An exhibit in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryExhibit {
    /// The files by name.
    pub files: BTreeMap<String, Arc<Vec<u8>>>,
}

impl MemoryExhibit {
    /// Puts a file in place, over one of the same name.
    pub fn put(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.files.insert(name.into(), Arc::new(bytes.into()));
    }

    /// The bytes of a file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(|bytes| bytes.as_slice())
    }

    /// The bytes of a file, to change them.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Vec<u8>> {
        self.files.get_mut(name).map(Arc::make_mut)
    }
}

impl ExhibitDir for MemoryExhibit {
    fn list(&self) -> io::Result<Vec<Entry>> {
        let entry = |(name, bytes): (&String, &Arc<Vec<u8>>)| Entry {
            name: name.clone(),
            kind: EntryKind::File,
            len: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        };
        Ok(self.files.iter().map(entry).collect())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ExhibitFile>> {
        let bytes = self.files.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(MemoryFile(Cursor::new(Shared(Arc::clone(bytes))))))
    }
}

struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

struct MemoryFile(Cursor<Shared>);

impl Read for MemoryFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Seek for MemoryFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

impl ExhibitFile for MemoryFile {
    /// As a filesystem with pages of 4 KiB would say it.
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let bytes = self.0.get_ref().as_ref();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = bytes.get(start..).unwrap_or_default();
        let data = rest.chunks(4096).position(|page| !is_zero(page));
        let skipped = data.and_then(|pages| u64::try_from(pages).ok()?.checked_mul(4096));
        Ok(skipped.and_then(|skipped| offset.checked_add(skipped)))
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| word == &[0; 64]) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_harmless_component() {
        for good in ["memory.elf", "SHA256SUMS", "registers.json", "a"] {
            assert!(is_file_name(good), "{good}");
        }
        let long = "a".repeat(129);
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a\\b", "a b", "a\n", "ä", &long] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn the_next_data_is_never_passed() {
        let mut bytes = vec![0; 20_000];
        bytes[9_000] = 1;
        let mut exhibit = MemoryExhibit::default();
        exhibit.put("a", bytes);
        let mut file = exhibit.open("a").unwrap();
        assert_eq!(file.next_data(0).unwrap(), Some(8192));
        assert_eq!(file.next_data(8_500).unwrap(), Some(8_500));
        assert_eq!(file.next_data(9_001).unwrap(), None);
        assert_eq!(file.next_data(99_999).unwrap(), None);
        assert!(exhibit.open("b").is_err());
    }
}
