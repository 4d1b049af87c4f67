//! The text of QMP `x-query-ramblock` (6.2 and later) and of HMP `info ramblock`.
//!
//! One line a RAMBlock in fixed columns (`ram_block_format` in `system/physmem.c`; HVA and RO are
//! there since 9.1): name, page size, offset in QEMU's ram address space, used length, greatest
//! length, host virtual address, `ro` or `rw`. The name is right-aligned in 24 columns, may be
//! longer, may hold spaces (VFIO: `0000:01:00.0 BAR 1 mmaps[0]`) and **may be empty**: the backend
//! of a virtio-pmem device is never named (seen in 7.2 and 10.0).

use crate::text::{Excerpt, hex_0x};
use serde::{Deserialize, Serialize};

/// RAMBlocks that a text may hold; a machine with 256 DIMMs and 100 devices has about 500.
const MAX_BLOCKS: usize = 65_536;

/// One RAMBlock: memory that QEMU allocated for a guest or a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// QEMU's `idstr`: MemoryRegion name, before it the device's path. Empty for virtio-pmem.
    pub name: String,
    /// Page size of the backing memory in bytes.
    pub page_size: u64,
    /// Offset in QEMU's own ram address space; not a guest-physical address.
    pub ram_addr: u64,
    /// Bytes in use.
    pub used: u64,
    /// Bytes reserved: resizable ROMs have `total > used`.
    pub total: u64,
    /// Address in QEMU's process; `None` before QEMU 9.1, and for a block that QEMU has not mapped
    /// (printed as address 0).
    pub hva: Option<u64>,
    /// Whether the MemoryRegion is read-only; `None` before QEMU 9.1.
    pub read_only: Option<bool>,
}

/// Why a text is not a list of RAMBlocks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RamBlockError {
    /// The first line is not one of the two known headings.
    #[error("ramblock: unknown heading {0:?}")]
    Heading(Excerpt),
    /// A line does not fit the columns.
    #[error("ramblock: line {number} is not understood: {text:?}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// The line.
        text: Excerpt,
    },
    /// More lines than a machine has blocks.
    #[error("ramblock: more than {MAX_BLOCKS} blocks")]
    TooMany,
}

/// Reads the text; line ends may be `\n` or `\r\n`.
///
/// # Errors
/// [`RamBlockError`] for the first line that is not understood.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, RamBlockError> {
    let mut lines = text.lines().enumerate();
    let heading = lines.next().map_or("", |(_, line)| line);
    let words: Vec<&str> = heading.split_whitespace().collect();
    let has_hva = match words.as_slice() {
        ["Block", "Name", "PSize", "Offset", "Used", "Total"] => false,
        ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"] => true,
        _ => return Err(RamBlockError::Heading(Excerpt::new(heading))),
    };
    let mut blocks = Vec::new();
    for (index, line) in lines.filter(|(_, line)| !line.is_empty()) {
        let block = parse_line(line, has_hva)
            .ok_or_else(|| RamBlockError::Line { number: index + 1, text: Excerpt::new(line) })?;
        if blocks.len() == MAX_BLOCKS {
            return Err(RamBlockError::TooMany);
        }
        blocks.push(block);
    }
    Ok(blocks)
}

/// Takes the last word off the line.
fn last_word(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_end_matches(' ');
    let at = line.rfind(' ')?;
    Some((line.get(..at)?, line.get(at + 1..)?))
}

