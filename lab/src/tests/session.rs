//! Domains of a user's libvirtd in a container: found from outside, imaged through it, and given back as
//! they were. Each test prints its figures.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lab::libvirtd::Domain;
use lab::session::Session;
use lab::{Doing, Lab, Result, Version, failed, here, proc, runner};
use serde_json::Value;

use super::exhibit::Exhibit;
use super::run::{Family, Running, UNDO, names, new_dir};

pub(crate) const TESTS: &[runner::Test] = here![
    a_domain_of_a_users_libvirt_in_a_container_is_imaged,
    a_users_libvirt_where_the_hosts_would_be,
];

const NAME: &str = "of a user";

/// What `list` says of the domain: one row, and nobody was silent.
fn listed(lab: &Lab, domain: &Domain, session: &Session) -> Result<Value> {
    let list = lab.tool(["list", "--json"])?.expect_code(0)?;
    assert!(!list.stderr.contains("/proc/"), "{}", list.stderr);
    let rows = list.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_it = |row: &Value| row["pid"] == domain.pid || row["name"] == NAME;
    let rows: Vec<Value> = rows.filter(of_it).collect();
    let [row] = &rows[..] else { return Err(failed(format_args!("rows: {rows:?}"))) };
    assert_eq!(row["own_mounts"], true);
    let libvirt = &row["libvirt"];
    assert_eq!([&libvirt["name"], &libvirt["uuid"]], [NAME, domain.uuid.as_str()], "{row}");
    assert_eq!(libvirt["uri"], "qemu:///session", "{row}");
    let socket = libvirt["socket"].as_str().unwrap_or_default();
    assert!(socket.starts_with(&format!("/proc/{}/root/", domain.pid)), "{socket}");
    assert!(socket.ends_with("/libvirt/libvirt-sock"), "{socket}");
    let file = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let its = file(Path::new(socket));
    assert!(its.is_some() && its != file(&session.socket()), "void: {socket} is the host's");
    let table = lab.tool(["list"])?.expect_code(0)?.stdout;
    let line = table.lines().find(|line| line.contains(NAME)).unwrap_or_default();
    assert!(line.contains("libvirt"), "{table}");
    println!("         {}", libvirt);
    Ok(row.clone())
}

/// Images the domain by each method, and demands that it is as before after each.
fn image(lab: &Lab, domain: &Domain, session: &Session, methods: &[Method]) -> Result<()> {
    super::map::chart(lab, NAME)?;
    domain.assert_as_found().doing("map")?;
    let out = new_dir(lab, "exhibits")?;
    for (method, flags, class) in methods {
        let mut command = lab.tool_command(["acquire", "--method", method, "--json"])?;
        command.args(*flags).arg("-o").arg(&out).arg("--").arg(NAME);
        let ended = Running::start(command)?.end()?.expect(0).doing(method)?;
        let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
        lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0).doing(method)?;
        let manifest = &exhibit.manifest;
        assert_eq!(manifest["status"], "complete", "{method}");
        assert_eq!(manifest["class"], *class, "{method}: {}", manifest["disturbances"]);
        assert_eq!(manifest["vm"]["name"], NAME);
        assert!(manifest["states"]["data"].as_u64() > Some(32 << 20), "{}", manifest["states"]);
        let changes = manifest["changes_made"].to_string();
        assert!(changes.contains("custom-monitor"), "{method}: {changes}");
        if *method == "pmemsave" {
            assert_eq!(manifest["slices"]["by"], "memory-peek");
            println!("         {method}: {}", manifest["slices"]);
        }
        domain.assert_as_found().doing(method)?;
        assert!(session.lives(), "{method}: libvirtd is gone");
        println!(
            "         {method} {flags:?}: complete, {} bytes of data",
            manifest["states"]["data"]
        );
        exhibit.remove()?;
    }
    Ok(())
}

/// A method, its flags, and the class that it shall earn.
type Method = (&'static str, &'static [&'static str], &'static str);

const METHODS: &[Method] = &[
    ("live", &[], "none"),
    ("freeze", &["--hold", "ptrace", "--stall-budget", "900ms"], "instantaneous"),
    ("freeze", &["--hold", "stop", "--stall-budget", "5s"], "instantaneous"),
    ("pmemsave", &[], "none"),
];

/// Ends all; nothing of the domain, the daemon or the tool may be left.
fn end(lab: &Lab, domain: Domain, session: Session) -> Result<()> {
    let (pid, uuid) = (domain.pid, domain.uuid.clone());
    domain.finish()?;
    session.finish()?;
    let strays = proc::with_argument(&uuid);
    assert!(strays.is_empty(), "left: {:?}", strays.first().map(|pid| proc::command_line(*pid)));
    Family::of(lab)?.await_gone()?;
    let undo = names(Path::new(UNDO)).unwrap_or_default();
    let own = format!("{pid}-");
    assert!(!undo.iter().any(|name| name.starts_with(&own)), "{undo:?}");
    Ok(())
}

fn a_domain_of_a_users_libvirt_in_a_container_is_imaged(lab: &Lab) -> Result<()> {
    let session = Session::start(Path::new("/mnt/run"))?;
    let domain = session.domain(&lab.kit, &new_dir(lab, "domain")?, NAME, Version::V10_0)?;
    listed(lab, &domain, &session)?;
    let plan = lab.tool(["plan", NAME, "--method", "live"])?.expect_code(0)?;
    assert!(plan.stdout.contains("custom-monitor"), "{}", plan.stdout);
    assert!(plan.stderr.contains("custom-monitor"), "not said before: {}", plan.stderr);
    image(lab, &domain, &session, METHODS)?;
    end(lab, domain, session)
}

/// KubeVirt's user has `/var/run` for that: the socket lies where the host's daemon would have it, by a
/// link that leads elsewhere from outside.
fn a_users_libvirt_where_the_hosts_would_be(lab: &Lab) -> Result<()> {
    let linked = fs::read_link("/var/run").is_ok_and(|to| to == Path::new("/run"));
    assert!(linked, "void: /var/run is no link to /run");
    let session = Session::start(Path::new("/var/run"))?;
    let domain = session.domain(&lab.kit, &new_dir(lab, "domain")?, NAME, Version::V7_2)?;
    listed(lab, &domain, &session)?;
    image(lab, &domain, &session, &METHODS[..lab.scale(1, METHODS.len())])?;
    end(lab, domain, session)
}
