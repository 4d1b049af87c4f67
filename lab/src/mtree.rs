//! The lab's own reading of `info mtree -f`, written without a look at the tool's.

use crate::error::{Result, failed};

/// One line of the flat view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// What QEMU prints in the brackets: `ram`, `rom`, `romd`, `i/o`, `ramd`.
    pub kind: String,
    /// The memory region's name.
    pub name: String,
}

impl Range {
    /// First address behind the range.
    pub fn end(&self) -> u64 {
        self.gpa + self.len
    }
}

/// Every line of the flat view of the address space `memory`, in QEMU's order.
pub(crate) fn memory_view(text: &str) -> Result<Vec<Range>> {
    for view in text.split("FlatView #") {
        if view.lines().any(|line| line.trim_start().starts_with("AS \"memory\"")) {
            return Ok(view.lines().filter_map(range).collect());
        }
    }
    Err(failed("no flat view of the address space \"memory\" in info mtree -f"))
}

/// `  0000000000000000-000000000009ffff (prio 0, ram): pc.ram @0000000000000000 KVM`
fn range(line: &str) -> Option<Range> {
    let (addresses, rest) = line.trim_start().split_once(" (prio ")?;
    let (first, last) = addresses.split_once('-')?;
    let (bracket, rest) = rest.split_once("): ")?;
    let kind = bracket.split_once(", ")?.1;
    let name = rest.split(" @").next()?;
    let first = u64::from_str_radix(first, 16).ok()?;
    let last = u64::from_str_radix(last, 16).ok()?;
    // A range that ends at the last address would have a length of 2^64 only if it began at 0.
    let len = last.checked_sub(first)?.checked_add(1)?;
    Some(Range { gpa: first, len, kind: kind.to_owned(), name: name.trim_end().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_view_is_found_among_others() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n Root memory region: io\n  \
                    0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\n\n\
                    FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n \
                    Root memory region: system\n  \
                    0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n  \
                    00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000\n";
        let found = memory_view(text).expect("the view is there");
        let seen: Vec<_> = found.iter().map(|r| (r.gpa, r.end(), &*r.kind)).collect();
        assert_eq!(seen, [(0, 0xa0000, "ram"), (0xc0000, 0xcb000, "rom")]);
        assert!(memory_view("FlatView #0\n AS \"I/O\", root: io\n").is_err());
    }
}
