//! What is known of each page.

use crate::GuestRange;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The page that states are kept for: 4 KiB of guest-physical space, aligned to 4 KiB.
pub const PAGE: u64 = 4096;

/// What is known of one page of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PageState {
    /// Read; some byte is not zero.
    Data,
    /// Read; all bytes are zero.
    Zero,
    /// The host had no memory behind it when looked at: never touched by the guest, or given back
    /// by balloon or free-page reporting (the host cannot tell which). Reads as zero.
    Hole,
    /// Outside the guest's memory by QEMU's own bitmap: unplugged virtio-mem.
    Discarded,
    /// The host could not read it. Filled with zeros in the image; a loss.
    Unreadable,
    /// Left out on request. Filled with zeros in the image; a loss.
    Excluded,
}

impl PageState {
    /// Whether the page's bytes are known. `false` is a loss.
    pub fn known(self) -> bool {
        !matches!(self, PageState::Unreadable | PageState::Excluded)
    }

    /// Whether the image may hold anything but zeros for the page.
    pub fn has_bytes(self) -> bool {
        self == PageState::Data
    }
}

/// `count` pages in a row of one state; in JSON `["data", 200]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Run(pub PageState, pub u32);

/// States as runs, neighbours merged.
pub fn runs(states: &[PageState]) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    for &state in states {
        match out.last_mut() {
            Some(Run(last, count)) if *last == state => *count += 1,
            _ => out.push(Run(state, 1)),
        }
    }
    out
}

/// Number of 4 KiB cells that `range` touches; its first and last may be partly covered.
pub fn page_count(range: GuestRange) -> u64 {
    range.last() / PAGE - range.start() / PAGE + 1
}

/// The cells of `range`, in order, each cut with it.
pub fn pages(range: GuestRange) -> impl Iterator<Item = GuestRange> {
    (range.start() / PAGE..=range.last() / PAGE).filter_map(move |page| {
        let start = (page * PAGE).max(range.start());
        let end = (page * PAGE).saturating_add(PAGE).min(range.end());
        GuestRange::from_ends(start, end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_neighbours() {
        use PageState::*;
        assert_eq!(runs(&[]), vec![]);
        assert_eq!(runs(&[Data, Data, Hole, Data]), vec![Run(Data, 2), Run(Hole, 1), Run(Data, 1)]);
    }

    #[test]
    fn cells_are_cut_with_the_range() {
        let r = GuestRange::from_ends(0xff0, 0x2001).unwrap();
        let cells: Vec<_> = pages(r).map(|p| (p.start(), p.len())).collect();
        assert_eq!(cells, [(0xff0, 0x10), (0x1000, 0x1000), (0x2000, 1)]);
        assert_eq!(page_count(r), 3);
    }

    #[test]
    fn the_last_page_of_the_address_space_does_not_overflow() {
        let r = GuestRange::from_ends(u64::MAX - 0x1fff, u64::MAX).unwrap();
        assert_eq!(pages(r).count() as u64, page_count(r));
    }
}
