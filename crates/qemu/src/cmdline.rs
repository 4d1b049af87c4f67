//! What a QEMU process's command line says of its guest. No monitor is opened for it.
//!
//! The command line is the word of who started QEMU, not of QEMU: it serves to list guests and to
//! find their monitors. What counts is asked over QMP ([`crate::facts`]).
//!
//! Options may be written `-name` or `--name`; values are `key=value,key=value` lists in which
//! `,,` is a comma and the first key may be implied (`util/keyval.c`, `util/qemu-option.c`).

use serde_json::Value;
use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// RAM in bytes of a machine that was given no `-m`: QEMU's default on x86.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// What a command line says. Nothing here is checked with QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// `-name`: the guest's name.
    pub name: Option<String>,
    /// `-uuid`, as written, in lower case.
    pub uuid: Option<String>,
    /// `-m` in bytes, or QEMU's default. `None` when it is not understood, or the size is that of
    /// a memory backend.
    pub memory_bytes: Option<u64>,
    /// Accelerators in the order in which QEMU tries them: `kvm`, `tcg`.
    pub accelerators: Vec<String>,
    /// Machine type as written: `q35`, `pc-i440fx-7.2`.
    pub machine: Option<String>,
    /// All monitors, those for people too.
    pub monitors: Vec<Monitor>,
    /// Why the guest's memory may be encrypted or hidden from the host.
    pub confidential: Option<String>,
    /// `-readconfig`: a file says more than the command line.
    pub reads_config: bool,
    /// `-numa node`: the guest's NUMA nodes, by their numbers.
    pub numa: Vec<NumaNode>,
}

/// A NUMA node of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// Its number.
    pub node: u32,
    /// Id of the memory backend that is its RAM.
    pub memdev: Option<String>,
    /// Its part of the machine's RAM in bytes, where it has no backend of its own.
    pub memory_bytes: Option<u64>,
}

/// A monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// Where it can be reached.
    pub endpoint: Endpoint,
    /// Who it is for.
    pub mode: Mode,
}

/// Where a monitor can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A UNIX socket that QEMU listens on. A relative path is relative to QEMU's directory.
    Path(PathBuf),
    /// A socket in Linux's abstract namespace that QEMU listens on.
    Abstract(Vec<u8>),
    /// A listening socket that QEMU inherited as file descriptor of this number (libvirt).
    Fd(u32),
    /// Somewhere else (`stdio`, a TCP port, a socket that QEMU connected to): not for us.
    Other(String),
}

/// Who a monitor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Programs: QMP.
    Control,
    /// People.
    Readline,
}

impl CommandLine {
    /// The monitors that speak QMP.
    pub fn qmp(&self) -> impl Iterator<Item = &Endpoint> {
        self.monitors.iter().filter(|m| m.mode == Mode::Control).map(|m| &m.endpoint)
    }
}

/// Whether a program of this name runs guests: `qemu-system-*`, `qemu-kvm`, `kvm`, `qemu`; not
/// `qemu-img`, `qemu-nbd`, `qemu-ga`, `qemu-storage-daemon`.
///
/// `name` is a program's name or path, as `/proc/PID/exe` shows it: ` (deleted)` behind it, after
/// an upgrade, is understood.
pub fn is_qemu_exe(name: impl AsRef<[u8]>) -> bool {
    let name = name.as_ref();
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let name = name.rsplit(|&b| b == b'/').next().unwrap_or(name);
    // NixOS calls the wrapped program `.qemu-system-x86_64-wrapped`.
    let name = name.strip_prefix(b".").unwrap_or(name);
    let kvm = [b"qemu-kvm".as_slice(), b"kvm", b"kvm-spice", b"qemu"];
    name.starts_with(b"qemu-system-") || kvm.contains(&name)
}

