//! The stream's bytes: one buffer that pages are lent from, and all that is not a page beside it.

use super::StreamError;
use crate::text::Excerpt;
use std::io::{ErrorKind, Read};

/// Bytes read at a time. A socket holds about 200 KiB; the second-level cache holds this.
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

    /// What was kept until now.
    pub(super) fn kept(&self) -> &[u8] {
        &self.kept
    }

    /// What was kept.
    pub(super) fn into_kept(self) -> Vec<u8> {
        self.kept
    }

    /// Reads more behind the unread bytes; returns whether there was more.
    fn fill(&mut self) -> Result<bool, StreamError> {
        // What is left is less than a record: moving it is cheap, and each read gets all the room.
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
                Err(source) => {
                    return Err(StreamError::Read { at: self.at + self.unread(), source });
                }
            }
        }
    }

    fn unread(&self) -> u64 {
        (self.end - self.start) as u64
    }

    /// The next `len` bytes, at most a few KiB, without going past them.
    #[inline]
    pub(super) fn peek(&mut self, len: usize, wanted: &'static str) -> Result<&[u8], StreamError> {
        while self.end - self.start < len {
            if !self.fill()? {
                return Err(StreamError::Cut { at: self.at + self.unread(), wanted });
            }
        }
        Ok(&self.buffer[self.start..self.start + len])
    }

    /// `N` bytes, `skip` bytes further on.
    #[inline]
    pub(super) fn peek_array<const N: usize>(
        &mut self,
        skip: usize,
        wanted: &'static str,
    ) -> Result<&[u8; N], StreamError> {
        let at = self.at;
        let bytes = self.peek(skip + N, wanted)?;
        // It is as long as was asked for.
        bytes.last_chunk().ok_or(StreamError::Cut { at, wanted })
    }

    /// The bytes of a string, `skip` bytes further on.
    pub(super) fn peek_string(
        &mut self,
        skip: usize,
        wanted: &'static str,
    ) -> Result<&[u8], StreamError> {
        let &[len] = self.peek_array(skip, wanted)?;
        Ok(&self.peek(skip + 1 + usize::from(len), wanted)?[skip + 1..])
    }

    /// Goes on without keeping; only over bytes that were peeked at.
    #[inline]
    pub(super) fn skip(&mut self, len: usize) {
        debug_assert!(len <= self.end - self.start);
        self.start += len;
        self.at += len as u64;
    }

    /// Goes on and keeps; only over bytes that were peeked at.
    pub(super) fn keep(&mut self, len: usize) -> Result<(), StreamError> {
        let room = self.limit - self.kept.len();
        if len > room {
            let (at, limit) = (self.at + room as u64, self.limit as u64);
            return Err(StreamError::Limit { at, limit, what: "bytes beside the pages" });
        }
        if self.kept.capacity() - self.kept.len() < len {
            // Twice as much as before, but never beyond the limit.
            let more = self.kept.len().max(BUFFER).max(len).min(room);
            self.kept.reserve_exact(more);
        }
        self.kept.extend_from_slice(&self.buffer[self.start..self.start + len]);
        self.skip(len);
        Ok(())
    }

    /// Keeps everything up to the stream's end.
    pub(super) fn keep_rest(&mut self) -> Result<(), StreamError> {
        loop {
            self.keep(self.end - self.start)?;
            if !self.fill()? {
                return Ok(());
            }
        }
    }

    /// The next byte, which is not gone past.
    pub(super) fn next_byte(&mut self, wanted: &'static str) -> Result<u8, StreamError> {
        let &[byte] = self.peek_array(0, wanted)?;
        Ok(byte)
    }

    /// Takes and keeps `N` bytes.
    pub(super) fn array<const N: usize>(
        &mut self,
        wanted: &'static str,
    ) -> Result<[u8; N], StreamError> {
        let bytes = *self.peek_array(0, wanted)?;
        self.keep(N)?;
        Ok(bytes)
    }

    pub(super) fn be16(&mut self, wanted: &'static str) -> Result<u16, StreamError> {
        self.array(wanted).map(u16::from_be_bytes)
    }

    pub(super) fn be32(&mut self, wanted: &'static str) -> Result<u32, StreamError> {
        self.array(wanted).map(u32::from_be_bytes)
    }

    pub(super) fn be64(&mut self, wanted: &'static str) -> Result<u64, StreamError> {
        self.array(wanted).map(u64::from_be_bytes)
    }

    /// Takes and keeps bytes that must be these.
    pub(super) fn expect<const N: usize>(
        &mut self,
        bytes: [u8; N],
        wanted: &'static str,
    ) -> Result<(), StreamError> {
        let at = self.at;
        match self.array(wanted)? {
            found if found == bytes => Ok(()),
            found => {
                let found = Excerpt::new(&format!("{found:02x?}"));
                Err(StreamError::Malformed { at, wanted, found })
            }
        }
    }

    /// Takes and keeps text of `len` bytes, at most a few KiB.
    pub(super) fn text(&mut self, len: usize, wanted: &'static str) -> Result<String, StreamError> {
        let at = self.at;
        let bytes = self.peek(len, wanted)?;
        // QEMU's names are ids and paths: what is not printable is not one of them.
        let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains(char::is_control));
        let Some(text) = text.map(str::to_owned) else {
            return Err(StreamError::Malformed { at, wanted, found: quoted(bytes) });
        };
        self.keep(len)?;
        Ok(text)
    }

    /// Takes and keeps a string.
    pub(super) fn string(&mut self, wanted: &'static str) -> Result<String, StreamError> {
        let [len] = self.array(wanted)?;
        self.text(len.into(), wanted)
    }
}

/// Foreign text in quotes, as it may stand in an error.
pub(super) fn quoted(bytes: &[u8]) -> Excerpt {
    Excerpt::new(&format!("{:?}", Excerpt::of_bytes(bytes)))
}
