//! Real migration streams: QEMU 7.2 and 10.0, eight machines each (`tests/streams/README.md`).
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod recorded;

use qemu::ramblock;
use qemu::stream::{self, Block, PAGE, Rest, Sink, StreamError};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;

/// More than any of these streams has beside its pages.
const LIMIT: usize = 1 << 20;

struct Golden {
    name: String,
    stream: Vec<u8>,
    ramblock: Vec<ramblock::RamBlock>,
    expect: Value,
}

fn goldens() -> Vec<Golden> {
    let golden = |(name, dir): (String, PathBuf)| {
        let text = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
        Golden {
            name,
            stream: zstd::decode_all(fs::File::open(dir.join("stream.zst")).unwrap()).unwrap(),
            ramblock: ramblock::parse(&text("ramblock.txt")).unwrap(),
            expect: serde_json::from_str(&text("expect.json")).unwrap(),
        }
    };
    let list: Vec<Golden> = recorded::machines("streams").into_iter().map(golden).collect();
    assert_eq!(list.len(), 16, "two versions of eight machines");
    list
}

/// Everything in memory, and how often each page came.
#[derive(Default, PartialEq)]
struct Image {
    blocks: Vec<Block>,
    bytes: Vec<Vec<u8>>,
    times: Vec<Vec<u32>>,
}

impl Image {
    fn count(&mut self, block: usize, offset: u64) -> usize {
        let offset = usize::try_from(offset).unwrap();
        self.times[block][offset / PAGE] += 1;
        offset
    }
}

impl Sink for Image {
    fn blocks(&mut self, blocks: &[Block]) -> io::Result<()> {
        self.blocks = blocks.to_vec();
        for block in blocks {
            let len = usize::try_from(block.used).unwrap();
            // What is never sent must not pass for zeros.
            self.bytes.push(vec![0xee; len]);
            self.times.push(vec![0; len / PAGE]);
        }
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE]) -> io::Result<()> {
        let at = self.count(block, offset);
        self.bytes[block][at..at + PAGE].copy_from_slice(bytes);
        Ok(())
    }

    fn zero_page(&mut self, block: usize, offset: u64) -> io::Result<()> {
        let at = self.count(block, offset);
        self.bytes[block][at..at + PAGE].fill(0);
        Ok(())
    }
}

/// Takes nothing down.
struct Nothing;

