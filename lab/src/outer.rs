//! The outer guest: a machine under TCG whose Debian kernel loads `kvm-amd` and runs real KVM
//! guests. What this machine's kernel lacks (soft-dirty, swap, hugepages, KSM, Yama) is there.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cpio::Cpio;
use crate::diskread::SLOW_MODULES;
use crate::error::{Doing, Result, failed};
use crate::guest::fresh_dir;
use crate::initramfs::{self, create};
use crate::kit::{Kit, Version};

pub(crate) const INIT: &str = include_str!("../guest/outer-init.sh");

/// Loaded in this order when the outer guest starts.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "irqbypass",
    "kvm",
    "kvm-amd",
];

/// Programs of this machine that are there too, in `/usr/bin`.
pub(crate) const PROGRAMS: [&str; 2] = ["/usr/bin/setpriv", "/sbin/dmsetup"];

/// Firmware and option ROMs that the lab's machine types load.
const FIRMWARE: [&str; 11] = [
    "bios.bin",
    "bios-256k.bin",
    "bios-microvm.bin",
    "qboot.rom",
    "vgabios-stdvga.bin",
    "kvmvapic.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
];

/// Size of the disk that brings files back, and of the empty one for swap; both sparse.
const DISK: u64 = 8 << 30;

/// How long the outer guest may take to come up: ten times as long as it takes. Seen once: both its
/// CPUs busy for 25 minutes, and not a word. That says nothing of what is tested: it is started again,
/// and that is printed.
const UP: Duration = Duration::from_secs(180);

/// What it says then, before the job.
const IS_UP: &str = ">>>outer up";

/// How often it is started.
const STARTS: u32 = 3;

/// Its kernel says every half a minute that a CPU is stuck, and for how many seconds. Seen with QEMU 7.2:
/// one CPU waits in the kernel for another, which sleeps and is not woken, for ever. No program in there
/// can do that: the other CPU runs a guest with interrupts held back (see `guest/ring.S`).
const STUCK: &str = "soft lockup - CPU#";
const STUCK_FOR: u64 = 50;

/// And of its end. Under a translated CPU, the host of KVM guests was seen to panic with a GS base that was
/// not its own.
const PANIC: &str = "Kernel panic - not syncing";

/// Everything but what a job adds: both QEMUs with their libraries and firmware, the kernel and
/// initramfs of inner guests, in the places where [`Kit`] looks for them.
pub(crate) fn initramfs(kit: &Kit, to: &Path) -> Result<()> {
    let mut cpio = Cpio::new(create(to)?);
    initramfs::base(&mut cpio)?;
    cpio.file("init", 0o755, INIT.replace("MODULES", &MODULES.join(" ")).as_bytes())?;
    initramfs::modules(&mut cpio, kit, &[&MODULES[..], &SLOW_MODULES].concat())?;
    let inside = Kit::at(PathBuf::from("/lab"));
    let mut programs: Vec<PathBuf> = PROGRAMS.iter().map(PathBuf::from).collect();
    for program in &programs {
        let name = program.file_name().unwrap_or_default();
        cpio.copy(&relative(&Path::new("/usr/bin").join(name)), program)?;
    }
    for version in [Version::V7_2, Version::V10_0] {
        cpio.copy(&relative(&inside.qemu_binary(version)), &kit.qemu_binary(version))?;
        programs.push(kit.qemu_binary(version));
    }
    for library in libraries(&programs)? {
        cpio.copy(&relative(&library), &library)?;
    }
    let wanted = |name: &str| FIRMWARE.contains(&name);
    for share in ["share/qemu", "share/seabios"] {
        cpio.tree(&format!("usr/{share}"), &Path::new("/usr").join(share), &wanted)?;
        let newer = kit.root().join("qemu-10.0/usr").join(share);
        cpio.tree(&format!("lab/qemu-10.0/usr/{share}"), &newer, &wanted)?;
    }
    cpio.copy(&relative(&inside.kernel()), &kit.kernel())?;
    cpio.copy(&relative(&inside.initramfs()), &kit.initramfs())?;
    cpio.finish()?;
    Ok(())
}

/// The shared libraries of some programs, as `ldd` finds them.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let out = Command::new("ldd").arg(program).output().doing("running ldd")?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        if text.contains("not found") {
            return Err(failed(format_args!("ldd {}: {text}", program.display())));
        }
        let words = text.split_whitespace().filter(|word| word.starts_with('/'));
        found.extend(words.map(PathBuf::from));
    }
    Ok(found)
}

