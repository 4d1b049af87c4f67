//! Makes the golden migration streams of `crates/qemu/tests/streams`: `golden-streams DIR [CASE]`.
//!
//! Each guest is small and runs a firmware of our own, so that a stream is small and holds no other
//! program: a loop that counts up one word in each page of a ring, page after page, for ever. In an
//! image of one instant the words are equal up to some page and one less from there on. Patterns lie
//! in the rest of RAM. What the lab itself reads from the guest, once it is stopped, is recorded as
//! a digest for each block, with the ring left out.
//!
//! `DIR/VERSION/CASE/` gets `stream.zst`, `ramblock.txt` (QEMU's own list of blocks) and
//! `expect.json`.
#![forbid(unsafe_code)]

use lab::{Backing, Builder, Guest, Lab, Machine, Result, Version, failed};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

/// The pages of the ring, from 64 KiB on.
const RING: std::ops::Range<usize> = 16..144;

/// Length of the firmware: the smallest that QEMU takes.
const FIRMWARE: usize = 64 << 10;

/// The ring's loop, in real mode: `mov bx,1000; mov ds,bx; inc word [0]; add bx,100; cmp bx,9000;
/// jb -16; jmp -21`.
const LOOP: [u8; 21] = [
    0xbb, 0x00, 0x10, 0x8e, 0xdb, 0xff, 0x06, 0x00, 0x00, 0x81, 0xc3, 0x00, 0x01, 0x81, 0xfb, 0x00,
    0x90, 0x72, 0xf0, 0xeb, 0xeb,
];

/// At the reset vector, 16 bytes before the end: `jmp -32`, to the loop.
const JUMP: [u8; 3] = [0xe9, 0xdd, 0xff];

struct Case {
    name: &'static str,
    machine: Machine,
    backing: Backing,
    ram_mib: u64,
    args: &'static [&'static str],
    /// A plain migration instead of a background snapshot.
    plain: bool,
    /// Blocks that the lab reads: name, address, length.
    blocks: &'static [(&'static str, u64, u64)],
}

const BIOS: (&str, u64, u64) = ("pc.bios", (4 << 30) - FIRMWARE as u64, FIRMWARE as u64);

