//! What happens when something goes wrong: the guest is as found, the error is clear, and nothing
//! that is left passes for a complete exhibit.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::{Backing, Doing, Guest, Lab, Result, failed, here, outer, pattern, runner, skipped};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::exhibit::{STORES, take};
use super::run::{Ended, Left, Running, acquire, assert_nothing_passes, kill, names};
use super::run::{new_dir, refused, too_slow, unless_slow, verify};

pub(crate) const TESTS: &[runner::Test] = here![
    sigkill_at_any_moment,
    a_partial_name_is_never_complete,
    a_full_output_is_refused_beforehand,
    a_full_output_leaves_a_partial_record_when_forced,
    an_output_that_fills_meanwhile_leaves_nothing_that_passes,
    only_a_directory_takes_an_exhibit,
    a_control_group_too_small_for_the_store,
    a_busy_monitor_is_an_error_within_five_seconds,
    a_busy_monitor_among_several_is_skipped_and_named,
    a_monitor_that_talks_nonsense_is_refused,
    a_server_that_poses_as_qemu_is_refused,
    a_qemu_that_dies_meanwhile_leaves_a_partial_record,
    a_migrating_guest_is_refused,
    a_flipped_byte_is_named_by_its_address,
    an_exhibit_behind_a_link_is_not_verified,
];

pub(crate) const OUTER: &[runner::Test] = outer![a_control_group_too_small_on_version_two];

/// A guest with `mib` MiB that cannot be compressed, and its PID as the tool is given it.
fn filled(lab: &Lab, mib: u64) -> Result<(Guest, String)> {
    let mut guest = lab.guest().boot()?;
    guest.plant_noise(mib, 7)?;
    let vm = guest.pid().to_string();
    Ok((guest, vm))
}

/// Numbers below 1 that are spread well and are the same in every run.
pub(super) fn share(n: u32) -> f64 {
    f64::from(n.wrapping_mul(0x9e37_79b1) >> 8) / f64::from(1 << 24)
}

fn sigkill_at_any_moment(lab: &Lab) -> Result<()> {
    let moments = lab.scale(4, 50);
    let (mut guest, vm) = filled(lab, 64)?;
    for store in STORES {
        let out = new_dir(lab, store)?;
        let whole = Running::start(acquire(lab, &vm, &out, &["--store", store])?)?.end()?;
        let (mut took, mut left) = (whole.expect(0)?.took, Left::default());
        fs::remove_dir_all(&out)?;
        let half = usize::try_from(moments)?.div_ceil(2);
        // More when too many came after the end: a machine that stalls makes one run longer than others.
        for n in 0..moments * 4 {
            if n >= moments && left.partial >= half {
                break;
            }
            let out = new_dir(lab, store)?;
            let part = (f64::from(n % moments) + share(n)) / f64::from(moments);
            let run = Running::start(acquire(lab, &vm, &out, &["--store", store])?)?;
            sleep(took.mul_f64(part));
            run.signal(Signal::KILL)?;
            let ended = run.end()?;
            if ended.status.success() {
                took = took.min(ended.took);
            }
            guest.assert_as_found().doing(format_args!("{store}, killed at {part:.3}"))?;
            let now = assert_nothing_passes(lab, &out).doing(format_args!("{store}, {part:.3}"))?;
            (left.partial, left.whole) = (left.partial + now.partial, left.whole + now.whole);
            fs::remove_dir_all(&out)?;
        }
        // Killed before the directory is made, and after the end, says little.
        assert!(left.partial >= half, "{store}: {left:?} of {moments}");
    }
    take(lab, &guest, &[])?;
    guest.finish()
}

/// The moment between the manifest and the new name is too short to be met by chance.
fn a_partial_name_is_never_complete(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let exhibit = take(lab, &guest, &[])?;
    let name = exhibit.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let partial = exhibit.dir.with_file_name(format!("{name}.partial"));
    fs::rename(&exhibit.dir, &partial)?;
    assert_eq!(verify(lab, &partial)?, Some(3));
    let mut inside = lab.tool_command(["verify", "."])?;
    inside.current_dir(&partial);
    runner::finish(inside, Duration::from_secs(60))?.expect_code(3)?;
    guest.finish()
}

