//! Guest-physical ranges: half-open, never empty, never wrapping.

use std::fmt;
use std::num::NonZeroU64;

/// A range of guest-physical addresses, `start..end`, in bytes.
///
/// Half-open and never empty; `start + len` fits in 64 bits, so no arithmetic on a `GuestRange`
/// can wrap. QEMU and `/proc` print inclusive ends: [`GuestRange::from_inclusive`] is the one
/// place where these are turned into half-open ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestRange {
    start: u64,
    len: NonZeroU64,
}

impl GuestRange {
    /// The range of `len` bytes at `start`; `None` when it is empty or its end passes 2^64 - 1.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len)?;
        Some(Self { start, len: NonZeroU64::new(len)? })
    }

    /// The range from `first` to `last`, both included, as QEMU and `/proc` print it.
    pub fn from_inclusive(first: u64, last: u64) -> Option<Self> {
        Self::new(first, last.checked_sub(first)?.checked_add(1)?)
    }

    /// The range from `start` up to, not including, `end`.
    pub fn from_ends(start: u64, end: u64) -> Option<Self> {
        Self::new(start, end.checked_sub(start)?)
    }

    /// First address.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes, never 0.
    pub fn len(self) -> u64 {
        self.len.get()
    }

    /// Always `false`: a range holds at least one byte.
    pub fn is_empty(self) -> bool {
        false
    }

    /// First address behind the range.
    pub fn end(self) -> u64 {
        self.start + self.len.get()
    }

    /// Last address in the range.
    pub fn last(self) -> u64 {
        self.end() - 1
    }

    /// Whether `addr` lies in the range.
    pub fn contains(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end()
    }

    /// Whether all of `other` lies in the range.
    pub fn covers(self, other: GuestRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Its first part that lies in none of `others`, which may be in any order and lie over each other.
    pub fn first_outside(self, others: &[GuestRange]) -> Option<GuestRange> {
        let mut parts: Vec<GuestRange> =
            others.iter().filter_map(|other| other.intersect(self)).collect();
        parts.sort_by_key(|part| part.start());
        let mut at = self.start();
        for part in parts {
            if part.start() > at {
                return GuestRange::from_ends(at, part.start());
            }
            at = at.max(part.end());
        }
        GuestRange::from_ends(at, self.end())
    }

    /// What both ranges hold, if anything.
    pub fn intersect(self, other: GuestRange) -> Option<GuestRange> {
        Self::from_ends(self.start.max(other.start), self.end().min(other.end()))
    }
}

impl fmt::Display for GuestRange {
    /// `0x100000-0x1fffff`, ends included: as `/proc/iomem` and QEMU print ranges.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last())
    }
}

impl fmt::Debug for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Serde form of a 64-bit address: a string `"0x100000"`.
///
/// JSON numbers lose precision above 2^53 in many readers; addresses are therefore strings.
pub mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes `value` as `"0x..."`.
    pub fn serialize<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{value:#x}"))
    }

    /// Writes `"0x..."` or null.
    pub fn optional<S: Serializer>(value: &Option<u64>, s: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serialize(value, s),
            None => s.serialize_none(),
        }
    }

    /// Reads `"0x..."`, lower-case digits without leading zeros: one way to write each address.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("not an address: {text:?}")))
    }

    /// Reads `"0x..."` or null.
    pub fn deserialize_optional<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
        let text = <Option<std::borrow::Cow<'de, str>> as serde::Deserialize>::deserialize(d)?;
        let read = |text: std::borrow::Cow<'de, str>| {
            parse(&text).ok_or_else(|| D::Error::custom(format!("not an address: {text:?}")))
        };
        text.map(read).transpose()
    }

    /// The address written as `0x` and lower-case digits, or `None`.
    pub fn parse(text: &str) -> Option<u64> {
        let value = u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
        (format!("{value:#x}") == text).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_checked_once() {
        assert_eq!(GuestRange::new(0, 0), None);
        assert_eq!(GuestRange::new(u64::MAX, 1), None);
        assert_eq!(GuestRange::from_inclusive(0, u64::MAX), None);
        assert_eq!(GuestRange::from_inclusive(5, 4), None);
        let r = GuestRange::from_inclusive(0x1000, 0x1fff).unwrap();
        assert_eq!((r.start(), r.len(), r.end(), r.last()), (0x1000, 0x1000, 0x2000, 0x1fff));
        assert_eq!(r.to_string(), "0x1000-0x1fff");
    }

    #[test]
    fn intersection_is_what_both_hold() {
        let a = GuestRange::new(0, 10).unwrap();
        assert_eq!(a.intersect(GuestRange::new(10, 5).unwrap()), None);
        assert_eq!(a.intersect(GuestRange::new(8, 5).unwrap()), GuestRange::new(8, 2));
        assert!(a.covers(GuestRange::new(2, 8).unwrap()));
        assert!(!a.covers(GuestRange::new(2, 9).unwrap()));
    }

    #[test]
    fn the_first_part_outside_of_others_is_found() {
        let range = GuestRange::new(10, 20).unwrap();
        let outside = |others: &[(u64, u64)]| {
            let range_of = |&(start, end): &(u64, u64)| GuestRange::from_ends(start, end).unwrap();
            let part = range.first_outside(&others.iter().map(range_of).collect::<Vec<_>>());
            part.map(|part| (part.start(), part.end()))
        };
        assert_eq!(outside(&[]), Some((10, 30)));
        assert_eq!(outside(&[(0, 100)]), None);
        assert_eq!(outside(&[(20, 30), (5, 21)]), None);
        assert_eq!(outside(&[(20, 29), (10, 20)]), Some((29, 30)));
        assert_eq!(outside(&[(12, 13), (0, 11), (12, 40)]), Some((11, 12)));
        assert_eq!(outside(&[(10, 25), (12, 13)]), Some((25, 30)), "within another");
    }

    #[test]
    fn addresses_have_one_spelling() {
        assert_eq!(hex::parse("0x100000"), Some(0x10_0000));
        for bad in ["100000", "0x", "0X10", "0x0010", "0xAB", "0x1ffffffffffffffff", "0x+1"] {
            assert_eq!(hex::parse(bad), None, "{bad}");
        }
    }
}
