//! The libvirt client against a real libvirtd, in namespaces of its own: the host's libvirt, should it have
//! one, is not touched, and nothing is left.
//!
//! ```text
//! apt-get install -y --no-install-recommends libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients \
//!     libvirt-daemon-system polkitd dbus
//! cargo test -p stillframe-qemu --test libvirtd -- --ignored
//! ```
//!
//! With `STILLFRAME_KEEP=1` the packets of one conversation are kept for `tests/libvirt.rs`.
#![forbid(unsafe_code)]
// Helpers of tests are tests: a panic is their verdict.
#![allow(clippy::unwrap_used)]

mod conversation;

use conversation::{KEPT, NAME, UUID};
use qemu::facts::Facts;
use qemu::libvirt::{
    DumpFormat, Libvirt, LibvirtError, Lifecycle, MAX_PEEK, RunState, SESSION, SYSTEM, State,
};
use qemu::qmp::Change;
use qemu::{GuestView, Qmp, QmpError};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

/// What the first process of the namespaces does: libvirt's places are its own, and a libvirtd that ends
/// is followed by another.
const INIT: &str = r#"set -e
for place in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log; do
    mount -t tmpfs tmpfs "$place"
done
mkdir -p /run/lock /var/log/libvirt/qemu
echo 'log_outputs = "3:file:/var/log/libvirt/libvirtd.log"' > /etc/libvirt/libvirtd.conf
mkdir -p /run/dbus && dbus-daemon --system --fork
/usr/lib/polkit-1/polkitd --no-debug &
echo 'lock_manager = "lockd"' > /etc/libvirt/qemu.conf
truncate -s 1M /var/lib/libvirt/disk.img
virtlogd -d
virtlockd -d
while :; do libvirtd || true; sleep 0.3; done"#;

const XML: &str = "<domain type='qemu'><name>web 07 &lt;веб&gt;</name>
<uuid>3f2ad7c0-1111-4222-8333-444455556666</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/><apic/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>
<disk type='file' device='disk'><source file='/var/lib/libvirt/disk.img'/><target dev='vda'/></disk>
<memballoon model='none'/></devices></domain>";

/// A libvirtd with a domain, in namespaces that end with it.
struct Daemon {
    unshare: Child,
    /// Their first process.
    init: u32,
}

impl Daemon {
    fn start() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["sh", "-c", INIT]).stdin(Stdio::null());
        let unshare = command.spawn().unwrap();
        let mut daemon = Self { unshare, init: 0 };
        daemon.init = waited(|| children(daemon.unshare.id()).first().copied());
        daemon.wait();
        daemon.virsh(&["create", "/dev/stdin"], XML);
        daemon
    }

    /// A path there, as it is seen from here.
    fn at(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    fn socket(&self) -> PathBuf {
        self.at("/run/libvirt/libvirt-sock")
    }

    fn connect(&self) -> Libvirt {
        Libvirt::connect(&self.socket(), SYSTEM, LONG).unwrap()
    }

    fn wait(&self) {
        waited(|| Libvirt::connect(&self.socket(), SYSTEM, LONG).ok());
    }

    fn virsh(&self, args: &[&str], input: &str) {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-m", "-p", "virsh", "-q"]).args(args);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{args:?}");
    }

    /// The daemon's process.
    fn pid(&self) -> Option<u32> {
        let is_it = |pid: &u32| name_of(*pid) == "libvirtd";
        children(self.init).into_iter().find(is_it)
    }

    /// Kills the daemon; another one follows.
    fn kill(&self) {
        let pid = rustix::process::Pid::from_raw(self.pid().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// How many leases of the domain's disk virtlockd holds.
    fn leases(&self) -> usize {
        let disk = fs::metadata(self.at("/var/lib/libvirt/disk.img")).unwrap().ino();
        let is_it = |pid: &u32| name_of(*pid) == "virtlockd";
        let keeper = children(self.init).into_iter().find(is_it).unwrap();
        let open = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().flatten();
        open.filter(|fd| fs::metadata(fd.path()).is_ok_and(|file| file.ino() == disk)).count()
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.at("/var/log/libvirt").join(name)).unwrap_or_default()
    }

    fn is_tainted(&self) -> bool {
        self.log(&format!("qemu/{NAME}.log")).contains("custom-monitor")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // With their first process the namespaces end, and everything in them.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let gone = Instant::now();
        while Path::new(&format!("/proc/{}", self.init)).exists() && gone.elapsed() < LONG {
            sleep(Duration::from_millis(20));
        }
    }
}

