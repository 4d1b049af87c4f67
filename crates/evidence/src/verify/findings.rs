//! Findings: each names a place.

use crate::GuestRange;
use crate::exhibit::{self, is_file_name};
use crate::range::hex;
use serde::Serialize;
use std::fmt;

/// Greatest number of findings that a verdict lists.
pub const MAX_FINDINGS: usize = 1000;

/// Where something is not as sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Place {
    /// A file as a whole.
    File {
        /// Its name, as the directory or a list has it: it may be any text.
        file: String,
    },
    /// Bytes of a file.
    Bytes {
        /// Its name.
        file: String,
        /// Offset of the first.
        offset: u64,
        /// Their number.
        len: u64,
    },
    /// A line of a text file.
    Line {
        /// Its name.
        file: String,
        /// Number of the line, from 1.
        line: u64,
    },
    /// A block of guest memory in the image or in the block records.
    Block {
        /// The file in which it is wrong.
        file: String,
        /// First guest-physical address.
        #[serde(serialize_with = "hex::serialize")]
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A field of the manifest.
    Field {
        /// Always `manifest.json`.
        file: String,
        /// The field, as a path: `image.len`.
        field: String,
    },
}

impl Place {
    /// The file that is not as sealed.
    pub fn file(&self) -> &str {
        match self {
            Place::File { file }
            | Place::Bytes { file, .. }
            | Place::Line { file, .. }
            | Place::Block { file, .. }
            | Place::Field { file, .. } => file,
        }
    }

    /// The block, when the place is one.
    pub fn block(&self) -> Option<GuestRange> {
        match *self {
            Place::Block { gpa, len, .. } => GuestRange::new(gpa, len),
            _ => None,
        }
    }

    /// The place of a block in `file`.
    pub(super) fn of_block(file: &str, range: GuestRange) -> Place {
        Place::Block { file: file.into(), gpa: range.start(), len: range.len() }
    }

    /// The place of a field of the manifest.
    pub(super) fn of_field(field: impl Into<String>) -> Place {
        Place::Field { file: exhibit::MANIFEST.into(), field: field.into() }
    }

    /// The place of a whole file.
    pub(super) fn of_file(file: &str) -> Place {
        Place::File { file: file.into() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.file() {
            name if is_file_name(name) => f.write_str(name)?,
            // Whoever made the directory chose the name: no control characters to the terminal.
            name => write!(f, "{name:?}")?,
        }
        match self {
            Place::File { .. } => Ok(()),
            Place::Bytes { offset, len, .. } => write!(f, " at offset {offset:#x}, {len} bytes"),
            Place::Line { line, .. } => write!(f, " line {line}"),
            Place::Block { gpa, len, .. } => write!(f, " block {gpa:#x}, {len} bytes"),
            Place::Field { field, .. } => write!(f, " field {field}"),
        }
    }
}

/// Something that is not as sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where.
    pub place: Place,
    /// What.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Findings up to [`MAX_FINDINGS`], and the number of the others.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    list: Vec<Finding>,
    more: u64,
}

impl Findings {
    pub(super) fn add(&mut self, place: Place, text: impl Into<String>) {
        if self.list.len() < MAX_FINDINGS {
            self.list.push(Finding { place, text: text.into() });
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    pub(super) fn file(&mut self, file: &str, text: impl Into<String>) {
        self.add(Place::of_file(file), text);
    }

    pub(super) fn line(&mut self, file: &str, line: u64, text: impl Into<String>) {
        self.add(Place::Line { file: file.into(), line }, text);
    }

    pub(super) fn field(&mut self, field: impl Into<String>, text: impl Into<String>) {
        self.add(Place::of_field(field), text);
    }

    /// Takes all of `other`, blocks in address order.
    pub(super) fn append(&mut self, other: Findings) {
        let mut list = other.list;
        list.sort_by_key(|finding| match finding.place {
            Place::Block { gpa, .. } => Some(gpa),
            _ => None,
        });
        for finding in list {
            self.add(finding.place, finding.text);
        }
        self.more = self.more.saturating_add(other.more);
    }

    /// Counts findings that are not listed.
    pub(super) fn add_more(&mut self, count: u64) {
        self.more = self.more.saturating_add(count);
    }

    /// Number of findings, listed or not.
    pub(super) fn count(&self) -> u64 {
        u64::try_from(self.list.len()).unwrap_or(u64::MAX).saturating_add(self.more)
    }

    pub(super) fn first(&self) -> Option<&Finding> {
        self.list.first()
    }

    /// Whether any finding listed is in `file`.
    pub(super) fn name(&self, file: &str) -> bool {
        self.list.iter().any(|finding| finding.place.file() == file)
    }

    pub(super) fn finish(self) -> (Vec<Finding>, u64) {
        (self.list, self.more)
    }
}
