//! Provisioning: from a fresh Debian 12 with Rust and Python to everything that the lab runs.
//!
//! Packages that guests merely *use* (kernel, QEMU 10.0) are downloaded and unpacked into the
//! cache, never installed. Each step is skipped when its stamp says that it was done.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::diskread::SLOW_MODULES;
use crate::error::{Doing, Result, failed};
use crate::kit::{self, Kit, Version};
use crate::{initramfs, outer};

/// Programs that must be on the machine, and the Debian packages that bring them.
const NEEDED: [(&str, &str); 13] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/bin/qemu-system-aarch64", "qemu-system-arm"),
    ("/bin/busybox", "busybox-static"),
    ("/usr/lib/python3/dist-packages/venv-is-here", "python3-venv"),
    // With binutils, which assemble the ring guest.
    ("/usr/bin/cc", "build-essential"),
    // LLVM's fuzzer is built from its C++ sources.
    ("/usr/bin/g++", "g++"),
    ("/usr/bin/dpkg-deb", "dpkg"),
    ("/usr/bin/setpriv", "util-linux"),
    // For the slow disk in the outer guest.
    ("/sbin/dmsetup", "dmsetup"),
    ("/usr/sbin/libvirtd", "libvirt-daemon"),
    (LIBVIRT_DRIVER, "libvirt-daemon-driver-qemu"),
    // With QEMU's user.
    ("/etc/libvirt/libvirtd.conf", "libvirt-daemon-system"),
    ("/usr/bin/virsh", "libvirt-clients"),
];

const LIBVIRT_DRIVER: &str =
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so";

/// The newer QEMU, with all of its modules: libvirt has it load every one, and for one that is missing it
/// goes to those of the other version, and fails an assertion.
const NEWER: [&str; 3] =
    ["qemu-system-x86", "qemu-system-modules-spice", "qemu-system-modules-opengl"];

/// Python packages of the analysis environment.
const PYTHON: [&str; 2] = ["volatility3==2.28.2", "pakunoda==1.0.9"];

const PLANT: &str = include_str!("../guest/plant.rs");
const PATTERN: &str = include_str!("../guest/pattern.rs");
const TEARBENCH: &str = include_str!("../guest/tearbench.rs");
const TEARPAGE: &str = include_str!("../guest/tearpage.rs");
const DISKREAD: &str = include_str!("../guest/diskread.rs");
const DISKPAGE: &str = include_str!("../guest/diskpage.rs");
const RING: &str = include_str!("../guest/ring.S");

/// How long other package managers may keep their locks.
const LOCKS: Duration = Duration::from_secs(300);

/// Does what is missing; quick when nothing is. Prints a line per step on stderr.
pub fn run() -> Result<Kit> {
    let root = kit::cache();
    fs::create_dir_all(&root).doing(format_args!("creating {}", root.display()))?;
    let kit = Kit::at(root);
    // One at a time: two would empty each other's directories.
    let lock = fs::File::create(kit.root().join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).doing("waiting")?;
    let setup = Setup { apt: PrivateApt { root: kit.root().join("apt") }, kit };
    setup.packages()?;
    setup.step("kernel", "", "Debian's cloud kernel", |to| setup.kernel(to))?;
    let newer = NEWER.join(" ");
    setup.step("qemu-10.0", &newer, "QEMU 10.0 from Debian's backports", |to| setup.qemu(to))?;
    setup.step("venv", &PYTHON.join(" "), "Volatility 3, pakunoda", |to| setup.python(to))?;
    let sources = format!("{PLANT}{PATTERN}");
    setup.step("plant", &sources, "the program for guests", |to| setup.plant(to))?;
    let sources = format!("{TEARBENCH}{TEARPAGE}{PATTERN}");
    setup.step("tearbench", &sources, "the tear benchmark's guest", |to| setup.tearbench(to))?;
    let sources = format!("{DISKREAD}{DISKPAGE}{PATTERN}");
    setup.step("diskread", &sources, "the guest that reads a disk", |to| setup.diskread(to))?;
    setup.step("ring", RING, "the ring guest", |to| setup.ring(to))?;
    setup.step("images", &setup.inputs()?, "initramfs images", |to| setup.images(to))?;
    Ok(setup.kit)
}

struct Setup {
    kit: Kit,
    apt: PrivateApt,
}

