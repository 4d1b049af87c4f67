//! Odd machines: where their memory lies is QEMU's word, and every method finds the same there.

use lab::{Builder, Doing, Lab, Machine, Result, failed, here};
use serde_json::Value;

use super::exhibit::acquire;
use super::footprint::settle;
use super::map::chart;

pub(crate) const TESTS: &[lab::runner::Test] = here![
    odd_machines_are_the_same_by_every_method,
    memory_that_ends_amid_a_page_is_refused,
    a_pc_of_more_than_a_tebibyte,
];

/// A machine: what it is, and how it is made.
type Case = (&'static str, fn(Builder) -> Builder);

/// Stopped guests: one root by every method, and three ways to the map that agree (`chart` sees to it).
fn odd_machines_are_the_same_by_every_method(lab: &Lab) -> Result<()> {
    let cases: [Case; 3] = [
        ("a board of ARM's", Builder::arm),
        ("a PC of 32 bits", |guest| guest.machine(Machine::Pc).i386()),
        ("little below 4 GiB", |guest| guest.machine(Machine::Q35).below_4g_mib(32)),
    ];
    for (what, build) in cases {
        let mut guest = build(lab.guest().memory_mib(128)).blank().boot().doing(what)?;
        settle(&mut guest)?;
        guest.stop()?;
        let (chart, _) = chart(lab, &guest.pid().to_string()).doing(what)?;
        let ram =
            chart["regions"].as_array().into_iter().flatten().filter(|one| one["kind"] == "ram");
        let bytes: u64 = ram.filter_map(|one| one["len"].as_u64()).sum();
        let mut roots = Vec::new();
        for (method, flags) in [
            ("live", &[][..]),
            ("freeze", &["--hold", "stop", "--stall-budget", "20s"]),
            ("pmemsave", &["--store", "disk"]),
            ("dump", &["--stall-budget", "20s"]),
        ] {
            let exhibit =
                acquire(lab, &guest, method, flags).doing(format_args!("{what}, {method}"))?;
            lab.tool([std::path::Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
            roots.push(exhibit.manifest["memory_root"].clone());
            exhibit.remove()?;
        }
        println!("         {what}: {bytes} bytes of RAM in the map");
        assert!(roots[0].is_string(), "{what}: no root");
        assert!(roots.iter().all(|root| *root == roots[0]), "{what}: {roots:?}");
        guest.finish()?;
    }
    Ok(())
}

/// RAM of 64 MiB and half a page, which goes on at 4 GiB: there pages of guest and host differ.
fn memory_that_ends_amid_a_page_is_refused(lab: &Lab) -> Result<()> {
    let guest = lab.guest().machine(Machine::Q35).memory_mib(128).blank();
    let mut guest = guest.args(&["-machine", "max-ram-below-4g=67110912"]).boot()?;
    settle(&mut guest)?;
    let out = super::run::new_dir(lab, "out")?;
    let acquire = super::run::acquire(lab, &guest.pid().to_string(), &out, &[])?;
    let ended = super::run::Running::start(acquire)?.end()?.expect(4)?;
    ended.says(&["0x100000000-0x103fff7ff", "pages of guest and host differ"])?;
    assert_eq!(super::run::names(&out)?, [""; 0]);
    guest.finish()
}

/// On AMD's processors an IOMMU has a hole just below 1 TiB, so QEMU puts RAM that would reach it above.
fn a_pc_of_more_than_a_tebibyte(lab: &Lab) -> Result<()> {
    // Nothing of it is touched: the machine never runs.
    let guest = lab.guest().machine(Machine::Q35).memory_mib(128).blank().paused();
    let mut guest = guest
        .args(&["-cpu", "EPYC,phys-bits=48", "-m", "1100G"])
        .args(&["-object", "memory-backend-ram,id=big,size=1100G,reserve=off"])
        .args(&["-machine", "memory-backend=big"])
        .boot()?;
    let (chart, _) = chart(lab, &guest.pid().to_string())?;
    let above = chart["regions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|one| one["gpa"] == "0x10000000000" && one["kind"] == "ram");
    let above =
        above.ok_or_else(|| failed(format_args!("no RAM at 1 TiB: {}", chart["regions"])))?;
    assert!(above["len"].as_u64() > Some(1000 << 30), "{above}");
    let plan = lab.tool(["plan", "--method", "live", "--json", &guest.pid().to_string()])?;
    let took = plan.took;
    let plan: Value = serde_json::from_str(&plan.expect_code(0)?.stdout)?;
    let image = plan["facts"]["image_bytes"].as_u64().unwrap_or_default();
    assert!(image > 1100 << 30, "{image}");
    println!(
        "         planned in {:.1} s; {} bytes resident",
        took.as_secs_f64(),
        plan["facts"]["resident_bytes"]
    );
    guest.assert_as_found()?;
    guest.finish()
}