const CASES: [Case; 8] = [
    Case {
        name: "pc",
        machine: Machine::Pc,
        backing: Backing::Anonymous,
        ram_mib: 8,
        args: &[],
        plain: false,
        blocks: &[("pc.ram", 0, 8 * MIB), BIOS],
    },
    Case {
        name: "pc-plain",
        machine: Machine::Pc,
        backing: Backing::Anonymous,
        ram_mib: 8,
        args: &[],
        plain: true,
        blocks: &[("pc.ram", 0, 8 * MIB), BIOS],
    },
    Case {
        name: "q35",
        machine: Machine::Q35,
        backing: Backing::Anonymous,
        ram_mib: 16,
        args: &["-smp", "3"],
        plain: false,
        blocks: &[("pc.ram", 0, 16 * MIB), BIOS],
    },
    Case {
        name: "q35-devices",
        machine: Machine::Q35,
        backing: Backing::Anonymous,
        ram_mib: 8,
        args: &[
            "-device",
            "intel-iommu",
            "-device",
            "virtio-net-pci,romfile=",
            "-device",
            "e1000,romfile=",
            "-device",
            "virtio-balloon-pci",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtio-scsi-pci,id=scsi0",
            "-drive",
            "if=none,id=d0,driver=null-co,size=1M,read-zeroes=on",
            "-device",
            "virtio-blk-pci,drive=d0",
            "-drive",
            "if=none,id=d1,driver=null-co,size=1M,read-zeroes=on",
            "-device",
            "scsi-hd,drive=d1",
            "-drive",
            "if=none,id=d2,driver=null-co,size=1M,read-zeroes=on",
            "-device",
            "ide-hd,drive=d2",
            "-device",
            "qemu-xhci",
            "-device",
            "usb-tablet",
            "-device",
            "usb-kbd",
            "-device",
            "ich9-intel-hda",
            "-audiodev",
            "none,id=a0",
            "-device",
            "hda-duplex,audiodev=a0",
            "-device",
            "pcie-root-port,id=rp0,chassis=1",
            "-device",
            "bochs-display,romfile=,vgamem=4M",
            "-device",
            "pvpanic",
        ],
        plain: false,
        blocks: &[("pc.ram", 0, 8 * MIB), BIOS],
    },
    Case {
        name: "q35-memfd",
        machine: Machine::Q35,
        backing: Backing::Memfd,
        ram_mib: 8,
        args: &[],
        plain: false,
        blocks: &[("lab-ram", 0, 8 * MIB), BIOS],
    },
    Case {
        name: "q35-numa",
        machine: Machine::Q35,
        backing: Backing::Numa2,
        ram_mib: 16,
        args: &["-smp", "2"],
        plain: false,
        blocks: &[("lab-ram0", 0, 8 * MIB), ("lab-ram1", 8 * MIB, 8 * MIB), BIOS],
    },
    Case {
        name: "q35-virtio-mem",
        machine: Machine::Q35,
        backing: Backing::Anonymous,
        ram_mib: 8,
        args: &[
            "-m",
            "size=8M,slots=2,maxmem=512M",
            "-object",
            "memory-backend-ram,id=vmem0,size=128M",
            "-device",
            "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0,block-size=2M,addr=5",
            "-object",
            "memory-backend-ram,id=vmem1,size=256M",
            "-device",
            "virtio-mem-pci,id=vm1,memdev=vmem1,requested-size=0,block-size=2M,addr=6",
        ],
        plain: false,
        blocks: &[("pc.ram", 0, 8 * MIB), BIOS],
    },
    Case {
        name: "microvm",
        machine: Machine::Microvm,
        backing: Backing::Anonymous,
        ram_mib: 8,
        args: &["-M", "x-option-roms=off"],
        plain: false,
        blocks: &[("microvm.ram", 0, 8 * MIB), BIOS],
    },
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("golden-streams: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let out = args.next().ok_or_else(|| failed("say where the streams go"))?;
    let wanted = args.next();
    let lab = Lab::open()?;
    let firmware = lab.scratch().join("firmware");
    std::fs::write(&firmware, make_firmware())?;
    let patterns = lab.scratch().join("patterns");
    std::fs::write(&patterns, make_patterns())?;
    for (version, word) in [(Version::V7_2, "7.2"), (Version::V10_0, "10.0")] {
        for case in CASES.iter().filter(|c| wanted.as_ref().is_none_or(|w| w == c.name)) {
            let dir = Path::new(&out).join(word).join(case.name);
            std::fs::create_dir_all(&dir)?;
            let builder = case.builder(&lab, &firmware, &patterns).version(version);
            let qemu = lab.kit.qemu_version(version)?;
            let len = case.make(builder, &qemu, &dir)?;
            eprintln!("{word} {}: {len} bytes", case.name);
        }
    }
    Ok(std::fs::remove_dir_all(lab.scratch())?)
}

fn make_firmware() -> Vec<u8> {
    let mut bytes = vec![0; FIRMWARE];
    let vector = FIRMWARE - 16;
    bytes[vector..vector + JUMP.len()].copy_from_slice(&JUMP);
    bytes[vector - 32..][..LOOP.len()].copy_from_slice(&LOOP);
    bytes
}

/// A MiB in which every third page is full of its own number, and the others are empty.
fn make_patterns() -> Vec<u8> {
    let word = |at: usize| if (at / PAGE).is_multiple_of(3) { 1 + (at / PAGE) as u64 } else { 0 };
    (0..1 << 20).step_by(8).flat_map(|at| word(at).to_le_bytes()).collect()
}

impl Case {
    fn builder(&self, lab: &Lab, firmware: &Path, patterns: &Path) -> Builder {
        let bios = firmware.display().to_string();
        let loader = |mib: u64| {
            let at = mib * MIB;
            format!("loader,file={},addr={at:#x},force-raw=on", patterns.display())
        };
        // In the middle, and at the very end: in the last node, if there are two.
        let (middle, end) = (loader(2), loader(self.ram_mib - 1));
        let mut builder = lab
            .guest()
            .machine(self.machine)
            .backing(self.backing)
            .memory_mib(self.ram_mib)
            .name(self.name)
            .blank()
            .args(&["-bios", &bios, "-device", &middle, "-device", &end]);
        if self.machine != Machine::Microvm {
            builder = builder.args(&["-vga", "none"]);
        }
        builder.args(self.args)
    }

    fn make(&self, builder: Builder, qemu: &str, dir: &Path) -> Result<usize> {
        let mut guest = builder.boot()?;
        // The ring has to turn.
        std::thread::sleep(Duration::from_millis(300));
        let stream = self.migrate(&mut guest)?;
        let ramblock = guest.qmp("x-query-ramblock", json!({}))?;
        let ramblock = ramblock["human-readable-text"].as_str().unwrap_or_default().to_owned();
        if !self.plain {
            guest.stop()?;
        }
        let mut digests = json!({});
        for &(name, gpa, len) in self.blocks {
            let mut bytes = guest.read_own(gpa, len)?;
            if gpa == 0 {
                bytes[RING.start * PAGE..RING.end * PAGE].fill(0);
            }
            digests[name] = hex(&Sha256::digest(&bytes)).into();
        }
        let expect = json!({
            "qemu": qemu,
            "plain": self.plain,
            "ring": { "block": self.blocks[0].0, "first_page": RING.start, "pages": RING.len() },
            "sha256_without_ring": digests,
        });
        std::fs::write(dir.join("stream.zst"), zstd::encode_all(stream.as_slice(), 19)?)?;
        std::fs::write(dir.join("ramblock.txt"), ramblock.replace('\r', ""))?;
        std::fs::write(
            dir.join("expect.json"),
            format!("{}\n", serde_json::to_string_pretty(&expect)?),
        )?;
        // A plain migration leaves the guest as it may be left only here.
        if !self.plain {
            guest.finish()?;
        }
        Ok(stream.len())
    }

    /// The stream, as QEMU writes it into a socket.
    fn migrate(&self, guest: &mut Guest) -> Result<Vec<u8>> {
        let socket = guest.dir().join("stream.sock");
        let listener = UnixListener::bind(&socket)?;
        let reader = std::thread::spawn(move || {
            let mut stream = Vec::new();
            listener.accept()?.0.read_to_end(&mut stream)?;
            Ok::<_, std::io::Error>(stream)
        });
        set_snapshot(guest, !self.plain)?;
        guest.qmp("migrate", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let stream = reader.join().map_err(|_| failed("the reader panicked"))??;
        let status = loop {
            let status = guest.qmp("query-migrate", json!({}))?["status"].take();
            if status != "active" && status != "setup" && status != "device" {
                break status;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if status != "completed" {
            return Err(failed(format_args!("the migration ended as {status}")));
        }
        set_snapshot(guest, false)?;
        std::fs::remove_file(socket)?;
        Ok(stream)
    }
}

fn set_snapshot(guest: &mut Guest, state: bool) -> Result<Value> {
    let capability = json!({ "capability": "background-snapshot", "state": state });
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": [capability] }))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
