//! VMs of a real libvirtd: found, mapped and imaged through it, its monitor untouched, and given back as
//! they were. Each test prints its figures.

use std::fs;
use std::path::Path;
use std::time::Duration;

use lab::libvirtd::{Domain, Libvirtd};
use lab::{Doing, Lab, Result, Version, failed, here, runner};
use serde_json::Value;

use super::exhibit::Exhibit;
use super::run::{Running, new_dir};

pub(crate) const TESTS: &[runner::Test] = here![
    a_domain_is_imaged_by_every_method,
    a_stopped_domain_is_the_same_by_every_way,
    a_libvirt_that_restarts_is_survived,
    an_old_qemu_under_libvirt,
];

/// Lets QEMUs of libvirt's user use userfaultfd, or not, until dropped.
struct Userfaults(String);

const USERFAULTS: &str = "/proc/sys/vm/unprivileged_userfaultfd";

impl Userfaults {
    fn set(value: &str) -> Result<Self> {
        let before = fs::read_to_string(USERFAULTS).doing(USERFAULTS)?;
        fs::write(USERFAULTS, value).doing(USERFAULTS)?;
        Ok(Self(before))
    }
}

impl Drop for Userfaults {
    fn drop(&mut self) {
        let _ = fs::write(USERFAULTS, self.0.trim());
    }
}

/// A name that has to be quoted everywhere.
const NAME: &str = "web server 1 <веб>";

fn domain(lab: &Lab, libvirtd: &Libvirtd, version: Version) -> Result<Domain> {
    libvirtd.domain(&lab.kit, &new_dir(lab, "domain")?, NAME, version)
}

/// An exhibit of `vm` by a method, complete.
fn acquire(lab: &Lab, vm: &str, method: &str, flags: &[&str]) -> Result<Exhibit> {
    let out = lab.scratch().join("exhibits");
    fs::create_dir_all(&out)?;
    let mut command = lab.tool_command(["acquire", "--method", method, "--json"])?;
    command.args(flags).arg("-o").arg(&out).arg("--").arg(vm);
    let ended = Running::start(command)?.end()?.expect(0).doing(method)?;
    let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
    lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0).doing(method)?;
    Ok(exhibit)
}

/// What `list` says of the VM.
fn listed(lab: &Lab, domain: &Domain) -> Result<Value> {
    let list = lab.tool(["list", "--json"])?.expect_code(0)?.stdout;
    let rows = list.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut own = rows.filter(|row| row["pid"] == domain.pid);
    own.next().ok_or_else(|| failed(format_args!("not listed: {list}")))
}

fn tainted(domain: &Domain) -> Result<bool> {
    Ok(domain.virsh("dominfo")?.contains("custom monitor"))
}

fn a_domain_is_imaged_by_every_method(lab: &Lab) -> Result<()> {
    let mut libvirtd = Libvirtd::start()?;
    let domain = domain(lab, &libvirtd, Version::V10_0)?;
    let row = listed(lab, &domain)?;
    assert_eq!([&row["name"], &row["libvirt"]["name"]], [NAME; 2], "{row}");
    assert_eq!(row["libvirt"]["uuid"], domain.uuid, "{row}");
    assert_eq!(row["libvirt"]["uri"], "qemu:///system");
    let plan = lab.tool(["plan", NAME, "--method", "live"])?.expect_code(0)?;
    assert!(plan.stdout.contains("custom-monitor"), "{}", plan.stdout);
    assert!(plan.stderr.contains("custom-monitor"), "not said before: {}", plan.stderr);

    let (chart, said) = super::map::chart(lab, NAME)?;
    assert!(said.contains("custom-monitor"), "not said: {said}");
    assert_eq!((&chart["vm"]["name"], &chart["vm"]["pid"]), (&NAME.into(), &domain.pid.into()));
    domain.assert_as_found().doing("map")?;

    // As on a stock Debian host.
    let denied = Userfaults::set("0")?;
    let refused = lab.tool(["plan", NAME, "--method", "snapshot"])?.expect_code(4)?;
    assert!(refused.stderr.contains("vm.unprivileged_userfaultfd=1"), "{}", refused.stderr);
    let doctor = lab.tool(["doctor"])?.stdout;
    let price = "lets every user's programs delay the kernel";
    assert!(doctor.contains("unprivileged_userfaultfd=1") && doctor.contains(price), "{doctor}");
    drop(denied);

    for flags in [&["--method", "dump"][..], &["--method", "live", "--registers"]] {
        let refused = lab.tool([&["plan", NAME], flags].concat())?.expect_code(4)?;
        assert!(refused.stderr.contains("ends libvirtd"), "{}", refused.stderr);
    }

    // Where the kernel tracks, which this one need not.
    let track = lab.tool(["plan", NAME, "--method", "track", "--stall-budget", "900ms"])?;
    if track.status.code() == Some(0) {
        acquire(lab, NAME, "track", &["--stall-budget", "900ms"])?.remove()?;
        domain.assert_as_found().doing("track")?;
    } else {
        let refused = track.expect_code(4)?;
        assert!(refused.stderr.contains("CONFIG_MEM_SOFT_DIRTY"), "{}", refused.stderr);
        println!("         track: not on this kernel");
    }

    let _allowed = Userfaults::set("1")?;
    for (method, flags, class) in [
        ("live", &[][..], "none"),
        ("freeze", &["--hold", "ptrace", "--stall-budget", "900ms"], "instantaneous"),
        ("freeze", &["--hold", "stop", "--stall-budget", "5s"], "instantaneous"),
        ("snapshot", &["--stall-budget", "2s"], "quasi-instantaneous"),
        ("pmemsave", &[], "none"),
    ] {
        let exhibit = acquire(lab, NAME, method, flags)?;
        let manifest = &exhibit.manifest;
        assert_eq!(manifest["class"], class, "{method}: {}", manifest["disturbances"]);
        assert_eq!(manifest["vm"]["name"], NAME);
        let changes = manifest["changes_made"].to_string();
        assert!(changes.contains("custom-monitor"), "{method}: {changes}");
        if method == "pmemsave" {
            println!("         {method}: {}", manifest["slices"]);
            assert_eq!(manifest["slices"]["by"], "memory-peek");
            assert!(changes.contains("disk"), "{changes}");
        }
        domain.assert_as_found().doing(method)?;
        assert!(libvirtd.lives()?, "{method}: libvirtd is gone");
        exhibit.remove()?;
    }
    domain.finish()
}

