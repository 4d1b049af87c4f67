//! The guest's serial port: what it printed, and a shell command at a time.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::error::{Doing, Result, failed, timed_out};

/// What the guest's init prints when it listens.
const READY: &str = "stillframe-guest-ready\n";
/// Longest line that is sent: the guest's terminal takes 4,095 bytes.
const CHUNK: usize = 2048;

/// A shell in the guest.
#[derive(Debug)]
pub(crate) struct Serial {
    stream: UnixStream,
    /// What arrived and was not yet asked for.
    unread: Vec<u8>,
    commands: u64,
}

impl Serial {
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { stream, unread: Vec::new(), commands: 0 })
    }

    pub(crate) fn wait_ready(&mut self, patience: Duration) -> Result<()> {
        self.until(READY.as_bytes(), Instant::now() + patience).map(drop).map_err(|_| {
            let seen = String::from_utf8_lossy(&self.unread);
            let tail: Vec<_> = seen.lines().rev().take(5).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            failed(format_args!("the guest is not up after {patience:?}; it said: {tail:?}"))
        })
    }

    /// Runs a script; returns what it printed on stdout and stderr, and its exit status.
    pub(crate) fn run(&mut self, script: &str, patience: Duration) -> Result<(String, i32)> {
        self.commands += 1;
        let (id, until) = (self.commands, Instant::now() + patience);
        for chunk in base64(script.as_bytes()).as_bytes().chunks(CHUNK) {
            self.send(&[b"a ", chunk, b"\n"].concat())?;
        }
        self.send(format!("x {id}\n").as_bytes())?;
        let late = |_| timed_out(format_args!("guest command `{script}`"), patience);
        self.until(format!("\n<<<{id}\n").as_bytes(), until).map_err(late)?;
        let output = self.until(format!("\n>>>{id} ").as_bytes(), until).map_err(late)?;
        let status = self.until(b"\n", until).map_err(late)?;
        let status = String::from_utf8_lossy(&status).trim().parse().doing("exit status")?;
        Ok((String::from_utf8_lossy(&output).into_owned(), status))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).doing("writing to the guest's serial port")
    }

    /// Everything up to `mark`, which is taken too.
    fn until(&mut self, mark: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let mut searched = 0;
        let mut buffer = [0; 65536];
        loop {
            let found = self.unread[searched..].windows(mark.len()).position(|w| w == mark);
            if let Some(at) = found {
                let mut taken: Vec<u8> = self.unread.drain(..searched + at + mark.len()).collect();
                taken.truncate(searched + at);
                return Ok(taken);
            }
            searched = self.unread.len().saturating_sub(mark.len());
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(failed("the guest's serial port was closed")),
                Ok(n) => self.unread.extend_from_slice(&buffer[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e.into()),
            }
            if Instant::now() > deadline {
                return Err(failed("deadline passed"));
            }
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let get = |i| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = get(0) << 16 | get(1) << 8 | get(2);
        for (i, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = usize::try_from(bits >> shift & 63).unwrap_or(0);
            text.push(if i <= group.len() { char::from(DIGITS[digit]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_as_in_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")];
        for (plain, coded) in cases {
            assert_eq!(super::base64(plain.as_bytes()), coded);
        }
    }
}
