//! `stillframe list`: the VMs on this host.

use crate::args::List;
use crate::exit::Exit;
use crate::output::{self, size};
use acquire::find::{self, Listing, Row};

/// Prints a table, or one JSON object a line.
pub(crate) fn run(args: &List) -> Exit {
    let Listing { rows, silent } = match find::list() {
        Ok(listing) => listing,
        Err(error) => {
            output::error(&error);
            return Exit::Failed;
        }
    };
    for text in &silent {
        output::say(&format!("warning: {text}"));
    }
    if args.json {
        for row in &rows {
            if !output::json(row) {
                break;
            }
        }
        return Exit::Complete;
    }
    if rows.is_empty() {
        output::say("no VM found");
        output::hint("processes of other users are visible to root only");
        return Exit::Complete;
    }
    for line in table(&rows) {
        if !output::line(&line) {
            break;
        }
    }
    Exit::Complete
}

/// The rows as aligned lines, a heading first. Monitors stand last: they are longest.
fn table(rows: &[Row]) -> Vec<String> {
    let heading = ["NAME", "UUID", "PID", "RAM", "ACCEL", "MANAGER", "QMP SOCKETS"];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    for row in rows {
        let monitors = match row.monitors.as_slice() {
            [] => "none".to_owned(),
            paths => paths.join(" "),
        };
        cells.push(vec![
            row.name.clone(),
            row.uuid.clone().unwrap_or_else(|| "-".to_owned()),
            row.pid.to_string(),
            row.memory_bytes.map_or_else(|| "?".to_owned(), size),
            row.accelerator.clone(),
            manager(row),
            monitors,
        ]);
    }
    output::columns(&cells)
}

/// Whose VM it is, beside its process'.
fn manager(row: &Row) -> String {
    let libvirt = row.libvirt.as_ref().map(|domain| format!("libvirt {}", domain.id));
    let proxmox = row.proxmox.as_ref().map(|vm| format!("proxmox {}", vm.vmid));
    let all: Vec<String> = libvirt.into_iter().chain(proxmox).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use acquire::find::ProxmoxVm;

    #[test]
    fn columns_align_and_names_are_harmless() {
        let row = |pid, name: &str| Row {
            pid,
            name: name.into(),
            uuid: None,
            memory_bytes: Some(4 << 30),
            accelerator: "kvm".into(),
            machine: None,
            monitors: vec!["/run/vm.sock".into()],
            exe: "/usr/bin/qemu-system-x86_64".into(),
            own_mounts: false,
            libvirt: None,
            proxmox: Some(ProxmoxVm { vmid: 100, monitor: "/x".into(), lock: None })
                .filter(|_| pid == 1),
        };
        let lines = table(&[row(1, "веб"), row(4711, "a\u{1b}[2J")]);
        assert_eq!(
            lines,
            [
                r"NAME        UUID  PID   RAM      ACCEL  MANAGER      QMP SOCKETS",
                r"веб         -     1     4.0 GiB  kvm    proxmox 100  /run/vm.sock",
                r"a\u{1b}[2J  -     4711  4.0 GiB  kvm    -            /run/vm.sock",
            ]
        );
    }
}
