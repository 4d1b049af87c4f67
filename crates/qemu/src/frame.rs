//! Cuts the monitor's byte stream into JSON objects.
//!
//! QMP sends one object a line, but a monitor with `pretty=on` spreads an object over lines, so
//! the cut is made where braces balance and not at line ends. Each byte is looked at once.

use crate::text::Excerpt;

/// Why the stream holds no more messages.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// A message grew past the limit.
    TooLong,
    /// A byte that starts no object stands between messages.
    Garbage(Excerpt),
}

/// Bytes received and not yet handed out.
#[derive(Debug, Default)]
pub(crate) struct Framer {
    buf: Vec<u8>,
    /// Bytes at the front of `buf` that were looked at.
    seen: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// Adds received bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Whether nothing but white space is waiting.
    pub(crate) fn is_empty(&self) -> bool {
        self.buf.iter().all(u8::is_ascii_whitespace)
    }

    /// The next whole object; `None` when more bytes are needed.
    pub(crate) fn next(&mut self, limit: usize) -> Result<Option<Vec<u8>>, FrameError> {
        while let Some(&byte) = self.buf.get(self.seen) {
            self.seen += 1;
            if self.depth == 0 {
                match byte {
                    b'{' => self.depth = 1,
                    b if b.is_ascii_whitespace() => self.drop_front(),
                    _ => {
                        let from = self.seen - 1;
                        let rest = self.buf.get(from..).unwrap_or_default();
                        return Err(FrameError::Garbage(Excerpt::of_bytes(rest)));
                    }
                }
                continue;
            }
            if self.seen > limit {
                return Err(FrameError::TooLong);
            }
            self.step(byte);
            if self.depth == 0 {
                let rest = self.buf.split_off(self.seen);
                self.seen = 0;
                return Ok(Some(std::mem::replace(&mut self.buf, rest)));
            }
        }
        Ok(None)
    }

    fn step(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
    }

    /// Forgets white space between messages. A run of it is dropped at once, so that a peer that
    /// sends only white space costs no quadratic time.
    fn drop_front(&mut self) {
        let rest = self.buf.iter().position(|b| !b.is_ascii_whitespace());
        self.buf.drain(..rest.unwrap_or(self.buf.len()));
        self.seen = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(framer: &mut Framer) -> Vec<String> {
        let mut out = Vec::new();
        while let Ok(Some(message)) = framer.next(1 << 20) {
            out.push(String::from_utf8(message).unwrap());
        }
        out
    }

    #[test]
    fn braces_in_strings_do_not_count() {
        let mut framer = Framer::default();
        framer.push(b"\r\n{\"a\":\"}\\\"{\"}\r\n{\r\n  \"b\": [1, {}]\r\n}\r\n{\"c\"");
        assert_eq!(all(&mut framer), ["{\"a\":\"}\\\"{\"}", "{\r\n  \"b\": [1, {}]\r\n}"]);
        assert!(!framer.is_empty());
    }

    #[test]
    fn garbage_and_length_are_refused() {
        let mut framer = Framer::default();
        framer.push(b"  220 mail ready");
        assert!(
            matches!(framer.next(100), Err(FrameError::Garbage(e)) if e.to_string().starts_with("220"))
        );
        let mut framer = Framer::default();
        framer.push(b"{\"");
        framer.push(&[b'x'; 200]);
        assert_eq!(framer.next(100), Err(FrameError::TooLong));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_messages(cuts in proptest::collection::vec(1usize..9, 0..40)) {
            let text = b" {\"a\":{\"b\":[\"}\"]}}\n{}\n{\"c\":\"\\\\\"}";
            let mut framer = Framer::default();
            let mut out = Vec::new();
            let mut at = 0;
            for cut in cuts.into_iter().chain([text.len()]) {
                let end = (at + cut).min(text.len());
                framer.push(&text[at..end]);
                at = end;
                out.extend(all(&mut framer));
            }
            prop_assert_eq!(out, ["{\"a\":{\"b\":[\"}\"]}}", "{}", "{\"c\":\"\\\\\"}"]);
        }

        #[test]
        fn no_bytes_panic(chunks in proptest::collection::vec(any::<Vec<u8>>(), 0..8)) {
            let mut framer = Framer::default();
            for chunk in chunks {
                framer.push(&chunk);
                while let Ok(Some(_)) = framer.next(64) {}
            }
        }
    }
}
