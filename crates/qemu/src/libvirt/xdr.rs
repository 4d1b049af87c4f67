//! XDR (RFC 4506), as much of it as libvirt's calls need: numbers, strings, optional values, arrays.
//!
//! Decoding trusts nothing: every length is held against what is there before anything is taken, and
//! what is left over is an error.

use std::fmt;

/// Longest string of libvirt's protocol (`VIR_NET_MESSAGE_STRING_MAX`, `virnetprotocol.x`).
pub(super) const MAX_STRING: usize = 4 << 20;

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// They end too soon.
    #[error("it ends {missing} bytes too soon")]
    Short {
        /// Bytes that are missing at least.
        missing: usize,
    },
    /// A length is greater than it may be.
    #[error("{what} of {len}, and {most} is the most")]
    Long {
        /// What it is the length of.
        what: &'static str,
        /// The length.
        len: u64,
        /// The most that it may be.
        most: usize,
    },
    /// A string is no UTF-8 text: libvirt's names and documents all are.
    #[error("a string is not UTF-8")]
    Text,
    /// What must be 0 or 1 is neither.
    #[error("{0} where only 0 or 1 may stand")]
    Bool(u32),
    /// Padding is not zero.
    #[error("the padding is not zero")]
    Padding,
    /// There is more than was to be decoded.
    #[error("{0} bytes are left over")]
    Left(usize),
}

