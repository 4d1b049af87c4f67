//! Find: which VMs run on this host, and which one is meant.
//!
//! What a VM is comes from its process; who manages it from libvirt's sockets that only list and from
//! Proxmox's files. No monitor is opened, so looking leaves no trace in QEMU.

mod libvirt;
mod proxmox;

pub use libvirt::LibvirtDomain;
pub use proxmox::ProxmoxVm;

use crate::monitor::Whom;
use host::Process;
use host::process;
use host::process::Fd;
use qemu::cmdline::{self, CommandLine, Endpoint};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// A running VM, as its process shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// QEMU's process id.
    pub pid: u32,
    /// The VM's name as QEMU was told; `pid-N` when it was told none.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<String>,
    /// RAM at start in bytes (`-m`); absent when the command line does not say.
    pub memory_bytes: Option<u64>,
    /// Accelerator: `kvm`, `tcg` ...
    pub accelerator: String,
    /// Machine type as given.
    pub machine: Option<String>,
    /// Paths of its QMP sockets.
    pub monitors: Vec<String>,
    /// The binary.
    pub exe: String,
    /// It sees other mounts than we do, as in a container.
    pub own_mounts: bool,
    /// The domain that it is, by libvirt's word.
    pub libvirt: Option<LibvirtDomain>,
    /// The VM that it is, by Proxmox's files.
    pub proxmox: Option<ProxmoxVm>,
}

/// The VMs on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By process id.
    pub rows: Vec<Row>,
    /// Who could not be asked, and why.
    pub silent: Vec<String>,
}

/// A VM that was chosen.
#[derive(Debug)]
pub struct Target {
    /// What its process shows.
    pub row: Row,
    /// The process, held by a pidfd.
    pub process: Process,
    /// Its arguments.
    pub argv: Vec<Vec<u8>>,
    /// What they say.
    pub cmdline: CommandLine,
    /// Sockets to try, in order.
    pub sockets: Vec<PathBuf>,
    /// libvirt has the monitor, and passes commands on.
    pub through: Option<LibvirtDomain>,
    /// Managers that could not be asked whether it is theirs, and why.
    pub silent: Vec<String>,
    /// The map is asked for also where the host sees nothing but ciphertext.
    pub accept_ciphertext: bool,
}

impl Target {
    /// Where it may be asked.
    pub fn whom(&self) -> Whom {
        Whom {
            name: self.row.name.clone(),
            pid: self.row.pid,
            sockets: self.sockets.clone(),
            accelerator: self.row.accelerator.clone(),
            confidential: self.cmdline.confidential.clone(),
            accept_ciphertext: self.accept_ciphertext,
            through: self.through.clone(),
            shared: self.row.proxmox.is_some(),
            reach: Vec::new(),
        }
    }

    /// What the operator should know of how it was found.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let unknown =
            |text: &String| format!("whether the VM is libvirt's could not be asked: {text}");
        self.silent.iter().map(unknown)
    }
}

/// How long a socket named by the operator may take to be connected: its queue can be full.
const SOCKET: Duration = Duration::from_secs(2);

/// Why no VM was chosen.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing fits.
    #[error("no VM on this host is called {wanted:?}")]
    Nobody {
        /// What was asked for.
        wanted: String,
        /// The names of those that run.
        running: Vec<String>,
    },
    /// More than one fits.
    #[error("{wanted:?} fits {} VMs", candidates.len())]
    Several {
        /// What was asked for.
        wanted: String,
        /// `NAME (PID n)` of each.
        candidates: Vec<String>,
    },
    /// The process cannot be looked at.
    #[error("cannot look at process {pid}")]
    Process {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        cause: host::HostError,
    },
    /// /proc cannot be read.
    #[error("cannot read the list of processes")]
    Proc(#[source] host::HostError),
    /// The socket does not lead to a QEMU process.
    #[error("who serves {} (PID {pid}) is no QEMU process that can be looked at", path.display())]
    NotQemu {
        /// The socket.
        path: PathBuf,
        /// Who answers; `?` when our PID namespace does not show it.
        pid: String,
    },
    /// The socket cannot be reached.
    #[error("cannot connect to {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        cause: qemu::QmpError,
    },
}

/// Every VM on this host. A process that ends while it is looked at, or that we may not look at, is
/// left out.
///
/// # Errors
/// [`FindError::Proc`] when there is no list of processes.
pub fn list() -> Result<Listing, FindError> {
    let (targets, silent) = all()?;
    Ok(Listing { rows: targets.into_iter().map(|target| target.row).collect(), silent })
}