impl Setup {
    /// Runs `make` on an empty directory `name` of the cache unless the stamp holds `inputs`.
    fn step(
        &self,
        name: &str,
        inputs: &str,
        says: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let (to, stamp) =
            (self.kit.root().join(name), self.kit.root().join(format!("{name}.stamp")));
        if fs::read_to_string(&stamp).is_ok_and(|found| found == inputs) {
            return Ok(());
        }
        let start = Instant::now();
        eprintln!("setup: {says} ...");
        let _ = fs::remove_file(&stamp);
        if to.exists() {
            fs::remove_dir_all(&to).doing(format_args!("emptying {}", to.display()))?;
        }
        fs::create_dir_all(&to)?;
        make(&to).doing(says)?;
        fs::write(&stamp, inputs)?;
        eprintln!("setup: {says}: done in {:.1} s", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Installs what is missing, as root; else says what to install.
    fn packages(&self) -> Result<()> {
        let missing: Vec<&str> = NEEDED.iter().filter(|need| !present(need)).map(|n| n.1).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let install = format!("apt-get install --no-install-recommends {}", missing.join(" "));
        if !kit::is_root() {
            return Err(failed(format_args!("not root; install first: {install}")));
        }
        eprintln!("setup: {install} ...");
        patiently(apt().arg("update"))?;
        let mut get = apt();
        get.args(["install", "-y", "--no-install-recommends"]).args(&missing);
        patiently(get.env("DEBIAN_FRONTEND", "noninteractive"))?;
        match NEEDED.iter().find(|need| !present(need)) {
            None => Ok(()),
            Some((file, package)) => {
                Err(failed(format_args!("{package} is installed but {file} is missing")))
            }
        }
    }

    fn kernel(&self, to: &Path) -> Result<()> {
        self.apt.update()?;
        let meta = "linux-image-cloud-amd64";
        let text = output(self.apt.command("apt-cache").args(["depends", meta]))?;
        let package = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        let package = package.ok_or_else(|| failed(format_args!("{meta} depends on nothing")))?;
        let debs = to.join("debs");
        fs::create_dir(&debs)?;
        ok(self.apt.command("apt-get").args(["download", "-q", package]).current_dir(&debs))?;
        let tree = to.join("tree");
        unpack_all(&debs, &tree)?;
        let version = package.trim_start_matches("linux-image-");
        // Where /lib is a link the package may bring either path.
        let modules = ["lib/modules", "usr/lib/modules"].map(|dir| tree.join(dir).join(version));
        let modules = modules.iter().find(|dir| dir.exists());
        let modules = modules.ok_or_else(|| failed("no modules in the kernel package"))?;
        fs::rename(modules, to.join("modules"))?;
        fs::rename(tree.join("boot").join(format!("vmlinuz-{version}")), to.join("vmlinuz"))?;
        fs::write(to.join("version"), version)?;
        fs::remove_dir_all(tree)?;
        Ok(fs::remove_dir_all(debs)?)
    }

    /// QEMU and every package it needs newer than, or beside, the installed ones.
    fn qemu(&self, to: &Path) -> Result<()> {
        self.apt.update()?;
        let archives = self.apt.root.join("cache/archives");
        let _ = fs::remove_dir_all(&archives);
        fs::create_dir_all(archives.join("partial"))?;
        let suite = format!("{}-backports", codename()?);
        let mut get = self.apt.command("apt-get");
        get.args(["install", "-q", "-y", "--no-install-recommends", "--download-only"]);
        ok(get.args(["-t", &suite]).args(NEWER))?;
        unpack_all(&archives, to)?;
        let version = self.kit.qemu_version(Version::V10_0)?;
        if !version.contains("version 10.0") {
            return Err(failed(format_args!("backports brought {version:?}, not QEMU 10.0")));
        }
        Ok(())
    }

    fn python(&self, to: &Path) -> Result<()> {
        ok(Command::new("python3").args(["-m", "venv"]).arg(to))?;
        ok(Command::new(to.join("bin/pip")).args(["install", "-q"]).args(PYTHON))
    }

    fn plant(&self, to: &Path) -> Result<()> {
        guest_program(to, "plant", &[("plant", PLANT), ("pattern", PATTERN)])
    }

    fn tearbench(&self, to: &Path) -> Result<()> {
        let sources = [("tearbench", TEARBENCH), ("tearpage", TEARPAGE), ("pattern", PATTERN)];
        guest_program(to, "tearbench", &sources)
    }

    fn diskread(&self, to: &Path) -> Result<()> {
        let sources = [("diskread", DISKREAD), ("diskpage", DISKPAGE), ("pattern", PATTERN)];
        guest_program(to, "diskread", &sources)
    }

    /// A boot sector, linked to where the firmware loads it.
    fn ring(&self, to: &Path) -> Result<()> {
        let [source, object] = ["ring.S", "ring.o"].map(|name| to.join(name));
        fs::write(&source, RING)?;
        ok(Command::new("as").args(["--32", "-o"]).args([&object, &source]))?;
        let mut ld = Command::new("ld");
        ld.args(["-m", "elf_i386", "-N", "-e", "start", "-Ttext=0x7c00", "--oformat=binary"]);
        ok(ld.arg("-o").args([&self.kit.ring(), &object]))
    }

    /// What the images are made of: they are made again when any of it changes.
    fn inputs(&self) -> Result<String> {
        let mut inputs = String::new();
        let parts = ["kernel", "qemu-10.0", "plant", "tearbench", "diskread"];
        let stamps = parts.map(|part| format!("{part}.stamp"));
        for part in stamps.iter().map(String::as_str).chain(["kernel/version"]) {
            inputs.push_str(&fs::read_to_string(self.kit.root().join(part))?);
        }
        inputs.push_str(&self.kit.qemu_version(Version::V7_2)?);
        inputs.push_str(initramfs::INIT);
        inputs.push_str(outer::INIT);
        inputs.push_str(&initramfs::DISK_MODULES.concat());
        inputs.push_str(&outer::PROGRAMS.concat());
        inputs.push_str(&SLOW_MODULES.concat());
        Ok(inputs)
    }

    fn images(&self, _: &Path) -> Result<()> {
        initramfs::guest(&self.kit, &self.kit.initramfs())?;
        outer::initramfs(&self.kit, &self.kit.outer_initramfs())
    }
}

/// One static program for guests, from one file and its modules.
fn guest_program(to: &Path, name: &str, sources: &[(&str, &str)]) -> Result<()> {
    for (module, text) in sources {
        fs::write(to.join(format!("{module}.rs")), text)?;
    }
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static"]);
    // A module has more in it than each program, and the lab, takes.
    rustc.args(["-C", "strip=symbols", "-C", "panic=abort", "-A", "dead_code", "-o"]);
    ok(rustc.arg(to.join(name)).arg(to.join(format!("{name}.rs"))))
}

fn present((file, package): &&(&str, &str)) -> bool {
    match *package {
        // The module without which `python3 -m venv` makes an environment that has no pip.
        "python3-venv" => {
            let check = Command::new("python3").args(["-c", "import ensurepip, venv"]).output();
            check.is_ok_and(|out| out.status.success())
        }
        _ => Path::new(file).exists(),
    }
}

/// apt with its own lists and sources: the machine's Debian sources and the backports suite of the
/// same archive. Nothing of the machine's apt is changed; its package database is only read.
struct PrivateApt {
    root: PathBuf,
}

impl PrivateApt {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |part: &str| self.root.join(part).display().to_string();
        command.args(["-o", "Dir::Etc::sourcelist=/dev/null"]);
        command.arg("-o").arg(format!("Dir::Etc::sourceparts={}", at("sources")));
        command.arg("-o").arg(format!("Dir::State::lists={}", at("lists")));
        command.arg("-o").arg(format!("Dir::Cache={}", at("cache")));
        // No lock is needed: nothing is installed. The sandbox user could not write to the cache.
        command.args(["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]);
        command
    }

    fn update(&self) -> Result<()> {
        let fresh = Duration::from_secs(3600);
        let stamp = self.root.join("updated");
        let age =
            fs::metadata(&stamp).and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age < fresh) {
            return Ok(());
        }
        for part in ["sources", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.root.join(part))?;
        }
        let sources = debian_sources(&machine_sources(), &codename()?);
        if sources.is_empty() {
            return Err(failed("no Debian source in /etc/apt: QEMU 10.0 comes from its backports"));
        }
        fs::write(self.root.join("sources/lab.sources"), sources)?;
        ok(self.command("apt-get").args(["update", "-q"]))?;
        Ok(fs::write(stamp, "")?)
    }
}

/// Text of the machine's own apt sources, one-line and deb822.
fn machine_sources() -> Vec<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files.retain(|f| f.extension().is_some_and(|e| e == "list" || e == "sources"));
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect()
}

