//! The stream's bytes: one buffer that pages are lent from, and all that is not a page beside it.

use super::StreamError;
use crate::ahead::{Ahead, NoRoom};
use crate::text::Excerpt;
use std::io::Read;
use std::ops::{Deref, DerefMut};

/// The bytes, with the errors of a stream of migration.
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
    fn more(&mut self) -> Result<bool, StreamError> {
        self.fill().map_err(|source| StreamError::Read { at: self.end(), source })
    }

    /// The next `len` bytes, at most a few KiB, without going past them.
    #[inline]
    pub(super) fn peek(&mut self, len: usize, wanted: &'static str) -> Result<&[u8], StreamError> {
        while self.unread().len() < len {
            if !self.more()? {
                return Err(StreamError::Cut { at: self.end(), wanted });
            }
        }
        Ok(&self.unread()[..len])
    }

    /// `N` bytes, `skip` bytes further on.
    #[inline]
    pub(super) fn peek_array<const N: usize>(
        &mut self,
        skip: usize,
        wanted: &'static str,
    ) -> Result<&[u8; N], StreamError> {
        let at = self.at();
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

    /// Goes on and keeps; only over bytes that were peeked at.
    pub(super) fn keep(&mut self, len: usize) -> Result<(), StreamError> {
        self.0.keep(len).map_err(|NoRoom { room }| {
            let (at, limit) = (self.at() + room as u64, self.limit() as u64);
            StreamError::Limit { at, limit, what: "bytes beside the pages" }
        })
    }

    /// Keeps everything up to the stream's end.
    pub(super) fn keep_rest(&mut self) -> Result<(), StreamError> {
        loop {
            self.keep(self.unread().len())?;
            if !self.more()? {
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
        let at = self.at();
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
        let at = self.at();
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
