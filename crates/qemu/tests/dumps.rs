//! Real dumps: QEMU 7.2 and 10.0, what stands before memory (`tests/dumps/README.md`).
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod recorded;

use proptest::prelude::*;
use qemu::dump::{self, DumpError, Head, Machine, Registers, SegmentRegister};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;

/// More than any of these has before memory.
const LIMIT: usize = 16 << 10;

struct Golden {
    name: String,
    /// Up to memory.
    head: Vec<u8>,
    /// A whole dump of one byte of memory, a moment later.
    byte: Vec<u8>,
    /// `info registers -a` of the same guest, which stood still.
    registers: String,
    facts: Value,
}

fn goldens() -> Vec<Golden> {
    let golden = |(name, dir): (String, PathBuf)| {
        let text = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
        Golden {
            name,
            head: fs::read(dir.join("head.elf")).unwrap(),
            byte: fs::read(dir.join("byte.elf")).unwrap(),
            registers: text("registers.txt"),
            facts: serde_json::from_str(&text("facts.json")).unwrap(),
        }
    };
    let list: Vec<Golden> = recorded::machines("dumps").into_iter().map(golden).collect();
    assert_eq!(list.len(), 19, "eight machines of two versions, three of ARM");
    list
}

/// Those that are taken: all but that of 32-bit ARM.
fn taken() -> Vec<Golden> {
    goldens().into_iter().filter(|golden| !golden.name.ends_with("virt-arm")).collect()
}

impl Golden {
    fn head(&self) -> Head {
        let (head, _) = dump::head(self.head.as_slice(), LIMIT)
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
        head
    }

