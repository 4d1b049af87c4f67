//! How much memory this host and this process's control groups can still give.

use crate::HostError;
use crate::kernel_text::{kib_field, read_text};
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Memory of the host in bytes, from `/proc/meminfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// Usable by the kernel in all.
    pub total: u64,
    /// Available without swapping, by the kernel's estimate.
    pub available: u64,
    /// Swap space in all.
    pub swap_total: u64,
    /// Swap space not used.
    pub swap_free: u64,
}

/// Reads `/proc/meminfo`.
///
/// # Errors
/// It is not as expected.
pub fn host_memory() -> Result<HostMemory, HostError> {
    let path = "/proc/meminfo";
    let text = read_text(path, 1 << 20)?;
    let field = |name: &str| {
        kib_field(&text, name)
            .ok_or_else(|| HostError::Format { path: path.into(), what: format!("no {name}") })
    };
    Ok(HostMemory {
        total: field("MemTotal")?,
        available: field("MemAvailable")?,
        swap_total: field("SwapTotal")?,
        swap_free: field("SwapFree")?,
    })
}

/// How long tasks wait for memory (pressure stall information).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// Share of the last 10 s in which some task waited, in percent.
    pub some_avg10: f64,
    /// Share of the last 10 s in which all tasks waited, in percent.
    pub full_avg10: f64,
}

/// Reads `/proc/pressure/memory`; `None` when the kernel has no PSI or it is switched off.
pub fn pressure() -> Option<Pressure> {
    parse_pressure(&read_text("/proc/pressure/memory", 4096).ok()?)
}

fn parse_pressure(text: &str) -> Option<Pressure> {
    let avg10 = |line: &str| {
        let rest = text.lines().find_map(|l| l.strip_prefix(line))?;
        let value = rest.split_ascii_whitespace().find_map(|w| w.strip_prefix("avg10="))?;
        value.parse::<f64>().ok().filter(|v| v.is_finite())
    };
    Some(Pressure { some_avg10: avg10("some ")?, full_avg10: avg10("full ")? })
}

/// What the control groups of this process leave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headroom {
    /// Bytes until the tightest limit.
    pub bytes: u64,
    /// The control group that sets it.
    pub group: PathBuf,
}

impl fmt::Display for Headroom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes left in control group {}", self.bytes, self.group.display())
    }
}

/// The tightest limit of this process's control groups, of version 1 and 2, from its own up to
/// the highest that is visible; `None` when none has a limit.
///
/// Inactive file pages count as free: the kernel drops them before it kills.
pub fn cgroup_headroom() -> Option<Headroom> {
    let mounts = read_text("/proc/self/mountinfo", 16 << 20).ok()?;
    let groups = read_text("/proc/self/cgroup", 1 << 20).ok()?;
    groups_of(&groups, &mounts)
        .iter()
        .flat_map(Group::upwards)
        .filter_map(|group| group.headroom())
        .min_by_key(|h| h.bytes)
}

/// A control group with a memory controller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    version: u8,
    /// Where its hierarchy is mounted.
    mount: PathBuf,
    /// Its directory.
    dir: PathBuf,
}

impl Group {
    /// The group itself, its parent, and so on up to the mount.
    fn upwards(&self) -> impl Iterator<Item = Group> {
        let dirs = self.dir.ancestors().take_while(|d| d.starts_with(&self.mount));
        dirs.map(|dir| Group { dir: dir.to_owned(), ..self.clone() })
            .collect::<Vec<_>>()
            .into_iter()
    }

    fn file(&self, name: &str) -> Option<String> {
        read_text(self.dir.join(name).to_str()?, 1 << 20).ok()
    }

    fn number(&self, name: &str) -> Option<u64> {
        // "max" is no number, and no limit.
        self.file(name)?.trim().parse().ok()
    }

    fn headroom(&self) -> Option<Headroom> {
        let (limits, usage, inactive) = match self.version {
            // Above `memory.high` the kernel slows its processes down: a limit, for us.
            2 => (&["memory.max", "memory.high"][..], "memory.current", "inactive_file"),
            _ => (&["memory.limit_in_bytes"][..], "memory.usage_in_bytes", "total_inactive_file"),
        };
        let limit = limits.iter().filter_map(|name| self.number(name)).min()?;
        // Version 1 writes "no limit" as the greatest page-aligned signed number.
        if limit >= i64::MAX as u64 - 0xffff {
            return None;
        }
        let stat = self.file("memory.stat").unwrap_or_default();
        let inactive = stat
            .lines()
            .find_map(|l| l.strip_prefix(inactive)?.strip_prefix(' ')?.parse::<u64>().ok());
        let used = self.number(usage)?.saturating_sub(inactive.unwrap_or(0));
        Some(Headroom { bytes: limit.saturating_sub(used), group: self.dir.clone() })
    }
}

/// The groups with a memory controller that `cgroup` (of `/proc/self`) names, by their
/// directories in `mountinfo`.
fn groups_of(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let mounts: Vec<_> = mountinfo.lines().filter_map(cgroup_mount).collect();
    cgroup
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let version = match controllers {
                "" => 2,
                list if list.split(',').any(|c| c == "memory") => 1,
                _ => return None,
            };
            let (_, root, mount) = mounts.iter().find(|(v, ..)| *v == version)?;
            // A mount may show only a part of the hierarchy, as in a container.
            let below = Path::new(path).strip_prefix(root).ok()?;
            let plain = below.components().all(|c| matches!(c, Component::Normal(_)));
            plain.then(|| Group { version, mount: mount.clone(), dir: mount.join(below) })
        })
        .collect()
}

/// Version, root and mount point of a line of `mountinfo`, if it is a hierarchy with memory.
fn cgroup_mount(line: &str) -> Option<(u8, PathBuf, PathBuf)> {
    let (before, behind) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
    let mut behind = behind.split(' ');
    let version = match behind.next()? {
        "cgroup2" => 2,
        "cgroup" if behind.nth(1)?.split(',').any(|o| o == "memory") => 1,
        _ => return None,
    };
    Some((version, root, point))
}

/// `mountinfo` writes space, tab, newline and backslash as octal.
fn unescape(text: &str) -> PathBuf {
    let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(plain.iter().fold(text.to_owned(), |t, (from, to)| t.replace(from, to)))
}

/// The most memory that this process ever had resident, in bytes (`VmHWM`).
///
/// # Errors
/// `/proc/self/status` is not as expected.
pub fn peak_rss() -> Result<u64, HostError> {
    let path = "/proc/self/status";
    kib_field(&read_text(path, 1 << 20)?, "VmHWM")
        .ok_or_else(|| HostError::Format { path: path.into(), what: "no VmHWM".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_memory() {
        let memory = host_memory().unwrap();
        assert!(memory.total > memory.available && memory.available > 0);
        assert!(peak_rss().unwrap() > 1 << 16);
        // Whatever the limits are, reading them works.
        let _ = (cgroup_headroom(), pressure());
    }

    #[test]
    fn pressure_is_read() {
        let text =
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.25 avg60=0 total=0\n";
        assert_eq!(parse_pressure(text), Some(Pressure { some_avg10: 1.5, full_avg10: 0.25 }));
        assert_eq!(parse_pressure("some avg10=NaN\nfull avg10=1\n"), None);
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn groups_are_found_in_both_versions() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
35 31 0:32 /box /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw
";
        let groups = groups_of("9:cpu:/x\n4:memory:/box/a/b\n0::/user:1/c\n", mounts);
        let dirs: Vec<_> = groups.iter().map(|g| g.dir.to_str().unwrap()).collect();
        assert_eq!(dirs, ["/sys/fs/cgroup/mem ory/a/b", "/sys/fs/cgroup/unified/user:1/c"]);
        assert_eq!(groups_of("4:memory:/other\n0::/../x\n", mounts), []);
    }

    #[test]
    fn the_tightest_group_counts() {
        let top = tempfile::tempdir().unwrap();
        let mount = top.path().join("m");
        let inner = mount.join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        let set =
            |dir: &Path, name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        for dir in [&mount, &mount.join("a"), &inner] {
            set(dir, "memory.current", "1000\n");
            set(dir, "memory.max", "max\n");
            set(dir, "memory.high", "max\n");
        }
        let tightest = || {
            let group = Group { version: 2, mount: mount.clone(), dir: inner.clone() };
            group.upwards().filter_map(|g| g.headroom()).min_by_key(|h| h.bytes)
        };
        assert_eq!(tightest(), None);
        set(&inner, "memory.max", "9000\n");
        assert_eq!(tightest().unwrap(), Headroom { bytes: 8000, group: inner.clone() });
        set(&mount.join("a"), "memory.high", "5000\n");
        assert_eq!(tightest().unwrap(), Headroom { bytes: 4000, group: mount.join("a") });
        set(&mount.join("a"), "memory.stat", "anon 5\ninactive_file 300\n");
        assert_eq!(tightest().unwrap().bytes, 4300);
        // Limits above the mount are not ours.
        set(top.path(), "memory.max", "1\n");
        set(top.path(), "memory.current", "1\n");
        assert_eq!(tightest().unwrap().bytes, 4300);
    }

    #[test]
    fn version_one_has_its_own_names() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let group = Group { version: 1, mount: dir.path().into(), dir: dir.path().into() };
        set("memory.usage_in_bytes", "700\n");
        set("memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(group.headroom(), None);
        set("memory.limit_in_bytes", "1000\n");
        set("memory.stat", "inactive_file 1\ntotal_inactive_file 50\n");
        assert_eq!(group.headroom().unwrap().bytes, 350);
    }
}
