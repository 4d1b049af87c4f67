//! A libvirtd of an ordinary user (`qemu:///session`) in a container with its QEMUs, as KubeVirt has it:
//! mounts, processes and a user of its own, and nothing of it is seen from outside but in `/proc`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Doing, Result, failed, skipped};
use crate::kit::{Kit, Version, is_root};
use crate::libvirtd::{Domain, Virsh};
use crate::proc;

/// Longest wait for the container, and for its end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Its user, who is nobody's on the host either.
const USER: &str = "65534";

/// A container with a libvirtd; dropped, all in it is gone.
#[derive(Debug)]
pub struct Session {
    unshare: Child,
    /// The process that is the first in the container.
    init: u32,
    daemon: u32,
    runtime: PathBuf,
    virsh: Virsh,
}

impl Session {
    /// Starts it, with `runtime` as the user's `XDG_RUNTIME_DIR`. `/mnt` and `/run` are its own.
    pub fn start(runtime: &Path) -> Result<Self> {
        if !is_root() {
            return Err(skipped("a container needs root"));
        }
        let at = runtime.display();
        let environment = [
            String::from("HOME=/mnt/home"),
            String::from("XDG_CONFIG_HOME=/mnt/home/config"),
            String::from("XDG_CACHE_HOME=/mnt/home/cache"),
            format!("XDG_RUNTIME_DIR={at}"),
        ];
        let become_user = format!("setpriv --reuid {USER} --regid {USER} --clear-groups");
        // The first process reaps: libvirt waits for a QEMU that it ends to be gone. Its own end it is
        // told when it is another user, for the kernel forgets it then.
        let script = format!(
            "for dir in /mnt /run; do mount -t tmpfs -o mode=1777 lab $dir || exit; done
            mkdir -p -m 700 {at} /mnt/home && chown {USER}:{USER} {at} /mnt/home && \
            exec {become_user} --pdeathsig KILL env {} sh -c '/usr/sbin/libvirtd & wait $!'",
            environment.join(" "),
        );
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]);
        command.args(["--mount-proc", "--kill-child", "sh", "-c", &script]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let unshare = command.spawn().doing("starting unshare")?;
        let none = Virsh(Vec::new());
        let runtime = runtime.to_owned();
        let mut session = Self { unshare, init: 0, daemon: 0, runtime, virsh: none };
        let until = Instant::now() + PATIENCE;
        while session.daemon == 0 {
            if Instant::now() > until {
                return Err(failed("no libvirtd in the container"));
            }
            std::thread::sleep(Duration::from_millis(20));
            session.init = proc::child_of(session.unshare.id()).unwrap_or(0);
            let child = proc::child_of(session.init);
            let is_it = |pid: &u32| proc::command_line(*pid).starts_with("/usr/sbin/libvirtd");
            session.daemon = child.filter(is_it).unwrap_or(0);
        }
        let enter = format!("nsenter --target {} --mount --pid {become_user} env", session.init);
        let virsh = ["virsh", "-q", "-c", "qemu:///session"].map(String::from);
        let words = enter.split(' ').map(String::from).chain(environment).chain(virsh);
        session.virsh = Virsh(words.collect());
        session.virsh.wait()?;
        Ok(session)
    }

    /// The daemon's socket, as the container sees it.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("libvirt/libvirt-sock")
    }

    /// Whether the libvirtd is the one that was started, and lives.
    pub fn lives(&self) -> bool {
        proc::child_of(self.init) == Some(self.daemon)
            && proc::command_line(self.daemon).starts_with("/usr/sbin/libvirtd")
    }

    /// A Linux domain, in `dir`, that runs once its init listens.
    pub fn domain(&self, kit: &Kit, dir: &Path, name: &str, version: Version) -> Result<Domain> {
        Domain::create(kit, self.virsh.clone(), dir, name, version)
    }

    /// Ends it. Nothing of it may be left.
    pub fn finish(self) -> Result<()> {
        let inside = namespace(self.init).ok_or_else(|| failed("the container is gone"))?;
        drop(self);
        let until = Instant::now() + PATIENCE;
        loop {
            let all = proc::with_argument("").into_iter();
            let left: Vec<String> = all
                .filter(|pid| namespace(*pid).as_ref() == Some(&inside))
                .map(proc::command_line)
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(failed(format_args!("left of the container: {left:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // With its first process all of the container ends.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Which PID namespace a process is in.
fn namespace(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}
