//! Real texts of real machines: QEMU 7.2 and 10.0, and what we make of them.
//!
//! `tests/golden/VERSION/MACHINE/` holds what one guest answered, a few seconds into its firmware
//! (`pc-reset`: before its first instruction): the monitor's texts, the answers to all other
//! queries, and the memory ranges of the dump that the same guest wrote (`dump-guest-memory`),
//! which is QEMU's own opinion on what the guest's memory is.
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod recorded;

use qemu::mtree::{Entry, FlatView};
use qemu::view::{GuestView, ViewError};
use qemu::{FlatViews, Qmp, facts, ramblock};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(20);

/// One directory of `tests/golden`.
struct Golden {
    name: String,
    dir: PathBuf,
}

fn goldens() -> Vec<Golden> {
    let golden = |(name, dir)| Golden { name, dir };
    let list: Vec<Golden> = recorded::machines("golden").into_iter().map(golden).collect();
    assert_eq!(list.len(), 20, "two versions of ten machines");
    list
}

impl Golden {
    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap()
    }

    /// All answers by command and arguments; the long texts lie in files of their own.
    fn answers(&self) -> Answers {
        let mut greeting = Value::Null;
        let mut by_query = HashMap::new();
        for line in self.text("answers.jsonl").lines() {
            let mut line: Value = serde_json::from_str(line).unwrap();
            if line.get("greeting").is_some() {
                greeting = line["greeting"].take();
            } else {
                let command = line["command"].as_str().unwrap();
                by_query.insert(key(command, &line["arguments"]), line["answer"].clone());
            }
        }
        let mut answers = Answers { greeting, by_query };
        let size: Value = serde_json::from_str(&self.text("memory-size-summary.json")).unwrap();
        answers.set("query-memory-size-summary", json!({}), json!({ "return": size }));
        let ramblock = json!({ "human-readable-text": self.text("x-query-ramblock.txt") });
        answers.set("x-query-ramblock", json!({}), json!({ "return": ramblock }));
        answers.set_hmp("info mtree -f -o", &self.text("info-mtree-f-o.txt"));
        answers
    }

    /// Ranges of the dump: address and length.
    fn dump(&self) -> Vec<(u64, u64)> {
        let number =
            |text: &str| u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap();
        let text = self.text("dump-loads.txt");
        text.lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(gpa, len)| (number(gpa), number(len)))
            .collect()
    }
}

fn key(command: &str, arguments: &Value) -> String {
    format!("{command} {arguments}")
}

struct Answers {
    greeting: Value,
    by_query: HashMap<String, Value>,
}

impl Answers {
    fn set(&mut self, command: &str, arguments: Value, answer: Value) {
        self.by_query.insert(key(command, &arguments), answer);
    }

    fn set_hmp(&mut self, line: &str, text: &str) {
        let text = text.replace('\n', "\r\n");
        let arguments = json!({ "command-line": line });
        self.set("human-monitor-command", arguments, json!({ "return": text }));
    }

    /// Changes every text of the human monitor and of `x-query-ramblock`.
    fn replace(&mut self, from: &str, to: &str) {
        let mut hits = 0;
        for answer in self.by_query.values_mut() {
            let (from, to) = (json_inner(from), json_inner(to));
            let text = answer.to_string();
            hits += text.matches(&from).count();
            *answer = serde_json::from_str(&text.replace(&from, &to)).unwrap();
        }
        assert!(hits > 0, "{from:?} stands in no answer");
    }

    /// A monitor that gives these answers.
    fn serve(self) -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            writeln!(out, "{}", self.greeting).unwrap();
            for line in BufReader::new(theirs).lines() {
                let query: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let key = key(query["execute"].as_str().unwrap(), &query["arguments"]);
                let not_recorded =
                    json!({ "error": { "class": "GenericError", "desc": "not recorded" } });
                let mut answer = self.by_query.get(&key).cloned().unwrap_or(not_recorded);
                answer["id"] = query["id"].clone();
                if writeln!(out, "{answer}").is_err() {
                    break;
                }
            }
        });
        Qmp::over(ours, Path::new("golden"), WAIT, None).unwrap()
    }
}

fn json_inner(text: &str) -> String {
    json!(text).to_string().trim_matches('"').to_owned()
}

fn take(answers: Answers) -> Result<GuestView, ViewError> {
    GuestView::take(&mut answers.serve(), WAIT)
}

