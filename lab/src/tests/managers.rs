//! VMs that somebody else is at work with: Proxmox, which asks the only monitor all the time, and QEMUs
//! in containers, whose paths, processes and users are other ones. Each test prints its figures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::{Doing, Guest, Lab, Qmp, Result, Version, failed, here, proc, runner, skipped};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::exhibit::Exhibit;
use super::run::{Running, names, new_dir, too_slow, unless_slow};

pub(crate) const TESTS: &[runner::Test] = here![
    proxmox_gets_its_monitor_all_the_time,
    a_vm_that_proxmox_has_locked_is_refused,
    a_qemu_in_a_container_is_imaged,
];

// Proxmox.

/// A VM of Proxmox's: its PID file, its monitor, its configuration. Dropped, they are gone.
struct Proxmox {
    made: Vec<PathBuf>,
}

const RUN: &str = "/run/qemu-server";
const CONFIG: &str = "/etc/pve/qemu-server";

/// No PID is so great (`PID_MAX_LIMIT`).
const VMID: u32 = 99_999_999;

impl Proxmox {
    /// Makes `guest` one, of which the monitor is the tool's.
    fn of(guest: &Guest, config: &str) -> Result<Self> {
        if Path::new("/usr/bin/pveversion").exists() {
            return Err(skipped("this is a Proxmox host, and not ours to play with"));
        }
        let mut proxmox = Self { made: Vec::new() };
        for dir in [RUN, "/etc/pve", CONFIG] {
            if !Path::new(dir).exists() {
                fs::create_dir(dir).doing(dir)?;
                proxmox.made.push(dir.into());
            }
        }
        let pid = Path::new(RUN).join(format!("{VMID}.pid"));
        let config_file = Path::new(CONFIG).join(format!("{VMID}.conf"));
        for (file, text) in [(&pid, format!("{}\n", guest.pid())), (&config_file, config.into())] {
            fs::write(file, text).doing(file.display())?;
            proxmox.made.push(file.clone());
        }
        let monitor = pid.with_extension("qmp");
        std::os::unix::fs::symlink(guest.qmp_tool(), &monitor)?;
        proxmox.made.push(monitor);
        Ok(proxmox)
    }
}

impl Drop for Proxmox {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
        }
    }
}

/// So long the tool may keep the monitor at a time, for one group of questions. Proxmox itself waits for three.
const KEPT: Duration = Duration::from_secs(1);

/// Somebody who asks a monitor again and again, and must get it soon each time.
struct Poller {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u32, Duration)>>,
}

impl Poller {
    fn start(socket: &Path) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (ended, socket) = (Arc::clone(&end), socket.to_owned());
        let thread = spawn(move || {
            let (mut asked, mut longest) = (0, Duration::ZERO);
            while !ended.load(Ordering::Relaxed) {
                let began = Instant::now();
                let mut qmp = Qmp::connect(&socket, Duration::from_secs(20))?;
                qmp.run("query-status", json!({}))?;
                drop(qmp);
                longest = longest.max(began.elapsed());
                asked += 1;
                sleep(Duration::from_millis(100));
            }
            Ok((asked, longest))
        });
        Self { end, thread }
    }

    /// How often it asked, and the longest that it waited for an answer.
    fn end(self) -> Result<(u32, Duration)> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err(failed("the poller panicked")))
    }
}

fn run(lab: &Lab, vm: &str, method: &str, flags: &[&str]) -> Result<Exhibit> {
    let out = new_dir(lab, "run")?;
    let mut command = lab.tool_command(["acquire", "--method", method, "--json"])?;
    command.args(flags).arg("-o").arg(&out).arg("--").arg(vm);
    let ended = Running::start(command)?.end()?.expect(0).doing(method)?;
    let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
    lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0).doing(method)?;
    let to = lab.scratch().join("last");
    let _ = fs::remove_dir_all(&to);
    fs::rename(&out, &to)?;
    let name = exhibit.dir.file_name().unwrap_or_default();
    Exhibit::open(&to.join(name))
}

/// The monitor was asked some times meanwhile, and nobody waited for it longer than the tool may keep it. A
/// machine that stood still makes the poller late, and is told by doing it again.
fn was_given_back(what: &str, (asked, longest): (u32, Duration)) -> Result<()> {
    println!("         {what}: asked {asked} times meanwhile, waited {longest:?} at most");
    match asked > 3 && longest < KEPT {
        true => Ok(()),
        false => Err(too_slow(format_args!("{what}: asked {asked} times, waited {longest:?}"))),
    }
}