/// Reads a command line, program name included, as `/proc/PID/cmdline` gives it.
///
/// Never fails: what is not understood is left out.
pub fn parse(argv: &[Vec<u8>]) -> CommandLine {
    let mut reader = Reader::default();
    let mut rest = argv.iter().skip(1).map(Vec::as_slice).peekable();
    while let Some(word) = rest.next() {
        let Some(option) = word.strip_prefix(b"-").filter(|option| !option.is_empty()) else {
            continue;
        };
        let option = option.strip_prefix(b"-").unwrap_or(option);
        let option = String::from_utf8_lossy(option);
        let option: &str = &option;
        let takes_value = if NO_VALUE.contains(&option) {
            false
        } else if WITH_VALUE.contains(&option) {
            true
        } else {
            // An option that we do not know: a value does not look like an option.
            rest.peek().is_some_and(|next| !next.starts_with(b"-"))
        };
        let value = if takes_value { rest.next() } else { None };
        reader.option(option, value.unwrap_or_default());
    }
    reader.finish()
}

/// A list of keys and values, the last of a key counts.
type Pairs = HashMap<String, Vec<u8>>;

#[derive(Default)]
struct Reader {
    out: CommandLine,
    /// `-m`, last value of `size`.
    memory: Option<Vec<u8>>,
    machine: Pairs,
    accelerators: Vec<String>,
    enable_kvm: bool,
    chardevs: HashMap<Vec<u8>, Endpoint>,
    /// Monitors in order; chardevs may be given behind them.
    monitors: Vec<(Mode, Target)>,
    confidential_object: Option<String>,
}

/// What a monitor is told to use.
enum Target {
    Chardev(Vec<u8>),
    Endpoint(Endpoint),
}

impl Reader {
    fn option(&mut self, option: &str, value: &[u8]) {
        match option {
            "name" => {
                if let Some(guest) = pairs(value, "guest").remove("guest") {
                    self.out.name = Some(text(&guest));
                }
            }
            "uuid" => self.out.uuid = Some(text(value).to_lowercase()),
            "m" => {
                if let Some(size) = pairs(value, "size").remove("size") {
                    self.memory = Some(size);
                }
            }
            "accel" => {
                self.accelerators.extend(pairs(value, "accel").remove("accel").map(|a| text(&a)))
            }
            "enable-kvm" => self.enable_kvm = true,
            "machine" | "M" => self.machine.extend(pairs(value, "type")),
            "object" => self.object(value),
            "chardev" => self.chardev(value),
            "mon" => {
                let mut mon = pairs(value, "chardev");
                let control = mon.get("mode").is_some_and(|mode| mode == b"control");
                let mode = if control { Mode::Control } else { Mode::Readline };
                if let Some(chardev) = mon.remove("chardev") {
                    self.monitors.push((mode, Target::Chardev(chardev)));
                }
            }
            "qmp" | "qmp-pretty" => self.monitor(Mode::Control, value),
            "monitor" => self.monitor(Mode::Readline, value),
            "readconfig" => self.out.reads_config = true,
            "numa" => self.numa(value),
            _ => {}
        }
    }

    /// `-qmp DEV`, `-monitor DEV`
    fn monitor(&mut self, mode: Mode, value: &[u8]) {
        if value == b"none" {
            return;
        }
        let target = if let Some(id) = value.strip_prefix(b"chardev:") {
            Target::Chardev(id.to_vec())
        } else if let Some(socket) = value.strip_prefix(b"unix:") {
            Target::Endpoint(socket_endpoint(&pairs(socket, "path"), value))
        } else {
            Target::Endpoint(Endpoint::Other(text(value)))
        };
        self.monitors.push((mode, target));
    }

    fn chardev(&mut self, value: &[u8]) {
        if let Some(json) = json(value) {
            let id = json.get("id").and_then(Value::as_str).unwrap_or_default();
            self.chardevs.insert(id.into(), json_endpoint(&json, value));
            return;
        }
        let chardev = pairs(value, "backend");
        let Some(id) = chardev.get("id") else { return };
        let is_socket = chardev.get("backend").is_some_and(|backend| backend == b"socket");
        let endpoint =
            if is_socket { socket_endpoint(&chardev, value) } else { Endpoint::Other(text(value)) };
        self.chardevs.insert(id.clone(), endpoint);
    }

