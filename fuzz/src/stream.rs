//! QEMU's migration stream, whole and in pieces.

use qemu::stream::{Block, PAGE, Rest, Sink, StreamError, read};
use std::io;

/// Bytes that may be kept: less than the longest input, so that the limit is met too.
const LIMIT: usize = 8 << 10;

/// Holds every call against the list of blocks, and sums up what it was told.
#[derive(Default, PartialEq, Debug)]
struct Checked {
    blocks: Option<Vec<Block>>,
    pages: u64,
    zero_pages: u64,
    sum: u64,
}

impl Checked {
    fn place(&mut self, block: usize, offset: u64) {
        let blocks = self.blocks.as_ref().expect("pages come after the blocks");
        let end = offset.checked_add(PAGE as u64).expect("a page does not wrap");
        assert!(offset.is_multiple_of(PAGE as u64) && end <= blocks[block].used);
        self.sum = self.sum.wrapping_mul(31).wrapping_add(offset ^ block as u64);
    }
}

impl Sink for Checked {
    fn blocks(&mut self, blocks: &[Block]) -> io::Result<()> {
        assert!(self.blocks.is_none(), "the blocks are told once");
        let total = blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.used));
        assert!(total.is_some() && blocks.iter().all(|b| b.used.is_multiple_of(PAGE as u64)));
        self.blocks = Some(blocks.to_vec());
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE]) -> io::Result<()> {
        self.place(block, offset);
        self.pages += 1;
        self.sum = bytes.iter().fold(self.sum, |sum, &b| sum.wrapping_mul(31) ^ u64::from(b));
        Ok(())
    }

    fn zero_page(&mut self, block: usize, offset: u64) -> io::Result<()> {
        self.place(block, offset);
        self.zero_pages += 1;
        Ok(())
    }
}

/// Bytes, at most so many at a time.
pub(crate) struct Pieces<'a>(pub(crate) &'a [u8], pub(crate) usize);

impl io::Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.1.min(into.len());
        self.0.read(&mut into[..len])
    }
}

fn whole(data: &[u8]) -> (Checked, Result<Rest, StreamError>) {
    let mut sink = Checked::default();
    let rest = read(data, &mut sink, LIMIT);
    (sink, rest)
}

/// A stream, read at once and in pieces.
pub fn stream(data: &[u8]) {
    let (sink, rest) = whole(data);
    let mut again = Checked::default();
    let piece = 1 + usize::from(data.first().copied().unwrap_or(0));
    let pieces = read(Pieces(data, piece), &mut again, LIMIT);
    assert_eq!(sink, again);
    let rest = match (rest, pieces) {
        (Ok(rest), Ok(pieces)) => {
            assert_eq!(rest, pieces);
            rest
        }
        // The limit may be met within other bytes, but it is the same error at the same place.
        (Err(one), Err(other)) => return assert_eq!(one.to_string(), other.to_string()),
        (one, other) => panic!("{one:?}, in pieces {other:?}"),
    };
    assert!(rest.len == data.len() as u64 && rest.device_state.len() <= LIMIT);
    assert_eq!((rest.pages, rest.zero_pages), (sink.pages, sink.zero_pages));
    for memory in &rest.virtio_mem {
        let bits: u64 = memory.plugged.iter().map(|word| u64::from(word.count_ones())).sum();
        assert!(memory.gpa.checked_add(memory.len).is_some() && bits * memory.unit <= memory.len);
    }
    // Without its pages it is still a stream, with the same devices.
    let (without, state) = whole(&rest.device_state);
    let state = state.expect("the devices' state is a stream");
    assert_eq!((without.blocks, without.pages, without.zero_pages), (sink.blocks, 0, 0));
    assert_eq!((state.device_state, state.devices), (rest.device_state, rest.devices));
}

/// A stream with everything in it; the same without pages; and its parts that are no streams.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x1econfiguration/target-page-bits".to_vec();
    let mut put = |bytes: &[&[u8]]| bytes.iter().for_each(|part| out.extend_from_slice(part));
    put(&[b"\0\0\0\x01\0\0\0\x0c"]);
    // RAM: 3 pages of "r", 1 of "v".
    put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", &0x4004u64.to_be_bytes()]);
    put(&[b"\x01r", &0x3000u64.to_be_bytes(), b"\x01v", &0x1000u64.to_be_bytes()]);
    put(&[&0x10u64.to_be_bytes(), b"\x7e\0\0\0\x02"]);
    // virtio-mem: 3 blocks of 2 MiB, one of them plugged.
    put(&[b"\x04\0\0\0\x03\x17virtio-mem-device-early\0\0\0\0\0\0\0\x01"]);
    put(&[&(1u64 << 32).to_be_bytes(), &(6u64 << 20).to_be_bytes()]);
    put(&[&(2u64 << 20).to_be_bytes(), &[0; 4], &(2u64 << 20).to_be_bytes()]);
    put(&[&1u64.to_be_bytes(), b"\x7e\0\0\0\x03"]);
    put(&[b"\x02\0\0\0\x02", &0x1008u64.to_be_bytes(), b"\x01r", &[7; PAGE]]);
    put(&[&0x22u64.to_be_bytes(), &[0], &2u64.to_be_bytes(), b"\x01v\0"]);
    put(&[&0x10u64.to_be_bytes(), b"\x7e\0\0\0\x02\x08\0\x0b\0\0"]);
    put(&[b"\x03\0\0\0\x02", &0x10u64.to_be_bytes(), b"\x7e\0\0\0\x02"]);
    put(&[b"\x04\0\0\0\x04\x05timer\0\0\0\0\0\0\0\x02aabbc\x05\x01x\0\0\0\x01d\x7e\0\0\0\x04"]);
    let json = br#"{"page_size":4096,"devices":[{"name":"virtio-mem-device-early","instance_id":0,"version":1,"fields":[{"size":44}]},{"name":"timer","instance_id":0,"version":2,"fields":[{"size":2,"array_len":2},{"size":1}],"subsections":[{"vmsd_name":"x","fields":[{"size":1}]}]}]}"#;
    put(&[b"\0\x06", &u32::try_from(json.len()).unwrap_or(0).to_be_bytes(), json]);
    let (_, rest) = whole(&out);
    let rest = rest.expect("the seed is a stream");
    assert_eq!(rest.unaccounted, None, "the seed's devices are described");
    let cut = out.len() / 2;
    vec![rest.device_state, out[..cut].to_vec(), out]
}