fn render_entries(view: &FlatView) -> String {
    let mut out = String::new();
    for space in &view.address_spaces {
        writeln!(out, "AS {:?} root {:?}", space.name, space.root).unwrap();
    }
    for entry in &view.entries {
        let Entry { first, last, name, offset, .. } = entry;
        let word = entry.range_type.word();
        let nonvolatile = if entry.nonvolatile { "nv-" } else { "" };
        let owner = entry.owner.as_ref().map_or("-".into(), ToString::to_string);
        let parent = entry.parent.as_ref().map_or("-".into(), ToString::to_string);
        let prio = entry.priority;
        writeln!(
            out,
            "{first:#x}-{last:#x} {nonvolatile}{word} {prio} {name:?} @{offset:#x} {owner} {parent}"
        )
        .unwrap();
    }
    out
}

fn render_regions(view: &GuestView) -> String {
    let mut out = format!("{:?}\n", view.size);
    for shown in &view.regions {
        let region = &shown.region;
        let (kind, access) = (region.kind.word(), if region.readonly { "ro" } else { "rw" });
        writeln!(
            out,
            "{:#x} {:#x} {kind} {access} {:?} of {} hva {:x?} block {:?} + {:#x} page {:?}",
            region.gpa,
            region.len,
            region.name,
            region.owner.as_deref().unwrap_or("-"),
            shown.hva,
            region.block,
            region.block_offset,
            shown.block_page_size,
        )
        .unwrap();
    }
    out
}

#[test]
fn flat_views() {
    for golden in goldens() {
        let with_owners = FlatViews::parse(&golden.text("info-mtree-f-o.txt")).unwrap();
        let memory = with_owners.memory().unwrap();
        insta::assert_snapshot!(format!("flat-{}", golden.name), render_entries(memory));

        let plain = FlatViews::parse(&golden.text("info-mtree-f.txt")).unwrap();
        let mut bare = memory.entries.clone();
        for entry in &mut bare {
            (entry.owner, entry.parent, entry.orphan) = (None, None, false);
        }
        assert_eq!(plain.memory().unwrap().entries, bare, "{}", golden.name);
        assert_eq!(plain.views.len(), with_owners.views.len(), "{}", golden.name);
    }
}

#[test]
fn ram_blocks() {
    for golden in goldens() {
        let text = golden.text("x-query-ramblock.txt");
        let blocks = ramblock::parse(&text).unwrap();
        assert_eq!(blocks.len(), text.lines().filter(|line| !line.is_empty()).count() - 1);
        let has_hva = golden.name.starts_with("10.0");
        for block in &blocks {
            assert_eq!((block.hva.is_some(), block.read_only.is_some()), (has_hva, has_hva));
            // The columns are as wide as QEMU prints them.
            let row = format!("{:>24} ", block.name);
            assert!(text.contains(&row), "{}: {row:?}", golden.name);
        }
    }
}

#[test]
fn regions() {
    for golden in goldens() {
        let view = take(golden.answers()).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        insta::assert_snapshot!(format!("regions-{}", golden.name), render_regions(&view));
        assert_eq!(view.mtree, golden.text("info-mtree-f-o.txt"));
        assert!(view.same_memory(&take(golden.answers()).unwrap()));
        // A block that no region shows, such as a backend without a device, is no memory of the guest's.
        let mut other = view.clone();
        let unused = qemu::RamBlock { name: "spare".into(), ..other.blocks[0].clone() };
        other.blocks.insert(0, unused);
        for region in &mut other.regions {
            region.block_index = region.block_index.map(|index| index + 1);
        }
        assert!(view.same_memory(&other));
        other.blocks[1].used += 4096;
        let shows = view.regions.iter().any(|region| region.block_index == Some(0));
        assert_eq!(view.same_memory(&other), !shows);
    }
}

/// The image is what QEMU's dump is, but for two differences that are meant. The dump leaves out
/// what virtio-mem has not plugged, which the map holds and page states tell of. And it holds
/// NVDIMMs: QEMU means to leave them out, but asks the backend's MemoryRegion whether it is
/// nonvolatile (`guest_phys_blocks_region_add`), while the mark is on the alias that the NVDIMM
/// shows of it.
#[test]
fn the_image_holds_what_the_dump_of_qemu_holds() {
    for golden in goldens() {
        let view = take(golden.answers()).unwrap();
        let unplugged: Vec<_> = view
            .devices
            .iter()
            .filter(|d| d.device_type == facts::DeviceType::VirtioMem && d.size == Some(0))
            .map(|device| device.addr.unwrap())
            .collect();
        let mut ours: Vec<(u64, u64)> = Vec::new();
        for region in view.map().unwrap().regions() {
            let dumped = region.kind.in_image() || region.kind == evidence::Kind::Nvdimm;
            if !dumped || unplugged.contains(&region.gpa) {
                continue;
            }
            match ours.last_mut() {
                Some((gpa, len)) if *gpa + *len == region.gpa => *len += region.len,
                _ => ours.push((region.gpa, region.len)),
            }
        }
        assert_eq!(ours, golden.dump(), "{}", golden.name);
    }
}