/// A tmpfs of our own; dropped, it is unmounted.
#[derive(Debug)]
pub(super) struct Tmpfs(pub(super) PathBuf);

impl Tmpfs {
    pub(super) fn mount(lab: &Lab, mib: u64) -> Result<Self> {
        let dir = new_dir(lab, "tmpfs")?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "lab"]).arg(&dir);
        let done = runner::finish(mount, Duration::from_secs(10))?;
        let cannot = |e| skipped(format_args!("no tmpfs can be mounted: {e}"));
        done.expect_code(0).map(|_| Self(dir)).map_err(cannot)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // One that stays, while somebody has a file in it, would fail every later test.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn a_full_output_is_refused_beforehand(lab: &Lab) -> Result<()> {
    let (guest, vm) = filled(lab, 96)?;
    let full = Tmpfs::mount(lab, 50)?;
    for store in STORES {
        let path = full.0.to_string_lossy();
        refused(lab, &vm, &full.0, &["--store", store], &[&path, "bytes free", "--force-output"])?;
    }
    guest.finish()
}

fn a_full_output_leaves_a_partial_record_when_forced(lab: &Lab) -> Result<()> {
    let (mut guest, vm) = filled(lab, 96)?;
    let full = Tmpfs::mount(lab, 50)?;
    for store in STORES {
        let run = acquire(lab, &vm, &full.0, &["--force-output", "--store", store])?;
        let ended = Running::start(run)?.end()?.expect(1)?.says(&["free"])?;
        assert!(ended.partial(lab, "failed")?.contains("bytes"), "{:?}", ended.done("reason"));
        assert_eq!(assert_nothing_passes(lab, &full.0)?, Left { partial: 1, whole: 0 });
        guest.assert_as_found()?;
        fs::remove_dir_all(ended.exhibit()?.0)?;
    }
    guest.finish()
}

fn an_output_that_fills_meanwhile_leaves_nothing_that_passes(lab: &Lab) -> Result<()> {
    let (mut guest, vm) = filled(lab, 32)?;
    for store in STORES {
        let space = Tmpfs::mount(lab, 400)?;
        let run = acquire(lab, &vm, &space.0, &["--max-rate", "64M", "--store", store])?;
        let mut run = Running::start(run)?;
        run.until_in_pass(1)?;
        let filler = space.0.join("filler");
        fill(&filler)?;
        let ended = run.end()?.expect(1)?.says(&["No space left"])?;
        fs::remove_file(filler)?;
        let left = assert_nothing_passes(lab, &space.0)?;
        assert_eq!((left, ended.done("reason").is_null()), (Left { partial: 1, whole: 0 }, false));
        guest.assert_as_found()?;
        drop(space);
        fs::remove_dir(lab.scratch().join("tmpfs"))?;
    }
    guest.finish()
}

/// Writes until the file system is full.
pub(super) fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    for len in [1 << 20, 4096, 1] {
        let bytes = vec![1; len];
        loop {
            match file.write_all(&bytes) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::StorageFull => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

fn only_a_directory_takes_an_exhibit(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let (real, planted) = (new_dir(lab, "real")?, new_dir(lab, "planted")?);
    let [link, dangling, fifo, file] =
        ["link", "dangling", "fifo", "file"].map(|n| planted.join(n));
    std::os::unix::fs::symlink(&real, &link)?;
    std::os::unix::fs::symlink(lab.scratch().join("nowhere"), &dangling)?;
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU)?;
    fs::write(&file, "mine")?;
    let before = names(&planted)?;
    let cases = [
        (link.clone(), "symbolic link"),
        (link.join(""), "symbolic link"),
        (dangling, "symbolic link"),
        (fifo, "FIFO"),
        (file.clone(), "a file"),
        (planted.join("missing"), "No such file"),
        (planted.join("missing/deeper"), "No such file"),
    ];
    for (output, word) in cases {
        let run = Running::start(acquire(lab, &guest.pid().to_string(), &output, &[])?)?.end()?;
        let ended = run.expect(4)?.says(&[word]).doing(output.display())?;
        assert!(ended.took < Duration::from_secs(5), "{}: {:?}", output.display(), ended.took);
        assert_eq!((names(&planted)?, names(&real)?), (before.clone(), vec![]));
    }
    assert_eq!(
        (fs::read_to_string(&file)?, lab.scratch().join("nowhere").exists()),
        ("mine".into(), false)
    );
    guest.finish()
}

/// A control group below the one that this process is in; dropped, it is removed.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) dir: PathBuf,
    /// It is of the first version.
    pub(super) first: bool,
}

