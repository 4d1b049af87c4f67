//! `/proc/PID/numa_maps`: on which NUMA nodes of the host a process's pages lie.
//!
//! One line a mapping (kernel: `show_numa_map` in `fs/proc/task_mmu.c`):
//!
//! ```text
//! 7f3c40000000 default anon=262144 dirty=262144 N0=131072 N1=131072 kernelpagesize_kB=4
//! ```
//!
//! Pages are counted in units of the mapping's page size. A kernel without NUMA has no such file.

use crate::HostError;
use crate::kernel_text::{open_under, read_all};
use crate::process::Process;
use std::collections::BTreeMap;
use std::io;

/// The most bytes of the file that are read; a process with 65,530 mappings has some 10 MiB.
const LIMIT: u64 = 64 << 20;

/// What the kernel counts of one mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaMap {
    /// First address of the mapping.
    pub start: u64,
    /// The memory policy: `default`, `bind:0`, `interleave:0-1`.
    pub policy: String,
    /// Bytes on each node that has some.
    pub nodes: BTreeMap<u32, u64>,
}

/// The mappings of `process`, ascending; `None` when the kernel has no NUMA.
///
/// # Errors
/// The process is gone or may not be looked at; a line that is not understood.
pub fn maps(process: &Process) -> Result<Option<Vec<NumaMap>>, HostError> {
    let name = "numa_maps";
    let file = match open_under(process.dir(), name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && process.alive() => {
            return Ok(None);
        }
        Err(error) => return Err(process.error(name, error)),
    };
    let text = read_all(&file, &process.path(name), LIMIT)?;
    let text = String::from_utf8_lossy(&text);
    let broken = |line: &str| {
        let shown: String = line.chars().take(80).collect();
        io::Error::new(io::ErrorKind::InvalidData, format!("not understood: {shown:?}"))
    };
    let parsed = text.lines().map(|line| parse(line).ok_or_else(|| broken(line)));
    parsed.collect::<Result<_, _>>().map(Some).map_err(|error| process.error(name, error))
}

fn parse(line: &str) -> Option<NumaMap> {
    let mut words = line.split(' ').filter(|word| !word.is_empty()).peekable();
    let start = u64::from_str_radix(words.next()?, 16).ok()?;
    // `prefer (many):0-1` and `weighted interleave:0-1` are two words.
    let is_count = |word: &str| word.contains('=') || matches!(word, "huge" | "heap" | "stack");
    let mut policy = words.next()?.to_owned();
    while let Some(word) = words.next_if(|word| !is_count(word)) {
        policy.push(' ');
        policy.push_str(word);
    }
    let (mut pages, mut page_size) = (Vec::new(), None);
    for word in words {
        let Some((name, number)) = word.split_once('=') else { continue };
        if name == "kernelpagesize_kB" {
            page_size = number.parse::<u64>().ok()?.checked_mul(1024);
        } else if let Some(node) = name.strip_prefix('N').and_then(|node| node.parse::<u32>().ok())
        {
            pages.push((node, number.parse::<u64>().ok()?));
        }
    }
    let mut nodes = BTreeMap::new();
    for (node, count) in pages {
        nodes.insert(node, count.checked_mul(page_size?)?);
    }
    Some(NumaMap { start, policy, nodes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = "7f00c0000000 bind:0-1 file=/dev/hugepages/a\\040b huge anon=2 dirty=2 N0=1 N1=3 \
                    kernelpagesize_kB=2048";
        let map = parse(line).unwrap();
        assert_eq!((map.start, &*map.policy), (0x7f00_c000_0000, "bind:0-1"));
        assert_eq!(map.nodes, BTreeMap::from([(0, 2 << 20), (1, 6 << 20)]));
        assert!(parse("7f00 default").unwrap().nodes.is_empty());
        for policy in ["prefer (many):0-1", "weighted interleave:0-1", "bind=static:0"] {
            let line = format!("7f00 {policy} anon=1 dirty=1 N0=1 kernelpagesize_kB=4");
            let map = parse(&line).unwrap();
            assert_eq!((&*map.policy, &map.nodes), (policy, &BTreeMap::from([(0, 4096)])));
        }
        for bad in
            ["", "x default", "7f00", "7f00 default N0=1", "7f00 default N0=x kernelpagesize_kB=4"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn our_own_memory_lies_on_some_node() {
        let me = Process::open(std::process::id()).unwrap();
        let Some(maps) = maps(&me).unwrap() else { return };
        assert!(maps.iter().any(|map| map.nodes.values().any(|bytes| *bytes >= 4096)));
        assert!(maps.is_sorted_by_key(|map| map.start));
    }
}