fn golden(name: &str) -> Golden {
    goldens().into_iter().find(|golden| golden.name == name).unwrap()
}

#[test]
fn facts_are_read() {
    let mut qmp = golden("10.0-q35-both-sides").answers().serve();
    assert_eq!((qmp.version().qemu.major, qmp.version().qemu.minor), (10, 0));
    let mut facts = facts::Facts::of(&mut qmp, WAIT);
    assert_eq!(facts.name().unwrap().as_deref(), Some("both"));
    assert_eq!(facts.uuid().unwrap(), "12345678-1234-1234-1234-123456789abc");
    assert_eq!(facts.machine_type().unwrap(), "pc-q35-10.0");
    assert_eq!(facts.status().unwrap(), facts::Status { status: "running".into(), running: true });
    assert_eq!(facts.kvm().unwrap(), facts::Kvm { present: true, enabled: false });
    assert_eq!(facts.confidential().unwrap(), None);
    assert_eq!(facts.migration().unwrap(), qemu::facts::Migration::default());
    assert_eq!(qemu::balloon::take(&mut facts).unwrap(), None);
}

/// The listing and the properties are those of QEMU 10.0 with `-device virtio-balloon-pci,id=b0,free-page-reporting=on`,
/// the figures of a guest that was asked for them.
#[test]
fn a_balloon_tells_of_itself() {
    let mut answers = golden("7.2-q35-devices").answers();
    let listed = |path: &str| json!({ "path": path });
    let children = json!([{"name": "type", "type": "string"}, {"name": "b0", "type": "child<virtio-balloon-pci>"}]);
    answers.set("qom-list", listed("/machine/peripheral"), json!({ "return": children }));
    answers.set("qom-list", listed("/machine/peripheral-anon"), json!({ "return": [] }));
    let mut property = |name: &str, answer: Value| {
        answers.set("qom-get", json!({"path": "/machine/peripheral/b0", "property": name}), answer);
    };
    property("free-page-reporting", json!({"return": true}));
    let none = "Property 'virtio-balloon-pci.free-page-hint' not found";
    property("free-page-hint", json!({"error": {"class": "GenericError", "desc": none}}));
    property("guest-stats-polling-interval", json!({"return": 2}));
    let stats = json!({"stat-free-memory": 4096, "stat-swap-in": u64::MAX});
    property("guest-stats", json!({"return": {"stats": stats, "last-update": 1_764_339_999}}));
    let mut qmp = answers.serve();
    let balloon = qemu::balloon::take(&mut facts::Facts::of(&mut qmp, WAIT)).unwrap().unwrap();
    assert_eq!(balloon.device.as_deref(), Some("/machine/peripheral/b0"));
    assert_eq!(balloon.leaves, 96 << 20);
    assert!(balloon.free_page_reporting && !balloon.free_page_hint);
    let told = balloon.statistics.unwrap();
    assert_eq!((told.interval_s, told.updated_s), (2, Some(1_764_339_999)));
    assert_eq!(told.values, [("stat-free-memory".to_owned(), 4096)].into());
}

#[test]
fn confidential_guests_are_told_from_qemus_without_the_feature() {
    let ask = |sev: Value, support: Value| {
        let mut answers = golden("10.0-pc").answers();
        answers.set("query-sev", json!({}), sev);
        let link = json!({ "path": "/machine", "property": "confidential-guest-support" });
        answers.set("qom-get", link, support);
        facts::Facts::of(&mut answers.serve(), WAIT).confidential()
    };
    let refused = |class: &str, desc: &str| json!({"error": {"class": class, "desc": desc}});
    let none = || json!({ "return": "" });
    let off = || json!({ "return": { "enabled": false } });
    assert!(ask(json!({ "return": { "enabled": true } }), none()).unwrap().is_some());
    assert!(ask(off(), json!({ "return": "/objects/tdx0" })).unwrap().is_some());
    assert_eq!(ask(refused("CommandNotFound", "no such command"), none()).unwrap(), None);
    let absent = refused("GenericError", "SEV feature is not available");
    assert_eq!(ask(absent, none()).unwrap(), None);
    let old = refused(
        "GenericError",
        "Property 'pc-i440fx-4.0-machine.confidential-guest-support' not found",
    );
    assert_eq!(ask(off(), old).unwrap(), None);
    assert!(ask(refused("GenericError", "out of memory"), none()).is_err());
    assert!(ask(off(), refused("GenericError", "out of memory")).is_err());
    assert!(ask(json!({ "return": {} }), none()).is_err());
}