/// deb822 stanzas for the suites of `codename` that the machine has, and for its backports.
fn debian_sources(texts: &[String], codename: &str) -> String {
    let mut found = String::new();
    for text in texts {
        for stanza in text.split("\n\n").flat_map(stanzas) {
            let suites = field(&stanza, "Suites").unwrap_or_default();
            let own = ["", "-updates", "-security", "-backports"].map(|s| format!("{codename}{s}"));
            let mut suites: Vec<String> = suites.split_whitespace().map(str::to_owned).collect();
            suites.retain(|suite| own.contains(suite));
            let components = field(&stanza, "Components").unwrap_or_default();
            // Others name their suites after Debian's, but not their components.
            if suites.is_empty() || !components.split_whitespace().any(|c| c == "main") {
                continue;
            }
            let backports = format!("{codename}-backports");
            if suites.iter().any(|s| s == codename) && !suites.contains(&backports) {
                suites.push(backports);
            }
            for line in stanza.lines().filter(|line| !line.starts_with('#')) {
                match line.starts_with("Suites:") {
                    true => found.push_str(&format!("Suites: {}\n", suites.join(" "))),
                    false => found.push_str(&format!("{line}\n")),
                }
            }
            found.push('\n');
        }
    }
    found
}

/// A paragraph as deb822 stanzas: itself, or one for each one-line `deb` entry in it.
fn stanzas(paragraph: &str) -> Vec<String> {
    if field(paragraph, "Types").is_some() {
        return vec![paragraph.to_owned()];
    }
    paragraph.lines().filter_map(one_line).collect()
}

