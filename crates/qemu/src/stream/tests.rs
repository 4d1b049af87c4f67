//! Streams made here, whole and broken. Real ones are in `tests/streams.rs`.

use super::*;
use proptest::prelude::*;
use std::io::ErrorKind;

/// Writes streams as QEMU does; what a test wants to be wrong it writes itself.
#[derive(Clone, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn new() -> Self {
        Self::default().raw(b"QEVM\0\0\0\x03\x07\0\0\0\x02pc")
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn be32(self, value: u32) -> Self {
        self.raw(&value.to_be_bytes())
    }

    fn be64(self, value: u64) -> Self {
        self.raw(&value.to_be_bytes())
    }

    fn string(self, text: &str) -> Self {
        self.raw(&[u8::try_from(text.len()).unwrap()]).raw(text.as_bytes())
    }

    fn header(self, kind: u8, id: u32, name: &str, version: u32) -> Self {
        self.raw(&[kind]).be32(id).string(name).be32(0).be32(version)
    }

    fn footer(self, id: u32) -> Self {
        self.raw(&[0x7e]).be32(id)
    }

    /// RAM is section 2.
    fn start(self, blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, len)| len).sum();
        let mut out = self.header(1, 2, "ram", 4).be64(total | 4);
        for (name, len) in blocks {
            out = out.string(name).be64(*len);
        }
        out.be64(0x10).footer(2)
    }

    fn part(self, kind: u8, records: impl FnOnce(Self) -> Self) -> Self {
        records(self.raw(&[kind]).be32(2)).be64(0x10).footer(2)
    }

    fn page(self, block: Option<&str>, offset: u64, bytes: &[u8; PAGE]) -> Self {
        self.record(block, offset | 8).raw(bytes)
    }

    fn zero(self, block: Option<&str>, offset: u64) -> Self {
        self.record(block, offset | 2).raw(&[0])
    }

    fn record(self, block: Option<&str>, header: u64) -> Self {
        match block {
            Some(name) => self.be64(header).string(name),
            None => self.be64(header | 0x20),
        }
    }

    fn virtio_mem(self, units: u64, plugged: &[u64]) -> Self {
        let count: u64 = plugged.iter().map(|word| u64::from(word.count_ones())).sum();
        let mut out = self
            .header(4, 3, EARLY, 1)
            .be64(1 << 32)
            .be64(units << 21)
            .be64(1 << 21)
            .be32(0)
            .be64(count << 21);
        for word in plugged {
            out = out.be64(*word);
        }
        out.footer(3)
    }

    fn device(self, id: u32, name: &str, state: &[u8]) -> Self {
        self.header(4, id, name, 1).raw(state).footer(id)
    }

    fn end(self, json: &str) -> Self {
        let len = u32::try_from(json.len()).unwrap();
        self.raw(&[0, 6]).be32(len).raw(json.as_bytes())
    }
}

const EARLY: &str = "0000:00:01.0/virtio-mem-device-early";
const LIMIT: usize = 64 << 10;

/// Two blocks, a page of each kind, one bitmap, two devices: everything there is.
fn small() -> Writer {
    let json = format!(
        r#"{{"configuration": {{}}, "page_size": 4096, "devices": [
            {{"name": "{EARLY}", "instance_id": 0, "version": 1, "fields": [{{"size": 44}}]}},
            {{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 1,
              "fields": [{{"name": "a", "array_len": 3, "size": 2}}, {{"name": "b", "size": 1}}],
              "subsections": [{{"vmsd_name": "x", "version": 1, "fields": [{{"size": 1}}]}}]}},
            {{"name": "old", "instance_id": 0, "size": 4, "fields": [{{"size": 4}}]}}]}}"#
    );
    Writer::new()
        .start(&[("pc.ram", 0x3000), ("vga", 0x1000)])
        .virtio_mem(3, &[0b101])
        .part(2, |w| w.page(Some("pc.ram"), 0x1000, &[7; PAGE]).zero(None, 0))
        .part(2, |w| w.zero(None, 0x2000).page(Some("vga"), 0, &[9; PAGE]))
        .device(4, "timer", b"aabbccd\x05\x01x\0\0\0\x01e")
        .device(5, "old", b"data")
        .end(&json)
}

