//! `map`: what it shows is what QEMU's own flat view, the host's kernel and the guest's command line say.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use lab::{Backing, Doing, Guest, Lab, Machine, Result, Version, failed, here, proc, runner};
use serde_json::Value;

use super::footprint::SmallPages;
use super::run::new_dir;

pub(crate) const TESTS: &[runner::Test] = here![
    nodes_holes_and_what_is_hidden,
    every_machine_is_mapped,
    a_balloon_and_memory_that_was_plugged_in,
];

const MIB: u64 = 1 << 20;

/// What `map --json` says of a VM, the ways to the map agreeing; and what it said on stderr.
pub(super) fn chart(lab: &Lab, vm: &str) -> Result<(Value, String)> {
    chart_by(lab, vm, &[])
}

fn chart_by(lab: &Lab, vm: &str, flags: &[&str]) -> Result<(Value, String)> {
    let out = lab.tool([&["map", "--json"], flags, &["--", vm]].concat())?.expect_code(0)?;
    let chart: Value = serde_json::from_str(&out.stdout).doing("the output of map --json")?;
    let routes = chart["routes"].as_array().cloned().unwrap_or_default();
    let names: Vec<_> = routes.iter().map(|route| &route["route"]).collect();
    assert_eq!(names, ["graph", "objects", "dump"]);
    for route in &routes {
        assert_eq!(route["difference"], Value::Null, "{route}");
        let had = route["route"] != "dump" || flags.contains(&"--probe");
        assert_eq!(route["not_had"].is_null(), had, "{route}");
    }
    Ok((chart, out.stderr))
}

fn address(value: &Value) -> Result<u64> {
    let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
    let address = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    address.ok_or_else(|| failed(format_args!("not an address: {value}")))
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().ok_or_else(|| failed(format_args!("not a number: {value}")))
}

fn regions(chart: &Value) -> Result<Vec<Value>> {
    chart["regions"].as_array().cloned().ok_or_else(|| failed("no regions"))
}

/// The regions are the lines of QEMU's flat view that are memory, in its order.
fn assert_flat_view(guest: &mut Guest, chart: &Value) -> Result<()> {
    let theirs = guest.flat_view()?.into_iter().filter(|range| range.kind != "i/o");
    let theirs: Vec<_> = theirs.map(|range| (range.gpa, range.len, range.name)).collect();
    let mut ours = Vec::new();
    for region in regions(chart)? {
        let name = region["name"].as_str().unwrap_or_default().to_owned();
        ours.push((address(&region["gpa"])?, number(&region["len"])?, name));
    }
    assert_eq!(ours, theirs);
    Ok(())
}