    /// What the monitor says of each CPU: the first number, and for segment registers all of them,
    /// by the register's name.
    fn told(&self) -> Vec<(u32, HashMap<String, Vec<u64>>)> {
        let mut cpus: Vec<(u32, HashMap<_, _>)> = Vec::new();
        for line in self.registers.lines() {
            if let Some(index) = line.strip_prefix("CPU#") {
                cpus.push((index.trim().parse().unwrap(), HashMap::new()));
            } else if let Some((_, told)) = cpus.last_mut() {
                told.extend(registers_of(line));
            }
        }
        cpus
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// `NAME=hex hex ..`, several in a line.
fn registers_of(line: &str) -> Vec<(String, Vec<u64>)> {
    let mut list = Vec::new();
    let parts: Vec<_> = line.split('=').collect();
    for pair in parts.windows(2) {
        let name = pair[0].split_whitespace().next_back().unwrap_or_default();
        let words = pair[1].split([' ', ':']).filter(|word| !word.is_empty());
        let words: Vec<_> = words.map_while(hex).collect();
        list.push((name.to_owned(), words));
    }
    list
}

#[test]
fn memory_is_that_of_the_program_headers() {
    for golden in taken() {
        let head = golden.head();
        let ranges: Vec<_> =
            head.segments.list().iter().map(|s| (s.range.start(), s.range.len())).collect();
        let wanted: Vec<(u64, u64)> =
            serde_json::from_value(golden.facts["loads"].clone()).unwrap();
        assert_eq!(ranges, wanted, "{}", golden.name);
        assert_eq!(golden.facts["total"], head.memory_len(), "{}", golden.name);
        assert_eq!(golden.facts["cpus"], head.cpus.len(), "{}", golden.name);
        // Beside memory there are the headers, and at the end the sections' names.
        let beside = head.len - head.memory_len();
        assert_eq!(beside, u64::try_from(golden.head.len()).unwrap() + 11, "{}", golden.name);
        assert_eq!(head.bytes, golden.head);
    }
}

#[test]
fn the_first_cpu_names_the_machine() {
    for golden in taken() {
        let head = golden.head();
        let machine = match golden.name.split_once('-').unwrap().1 {
            "q35-linux" => Machine::X86_64,
            "virt" | "virt-sve" => Machine::Aarch64,
            _ => Machine::I386,
        };
        let elf64 = !golden.name.ends_with("none");
        assert_eq!((head.machine, head.is_elf64), (machine, elf64), "{}", golden.name);
    }
}

#[test]
fn registers_are_those_of_the_monitor() {
    for golden in taken() {
        let told = golden.told();
        let cpus = golden.head().cpus;
        let name = &golden.name;
        let indexes: Vec<_> = told.iter().map(|(index, _)| *index).collect();
        assert_eq!(cpus.iter().map(|cpu| cpu.index).collect::<Vec<_>>(), indexes, "{name}");
        if name.ends_with("hotplug") {
            assert_eq!(indexes, [0, 2, 1], "{name}");
        }
        for (cpu, (_, told)) in cpus.iter().zip(&told) {
            match &cpu.registers {
                Registers::X86(x86) => check_x86(name, x86, told),
                Registers::Aarch64(arm) => check_aarch64(name, arm, told),
            }
        }
    }
}

fn check_x86(name: &str, x86: &dump::X86, told: &HashMap<String, Vec<u64>>) {
    let wide = told.contains_key("RAX");
    let one = |register: &str| match (told.get(register), register) {
        (Some(words), _) => words[0],
        // Outside long mode the monitor shows neither.
        (None, "R8" | "R9" | "R10" | "R11" | "R12" | "R13" | "R14" | "R15") => 0,
        (None, _) => told[&register.replace('R', "E")][0],
    };
    let general = [
        ("RAX", x86.rax),
        ("RBX", x86.rbx),
        ("RCX", x86.rcx),
        ("RDX", x86.rdx),
        ("RSI", x86.rsi),
        ("RDI", x86.rdi),
        ("RSP", x86.rsp),
        ("RBP", x86.rbp),
        ("R8", x86.r8),
        ("R9", x86.r9),
        ("R10", x86.r10),
        ("R11", x86.r11),
        ("R12", x86.r12),
        ("R13", x86.r13),
        ("R14", x86.r14),
        ("R15", x86.r15),
        ("RIP", x86.rip),
        ("RFL", x86.rflags),
        ("CR0", x86.cr0),
        ("CR2", x86.cr2),
        ("CR3", x86.cr3),
        ("CR4", x86.cr4),
    ];
    for (register, value) in general {
        assert_eq!(value, one(register), "{name}: {register}");
    }
    let segments = [
        ("ES", x86.es),
        ("CS", x86.cs),
        ("SS", x86.ss),
        ("DS", x86.ds),
        ("FS", x86.fs),
        ("GS", x86.gs),
        ("LDT", x86.ldt),
        ("TR", x86.tr),
    ];
    for (register, SegmentRegister { selector, limit, flags, base }) in segments {
        // The monitor shows the flags without the limit's high digit, which is no flag.
        let found = [selector.into(), base, limit.into(), u64::from(flags & 0x00f0_ff00)];
        let mut wanted = told[register].clone();
        wanted[3] &= 0x00f0_ff00;
        assert_eq!(found, wanted[..4], "{name}: {register}");
    }
    for (register, table) in [("GDT", x86.gdt), ("IDT", x86.idt)] {
        assert_eq!([table.base, table.limit.into()], told[register][..2], "{name}: {register}");
    }
    // Debian's kernel on `-cpu max`: 5-level paging, and a kernel that had come from user mode.
    assert_eq!(x86.la57(), wide, "{name}");
    assert!(x86.kernel_gs_base.is_some());
}

fn check_aarch64(name: &str, arm: &dump::Aarch64, told: &HashMap<String, Vec<u64>>) {
    for (number, x) in arm.x.iter().enumerate() {
        assert_eq!(told[&format!("X{number:02}")], [*x], "{name}: x{number}");
    }
    for (register, value) in [("PC", arm.pc), ("SP", arm.sp), ("PSTATE", arm.pstate)] {
        assert_eq!(told[register][0], value, "{name}: {register}");
    }
    // Not shown with SVE, nor of a CPU whose floating point is off.
    if told.contains_key("Q00") {
        for (number, v) in arm.v.iter().enumerate() {
            let [high, low] = told[&format!("Q{number:02}")][..] else { panic!("two halves") };
            assert_eq!(*v, u128::from(high) << 64 | u128::from(low), "{name}: q{number}");
        }
    }
    // Set by the guest on its first CPU; the second one never ran.
    let set = if arm.pc == 0 { 0 } else { 0x1234 };
    assert_eq!((arm.x[1], arm.sp), (set, set), "{name}");
    assert_eq!(arm.v[1], u128::from(set) << 64 | u128::from(set), "{name}");
}

#[test]
fn linux_leaves_its_vmcoreinfo() {
    for golden in taken() {
        let note = golden.head().guest_note;
        assert_eq!(note.is_some(), golden.name.ends_with("linux"), "{}", golden.name);
        if let Some(note) = note {
            let text = str::from_utf8(note.vmcoreinfo().unwrap()).unwrap();
            assert!(text.starts_with("OSRELEASE=6.1.") && text.contains("\nKERNELOFFSET="));
        }
    }
}

#[test]
fn a_dump_of_one_byte_is_read_to_its_end() {
    for golden in taken() {
        let whole = golden.head();
        let (head, memory) = dump::head(golden.byte.as_slice(), LIMIT).unwrap();
        let mut given = Vec::new();
        let mut take = |gpa, bytes: &[u8]| {
            given.push((gpa, bytes.len()));
            Ok(())
        };
        memory.read(&mut take).unwrap();
        let first = golden.facts["loads"][0][0].as_u64().unwrap();
        assert_eq!(given, [(first, 1)], "{}", golden.name);
        assert_eq!(head.len, u64::try_from(golden.byte.len()).unwrap(), "{}", golden.name);
        assert_eq!((head.cpus, head.guest_note), (whole.cpus, whole.guest_note));
        assert_eq!((head.machine, head.is_elf64), (whole.machine, whole.is_elf64));
    }
}

#[test]
fn thirty_two_bit_arm_is_refused_by_name() {
    let golden = goldens().into_iter().find(|golden| golden.name.ends_with("virt-arm")).unwrap();
    let error = dump::head(golden.head.as_slice(), LIMIT).unwrap_err();
    assert!(error.to_string().contains("a machine of number 40 is not supported"), "{error}");
}

/// Reads all of it.
fn read(bytes: impl Read) -> Result<Head, DumpError> {
    let (head, memory) = dump::head(bytes, LIMIT)?;
    memory.read(|_, _| Ok(()))?;
    Ok(head)
}

#[test]
fn a_dump_that_was_cut_is_no_dump() {
    for golden in taken() {
        for cut in 0..golden.byte.len() {
            let len = match read(&golden.byte[..cut]).unwrap_err() {
                DumpError::Cut { at, .. } | DumpError::MemoryCut { at, .. } => at,
                other => panic!("{}, cut at {cut}: {other}", golden.name),
            };
            assert_eq!(len, u64::try_from(cut).unwrap(), "{}", golden.name);
        }
        let longer = golden.byte.chain(&[0u8][..]);
        let error = read(longer).unwrap_err();
        let at = u64::try_from(golden.byte.len()).unwrap();
        assert!(matches!(error, DumpError::Trailing { at: found } if found == at), "{error}");
    }
}

/// Gives a few bytes at a time, as a pipe may.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 % 61 + 7;
        let len = self.1.min(into.len());
        self.0.read(&mut into[..len])
    }
}

#[test]
fn pieces_make_no_difference() {
    for golden in taken() {
        assert_eq!(read(golden.byte.as_slice()).unwrap(), read(Slow(&golden.byte, 0)).unwrap());
    }
}

#[test]
fn no_more_is_kept_than_was_allowed() {
    for golden in taken() {
        for limit in [0, 51, 130, golden.head.len() - 1] {
            let error = dump::head(golden.head.as_slice(), limit).map(drop).unwrap_err();
            assert!(matches!(error, DumpError::Limit { .. }), "{}: {error}", golden.name);
        }
        dump::head(golden.head.as_slice(), golden.head.len()).unwrap();
    }
}

proptest! {
    #[test]
    fn changed_dumps_do_no_harm(
        which in 0usize..18,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = taken().swap_remove(which).byte;
        for (index, byte) in changes {
            *index.get_mut(&mut bytes) = byte;
        }
        if let Ok(head) = read(bytes.as_slice()) {
            prop_assert_eq!(head.len, u64::try_from(bytes.len()).unwrap());
        }
    }
}
