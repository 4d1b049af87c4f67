//! QEMU's own dump, whole and in pieces.

use crate::stream::Pieces;
use qemu::dump::{DumpError, Head, Registers, head};
use std::io::Read;

/// Bytes that may be kept: less than the longest input, so that the limit is met too.
const LIMIT: usize = 8 << 10;

/// What memory was: how many bytes, and a sum over them.
#[derive(Default, PartialEq, Debug)]
struct Memory {
    len: u64,
    sum: u64,
}

fn whole(data: impl Read) -> Result<(Head, Memory), DumpError> {
    let (head, memory) = head(data, LIMIT)?;
    let mut told = Memory::default();
    let mut segments = head.segments.list().iter();
    let mut rest = None;
    memory.read(|gpa, bytes| {
        let (start, end) = rest.take().unwrap_or_else(|| {
            let range = segments.next().expect("no more memory than segments").range;
            (range.start(), range.end())
        });
        let next = gpa + bytes.len() as u64;
        assert!(gpa == start && !bytes.is_empty() && next <= end);
        assert!(next.is_multiple_of(4096) || next == end, "a page comes in one part");
        rest = (next < end).then_some((next, end));
        told.len += bytes.len() as u64;
        told.sum = bytes.iter().fold(told.sum, |sum, &b| sum.wrapping_mul(31) ^ u64::from(b));
        Ok(())
    })?;
    assert!(rest.is_none() && segments.next().is_none(), "all memory was given");
    Ok((head, told))
}

/// A dump, read at once and in pieces.
pub fn dump(data: &[u8]) {
    let piece = 1 + usize::from(data.first().copied().unwrap_or(0) ^ data.len().to_le_bytes()[0]);
    let (head, memory) = match (whole(data), whole(Pieces(data, piece))) {
        (Ok(one), Ok(other)) => {
            assert_eq!(one, other);
            one
        }
        (Err(one), Err(other)) => return assert_eq!(one.to_string(), other.to_string()),
        (one, other) => panic!("{one:?}, in pieces {other:?}"),
    };
    assert!(head.len == data.len() as u64 && head.memory_len() == memory.len);
    assert!(head.bytes.len() <= LIMIT && data.starts_with(&head.bytes));
    assert!(head.bytes.ends_with(head.notes()));
    // Each CPU has its notes, and a guest's note is no CPU.
    let least = |registers: &Registers| match registers {
        Registers::X86(_) => 164 + 452,
        Registers::Aarch64(_) => 412 + 548,
    };
    let least: usize = head.cpus.iter().map(|cpu| least(&cpu.registers)).sum();
    let guest = head.guest_note.as_ref().map_or(0, |note| 12 + note.name.len() + note.desc.len());
    assert!(least + guest <= head.notes().len());
}

/// Real dumps of one byte.
pub fn seeds() -> Vec<Vec<u8>> {
    let real: [&[u8]; 5] = [
        include_bytes!("../../crates/qemu/tests/dumps/10.0/q35-linux/byte.elf"),
        include_bytes!("../../crates/qemu/tests/dumps/10.0/microvm/byte.elf"),
        include_bytes!("../../crates/qemu/tests/dumps/7.2/none/byte.elf"),
        include_bytes!("../../crates/qemu/tests/dumps/7.2/virt/byte.elf"),
        include_bytes!("../../crates/qemu/tests/dumps/7.2/virt-sve/byte.elf"),
    ];
    for (bytes, cpus) in real.into_iter().zip([3, 1, 0, 2, 2]) {
        let (head, memory) = whole(bytes).expect("the seed is a dump");
        assert_eq!((head.cpus.len(), memory.len), (cpus, 1));
    }
    real.map(<[u8]>::to_vec).to_vec()
}
