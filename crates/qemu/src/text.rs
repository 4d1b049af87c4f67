//! Foreign text in our messages: bounded and printable.

use std::fmt;

/// Characters of foreign text that one message shows.
const SHOWN: usize = 160;

/// Text that QEMU or its user wrote, as it may stand in an error: at most 160 characters, control
/// characters escaped.
#[derive(Clone, PartialEq, Eq)]
pub struct Excerpt(String);

impl Excerpt {
    /// Cuts and escapes `text`.
    pub fn new(text: &str) -> Self {
        let mut out = String::new();
        for (count, c) in text.chars().enumerate() {
            if count == SHOWN {
                out.push_str("...");
                break;
            }
            // Quotes and backslashes stay readable; what could move a terminal's cursor does not.
            if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
                out.extend(c.escape_unicode());
            } else {
                out.push(c);
            }
        }
        Self(out)
    }

    /// As [`Excerpt::new`], of bytes that need not be UTF-8.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        // Four bytes are the most that a character has.
        Self::new(&String::from_utf8_lossy(bytes.get(..SHOWN * 4 + 4).unwrap_or(bytes)))
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

/// Number written in hexadecimal digits without a prefix; no sign, no underscore.
pub(crate) fn hex(digits: &str) -> Option<u64> {
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// Number written as `0x` and hexadecimal digits.
pub(crate) fn hex_0x(text: &str) -> Option<u64> {
    hex(text.strip_prefix("0x")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_bounded_and_printable() {
        assert_eq!(Excerpt::new("a\u{1b}[2Jb").to_string(), "a\\u{1b}[2Jb");
        assert_eq!(Excerpt::new(&"x".repeat(500)).to_string().len(), SHOWN + 3);
        assert_eq!(Excerpt::of_bytes(b"ok\xff").to_string(), "ok\u{fffd}");
    }

    #[test]
    fn hex_is_strict() {
        assert_eq!(hex("00ff"), Some(255));
        assert_eq!(hex_0x("0xff"), Some(255));
        for bad in ["", "+1", "-1", "1_0", "10000000000000000", "g"] {
            assert_eq!(hex(bad), None, "{bad}");
        }
    }
}