fn parse_line(line: &str, has_hva: bool) -> Option<RamBlock> {
    // From the right, because only the name can hold spaces.
    let (rest, hva, read_only) = if has_hva {
        let (rest, word) = last_word(line)?;
        let read_only = match word {
            "ro" => true,
            "rw" => false,
            _ => return None,
        };
        let (rest, word) = last_word(rest)?;
        (rest, Some(hex_0x(word)?).filter(|&hva| hva != 0), Some(read_only))
    } else {
        (line, None, None)
    };
    let (rest, total) = last_word(rest)?;
    let (rest, used) = last_word(rest)?;
    let (rest, ram_addr) = last_word(rest)?;
    let (rest, unit) = last_word(rest)?;
    let (name, count) = last_word(rest)?;
    let block = RamBlock {
        name: name.trim_matches(' ').into(),
        page_size: page_size(count, unit)?,
        ram_addr: hex_0x(ram_addr)?,
        used: hex_0x(used)?,
        total: hex_0x(total)?,
        hva,
        read_only,
    };
    let sane = block.used <= block.total
        && block.hva.is_none_or(|hva| hva.checked_add(block.total).is_some())
        && block.ram_addr.checked_add(block.total).is_some();
    sane.then_some(block)
}

/// `4 KiB`, `2 MiB`, `1 GiB`: QEMU's `size_to_str`; page sizes are powers of two.
fn page_size(count: &str, unit: &str) -> Option<u64> {
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    if !count.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let size = count.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    size.is_power_of_two().then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "              Block Name    PSize              Offset               Used              Total\n";
    const NEW: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n";

    #[test]
    fn columns_with_and_without_hva() {
        let old = parse(&format!(
            "{OLD}    /rom@etc/acpi/tables    4 KiB  0x0000000011100000 0x0000000000020000 0x0000000000200000\n"
        ))
        .unwrap();
        assert_eq!(
            old,
            [RamBlock {
                name: "/rom@etc/acpi/tables".into(),
                page_size: 4096,
                ram_addr: 0x1110_0000,
                used: 0x2_0000,
                total: 0x20_0000,
                hva: None,
                read_only: None,
            }]
        );
        let new = parse(&format!(
            "{NEW}0000:00:02.0/bochs-display-vram    2 MiB  0x00000000104c0000 0x0000000001000000 0x0000000001000000 0x00007f8c19400000  rw\r\n"
        ))
        .unwrap();
        assert_eq!(new[0].name, "0000:00:02.0/bochs-display-vram");
        assert_eq!((new[0].page_size, new[0].hva), (2 << 20, Some(0x7f8c_1940_0000)));
        assert_eq!(new[0].read_only, Some(false));
    }

    #[test]
    fn names_may_be_empty_or_hold_spaces() {
        let blocks = parse(&format!(
            "{OLD}                            4 KiB  0x000000001c000000 0x0000000004000000 0x0000000004000000\n\
             0000:01:00.0 BAR 1 mmaps[0]    4 KiB  0x000000002c000000 0x0000000004000000 0x0000000004000000\n"
        ))
        .unwrap();
        assert_eq!(blocks[0].name, "");
        assert_eq!(blocks[1].name, "0000:01:00.0 BAR 1 mmaps[0]");
    }

    #[test]
    fn other_texts_are_refused_with_their_line() {
        assert!(matches!(parse(""), Err(RamBlockError::Heading(_))));
        assert!(matches!(parse("unknown command"), Err(RamBlockError::Heading(_))));
        for line in [
            "pc.ram    4 KiB  0x0000000000000000 0x0000000010000000",
            "pc.ram    3 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000",
            "pc.ram    4 KiB  0x0000000000000000 0x0000000010000001 0x0000000010000000",
            "pc.ram    4 KiB  0000000000000000 0x0000000010000000 0x0000000010000000",
            "pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f68a3e00000  rw",
            "pc.ram    +4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000",
            "pc.ram    4 KiB  0xfffffffffffff000 0x0000000010000000 0x0000000010000000",
        ] {
            let error = parse(&format!("{OLD}\n{line}\n")).unwrap_err();
            assert!(matches!(error, RamBlockError::Line { number: 3, .. }), "{line}: {error}");
        }
        let null = "pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x0000000000000000  rw";
        assert_eq!(parse(&format!("{NEW}{null}\n")).unwrap()[0].hva, None);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\n]{0,300}") {
            let _ = parse(&text);
            let _ = parse(&format!("{NEW}{text}"));
        }
    }
}
