//! One conversation with libvirt that asks everything that can be asked of a domain without a descriptor:
//! held with a real one, when its packets are kept, and again with what was kept.

use qemu::facts::Facts;
use qemu::libvirt::{Domain, Feature, Info, Libvirt, SYSTEM};
use qemu::qmp::{Change, Event};
use qemu::{Qmp, QmpError};
use std::fmt::Debug;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The domain that it is about.
pub(crate) const NAME: &str = "web 07 <веб>";
pub(crate) const UUID: [u8; 16] =
    *b"\x3f\x2a\xd7\xc0\x11\x11\x42\x22\x83\x33\x44\x44\x55\x55\x66\x66";

/// The packets that were kept.
pub(crate) const KEPT: &str = "tests/conversation/9.0.0.txt";

/// Where the guest's firmware lies: bytes that are not zero.
const FIRMWARE: u64 = 0xf_fff0;

const LONG: Duration = Duration::from_secs(60);

/// Holds it; what was said, a line for each answer.
pub(crate) fn hold(stream: UnixStream) -> Vec<String> {
    let mut said = Vec::new();
    let mut libvirt = Libvirt::over(stream, Path::new("/libvirt"), SYSTEM, LONG).unwrap();
    let domain = look(&mut libvirt, &mut said);
    told(&mut said, "peek", libvirt.peek(&domain, FIRMWARE, 8, LONG));
    let watch = libvirt.watch(Some(&domain), LONG).unwrap();
    libvirt.suspend(&domain, LONG).unwrap();
    told(&mut said, "suspended", libvirt.state(&domain, LONG));
    libvirt.resume(&domain, LONG).unwrap();
    let twice = libvirt.resume(&domain, LONG).unwrap_err();
    said.push(format!("resumed twice: {twice}"));
    let mut lives = Vec::new();
    while lives.len() < 2 {
        libvirt.poll_events(LONG).unwrap();
        lives.extend(libvirt.take_lifecycle().into_iter().map(|event| (event.what, event.detail)));
    }
    said.push(format!("lives: {lives:?}"));
    libvirt.unwatch(&watch, LONG).unwrap();
    pass(libvirt, domain, &mut said).unwrap();
    said
}

/// What is asked of libvirt alone.
fn look(libvirt: &mut Libvirt, said: &mut Vec<String>) -> Domain {
    told(said, "version", libvirt.version(LONG));
    told(said, "hypervisor", libvirt.hypervisor_version(LONG));
    for feature in [Feature::FdPassing, Feature::EventCallback] {
        told(said, "supports", libvirt.supports(feature, LONG));
    }
    told(said, "domains", libvirt.domains(LONG));
    let domain = libvirt.domain(UUID, LONG).unwrap();
    assert_eq!(libvirt.domain_named(NAME, LONG).unwrap(), domain);
    assert_eq!(libvirt.domain_numbered(domain.id, LONG).unwrap(), domain);
    let nobody = libvirt.domain([1; 16], LONG).unwrap_err();
    said.push(format!("nobody: {nobody}"));
    let xml = libvirt.xml(&domain, LONG).unwrap();
    assert!(xml.contains("<name>web 07 &lt;веб&gt;</name>"), "{xml}");
    told(said, "state", libvirt.state(&domain, LONG));
    // How long the CPUs ran is another time another.
    let size = |info: Info| (info.state, info.max_memory_kib, info.memory_kib, info.cpus);
    told(said, "info", libvirt.info(&domain, LONG).map(size));
    told(said, "control", libvirt.control(&domain, LONG));
    domain
}

/// QMP, and events of QEMU's.
fn pass(libvirt: Libvirt, domain: Domain, said: &mut Vec<String>) -> Result<(), QmpError> {
    let mut qmp = Qmp::through(libvirt, SYSTEM, domain, LONG, None)?;
    said.push(format!("{:?}", qmp.version().qemu));
    let mut facts = Facts::of(&mut qmp, LONG);
    said.push(format!("{:?} {:?}", facts.status()?, facts.name()?));
    qmp.change(&Change::Stop, LONG)?;
    qmp.change(&Change::Cont, LONG)?;
    let unknown = qmp.change(&Change::CloseFd("nobody's".into()), LONG).unwrap_err();
    said.push(unknown.to_string());
    let mut names: Vec<String> = Vec::new();
    while names.len() < 2 {
        qmp.poll_events(LONG)?;
        names.extend(qmp.take_events().into_iter().map(|event: Event| event.name));
    }
    said.push(names.join(" "));
    Ok(())
}

fn told<T: Debug, E: Debug>(said: &mut Vec<String>, what: &str, answer: Result<T, E>) {
    said.push(format!("{what}: {:?}", answer.unwrap()));
}
