//! A real guest under a real QEMU: built, booted, talked to, looked into, and found as it was left.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Doing, Result, failed, timed_out};
use crate::kit::{Kit, Version};
use crate::mtree::{self, Range};
use crate::proc;
use crate::qmp::Qmp;
use crate::ring::Ring;
use crate::serial::Serial;

/// Longest wait for a Linux guest to come up.
const BOOT: Duration = Duration::from_secs(90);
/// Longest wait for a guest command, unless the test says otherwise.
const COMMAND: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// QEMU's machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Machine {
    /// i440fx.
    Pc,
    /// ICH9.
    Q35,
    /// No PCI, no VGA; RAM beyond 3 GiB lies above 4 GiB.
    Microvm,
    /// ARM's, of 64 bits; only blank, and only of QEMU 7.2: its RAM begins at 1 GiB.
    Virt,
}

/// Where guest RAM lives on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory, QEMU's default.
    Anonymous,
    /// A memfd, mapped shared.
    Memfd,
    /// A private mapping of a file that was full of [`file_filler`] before the guest started.
    PrivateFile,
    /// hugetlbfs pages, mapped shared. Needs `/dev/hugepages` mounted and pages reserved.
    HugetlbShared,
    /// hugetlbfs pages, mapped private, as libvirt does. Needs the same.
    HugetlbPrivate,
    /// Two anonymous backends, one NUMA node each. Not for `Microvm`.
    Numa2,
}

/// How the guest's CPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accel {
    /// QEMU's translator: works everywhere.
    Tcg,
    /// `/dev/kvm`, which the outer guest has.
    Kvm,
}

impl Accel {
    /// `Kvm` when `STILLFRAME_LAB_ACCEL=kvm`, as the outer guest sets it; else `Tcg`.
    pub fn from_env() -> Self {
        match std::env::var("STILLFRAME_LAB_ACCEL").as_deref() {
            Ok("kvm") => Self::Kvm,
            _ => Self::Tcg,
        }
    }
}

/// Bytes that fill the file behind [`Backing::PrivateFile`]: page `page` of the file.
pub fn file_filler(page: u64) -> [u8; 4096] {
    let mut bytes = [0xa5; 4096];
    bytes[..8].copy_from_slice(b"SFFILLER");
    bytes[8..16].copy_from_slice(&page.to_le_bytes());
    bytes
}

/// A guest to be booted. Every setting has a default: pc, 256 MiB, 1 CPU, QEMU 10.0, anonymous
/// memory, Linux.
#[derive(Debug, Clone)]
pub struct Builder {
    kit: Kit,
    machine: Machine,
    version: Version,
    accel: Accel,
    backing: Backing,
    memory_mib: u64,
    below_4g_mib: Option<u64>,
    program: &'static str,
    cpus: u32,
    name: String,
    uuid: Option<String>,
    linux: bool,
    ring: Option<Ring>,
    paused: bool,
    args: Vec<String>,
    append: String,
    patience: Duration,
}

impl Builder {
    pub(crate) fn new(kit: Kit) -> Self {
        Self {
            kit,
            machine: Machine::Pc,
            version: Version::V10_0,
            accel: Accel::from_env(),
            backing: Backing::Anonymous,
            memory_mib: 256,
            below_4g_mib: None,
            program: "qemu-system-x86_64",
            cpus: 1,
            name: String::from("lab-guest"),
            uuid: None,
            linux: true,
            ring: None,
            paused: false,
            args: Vec::new(),
            append: String::new(),
            patience: BOOT,
        }
    }

    /// Machine type.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// QEMU version.
    pub fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Accelerator.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Where RAM lives on the host.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// RAM in MiB.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Puts the PCI hole at this many MiB, so that RAM beyond lies above 4 GiB (pc, q35).
    pub fn below_4g_mib(mut self, mib: u64) -> Self {
        self.below_4g_mib = Some(mib);
        self
    }