#[derive(Debug, PartialEq, Eq)]
enum Told {
    Blocks(Vec<Block>),
    Page(usize, u64, u8),
    Zero(usize, u64),
}

/// Takes down what it is told, of a page the first byte; refuses the call of this number.
#[derive(Default)]
struct Tape(Vec<Told>, Option<usize>);

impl Tape {
    fn take(&mut self, told: Told) -> io::Result<()> {
        self.0.push(told);
        if self.1 == Some(self.0.len()) { Err(io::Error::other("no")) } else { Ok(()) }
    }
}

impl Sink for Tape {
    fn blocks(&mut self, blocks: &[Block]) -> io::Result<()> {
        self.take(Told::Blocks(blocks.to_vec()))
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE]) -> io::Result<()> {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a page is not shifted");
        self.take(Told::Page(block, offset, bytes[0]))
    }

    fn zero_page(&mut self, block: usize, offset: u64) -> io::Result<()> {
        self.take(Told::Zero(block, offset))
    }
}

/// As [`Tape`], of bytes that may be anything.
struct Blind;

impl Sink for Blind {
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

fn blind(bytes: &[u8]) -> Result<Rest, StreamError> {
    read(bytes, &mut Blind, LIMIT)
}

fn said(writer: &Writer) -> String {
    blind(&writer.0).unwrap_err().to_string()
}

#[test]
fn everything_is_told_in_order() {
    let mut tape = Tape::default();
    let Writer(bytes) = small();
    let rest = read(bytes.as_slice(), &mut tape, LIMIT).unwrap();
    let block = |name: &str, used| Block { name: name.into(), used };
    let wanted = [
        Told::Blocks(vec![block("pc.ram", 0x3000), block("vga", 0x1000)]),
        Told::Page(0, 0x1000, 7),
        Told::Zero(0, 0),
        Told::Zero(0, 0x2000),
        Told::Page(1, 0, 9),
    ];
    assert_eq!(tape.0, wanted);
    assert_eq!((rest.len, rest.machine.as_str()), (bytes.len() as u64, "pc"));
    assert_eq!((rest.pages, rest.zero_pages), (2, 2));
    assert_eq!(rest.unaccounted, None);
    let device = |name: &str, version, len| Device { name: name.into(), instance: 0, version, len };
    let wanted = [device(EARLY, Some(1), 44), device("timer", Some(1), 15), device("old", None, 4)];
    assert_eq!(rest.devices, wanted);
    let wanted = VirtioMem {
        name: EARLY.into(),
        gpa: 1 << 32,
        len: 6 << 20,
        unit: 2 << 20,
        plugged_len: 4 << 20,
        plugged: vec![0b101],
    };
    assert_eq!(rest.virtio_mem, [wanted]);
    let mark = |header: &[u8]| bytes.windows(header.len()).position(|w| w == header).unwrap();
    let (first, behind) = (mark(b"\x02\0\0\0\x02\0\0"), mark(b"\x04\0\0\0\x04"));
    let empty = Writer::default().part(2, |w| w).part(2, |w| w);
    let wanted = [&bytes[..first], &empty.0, &bytes[behind..]].concat();
    assert_eq!(rest.device_state, wanted);
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let ram = || Writer::new().start(&[("a", 0x2000)]);
    let part = |records: &dyn Fn(Writer) -> Writer| ram().part(2, records);
    let conf = Writer::new;
    for (writer, wanted) in [
        (Writer::default().raw(b"QEVL"), "0x0: \"QEVM\" was expected, not [51, 45, 56, 4c]"),
        (Writer::default().raw(b"QEVM\0\0\0\x02"), "0x4: version 3 was"),
        (Writer::default().raw(b"QEVM\0\0\0\x03\x01"), "0x8: the configuration was"),
        (Writer::default().raw(b"QEVM\0\0\0\x03\x07\x01\0\0\0"), "0x9: more than 255 bytes of"),
        (
            conf().raw(&[5]).string("configuration/target-page-bits").be32(1).be32(14),
            "0x33: a page size of 2^14 is not supported",
        ),
        (
            conf()
                .raw(&[5])
                .string("configuration/capabilities")
                .be32(1)
                .be32(1)
                .string("mapped-ram"),
            "capability \"mapped-ram\" is not",
        ),
        (
            conf().raw(&[5]).string("configuration/odd").be32(1),
            "0xf: subsection \"configuration/odd\" is not",
        ),
        (conf().raw(&[8, 0, 3, 0, 0]), "0xf: command POSTCOPY_ADVISE is not"),
        (conf().raw(&[8, 0, 99, 0, 0]), "command 99 is not"),
        (conf().raw(&[2]), "RAM's first or next section was expected, not section 0x02"),
        (conf().raw(&[0]), "not section 0x00"),
        (conf().header(1, 1, "dirty-bitmap", 1), "the section \"dirty-bitmap\" with parts is not"),
        (conf().header(1, 1, "ram", 3), "instance 0, version 3 of RAM is not"),
        (
            conf().header(1, 1, "ram", 4).be64(0x1008),
            "the size of RAM was expected, not 0x008 (PAGE)",
        ),
        (
            conf().header(1, 1, "ram", 4).be64(0x1004).string("a").be64(0x800),
            "whole pages was expected, not 0x800",
        ),
        (
            conf().header(1, 1, "ram", 4).be64(0x1004).string("a").be64(0x2000),
            "not 0x2000, with 0x1000 left",
        ),
        (
            conf().header(1, 1, "ram", 4).be64(0x1004).string("a\x07").be64(0x1000),
            "a block's name was expected, not \"a\\u{7}\"",
        ),
        (conf().start(&[("a", 0x1000), ("a", 0x1000)]), "for the first time was expected"),
        (
            conf().header(1, 1, "ram", 4).be64(0x1004).string("a").be64(0x1000).be64(8),
            "the end of the list of blocks was",
        ),
        (ram().start(&[]), "not section 0x01"),
        (
            ram().header(4, 9, "x/odd-early", 1),
            "the section \"x/odd-early\", version 1, before the first page is not",
        ),
        (ram().header(4, 9, EARLY, 2), "version 2, before the first page is not"),
        (ram().virtio_mem(3, &[0b1000]), "a bitmap that agrees with the plugged size was expected"),
        (
            ram().header(4, 3, EARLY, 1).be64(0).be64(3).be64(2).be32(0).be64(0),
            "a region of whole blocks was",
        ),
        (
            ram().header(4, 3, EARLY, 1).be64(0).be64(1 << 60).be64(1 << 21).be32(0).be64(0),
            "more than 16777216 blocks of",
        ),
        (
            ram()
                .header(4, 3, EARLY, 1)
                .be64(0)
                .be64(4096)
                .be64(4096)
                .be32(0)
                .be64(4096)
                .be64(1)
                .footer(4),
            "the section's id in its footer was",
        ),
        (ram().raw(&[2]).be32(3), "the id of RAM's section was"),
        (
            part(&|w| w.zero(None, 0)),
            "the name of a block was expected, not 0x022 (ZERO, CONTINUE)",
        ),
        (part(&|w| w.zero(Some("b"), 0)), "a block of the list was expected, not \"b\""),
        (
            part(&|w| w.zero(Some("a"), 0x2000)),
            "a page inside its block was expected, not offset 0x2000 of 0x2000",
        ),
        (
            part(&|w| w.record(Some("a"), 2).raw(&[1])),
            "a page of zeros was expected, not one of 0x01",
        ),
        (part(&|w| w.be64(0x40)), "a record of RAM with 0x040 (XBZRLE) is not"),
        (part(&|w| w.be64(0x200)), "with 0x200 (MULTIFD_FLUSH) is not"),
        (part(&|w| w.be64(0x1010)), "with 0x010 (EOS) is not"),
        (part(&|w| w.be64(0x0a)), "with 0x00a (ZERO, PAGE) is not"),
        (part(&|w| w.be64(0x808)), "with 0x808 (PAGE, no known flag) is not"),
        (ram().part(2, |w| w).raw(&[8, 0, 3]), "command POSTCOPY_ADVISE is not"),
        (ram().part(2, |w| w).raw(&[8, 0, 11, 0, 1]), "a command without data was"),
        (ram().part(2, |w| w).raw(&[1]), "RAM or a device was expected, not section 0x01"),
        (ram().part(3, |w| w).raw(&[2]), "a device's section was expected, not section 0x02"),
        (ram().part(2, |w| w).end("[]"), "the description of the devices at byte"),
        (
            ram().part(2, |w| w).end(r#"{"page_size": 8192, "devices": []}"#),
            "a page size of 8192 is not",
        ),
        (
            ram().part(2, |w| w).end(&format!("{}{}", "[".repeat(200), "]".repeat(200))),
            "is not understood",
        ),
        (
            ram().part(2, |w| w).device(4, "x", b"").raw(&[0]),
            "before the description of the devices",
        ),
    ] {
        let text = said(&writer);
        assert!(text.contains(wanted), "{text:?}, not {wanted:?}");
    }
}

#[test]
fn a_plain_migration_is_read_too() {
    let writer = Writer::new()
        .raw(&[5])
        .string("configuration/uuid")
        .be32(1)
        .raw(&[1; 16])
        .start(&[("a", 0x1000)])
        .part(2, |w| w.zero(Some("a"), 0))
        .raw(&[8, 0, 11, 0, 0])
        .part(3, |w| w.page(None, 0, &[3; PAGE]))
        .end(r#"{"page_size": 4096, "devices": []}"#);
    let rest = blind(&writer.0).unwrap();
    assert_eq!((rest.pages, rest.zero_pages, rest.unaccounted), (1, 1, None));
}

#[test]
fn a_stream_cut_anywhere_is_an_error_that_says_where() {
    let Writer(bytes) = small();
    for cut in 0..bytes.len() {
        match blind(&bytes[..cut]).unwrap_err() {
            StreamError::Cut { at, .. } | StreamError::NoDescription { at } => {
                assert_eq!(at, cut as u64);
            }
            other => panic!("cut at {cut}: {other}"),
        }
    }
}

#[test]
fn what_is_kept_has_a_limit() {
    let Writer(bytes) = small();
    let needed = blind(&bytes).unwrap().device_state.len();
    for limit in 0..needed {
        match read(bytes.as_slice(), &mut Blind, limit).unwrap_err() {
            StreamError::Limit { limit: said, what: "bytes beside the pages", .. } => {
                assert_eq!(said, limit as u64);
            }
            other => panic!("limit {limit}: {other}"),
        }
    }
    let state = read(bytes.as_slice(), &mut Blind, needed).unwrap().device_state;
    assert!(state.len() == needed && state.capacity() == needed);
    // Devices without an end.
    let head = Writer::new().start(&[("a", 0x1000)]).part(2, |w| w).raw(&[4]);
    let endless = head.0.as_slice().chain(io::repeat(4));
    assert!(matches!(read(endless, &mut Blind, 5 << 20), Err(StreamError::Limit { .. })));
}

#[test]
fn what_the_sink_refuses_ends_the_reading() {
    for call in 1..=5 {
        let mut tape = Tape(Vec::new(), Some(call));
        let error = read(small().0.as_slice(), &mut tape, LIMIT).unwrap_err();
        assert!(matches!(error, StreamError::Refused { .. }), "{error}");
        assert_eq!(tape.0.len(), call);
    }
}

/// Fails once in a while, and once for good.
struct Failing<'a>(&'a [u8], u32);

impl Read for Failing<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        match self.1 {
            1 | 3 => Err(ErrorKind::Interrupted.into()),
            5 => Err(ErrorKind::TimedOut.into()),
            _ => self.0.read(&mut into[..10]),
        }
    }
}

