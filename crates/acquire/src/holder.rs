//! The holder: a process of its own that stops QEMU's threads by ptrace and lets them go, and can do
//! nothing else. One for each try to hold.
//!
//! It lets go when it is told to, when whoever asked is gone, and at the deadline, whichever comes
//! first: a capture that hangs holds nothing. If it hangs itself, a timer of the kernel kills it.
//!
//! It is not a thread of capture because the kernel lets tracees go late in the end of their tracer:
//! behind the teardown of its memory, when the tracer is the last to use it. Capture may have mapped
//! and locked a store of many GiB; a holder has next to nothing (measured: docs/measurements.md).

use crate::role::{self, Peer, Role};
use crate::undo::Who;
use evidence::manifest;
use host::channel::{self, Channel, ChannelError};
use host::clock::monotonic_ns;
use host::hold::{self, HoldError, Limits};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long a holder may take for what needs no QEMU thread.
const PROMPT: Duration = Duration::from_secs(2);

/// What it is asked, once each, in this order.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// The first message.
    Begin { target: Who },
    /// Stop all threads within so many nanoseconds, and let them go after so many at the latest.
    Hold { stop_within_ns: u64, at_most_ns: u64, grace_ns: u64 },
    /// Let them go.
    Release,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// The rights that it kept.
    Begun(manifest::Process),
    /// All threads are stopped.
    Held { threads: u32 },
    /// They were let go.
    Released(Released),
    /// They were not held, or not let go.
    Refused(Refused),
}

/// A hold that is over. Times are CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The first thread was told to stop.
    pub began_ns: u64,
    /// The last thread was let go.
    pub ended_ns: u64,
    /// All threads stood still until it was told to let them go.
    pub lasted: bool,
}

/// Why the process was not held. Its threads run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    /// The reason.
    pub text: String,
    /// Some thread did not stop in time: it may be tried again.
    pub stragglers: bool,
    /// How long the others stood still meanwhile, in nanoseconds.
    pub stall_ns: Option<u64>,
    /// A thread was not let go by the kernel.
    pub not_freed: bool,
}

impl From<HoldError> for Refused {
    fn from(error: HoldError) -> Self {
        let stall_ns = match &error {
            HoldError::NotStopped { stall: Some(stall), .. } => {
                Some(nanos(stall.released - stall.began))
            }
            _ => None,
        };
        Self {
            text: crate::told(&error),
            stragglers: matches!(error, HoldError::NotStopped { .. }),
            stall_ns,
            not_freed: matches!(error, HoldError::NotFreed { .. }),
        }
    }
}

/// Why there is no hold.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The process could not be held.
    #[error(transparent)]
    Refused(Refused),
    /// The holder could not be started, or was lost: the kernel has let all threads go.
    #[error("the holder was lost")]
    Lost(#[from] ChannelError),
    /// It could not be started.
    #[error("the holder could not be started")]
    Start(#[from] std::io::Error),
    /// It said something out of turn.
    #[error("the holder said {0}")]
    OutOfTurn(String),
}

/// The process.
pub fn run(mut channel: Channel) -> ExitCode {
    match serve(&mut channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(channel: &mut Channel) -> Result<(), ChannelError> {
    let out_of_turn = || ChannelError::Form("asked out of turn".to_owned());
    let Ask::Begin { target } = role::hear(channel, PROMPT)? else { return Err(out_of_turn()) };
    let confined = host::sandbox::holder();
    let in_force = confined.map_err(|error| ChannelError::Form(error.to_string()))?;
    let rights = role::rights(Role::Holder.word(), std::process::id(), &in_force);
    role::say(channel, &Reply::Begun(rights), PROMPT)?;
    // It waits for the moment, however long that is in coming; when capture ends, so do we.
    channel::wait(&[channel.as_fd()], None).map_err(ChannelError::Os)?;
    let Ask::Hold { stop_within_ns, at_most_ns, grace_ns } = role::hear(channel, PROMPT)? else {
        return Err(out_of_turn());
    };
    let at_most = Duration::from_nanos(at_most_ns);
    let limits = Limits {
        stop_within: Duration::from_nanos(stop_within_ns),
        hold_at_most: at_most + Duration::from_nanos(grace_ns),
    };
    let until = Instant::now() + at_most;
    let Some(process) = target.open() else {
        let error = HoldError::Exited { pid: target.pid };
        return role::say(channel, &Reply::Refused(error.into()), PROMPT);
    };
    let began_ns = monotonic_ns();
    let held = hold::during(&process, &limits, |hold| {
        let threads = u32::try_from(hold.threads()).unwrap_or(u32::MAX);
        let told = role::say(channel, &Reply::Held { threads }, left(until));
        let asked = told.and_then(|()| role::hear::<Ask>(channel, left(until)));
        matches!(asked, Ok(Ask::Release)) && hold.lasted()
    });
    let reply = match held {
        // Looked at just before and just after: by one clock, and never too short.
        Ok((lasted, held)) => Reply::Released(Released {
            began_ns,
            ended_ns: monotonic_ns(),
            lasted: lasted && held.lasted,
        }),
        Err(error) => Reply::Refused(error.into()),
    };
    role::say(channel, &reply, PROMPT)
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// A holder, as capture has it: started, confined, and waiting for the moment.
pub struct Holder {
    peer: Peer,
    /// Who it is.
    pub who: Who,
    /// The rights that it kept.
    pub rights: manifest::Process,
}

impl Holder {
    /// Starts a holder for `target`. Nothing is stopped yet.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn start(target: Who) -> Result<Self, HolderError> {
        let mut peer = Peer::start(Role::Holder)?;
        peer.say(&Ask::Begin { target }, PROMPT)?;
        let rights = match peer.hear(PROMPT)? {
            Reply::Begun(rights) => rights,
            other => return Err(HolderError::OutOfTurn(format!("{other:?}"))),
        };
        let process = host::Process::open(peer.pid());
        let who = process.map(|process| Who::of(&process)).map_err(|_| ChannelError::Closed)?;
        Ok(Self { peer, who, rights })
    }

    /// Stops all threads within `stop_within`, for `at_most`: past that it lets them go by itself,
    /// and `grace` later the kernel does. Gives how many there are.
    ///
    /// # Errors
    /// [`HolderError`]; nothing is held then.
    pub fn hold(
        &mut self,
        stop_within: Duration,
        at_most: Duration,
        grace: Duration,
    ) -> Result<u32, HolderError> {
        let ask = Ask::Hold {
            stop_within_ns: nanos(stop_within),
            at_most_ns: nanos(at_most),
            grace_ns: nanos(grace),
        };
        self.peer.say(&ask, PROMPT)?;
        match self.peer.hear(at_most + grace + PROMPT)? {
            Reply::Held { threads } => Ok(threads),
            Reply::Refused(error) => Err(HolderError::Refused(error)),
            other => Err(HolderError::OutOfTurn(format!("{other:?}"))),
        }
    }

    /// Lets them go.
    ///
    /// # Errors
    /// [`HolderError`]: they go on all the same, and nobody can say since when.
    pub fn release(mut self) -> Result<Released, HolderError> {
        // It may have let go by itself and wait for nothing any more.
        let _ = role::say(self.peer.channel(), &Ask::Release, PROMPT);
        match self.peer.hear(PROMPT)? {
            Reply::Released(released) => Ok(released),
            Reply::Refused(error) => Err(HolderError::Refused(error)),
            other => Err(HolderError::OutOfTurn(format!("{other:?}"))),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