    /// A machine of 32 bits: another QEMU.
    pub fn i386(mut self) -> Self {
        self.program = "qemu-system-i386";
        self
    }

    /// A machine of ARM's: another QEMU.
    pub fn arm(mut self) -> Self {
        self.program = "qemu-system-aarch64";
        self.version(Version::V7_2).machine(Machine::Virt).blank()
    }

    /// RAM on both sides of the PCI hole, whatever the machine. A microvm has its hole at 3 GiB,
    /// so it gets 3.25 GiB of RAM, of which Linux touches little.
    pub fn both_sides_of_the_hole(self) -> Self {
        match self.machine {
            Machine::Microvm => self.memory_mib(3328),
            Machine::Virt => self,
            Machine::Pc | Machine::Q35 => {
                let half = self.memory_mib / 2;
                self.below_4g_mib(half)
            }
        }
    }

    /// Number of CPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// QEMU's `-name`.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// QEMU's `-uuid`.
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.to_owned());
        self
    }

    /// No kernel: firmware only, up at once, and RAM that nobody touched.
    pub fn blank(mut self) -> Self {
        self.linux = false;
        self
    }

    /// The ring guest instead of Linux, with as much memory as the ring is made for. It is up when
    /// every word of the ring was written once. Not for `Microvm`, which boots from no disk.
    pub fn ring(mut self, ring: Ring) -> Self {
        self.memory_mib = u64::from(ring.memory_mib);
        self.ring = Some(ring);
        self.blank()
    }

    /// `-S`: no CPU has run yet. Only for a blank guest.
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self.blank()
    }

    /// More arguments for QEMU, at the end.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// More words for the guest's kernel.
    pub fn append(mut self, words: &str) -> Self {
        self.append = format!("{} {words}", self.append);
        self
    }

    /// Longest wait for the guest to come up.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts QEMU and waits until the guest listens.
    pub fn boot(self) -> Result<Guest> {
        Guest::boot(self)
    }

    fn command(&self, files: &Files) -> Result<Command> {
        let mut command = self.kit.qemu_called(self.version, self.program);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-name").arg(format!("guest={},debug-threads=on", self.name));
        if let Some(uuid) = &self.uuid {
            command.args(["-uuid", uuid]);
        }
        command.arg("-smp").arg(self.cpus.to_string());
        match self.accel {
            Accel::Tcg => command.args(["-accel", "tcg"]),
            Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        };
        match self.machine {
            Machine::Pc | Machine::Q35 => command.args(["-vga", "std"]),
            Machine::Virt => command.args(["-cpu", "cortex-a57"]),
            Machine::Microvm => &mut command,
        };
        self.memory(&mut command, files)?;
        // The first monitor is the tool's, the second the lab's.
        for socket in [&files.qmp_tool, &files.qmp_lab] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        // QEMU connects to us: so not a byte is lost, and there is nothing to wait for.
        command.arg("-chardev").arg(format!(
            "socket,id=serial,path={},logfile={}",
            files.serial.display(),
            files.console.display()
        ));
        command.args(["-serial", "chardev:serial"]);
        if self.linux {
            command.arg("-kernel").arg(self.kit.kernel());
            command.arg("-initrd").arg(self.kit.initramfs());
            // A quarter of the time to boot: nobody here needs what these are for.
            let light = "cryptomgr.notests lsm= audit=0";
            let mut words = format!("console=ttyS0 quiet panic=-1 {light}{}", self.append);
            if self.machine == Machine::Microvm && self.accel == Accel::Tcg {
                words.push_str(&tsc_hint());
            }
            command.arg("-append").arg(words);
        }
        if let Some(ring) = &self.ring {
            fs::write(&files.disk, ring.disk(&self.kit)?)?;
            let drive = format!("file={},format=raw,if=ide", files.disk.display());
            command.arg("-drive").arg(drive);
        }
        if self.paused {
            command.arg("-S");
        }
        command.args(&self.args);
        Ok(command)
    }

    fn memory(&self, command: &mut Command, files: &Files) -> Result<()> {
        let mut machine = String::from(match self.machine {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm",
            Machine::Virt => "virt",
        });
        if let Some(mib) = self.below_4g_mib {
            machine.push_str(&format!(",max-ram-below-4g={mib}M"));
        }
        command.arg("-m").arg(format!("{}M", self.memory_mib));
        let mut object = |kind: &str, id: &str, mib: u64, rest: &str| {
            command.arg("-object").arg(format!("memory-backend-{kind},id={id},size={mib}M{rest}"));
        };
        let whole = self.memory_mib;
        let hugepages = ",mem-path=/dev/hugepages";
        match self.backing {
            Backing::Anonymous => {}
            Backing::Memfd => object("memfd", "lab-ram", whole, ",share=on"),
            Backing::HugetlbShared => {
                object("file", "lab-ram", whole, &format!("{hugepages},share=on"))
            }
            Backing::HugetlbPrivate => {
                object("file", "lab-ram", whole, &format!("{hugepages},share=off"));
            }
            Backing::PrivateFile => {
                fill(&files.ram, whole)?;
                let path = files.ram.display();
                object("file", "lab-ram", whole, &format!(",mem-path={path},share=off"));
            }
            Backing::Numa2 => {
                object("ram", "lab-ram0", whole / 2, "");
                object("ram", "lab-ram1", whole - whole / 2, "");
                for node in 0..2 {
                    command.arg("-numa").arg(format!("node,nodeid={node},memdev=lab-ram{node}"));
                }
            }
        }
        if !matches!(self.backing, Backing::Anonymous | Backing::Numa2) {
            machine.push_str(",memory-backend=lab-ram");
        }
        command.arg("-machine").arg(machine);
        Ok(())
    }
}

