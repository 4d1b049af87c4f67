//! The dump's bytes: one buffer that memory is lent from, and all that stands before it beside it.

use super::DumpError;
use crate::ahead::{Ahead, NoRoom};
use crate::text::Excerpt;
use std::io::Read;
use std::ops::{Deref, DerefMut};

/// The bytes, with the errors of a dump.
pub(super) struct Input<R>(Ahead<R>);

impl<R> Deref for Input<R> {
    type Target = Ahead<R>;

    fn deref(&self) -> &Ahead<R> {
        &self.0
    }
}

impl<R> DerefMut for Input<R> {
    fn deref_mut(&mut self) -> &mut Ahead<R> {
        &mut self.0
    }
}

impl<R: Read> Input<R> {
    pub(super) fn new(from: R, limit: usize) -> Self {
        Self(Ahead::new(from, limit))
    }

    /// Reads more; returns whether there was more.
    pub(super) fn more(&mut self) -> Result<bool, DumpError> {
        self.fill().map_err(|source| DumpError::Read { at: self.end(), source })
    }

    /// Goes on and keeps; only over bytes that were read.
    fn keep(&mut self, len: usize) -> Result<(), DumpError> {
        self.0.keep(len).map_err(|NoRoom { .. }| self.no_room())
    }

    /// Whether `len` more bytes may be kept.
    pub(super) fn check_room(&self, len: u64) -> Result<(), DumpError> {
        if len > self.room() as u64 { Err(self.no_room()) } else { Ok(()) }
    }

    fn no_room(&self) -> DumpError {
        let limit = self.limit() as u64;
        DumpError::Limit { at: self.at(), limit, what: "bytes before memory" }
    }

    /// Takes and keeps `len` bytes, as they come: nothing is reserved on the word of a length.
    pub(super) fn keep_all(&mut self, len: u64, wanted: &'static str) -> Result<(), DumpError> {
        let mut left = len;
        while left > 0 {
            if self.unread().is_empty() && !self.more()? {
                return Err(DumpError::Cut { at: self.end(), wanted });
            }
            let unread = self.unread().len();
            let piece = usize::try_from(left).unwrap_or(unread).min(unread);
            self.keep(piece)?;
            left -= piece as u64;
        }
        Ok(())
    }

    /// Takes and keeps `N` bytes.
    pub(super) fn array<const N: usize>(
        &mut self,
        wanted: &'static str,
    ) -> Result<[u8; N], DumpError> {
        loop {
            if let Some(bytes) = self.unread().first_chunk().copied() {
                self.keep(N)?;
                return Ok(bytes);
            }
            if !self.more()? {
                return Err(DumpError::Cut { at: self.end(), wanted });
            }
        }
    }

    pub(super) fn u16(&mut self, wanted: &'static str) -> Result<u16, DumpError> {
        self.array(wanted).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, wanted: &'static str) -> Result<u32, DumpError> {
        self.array(wanted).map(u32::from_le_bytes)
    }

    /// An address, offset or size: of 8 bytes in an ELF64, of 4 in an ELF32.
    pub(super) fn word(&mut self, wide: bool, wanted: &'static str) -> Result<u64, DumpError> {
        match wide {
            true => self.array(wanted).map(u64::from_le_bytes),
            false => self.u32(wanted).map(u64::from),
        }
    }

    /// Takes and keeps bytes that must be these.
    pub(super) fn expect<const N: usize>(
        &mut self,
        bytes: [u8; N],
        wanted: &'static str,
    ) -> Result<(), DumpError> {
        let at = self.at();
        match self.array(wanted)? {
            found if found == bytes => Ok(()),
            found => {
                let found = Excerpt::new(&format!("{found:02x?}"));
                Err(DumpError::Malformed { at, wanted, found })
            }
        }
    }
}