/// `deb [signed-by=KEY] URI SUITE COMPONENT...` as a stanza.
fn one_line(line: &str) -> Option<String> {
    let mut rest = line.trim().strip_prefix("deb ")?.trim_start();
    let mut stanza = String::from("Types: deb\n");
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        for (name, value) in options.split_whitespace().filter_map(|option| option.split_once('='))
        {
            if name == "signed-by" {
                stanza.push_str(&format!("Signed-By: {value}\n"));
            } else if name == "trusted" {
                stanza.push_str(&format!("Trusted: {value}\n"));
            }
        }
        rest = after;
    }
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let components = words.collect::<Vec<_>>().join(" ");
    stanza.push_str(&format!("URIs: {uri}\nSuites: {suite}\nComponents: {components}\n"));
    Some(stanza)
}

fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// `VERSION_CODENAME` of this machine; only Debian 12 has the pair of QEMUs that the lab wants.
fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").doing("reading /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    match name {
        Some("bookworm") => Ok(String::from("bookworm")),
        other => Err(failed(format_args!("the lab needs Debian 12 (bookworm), this is {other:?}"))),
    }
}

/// Unpacks every package in a directory.
fn unpack_all(debs: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(debs)?.flatten().map(|entry| entry.path());
    for deb in entries.filter(|path| path.extension().is_some_and(|e| e == "deb")) {
        ok(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(to))?;
    }
    Ok(())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-o", &format!("DPkg::Lock::Timeout={}", LOCKS.as_secs())]);
    command
}

/// Tries again while another package manager holds its locks: `update` does not wait by itself.
fn patiently(command: &mut Command) -> Result<()> {
    let until = Instant::now() + LOCKS;
    loop {
        match ok(command) {
            Err(e) if e.to_string().contains("lock") && Instant::now() < until => {
                eprintln!("setup: waiting for another package manager: {e}");
                std::thread::sleep(Duration::from_secs(5));
            }
            other => return other,
        }
    }
}

/// Runs a command; a failure carries the end of what it printed.
fn ok(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and returns its stdout.
fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().doing(format_args!("starting {name}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("; ");
        return Err(failed(format_args!("{name} ended with {}: {tail}", out.status)));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::debian_sources;

    #[test]
    fn backports_come_from_the_machines_own_archive() {
        let deb822 = "# comment\nTypes: deb\nURIs: http://a/debian\nSuites: bookworm bookworm-updates\n\
                      Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://a/security\n\
                      Suites: bookworm-security\nComponents: main\n";
        let one_line = "deb [arch=amd64 signed-by=/k.gpg] http://b/debian bookworm main contrib\n\
                        deb-src http://b/debian bookworm main\ndeb http://c/other nodistro main\n\
                        deb http://d/docker bookworm stable\n";
        let made = debian_sources(&[deb822.to_owned(), one_line.to_owned()], "bookworm");
        assert_eq!(
            made,
            "Types: deb\nURIs: http://a/debian\nSuites: bookworm bookworm-updates \
             bookworm-backports\nComponents: main\nSigned-By: /k.gpg\n\n\
             Types: deb\nURIs: http://a/security\nSuites: bookworm-security\nComponents: main\n\n\
             Types: deb\nSigned-By: /k.gpg\nURIs: http://b/debian\nSuites: bookworm \
             bookworm-backports\nComponents: main contrib\n\n"
        );
        assert_eq!(debian_sources(&["deb http://c/x nodistro main".to_owned()], "bookworm"), "");
    }
}