fn nodes_holes_and_what_is_hidden(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    let guest = lab.guest().machine(Machine::Q35).backing(Backing::Numa2).memory_mib(192);
    let mut guest = guest.both_sides_of_the_hole().append("swiotlb=noforce").boot()?;
    guest.plant_noise(16, 5)?;
    guest.stop()?;
    let vm = guest.pid().to_string();
    let (chart, said) = chart_by(lab, &vm, &["--host-nodes"])?;
    assert!(!said.contains("warning") || said.contains("no NUMA"), "{said}");
    assert_flat_view(&mut guest, &chart)?;
    let (mut resident, mut holes, mut nodes) = (0, 0, [0; 2]);
    for region in regions(&chart)? {
        let block = region["block"].as_str().unwrap_or_default();
        let Some(node) = block.strip_prefix("lab-ram") else { continue };
        let len = number(&region["len"])?;
        let pages = |what: &str| number(&region["pages"][what]);
        let (in_memory, hole) = (pages("kept_bytes")?, pages("hole_bytes")?);
        assert_eq!((in_memory + hole, pages("swapped_bytes")?), (len, 0), "{region}");
        (resident, holes) = (resident + in_memory, holes + hole);
        if region["kind"] == "ram" {
            assert_eq!(region["node"].to_string(), node, "{region}");
            nodes[usize::from(node == "1")] += len;
        }
        assert_eq!(region["hva"], format!("{:#x}", guest.hva(address(&region["gpa"])?)?));
    }
    assert!(nodes.iter().all(|bytes| (80 * MIB..=96 * MIB).contains(bytes)), "{nodes:?}");
    // What the kernel counts, but for what no region shows.
    let mut hidden = 0;
    for one in chart["hidden"].as_array().into_iter().flatten() {
        if one["name"].as_str().is_some_and(|name| name.starts_with("lab-ram")) {
            hidden += number(&one["len"])?;
        }
    }
    let vga = chart["hidden"].as_array().and_then(|list| {
        list.iter().find(|one| one["gpa"] == "0xa0000" && one["name"] == "lab-ram0")
    });
    let vga = vga.ok_or_else(|| failed(format_args!("no RAM under VGA: {}", chart["hidden"])))?;
    assert_eq!((&vga["shown_at"], &vga["offset"]), (&Value::Null, &"0xa0000".into()), "{vga}");
    let counted = guest
        .ram()?
        .iter()
        .filter(|range| range.name.starts_with("lab-ram"))
        .map(|range| proc::resident_at(guest.pid(), guest.hva(range.gpa)?))
        .collect::<Result<std::collections::BTreeSet<u64>>>()?;
    let counted: u64 = counted.iter().sum();
    assert_eq!(hidden, 0x20000, "more than what lies under VGA");
    // The page of zeros that stands for what was only read is in the page table, and counts for nobody.
    let only_read = MIB;
    let fits = resident <= counted + only_read && resident + hidden >= counted;
    assert!(fits, "{resident} of {counted}");
    let blocks = chart["blocks"].as_array().cloned().unwrap_or_default();
    let own =
        blocks.iter().filter(|b| b["name"].as_str().is_some_and(|n| n.starts_with("lab-ram")));
    let nodes: Vec<u64> = own
        .filter_map(|block| block["nodes"].as_object())
        .map(|nodes| nodes.values().filter_map(Value::as_u64).sum())
        .collect();
    let on_nodes: u64 = nodes.iter().sum();
    let no_numa = said.contains("no NUMA") && nodes.is_empty();
    assert!(no_numa || (nodes.len() == 2 && on_nodes == counted), "{on_nodes} of {counted}");
    assert!(holes > 16 * MIB, "void: {holes} bytes of holes");
    println!("         {resident} bytes in memory, {holes} in holes, {hidden} hidden");
    guest.cont()?;
    guest.assert_as_found()?;
    guest.finish()
}

/// Waits until the firmware has set up what the chipset shows: three looks in a row are the same.
fn settle(guest: &mut Guest) -> Result<()> {
    let mut looks = vec![guest.flat_view()?];
    for _ in 0..30 {
        sleep(Duration::from_secs(1));
        looks.push(guest.flat_view()?);
        if let [.., a, b, c] = &looks[..]
            && a == b
            && b == c
        {
            return Ok(());
        }
    }
    Err(failed("the firmware changes the map for ever"))
}

