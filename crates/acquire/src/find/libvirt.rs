//! Which VMs are libvirt's domains: by the sockets that only list, on which libvirt speaks with no
//! monitor.

use host::Process;
use qemu::libvirt::{Domain, Libvirt, LibvirtError, Procedure, SESSION, SYSTEM};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long libvirt may take for its list.
const LIST: Duration = Duration::from_secs(3);

/// Names of libvirt's sockets, the one that knows QEMU's domains itself first: on modular hosts the other
/// is a proxy of it.
const NAMES: [&str; 2] = ["virtqemud-sock", "libvirt-sock"];

/// The domain that a VM is to libvirt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LibvirtDomain {
    /// The socket of libvirt's that takes commands.
    pub socket: String,
    /// What is opened there: `qemu:///system` or `qemu:///session`.
    pub uri: String,
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: String,
    /// Its number while it runs.
    pub id: i32,
}

impl LibvirtDomain {
    /// As the client takes it; `None` when the UUID is none.
    pub fn domain(&self) -> Option<Domain> {
        let digits: String = self.uuid.chars().filter(|c| *c != '-').collect();
        let number = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32)?;
        Some(Domain { name: self.name.clone(), uuid: number.to_be_bytes(), id: self.id })
    }

    /// A connection to its libvirt, whose socket is reached at `reach`, and the domain there: the same that
    /// was found, running since.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn connect(&self, reach: &Path, within: Duration) -> Result<(Libvirt, Domain), String> {
        let fail = |what: String| format!("libvirt's {}: {what}", self.socket);
        let wanted = self.domain().ok_or_else(|| fail(format!("no UUID: {:?}", self.uuid)))?;
        let connected = Libvirt::connect_by(Path::new(&self.socket), reach, &self.uri, within);
        let mut libvirt = connected.map_err(|error| fail(crate::told(&error)))?;
        let domain = libvirt.domain(wanted.uuid, within);
        let domain = domain.map_err(|error| fail(crate::told(&error)))?;
        match domain.id == wanted.id {
            true => Ok((libvirt, domain)),
            false => Err(fail(format!(
                "domain {:?} was started anew: it was number {}, and is {}",
                self.name, wanted.id, domain.id
            ))),
        }
    }
}

/// The domains that run on this host, and what could not be asked.
#[derive(Debug, Default)]
pub(super) struct Domains {
    pub(super) all: Vec<LibvirtDomain>,
    pub(super) silent: Vec<String>,
}

impl Domains {
    /// Those that libvirts list whose sockets `process` sees; their paths are seen from `root`.
    pub(super) fn seen_by(process: &Process, root: &Path) -> Self {
        let mut domains = Self::default();
        let at = |path: &Path| super::within(root, path);
        let mut listeners = process.unix_listeners().unwrap_or_default();
        // Who shares the network without the mounts has his socket somewhere else.
        listeners.retain(|path| at(path).exists());
        for (list, socket) in choose(&listeners) {
            match listed(&at(&list), uris(&socket)) {
                Ok((uri, found)) => domains.add(&at(&socket), uri, found),
                Err(error) => domains.silent.push(crate::told(&error)),
            }
        }
        domains
    }

    /// A domain that is listed by a proxy too is one.
    fn add(&mut self, socket: &Path, uri: &str, found: Vec<Domain>) {
        for domain in found {
            let uuid = domain.uuid_text();
            if self.all.iter().any(|known| (&known.uuid, known.id) == (&uuid, domain.id)) {
                continue;
            }
            self.all.push(LibvirtDomain {
                socket: socket.display().to_string(),
                uri: uri.to_owned(),
                name: domain.name,
                uuid,
                id: domain.id,
            });
        }
    }

    /// The one that a QEMU with this name and UUID is: libvirt gives it both.
    pub(super) fn find(&self, name: &str, uuid: Option<&str>) -> Option<&LibvirtDomain> {
        let uuid = uuid?;
        self.all.iter().find(|domain| domain.name == name && domain.uuid.eq_ignore_ascii_case(uuid))
    }
}

