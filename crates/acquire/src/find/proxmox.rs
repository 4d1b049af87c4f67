//! Which VMs are Proxmox VE's: by the PID file and the monitor that it keeps for each, and what its
//! configuration says of a lock.
//!
//! Proxmox asks each VM's only monitor every ten seconds and has no patience: nobody else may keep it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Where PID files and monitors are (`PVE::QemuServer::Helpers`).
const RUN: &str = "/run/qemu-server";

/// Where the VMs' configurations are.
const CONFIG: &str = "/etc/pve/qemu-server";

/// Greatest configuration that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// What a VM is to Proxmox VE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProxmoxVm {
    /// Its number.
    pub vmid: u32,
    /// Its only monitor.
    pub monitor: String,
    /// What Proxmox has it locked for: `backup`, `migrate`, `snapshot` ..
    pub lock: Option<String>,
}

/// All of them, with QEMU's process id.
pub(super) fn list() -> Vec<(u32, ProxmoxVm)> {
    list_in(Path::new(RUN), Path::new(CONFIG))
}

fn list_in(run: &Path, config: &Path) -> Vec<(u32, ProxmoxVm)> {
    let mut found: Vec<(u32, ProxmoxVm)> = fs::read_dir(run)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let vmid = path.file_name()?.to_str()?.strip_suffix(".pid")?.parse().ok()?;
            let pid = small(&path)?.trim().parse().ok()?;
            let monitor = path.with_extension("qmp").display().to_string();
            let lock = lock(&small(&config.join(format!("{vmid}.conf"))).unwrap_or_default());
            Some((pid, ProxmoxVm { vmid, monitor, lock }))
        })
        .collect();
    found.sort_by_key(|(_, vm)| vm.vmid);
    found
}

fn small(path: &PathBuf) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path).ok()?.take(MAX_CONFIG).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The lock, in the part that is about the VM as it is: behind it come its snapshots, each with a heading.
fn lock(config: &str) -> Option<String> {
    let now = config.lines().take_while(|line| !line.starts_with('['));
    let mut locks = now.filter_map(|line| line.strip_prefix("lock:"));
    locks.next().map(|lock| lock.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_the_vms_and_not_a_snapshots() {
        assert_eq!(lock("# x\ncores: 2\nlock: backup\nname: web\n"), Some("backup".into()));
        assert_eq!(lock("cores: 2\n\n[before]\nlock: snapshot\n"), None);
    }

    #[test]
    fn vms_are_known_by_their_pid_files() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, text) in [("100.pid", "77\n"), ("100.conf", "lock: migrate\n"), ("9.pid", "5")] {
            fs::write(at(name), text).unwrap();
        }
        for (name, text) in [("x.pid", "1"), ("7.pid", "none"), ("8.qmp", "")] {
            fs::write(at(name), text).unwrap();
        }
        let found = list_in(dir.path(), dir.path());
        let monitor = |name| at(name).display().to_string();
        assert_eq!(
            found,
            [
                (5, ProxmoxVm { vmid: 9, monitor: monitor("9.qmp"), lock: None }),
                (
                    77,
                    ProxmoxVm {
                        vmid: 100,
                        monitor: monitor("100.qmp"),
                        lock: Some("migrate".into())
                    }
                ),
            ]
        );
        assert_eq!(list_in(Path::new("/nonexistent"), dir.path()), []);
    }
}
