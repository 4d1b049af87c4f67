//! The guest's balloon: what it gave back to the host, what it gives back unasked, what it tells of itself.
//!
//! QEMU has one balloon at most (`qemu_add_balloon_handler`). Only properties are read; how often the guest
//! is asked for its statistics is left as it is found.

use crate::facts::Facts;
use crate::qmp::{Command, QmpError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// The device, as an object path; `None` when it is none that was plugged in by `-device` or `device_add`.
    pub device: Option<String>,
    /// Bytes of RAM that it leaves the guest, plugged in ones among them.
    pub leaves: u64,
    /// The guest may report free pages, which QEMU then gives back to the host (`free-page-reporting`).
    pub free_page_reporting: bool,
    /// The guest may tell a migration which pages are free (`free-page-hint`).
    pub free_page_hint: bool,
    /// What the guest told last; `None` when nobody asks it.
    pub statistics: Option<Statistics>,
}

/// What a guest told of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// QEMU asks so often, in seconds.
    pub interval_s: u64,
    /// When the guest told it, in seconds since 1970 by the host's clock; `None` when it has not yet.
    pub updated_s: Option<u64>,
    /// The figures by QEMU's names, `stat-free-memory` and others, in bytes or counts.
    pub values: BTreeMap<String, u64>,
}

/// QEMU's value for a figure that the guest has not told (`reset_stats`, hw/virtio/virtio-balloon.c).
const UNTOLD: u64 = u64::MAX;

/// `guest-stats`.
#[derive(Deserialize)]
struct GuestStats {
    stats: BTreeMap<String, u64>,
    #[serde(rename = "last-update")]
    last_update: u64,
}

/// The balloon; `None` when the machine has none.
///
/// # Errors
/// As every query.
pub fn take(facts: &mut Facts<'_>) -> Result<Option<Balloon>, QmpError> {
    let Some(leaves) = leaves(facts)? else { return Ok(None) };
    let device = facts.plugged_in(|kind| kind.starts_with("virtio-balloon"))?;
    let mut balloon = Balloon {
        device: None,
        leaves,
        free_page_reporting: false,
        free_page_hint: false,
        statistics: None,
    };
    if let Some(device) = device {
        balloon.free_page_reporting = has(facts, &device, "free-page-reporting")?;
        balloon.free_page_hint = has(facts, &device, "free-page-hint")?;
        balloon.statistics = statistics(facts, &device)?;
        balloon.device = Some(device);
    }
    Ok(Some(balloon))
}

fn leaves(facts: &mut Facts<'_>) -> Result<Option<u64>, QmpError> {
    #[derive(Deserialize)]
    struct Actual {
        actual: u64,
    }
    match facts.query::<Actual>(Command::QueryBalloon) {
        Ok(balloon) => Ok(Some(balloon.actual)),
        Err(error) => match error.class().as_deref() {
            Some("DeviceNotActive" | "KVMMissingCap") => Ok(None),
            _ => Err(error),
        },
    }
}

/// Whether a property is there and set: a QEMU that has not the property does not do it.
fn has(facts: &mut Facts<'_>, device: &str, property: &str) -> Result<bool, QmpError> {
    Ok(facts.qom_get_if_there::<bool>(device, property)?.unwrap_or(false))
}

fn statistics(facts: &mut Facts<'_>, device: &str) -> Result<Option<Statistics>, QmpError> {
    let interval = facts.qom_get_if_there::<u64>(device, "guest-stats-polling-interval")?;
    let Some(interval_s) = interval.filter(|&interval| interval > 0) else { return Ok(None) };
    let told: GuestStats = facts.qom_get(device, "guest-stats")?;
    Ok(Some(Statistics {
        interval_s,
        updated_s: Some(told.last_update).filter(|&update| update > 0),
        values: told.stats.into_iter().filter(|(_, value)| *value != UNTOLD).collect(),
    }))
}