    /// `-numa node[,nodeid=N][,memdev=ID][,mem=SIZE]`, or the same as JSON.
    fn numa(&mut self, value: &[u8]) {
        let node = match json(value) {
            Some(json) => {
                let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
                let number = |key: &str| json.get(key).and_then(Value::as_u64);
                (text("type").as_deref() == Some("node")).then(|| NumaNode {
                    node: number("nodeid")
                        .and_then(|n| u32::try_from(n).ok())
                        .unwrap_or(self.next()),
                    memdev: text("memdev"),
                    memory_bytes: number("mem"),
                })
            }
            None => {
                let numa = pairs(value, "type");
                let get = |key: &str| numa.get(key).map(|value| text(value));
                (get("type").as_deref() == Some("node")).then(|| NumaNode {
                    node: get("nodeid").and_then(|n| n.parse().ok()).unwrap_or(self.next()),
                    memdev: get("memdev"),
                    memory_bytes: numa.get("mem").and_then(|size| match &size[..] {
                        // Of `-m` it would be the default.
                        b"0" => Some(0),
                        size => memory_size(size),
                    }),
                })
            }
        };
        self.out.numa.extend(node);
    }

    /// The number of a node that was given none.
    fn next(&self) -> u32 {
        u32::try_from(self.out.numa.len()).unwrap_or(u32::MAX)
    }

    fn object(&mut self, value: &[u8]) {
        let object_type = match json(value) {
            Some(json) => json.get("qom-type").and_then(Value::as_str).map(str::to_owned),
            None => pairs(value, "qom-type").get("qom-type").map(|t| text(t)),
        };
        let confidential = |t: &String| {
            let families = ["sev-", "tdx-", "pef-guest", "s390-pv-guest", "arm-rme-guest"];
            families.iter().any(|family| t.starts_with(family))
        };
        if let Some(found) = object_type.filter(confidential) {
            self.confidential_object = Some(format!("-object {found}"));
        }
    }