fn waited<T>(mut get: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        match get() {
            Some(got) => return got,
            None if began.elapsed() > LONG => panic!("it does not come"),
            None => sleep(Duration::from_millis(50)),
        }
    }
}

fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
#[ignore = "needs root, libvirtd and QEMU: cargo test -p stillframe-qemu --test libvirtd -- --ignored"]
fn a_real_libvirtd() {
    let daemon = Daemon::start();
    only_looking(&daemon);
    assert!(!daemon.is_tainted(), "by looking");
    by_nobody(&daemon);
    without_a_monitor(&daemon);
    assert!(!daemon.is_tainted(), "by libvirt's own calls");
    kept(&daemon);
    let mut qmp = through(&daemon);
    assert!(daemon.is_tainted());
    passed(&daemon, &mut qmp);
    a_restart(&daemon, qmp);
    let state = daemon.connect().state(&domain(&daemon), LONG).unwrap();
    assert_eq!(state.state, RunState::Running);
    daemon.virsh(&["destroy", NAME], "");
}

#[test]
#[ignore = "needs root and libvirtd: cargo test -p stillframe-qemu --test libvirtd -- --ignored"]
fn a_session_of_another_user() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--pdeathsig", "KILL"]);
    command.args(["libvirtd", "--timeout", "60"]).stdout(Stdio::null()).stderr(Stdio::null());
    for name in ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
        command.env(name, dir.path());
    }
    let mut daemon = command.spawn().unwrap();
    let (socket, uri) = (dir.path().join("libvirt/libvirt-sock"), SESSION);
    let mut libvirt = waited(|| Libvirt::connect_to_look(&socket, uri, LONG).ok());
    assert_eq!((uri, libvirt.peer().unwrap().uid), (SESSION, 65534));
    assert_eq!(libvirt.domains(LONG).unwrap(), []);
    assert!(libvirt.is_read_only());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(libvirt.domains(LONG).unwrap_err().is_lost());
}

fn domain(daemon: &Daemon) -> qemu::libvirt::Domain {
    daemon.connect().domain(UUID, LONG).unwrap()
}

fn only_looking(daemon: &Daemon) {
    let socket = daemon.at("/run/libvirt/libvirt-sock-ro");
    for mut libvirt in [
        Libvirt::connect(&socket, SYSTEM, LONG).unwrap(),
        Libvirt::connect_to_look(&daemon.socket(), SYSTEM, LONG).unwrap(),
    ] {
        assert!(libvirt.is_read_only());
        let peer = libvirt.peer().unwrap();
        assert_eq!((peer.uid, peer.pid), (0, daemon.pid()));
        let domains = libvirt.domains(LONG).unwrap();
        let names: Vec<_> = domains.iter().map(|domain| domain.name.as_str()).collect();
        assert_eq!(names, [NAME]);
        libvirt.state(&domains[0], LONG).unwrap();
        libvirt.control(&domains[0], LONG).unwrap();
        let watch = libvirt.watch(None, LONG).unwrap();
        libvirt.unwatch(&watch, LONG).unwrap();
        let error = libvirt.peek(&domains[0], 0, 8, LONG).unwrap_err();
        assert!(matches!(error, LibvirtError::ReadOnly { .. }), "{error}");
        println!("libvirt {:?}: {domains:?}", libvirt.version(LONG).unwrap());
    }
    // Whoever leaves without a word is written about.
    assert!(!daemon.log("libvirtd.log").contains("End of file"), "{}", daemon.log("libvirtd.log"));
}

/// Set for the other user's part.
const NOBODY: &str = "STILLFRAME_NOBODY";