impl Group {
    /// A group of the version whose controller this machine uses; its names in both.
    pub(super) fn new(first_name: &str, second_name: &str) -> Result<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let is_first = format!(":{first_name}:");
        let first = groups.lines().find_map(|line| line.split_once(&is_first).map(|(_, p)| p));
        let second = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let name = format!("stillframe-lab-{}", std::process::id());
        let none = || {
            skipped(format_args!("no {first_name} control group is mounted where this process is"))
        };
        let own = match (first, second) {
            (Some(path), _) => below("cgroup", first_name, path),
            (None, Some(path)) => below("cgroup2", "", path),
            (None, None) => None,
        };
        let own = own.filter(|dir| dir.exists()).ok_or_else(none)?;
        if first.is_none() {
            // Refused where the group holds processes and is not the root.
            let _ = fs::write(own.join("cgroup.subtree_control"), format!("+{second_name}"));
        }
        let group = Self { dir: own.join(name), first: first.is_some() };
        let cannot = |e| skipped(format_args!("no control group can be made: {e}"));
        fs::create_dir(&group.dir).map_err(cannot)?;
        Ok(group)
    }

    /// Sets what the file of the group's version says.
    pub(super) fn set(&self, first: (&str, &str), second: (&str, &str)) -> Result<()> {
        let (file, text) = if self.first { first } else { second };
        let cannot = |e| skipped(format_args!("{file} of a control group cannot be set: {e}"));
        fs::write(self.dir.join(file), text).map_err(cannot)
    }

    /// The command, to be run in the group.
    pub(super) fn within(&self, command: &Command) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.dir.join("cgroup.procs"));
        shell.arg(command.get_program()).args(command.get_args());
        shell
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

/// A memory control group with a limit.
fn limited(mib: u64) -> Result<Group> {
    let (group, limit) = (Group::new("memory", "memory")?, (mib << 20).to_string());
    group.set(("memory.limit_in_bytes", &limit), ("memory.max", &limit))?;
    Ok(group)
}

/// Processes of a memory control group that the kernel killed for want of memory.
fn kills(group: &Group) -> Result<u64> {
    let file = if group.first { "memory.oom_control" } else { "memory.events" };
    let text = fs::read_to_string(group.dir.join(file))?;
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
    count.ok_or_else(|| failed(format_args!("{file} says {text:?}")))
}

/// The directory of control group `path` in the mount of this type that has the controller.
fn below(kind: &str, controller: &str, path: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let (mut mount, mut system) = (mount.split(' ').skip(3), system.split(' '));
        let (root, at) = (mount.next()?, mount.next()?);
        let fits = system.next()? == kind
            && system.nth(1)?.split(',').any(|o| controller.is_empty() || o == controller);
        let rest = path.strip_prefix(root.trim_end_matches('/'))?;
        fits.then(|| Path::new(at).join(rest.trim_start_matches('/')))
    })
}

fn a_control_group_too_small_for_the_store(lab: &Lab) -> Result<()> {
    too_small_for_the_store(lab, &new_dir(lab, "out")?)
}

/// Everything of the outer guest lies in memory but its empty disk.
fn a_control_group_too_small_on_version_two(lab: &Lab) -> Result<()> {
    let shell = |script| {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        runner::finish(shell, Duration::from_secs(60))?.expect_code(0)
    };
    shell("mke2fs -q /dev/vdb && mount /dev/vdb /mnt && mkdir /mnt/out")?;
    too_small_for_the_store(lab, Path::new("/mnt/out"))?;
    shell("umount /mnt").map(drop)
}

