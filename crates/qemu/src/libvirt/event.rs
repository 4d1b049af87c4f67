//! What libvirt tells unasked.

use super::Domain;
use super::xdr::{Decoder, XdrError};
use std::time::Instant;

/// An event of a domain's QEMU, as libvirt passes it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorEvent {
    /// Whose.
    pub domain: Domain,
    /// Its name, such as `STOP`.
    pub name: String,
    /// QEMU's clock: seconds since 1970 UTC.
    pub seconds: i64,
    /// QEMU's clock: microseconds in the second.
    pub microseconds: u32,
    /// Its data: JSON.
    pub data: Option<String>,
    /// When it was read from the socket.
    pub received: Instant,
}

impl MonitorEvent {
    /// `qemu_domain_monitor_event_msg`
    pub(super) fn decode(payload: &[u8]) -> Result<Self, XdrError> {
        let mut d = Decoder::new(payload);
        // The number of the registration.
        d.i32()?;
        let event = Self {
            domain: Domain::decode(&mut d)?,
            name: d.string()?,
            seconds: d.i64()?,
            microseconds: d.u32()?,
            data: d.optional(Decoder::string)?,
            received: Instant::now(),
        };
        d.end().map(|()| event)
    }
}

/// What became of a domain (`virDomainEventType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// It is known from now on.
    Defined,
    /// It is known no more.
    Undefined,
    /// It runs.
    Started,
    /// Its CPUs stand.
    Suspended,
    /// They run again.
    Resumed,
    /// Its QEMU ended.
    Stopped,
    /// The guest shut down.
    Shutdown,
    /// The guest sent itself to sleep.
    PmSuspended,
    /// The guest crashed.
    Crashed,
    /// What a newer libvirt knows.
    Other(i32),
}

impl Lifecycle {
    fn new(number: i32) -> Self {
        match number {
            0 => Self::Defined,
            1 => Self::Undefined,
            2 => Self::Started,
            3 => Self::Suspended,
            4 => Self::Resumed,
            5 => Self::Stopped,
            6 => Self::Shutdown,
            7 => Self::PmSuspended,
            8 => Self::Crashed,
            other => Self::Other(other),
        }
    }
}

/// An event of a domain's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LifecycleEvent {
    /// Whose.
    pub domain: Domain,
    /// What happened.
    pub what: Lifecycle,
    /// Why: a number whose meaning hangs on [`LifecycleEvent::what`] (`virDomainEventSuspendedDetailType` ..).
    pub detail: i32,
    /// When it was read from the socket.
    pub received: Instant,
}

impl LifecycleEvent {
    /// `remote_domain_event_callback_lifecycle_msg`
    pub(super) fn decode(payload: &[u8]) -> Result<Self, XdrError> {
        let mut d = Decoder::new(payload);
        d.i32()?;
        let event = Self {
            domain: Domain::decode(&mut d)?,
            what: Lifecycle::new(d.i32()?),
            detail: d.i32()?,
            received: Instant::now(),
        };
        d.end().map(|()| event)
    }
}