/// Another user is let in by polkit, to look.
fn by_nobody(daemon: &Daemon) {
    let mut command = Command::new("nsenter");
    command.env(NOBODY, "1").args(["-t", &daemon.init.to_string(), "-m", "-p"]);
    command.args(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "as_nobody", "--ignored", "--nocapture"]);
    assert!(command.status().unwrap().success());
}

#[test]
#[ignore = "a part of a_real_libvirtd, which starts it as another user"]
fn as_nobody() {
    if std::env::var_os(NOBODY).is_none() {
        return;
    }
    let socket = Path::new("/run/libvirt/libvirt-sock");
    let error = Libvirt::connect(socket, SYSTEM, LONG).unwrap_err();
    println!("to do everything: {error}");
    assert!(matches!(error, LibvirtError::Refused { .. }), "{error}");
    let mut libvirt =
        Libvirt::connect(Path::new("/run/libvirt/libvirt-sock-ro"), SYSTEM, LONG).unwrap();
    assert_eq!(libvirt.domains(LONG).unwrap()[0].name, NAME);
}

fn without_a_monitor(daemon: &Daemon) {
    let mut libvirt = daemon.connect();
    let domain = libvirt.domain(UUID, LONG).unwrap();
    let most = libvirt.peek(&domain, 0, MAX_PEEK, LONG).unwrap();
    // The firmware's first instruction, at its copy below 1 MiB: a far jump.
    assert_eq!(most[0xf_fff0], 0xea);
    let error = libvirt.peek(&domain, 0, MAX_PEEK + 1, LONG).unwrap_err();
    println!("too much: {error}");
    assert!(error.code().is_some(), "{error}");

    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let fifo = dir.path().join("dump");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let other_end = fifo.clone();
    let reader = spawn(move || {
        let mut dump = Vec::new();
        File::open(other_end).unwrap().read_to_end(&mut dump).unwrap();
        dump
    });
    let began = Instant::now();
    libvirt.core_dump(&domain, &fifo, DumpFormat::Elf, false, LONG).unwrap();
    let dump = reader.join().unwrap();
    println!("a dump of {} bytes into a FIFO: {:?}", dump.len(), began.elapsed());
    assert!(dump.starts_with(b"\x7fELF") && dump.len() > 64 << 20);

    // One whose reader leaves.
    let other_end = fifo.clone();
    let reader = spawn(move || {
        File::open(other_end).unwrap().read_exact(&mut [0; 100]).unwrap();
    });
    let error = libvirt.core_dump(&domain, &fifo, DumpFormat::Elf, false, LONG).unwrap_err();
    println!("a dump whose reader leaves: {error}");
    reader.join().unwrap();
    assert_eq!(libvirt.state(&domain, LONG).unwrap().state, RunState::Running);
}

/// One conversation, packet by packet.
fn kept(daemon: &Daemon) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = UnixStream::connect(daemon.socket()).unwrap();
    let packets = Arc::new(Mutex::new(String::new()));
    let relays =
        [(theirs.try_clone().unwrap(), server.try_clone().unwrap(), '>'), (server, theirs, '<')];
    let relays = relays.map(|(from, to, mark)| {
        let packets = Arc::clone(&packets);
        spawn(move || relay(from, to, mark, &packets))
    });
    let said = conversation::hold(ours);
    for relay in relays {
        relay.join().unwrap();
    }
    println!("{}", said.join("\n"));
    if std::env::var_os("STILLFRAME_KEEP").is_some() {
        fs::write(KEPT, packets.lock().unwrap().as_bytes()).unwrap();
    }
}