fn proxmox_gets_its_monitor_all_the_time(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(224).boot()?;
    guest.plant_noise(96, 7)?;
    let _proxmox = Proxmox::of(&guest, "name: web\n")?;
    let list = lab.tool(["list", "--json"])?.expect_code(0)?.stdout;
    assert!(list.contains(&format!("\"vmid\":{VMID}")), "{list}");
    let vm = VMID.to_string();
    for (method, flags, class) in [
        ("live", &["--max-rate", "64M"][..], "none"),
        ("freeze", &["--stall-budget", "900ms"], "instantaneous"),
        ("snapshot", &["--stall-budget", "2s"], "quasi-instantaneous"),
    ] {
        unless_slow(|| {
            let poller = Poller::start(guest.qmp_tool());
            let exhibit = run(lab, &vm, method, flags)?;
            let asked = poller.end()?;
            assert_eq!(exhibit.manifest["class"], class, "{}", exhibit.manifest["disturbances"]);
            was_given_back(method, asked)
        })?;
    }
    unless_slow(|| {
        let poller = Poller::start(guest.qmp_tool());
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until {
            super::map::chart(lab, &vm)?;
        }
        was_given_back("map", poller.end()?)
    })?;
    let refused = lab.tool(["plan", &vm, "--method", "pmemsave"])?.expect_code(4)?;
    assert!(refused.stderr.contains("Proxmox needs it too"), "{}", refused.stderr);
    guest.finish()
}

fn a_vm_that_proxmox_has_locked_is_refused(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(96).boot()?;
    let proxmox = Proxmox::of(&guest, "name: web\nlock: backup\n")?;
    let (out, events) = (new_dir(lab, "locked")?, guest.events()?);
    let mut command = lab.tool_command(["acquire", "--method", "live", "--json", "-o"])?;
    command.arg(&out).arg(VMID.to_string());
    Running::start(command)?.end()?.expect(4)?.says(&["backup"])?;
    assert_eq!(names(&out)?, [""; 0]);
    assert_eq!(guest.events()?, events);
    drop(proxmox);
    guest.finish()
}

// Containers.

/// A QEMU with mounts, processes and a user of its own: its monitor lies where nobody outside sees it.
struct Contained {
    unshare: Child,
    pid: u32,
}

impl Contained {
    fn start(lab: &Lab) -> Result<Self> {
        let qemu = lab.kit.qemu(Version::V10_0);
        let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.display());
        let envs: Vec<String> = qemu
            .get_envs()
            .map(|(name, value)| {
                format!("{}={}", name.display(), quoted(value.unwrap_or_default()))
            })
            .collect();
        // Without the words that have it end with its parent, which is none of this process.
        let words: Vec<String> = qemu.get_args().skip(2).map(quoted).collect();
        let script = format!(
            "mount -t tmpfs -o mode=1777 lab /mnt && export {} && \
             exec setpriv --reuid 65534 --regid 65534 --clear-groups {} -nodefaults -display none \
             -name contained -m 128 -accel tcg -qmp unix:/mnt/only-here.sock,server=on,wait=off \
             -serial file:/mnt/console -kernel {} -initrd {} -append 'console=ttyS0 quiet'",
            envs.join(" "),
            words.join(" "),
            lab.kit.kernel().display(),
            lab.kit.initramfs().display(),
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]);
        command.arg(script).stdin(Stdio::null()).stdout(Stdio::null());
        let unshare = command.spawn().doing("starting unshare")?;
        let mut contained = Self { unshare, pid: 0 };
        let until = Instant::now() + Duration::from_secs(20);
        while contained.pid == 0 {
            let is_qemu = |pid: &u32| proc::command_line(*pid).contains("qemu-system");
            let mut named = proc::with_argument("only-here.sock").into_iter();
            let is_it = |pid: &u32| is_qemu(pid) && !proc::command_line(*pid).contains("setpriv");
            contained.pid = named.rfind(is_it).unwrap_or(0);
            assert!(Instant::now() < until, "no QEMU in the container");
            sleep(Duration::from_millis(20));
        }
        let socket = format!("/proc/{}/root/mnt/only-here.sock", contained.pid);
        while !Path::new(&socket).exists() {
            assert!(Instant::now() < until, "no monitor in the container");
            sleep(Duration::from_millis(20));
        }
        let console = format!("/proc/{}/root/mnt/console", contained.pid);
        lab::libvirtd::await_ready(Path::new(&console))?;
        Ok(contained)
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        // The kernel forgets that it shall end with its parent when it becomes another user.
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn a_qemu_in_a_container_is_imaged(lab: &Lab) -> Result<()> {
    let contained = Contained::start(lab)?;
    assert!(!Path::new("/mnt/only-here.sock").exists(), "void: it is seen from outside");
    let list = lab.tool(["list", "--json"])?.expect_code(0)?.stdout;
    let mut rows = list.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let row = rows.find(|row| row["pid"] == contained.pid);
    let row = row.ok_or_else(|| failed(format_args!("not listed: {list}")))?;
    assert_eq!([&row["name"], &row["own_mounts"]], [&json!("contained"), &json!(true)]);
    for (method, flags, class) in [
        ("live", &[][..], "none"),
        ("freeze", &["--hold", "ptrace", "--stall-budget", "900ms"], "instantaneous"),
        ("freeze", &["--hold", "stop", "--stall-budget", "5s"], "instantaneous"),
        ("pmemsave", &[], "none"),
    ] {
        let exhibit = run(lab, "contained", method, flags)?;
        let manifest = &exhibit.manifest;
        assert_eq!(manifest["class"], class, "{method}: {}", manifest["disturbances"]);
        let monitor = manifest["vm"]["monitor"].as_str().unwrap_or_default();
        assert!(monitor.ends_with("/root/mnt/only-here.sock"), "{monitor}");
        assert!(manifest["states"]["data"].as_u64() > Some(32 << 20), "{}", manifest["states"]);
    }
    Ok(())
}
