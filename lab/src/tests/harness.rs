//! The lab itself: guests boot, and the lab's two ways to guest memory agree.

use std::time::Duration;

use lab::{Accel, Backing, Guest, Lab, Machine, Result, Version, failed, here, pattern, skipped};

pub(crate) const TESTS: &[lab::runner::Test] = here![
    both_qemus_boot_linux,
    every_machine_has_ram_on_both_sides_of_the_hole,
    pmemsave_equals_the_labs_own_reading,
    planted_pages_lie_where_they_say,
    a_guest_not_left_as_found_is_noticed,
    this_machines_kvm,
];

fn both_qemus_boot_linux(lab: &Lab) -> Result<()> {
    for (version, name) in [(Version::V7_2, "7.2"), (Version::V10_0, "10.0")] {
        let mut guest = lab.guest().version(version).boot()?;
        assert!(guest.human("info version")?.starts_with(name));
        assert!(guest.sh("ps -o comm")?.contains(lab::CANARY));
        guest.finish()?;
    }
    Ok(())
}

fn every_machine_has_ram_on_both_sides_of_the_hole(lab: &Lab) -> Result<()> {
    for machine in [Machine::Pc, Machine::Q35, Machine::Microvm] {
        let mut guest = lab.guest().machine(machine).both_sides_of_the_hole().boot()?;
        let ram = guest.ram()?;
        assert!(ram.iter().any(|r| r.gpa >= 1 << 32) && ram.iter().any(|r| r.gpa < 1 << 32));
        guest.finish()?;
    }
    Ok(())
}

fn pmemsave_equals_the_labs_own_reading(lab: &Lab) -> Result<()> {
    let kinds = [Backing::Anonymous, Backing::Memfd, Backing::PrivateFile, Backing::Numa2];
    for backing in kinds {
        let mut guest = lab.guest().backing(backing).boot()?;
        guest.stop()?;
        same_both_ways(&mut guest)?;
        guest.finish()?;
    }
    Ok(())
}

/// Every RAM range of a stopped guest, read in two ways.
pub(super) fn same_both_ways(guest: &mut Guest) -> Result<()> {
    for range in guest.ram()? {
        if guest.pmemsave(range.gpa, range.len)? != guest.read_own(range.gpa, range.len)? {
            return Err(failed(format_args!("pmemsave and /proc/PID/mem differ in {range:x?}")));
        }
    }
    Ok(())
}

fn planted_pages_lie_where_they_say(lab: &Lab) -> Result<()> {
    let run = 0x5eed;
    let mut guest = lab.guest().both_sides_of_the_hole().boot()?;
    let planted = guest.plant_frames(64, run)?;
    guest.stop()?;
    let (mut found, mut expected) = (0, [0; pattern::PAGE]);
    for range in guest.ram()? {
        let bytes = guest.read_own(range.gpa, range.len)?;
        for (pfn, page) in (range.gpa / 4096..).zip(bytes.chunks(pattern::PAGE)) {
            pattern::frame_page(run, pfn, &mut expected);
            found += u64::from(page == expected);
        }
    }
    assert_eq!((found, planted), (64 << 8, 64 << 8));
    guest.finish()
}

fn a_guest_not_left_as_found_is_noticed(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().blank().boot()?;
    guest.assert_as_found()?;
    guest.qmp("stop", serde_json::json!({}))?; // behind the lab's back: not by `Guest::stop`
    assert!(guest.assert_as_found().is_err());
    guest.cont()?;
    std::fs::write(guest.dir().join("left-behind"), "")?;
    assert!(guest.finish().is_err());
    Ok(())
}

fn this_machines_kvm(lab: &Lab) -> Result<()> {
    if !lab.full {
        return Err(skipped("waits up to 20 s for a guest that may hang: only in a full run"));
    }
    let guest = lab.guest().accel(Accel::Kvm).patience(Duration::from_secs(20)).boot();
    guest
        .map_err(|e| skipped(format_args!("/dev/kvm of this machine runs no Linux: {e}")))?
        .finish()
}