fn relative(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// A job for the outer guest.
#[derive(Debug, Clone)]
pub struct Outer {
    kit: Kit,
    memory_mib: u64,
    cpus: u32,
    files: Vec<(String, PathBuf)>,
    version: Version,
    echo: bool,
}

/// How a job ended.
#[derive(Debug)]
pub struct Output {
    /// What the script wrote to stdout and stderr.
    pub text: String,
    /// Its exit status; `None` when the outer guest got stuck, panicked or reset itself.
    pub status: Option<i32>,
    /// A directory with what it left in `/out`; removed with this value.
    pub out: PathBuf,
    /// Time from the start of the outer guest to its end.
    pub took: Duration,
    _dir: Dir,
}

impl Outer {
    /// A job with 3 GiB and 2 CPUs.
    pub fn new(kit: &Kit) -> Self {
        Self {
            kit: kit.clone(),
            memory_mib: 3072,
            cpus: 2,
            files: Vec::new(),
            version: Version::V10_0,
            echo: false,
        }
    }

    /// RAM of the outer guest in MiB; half of it holds files at most.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// CPUs of the outer guest.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The QEMU that runs the outer guest.
    pub fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Copies a file of this machine to `/PATH` inside, permissions kept.
    pub fn file(mut self, path: &str, from: &Path) -> Self {
        self.files.push((path.trim_start_matches('/').to_owned(), from.to_owned()));
        self
    }

    /// Passes on what the script prints while it runs.
    pub fn echo(mut self) -> Self {
        self.echo = true;
        self
    }

    /// Boots the outer guest and runs a shell script in it, as root, in `/root`. What the script
    /// leaves in `/out` comes back; `/dev/vdb` is an empty disk for swap or a file system.
    /// An outer guest that says nothing for `silence` is stuck; one that dies is an error that ends with its
    /// output.
    pub fn run(&self, script: &str, silence: Duration) -> Result<Output> {
        let start = Instant::now();
        let dir = Dir(fresh_dir("outer")?);
        let at = |name: &str| dir.0.join(name);
        self.image(script, &at("initrd"))?;
        for disk in ["out.tar", "empty"] {
            File::create(at(disk))?.set_len(DISK)?;
        }
        let mut command = self.kit.qemu(self.version);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        // Without the CPU's fast `rep movsb` the kernel copies by words: a translated CPU takes byte after
        // byte, eight times as often, and what others store into the word meanwhile gets torn.
        let cpu = "max,-erms,-fsrm";
        command.args(["-accel", "tcg", "-cpu", cpu, "-name", "lab-outer"]);
        command.arg("-m").arg(format!("{}M", self.memory_mib));
        command.arg("-smp").arg(self.cpus.to_string());
        command.arg("-kernel").arg(self.kit.kernel()).arg("-initrd").arg(at("initrd"));
        command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        for port in ["console", "output"] {
            command.arg("-serial").arg(format!("file:{}", at(port).display()));
        }
        for disk in ["out.tar", "empty"] {
            let file = at(disk);
            let drive = format!("file={},format=raw,if=virtio,cache=unsafe", file.display());
            command.arg("-drive").arg(drive);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(at("qemu.log"))?);
        let (mut child, output) = (up(&mut command, &at("output"))?, at("output"));
        let ended = self.watch(&mut child, &output, &at("console"), silence);
        let text = job_output(&output);
        let complain = |what: String| {
            let tail = |text: &str| text[text.len().saturating_sub(2000)..].trim().to_owned();
            let (console, log) = (tail(&read(&at("console"))), read(&at("qemu.log")));
            failed(format_args!("outer guest: {what}; it said: {} {console} {log}", tail(&text)))
        };
        let out = at("out");
        let ended = ended.map_err(|e| complain(e.to_string()))?;
        let panicked = read(&at("console")).contains(PANIC);
        let ending = text.rsplit_once("\n>>>outer ");
        // Nothing in there resets the machine: a translated CPU that does has lost its way. One that did not
        // come up is an error: the next would not either.
        let reset = ending.is_none() && read(&output).starts_with(IS_UP);
        if ended == Ended::Stuck || panicked || reset {
            if reset && ended == Ended::ByItself {
                println!(
                    "         the outer guest ended by itself: {}",
                    read(&at("qemu.log")).trim()
                );
            }
            return Ok(Output { text, status: None, out, took: start.elapsed(), _dir: dir });
        }
        let ending = ending.and_then(|(text, n)| Some((text, n.trim().parse().ok()?)));
        let (text, status) = ending.ok_or_else(|| complain("died".to_owned()))?;
        fs::create_dir(&out)?;
        let tar = Command::new("tar").arg("-xf").arg(at("out.tar")).arg("-C").arg(&out).status()?;
        if !tar.success() {
            return Err(failed("cannot unpack what the outer guest left in /out"));
        }
        fs::remove_file(at("out.tar"))?;
        let (text, status) = (text.to_owned(), Some(status));
        Ok(Output { text, status, out, took: start.elapsed(), _dir: dir })
    }

    /// The cached image followed by an archive of the job: the kernel unpacks both.
    fn image(&self, script: &str, to: &Path) -> Result<()> {
        let mut out = create(to)?;
        let mut base = File::open(self.kit.outer_initramfs()).doing("opening the outer image")?;
        io::copy(&mut base, &mut out)?;
        let mut job = Cpio::new(out);
        job.file("job/run", 0o755, script.as_bytes())?;
        for (path, from) in &self.files {
            job.copy(path, from)?;
        }
        job.finish()?;
        Ok(())
    }

    /// Waits for the end and passes on new output meanwhile.
    fn watch(
        &self,
        child: &mut Child,
        output: &Path,
        console: &Path,
        silence: Duration,
    ) -> Result<Ended> {
        let (mut until, mut heard) = (Instant::now() + silence, 0);
        let mut shown = 0;
        let mut show = || {
            let text = job_output(output);
            // Whole lines only, and not the line that ends the job.
            let end = text.rfind('\n').map_or(0, |at| at + 1);
            if let Some(new) = text.get(shown..end).filter(|new| !new.is_empty() && self.echo) {
                let lines = new.lines().filter(|l| !l.is_empty() && !l.starts_with(">>>outer "));
                for line in lines {
                    println!("{line}");
                }
                let _ = io::stdout().flush();
                shown = end;
            }
        };
        while Instant::now() < until {
            if child.try_wait()?.is_some() {
                show();
                return Ok(Ended::ByItself);
            }
            show();
            let said = fs::metadata(output).map_or(0, |file| file.len());
            if said > heard {
                (until, heard) = (Instant::now() + silence, said);
            }
            if stuck_for(&read(console)) >= STUCK_FOR {
                child.kill().and_then(|()| child.wait()).doing("ending the outer guest")?;
                return Ok(Ended::Stuck);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("         not a word from the outer guest for {} s", silence.as_secs());
        child.kill().and_then(|()| child.wait()).doing("ending the outer guest")?;
        Ok(Ended::Stuck)
    }
}

/// How the outer guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    ByItself,
    Stuck,
}

/// For how many seconds a CPU has been stuck, by the kernel's last word on it.
fn stuck_for(console: &str) -> u64 {
    let said = console.rsplit_once(STUCK).map(|(_, said)| said);
    let seconds = said.and_then(|said| said.split_once("stuck for ")?.1.split_once('s'));
    seconds.and_then(|(seconds, _)| seconds.parse().ok()).unwrap_or(0)
}

/// Starts the outer guest and waits until it is up.
fn up(command: &mut Command, output: &Path) -> Result<Child> {
    for start in 1..=STARTS {
        let mut child = command.spawn().doing("starting the outer guest")?;
        let until = Instant::now() + UP;
        while !read(output).starts_with(IS_UP) {
            if child.try_wait()?.is_some() {
                // It died: what it said is told by whoever waits for its end.
                return Ok(child);
            }
            if Instant::now() > until {
                child.kill().and_then(|()| child.wait()).doing("ending the outer guest")?;
                println!("         the outer guest hung at start {start} of {STARTS}");
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if child.try_wait()?.is_none() {
            return Ok(child);
        }
    }
    Err(failed(format_args!("the outer guest did not come up in {STARTS} starts")))
}

/// What the job wrote.
fn job_output(path: &Path) -> String {
    let text = read(path);
    text.strip_prefix(IS_UP).unwrap_or(&text).trim_start_matches(['\r', '\n']).to_owned()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A directory that goes with its owner.
#[derive(Debug)]
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Inside the outer guest: reserves this many hugepages of 2 MiB.
pub fn reserve_hugepages(count: u64) -> Result<()> {
    let file = "/proc/sys/vm/nr_hugepages";
    fs::write(file, count.to_string()).doing(format_args!("writing {file}"))?;
    let got = fs::read_to_string(file)?;
    if got.trim() == count.to_string() {
        return Ok(());
    }
    Err(failed(format_args!("{count} hugepages asked for, got {}", got.trim())))
}

/// File system on the empty disk, and the swap file on it.
const SWAP_MOUNT: &str = "/mnt";

/// Inside the outer guest: swap on a file of this many MiB.
pub fn swap_on(mib: u64) -> Result<()> {
    let script = format!(
        "set -e; mke2fs -q /dev/vdb; mount /dev/vdb {SWAP_MOUNT}; chmod 700 {SWAP_MOUNT}
        dd if=/dev/zero of={SWAP_MOUNT}/swap bs=1M count={mib} 2> /dev/null
        chmod 600 {SWAP_MOUNT}/swap; mkswap {SWAP_MOUNT}/swap > /dev/null; swapon {SWAP_MOUNT}/swap"
    );
    shell(&script)
}

/// Inside the outer guest: takes the swap away again.
pub fn swap_off() -> Result<()> {
    shell(&format!("set -e; swapoff {SWAP_MOUNT}/swap; umount {SWAP_MOUNT}"))
}

fn shell(script: &str) -> Result<()> {
    let out = Command::new("/bin/sh").arg("-c").arg(script).output().doing("starting sh")?;
    if out.status.success() {
        return Ok(());
    }
    Err(failed(format_args!("`{script}`: {}", String::from_utf8_lossy(&out.stderr))))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_stuck_cpu_is_seen() {
        let said =
            "[  228.4] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [khugepaged:36]\r\n";
        assert_eq!(super::stuck_for(said), 26);
        assert_eq!(super::stuck_for(&format!("{said}{}", said.replace("26s", "104s"))), 104);
        assert_eq!(super::stuck_for("all is well"), 0);
        assert_eq!(super::stuck_for("soft lockup - CPU#1 st"), 0);
    }
}