fn all() -> Result<(Vec<Target>, Vec<String>), FindError> {
    let mut targets: Vec<Target> = process::all_pids()
        .map_err(FindError::Proc)?
        .into_iter()
        .filter_map(|pid| look(pid).ok().flatten())
        .collect();
    targets.sort_by_key(|target| target.row.pid);
    let managers = Managers::ask();
    targets.iter_mut().for_each(|target| managers.join(target));
    Ok((targets, managers.domains.silent))
}

/// The one VM that `wanted` means: a name, a UUID, a PID, a number of Proxmox's, or the path of a QMP
/// socket.
///
/// # Errors
/// [`FindError`] says who else runs, or who all fit.
pub fn one(wanted: &str) -> Result<Target, FindError> {
    if wanted.contains('/') {
        return by_socket(Path::new(wanted));
    }
    let (mut targets, silent) = all()?;
    let running: Vec<String> = targets.iter().map(|target| target.row.name.clone()).collect();
    targets.retain(|target| target.row.is_called(wanted));
    match targets.len() {
        0 => Err(FindError::Nobody { wanted: wanted.to_owned(), running }),
        1 => Ok(Target { silent, ..targets.remove(0) }),
        _ => Err(FindError::Several {
            wanted: wanted.to_owned(),
            candidates: targets.iter().map(|target| target.row.candidate()).collect(),
        }),
    }
}

impl Row {
    fn is_called(&self, wanted: &str) -> bool {
        let vmid = self.proxmox.as_ref().map(|vm| vm.vmid);
        self.name == wanted
            || [Some(self.pid), vmid].iter().flatten().any(|id| id.to_string() == wanted)
            || self.uuid.as_deref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(wanted))
    }

    /// For a choice among several.
    fn candidate(&self) -> String {
        let vmid = self.proxmox.as_ref().map(|vm| format!(", Proxmox's {}", vm.vmid));
        format!("{} (PID {}{})", self.name, self.pid, vmid.unwrap_or_default())
    }
}

/// Who manages VMs on this host.
struct Managers {
    domains: libvirt::Domains,
    proxmox: Vec<(u32, ProxmoxVm)>,
}

impl Managers {
    fn ask() -> Self {
        let own = Process::open(std::process::id());
        let domains = own.map(|own| libvirt::Domains::seen_by(&own, Path::new("/")));
        Self { domains: domains.unwrap_or_default(), proxmox: proxmox::list() }
    }

    /// Adds what they know of a VM.
    fn join(&self, target: &mut Target) {
        let row = &mut target.row;
        row.proxmox =
            self.proxmox.iter().find(|(pid, _)| *pid == row.pid).map(|(_, vm)| vm.clone());
        let find =
            |domains: &libvirt::Domains| domains.find(&row.name, row.uuid.as_deref()).cloned();
        if let Some(vm) = &row.proxmox {
            target.sockets = vec![PathBuf::from(&vm.monitor)];
        }
        row.libvirt = find(&self.domains);
        if row.libvirt.is_none() && row.own_mounts && row.uuid.is_some() {
            // A libvirt in the same container.
            row.libvirt = find(&libvirt::Domains::seen_by(&target.process, &root_of(row.pid)));
        }
        if let Some(domain) = &row.libvirt {
            // Its monitor is libvirt's.
            target.sockets.clear();
            target.through = Some(domain.clone());
        }
    }
}

