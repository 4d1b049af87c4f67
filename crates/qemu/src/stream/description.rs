//! The description of the devices at a stream's end, which is JSON, held against the stream.
//!
//! `vmstate_save_state_v` (`migration/vmstate.c`) writes one object for each device:
//!
//! ```text
//! {"name": "timer", "instance_id": 0, "version": 2, "fields": [{"size": 8, ..}, ..],
//!  "subsections": [{"vmsd_name": "timer/icount", "fields": [..], "subsections": [..]}]}
//! ```
//!
//! A field has `size` bytes, `array_len` times when it stands for an array; a structure's size
//! counts all that is in it. A subsection has a header of 6 bytes and its name. Devices of the old
//! style have no version. So the sizes say where in the stream each device ends, which the stream
//! itself does not.

use super::{PAGE, StreamError, VirtioMem, malformed, section, unsupported};
use crate::text::Excerpt;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;

/// Bytes of virtio-mem's early section before its bitmap.
const EARLY: u64 = 36;

/// A device whose state a stream holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The section's name, such as `timer` or `0000:00:02.0/e1000`.
    pub name: String,
    /// Number among the sections of that name.
    pub instance: u32,
    /// Version of its fields; QEMU does not describe that of devices of the old style.
    pub version: Option<u32>,
    /// Bytes of its state, without the section's header and footer.
    pub len: u64,
}

/// Where the description of the devices and the stream disagree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unaccounted {
    /// Offset in the stream.
    pub at: u64,
    /// What the description says should stand there.
    pub wanted: String,
}

impl fmt::Display for Unaccounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, wanted } = self;
        write!(f, "by QEMU's description {wanted} should stand at byte {at:#x}, and does not")
    }
}

/// The description, and where the sections of the devices end.
pub(super) struct Described {
    devices: Vec<Device>,
    /// Offset of EOF in the tail.
    eof: usize,
}

/// Finds and reads the description in `tail`, all that stands behind RAM, from byte `base` on.
pub(super) fn find(tail: &[u8], base: u64) -> Result<Described, StreamError> {
    // From the end: text has no byte below 0x20, and a length below 512 MiB has.
    let ends = |eof: &usize| {
        let (mark, rest) = tail.get(*eof..)?.split_first_chunk()?;
        let (len, json) = rest.split_first_chunk()?;
        let fits = *mark == [section::EOF, section::VMDESCRIPTION]
            && usize::try_from(u32::from_be_bytes(*len)) == Ok(json.len());
        fits.then_some((*eof, json))
    };
    let found = (0..tail.len()).rev().find_map(|eof| ends(&eof));
    let (eof, json) = found.ok_or(StreamError::NoDescription { at: base + tail.len() as u64 })?;
    let at = base + (tail.len() - json.len()) as u64;
    // serde_json goes 128 levels deep at most.
    let Json { page_size, devices } =
        serde_json::from_slice(json).map_err(|source| StreamError::Description { at, source })?;
    if page_size != PAGE as u64 {
        return Err(unsupported(at, &format!("a page size of {page_size}")));
    }
    if let Some(long) = devices.iter().find(|device| device.name.len() > 255) {
        return Err(malformed(at, "a name of at most 255 bytes", &long.name));
    }
    let mut list = Vec::new();
    for JsonDevice { name, instance_id, version, fields, subsections } in devices {
        let len = fields.0.checked_add(subsections.0).ok_or(StreamError::Limit {
            at,
            limit: u64::MAX,
            what: "bytes of a device",
        })?;
        list.push(Device { name, instance: instance_id, version, len });
    }
    Ok(Described { devices: list, eof })
}

impl Described {
    pub(super) fn into_devices(self) -> Vec<Device> {
        self.devices
    }