/// Nothing of a stopped domain changes: through libvirt and by a monitor of its own, the same is found.
fn a_stopped_domain_is_the_same_by_every_way(lab: &Lab) -> Result<()> {
    let libvirtd = Libvirtd::start()?;
    let domain = domain(lab, &libvirtd, Version::V7_2)?;
    domain.virsh("suspend")?;
    let second = domain.second_monitor.display().to_string();
    let mut roots = Vec::new();
    for vm in [NAME, &second] {
        for (method, flags) in
            [("live", &[][..]), ("freeze", &["--stall-budget", "900ms"]), ("pmemsave", &[])]
        {
            let exhibit = acquire(lab, vm, method, flags)?;
            let by = &exhibit.manifest["slices"]["by"];
            let expected = if vm == NAME { "memory-peek" } else { "pmemsave" };
            assert!(method != "pmemsave" || by == expected, "{vm}: {by}");
            roots.push(exhibit.manifest["memory_root"].clone());
            exhibit.remove()?;
        }
    }
    assert!(roots[0].is_string() && roots.iter().all(|root| *root == roots[0]), "{roots:?}");
    // It is left so.
    assert_eq!(domain.virsh("domstate")?.trim(), "paused");
    domain.virsh("resume")?;
    domain.finish()
}

fn a_libvirt_that_restarts_is_survived(lab: &Lab) -> Result<()> {
    let mut libvirtd = Libvirtd::start()?;
    let domain = domain(lab, &libvirtd, Version::V10_0)?;
    let out = new_dir(lab, "restart")?;
    let mut command = lab.tool_command(["acquire", "--method", "live", "--json"])?;
    command.args(["--max-rate", "32M", "-o"]).arg(&out).arg("--").arg(NAME);
    let mut run = Running::start(command)?;
    run.until_in_pass(1)?;
    libvirtd.restart(Duration::from_millis(500))?;
    let ended = run.end()?.expect(0)?;
    let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
    let warnings = exhibit.manifest["warnings"].to_string();
    assert!(warnings.contains("opened anew"), "void, or not told: {warnings}");
    assert_eq!(exhibit.manifest["status"], "complete");
    assert!(tainted(&domain)?);
    domain.finish()
}

/// Debian 12's own QEMU: what it cannot do is refused, with the reason.
fn an_old_qemu_under_libvirt(lab: &Lab) -> Result<()> {
    let libvirtd = Libvirtd::start()?;
    let domain = domain(lab, &libvirtd, Version::V7_2)?;
    let _allowed = Userfaults::set("1")?;
    let refused = lab.tool(["plan", NAME, "--method", "snapshot"])?.expect_code(4)?;
    assert!(refused.stderr.contains("8.1"), "{}", refused.stderr);
    acquire(lab, &domain.uuid, "freeze", &["--stall-budget", "900ms"])?.remove()?;
    domain.finish()
}
