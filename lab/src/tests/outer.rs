//! The outer guest itself: a real KVM, and the memory that only a stock kernel has.

use lab::{Backing, Lab, Result, Version, outer};
use serde_json::json;

use super::harness::same_both_ways;

pub(crate) const TESTS: &[lab::runner::Test] =
    outer![kvm_guests_run, hugepages_back_a_guest, the_kernel_has_what_this_one_lacks];

fn kvm_guests_run(lab: &Lab) -> Result<()> {
    // The other one is run by the tests of `live`.
    for &version in &[Version::V10_0, Version::V7_2][..lab.scale(1, 2)] {
        let mut guest = lab.guest().version(version).boot()?;
        assert_eq!(guest.qmp("query-kvm", json!({}))?["enabled"], true);
        println!("         booted under KVM in {:.1} s", guest.booted_in().as_secs_f64());
        guest.finish()?;
    }
    Ok(())
}

fn hugepages_back_a_guest(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    lab::outer::reserve_hugepages(64)?;
    for backing in [Backing::HugetlbShared, Backing::HugetlbPrivate] {
        let mut guest = lab.guest().backing(backing).memory_mib(128).boot()?;
        guest.stop()?;
        same_both_ways(&mut guest)?;
        guest.finish()?;
    }
    lab::outer::reserve_hugepages(0)
}

fn the_kernel_has_what_this_one_lacks(_: &Lab) -> Result<()> {
    let maps = std::fs::read_to_string("/proc/self/smaps")?;
    assert!(maps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" sd")));
    for path in ["/sys/kernel/mm/ksm/run", "/proc/sys/kernel/yama/ptrace_scope", "/dev/userfaultfd"]
    {
        assert!(std::fs::exists(path)?, "{path}");
    }
    lab::outer::swap_on(32)?;
    // Less the first page of the file, which describes it.
    assert_eq!(lab::proc::meminfo_kib("SwapTotal")?, (32 << 10) - 4);
    lab::outer::swap_off()
}