fn too_small_for_the_store(lab: &Lab, out: &Path) -> Result<()> {
    let (guest, vm) = filled(lab, 64)?;
    let small = limited(96)?;
    let path = small.dir.to_string_lossy();
    let run = small.within(&acquire(lab, &vm, out, &["--store", "ram"])?);
    Running::start(run)?.end()?.expect(4)?.says(&["RAM store", "control group", &path])?;
    assert_eq!(names(out)?, [""; 0]);
    let run = small.within(&acquire(lab, &vm, out, &["--file-digest", "no"])?);
    let manifest = Running::start(run)?.end()?.expect(0)?.complete(lab)?;
    assert_eq!((&manifest["store"], kills(&small)?), (&json!("disk"), 0));
    guest.finish()
}

/// A refusal within five seconds, of which a monitor that is busy has four.
fn refused_soon(lab: &Lab, vm: &str, out: &Path, words: &[&str]) -> Result<Ended> {
    unless_slow(|| {
        let ended = refused(lab, vm, out, &[], words)?;
        let soon = ended.took < Duration::from_secs(5);
        if soon { Ok(ended) } else { Err(too_slow(format_args!("{:?}", ended.took))) }
    })
}

fn a_busy_monitor_is_an_error_within_five_seconds(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let out = new_dir(lab, "out")?;
    let held = lab::Qmp::connect(guest.qmp_tool(), Duration::from_secs(5))?;
    let socket = guest.qmp_tool().to_string_lossy();
    for vm in [&*socket, &guest.pid().to_string()] {
        refused_soon(lab, vm, &out, &["is busy", &socket, "hint: "]).doing(vm)?;
    }
    drop(held);
    take(lab, &guest, &[])?;
    guest.finish()
}

fn a_busy_monitor_among_several_is_skipped_and_named(lab: &Lab) -> Result<()> {
    let third = lab.scratch().join("third.sock");
    let argument = format!("unix:{},server=on,wait=off", third.display());
    let guest = lab.guest().paused().memory_mib(32).args(&["-qmp", &argument]).boot()?;
    let out = new_dir(lab, "out")?;
    let _held = lab::Qmp::connect(guest.qmp_tool(), Duration::from_secs(5))?;
    let run = acquire(lab, &guest.pid().to_string(), &out, &[])?;
    let ended = Running::start(run)?.end()?.expect(0)?;
    let (warnings, manifest) = (ended.warnings(), ended.complete(lab)?);
    for busy in [guest.qmp_tool(), guest.qmp_lab()] {
        assert!(warnings.contains(&*busy.to_string_lossy()), "{busy:?} not in {warnings:?}");
    }
    assert!(warnings.contains("busy") && manifest["warnings"].to_string().contains("busy"));
    assert_eq!(manifest["vm"]["monitor"], json!(third));
    guest.finish()
}

/// What somebody who is no QEMU does with a connection.
type Act = fn(&mut UnixStream) -> std::io::Result<()>;

/// A server that is no QEMU, in this very process.
#[derive(Debug)]
struct Fake {
    over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Fake {
    /// Serves `path`, whoever had it before.
    fn serve(path: &Path, act: Act) -> Result<Self> {
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).doing(format_args!("binding {path:?}"))?;
        listener.set_nonblocking(true)?;
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let server = spawn(move || {
            let mut clients = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                if let Ok((mut client, _)) = listener.accept() {
                    let _ = client.set_nonblocking(false).and_then(|()| act(&mut client));
                    clients.push(client); // and keeps it open
                }
                sleep(Duration::from_millis(2));
            }
        });
        Ok(Self { over, server: Some(server) })
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.server.take().map(JoinHandle::join);
    }
}

const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \
    \"major\": 10}, \"package\": \"\"}, \"capabilities\": []}}\r\n";