/// What process `pid` sees as `/`.
fn root_of(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// Links that are followed at most on one path, as the kernel does.
const MAX_LINKS: u32 = 40;

/// Where `path` lies, as who has `root` as `/` means it. The links on it are followed here: the kernel
/// would follow one that begins at `/`, as `/var/run` does on most hosts, into our own files.
fn within(root: &Path, path: &Path) -> PathBuf {
    let (mut at, mut left, mut links) = (root.to_owned(), path.to_owned(), 0);
    loop {
        let mut parts = left.components();
        let Some(part) = parts.next() else { return at };
        let mut rest = parts.as_path().to_owned();
        match part {
            Component::RootDir => root.clone_into(&mut at),
            Component::ParentDir if at != root => drop(at.pop()),
            Component::Normal(name) => {
                at.push(name);
                if let Some(to) = std::fs::read_link(&at).ok().filter(|_| links < MAX_LINKS) {
                    links += 1;
                    at.pop();
                    rest = to.join(rest);
                }
            }
            Component::ParentDir | Component::CurDir | Component::Prefix(_) => {}
        }
        left = rest;
    }
}

/// The process behind a socket is who the kernel says it is, not who a command line claims.
fn by_socket(path: &Path) -> Result<Target, FindError> {
    let pid = qemu::qmp::peer_of(path, SOCKET)
        .map_err(|cause| FindError::Socket { path: path.to_owned(), cause })?
        .pid;
    let name = pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
    let not_qemu = || FindError::NotQemu { path: path.to_owned(), pid: name };
    let Some(pid) = pid else { return Err(not_qemu()) };
    let mut target =
        look(pid).map_err(|cause| FindError::Process { pid, cause })?.ok_or_else(not_qemu)?;
    target.sockets = vec![path.to_owned()];
    Ok(target)
}

/// What process `pid` is, when it is a QEMU.
fn look(pid: u32) -> Result<Option<Target>, host::HostError> {
    let process = Process::open(pid)?;
    // Another user's executable is hidden from us, his command line is not.
    let exe = match process.exe() {
        Ok(exe) => exe,
        Err(error) => process.argv()?.into_iter().next().ok_or(error)?,
    };
    if !cmdline::is_qemu_exe(&exe) {
        return Ok(None);
    }
    let argv = process.argv()?;
    let cmdline = cmdline::parse(&argv);
    let fds = process.fds().unwrap_or_default();
    let sockets = sockets(&process, &cmdline, &fds);
    let row = Row {
        pid,
        name: cmdline.name.clone().unwrap_or_else(|| format!("pid-{pid}")),
        uuid: cmdline.uuid.clone(),
        memory_bytes: cmdline.memory_bytes,
        accelerator: accelerator(&cmdline, &fds),
        machine: cmdline.machine.clone(),
        monitors: sockets.iter().map(|path| path.display().to_string()).collect(),
        exe: String::from_utf8_lossy(&exe).into_owned(),
        own_mounts: process.has_own_mounts(),
        libvirt: None,
        proxmox: None,
    };
    let (through, silent, accept_ciphertext) = (None, Vec::new(), false);
    Ok(Some(Target { row, process, argv, cmdline, sockets, through, silent, accept_ciphertext }))
}

/// A QEMU that has a KVM virtual machine open runs `kvm`, whatever it was asked for; of several
/// accelerators asked for, QEMU takes the first that works, and KVM did not.
fn accelerator(cmdline: &CommandLine, fds: &[Fd]) -> String {
    if fds.iter().any(|fd| fd.link == b"anon_inode:kvm-vm") {
        return "kvm".to_owned();
    }
    match cmdline.accelerators.iter().find(|name| name.as_str() != "kvm") {
        Some(other) => other.clone(),
        None if fds.is_empty() => cmdline.accelerators.first().cloned().unwrap_or("tcg".to_owned()),
        None => "tcg".to_owned(),
    }
}

/// QMP sockets of the command line; one that was inherited as a descriptor by its path in the
/// kernel's table of sockets. Relative paths are taken from QEMU's working directory, which QEMU
/// does not change unless it was told to become a daemon. A QEMU in a container means its own paths.
fn sockets(process: &Process, cmdline: &CommandLine, fds: &[Fd]) -> Vec<PathBuf> {
    let inherited = |number: u32| -> Option<PathBuf> {
        let inode = fds.iter().find(|fd| fd.number == number)?.socket()?;
        let path = process.unix_socket_path(inode).ok()??;
        (!path.starts_with(b"@")).then(|| PathBuf::from(OsString::from_vec(path)))
    };
    cmdline
        .qmp()
        .filter_map(|endpoint| match endpoint {
            Endpoint::Path(path) => Some(path.clone()),
            Endpoint::Fd(number) => inherited(*number),
            Endpoint::Abstract(_) | Endpoint::Other(_) => None,
        })
        .map(|path| match path.is_relative() {
            true => process.cwd().map_or(path.clone(), |cwd| cwd.join(&path)),
            false => path,
        })
        .map(|path| seen_from_here(process, path))
        .collect()
}

/// A path that a process means, as we reach it.
fn seen_from_here(process: &Process, path: PathBuf) -> PathBuf {
    if !process.has_own_mounts() {
        return path;
    }
    let its = within(&root_of(process.pid()), &path);
    let file = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    // libvirt's QEMUs have mounts of their own, in which nearly all is the host's.
    if file(&path).is_some() && file(&path) == file(&its) { path } else { its }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_of_a_container_stay_in_it() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path();
        std::fs::create_dir_all(root.join("run/libvirt")).unwrap();
        std::fs::create_dir(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../run", root.join("var/up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let seen = |path: &str| within(root, Path::new(path));
        let socket = root.join("run/libvirt/sock");
        for path in
            ["/run/libvirt/sock", "/var/run/libvirt/sock", "/var/up/./libvirt/../libvirt/sock"]
        {
            assert_eq!(seen(path), socket, "{path}");
        }
        assert_eq!(seen("/loop/sock"), root.join("loop/sock"));
        assert_eq!(seen("/.."), root);
    }
}
