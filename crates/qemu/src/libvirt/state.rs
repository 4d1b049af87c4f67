//! What libvirt says of a domain without asking its QEMU: none of it taints.

use super::xdr::{Decoder, XdrError};
use std::time::Duration;

/// What a domain does (`virDomainState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Nobody knows.
    Unknown,
    /// It runs.
    Running,
    /// It waits for something.
    Blocked,
    /// Its CPUs stand.
    Paused,
    /// It is shutting down.
    ShuttingDown,
    /// It is off.
    ShutOff,
    /// It crashed.
    Crashed,
    /// The guest sent itself to sleep.
    PmSuspended,
    /// What a newer libvirt knows.
    Other(i32),
}

impl RunState {
    fn new(number: i32) -> Self {
        match number {
            0 => Self::Unknown,
            1 => Self::Running,
            2 => Self::Blocked,
            3 => Self::Paused,
            4 => Self::ShuttingDown,
            5 => Self::ShutOff,
            6 => Self::Crashed,
            7 => Self::PmSuspended,
            other => Self::Other(other),
        }
    }
}

/// What a domain does, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// What.
    pub state: RunState,
    /// Why: a number whose meaning hangs on [`State::state`] (of a paused one `virDomainPausedReason`: 0
    /// unknown, 1 by a user, 4 for a dump ..).
    pub reason: i32,
}

impl State {
    pub(super) fn decode(d: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Self { state: RunState::new(d.i32()?), reason: d.i32()? })
    }
}

/// How large a domain is, and what it used (`virDomainInfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// What it does.
    pub state: RunState,
    /// The most memory that it may have, in KiB.
    pub max_memory_kib: u64,
    /// The memory that its balloon leaves it, in KiB.
    pub memory_kib: u64,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// How long they ran.
    pub cpu_time: Duration,
}

impl Info {
    pub(super) fn decode(d: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            state: RunState::new(d.i32()?),
            max_memory_kib: d.u64()?,
            memory_kib: d.u64()?,
            cpus: d.u32()?,
            cpu_time: Duration::from_nanos(d.u64()?),
        })
    }
}

/// Whether libvirt is free to speak with a domain's QEMU (`virDomainControlState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ControlState {
    /// It is.
    Ok,
    /// A job is under way, such as a migration or a dump, that may be aborted.
    Job,
    /// A command is under way.
    Occupied,
    /// No more.
    Error,
    /// What a newer libvirt knows.
    Other(u32),
}

/// Whether libvirt is free to speak with a domain's QEMU, and since when not (`virDomainControlInfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlInfo {
    /// Whether.
    pub state: ControlState,
    /// Of [`ControlState::Error`], which (`virDomainControlErrorReason`).
    pub details: u32,
    /// How long it has been so; zero when it is free.
    pub since: Duration,
}

impl ControlInfo {
    pub(super) fn decode(d: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let state = match d.u32()? {
            0 => ControlState::Ok,
            1 => ControlState::Job,
            2 => ControlState::Occupied,
            3 => ControlState::Error,
            other => ControlState::Other(other),
        };
        Ok(Self { state, details: d.u32()?, since: Duration::from_millis(d.u64()?) })
    }
}