    /// Goes through the stream from device to device by their described lengths.
    pub(super) fn walk(
        &self,
        tail: &[u8],
        base: u64,
        virtio_mem: &[VirtioMem],
    ) -> Option<Unaccounted> {
        let sections = tail.get(..self.eof).unwrap_or_default();
        let mut rest = sections;
        let mut early = virtio_mem.iter();
        for device in &self.devices {
            let at = base + (sections.len() - rest.len()) as u64;
            let there = match early.next() {
                Some(seen) => {
                    let len = EARLY + 8 * seen.plugged.len() as u64;
                    seen.name == device.name && len == device.len
                }
                None => device.take(&mut rest).is_some(),
            };
            if !there {
                let Device { name, instance, len, .. } = device;
                let name = Excerpt::new(name);
                let wanted = format!("{name:?}, instance {instance}, {len} bytes");
                return Some(Unaccounted { at, wanted });
            }
        }
        let at = base + (sections.len() - rest.len()) as u64;
        let wanted = match early.next() {
            Some(seen) => format!("{:?}", Excerpt::new(&seen.name)),
            None if !rest.is_empty() => String::from("the end of the devices"),
            None => return None,
        };
        Some(Unaccounted { at, wanted })
    }
}

impl Device {
    /// Takes the device's section off the front of `rest`.
    fn take(&self, rest: &mut &[u8]) -> Option<()> {
        let (kind, after) = rest.split_first_chunk()?;
        let (id, after) = after.split_first_chunk::<4>()?;
        let (name_len, after) = after.split_first_chunk::<1>()?;
        let (name, after) = after.split_at_checked(name_len[0].into())?;
        let (instance, after) = after.split_first_chunk()?;
        let (version, after) = after.split_first_chunk()?;
        let (_, after) = after.split_at_checked(usize::try_from(self.len).ok()?)?;
        let (mark, after) = after.split_first_chunk()?;
        let (footer_id, after) = after.split_first_chunk::<4>()?;
        let same = (*kind, name) == ([section::FULL], self.name.as_bytes())
            && u32::from_be_bytes(*instance) == self.instance
            && self.version.is_none_or(|v| u32::from_be_bytes(*version) == v)
            && (*mark, footer_id) == ([section::FOOTER], id);
        *rest = after;
        same.then_some(())
    }
}

#[derive(Deserialize)]
struct Json {
    page_size: u64,
    devices: Vec<JsonDevice>,
}

#[derive(Deserialize)]
struct JsonDevice {
    name: String,
    instance_id: u32,
    version: Option<u32>,
    #[serde(default)]
    fields: Sum<JsonField>,
    #[serde(default)]
    subsections: Sum<JsonSubsection>,
}

#[derive(Deserialize)]
struct JsonField {
    size: u64,
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct JsonSubsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Sum<JsonField>,
    #[serde(default)]
    subsections: Sum<JsonSubsection>,
}

/// Something that takes bytes in the stream.
trait Sized64 {
    /// How many; `None` when they are more than can be counted.
    fn bytes(&self) -> Option<u64>;
}

impl Sized64 for JsonField {
    fn bytes(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Sized64 for JsonSubsection {
    fn bytes(&self) -> Option<u64> {
        let name = u64::try_from(self.vmsd_name.len()).ok()?;
        name.checked_add(6)?.checked_add(self.fields.0)?.checked_add(self.subsections.0)
    }
}

/// The bytes of all members of an array, which are added up and not kept: there may be millions.
struct Sum<T>(u64, PhantomData<T>);

impl<T> Default for Sum<T> {
    fn default() -> Self {
        Self(0, PhantomData)
    }
}

impl<'de, T: Deserialize<'de> + Sized64> Deserialize<'de> for Sum<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Self::default())
    }
}

impl<'de, T: Deserialize<'de> + Sized64> Visitor<'de> for Sum<T> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut members: A) -> Result<Self, A::Error> {
        let mut sum = 0u64;
        while let Some(member) = members.next_element::<T>()? {
            let more = member.bytes().and_then(|bytes| sum.checked_add(bytes));
            sum = more.ok_or_else(|| A::Error::custom("sizes that cannot be added"))?;
        }
        Ok(Self(sum, PhantomData))
    }
}
