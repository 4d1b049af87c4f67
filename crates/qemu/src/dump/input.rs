//! The dump's bytes: one buffer that memory is lent from, and all that stands before it beside it.

use super::DumpError;
use crate::text::Excerpt;
use std::io::{ErrorKind, Read};

/// Bytes read at a time: a pipe holds 64 KiB unless it was widened, a socket about 200 KiB.
const BUFFER: usize = 256 << 10;

/// Reads ahead in `buffer`, whose unread part is `start..end`.
pub(super) struct Input<R> {
    from: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    at: u64,
    kept: Vec<u8>,
    limit: usize,
}

impl<R: Read> Input<R> {
    pub(super) fn new(from: R, limit: usize) -> Self {
        Self { from, buffer: vec![0; BUFFER], start: 0, end: 0, at: 0, kept: Vec::new(), limit }
    }

    /// Offset in the stream of the next byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Takes what was kept until now.
    pub(super) fn take_kept(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.kept)
    }

    /// What was read and not gone past.
    pub(super) fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Offset of the first byte that was not read yet: the stream's length, once it has ended.
    pub(super) fn end(&self) -> u64 {
        self.at + self.unread().len() as u64
    }

    /// Reads more behind the unread bytes, which are less than the buffer; returns whether there
    /// was more.
    pub(super) fn fill(&mut self) -> Result<bool, DumpError> {
        // What is left is less than a page, or a header: each read gets nearly all the room.
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(read) => {
                    // A `Read` that lies about its count must not reach beyond the buffer.
                    self.end = self.buffer.len().min(self.end + read);
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(DumpError::Read { at: self.end(), source }),
            }
        }
    }

    /// Goes on without keeping; only over bytes that were read.
    pub(super) fn skip(&mut self, len: usize) {
        debug_assert!(len <= self.unread().len());
        self.start += len;
        self.at += len as u64;
    }

    /// Goes on and keeps; only over bytes that were read.
    fn keep(&mut self, len: usize) -> Result<(), DumpError> {
        self.check_room(len as u64)?;
        if self.kept.capacity() - self.kept.len() < len {
            // Twice as much as before, but never beyond the limit.
            let room = self.limit - self.kept.len();
            self.kept.reserve_exact(self.kept.len().max(len).min(room));
        }
        self.kept.extend_from_slice(&self.buffer[self.start..self.start + len]);
        self.skip(len);
        Ok(())
    }

    /// Whether `len` more bytes may be kept.
    pub(super) fn check_room(&self, len: u64) -> Result<(), DumpError> {
        let (room, limit) = ((self.limit - self.kept.len()) as u64, self.limit as u64);
        if len > room {
            return Err(DumpError::Limit { at: self.at, limit, what: "bytes before memory" });
        }
        Ok(())
    }

    /// Takes and keeps `len` bytes, as they come: nothing is reserved on the word of a length.
    pub(super) fn keep_all(&mut self, len: u64, wanted: &'static str) -> Result<(), DumpError> {
        let mut left = len;
        while left > 0 {
            if self.unread().is_empty() && !self.fill()? {
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
            if !self.fill()? {
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
        let at = self.at;
        match self.array(wanted)? {
            found if found == bytes => Ok(()),
            found => {
                let found = Excerpt::new(&format!("{found:02x?}"));
                Err(DumpError::Malformed { at, wanted, found })
            }
        }
    }
}
