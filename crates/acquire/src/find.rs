//! Find: which VMs run on this host, and which one is meant.
//!
//! Everything here comes from /proc: no monitor is opened, so looking leaves no trace in QEMU.

use crate::monitor::Whom;
use host::Process;
use host::process;
use host::process::Fd;
use qemu::cmdline::{self, CommandLine, Endpoint};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
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
        }
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

/// Every VM on this host, by process id. A process that ends while it is looked at, or that we may
/// not look at, is left out.
///
/// # Errors
/// [`FindError::Proc`] when there is no list of processes.
pub fn list() -> Result<Vec<Row>, FindError> {
    let mut rows: Vec<Row> = process::all_pids()
        .map_err(FindError::Proc)?
        .into_iter()
        .filter_map(|pid| look(pid).ok().flatten())
        .map(|target| target.row)
        .collect();
    rows.sort_by_key(|row| row.pid);
    Ok(rows)
}

/// The one VM that `wanted` means: a name, a UUID, a PID or the path of a QMP socket.
///
/// # Errors
/// [`FindError`] says who else runs, or who all fit.
pub fn one(wanted: &str) -> Result<Target, FindError> {
    if wanted.contains('/') {
        return by_socket(Path::new(wanted));
    }
    let rows = list()?;
    let fits = |row: &&Row| {
        row.name == wanted
            || row.pid.to_string() == wanted
            || row.uuid.as_deref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(wanted))
    };
    let found: Vec<&Row> = rows.iter().filter(fits).collect();
    match found.as_slice() {
        [row] => by_pid(row.pid, wanted),
        [] => Err(FindError::Nobody {
            wanted: wanted.to_owned(),
            running: rows.iter().map(|row| row.name.clone()).collect(),
        }),
        several => Err(FindError::Several {
            wanted: wanted.to_owned(),
            candidates: several
                .iter()
                .map(|row| format!("{} (PID {})", row.name, row.pid))
                .collect(),
        }),
    }
}

fn by_pid(pid: u32, wanted: &str) -> Result<Target, FindError> {
    look(pid)
        .map_err(|cause| FindError::Process { pid, cause })?
        .ok_or_else(|| FindError::Nobody { wanted: wanted.to_owned(), running: Vec::new() })
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
    };
    Ok(Some(Target { row, process, argv, cmdline, sockets }))
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
/// does not change unless it was told to become a daemon.
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
        .collect()
}
