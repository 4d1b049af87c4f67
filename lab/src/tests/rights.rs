//! An ordinary user who has a VM's monitor and nothing else: what works is offered, the rest told.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::{Backing, Doing, Guest, Lab, Result, failed, here, runner};
use rustix::process::Signal;
use serde_json::Value;

use super::exhibit::{Exhibit, acquire};
use super::run::{Family, Running, await_dead, names, signal};

pub(crate) const TESTS: &[runner::Test] = here![a_user_with_a_monitor_alone];

/// `nobody`.
const UID: u32 = 65534;

/// Somebody else, who may talk to the guest's QEMU. Dropped, his files are gone.
struct User {
    dir: PathBuf,
}

impl User {
    fn of(lab: &Lab, guest: &Guest) -> Result<Self> {
        let dir = lab.scratch().join("user");
        fs::create_dir(&dir).doing("the user's directory")?;
        chown(&dir, Some(UID), Some(UID))?;
        let program = lab.tool_command([""; 0])?.get_program().to_owned();
        fs::copy(program, dir.join("stillframe"))?;
        for way in [lab.scratch(), guest.dir(), &dir, &dir.join("stillframe")] {
            fs::set_permissions(way, Permissions::from_mode(0o755))?;
        }
        fs::set_permissions(guest.qmp_tool(), Permissions::from_mode(0o666))?;
        Ok(Self { dir })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.dir.join("stillframe"));
        command.args(args).current_dir(&self.dir).uid(UID).gid(UID);
        command
    }

    fn run(&self, args: &[&str]) -> Result<runner::Finished> {
        runner::finish(self.command(args), Duration::from_secs(120))
    }

    fn acquire(&self, vm: &str, method: &str, flags: &[&str]) -> Result<Exhibit> {
        let args = [&["acquire", vm, "--method", method, "--json", "-o", "."], flags].concat();
        let run = self.run(&args)?.expect_code(0)?;
        let last = run.stdout.lines().last().unwrap_or_default();
        let done: Value = serde_json::from_str(last).doing("the last line of --json")?;
        let name = done["exhibit"].as_str().ok_or_else(|| failed(format_args!("{done}")))?;
        Exhibit::open(&self.dir.join(name))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(format!("/tmp/stillframe-{UID}"));
    }
}

/// Directories of the tool's that QEMU copies into.
fn shared() -> Result<Vec<String>> {
    let mut names = names(Path::new("/dev/shm"))?;
    // The lab's own begin otherwise.
    names.retain(|name| name.starts_with("stillframe-") && !name.starts_with("stillframe-lab"));
    Ok(names)
}

fn a_user_with_a_monitor_alone(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(128).backing(Backing::Memfd).boot()?;
    guest.plant_noise(48, 3)?;
    let user = User::of(lab, &guest)?;
    let vm = guest.pid().to_string();
    let listed = user.run(&["list"])?.expect_code(0)?;
    assert!(listed.stdout.contains(&vm), "{}", listed.stdout);
    for method in ["live", "freeze", "track", "snapshot"] {
        let refused = user.run(&["plan", &vm, "--method", method])?.expect_code(4)?;
        let said = &refused.stderr;
        assert!(said.contains("CAP_SYS_PTRACE") && said.contains("--method dump"), "{said}");
    }
    let refused = user.run(&["plan", &vm])?.expect_code(4)?.stderr;
    assert!(refused.contains("not live") && refused.contains("--consistency any"), "{refused}");
    let any = user.run(&["plan", &vm, "--consistency", "any"])?.expect_code(0)?.stdout;
    assert!(any.contains("method   pmemsave"), "{any}");
    let budget = ["--stall-budget", "20s"];
    user.run(&["plan", &vm, "--method", "dump", "--probe", budget[0], budget[1]])?
        .expect_code(0)?;

    // The running guest goes on; the stopped one is the same for everybody.
    let exhibit = user.acquire(&vm, "dump", &budget)?;
    assert_eq!(exhibit.manifest["class"], "instantaneous", "{}", exhibit.manifest["disturbances"]);
    guest.stop()?;
    let root = acquire(lab, &guest, "live", &[])?.manifest["memory_root"].clone();
    assert!(root.is_string());
    for (method, flags) in [("dump", &budget[..]), ("pmemsave", &[])] {
        let exhibit = user.acquire(&vm, method, flags)?;
        let manifest = &exhibit.manifest;
        assert_eq!(manifest["memory_root"], root, "{method}");
        assert_eq!(manifest["operator"]["uid"], UID, "{method}");
        let limits = manifest["limitations"].to_string();
        assert!(limits.contains("not allowed to look at QEMU's process"), "{limits}");
        assert_eq!(manifest["stable"], Value::Null, "{method}: nothing was read twice");
        let verify = user.run(&["verify", exhibit.dir.to_str().unwrap_or_default()])?;
        verify.expect_code(0)?;
        println!("         {method}: {} {}", manifest["slices"], manifest["dump"]);
    }
    assert_eq!(shared()?, [""; 0]);
    guest.cont()?;

    // Killed, all of it: `recover` takes away what QEMU copied into.
    let family = Family::of_program(&user.dir.join("stillframe"))?;
    let mut command = user.command(&["acquire", &vm, "--method", "pmemsave", "--json"]);
    command.args(["--slice", "4K", "-o", "."]);
    let run = Running::start(command)?;
    let until = Instant::now() + Duration::from_secs(30);
    while shared()?.is_empty() && Instant::now() < until {
        sleep(Duration::from_millis(2));
    }
    assert_eq!(shared()?.len(), 1, "void: nothing to take away");
    let guardian = family.with("@guardian").ok_or_else(|| failed("no guardian"))?;
    for pid in [guardian, run.pid()] {
        signal(pid, Signal::KILL)?;
    }
    await_dead(&[guardian, run.pid()])?;
    run.end()?;
    family.await_gone()?;
    let said = user.run(&["recover", &vm])?.expect_code(0)?.stdout;
    assert_eq!(shared()?, [""; 0], "{said}");
    drop(user);
    guest.finish()
}