    fn finish(self) -> CommandLine {
        let mut out = self.out;
        out.machine = self.machine.get("type").map(|t| text(t));
        out.numa.sort_by_key(|node| node.node);
        out.memory_bytes = match &self.memory {
            Some(size) => memory_size(size),
            None if self.machine.contains_key("memory-backend") => None,
            None => Some(DEFAULT_MEMORY),
        };
        // -accel beats -machine accel=, and QEMU refuses both; -enable-kvm is accel=kvm.
        out.accelerators = self.accelerators;
        if out.accelerators.is_empty()
            && let Some(list) = self.machine.get("accel")
        {
            out.accelerators = text(list).split(':').map(str::to_owned).collect();
        }
        if self.enable_kvm && !out.accelerators.iter().any(|a| a == "kvm") {
            out.accelerators.insert(0, "kvm".into());
        }
        out.confidential = ["confidential-guest-support", "memory-encryption"]
            .iter()
            .find_map(|&key| {
                let object = self.machine.get(key).filter(|object| !object.is_empty())?;
                Some(format!("-machine {key}={}", text(object)))
            })
            .or(self.confidential_object);
        out.monitors = self
            .monitors
            .into_iter()
            .map(|(mode, target)| {
                let endpoint = match target {
                    Target::Endpoint(endpoint) => endpoint,
                    Target::Chardev(id) => self
                        .chardevs
                        .get(&id)
                        .cloned()
                        .unwrap_or_else(|| Endpoint::Other(format!("chardev {}", text(&id)))),
                };
                Monitor { endpoint, mode }
            })
            .collect();
        out
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(value: &[u8]) -> Option<Value> {
    value.starts_with(b"{").then(|| serde_json::from_slice(value).ok())?
}

/// Cuts `a=b,c=d`; `,,` is a comma; a first part without `=` belongs to `implied`, a later one is
/// a switch that is on (or, written `nokey`, off).
fn pairs(list: &[u8], implied: &str) -> Pairs {
    let mut out = Pairs::new();
    for (index, part) in split(list).into_iter().enumerate() {
        let cut = part.iter().position(|&b| b == b'=');
        let (key, value) = match cut {
            Some(at) => {
                let (key, value) = part.split_at(at);
                (text(key), value.get(1..).unwrap_or_default().to_vec())
            }
            None if index == 0 => (implied.to_owned(), part),
            None => match part.strip_prefix(b"no") {
                Some(key) if !key.is_empty() => (text(key), b"off".to_vec()),
                _ => (text(&part), b"on".to_vec()),
            },
        };
        out.insert(key, value);
    }
    out
}

/// Cuts at single commas and halves doubled ones.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut bytes = list.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b',' || bytes.next_if_eq(&b',').is_some() {
            part.push(byte);
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    parts
}

fn is_on(pairs: &Pairs, key: &str) -> bool {
    pairs.get(key).is_some_and(|value| matches!(value.as_slice(), b"on" | b"yes" | b"true" | b"y"))
}

/// A socket is for us when QEMU listens on it and it is a UNIX one.
fn socket_endpoint(socket: &Pairs, whole: &[u8]) -> Endpoint {
    let other = || Endpoint::Other(text(whole));
    if let Some(fd) = socket.get("fd") {
        // Libvirt hands over a listening socket; a name instead of a number is one of `getfd`.
        return text(fd).parse().map_or_else(|_| other(), Endpoint::Fd);
    }
    match socket.get("path") {
        Some(_) if !is_on(socket, "server") => other(),
        Some(path) if is_on(socket, "abstract") => Endpoint::Abstract(path.clone()),
        Some(path) => Endpoint::Path(PathBuf::from(OsString::from_vec(path.clone()))),
        None => other(),
    }
}

/// `-chardev` as JSON, in the shape of QMP's `chardev-add`.
fn json_endpoint(chardev: &Value, whole: &[u8]) -> Endpoint {
    let found = || {
        let backend = chardev.get("backend")?;
        if backend.get("type")?.as_str()? != "socket" {
            return None;
        }
        let data = backend.get("data")?;
        // `server` is on unless it is switched off (qapi/char.json).
        if data.get("server").and_then(Value::as_bool) == Some(false) {
            return None;
        }
        let address = data.get("addr")?;
        let address_data = address.get("data")?;
        match address.get("type")?.as_str()? {
            "unix" => {
                let path = address_data.get("path")?.as_str()?;
                let is_abstract = address_data.get("abstract").and_then(Value::as_bool);
                Some(match is_abstract {
                    Some(true) => Endpoint::Abstract(path.into()),
                    _ => Endpoint::Path(path.into()),
                })
            }
            "fd" => address_data.get("str")?.as_str()?.parse().ok().map(Endpoint::Fd),
            _ => None,
        }
    };
    found().unwrap_or_else(|| Endpoint::Other(text(whole)))
}

/// `-m`: a number, perhaps with a fraction, and a suffix; MiB without one. QEMU rounds up to 8 KiB
/// and takes 0 as its default.
fn memory_size(size: &[u8]) -> Option<u64> {
    let size = std::str::from_utf8(size).ok()?;
    let (number, shift) = match size.char_indices().last()? {
        (at, suffix) if suffix.is_ascii_alphabetic() => {
            let shift = match suffix.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => return None,
            };
            (size.get(..at)?, shift)
        }
        _ => (size, 20),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 18 {
        return None;
    }
    let unit = 1u128 << shift;
    let mut bytes = whole.parse::<u128>().ok()?.checked_mul(unit)?;
    if !fraction.is_empty() {
        let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        bytes = bytes.checked_add(fraction.parse::<u128>().ok()?.checked_mul(unit)? / scale)?;
    }
    let bytes = u64::try_from(bytes).ok()?;
    if bytes == 0 { Some(DEFAULT_MEMORY) } else { bytes.checked_next_multiple_of(8192) }
}

/// Options of QEMU 7.2 and 10.0 that take no value (`qemu-options.def`).
const NO_VALUE: &[&str] = &[
    "S",
    "alt-grab",
    "audio-help",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "one-insn-per-tb",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "async-teardown",
    "xen-attach",
    "xen-domid-restrict",
    "rtc-td-hack",
];

/// Options that take a value, which may begin with `-`: those that we read, and those whose value
/// is free text or a file.
const WITH_VALUE: &[&str] = &[
    "M",
    "accel",
    "acpitable",
    "add-fd",
    "append",
    "audio",
    "audiodev",
    "bios",
    "blockdev",
    "boot",
    "bt",
    "cdrom",
    "chardev",
    "compat",
    "cpu",
    "d",
    "D",
    "debugcon",
    "device",
    "dfilter",
    "display",
    "drive",
    "dtb",
    "dump-vmstate",
    "echr",
    "fda",
    "fdb",
    "fsdev",
    "fw_cfg",
    "g",
    "gdb",
    "global",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "icount",
    "incoming",
    "initrd",
    "iscsi",
    "k",
    "kernel",
    "L",
    "loadvm",
    "m",
    "machine",
    "mem-path",
    "mon",
    "monitor",
    "msg",
    "mtdblock",
    "name",
    "net",
    "netdev",
    "nic",
    "numa",
    "object",
    "option-rom",
    "overcommit",
    "parallel",
    "pflash",
    "pidfile",
    "plugin",
    "prom-env",
    "qmp",
    "qmp-pretty",
    "qtest",
    "qtest-log",
    "readconfig",
    "rotate",
    "rtc",
    "run-with",
    "runas",
    "sandbox",
    "sd",
    "seed",
    "semihosting-config",
    "serial",
    "set",
    "shim",
    "smbios",
    "smp",
    "spice",
    "tb-size",
    "tpmdev",
    "trace",
    "usbdevice",
    "uuid",
    "vga",
    "virtfs",
    "vnc",
    "watchdog",
    "watchdog-action",
    "writeconfig",
    "xen-domid",
    "chroot",
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(words: &[&str]) -> CommandLine {
        let argv: Vec<Vec<u8>> =
            ["qemu-system-x86_64"].iter().chain(words).map(|w| w.as_bytes().to_vec()).collect();
        parse(&argv)
    }

    fn socket(path: &str) -> Endpoint {
        Endpoint::Path(path.into())
    }

    #[test]
    fn nodes_are_numbered_as_qemu_does() {
        let node = |node, memdev: Option<&str>, memory_bytes| NumaNode {
            node,
            memdev: memdev.map(str::to_owned),
            memory_bytes,
        };
        let numa =
            line(&["-numa", "node,memdev=a", "-numa", "cpu,node-id=0", "-numa", "node,mem=2G"]);
        assert_eq!(numa.numa, [node(0, Some("a"), None), node(1, None, Some(2 << 30))]);
        let numa = line(&["-numa", "node,nodeid=1,mem=512", "-numa", "node,nodeid=0,mem=0"]);
        assert_eq!(numa.numa, [node(0, None, Some(0)), node(1, None, Some(512 << 20))]);
        let json = r#"{"type":"node","nodeid":2,"memdev":"ram-node2"}"#;
        assert_eq!(line(&["-numa", json]).numa, [node(2, Some("ram-node2"), None)]);
        assert_eq!(line(&["-numa", "dist,src=0,dst=1,val=20", "-numa"]).numa, []);
    }

    #[test]
    fn programs_that_run_guests() {
        for yes in [
            "qemu-system-x86_64",
            "/usr/bin/qemu-system-aarch64",
            "/usr/libexec/qemu-kvm",
            "/usr/bin/kvm",
            "qemu",
            "/usr/bin/qemu-system-x86_64 (deleted)",
            "/nix/store/x/bin/.qemu-system-x86_64-wrapped",
        ] {
            assert!(is_qemu_exe(yes.as_bytes()), "{yes}");
        }
        for no in [
            "qemu-img",
            "/usr/bin/qemu-nbd",
            "qemu-ga",
            "qemu-storage-daemon",
            "/usr/bin/qemu-x86_64",
            "/opt/qemu-system-x86_64/bin/sh",
            "kvm-ok",
            "",
            " (deleted)",
        ] {
            assert!(!is_qemu_exe(no.as_bytes()), "{no}");
        }
    }

    #[test]
    fn as_libvirt_starts_it() {
        let line = line(&[
            "-name",
            "guest=web-07,debug-threads=on",
            "-S",
            "-object",
            "{\"qom-type\":\"secret\",\"id\":\"masterKey0\",\"format\":\"raw\"}",
            "-machine",
            "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
            "-accel",
            "kvm",
            "-cpu",
            "host,migratable=on",
            "-m",
            "size=4194304k",
            "-object",
            "{\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\",\"size\":4294967296}",
            "-overcommit",
            "mem-lock=off",
            "-smp",
            "2,sockets=2",
            "-uuid",
            "0F0E0D0C-1111-2222-3333-444444444444",
            "-display",
            "none",
            "-no-user-config",
            "-nodefaults",
            "-chardev",
            "socket,id=charmonitor,fd=30,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-rtc",
            "base=utc",
        ]);
        assert_eq!(line.name.as_deref(), Some("web-07"));
        assert_eq!(line.uuid.as_deref(), Some("0f0e0d0c-1111-2222-3333-444444444444"));
        assert_eq!(line.memory_bytes, Some(4 << 30));
        assert_eq!(line.accelerators, ["kvm"]);
        assert_eq!(line.machine.as_deref(), Some("pc-q35-7.2"));
        assert_eq!(line.qmp().collect::<Vec<_>>(), [&Endpoint::Fd(30)]);
        assert_eq!(line.confidential, None);
    }

    #[test]
    fn as_proxmox_starts_it() {
        let line = line(&[
            "-id",
            "100",
            "-name",
            "vm100,debug-threads=on",
            "-no-shutdown",
            "-chardev",
            "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect-ms=5000",
            "-mon",
            "chardev=qmp-event,mode=control",
            "-pidfile",
            "/var/run/qemu-server/100.pid",
            "-daemonize",
            "-smbios",
            "type=1,uuid=aaaa",
            "-m",
            "2048",
            "-machine",
            "type=pc+pve0",
        ]);
        assert_eq!(line.name.as_deref(), Some("vm100"));
        assert_eq!(line.memory_bytes, Some(2 << 30));
        assert_eq!(line.qmp().next(), Some(&socket("/var/run/qemu-server/100.qmp")));
        // QEMU is the client there: nobody can connect.
        assert!(matches!(line.qmp().nth(1), Some(Endpoint::Other(_))));
    }

    #[test]
    fn monitors_in_all_spellings() {
        let endpoints = |words: &[&str]| {
            let line = line(words);
            line.monitors.into_iter().map(|m| (m.mode, m.endpoint)).collect::<Vec<_>>()
        };
        let control = |path: &str| (Mode::Control, socket(path));
        assert_eq!(endpoints(&["-qmp", "unix:/a,server,nowait"]), [control("/a")]);
        assert_eq!(endpoints(&["--qmp", "unix:/a,,b,server=on"]), [control("/a,b")]);
        assert_eq!(endpoints(&["-qmp-pretty", "unix:a,server=yes,wait=off"]), [control("a")]);
        assert_eq!(
            endpoints(&["-mon", "c,mode=control", "-chardev", "socket,id=c,path=/a,server=on"]),
            [control("/a")]
        );
        assert_eq!(
            endpoints(&["-qmp", "chardev:c", "-chardev", "socket,path=/a,id=c,server"]),
            [control("/a")]
        );
        assert_eq!(
            endpoints(&[
                "-chardev",
                "socket,id=c,path=x,abstract=on,server=on",
                "-mon",
                "chardev=c"
            ]),
            [(Mode::Readline, Endpoint::Abstract(b"x".to_vec()))]
        );
        assert_eq!(
            endpoints(&[
                "-chardev",
                "{\"id\":\"c\",\"backend\":{\"type\":\"socket\",\"data\":{\"addr\":{\"type\":\"unix\",\"data\":{\"path\":\"/a\"}},\"server\":true}}}",
                "-mon",
                "chardev=c,mode=control"
            ]),
            [control("/a")]
        );
        assert_eq!(endpoints(&["-qmp", "none", "-monitor", "none"]), []);
        assert_eq!(
            endpoints(&["-monitor", "stdio", "-qmp", "tcp:localhost:4444,server=on"]),
            [
                (Mode::Readline, Endpoint::Other("stdio".into())),
                (Mode::Control, Endpoint::Other("tcp:localhost:4444,server=on".into())),
            ]
        );
        assert_eq!(
            endpoints(&["-mon", "chardev=gone,mode=control"]),
            [(Mode::Control, Endpoint::Other("chardev gone".into()))]
        );
        // QEMU as the client of a socket serves nobody who connects.
        assert!(matches!(endpoints(&["-qmp", "unix:/a"])[0].1, Endpoint::Other(_)));
    }

    #[test]
    fn sizes() {
        let bytes = |m: &str| line(&["-m", m]).memory_bytes;
        assert_eq!(line(&[]).memory_bytes, Some(128 << 20));
        assert_eq!(bytes("512"), Some(512 << 20));
        assert_eq!(bytes("2G"), Some(2 << 30));
        assert_eq!(bytes("1.5g,slots=4,maxmem=1T"), Some(3 << 29));
        assert_eq!(bytes("slots=4,size=1T"), Some(1 << 40));
        assert_eq!(bytes("8193B"), Some(16384));
        assert_eq!(bytes("0"), Some(128 << 20));
        for odd in ["", "x", "-1", "99999999999E", "1.2.3", "1Q", "G", "0x10"] {
            assert_eq!(bytes(odd), None, "{odd}");
        }
        assert_eq!(line(&["-machine", "q35,memory-backend=m"]).memory_bytes, None);
    }

    #[test]
    fn accelerators_and_machines() {
        let accelerators = |words: &[&str]| line(words).accelerators.join(" ");
        assert_eq!(accelerators(&["-machine", "q35,accel=kvm:tcg"]), "kvm tcg");
        assert_eq!(accelerators(&["-enable-kvm"]), "kvm");
        assert_eq!(accelerators(&["-accel", "tcg,thread=multi", "-accel", "kvm"]), "tcg kvm");
        assert_eq!(accelerators(&["-M", "pc"]), "");
        assert_eq!(line(&["-machine", "accel=kvm", "-M", "pc"]).machine.as_deref(), Some("pc"));
    }

    #[test]
    fn confidential_guests_are_seen() {
        for words in [
            &["-machine", "q35,confidential-guest-support=sev0"][..],
            &["-machine", "q35,memory-encryption=sev0"],
            &["-object", "sev-guest,id=sev0,cbitpos=47"],
            &["-object", "{\"qom-type\":\"tdx-guest\",\"id\":\"t\"}"],
        ] {
            assert!(line(words).confidential.is_some(), "{words:?}");
        }
        assert_eq!(line(&["-machine", "q35,confidential-guest-support="]).confidential, None);
    }

    #[test]
    fn values_are_not_taken_for_options() {
        let line = line(&[
            "-append",
            "-qmp",
            "-newflag",
            "-name",
            "a",
            "-newoption",
            "value",
            "disk.img",
            "-drive",
            "file=a,,qmp=b",
            "--",
            "-readconfig",
            "f",
        ]);
        assert_eq!(line.monitors, []);
        assert_eq!(line.name.as_deref(), Some("a"));
        assert!(line.reads_config);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(argv in proptest::collection::vec(
            prop_oneof![
                any::<Vec<u8>>(),
                "-{1,2}(name|m|mon|qmp|chardev|machine|object|accel)".prop_map(String::into_bytes),
                "(unix:|chardev:|socket,|\\{)?[a-z,=.\\{\\}\"0-9]{0,20}".prop_map(String::into_bytes),
            ], 0..12)) {
            let _ = parse(&argv);
            for word in &argv {
                let _ = is_qemu_exe(word);
            }
        }

        #[test]
        fn commas_survive_doubling(path in "[a-z,/]{1,20}") {
            let doubled = format!("unix:/{},server=on", path.replace(',', ",,"));
            let line = line(&["-qmp", &doubled]);
            prop_assert_eq!(line.qmp().next(), Some(&socket(&format!("/{path}"))));
        }
    }
}