/// A microvm under TCG has only the PIT to measure its TSC against, which fails on a busy host:
/// Linux then waits for ever for a clock. So it is told the host's frequency, which TCG passes on.
fn tsc_hint() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": "));
    let mhz = line.and_then(|(_, mhz)| mhz.split('.').next()).unwrap_or("2000");
    format!(" tsc_early_khz={mhz}000")
}

/// Fills a file of `mib` MiB with [`file_filler`].
fn fill(path: &Path, mib: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for page in 0..mib * MIB / 4096 {
        file.write_all(&file_filler(page)).doing("filling the file behind the guest's RAM")?;
    }
    Ok(file.flush()?)
}

/// Files of one guest, all in a directory of its own.
#[derive(Debug)]
struct Files {
    dir: PathBuf,
    qmp_tool: PathBuf,
    qmp_lab: PathBuf,
    serial: PathBuf,
    console: PathBuf,
    errors: PathBuf,
    ram: PathBuf,
    disk: PathBuf,
}

impl Files {
    fn new() -> Result<Self> {
        let dir = fresh_dir("guest")?;
        Ok(Self {
            qmp_tool: dir.join("qmp.sock"),
            qmp_lab: dir.join("lab.sock"),
            serial: dir.join("serial.sock"),
            console: dir.join("console.log"),
            errors: dir.join("qemu.log"),
            ram: dir.join("ram"),
            disk: dir.join("disk"),
            dir,
        })
    }

    /// Names in the directory that are not the lab's.
    fn debris(&self) -> Result<Vec<String>> {
        let sockets = [&self.qmp_tool, &self.qmp_lab, &self.serial];
        let own = [&self.console, &self.errors, &self.ram, &self.disk];
        let own: Vec<_> =
            own.into_iter().chain(sockets).filter_map(|path| path.file_name()).collect();
        let names = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name());
        let strange = names.filter(|name| !own.contains(&name.as_os_str()));
        Ok(strange.map(|name| name.to_string_lossy().into_owned()).collect())
    }
}

/// A new directory under the temporary one, named after this process.
pub(crate) fn fresh_dir(what: &str) -> Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("stillframe-lab-{}-{what}{number}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    fs::create_dir(&dir).doing(format_args!("creating {}", dir.display()))?;
    Ok(dir)
}

