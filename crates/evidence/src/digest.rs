//! SHA-256 in its one spelling, and the memory root.

use crate::GuestRange;
use crate::format::Layout;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

/// A SHA-256 digest. Its only spelling is 64 lower-case hexadecimal digits, as `sha256sum`
/// prints it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// All bits zero: what stands before the first line of a hash chain.
    pub const ZERO: Digest = Digest([0; 32]);
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 64 lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a SHA-256 digest of 64 lower-case hexadecimal digits")]
pub struct NotADigest;

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(NotADigest),
        };
        let mut bytes = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != bytes.len() || !rest.is_empty() {
            return Err(NotADigest);
        }
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = nibble(*high)? << 4 | nibble(*low)?;
        }
        Ok(Digest(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(|NotADigest| D::Error::custom(format!("{NotADigest}: {text:?}")))
    }
}

impl JsonSchema for Digest {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Sha256".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9a-f]{64}$",
            "description": "SHA-256 as 64 lower-case hexadecimal digits"
        })
    }
}

/// SHA-256 of bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes taken.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes through to `out` and keeps the digest and the number of the bytes written.
pub struct HashingWriter<W> {
    out: W,
    hasher: Hasher,
    len: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Nothing written yet.
    pub fn new(out: W) -> Self {
        Self { out, hasher: Hasher::default(), len: 0 }
    }

    /// The writer beneath, the digest of what it was given, and its length in bytes.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.out, self.hasher.finish(), self.len)
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(bytes.get(..written).unwrap_or(bytes));
        self.len = self.len.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// SHA-256 of `len` zero bytes.
pub fn sha256_of_zeros(len: u64) -> Digest {
    let mut hasher = Hasher::default();
    // A vector of zeros as source cannot fail and gives exactly `len` bytes.
    let _ = io::copy(&mut io::repeat(0).take(len), &mut hasher);
    hasher.finish()
}

/// SHA-256 over `offset u64le | len u64le | bytes` of every header and note of an image, by offset.
pub fn other_bytes_sha256(layout: &Layout) -> Digest {
    let mut hasher = Hasher::default();
    for piece in &layout.pieces {
        hasher.update(&piece.offset.to_le_bytes());
        hasher.update(&u64::try_from(piece.bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(&piece.bytes);
    }
    hasher.finish()
}

/// The memory root: SHA-256 over, in address order, `start u64le | len u64le | known u8 |
/// sha256[32]` of every block (DESIGN: the exhibit).
///
/// `known` is true when all bytes of the block are known, that is when no page of it is
/// unreadable or excluded. States do not enter otherwise, so the root is the same for every
/// method, read size and format.
pub fn memory_root(blocks: impl IntoIterator<Item = (GuestRange, bool, Digest)>) -> Digest {
    let mut root = MemoryRoot::default();
    for (range, known, digest) in blocks {
        root.add(range, known, digest);
    }
    root.finish()
}

/// [`memory_root`] for blocks that come one by one, in address order.
#[derive(Clone, Default)]
pub struct MemoryRoot(Hasher);

impl MemoryRoot {
    /// Takes the next block.
    pub fn add(&mut self, range: GuestRange, known: bool, digest: Digest) {
        self.0.update(&range.start().to_le_bytes());
        self.0.update(&range.len().to_le_bytes());
        self.0.update(&[u8::from(known)]);
        self.0.update(&digest.0);
    }

    /// The root of all blocks taken.
    pub fn finish(self) -> Digest {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_have_one_spelling() {
        // FIPS 180-4, the empty message.
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b"").to_string(), empty);
        assert_eq!(empty.parse(), Ok(sha256(b"")));
        assert_eq!(serde_json::to_string(&sha256(b"")).unwrap(), format!("\"{empty}\""));
        assert_eq!(serde_json::from_str::<Digest>(&format!("\"{empty}\"")).unwrap(), sha256(b""));
        let upper = empty.to_uppercase();
        let long = format!("{empty}0");
        for bad in ["", &empty[1..], &long, &upper, &empty.replace('e', "g")] {
            assert_eq!(bad.parse::<Digest>(), Err(NotADigest), "{bad}");
        }
    }

    #[test]
    fn zeros_in_pieces_and_at_once() {
        assert_eq!(sha256_of_zeros(0), sha256(b""));
        assert_eq!(sha256_of_zeros(100_001), sha256(&vec![0; 100_001]));
    }

    #[test]
    fn a_hashing_writer_counts_what_was_written() {
        let mut out = HashingWriter::new(Vec::new());
        out.write_all(b"still").unwrap();
        out.write_all(b"frame").unwrap();
        let (bytes, digest, len) = out.finish();
        assert_eq!((bytes.as_slice(), len), (&b"stillframe"[..], 10));
        assert_eq!(digest, sha256(b"stillframe"));
    }

    /// Computed with Python:
    /// `h = hashlib.sha256(); s = hashlib.sha256`
    /// `h.update(struct.pack('<QQB', 0, 0xa0000, 1) + s(b'a').digest())`
    /// `h.update(struct.pack('<QQB', 0x100000000, 0x100000, 0) + s(b'b').digest())`
    #[test]
    fn the_memory_root_is_what_python_says() {
        let blocks = [
            (GuestRange::new(0, 0xa_0000).unwrap(), true, sha256(b"a")),
            (GuestRange::new(0x1_0000_0000, 0x10_0000).unwrap(), false, sha256(b"b")),
        ];
        assert_eq!(
            memory_root(blocks).to_string(),
            "69cd242bc9bdd5544049fe5115f8d58f9669e355d39433916814c35c9a35170a"
        );
        assert_eq!(memory_root([]), sha256(b""));
    }
}
