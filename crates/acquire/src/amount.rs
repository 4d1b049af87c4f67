//! How much memory the guest has, and what moved in it meanwhile: balloon and memory devices, for the record.

use crate::monitor::{AskedAgain, Told};
use evidence::manifest::{Amount, BalloonChange, BalloonStatistics, Inflation, Plugged};
use qemu::balloon::Statistics;
use qemu::facts::MemoryDevice;
use qemu::{Balloon, GuestView};

/// What QEMU says of the balloon, or why it does not.
pub type Asked = Result<Option<Balloon>, String>;

/// What is known before the first read.
pub fn before(view: &GuestView, balloon: &Asked) -> Amount {
    Amount {
        base_bytes: view.size.base,
        plugged_bytes_before: view.size.plugged,
        plugged_bytes_after: None,
        devices_before: view.devices.iter().map(plugged).collect(),
        devices_after: None,
        balloon: balloon.as_ref().ok().and_then(Option::as_ref).map(inflation),
    }
}

/// Adds what is known after the last read.
pub fn after(amount: &mut Amount, again: &AskedAgain) {
    amount.plugged_bytes_after = again.view.size.plugged;
    amount.devices_after = Some(again.view.devices.iter().map(plugged).collect());
    let now = again.balloon.as_ref().ok().and_then(Option::as_ref);
    // One that was plugged in meanwhile: before, all of its memory was the guest's.
    if let (None, Some(now)) = (&amount.balloon, now) {
        amount.balloon = Some(Inflation { bytes_before: None, ..inflation(now) });
    }
    if let Some(balloon) = &mut amount.balloon {
        balloon.bytes_after = now.map(|now| now.leaves);
        balloon.statistics_after = now.and_then(|now| now.statistics.as_ref()).map(statistics);
        balloon.changes = again.events.iter().filter_map(change).collect();
    }
}

/// What an image of more than one instant suffers from a balloon that moved.
pub fn caveat(amount: &Amount) -> Option<String> {
    let balloon = amount.balloon.as_ref()?;
    let moved = balloon.bytes_after.is_some() && balloon.bytes_after != balloon.bytes_before;
    let text = "the balloon moved while memory was read: a page that the guest gave back before it was read is \
                a hole, one that it took back is what it holds since";
    (moved || !balloon.changes.is_empty()).then(|| text.to_owned())
}

/// What no record of a guest that gives memory back can show.
pub fn limitation(amount: &Amount) -> Option<String> {
    let balloon = amount.balloon.as_ref()?;
    // QEMU counts what the machine started with and its DIMMs (`get_current_ram_size`), nothing else that is plugged in.
    let dimms = amount.devices_before.iter().filter(|device| device.kind == "dimm");
    let all = dimms.filter_map(|device| device.bytes).fold(amount.base_bytes, u64::saturating_add);
    let given = balloon.bytes_before.is_some_and(|left| left < all);
    let reports = balloon.free_page_reporting;
    (given || reports).then(|| {
        format!(
            "What the guest gave back to the host {} is gone: such pages are holes.",
            match (given, reports) {
                (true, true) => "through its balloon, or as free pages that it may report,",
                (true, false) => "through its balloon",
                (false, _) => "as free pages, which its balloon lets it report,",
            }
        )
    })
}

fn inflation(balloon: &Balloon) -> Inflation {
    Inflation {
        device: balloon.device.clone(),
        bytes_before: Some(balloon.leaves),
        bytes_after: None,
        free_page_reporting: balloon.free_page_reporting,
        free_page_hint: balloon.free_page_hint,
        statistics_before: balloon.statistics.as_ref().map(statistics),
        statistics_after: None,
        changes: Vec::new(),
    }
}

fn statistics(told: &Statistics) -> BalloonStatistics {
    let Statistics { interval_s, updated_s, values } = told;
    // What the guest says is numbers; the names are QEMU's.
    BalloonStatistics { interval_s: *interval_s, updated_s: *updated_s, values: values.clone() }
}

/// `BALLOON_CHANGE`: QEMU tells of one at most in a second (qapi/machine.json).
fn change(event: &Told) -> Option<BalloonChange> {
    let bytes = event.data.get("actual")?.as_u64().filter(|_| event.name == "BALLOON_CHANGE")?;
    Some(BalloonChange { utc_us: event.utc_us, bytes })
}

/// A memory device, as the record has it.
pub(crate) fn plugged(device: &MemoryDevice) -> Plugged {
    Plugged {
        kind: device.device_type.word().to_owned(),
        id: device.id.clone(),
        gpa: device.addr,
        bytes: device.size,
        max_bytes: device.max_size,
        requested_bytes: device.requested_size,
        block_bytes: device.block_size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_given_back_is_what_is_missing_of_ram_and_dimms() {
        let device = |kind: &str, bytes| Plugged {
            kind: kind.into(),
            id: None,
            gpa: None,
            bytes: Some(bytes),
            max_bytes: None,
            requested_bytes: None,
            block_bytes: None,
        };
        let amount = |left| Amount {
            base_bytes: 1000,
            plugged_bytes_before: Some(730),
            plugged_bytes_after: None,
            devices_before: vec![
                device("dimm", 30),
                device("nvdimm", 200),
                device("virtio-mem", 500),
            ],
            devices_after: None,
            balloon: Some(Inflation {
                device: None,
                bytes_before: Some(left),
                bytes_after: None,
                free_page_reporting: false,
                free_page_hint: false,
                statistics_before: None,
                statistics_after: None,
                changes: Vec::new(),
            }),
        };
        assert_eq!(limitation(&amount(1030)), None);
        assert!(limitation(&amount(1029)).is_some_and(|text| text.contains("through its balloon")));
    }

    #[test]
    fn a_change_of_the_balloon_is_read_from_its_event() {
        let told = |name: &str, data| Told { name: name.into(), data, utc_us: Some(7) };
        let moved = told("BALLOON_CHANGE", json!({"actual": 4096}));
        assert_eq!(change(&moved), Some(BalloonChange { utc_us: Some(7), bytes: 4096 }));
        assert_eq!(change(&told("BALLOON_CHANGE", json!({"actual": "x"}))), None);
        assert_eq!(change(&told("RESET", json!({"actual": 4096}))), None);
    }
}
