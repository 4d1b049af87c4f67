//! A real libvirtd, the host's own, started for a test and ended with it; and domains of it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::error::{Doing, Result, failed, skipped, timed_out};
use crate::kit::{Kit, Version, is_root};
use crate::proc;
use crate::runner::finish;

/// Where it listens.
const SOCKET: &str = "/run/libvirt/libvirt-sock";

/// Where its daemon for logs does.
const LOGS: &str = "/run/libvirt/virtlogd-sock";

/// Longest wait for it, and for what it does.
const PATIENCE: Duration = Duration::from_secs(90);

/// The daemon, and its daemon for logs.
#[derive(Debug)]
pub struct Libvirtd {
    daemon: Daemon,
    logs: Daemon,
}

/// Runs a daemon, ends it when it is killed itself, and reaps what the daemon leaves: libvirt waits for a
/// process to be gone that has ended, and here that is nobody else's duty (prctl 36 is
/// PR_SET_CHILD_SUBREAPER, 1 PR_SET_PDEATHSIG).
const REAPER: &str = "
import ctypes, os, sys
prctl = ctypes.CDLL(None).prctl
prctl(36, 1, 0, 0, 0)
daemon = os.fork()
if daemon == 0:
    prctl(1, 9, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
while os.wait()[0] != daemon:
    pass
";

/// A daemon under its reaper; dropped, both are gone.
#[derive(Debug)]
struct Daemon {
    reaper: Child,
}

impl Daemon {
    fn start(program: &str) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "python3", "-c", REAPER, program]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let reaper = command.spawn().doing(format_args!("starting {program}"))?;
        Ok(Self { reaper })
    }

    fn lives(&mut self) -> Result<bool> {
        Ok(self.reaper.try_wait()?.is_none())
    }

    /// Kills the daemon and waits until it is gone: its reaper waits for it, and ends. When the reaper is
    /// killed nobody waits, and the next daemon finds the lock of this one still taken.
    fn end(&mut self) -> Result<()> {
        if !self.lives()? {
            return Ok(());
        }
        let daemon = proc::child_of(self.reaper.id()).and_then(|pid| i32::try_from(pid).ok());
        match daemon.and_then(Pid::from_raw) {
            // Gone is as well.
            Some(daemon) => drop(kill_process(daemon, Signal::KILL)),
            None => self.reaper.kill()?,
        }
        self.reaper.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn wait_for(what: &str, mut comes: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !comes() {
        if Instant::now() > until {
            return Err(timed_out(what, PATIENCE));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Waits until the init of a guest listens whose console goes into this file.
pub fn await_ready(console: &Path) -> Result<()> {
    let ready = || fs::read_to_string(console).unwrap_or_default().contains("guest-ready");
    wait_for("the guest's init", ready)
}

/// How `virsh` is started on one daemon: its own words but the command.
#[derive(Debug, Clone)]
pub(crate) struct Virsh(pub(crate) Vec<String>);

impl Virsh {
    /// On the host's daemon.
    fn system() -> Self {
        Self(["virsh", "-q", "-c", "qemu:///system"].map(String::from).to_vec())
    }

    /// `virsh ARGS`: what it printed.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        let (program, words) = self.0.split_first().ok_or_else(|| failed("no virsh"))?;
        let mut command = Command::new(program);
        command.args(words).args(args);
        Ok(finish(command, PATIENCE)?.expect_code(0)?.stdout)
    }

    /// Waits until the daemon answers.
    pub(crate) fn wait(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.run(&["list"]) {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > until => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl Libvirtd {
    /// Starts it. A machine on which one runs already is not ours to play with.
    pub fn start() -> Result<Self> {
        if !is_root() {
            return Err(skipped("libvirt's host daemon needs root"));
        }
        if !proc::with_program(Path::new("/usr/sbin/libvirtd")).is_empty() {
            return Err(skipped("a libvirtd that is not the lab's runs here"));
        }
        let logs = Daemon::start("/usr/sbin/virtlogd")?;
        // Of a domain that starts before it listens libvirtd says that it cannot.
        wait_for("virtlogd", || UnixStream::connect(LOGS).is_ok())?;
        let libvirtd = Self { daemon: Daemon::start("/usr/sbin/libvirtd")?, logs };
        Virsh::system().wait()?;
        Ok(libvirtd)
    }

    /// Whether it is the one that was started, and lives.
    pub fn lives(&mut self) -> Result<bool> {
        self.daemon.lives()
    }

    /// Kills it, waits so long, and starts another one.
    pub fn restart(&mut self, pause: Duration) -> Result<()> {
        self.daemon.end().doing("killing libvirtd")?;
        std::thread::sleep(pause);
        self.daemon = Daemon::start("/usr/sbin/libvirtd")?;
        Virsh::system().wait()
    }

    /// A Linux domain, in `dir`, that runs once its init listens.
    pub fn domain(&self, kit: &Kit, dir: &Path, name: &str, version: Version) -> Result<Domain> {
        Domain::create(kit, Virsh::system(), dir, name, version)
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        for daemon in [&mut self.daemon, &mut self.logs] {
            let _ = daemon.end();
        }
        // What a killed daemon leaves; another one would find a socket that nobody serves.
        for name in ["libvirt-sock", "libvirt-sock-ro", "libvirt-admin-sock"] {
            let _ = fs::remove_file(Path::new(SOCKET).with_file_name(name));
        }
    }
}

/// A running domain; dropped, it is destroyed.
#[derive(Debug)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// QEMU's PID.
    pub pid: u32,
    /// A monitor beside libvirt's.
    pub second_monitor: PathBuf,
    virsh: Virsh,
    capabilities: Value,
    console: PathBuf,
}

/// Text for XML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl Domain {
    /// Has `virsh`'s daemon make one.
    pub(crate) fn create(
        kit: &Kit,
        virsh: Virsh,
        dir: &Path,
        name: &str,
        version: Version,
    ) -> Result<Self> {
        let at = |file: &str| dir.join(file);
        // libvirt gives what a domain uses to QEMU's user.
        fs::copy(kit.kernel(), at("vmlinuz"))?;
        fs::copy(kit.initramfs(), at("initrd"))?;
        let emulator = at("emulator");
        fs::write(&emulator, script(&kit.qemu(version)))?;
        let mut mode = fs::metadata(&emulator)?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        fs::set_permissions(&emulator, mode)?;
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        // QEMU's user makes it: so in a directory that is open to all.
        let sockets = at("sockets");
        fs::create_dir(&sockets)?;
        let mut open = fs::metadata(&sockets)?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o777);
        fs::set_permissions(&sockets, open)?;
        let (second, console) = (sockets.join("second.sock"), sockets.join("console"));
        let xml = format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>{}</name><uuid>{uuid}</uuid><memory unit='MiB'>160</memory><vcpu>1</vcpu>
            <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>
            <cmdline>console=ttyS0 quiet</cmdline></os>
            <features><acpi/><apic/></features>
            <devices><emulator>{}</emulator><memballoon model='none'/>
            <serial type='file'><source path='{}'/></serial></devices>
            <qemu:commandline><qemu:arg value='-qmp'/>
            <qemu:arg value='unix:{},server=on,wait=off'/></qemu:commandline></domain>",
            escaped(name),
            at("vmlinuz").display(),
            at("initrd").display(),
            emulator.display(),
            console.display(),
            second.display(),
        );
        fs::write(at("domain.xml"), xml)?;
        let xml = at("domain.xml").display().to_string();
        virsh.run(&["create", &xml]).doing("creating a domain")?;
        let mut domain = Self {
            name: name.to_owned(),
            uuid,
            pid: 0,
            second_monitor: second,
            virsh,
            capabilities: Value::Null,
            console,
        };
        let pids = proc::with_argument(&domain.uuid).into_iter();
        let mut pids = pids.filter(|pid| proc::command_line(*pid).contains("-uuid"));
        domain.pid = pids.next().ok_or_else(|| failed("no QEMU of the domain"))?;
        await_ready(&domain.console).doing(format_args!("domain {name:?}"))?;
        domain.capabilities = domain.qmp("query-migrate-capabilities")?;
        Ok(domain)
    }

    /// `virsh COMMAND DOMAIN`.
    pub fn virsh(&self, command: &str) -> Result<String> {
        self.virsh.run(&[command, &self.uuid])
    }

    /// A QMP command without arguments through libvirt: what QEMU returns.
    pub fn qmp(&self, command: &str) -> Result<Value> {
        let line = json!({ "execute": command }).to_string();
        let said = self.virsh.run(&["qemu-monitor-command", &self.uuid, &line])?;
        let answer: Value = serde_json::from_str(said.trim()).doing(format_args!("{said:?}"))?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(failed(format_args!("{command} was answered with {answer}"))),
        }
    }

    /// Fails unless the domain runs, by libvirt's word and by QEMU's, and QEMU's settings of migration
    /// are what they were.
    pub fn assert_as_found(&self) -> Result<()> {
        let state = self.virsh("domstate")?;
        let status = self.qmp("query-status")?;
        let capabilities = self.qmp("query-migrate-capabilities")?;
        if state.trim() == "running"
            && status["status"] == "running"
            && capabilities == self.capabilities
        {
            return Ok(());
        }
        Err(failed(format_args!("not as found: {state:?}, {status}, {capabilities}")))
    }

    /// Destroys it.
    pub fn finish(self) -> Result<()> {
        self.assert_as_found()?;
        self.virsh("destroy")?;
        Ok(())
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        let _ = self.virsh.run(&["destroy", &self.uuid]);
    }
}

/// A shell script that becomes this QEMU, without the `setpriv` before it.
fn script(command: &Command) -> String {
    let mut text = String::from("#!/bin/sh\n");
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default();
        text.push_str(&format!("export {}='{}'\n", name.display(), value.display()));
    }
    let words: Vec<String> =
        command.get_args().skip(2).map(|word| format!("'{}'", word.display())).collect();
    text.push_str(&format!("exec {} \"$@\"\n", words.join(" ")));
    text
}
