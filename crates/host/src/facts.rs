//! Facts of the host that stand in the record: who ran where.

use crate::HostError;
use crate::kernel_text::{read_all, read_text};
use std::fs::File;

/// The host and the user who runs this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Host name, as `uname -n`.
    pub hostname: String,
    /// Kernel release and version, as `uname -r` and `-v`.
    pub kernel: String,
    /// Hardware name, as `uname -m`.
    pub machine: String,
    /// UUID that the kernel made at boot.
    pub boot_id: String,
    /// Real user id.
    pub uid: u32,
    /// Effective user id.
    pub euid: u32,
    /// Id of the user who logged in, kept through sudo; `None` for services.
    pub login_uid: Option<u32>,
    /// Name of the login user, else of the real one, by `/etc/passwd` alone; `None` for users of
    /// directories such as LDAP.
    pub user: Option<String>,
}

/// Collects them.
///
/// # Errors
/// `/proc` is not as expected.
pub fn host_facts() -> Result<HostFacts, HostError> {
    let uname = rustix::system::uname();
    let text = |s: &std::ffi::CStr| s.to_string_lossy().into_owned();
    let uid = rustix::process::getuid().as_raw();
    let login_uid = login_uid();
    Ok(HostFacts {
        hostname: text(uname.nodename()),
        kernel: format!("{} {}", text(uname.release()), text(uname.version())),
        machine: text(uname.machine()),
        boot_id: read_text("/proc/sys/kernel/random/boot_id", 64)?.trim().to_owned(),
        uid,
        euid: rustix::process::geteuid().as_raw(),
        login_uid,
        user: user_name(login_uid.unwrap_or(uid)),
    })
}

/// Our real group id.
pub fn gid() -> u32 {
    rustix::process::getgid().as_raw()
}

/// The terminal that standard input, output or error is; `None` when none of them is one.
pub fn tty() -> Option<String> {
    ["0", "1", "2"].iter().find_map(|number| {
        let path = std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
        let path = path.to_string_lossy().into_owned();
        (path.starts_with("/dev/tty") || path.starts_with("/dev/pts/")).then_some(path)
    })
}

/// The distribution by its own word: `PRETTY_NAME` of `/etc/os-release`.
pub fn distribution() -> Option<String> {
    let text = read_text("/etc/os-release", 64 << 10).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches(['"', '\'']).to_owned()).filter(|name| !name.is_empty())
}

/// The audit login id; absent from kernels without audit, all ones when not set.
fn login_uid() -> Option<u32> {
    let text = read_text("/proc/self/loginuid", 64).ok()?;
    text.trim().parse().ok().filter(|id| *id != u32::MAX)
}

/// The name of user `uid` in `/etc/passwd`. The C library's lookup would load plug-ins, which a
/// static binary must not.
pub fn user_name(uid: u32) -> Option<String> {
    let path = "/etc/passwd";
    let passwd = read_all(&File::open(path).ok()?, path, 16 << 20).ok()?;
    name_in(&String::from_utf8_lossy(&passwd), uid)
}

fn name_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid) && !name.is_empty()).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# note\nbad\n:x:7:7::/:\nann:x:1000:7::/:\n";
        assert_eq!(name_in(passwd, 0).as_deref(), Some("root"));
        assert_eq!(name_in(passwd, 1000).as_deref(), Some("ann"));
        assert_eq!(name_in(passwd, 7), None);
    }

    #[test]
    fn this_host_has_them() {
        let facts = host_facts().unwrap();
        assert_eq!(facts.boot_id.len(), 36);
        assert!(facts.kernel.starts_with(|c: char| c.is_ascii_digit()));
        assert!(!facts.hostname.is_empty() && !facts.machine.is_empty());
    }
}