/// The domains that a libvirt lists, and which of the names it goes by: it refuses the other one.
fn listed(
    socket: &Path,
    uris: [&'static str; 2],
) -> Result<(&'static str, Vec<Domain>), LibvirtError> {
    let [likely, other] = uris;
    let open = |uri| Libvirt::connect_to_look(socket, uri, LIST).map(|libvirt| (uri, libvirt));
    let (uri, mut libvirt) = match open(likely) {
        Err(refusal @ LibvirtError::Refused { doing, .. })
            if doing == Procedure::ConnectOpen.word() =>
        {
            // Both refused, the first says why.
            open(other).map_err(|_| refusal)?
        }
        opened => opened?,
    };
    Ok((uri, libvirt.domains(LIST)?))
}

/// What is opened at a socket, the likelier first. The host's daemon has its sockets in one place, those
/// of sessions are in the users'. But a user's in a container may be where the host's would be: KubeVirt
/// has `/var/run` as its XDG_RUNTIME_DIR.
fn uris(socket: &Path) -> [&'static str; 2] {
    let system = ["/run/libvirt", "/var/run/libvirt"].map(Path::new);
    match system.iter().any(|dir| socket.parent() == Some(dir)) {
        true => [SYSTEM, SESSION],
        false => [SESSION, SYSTEM],
    }
}

/// Of sockets that somebody listens on, libvirt's: for each the one to list by, which only reads where
/// there is such a one, and the one that takes commands. In the order in which they are asked.
fn choose(listeners: &[PathBuf]) -> Vec<(PathBuf, PathBuf)> {
    let mut chosen = Vec::new();
    for name in NAMES {
        let is_it = |path: &&PathBuf| {
            let in_libvirt = path.parent().is_some_and(|dir| dir.ends_with("libvirt"));
            in_libvirt && path.file_name().is_some_and(|file| file == name)
        };
        for socket in listeners.iter().filter(is_it) {
            let reads = socket.with_file_name(format!("{name}-ro"));
            let list = if listeners.contains(&reads) { reads } else { socket.clone() };
            chosen.push((list, socket.clone()));
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_knows_is_asked_first_and_by_what_only_reads() {
        let paths = [
            "/run/dbus/system_bus_socket",
            "/run/libvirt/libvirt-admin-sock",
            "/run/libvirt/libvirt-sock",
            "/run/libvirt/libvirt-sock-ro",
            "/run/libvirt/virtqemud-sock",
            "/run/libvirt/virtqemud-sock-ro",
            "/run/user/7/libvirt/virtqemud-sock",
            "/tmp/virtqemud-sock",
        ];
        let chosen = choose(&paths.map(PathBuf::from));
        let text = chosen.iter().map(|(a, b)| (a.to_str().unwrap(), b.to_str().unwrap()));
        let text: Vec<_> = text.collect();
        assert_eq!(
            text,
            [
                ("/run/libvirt/virtqemud-sock-ro", "/run/libvirt/virtqemud-sock"),
                ("/run/user/7/libvirt/virtqemud-sock", "/run/user/7/libvirt/virtqemud-sock"),
                ("/run/libvirt/libvirt-sock-ro", "/run/libvirt/libvirt-sock"),
            ]
        );
        let first = |path| uris(Path::new(path))[0];
        assert_eq!(first("/run/libvirt/libvirt-sock"), SYSTEM);
        assert_eq!(first("/run/user/7/libvirt/virtqemud-sock"), SESSION);
    }

    #[test]
    fn a_domain_is_known_by_name_and_uuid_and_only_once() {
        let domain = |id| Domain { name: "a b".into(), uuid: [7; 16], id };
        let mut domains = Domains::default();
        domains.add(Path::new("/q"), SYSTEM, vec![domain(1)]);
        domains.add(Path::new("/proxy"), SYSTEM, vec![domain(1)]);
        assert_eq!(domains.all.len(), 1);
        let uuid = "07070707-0707-0707-0707-070707070707";
        let found = domains.find("a b", Some(uuid)).unwrap();
        assert_eq!((found.socket.as_str(), found.domain()), ("/q", Some(domain(1))));
        assert!(domains.find("b", Some(uuid)).is_none() && domains.find("a b", None).is_none());
        let odd = LibvirtDomain { uuid: "07".into(), ..found.clone() };
        assert_eq!(odd.domain(), None);
    }
}