/// Passes packets on until there are no more.
fn relay(mut from: UnixStream, mut to: UnixStream, mark: char, packets: &Mutex<String>) {
    let mut len = [0; 4];
    while from.read_exact(&mut len).is_ok() {
        let mut packet = vec![0; usize::try_from(u32::from_be_bytes(len)).unwrap()];
        packet[..4].copy_from_slice(&len);
        from.read_exact(&mut packet[4..]).unwrap();
        let hex: String = packet.iter().map(|byte| format!("{byte:02x}")).collect();
        packets.lock().unwrap().push_str(&format!("{mark} {hex}\n"));
        // Whoever has left needs no more.
        if to.write_all(&packet).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

fn through(daemon: &Daemon) -> Qmp {
    let libvirt = daemon.connect();
    Qmp::through(libvirt, SYSTEM, domain(daemon), LONG, None).unwrap()
}

fn passed(daemon: &Daemon, qmp: &mut Qmp) {
    let null = File::open("/dev/null").unwrap();
    qmp.pass("stillframe", null.as_fd(), LONG).unwrap();
    qmp.change(&Change::CloseFd("stillframe".into()), LONG).unwrap();
    let error = qmp.change(&Change::CloseFd("stillframe".into()), LONG).unwrap_err();
    assert!(matches!(error, QmpError::Refused { .. }), "{error}");

    // The same memory by libvirt's way and by QEMU's, into a file of ours.
    let mut libvirt = daemon.connect();
    let domain = libvirt.domain(UUID, LONG).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    // QEMU is not root.
    file.as_file().set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    qmp.change(&Change::Pmemsave { gpa: 0xf_f000, len: 4096, file: path }, LONG).unwrap();
    let saved = fs::read(file.path()).unwrap();
    let peeked = libvirt.peek(&domain, 0xf_f000, 4096, LONG).unwrap();
    assert_eq!(peeked.len(), 4096);
    assert!(peeked == saved && peeked.iter().any(|byte| *byte != 0));

    let view = GuestView::take(qmp, LONG).unwrap();
    println!("{} regions", view.map().unwrap().regions().len());
    assert_eq!(Facts::of(qmp, LONG).name().unwrap().as_deref(), Some(NAME));

    libvirt.watch(Some(&domain), LONG).unwrap();
    qmp.take_events();
    assert_eq!(daemon.leases(), 1);
    qmp.change(&Change::Stop, LONG).unwrap();
    assert!(!Facts::of(qmp, LONG).status().unwrap().running);
    let state = libvirt.state(&domain, LONG).unwrap();
    assert_eq!(state, State { state: RunState::Paused, reason: 1 });
    assert_eq!(daemon.leases(), 0);
    qmp.change(&Change::Cont, LONG).unwrap();
    let mut events = Vec::new();
    while events.len() < 2 {
        qmp.poll_events(LONG).unwrap();
        events.extend(qmp.take_events());
    }
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names, ["STOP", "RESUME"]);
    assert_eq!(daemon.leases(), 1);
    println!("{events:?}");
    let mut lives = Vec::new();
    while lives.len() < 2 {
        libvirt.poll_events(LONG).unwrap();
        lives.extend(libvirt.take_lifecycle().into_iter().map(|event| event.what));
    }
    assert_eq!(lives, [Lifecycle::Suspended, Lifecycle::Resumed]);
}

fn a_restart(daemon: &Daemon, mut qmp: Qmp) {
    let mut direct = daemon.connect();
    let domain = direct.domain(UUID, LONG).unwrap();
    let before = daemon.pid();
    daemon.kill();
    let began = Instant::now();
    assert!(Facts::of(&mut qmp, LONG).status().unwrap().running);
    println!("found again after {:?}", began.elapsed());
    assert_eq!(qmp.reconnects(), 1);
    assert_ne!(daemon.pid(), before);
    // Of the connection itself it is said that it is lost, and nothing more.
    let error = direct.state(&domain, LONG).unwrap_err();
    assert!(error.is_lost() && error.is_unsent(), "{error}");
    assert_eq!(daemon.connect().domain(UUID, LONG).unwrap(), domain);
    qmp.take_events();
    qmp.change(&Change::Stop, LONG).unwrap();
    qmp.change(&Change::Cont, LONG).unwrap();
    qmp.poll_events(LONG).unwrap();
    assert_eq!(qmp.take_events()[0].name, "STOP");

    // What was surely not sent is sent anew, though it changes something.
    let killed = daemon.pid();
    daemon.kill();
    waited(|| (daemon.pid() != killed).then_some(()));
    qmp.change(&Change::Stop, LONG).unwrap();
    qmp.change(&Change::Cont, LONG).unwrap();
    assert_eq!(qmp.reconnects(), 2);
}