/// What must be the same when the guest is given back.
#[derive(Debug, PartialEq, Eq)]
struct AsFound {
    run_state: String,
    capabilities: Value,
    parameters: Value,
    threads_traced: bool,
}

/// A booted guest. Dropped, it is killed; [`Guest::finish`] also checks that it is as it was.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    qmp: Qmp,
    serial: Option<Serial>,
    as_found: AsFound,
    booted_in: Duration,
}

impl Guest {
    fn boot(builder: Builder) -> Result<Self> {
        let start = Instant::now();
        let files = Files::new()?;
        let listener = UnixListener::bind(&files.serial)?;
        listener.set_nonblocking(true)?;
        let mut command = builder.command(&files)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&files.errors)?);
        let child = command.spawn().doing("starting QEMU")?;
        let mut process = Process { child, files };
        let stream = process.accept(&listener, start + builder.patience)?;
        let mut serial = Serial::new(stream)?;
        let mut qmp = Qmp::connect(&process.files.qmp_lab, builder.patience)?;
        if builder.linux || builder.ring.is_some() {
            serial.wait_ready(builder.patience)?;
        }
        let as_found = AsFound {
            run_state: if builder.paused { "prelaunch" } else { "running" }.to_owned(),
            capabilities: qmp.run("query-migrate-capabilities", json!({}))?,
            parameters: qmp.run("query-migrate-parameters", json!({}))?,
            threads_traced: false,
        };
        let serial = builder.linux.then_some(serial);
        Ok(Self { process, qmp, serial, as_found, booted_in: start.elapsed() })
    }

    /// QEMU's PID.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// The monitor that is the tool's: the first on QEMU's command line, never used by the lab.
    pub fn qmp_tool(&self) -> &Path {
        &self.process.files.qmp_tool
    }

    /// The monitor that the lab holds: always busy.
    pub fn qmp_lab(&self) -> &Path {
        &self.process.files.qmp_lab
    }

    /// The guest's own directory. What a tool leaves there is debris.
    pub fn dir(&self) -> &Path {
        &self.process.files.dir
    }

    /// Time from the start of QEMU until the guest listened.
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// Runs a QMP command on the lab's monitor.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.run(command, arguments)
    }

    /// Runs a command of the human monitor.
    pub fn human(&mut self, line: &str) -> Result<String> {
        self.qmp.human(line)
    }

    /// Events seen so far on the lab's monitor, oldest first; asks QEMU once to get the latest.
    pub fn events(&mut self) -> Result<Vec<String>> {
        self.status()?;
        let name = |event: &Value| event["event"].as_str().unwrap_or_default().to_owned();
        Ok(self.qmp.events.iter().map(name).collect())
    }

    /// QEMU's run state: `running`, `paused`, ...
    pub fn status(&mut self) -> Result<String> {
        let answer = self.qmp.run("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Stops the guest by QMP. From then on "as found" means stopped.
    pub fn stop(&mut self) -> Result<()> {
        self.qmp.run("stop", json!({}))?;
        self.as_found.run_state = self.status()?;
        Ok(())
    }

    /// Lets the guest go on.
    pub fn cont(&mut self) -> Result<()> {
        self.qmp.run("cont", json!({}))?;
        self.as_found.run_state = self.status()?;
        Ok(())
    }

    /// Runs a shell script in the guest; its output. A status other than 0 is a failure.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.sh_within(script, COMMAND)
    }

    /// The same with another deadline.
    pub fn sh_within(&mut self, script: &str, patience: Duration) -> Result<String> {
        match self.sh_status(script, patience)? {
            (output, 0) => Ok(output),
            (output, status) => Err(failed(format_args!(
                "guest command `{script}` ended with {status}: {}",
                output.trim_end()
            ))),
        }
    }

    /// Runs a shell script in the guest; its output and exit status.
    pub fn sh_status(&mut self, script: &str, patience: Duration) -> Result<(String, i32)> {
        let serial = self.serial.as_mut().ok_or_else(|| failed("a blank guest has no shell"))?;
        let answer = serial.run(script, patience);
        answer.map_err(|e| failed(format_args!("{e}; {}", self.symptoms())))
    }

    /// What can be seen from outside of a guest that does not answer.
    fn symptoms(&mut self) -> String {
        let console = self.console();
        let last: Vec<_> = console.lines().rev().take(3).collect();
        let mut looks = Vec::new();
        for command in ["info status", "info registers", "info pic", "info lapic"] {
            let said = self.human(command).unwrap_or_else(|e| e.to_string());
            let lines = said.lines().map(str::trim).filter(|line| !line.starts_with("FPR"));
            looks.push(lines.take(12).collect::<Vec<_>>().join(" | "));
        }
        format!("its console ends with {last:?}; QEMU says {looks:?}")
    }

    /// Starts `/bin/plant ARGS` in the guest and waits until its memory is written. It stays.
    pub fn plant(&mut self, args: &str, patience: Duration) -> Result<String> {
        let log = "/tmp/plant.log";
        let script = format!(
            "rm -f {log}; /bin/plant {args} > {log} 2>&1 & plant=$!; while [ ! -s {log} ]; do \
             kill -0 $plant || break; usleep 20000; done; cat {log}; kill -0 $plant"
        );
        self.sh_within(&script, patience)
    }

    /// Fills `mib` MiB of guest memory with pages that carry their own frame number (see
    /// [`crate::pattern::frame_page`]). Returns how many pages there are.
    pub fn plant_frames(&mut self, mib: u64, run: u64) -> Result<u64> {
        let said = self.plant(&format!("frames {mib} {run:x}"), Duration::from_secs(120))?;
        let count = said.trim().strip_prefix("frames ").and_then(|n| n.parse().ok());
        count.ok_or_else(|| failed(format_args!("plant said {said:?}")))
    }

    /// Fills `mib` MiB of guest memory with incompressible bytes.
    pub fn plant_noise(&mut self, mib: u64, seed: u64) -> Result<()> {
        self.plant(&format!("noise {mib} {seed}"), Duration::from_secs(240)).map(drop)
    }

    /// Every line of QEMU's flat view of guest-physical memory, as the lab reads it.
    pub fn flat_view(&mut self) -> Result<Vec<Range>> {
        mtree::memory_view(&self.qmp.human("info mtree -f")?)
    }

    /// The lines of kind `ram`. Neighbours are not joined.
    pub fn ram(&mut self) -> Result<Vec<Range>> {
        Ok(self.flat_view()?.into_iter().filter(|range| range.kind == "ram").collect())
    }

    /// The oracle: QEMU's own `pmemsave` of a range, read back.
    pub fn pmemsave(&mut self, gpa: u64, len: u64) -> Result<Vec<u8>> {
        let file = self.process.files.dir.join("pmemsave");
        let arguments = json!({ "val": gpa, "size": len, "filename": file });
        self.qmp.run("pmemsave", arguments)?;
        let bytes = fs::read(&file).doing("reading what pmemsave wrote")?;
        fs::remove_file(&file)?;
        Ok(bytes)
    }

    /// The address in QEMU's process of a guest-physical one, as `gpa2hva` names it.
    pub fn hva(&mut self, gpa: u64) -> Result<u64> {
        let said = self.qmp.human(&format!("gpa2hva {gpa:#x}"))?;
        let hva = said.rsplit_once("is 0x").map(|(_, hex)| hex.trim());
        let hva = hva.and_then(|hex| u64::from_str_radix(hex, 16).ok());
        hva.ok_or_else(|| failed(format_args!("gpa2hva {gpa:#x} said {said:?}")))
    }

    /// The second oracle: the range as the lab itself reads it from `/proc/PID/mem`, at the
    /// address that `gpa2hva` names. The range must be one of [`Guest::ram`] or part of one.
    pub fn read_own(&mut self, gpa: u64, len: u64) -> Result<Vec<u8>> {
        let hva = self.hva(gpa)?;
        let memory = File::open(format!("/proc/{}/mem", self.pid()))?;
        let mut bytes = vec![0; usize::try_from(len)?];
        memory
            .read_exact_at(&mut bytes, hva)
            .doing(format_args!("reading guest memory {gpa:#x}"))?;
        Ok(bytes)
    }

    /// QEMU's resident memory in bytes (private, file and shared together).
    pub fn rss(&self) -> Result<u64> {
        Ok(proc::status(self.pid(), "VmRSS")? * 1024)
    }

    /// What the guest printed since it started.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.process.files.console).unwrap_or_default())
            .into_owned()
    }

    /// Fails unless the guest is as it was: run state, capabilities and parameters of migration, no
    /// thread traced.
    /// With Linux inside, and running, it must also answer.
    pub fn assert_as_found(&mut self) -> Result<()> {
        let pid = self.pid();
        if let Some(status) = self.process.child.try_wait()? {
            let log = self.process.log();
            return Err(failed(format_args!("QEMU is gone ({status}): {log}")));
        }
        let now = AsFound {
            run_state: self.status()?,
            capabilities: self.qmp.run("query-migrate-capabilities", json!({}))?,
            parameters: self.qmp.run("query-migrate-parameters", json!({}))?,
            threads_traced: proc::status(pid, "TracerPid")? != 0
                || proc::thread_states(pid)?.iter().any(|state| matches!(state, 't' | 'T')),
        };
        if now != self.as_found {
            let found = &self.as_found;
            return Err(failed(format_args!("guest not as found: was {found:?}, is {now:?}")));
        }
        if self.serial.is_some() && now.run_state == "running" {
            self.sh("true").doing("the guest no longer answers")?;
        }
        Ok(())
    }

    /// Ends the test: the guest must be as found, then it is ended, and nothing may be left of it:
    /// no process that names its directory, no file in it that is not the lab's, no undo journal.
    pub fn finish(mut self) -> Result<()> {
        self.assert_as_found()?;
        let debris = self.process.files.debris()?;
        if !debris.is_empty() {
            return Err(failed(format_args!("debris in the guest's directory: {debris:?}")));
        }
        let pid = self.pid();
        let mut left = fs::read_dir("/run/stillframe").into_iter().flatten().flatten();
        let own = format!("{pid}-");
        if let Some(entry) = left.find(|e| e.file_name().to_string_lossy().starts_with(&own)) {
            return Err(failed(format_args!("left behind: {}", entry.path().display())));
        }
        self.quit()?;
        let strays = proc::with_argument(&self.process.files.dir.to_string_lossy());
        if let Some(stray) = strays.first() {
            let line = proc::command_line(*stray);
            return Err(failed(format_args!("stray process {stray}: {line}")));
        }
        Ok(())
    }

    fn quit(&mut self) -> Result<()> {
        // That it goes is what counts, not how soon: machines stand still for ten seconds.
        let patience = Duration::from_secs(60);
        let until = Instant::now() + patience;
        self.qmp.send_only("quit");
        while Instant::now() < until {
            if self.process.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(timed_out("QMP quit", patience))
    }
}

/// QEMU and its files; dropped, both are gone.
#[derive(Debug)]
struct Process {
    child: Child,
    files: Files,
}

impl Process {
    /// Waits until QEMU connects to the serial port's socket.
    fn accept(&mut self, listener: &UnixListener, until: Instant) -> Result<UnixStream> {
        loop {
            if let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                return Err(failed(format_args!("QEMU did not start: {}", self.log())));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What QEMU itself printed.
    fn log(&self) -> String {
        let log = fs::read_to_string(&self.files.errors).unwrap_or_default();
        log.trim_end().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.files.dir);
    }
}
