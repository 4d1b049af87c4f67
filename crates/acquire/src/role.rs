//! The processes of an acquisition and how they are started.
//!
//! *capture* is the process that calls [`crate::acquire`]. It starts others, which are this very
//! executable once more: *guardian* before it asks QEMU anything, a *holder* for each hold by ptrace, a
//! *reader* for a snapshot's stream, *seal* after the last read.
//! A program that uses this library therefore calls [`take_part`] first thing in `main`.
//!
//! A new program and not a fork: nothing that capture has in memory or open is there, and the
//! rights are given up before a second thread exists.

use crate::guardian;
use crate::holder;
use crate::reader;
use crate::seal::process as seal;
use evidence::manifest;
use host::Process;
use host::channel::{Channel, ChannelError};
use host::sandbox::InForce;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take to end by itself before it is killed.
const ENDING: Duration = Duration::from_secs(2);

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Speaks with QEMU, keeps deadlines, undoes; never sees a byte of the guest.
    Guardian,
    /// Stops QEMU's threads by ptrace and lets them go, and can do nothing else.
    Holder,
    /// Takes the guest's memory out of QEMU's stream, and can do nothing else.
    Reader,
    /// Hashes and encodes what the guest wrote, and can do nothing else.
    Seal,
}

impl Role {
    /// The role's word in the record.
    pub fn word(self) -> &'static str {
        match self {
            Role::Guardian => "guardian",
            Role::Holder => "holder",
            Role::Reader => "reader",
            Role::Seal => "seal",
        }
    }

    /// Its only argument: nothing that a person would type.
    fn argument(self) -> &'static str {
        match self {
            Role::Guardian => "@guardian",
            Role::Holder => "@holder",
            Role::Reader => "@reader",
            Role::Seal => "@seal",
        }
    }
}

/// Becomes the process that the arguments name, if they name one: to be called first in `main`,
/// while there is one thread. `None`: this is no process of an acquisition.
pub fn take_part() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let (first, second) = (args.next()?, args.next());
    let mut roles = [Role::Guardian, Role::Holder, Role::Reader, Role::Seal].into_iter();
    let role = roles.find(|role| first == role.argument())?;
    if second.is_some() {
        return None;
    }
    let Ok(channel) = io::stdin().as_fd().try_clone_to_owned().map(Channel::of) else {
        return Some(ExitCode::FAILURE);
    };
    // Not the terminal's: its Ctrl-C, Ctrl-Z and end are for capture to hear.
    let _ = rustix::process::setsid();
    let _ = host::oom::die_first();
    Some(match role {
        Role::Guardian => guardian::run(channel),
        Role::Holder => holder::run(channel),
        Role::Reader => reader::run(channel),
        Role::Seal => seal::run(channel),
    })
}

/// A process of ours that runs beside us.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    channel: Channel,
    /// It answered out of turn or not at all: nothing more is asked.
    lost: bool,
    /// It is not ours to end any more.
    detached: bool,
}

impl Peer {
    /// Starts `role`.
    ///
    /// # Errors
    /// No processes or descriptors left.
    pub fn start(role: Role) -> io::Result<Self> {
        let (channel, theirs) = Channel::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("stillframe").arg(role.argument()).env_clear().current_dir("/");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let child = command.spawn()?;
        Ok(Self { child, channel, lost: false, detached: false })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The way to it.
    pub fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    /// Says something.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn say(&mut self, message: &impl Serialize, within: Duration) -> Result<(), ChannelError> {
        if self.lost {
            return Err(ChannelError::Closed);
        }
        let result = say(&mut self.channel, message, within);
        self.lost |= result.is_err();
        result
    }

    /// Hears the next thing that it says.
    ///
    /// # Errors
    /// [`ChannelError`]; nothing more can be said or heard then.
    pub fn hear<T: DeserializeOwned>(&mut self, within: Duration) -> Result<T, ChannelError> {
        if self.lost {
            return Err(ChannelError::Closed);
        }
        let result = hear(&mut self.channel, within);
        self.lost |= result.is_err();
        result
    }

    /// Leaves it to itself: it hears of our end and acts by its own lights.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        // It may have ended by itself, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.lost = true;
    }

    /// Waits for its end; kills it when that does not come.
    pub fn end(&mut self) {
        let until = Instant::now() + ENDING;
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if !self.detached && matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// Sends `message` as JSON.
///
/// # Errors
/// [`ChannelError`].
pub fn say(
    channel: &mut Channel,
    message: &impl Serialize,
    within: Duration,
) -> Result<(), ChannelError> {
    let bytes = serde_json::to_vec(message).map_err(|e| ChannelError::Form(e.to_string()))?;
    channel.send(&bytes, within)
}

/// Receives JSON.
///
/// # Errors
/// [`ChannelError`].
pub fn hear<T: DeserializeOwned>(
    channel: &mut Channel,
    within: Duration,
) -> Result<T, ChannelError> {
    let bytes = channel.receive(within)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| ChannelError::Form(format!("what is not understood: {error}")))
}

/// What the record says of a process.
pub fn rights(role: &str, pid: u32, in_force: &InForce) -> manifest::Process {
    manifest::Process {
        role: role.to_owned(),
        pid,
        uid: in_force.uid,
        capabilities: format!("{:#x}", in_force.capabilities),
        no_new_privs: in_force.no_new_privs,
        landlock_abi: in_force.landlock_abi,
        seccomp: in_force.seccomp.as_str().to_owned(),
        missing: in_force.missing.clone(),
    }
}

/// What the record says of this process, which gave nothing up; `None` without `/proc`.
pub fn own_rights(role: &str) -> Option<manifest::Process> {
    let me = Process::open(std::process::id()).ok()?;
    let first = host::sandbox::of_threads(&me).ok()?.into_iter().next()?;
    let filters = ["none", "strict", "filter of whoever started it"];
    let seccomp = usize::try_from(first.seccomp).ok().and_then(|mode| filters.get(mode));
    Some(manifest::Process {
        role: role.to_owned(),
        pid: me.pid(),
        uid: first.uid,
        capabilities: format!("{:#x}", first.capabilities),
        no_new_privs: first.no_new_privs,
        landlock_abi: None,
        seccomp: seccomp.copied().unwrap_or("unknown").to_owned(),
        missing: Vec::new(),
    })
}