/// Sends `unit` until there were 100 MB of it, or the tool is gone.
fn flood(client: &mut UnixStream, unit: &[u8]) -> std::io::Result<()> {
    let chunk = unit.repeat((1 << 16) / unit.len());
    (0..100_000_000 / chunk.len()).try_for_each(|_| client.write_all(&chunk))
}

/// Ways not to be a monitor, each with a word of the error.
const NONSENSE: [(&str, &str, Act); 9] = [
    ("another protocol", "broke the protocol", |c| c.write_all(b"220 mail ready\r\n")),
    ("nothing", "busy", |_| Ok(())),
    ("hangs up", "closed the connection", |c| c.shutdown(std::net::Shutdown::Both)),
    ("a greeting without end", "broke the protocol", |c| {
        c.write_all(b"{\"QMP\": \"").and_then(|()| flood(c, b"x"))
    }),
    ("brackets without end", "broke the protocol", |c| {
        c.write_all(b"{\"QMP\": ").and_then(|()| flood(c, b"["))
    }),
    ("blanks without end", "", |c| flood(c, b" \n")),
    ("one letter at a time", "", |c| {
        GREETING.iter().try_for_each(|byte| {
            sleep(Duration::from_millis(100));
            c.write_all(&[*byte])
        })
    }),
    ("events without end", "", |c| {
        c.write_all(GREETING).and_then(|()| flood(c, b"{\"event\": \"RESUME\", \"data\": {}}\r\n"))
    }),
    ("answers to other questions", "", |c| {
        c.write_all(GREETING).and_then(|()| flood(c, b"{\"return\": {}, \"id\": \"other\"}\r\n"))
    }),
];

/// The socket that QEMU's command line names is served by somebody else, the other one is gone.
fn a_monitor_that_talks_nonsense_is_refused(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let (vm, out) = (guest.pid().to_string(), new_dir(lab, "out")?);
    fs::remove_file(guest.qmp_lab())?;
    for (what, word, act) in NONSENSE {
        let fake = Fake::serve(guest.qmp_tool(), act)?;
        let ended = refused_soon(lab, &vm, &out, &[word]).doing(what)?;
        assert!((1..100 << 10).contains(&ended.peak_kib), "{what}: {} KiB", ended.peak_kib);
        drop(fake);
    }
    guest.finish()
}

/// Greets as QEMU does and answers everything with the same.
fn pose(client: &mut UnixStream) -> std::io::Result<()> {
    client.write_all(GREETING)?;
    client.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut request = [0; 4096];
    while client.read(&mut request)? > 0 {
        let text = String::from_utf8_lossy(&request);
        let id = text.split_once("\"id\":").and_then(|(_, id)| id.split(['}', ',']).next());
        client.write_all(
            format!("{{\"return\": {{}}, \"id\": {}}}\r\n", id.unwrap_or("1")).as_bytes(),
        )?;
    }
    Ok(())
}

fn a_server_that_poses_as_qemu_is_refused(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let (socket, out) = (guest.qmp_tool().to_string_lossy(), new_dir(lab, "out")?);
    let _fake = Fake::serve(guest.qmp_tool(), pose)?;
    let own = std::process::id().to_string();
    refused(lab, &socket, &out, &[], &["no QEMU process", &own, &socket])?;
    refused(lab, &guest.pid().to_string(), &out, &[], &["is served by process", &own, &socket])?;
    guest.finish()
}

fn a_qemu_that_dies_meanwhile_leaves_a_partial_record(lab: &Lab) -> Result<()> {
    for (backing, pass) in [(Backing::Anonymous, 1), (Backing::Anonymous, 2), (Backing::Memfd, 2)] {
        let guest = lab.guest().backing(backing).boot()?;
        let out = new_dir(lab, &format!("{backing:?}-{pass}"))?;
        let vm = guest.pid().to_string();
        let mut run = Running::start(acquire(lab, &vm, &out, &["--max-rate", "48M"])?)?;
        run.until_in_pass(pass)?;
        kill(&guest)?;
        let ended = run.end()?.expect(1)?;
        let reason =
            ended.partial(lab, "partial").doing(format_args!("{backing:?}, pass {pass}"))?;
        assert!(reason.contains(&format!("process {vm}")), "{backing:?}, {pass}: {reason}");
        assert!(ended.stderr.contains(&reason), "{}", ended.stderr);
    }
    Ok(())
}