impl Sink for Nothing {
    fn blocks(&mut self, _: &[Block]) -> io::Result<()> {
        Ok(())
    }
    fn page(&mut self, _: usize, _: u64, _: &[u8; PAGE]) -> io::Result<()> {
        Ok(())
    }
    fn zero_page(&mut self, _: usize, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Golden {
    fn read(&self) -> (Image, Rest) {
        let mut image = Image::default();
        let rest = stream::read(self.stream.as_slice(), &mut image, LIMIT).unwrap();
        (image, rest)
    }

    fn is_plain(&self) -> bool {
        self.expect["plain"] == true
    }
}

#[test]
fn blocks_are_those_of_the_monitor() {
    for golden in goldens() {
        let (image, _) = golden.read();
        let mut sent: Vec<_> = image.blocks.iter().map(|b| (b.name.as_str(), b.used)).collect();
        let mut shown: Vec<_> = golden.ramblock.iter().map(|b| (b.name.as_str(), b.used)).collect();
        sent.sort_unstable();
        shown.sort_unstable();
        assert_eq!(sent, shown, "{}", golden.name);
    }
}

#[test]
fn pages_are_those_of_the_guest() {
    for golden in goldens() {
        let (mut image, rest) = golden.read();
        let name = &golden.name;
        let number = |key: &str| usize::try_from(golden.expect["ring"][key].as_u64().unwrap());
        let (first, pages) = (number("first_page").unwrap(), number("pages").unwrap());
        let ring = first * PAGE..(first + pages) * PAGE;
        let block =
            |image: &Image, name: &str| image.blocks.iter().position(|b| b.name == name).unwrap();

        // One instant: the words are equal up to some page and one less from there on.
        let in_ring = block(&image, golden.expect["ring"]["block"].as_str().unwrap());
        let bytes = &mut image.bytes[in_ring][ring];
        let words: Vec<_> =
            bytes.chunks(PAGE).map(|page| u16::from_le_bytes([page[0], page[1]])).collect();
        let dropped = words.windows(2).filter(|pair| pair[0] != pair[1]).count();
        let (newest, oldest) = (words[0], words[pages - 1]);
        assert!(dropped <= 1 && newest.wrapping_sub(oldest) <= 1, "{name}: {words:?}");
        assert!(newest > 0, "{name}: the ring did not turn");
        bytes.fill(0);

        let digests = golden.expect["sha256_without_ring"].as_object().unwrap();
        assert!(digests.len() >= 2);
        for (block_name, digest) in digests {
            let mut hex = String::new();
            for byte in Sha256::digest(&image.bytes[block(&image, block_name)]) {
                write!(hex, "{byte:02x}").unwrap();
            }
            assert_eq!(digest, &Value::from(hex), "{name}: {block_name}");
        }

        let mut sum = 0;
        for (block, times) in image.blocks.iter().zip(&image.times) {
            // Nothing is plugged in these guests.
            let wanted = if block.name.contains("/vmem") { 0 } else { 1 };
            let as_wanted = |times: &u32| {
                if golden.is_plain() { *times >= wanted } else { *times == wanted }
            };
            assert!(times.iter().all(as_wanted), "{name}: {}: {times:?}", block.name);
            sum += u64::from(times.iter().sum::<u32>());
        }
        assert_eq!(rest.pages + rest.zero_pages, sum, "{name}");
    }
}

#[test]
fn every_byte_behind_ram_belongs_to_a_device() {
    for golden in goldens() {
        let (_, rest) = golden.read();
        assert_eq!(rest.unaccounted, None, "{}", golden.name);
        assert_eq!(rest.len, u64::try_from(golden.stream.len()).unwrap());
        let mut out = format!("{}\n", rest.machine);
        for device in &rest.devices {
            let version = device.version.map_or("-".into(), |v| v.to_string());
            let (name, instance, len) = (&device.name, device.instance, device.len);
            writeln!(out, "{name} {instance} v{version} {len}").unwrap();
        }
        for early in &rest.virtio_mem {
            writeln!(out, "{early:x?}").unwrap();
        }
        insta::assert_snapshot!(format!("devices-{}", golden.name), out);
    }
}

#[test]
fn device_state_is_a_stream_without_pages() {
    for golden in goldens() {
        let (image, rest) = golden.read();
        let mut empty = Image::default();
        let again = stream::read(rest.device_state.as_slice(), &mut empty, LIMIT).unwrap();
        let name = &golden.name;
        assert_eq!(empty.blocks, image.blocks, "{name}");
        assert_eq!((again.pages, again.zero_pages), (0, 0), "{name}");
        assert_eq!(again.device_state, rest.device_state, "{name}");
        let without =
            |rest: Rest| Rest { len: 0, pages: 0, zero_pages: 0, device_state: Vec::new(), ..rest };
        assert_eq!(without(again), without(rest), "{name}");
    }
}

#[test]
fn a_stream_that_was_cut_is_no_stream() {
    for golden in goldens() {
        let len = golden.stream.len();
        let tail = len - 70_000;
        let cuts = (0..4200).chain((4200..tail).step_by(150_019)).chain((tail..len).step_by(2_999));
        for cut in cuts.chain(len - 30..len) {
            let error = stream::read(&golden.stream[..cut], &mut Nothing, LIMIT).unwrap_err();
            let at = match error {
                StreamError::Cut { at, .. } | StreamError::NoDescription { at } => at,
                other => panic!("{}, cut at {cut}: {other}", golden.name),
            };
            assert_eq!(at, u64::try_from(cut).unwrap(), "{}", golden.name);
        }
        let mut longer = golden.stream.clone();
        longer.push(0);
        let error = stream::read(longer.as_slice(), &mut Nothing, LIMIT).unwrap_err();
        assert!(matches!(error, StreamError::NoDescription { .. }), "{error}");
    }
}

/// Gives a few bytes at a time, as a socket may.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 % 4999 + 7;
        let len = self.1.min(into.len());
        self.0.read(&mut into[..len])
    }
}

#[test]
fn pieces_make_no_difference() {
    for golden in goldens() {
        let (image, rest) = golden.read();
        let mut slow = Image::default();
        let slow_rest = stream::read(Slow(&golden.stream, 0), &mut slow, LIMIT).unwrap();
        assert!(slow == image && slow_rest == rest, "{}", golden.name);
    }
}
