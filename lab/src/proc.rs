//! What the lab sees of a process in /proc.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::error::{Doing, Result, failed};

/// A figure of `/proc/PID/status`, such as `VmRSS` (in KiB) or `TracerPid`.
pub fn status(pid: u32, field: &str) -> Result<u64> {
    number_in(Path::new(&format!("/proc/{pid}/status")), field)
}

/// A figure of `/proc/meminfo` in KiB, such as `MemAvailable`.
pub fn meminfo_kib(field: &str) -> Result<u64> {
    number_in(Path::new("/proc/meminfo"), field)
}

/// Bytes in memory of the mapping that holds an address, as `/proc/PID/smaps` counts them.
pub fn resident_at(pid: u32, address: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).doing(format_args!("reading {path}"))?;
    let mut inside = false;
    for line in text.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        let ends = word.split_once('-').map(|(a, b)| [a, b].map(|n| u64::from_str_radix(n, 16)));
        if let Some([Ok(start), Ok(end)]) = ends {
            inside = (start..end).contains(&address);
        } else if inside && word == "Rss:" {
            let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
            return kib.map(|kib| kib * 1024).ok_or_else(|| failed(format_args!("{path}: {line}")));
        }
    }
    Err(failed(format_args!("{address:#x} is mapped by nothing in {path}")))
}

/// The number behind `FIELD:` in a file of lines such as `/proc/PID/status`.
pub fn number_in(path: &Path, field: &str) -> Result<u64> {
    let text = fs::read_to_string(path).doing(format_args!("reading {}", path.display()))?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| failed(format_args!("no {field} in {}", path.display())))
}

/// PIDs whose command line contains `text`, without this process and those above it.
pub fn with_argument(text: &str) -> Vec<u32> {
    let mut own = BTreeSet::from([std::process::id()]);
    let mut above = std::process::id();
    while let Ok(parent) = status(above, "PPid") {
        let Ok(parent) = u32::try_from(parent) else { break };
        if parent == 0 || !own.insert(parent) {
            break;
        }
        above = parent;
    }
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !own.contains(pid) && command_line(*pid).contains(text)).collect()
}

/// PIDs of the processes that run this program, an absolute path without links.
pub fn with_program(program: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let runs = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|p| p == program);
    pids.filter(runs).collect()
}

/// The first child of a process.
pub fn child_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// The command line of a process with spaces between its words; empty when it is gone.
pub fn command_line(pid: u32) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned()
}

/// One letter per thread of a process: `R`, `S`, `D`, `t` (traced and stopped), `T`, ...
pub fn thread_states(pid: u32) -> Result<Vec<char>> {
    let mut states = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).doing("listing threads")?.flatten() {
        // The name in brackets may hold anything: the state follows the last bracket.
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        states.extend(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
    }
    Ok(states)
}
