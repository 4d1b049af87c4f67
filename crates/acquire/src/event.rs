//! What a run tells while it goes on: one object a line with `--json`.

use evidence::manifest::Class;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The phase of a run that a progress event belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The store is being faulted in or reserved; the guest's memory is not read yet.
    Reserve,
    /// Guest memory is being read.
    Capture,
    /// Blocks are being hashed and written to the image.
    Seal,
    /// The digest of the whole image file is being computed.
    FileDigest,
    /// `verify` is reading an exhibit.
    Verify,
}

/// One thing that happened. `event` names it; units are in the field names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The VM was found.
    Found {
        /// Its name, as QEMU was told.
        name: String,
        /// Its UUID, when it has one.
        uuid: Option<String>,
        /// QEMU's process id.
        pid: u32,
        /// The monitor used.
        monitor: String,
    },
    /// What will be done.
    Plan {
        /// The method's word.
        method: String,
        /// The class that it earns.
        class: Class,
        /// Where bytes rest first: `ram` or `disk`.
        store: String,
        /// The image's format.
        format: String,
        /// Bytes of guest memory that the image covers.
        image_bytes: u64,
        /// Of these, bytes that the host has memory for and that will be read.
        resident_bytes: u64,
        /// Bytes that the exhibit may need on disk.
        output_bytes: u64,
    },
    /// Something that the operator should know; the run goes on.
    Warning {
        /// The text.
        text: String,
    },
    /// How far a phase is.
    Progress {
        /// The phase.
        phase: Phase,
        /// Pass number, from 1, when the phase is `capture`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pass: Option<u32>,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// The guest is held by us.
    Held {
        /// Threads stopped.
        threads: u32,
    },
    /// The guest goes on.
    Released {
        /// How long it was held, in nanoseconds.
        held_ns: u64,
    },
    /// A pass over the memory is done.
    Pass {
        /// Its number, from 1.
        pass: u32,
        /// Bytes looked at.
        bytes: u64,
        /// How long it took, in nanoseconds.
        took_ns: u64,
        /// Pages that differ from the pass before; absent for the first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        changed_pages: Option<u64>,
    },
    /// The memory map after the copy is not the one before it.
    MapChanged {
        /// The first difference, both sides named.
        difference: String,
    },
    /// The image is written and its digests are known.
    Sealed {
        /// The memory root, 64 hexadecimal digits.
        memory_root: String,
        /// Bytes of memory that hold data.
        data_bytes: u64,
        /// Length of the image file in bytes.
        file_bytes: u64,
    },
    /// The end. Always the last line.
    Done {
        /// The exit code of the process.
        exit: u8,
        /// Path of the exhibit, complete or partial, when there is one.
        exhibit: Option<String>,
        /// Why it is not complete.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

/// Whoever listens: a progress bar, JSON lines, a test.
pub trait Observer: Sync {
    /// Called from the thread that runs the acquisition and, for progress, from its workers. From
    /// [`Event::Held`] to [`Event::Released`] the guest waits for it to return: nothing may be
    /// written there that can block, and no memory be waited for.
    fn event(&self, event: Event);
}

impl<F: Fn(Event) + Sync> Observer for F {
    fn event(&self, event: Event) {
        self(event);
    }
}

/// The JSON Schema of one line of `--json`.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(Event)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With `UPDATE_SCHEMA=1` writes the published schema, else compares it.
    #[test]
    fn the_published_schema_is_that_of_the_code() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../docs/schema/event-1.schema.json");
        let text = format!("{}\n", serde_json::to_string_pretty(&schema()).unwrap());
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let published = std::fs::read_to_string(&path).unwrap();
        assert!(published == text, "it differs; UPDATE_SCHEMA=1 writes it anew");
    }

    #[test]
    fn an_event_is_one_object_with_its_name() {
        let done = Event::Done { exit: 4, exhibit: None, reason: Some("no".into()) };
        let text = serde_json::to_string(&done).unwrap();
        assert_eq!(text, r#"{"event":"done","exit":4,"exhibit":null,"reason":"no"}"#);
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), done);
    }
}