fn a_migrating_guest_is_refused(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().boot()?;
    let (vm, out) = (guest.pid().to_string(), new_dir(lab, "out")?);
    let begun = Crawl::begin(&mut guest)?;
    refused(lab, &vm, &out, &[], &["migration", "active", "hint: "])?;
    lab.tool(["plan", "--method", "live", &vm])?.expect_code(4)?;
    begun.end(&mut guest)?;
    take(lab, &guest, &[])?;
    guest.finish()
}

/// A migration to nowhere at 4 KiB/s.
pub(super) struct Crawl {
    /// What was allowed before.
    bandwidth: Value,
}

impl Crawl {
    pub(super) fn begin(guest: &mut Guest) -> Result<Self> {
        let before = guest.qmp("query-migrate-parameters", json!({}))?;
        guest.qmp("migrate-set-parameters", json!({ "max-bandwidth": 4096 }))?;
        guest.qmp("migrate", json!({ "uri": "exec:cat > /dev/null" }))?;
        until_migration_is(guest, "active")?;
        Ok(Self { bandwidth: before["max-bandwidth"].clone() })
    }

    /// It must still be under way; it is cancelled, and all is as before.
    pub(super) fn end(self, guest: &mut Guest) -> Result<()> {
        until_migration_is(guest, "active")?;
        guest.qmp("migrate_cancel", json!({}))?;
        until_migration_is(guest, "cancelled")?;
        guest.qmp("migrate-set-parameters", json!({ "max-bandwidth": self.bandwidth })).map(drop)
    }
}

pub(super) fn until_migration_is(guest: &mut Guest, wanted: &str) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let migration = guest.qmp("query-migrate", json!({}))?;
        if migration["status"] == wanted {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(failed(format_args!("migration is not {wanted} but {migration}")));
        }
        sleep(Duration::from_millis(20));
    }
}

/// A page of the image tells by its content where it belongs: so nothing is taken from the record.
fn a_flipped_byte_is_named_by_its_address(lab: &Lab) -> Result<()> {
    let run = 0xf11b;
    let mut guest = lab.guest().boot()?;
    guest.plant_frames(16, run)?;
    let image = take(lab, &guest, &[])?.dir.join("memory.elf");
    let mut bytes = fs::read(&image)?;
    let planted =
        |page: &[u8]| page.starts_with(&pattern::MAGIC) && page[8..16] == run.to_le_bytes();
    let at = bytes.chunks_exact(pattern::PAGE).position(planted);
    let at = at.ok_or_else(|| failed("no planted page in the image"))? * pattern::PAGE;
    let pfn = bytes[at + 16..at + 24].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
    bytes[at + 1000] ^= 1;
    fs::write(&image, bytes)?;
    let dir = image.parent().unwrap_or(&image);
    let said = lab.tool([Path::new("verify"), dir])?.expect_code(5)?.stdout;
    let block = format!("{:#x}", (pfn * 4096) & !0xf_ffff);
    assert!(said.contains("ALTERED") && said.contains(&block), "{block} is not in: {said}");
    assert!(said.contains("memory.elf"), "{said}");
    guest.finish()
}

fn an_exhibit_behind_a_link_is_not_verified(lab: &Lab) -> Result<()> {
    let guest = lab.guest().paused().memory_mib(32).boot()?;
    let exhibit = take(lab, &guest, &[])?;
    let link = lab.scratch().join("link");
    std::os::unix::fs::symlink(&exhibit.dir, &link)?;
    for path in [link.clone(), link.join("")] {
        let said = lab.tool([Path::new("verify"), &path])?;
        let verdict = matches!(said.status.code(), Some(0 | 3 | 5));
        assert!(!verdict && said.stdout.is_empty(), "{}: {said:?}", path.display());
        assert!(said.stderr.contains("link"), "{}", said.stderr);
    }
    guest.finish()
}