/// Bytes that grow.
#[derive(Default)]
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(super) fn i32(&mut self, value: i32) -> &mut Self {
        self.u32(value.cast_unsigned())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// Opaque bytes of a length that both sides know, which must be a multiple of 4.
    pub(super) fn fixed(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Opaque bytes, or a string, with their length.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        // Nothing that is sent comes near this.
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A pointer that may be null.
    pub(super) fn optional<T>(
        &mut self,
        value: Option<T>,
        encode: impl FnOnce(&mut Self, T),
    ) -> &mut Self {
        self.u32(u32::from(value.is_some()));
        if let Some(value) = value {
            encode(self, value);
        }
        self
    }

    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

/// Bytes that are taken from the front.
pub(super) struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], XdrError> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(XdrError::Short { missing: len.saturating_sub(self.0.len()) })?;
        self.0 = rest;
        Ok(taken)
    }

    /// Opaque bytes of a length that both sides know, which must be a multiple of 4.
    pub(super) fn fixed<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, XdrError> {
        self.fixed().map(u32::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, XdrError> {
        self.fixed().map(i32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, XdrError> {
        self.fixed().map(u64::from_be_bytes)
    }

    pub(super) fn i64(&mut self) -> Result<i64, XdrError> {
        self.fixed().map(i64::from_be_bytes)
    }

    fn len(&mut self, what: &'static str, most: usize) -> Result<usize, XdrError> {
        let len = self.u32()?;
        match usize::try_from(len) {
            Ok(len) if len <= most => Ok(len),
            _ => Err(XdrError::Long { what, len: len.into(), most }),
        }
    }

    /// Opaque bytes with their length.
    pub(super) fn bytes(&mut self, most: usize) -> Result<&'a [u8], XdrError> {
        let len = self.len("bytes", most)?;
        let bytes = self.take(len)?;
        let padding = self.take(len.next_multiple_of(4) - len)?;
        match padding.iter().all(|byte| *byte == 0) {
            true => Ok(bytes),
            false => Err(XdrError::Padding),
        }
    }

    pub(super) fn string(&mut self) -> Result<String, XdrError> {
        let bytes = self.bytes(MAX_STRING)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| XdrError::Text)
    }

    /// A pointer that may be null.
    pub(super) fn optional<T>(
        &mut self,
        decode: impl FnOnce(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Option<T>, XdrError> {
        match self.u32()? {
            0 => Ok(None),
            1 => decode(self).map(Some),
            other => Err(XdrError::Bool(other)),
        }
    }

    /// As many values as are said, each of which takes 4 bytes at least.
    pub(super) fn array<T>(
        &mut self,
        most: usize,
        mut decode: impl FnMut(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Vec<T>, XdrError> {
        let len = self.len("an array", most)?;
        if let Some(missing) = (len * 4).checked_sub(self.0.len()).filter(|missing| *missing > 0) {
            return Err(XdrError::Short { missing });
        }
        (0..len).map(|_| decode(self)).collect()
    }

    /// That was all.
    pub(super) fn end(self) -> Result<(), XdrError> {
        if self.0.is_empty() { Ok(()) } else { Err(XdrError::Left(self.0.len())) }
    }
}

impl fmt::Debug for Decoder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(encode: impl FnOnce(&mut Encoder)) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encode(&mut encoder);
        encoder.take()
    }

    #[test]
    fn the_wire_is_that_of_rfc_4506() {
        let bytes = encoded(|e| {
            e.i32(-2).u64(0x0102_0304_0506_0708).bytes(b"abcde").fixed(&[9; 4]);
            e.optional(Some("x"), |e, text| {
                e.bytes(text.as_bytes());
            });
            e.optional(None::<()>, |_, ()| {});
        });
        let text = b"\xff\xff\xff\xfe\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x05abcde\0\0\0\
                     \x09\x09\x09\x09\0\0\0\x01\0\0\0\x01x\0\0\0\0\0\0\0";
        assert_eq!(bytes, text);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let string = |bytes: &[u8]| Decoder::new(bytes).string();
        assert_eq!(string(b"\0\0\0\x05abcde\0\0\0").unwrap(), "abcde");
        assert_eq!(string(b"\0\0\0"), Err(XdrError::Short { missing: 1 }));
        assert_eq!(string(b"\0\0\0\x05abcd"), Err(XdrError::Short { missing: 1 }));
        assert_eq!(string(b"\0\0\0\x05abcde\0\0"), Err(XdrError::Short { missing: 1 }));
        assert_eq!(string(b"\0\0\0\x05abcde\0\0\x01"), Err(XdrError::Padding));
        assert_eq!(string(b"\0\0\0\x04\xff\xfe\xfd\xfc"), Err(XdrError::Text));
        assert!(matches!(string(b"\xff\xff\xff\xff"), Err(XdrError::Long { .. })));
        let optional = |bytes: &[u8]| Decoder::new(bytes).optional(Decoder::u32);
        assert_eq!(optional(&[0, 0, 0, 2]), Err(XdrError::Bool(2)));
        let array = |bytes: &[u8]| Decoder::new(bytes).array(1 << 20, Decoder::u32);
        assert_eq!(array(b"\0\0\0\x02\0\0\0\x07\0\0\0\x08"), Ok(vec![7, 8]));
        // Nothing is set aside for what is only said.
        assert!(matches!(array(b"\0\x0f\xff\xff\0\0\0\x07"), Err(XdrError::Short { .. })));
        assert_eq!(Decoder::new(b"abc").end(), Err(XdrError::Left(3)));
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(
            numbers in proptest::collection::vec(any::<u32>(), 0..9),
            text in ".{0,40}",
            maybe in proptest::option::of(any::<i32>()),
            wide in any::<u64>(),
        ) {
            let bytes = encoded(|e| {
                e.u32(u32::try_from(numbers.len()).unwrap());
                numbers.iter().for_each(|n| { e.u32(*n); });
                e.bytes(text.as_bytes()).optional(maybe, |e, n| { e.i32(n); }).u64(wide);
            });
            prop_assert_eq!(bytes.len() % 4, 0);
            let mut d = Decoder::new(&bytes);
            prop_assert_eq!(d.array(9, Decoder::u32).unwrap(), numbers);
            prop_assert_eq!(d.string().unwrap(), text);
            prop_assert_eq!(d.optional(Decoder::i32).unwrap(), maybe);
            prop_assert_eq!(d.u64().unwrap(), wide);
            prop_assert_eq!(d.end(), Ok(()));
        }

        #[test]
        fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut d = Decoder::new(&bytes);
            let _ = d.array(50, |d| d.optional(Decoder::string));
            let _ = d.string().and_then(|_| d.bytes(10).map(drop)).and_then(|()| d.i64());
        }
    }
}
