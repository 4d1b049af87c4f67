//! The monitor: the first of the VM's QMP sockets that answers, and proof of who answers.

use crate::find::Target;
use crate::log::Log;
use qemu::qmp::{Exchange, Transcript};
use qemu::{Qmp, QmpError};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a monitor may take to greet when others are left to try.
const ONE_OF_SEVERAL: Duration = Duration::from_secs(1);

/// How long the only one may take.
const ONLY_ONE: Duration = Duration::from_secs(4);

/// How long a query may take. QEMU answers in its main loop, which a slow disk can block.
pub const QUERY: Duration = Duration::from_secs(10);

/// Why no monitor could be used.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The VM has none.
    #[error(
        "{name:?} (PID {pid}) has no QMP socket on its command line, and the map must come from QEMU"
    )]
    None {
        /// The VM's name.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// None of several answered.
    #[error("no monitor of the VM answers: {}", tried.join("; "))]
    AllFailed {
        /// Each with its reason.
        tried: Vec<String>,
    },
    /// The only one did not answer.
    #[error("the monitor cannot be used")]
    Failed(#[source] QmpError),
    /// Somebody else than the VM answers.
    #[error("{} is served by process {peer}, not by the VM's process {pid}", path.display())]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// Who serves it, by the kernel's word; `?` when our PID namespace does not show it.
        peer: String,
        /// The VM.
        pid: u32,
    },
}

/// Connects to the first monitor of `target` that greets; every command sent on it goes into
/// `log`. Gives back the monitors that did not, each with its reason.
///
/// # Errors
/// [`MonitorError`], within 5 seconds unless the VM has more than four monitors.
pub fn open(target: &Target, log: &Log) -> Result<(Qmp, Vec<String>), MonitorError> {
    let pid = target.row.pid;
    let wait = match target.sockets.as_slice() {
        [] => return Err(MonitorError::None { name: target.row.name.clone(), pid }),
        [path] => {
            let qmp = connect(path, ONLY_ONE, log).map_err(MonitorError::Failed)?;
            return identified(qmp, pid).map(|qmp| (qmp, Vec::new()));
        }
        _ => ONE_OF_SEVERAL,
    };
    let mut tried = Vec::new();
    for path in &target.sockets {
        match connect(path, wait, log) {
            Ok(qmp) => match identified(qmp, pid) {
                Ok(qmp) => return Ok((qmp, tried)),
                Err(error) => tried.push(error.to_string()),
            },
            Err(error) => tried.push(error.to_string()),
        }
    }
    Err(MonitorError::AllFailed { tried })
}

/// The kernel says who listens on the socket; a name in a command line proves nothing.
fn identified(qmp: Qmp, pid: u32) -> Result<Qmp, MonitorError> {
    let peer = qmp.peer().map_err(MonitorError::Failed)?.pid;
    if peer == Some(pid) {
        return Ok(qmp);
    }
    let peer = peer.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
    Err(MonitorError::Impostor { path: qmp.path().to_owned(), peer, pid })
}

fn connect(path: &Path, wait: Duration, log: &Log) -> Result<Qmp, QmpError> {
    Qmp::connect_with(path, wait, Some(transcript(log)))
}

/// Writes each command and its end into the journal.
fn transcript(log: &Log) -> Transcript {
    let log = log.clone();
    Box::new(move |exchange: &Exchange<'_>| {
        let took = exchange.finished.saturating_duration_since(exchange.started);
        let mut line = json!({
            "command": exchange.command.word(),
            "arguments": exchange.arguments,
            "outcome": exchange.outcome.word(),
            "took_ns": u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
        });
        if let (Some(error), Some(object)) = (exchange.error, line.as_object_mut()) {
            object.insert("error".to_owned(), error.to_string().into());
        }
        log.add("qmp", line);
    })
}
