//! Reading ahead in a stream that nobody seeks in: one buffer that bytes are lent from, and what is kept
//! of them beside it. The readers of QEMU's streams are made on it.

use std::io::{self, ErrorKind, Read};

/// Bytes read at a time: a pipe holds 64 KiB unless it was widened, a socket about 200 KiB; the
/// second-level cache holds this.
pub(crate) const BUFFER: usize = 256 << 10;

/// Reads ahead in `buffer`, whose unread part is `start..end`.
pub(crate) struct Ahead<R> {
    from: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    at: u64,
    kept: Vec<u8>,
    limit: usize,
}

/// There is no room to keep more than so many bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoRoom {
    /// Room that is left.
    pub(crate) room: usize,
}

impl<R: Read> Ahead<R> {
    /// `limit` bytes are kept at most.
    pub(crate) fn new(from: R, limit: usize) -> Self {
        Self { from, buffer: vec![0; BUFFER], start: 0, end: 0, at: 0, kept: Vec::new(), limit }
    }

    /// Offset in the stream of the next byte.
    #[inline]
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// What was read and not gone past.
    #[inline]
    pub(crate) fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Offset of the first byte that was not read yet: the stream's length, once it has ended.
    pub(crate) fn end(&self) -> u64 {
        self.at + self.unread().len() as u64
    }

    /// What was kept until now.
    pub(crate) fn kept(&self) -> &[u8] {
        &self.kept
    }

    /// Takes what was kept until now.
    pub(crate) fn take_kept(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.kept)
    }

    /// The most bytes that are kept.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// How many more bytes may be kept.
    pub(crate) fn room(&self) -> usize {
        self.limit - self.kept.len()
    }

    /// Reads more behind the unread bytes, which are less than the buffer; returns whether there
    /// was more.
    ///
    /// # Errors
    /// The reader's, but for an interruption.
    pub(crate) fn fill(&mut self) -> io::Result<bool> {
        // What is left is less than a page, or a record: moving it is cheap, and each read gets nearly
        // all the room.
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
                Err(error) => return Err(error),
            }
        }
    }

    /// Goes on without keeping; only over bytes that were read.
    #[inline]
    pub(crate) fn skip(&mut self, len: usize) {
        debug_assert!(len <= self.unread().len());
        self.start += len;
        self.at += len as u64;
    }

    /// Goes on and keeps; only over bytes that were read.
    ///
    /// # Errors
    /// [`NoRoom`]; then nothing was done.
    pub(crate) fn keep(&mut self, len: usize) -> Result<(), NoRoom> {
        let room = self.room();
        if len > room {
            return Err(NoRoom { room });
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time, is interrupted before each, and says that it gave more.
    struct Odd(u8, bool);

    impl Read for Odd {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            match (self.1, buffer.first_mut()) {
                (true, _) => Err(ErrorKind::Interrupted.into()),
                (false, Some(byte)) => {
                    *byte = self.0;
                    self.0 += 1;
                    Ok(if self.0 == 9 { usize::MAX / 2 } else { 1 })
                }
                (false, None) => Ok(0),
            }
        }
    }

    #[test]
    fn bytes_are_lent_gone_past_and_kept() {
        let mut ahead = Ahead::new(Odd(1, false), 3);
        for _ in 0..4 {
            assert!(ahead.fill().unwrap());
        }
        assert_eq!((ahead.unread(), ahead.at(), ahead.end()), (&[1, 2, 3, 4][..], 0, 4));
        ahead.keep(2).unwrap();
        ahead.skip(1);
        assert_eq!((ahead.kept(), ahead.at(), ahead.room()), (&[1, 2][..], 3, 1));
        assert!(ahead.fill().unwrap());
        assert_eq!(ahead.unread(), [4, 5]);
        assert_eq!(ahead.keep(2), Err(NoRoom { room: 1 }));
        assert_eq!(ahead.unread(), [4, 5]);
        assert_eq!(ahead.take_kept(), [1, 2]);
    }

    #[test]
    fn who_lies_about_a_count_reaches_no_further_than_the_buffer() {
        let mut ahead = Ahead::new(Odd(8, false), 0);
        assert!(ahead.fill().unwrap());
        assert_eq!(ahead.unread().len(), BUFFER);
    }
}