/// Each of these is a machine that contradicts itself.
#[test]
fn contradictions_are_refused_with_both_sides() {
    let refusal = |name: &str, change: &dyn Fn(&mut Answers)| {
        let mut answers = golden(name).answers();
        change(&mut answers);
        take(answers).unwrap_err().to_string()
    };

    let text = refusal("10.0-pc", &|answers| {
        let size = json!({ "return": { "base-memory": 134_217_728, "plugged-memory": 4096 } });
        answers.set("query-memory-size-summary", json!({}), size);
    });
    assert!(text.contains("134221824") && text.contains("67108864"), "{text}");

    // A NUMA node's RAM counts as RAM: without it the sum is wrong.
    let text = refusal("7.2-q35-numa", &|answers| {
        answers.replace("/machine/pc.ram[0]", "/machine/unattached/pci[0]");
    });
    assert!(text.contains("not recorded"), "{text}");

    let text = refusal("10.0-pc", &|answers| {
        answers
            .replace("Host virtual address for 0x0 (pc.ram)", "Host virtual address for 0x0 (vga)");
    });
    assert!(text.contains("pc.ram") && text.contains("vga"), "{text}");

    let text = refusal("10.0-pc", &|answers| {
        answers.set_hmp(
            "gpa2hva 0x3ffffff",
            "Host virtual address for 0x3ffffff (pc.ram) is 0x1000\n",
        );
    });
    assert!(text.contains("0x3ffffff") && text.contains("0x1000"), "{text}");

    let text = refusal("7.2-pc", &|answers| {
        answers.set_hmp("gpa2hva 0x100000", "No memory is mapped at address 0x100000\n");
    });
    assert!(text.contains("No memory is mapped at address 0x100000"), "{text}");

    let text = refusal("7.2-pc", &|answers| {
        answers.set_hmp("gpa2hva 0x0", "unknown command: 'gpa2hva'\n");
    });
    assert!(text.contains("unknown command"), "{text}");

    let text = refusal("7.2-pc", &|answers| {
        answers.replace("(prio 0, ram): pc.ram", "(prio 0, nvram): pc.ram");
    });
    assert!(text.contains("line ") && text.contains("nvram"), "{text}");
}

/// In 10.0 the RAMBlocks carry addresses; they must agree with `gpa2hva` and with the offsets.
#[test]
fn a_ramblock_elsewhere_is_refused() {
    let golden = golden("10.0-pc");
    let blocks = ramblock::parse(&golden.text("x-query-ramblock.txt")).unwrap();
    let ram = blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    for (moved, what) in
        [(0x1000u64, "no RAMBlock"), (0u64.wrapping_sub(0x1000), "at offset 0x1000")]
    {
        let mut answers = golden.answers();
        let hva = ram.hva.unwrap();
        answers.replace(&format!("0x{hva:016x}"), &format!("0x{:016x}", hva.wrapping_add(moved)));
        let text = take(answers).unwrap_err().to_string();
        assert!(text.contains(what) && text.contains(&format!("{hva:#x}")), "{text}");
    }
}

/// In 7.2 they do not: then all regions of one RAMBlock must lie at one base.
#[test]
fn two_bases_of_one_ramblock_are_refused() {
    let mut answers = golden("7.2-q35-both-sides").answers();
    for gpa in ["0x100000000", "0x103ffffff"] {
        let offset = u64::from_str_radix(&gpa[2..], 16).unwrap() - (1 << 32);
        let hva = 0x7000_0000_0000 + offset;
        let text = format!("Host virtual address for {gpa} (pc.ram) is {hva:#x}\n");
        answers.set_hmp(&format!("gpa2hva {gpa}"), &text);
    }
    let text = take(answers).unwrap_err().to_string();
    assert!(text.contains("0x700000000000") && text.contains("another region"), "{text}");
}

/// A device that answers at a range which is called `rom` is never read.
#[test]
fn rom_that_is_not_memory_becomes_romd() {
    let mut answers = golden("10.0-pc").answers();
    answers.set_hmp("gpa2hva 0xfffc0000", "Memory at address 0xfffc0000 is not RAM\n");
    let view = take(answers).unwrap();
    let bios = view.regions.iter().find(|r| r.region.name == "pc.bios").unwrap();
    assert_eq!((bios.region.kind, bios.hva), (evidence::Kind::Romd, None));
}

/// `x-query-ramblock` is marked unstable: without it HMP's `info ramblock` serves.
#[test]
fn without_x_query_ramblock() {
    let golden = golden("10.0-pc");
    let mut answers = golden.answers();
    let gone = json!({"error": {"class": "CommandNotFound", "desc": "not found"}});
    answers.set("x-query-ramblock", json!({}), gone);
    answers.set_hmp("info ramblock", &golden.text("x-query-ramblock.txt"));
    assert!(take(answers).unwrap().same_memory(&take(golden.answers()).unwrap()));
}