#[test]
fn a_socket_that_fails_is_told_from_one_that_ends() {
    let error = read(Failing(&small().0, 0), &mut Blind, LIMIT).unwrap_err();
    assert!(matches!(error, StreamError::Read { at: 20, .. }), "{error:?}");
}

#[test]
fn devices_that_are_not_as_described_are_told() {
    let walk = |json: &str, at: u64, wanted: &str| {
        let writer = Writer::new()
            .start(&[("a", 0x1000)])
            .part(2, |w| w)
            .device(4, "timer", b"1234")
            .device(5, "cpu", b"12");
        let ram = 15 + 17 + 8 + 10 + 8 + 5 + 18;
        let json = format!(r#"{{"page_size": 4096, "devices": [{json}]}}"#);
        let unaccounted = blind(&writer.end(&json).0).unwrap().unaccounted;
        let expected = Unaccounted { at: ram + at, wanted: wanted.into() };
        assert_eq!(unaccounted, (!wanted.is_empty()).then_some(expected));
    };
    let device = |name: &str, version: u32, len: u64| {
        let (id, fields) = (r#""instance_id": 0"#, format!(r#"[{{"size": {len}}}]"#));
        format!(r#"{{"name": "{name}", {id}, "version": {version}, "fields": {fields}}}"#)
    };
    let (timer, cpu) = (device("timer", 1, 4), device("cpu", 1, 2));
    walk(&format!("{timer}, {cpu}"), 0, "");
    walk(&timer, 28, "the end of the devices");
    walk(&cpu, 0, "\"cpu\", instance 0, 2 bytes");
    walk(&format!("{timer}, {cpu}, {cpu}"), 52, "\"cpu\", instance 0, 2 bytes");
    for wrong in [device("cpu", 2, 2), device("cpu", 1, 3), device("cpu", 1, u64::MAX)] {
        let len = wrong.rsplit(' ').next().unwrap().trim_end_matches(['}', ']']);
        walk(&format!("{timer}, {wrong}"), 28, &format!("\"cpu\", instance 0, {len} bytes"));
    }
    let huge = device("cpu", 1, u64::MAX).replace("]", ", {\"size\": 1}]");
    let json = format!(r#"{{"page_size": 4096, "devices": [{huge}]}}"#);
    let writer = Writer::new().start(&[("a", 0x1000)]).part(2, |w| w).end(&json);
    assert!(matches!(blind(&writer.0), Err(StreamError::Description { .. })));
}

#[test]
fn one_bit_loses_no_page_unseen() {
    let Writer(bytes) = small();
    let whole = blind(&bytes).unwrap();
    let mut changed = bytes.clone();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            changed[at] ^= 1 << bit;
            if let Ok(rest) = blind(&changed) {
                // A PART that became something else is no device that was described.
                let pages = rest.pages == whole.pages && rest.zero_pages == whole.zero_pages;
                assert!(pages || rest.unaccounted.is_some(), "byte {at:#x}");
            }
            changed[at] ^= 1 << bit;
        }
    }
}

/// A page record of a made stream: block, page, whether it is one of zeros, whether a PART ends.
type Record = (usize, u64, bool, bool);

proptest! {
    #[test]
    fn what_was_written_is_read(lens in prop::collection::vec(1u64..9, 1..5),
                                records in prop::collection::vec(any::<Record>(), 0..40)) {
        let names = ["pc.ram", "vga.vram", "", "0000:00:01.0/vm0"];
        let blocks: Vec<_> =
            names.iter().copied().zip(lens.iter().map(|pages| pages * PAGE as u64)).collect();
        let mut told = vec![Told::Blocks(
            blocks.iter().map(|(name, used)| Block { name: (*name).into(), used: *used }).collect(),
        )];
        let mut writer = Writer::new().start(&blocks).raw(&[2]).be32(2);
        let mut last = None;
        for (block, page, zero, ends) in records {
            let block = block % blocks.len();
            let offset = page % lens[block] * PAGE as u64;
            let name = (last != Some(block)).then_some(blocks[block].0);
            last = Some(block);
            let fill = u8::try_from(page % 256).unwrap();
            if zero {
                writer = writer.zero(name, offset);
                told.push(Told::Zero(block, offset));
            } else {
                writer = writer.page(name, offset, &[fill; PAGE]);
                told.push(Told::Page(block, offset, fill));
            }
            if ends {
                writer = writer.be64(0x10).footer(2).raw(&[2]).be32(2);
            }
        }
        writer = writer.be64(0x10).footer(2).end(r#"{"page_size": 4096, "devices": []}"#);
        let mut tape = Tape::default();
        let rest = read(writer.0.as_slice(), &mut tape, LIMIT).unwrap();
        prop_assert_eq!(tape.0, told);
        let again = blind(&rest.device_state).unwrap();
        prop_assert_eq!(again.device_state, rest.device_state);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0usize..4000) {
        let Writer(mut whole) = small();
        whole.truncate(keep);
        whole.extend_from_slice(&bytes);
        let _ = blind(&whole);
    }
}
