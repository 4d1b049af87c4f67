//! A terminal of the lab's own, with somebody who types and who may go away.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::error::{Doing, Result};

/// Ctrl-C.
pub const INTERRUPT: u8 = 0x03;
/// Ctrl-Q: output goes on.
pub const GO_ON: u8 = 0x11;
/// Ctrl-S: output stops.
pub const HALT: u8 = 0x13;
/// Ctrl-Z.
pub const SUSPEND: u8 = 0x1a;

/// How a program lives on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It leads the session, as what `ssh -t` or a unit starts.
    Leader,
    /// It is a shell's job in the foreground: only such a one can be stopped by Ctrl-Z.
    Job,
}

/// A pseudo-terminal; dropped, it is closed.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    screen: Arc<Mutex<Vec<u8>>>,
    over: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// A new one. What is written to it is read all the time.
    pub fn open() -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).doing("opening a terminal")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        let master = File::from(master);
        let screen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let over = Arc::new(AtomicBool::new(false));
        let (mut from, to, ends) = (master.try_clone()?, Arc::clone(&screen), Arc::clone(&over));
        let reader = spawn(move || {
            let mut buf = [0; 4096];
            while !ends.load(Ordering::Relaxed) {
                match from.read(&mut buf) {
                    Ok(n) => {
                        let mut screen = to.lock().unwrap_or_else(PoisonError::into_inner);
                        screen.extend_from_slice(&buf[..n]);
                    }
                    // EIO: nobody has the other end open, yet or any more.
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(Self { master, screen, over, reader: Some(reader) })
    }

    /// The command in a new session that this terminal controls, not yet started. Its stdout is
    /// left alone.
    pub fn command(&self, command: &Command, place: Place) -> Result<Command> {
        // Whoever started the lab may ignore what a terminal sends (nohup does), and that is
        // inherited.
        let mut session = Command::new("env");
        session.args(["--default-signal=HUP,INT,QUIT,TSTP,TTIN,TTOU", "setsid", "--ctty"]);
        if place == Place::Job {
            session.args(["sh", "-c", "set -m; \"$@\"; exit $?", "sh"]);
        }
        session.arg(command.get_program()).args(command.get_args());
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let end: OwnedFd = ioctl_tiocgptpeer(&self.master, flags).doing("the terminal's end")?;
        session.stdin(Stdio::from(end.try_clone()?)).stderr(Stdio::from(end));
        Ok(session)
    }

    /// Types a key.
    pub fn press(&self, key: u8) -> Result<()> {
        (&self.master).write_all(&[key]).doing(format_args!("typing {key:#x}"))
    }

    /// All that was ever written.
    pub fn screen(&self) -> String {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&screen).into_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Its copy of the descriptor would keep the terminal open.
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