fn every_machine_is_mapped(lab: &Lab) -> Result<()> {
    let dir = new_dir(lab, "pictures")?;
    for (version, machine, backing, mapping) in [
        (Version::V7_2, Machine::Pc, Backing::Memfd, "shared"),
        (Version::V10_0, Machine::Microvm, Backing::Anonymous, "anonymous"),
        (Version::V7_2, Machine::Q35, Backing::PrivateFile, "private-file"),
    ] {
        let guest = lab.guest().version(version).machine(machine).backing(backing);
        // What lies behind a bridge is called as what lies behind another.
        let bridges =
            ["-device", "pcie-root-port,id=a,slot=1", "-device", "pcie-root-port,id=b,slot=2"];
        let guest = if machine == Machine::Q35 { guest.args(&bridges) } else { guest };
        let mut guest = guest.memory_mib(128).blank().boot()?;
        settle(&mut guest)?;
        let vm = guest.pid().to_string();
        let file = dir.join(format!("{version:?}-{machine:?}.svg"));
        let picture = file.to_string_lossy().into_owned();
        let what = format!("{version:?} {machine:?}");
        let flags = ["--probe", "--graph", &picture];
        let (chart, _) = chart_by(lab, &vm, &flags).doing(&what)?;
        assert_flat_view(&mut guest, &chart).doing(&what)?;
        let ram = regions(&chart)?.into_iter().find(|region| region["kind"] == "ram");
        let ram = ram.ok_or_else(|| failed("no RAM"))?;
        assert_eq!(ram["mapping"], mapping, "{what}: {ram}");
        assert_picture(&file, &chart)?;
        assert!(chart["hidden"].is_array(), "{what}: {}", chart["warnings"]);
        let again = lab.tool(["map", &vm, "--graph", &picture])?.expect_code(1)?;
        assert!(again.stderr.contains("nothing is overwritten"), "{}", again.stderr);
        assert!(again.stdout.contains("GUEST-PHYSICAL"), "what is known is shown all the same");
        let text = lab.tool(["map", &vm])?.expect_code(0)?.stdout;
        for words in ["└─ system", "agrees with the flat view", "GUEST-PHYSICAL", "RAMBLOCK"] {
            assert!(text.contains(words), "{what}: no {words:?} in {text}");
        }
        guest.assert_as_found().doing(&what)?;
        guest.finish()?;
    }
    Ok(())
}

/// A picture names every region and is XML for the lab's own eyes.
fn assert_picture(file: &Path, chart: &Value) -> Result<()> {
    let svg = fs::read_to_string(file).doing("the picture")?;
    assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"), "{svg}");
    for region in regions(chart)? {
        let gpa = region["gpa"].as_str().unwrap_or_default();
        assert!(svg.contains(&format!(">{gpa}-")), "no {gpa}");
    }
    let opened = svg.matches('<').count();
    assert_eq!(opened, svg.matches('>').count(), "a bracket that is markup in a text");
    assert!(!svg.contains("href") && !svg.contains("url("), "it loads something");
    Ok(())
}

fn a_balloon_and_memory_that_was_plugged_in(lab: &Lab) -> Result<()> {
    let guest = lab.guest().machine(Machine::Q35).memory_mib(128);
    let mut guest = guest
        .args(&["-m", "128M,slots=4,maxmem=2G", "-device", "virtio-balloon-pci,id=b"])
        .args(&["-object", "memory-backend-memfd,id=d0,size=64M"])
        .args(&["-device", "pc-dimm,id=there,memdev=d0"])
        .blank()
        .boot()?;
    settle(&mut guest)?;
    let vm = guest.pid().to_string();
    let dimms = |chart: &Value| -> Result<Vec<u64>> {
        let regions = regions(chart)?;
        let plugged =
            regions.iter().filter(|r| r["block"].as_str().is_some_and(|b| b.starts_with('d')));
        plugged.map(|region| number(&region["len"])).collect()
    };
    let (before, _) = chart(lab, &vm)?;
    // QEMU counts what was plugged in.
    assert_eq!(before["balloon"]["leaves"], 192 * MIB, "{}", before["balloon"]);
    assert_eq!(before["size"]["plugged-memory"], 64 * MIB, "{}", before["size"]);
    assert_eq!(dimms(&before)?, [64 * MIB]);
    for (command, arguments) in [
        (
            "object-add",
            serde_json::json!({"qom-type": "memory-backend-ram", "id": "d1", "size": 32 * MIB}),
        ),
        ("device_add", serde_json::json!({"driver": "pc-dimm", "id": "late", "memdev": "d1"})),
    ] {
        guest.qmp(command, arguments)?;
    }
    let (after, _) = chart_by(lab, &vm, &["--probe"])?;
    assert_eq!(dimms(&after)?, [64 * MIB, 32 * MIB]);
    assert_flat_view(&mut guest, &after)?;
    guest.finish()
}
