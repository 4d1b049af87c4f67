//! What to do, decided from facts, map and wish: a pure function, so that `stillframe plan` prints
//! exactly what `stillframe acquire` would do, with the reasons.

use evidence::format::Format;
use evidence::manifest::Class;
pub use evidence::manifest::{Method, StoreKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The methods of the design that this version does not have, each with what it would give.
const NOT_YET: [(Method, &str); 5] = [
    (Method::Track, "an image of one instant, the guest held for milliseconds"),
    (Method::Freeze, "an image of one instant, the guest held while its memory is copied"),
    (Method::Snapshot, "QEMU's own snapshot of one instant, by userfaultfd"),
    (Method::Pmemsave, "QEMU's own copy in slices"),
    (Method::Dump, "QEMU's own dump, the guest stopped throughout"),
];

/// What the operator asks of the image's consistency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The image must show one instant.
    #[default]
    PointInTime,
    /// An image smeared over the time of its reading will do.
    Any,
}

/// The operator's wish.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The method asked for by name: consent to its class.
    pub method: Option<Method>,
    /// What consistency is asked for when no method is named.
    pub consistency: Consistency,
    /// The longest stall of the guest that is allowed.
    pub stall_budget: Duration,
    /// The image's format.
    pub format: Format,
    /// The store asked for.
    pub store: Option<StoreKind>,
    /// Read guest memory that the host has swapped out even when it is much.
    pub swap_in: bool,
    /// Write to a filesystem that has little room or holds the VM's disks.
    pub force_output: bool,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            method: None,
            consistency: Consistency::default(),
            stall_budget: Duration::from_millis(100),
            format: Format::Elf,
            store: None,
            swap_in: false,
            force_output: false,
        }
    }
}

/// The filesystem that the exhibit shall lie on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputFacts {
    /// The directory.
    pub path: String,
    /// It keeps files in the host's memory: tmpfs, ramfs.
    pub in_memory: bool,
    /// Bytes free to us.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// A disk image of the VM that lies on the same filesystem.
    pub vm_disk: Option<String>,
}

/// Everything that the decision rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Facts {
    /// QEMU's run state: `running`, `paused` ...
    pub run_state: String,
    /// Why the guest's memory is encrypted or hidden from the host, if it is.
    pub confidential: Option<String>,
    /// A migration under way, in QEMU's word for its status.
    pub migration: Option<String>,
    /// Bytes of guest memory that the image covers.
    pub image_bytes: u64,
    /// Of these, bytes that the host has memory for.
    pub resident_bytes: u64,
    /// Bytes of the blocks that hold them: what store and image set aside.
    pub reserve_bytes: u64,
    /// Of the resident bytes, those that the host has swapped out.
    pub swapped_bytes: u64,
    /// Bytes of memory that the host can give without swapping.
    pub available_bytes: u64,
    /// Bytes that a RAM store may take.
    pub ram_limit_bytes: u64,
    /// What sets that limit.
    pub ram_limit_by: String,
    /// Where the exhibit shall lie; absent when nobody said.
    pub output: Option<OutputFacts>,
    /// Why the image does not fit the format asked for, if it does not.
    pub format_unfit: Option<String>,
}

/// A method that was not taken, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rejected {
    /// The method.
    pub method: Method,
    /// The reason.
    pub reason: String,
}

/// What will be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// The method.
    pub method: Method,
    /// The class that it earns.
    pub class: Class,
    /// Why this method.
    pub why: String,
    /// The others, and why not.
    pub rejected: Vec<Rejected>,
    /// The store.
    pub store: StoreKind,
    /// Why this store.
    pub store_why: String,
    /// The image's format.
    pub format: Format,
    /// The longest hold expected, in nanoseconds.
    pub hold_ns: u64,
    /// Bytes that the exhibit may need on disk.
    pub output_bytes: u64,
    /// What the run changes on the host or in QEMU.
    pub changes: Vec<String>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Why nothing will be done, and what would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Refusal {
    /// The reason.
    pub reason: String,
    /// The methods that were looked at, when it was for want of one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<Rejected>,
    /// Flags that would be accepted instead, or what to do first.
    pub remedies: Vec<String>,
}

impl Refusal {
    fn new(reason: impl Into<String>, remedies: &[&str]) -> Self {
        Self {
            reason: reason.into(),
            rejected: Vec::new(),
            remedies: remedies.iter().map(|&text| text.to_owned()).collect(),
        }
    }
}

/// Bytes of blocks, journal, map texts and manifest for an image of `image_bytes`: 512 bytes for
/// each MiB and 4 MiB for the rest.
fn record_bytes(image_bytes: u64) -> u64 {
    image_bytes / (1 << 20) * 512 + (4 << 20)
}

/// Bytes that the exhibit may need on disk: the blocks that hold anything, the image's head, the record.
fn output_bytes(facts: &Facts) -> u64 {
    facts.reserve_bytes.saturating_add(2 << 20).saturating_add(record_bytes(facts.image_bytes))
}

/// Decides what to do.
///
/// # Errors
/// [`Refusal`] when nothing that was asked for is possible or safe.
pub fn choose(facts: &Facts, wish: &Wish) -> Result<Plan, Refusal> {
    refuse_unreadable(facts)?;
    refuse_swap(facts, wish)?;
    let (method, why, rejected) = method(wish)?;
    if let Some(reason) = &facts.format_unfit {
        return Err(Refusal::new(reason.clone(), &["--format lime", "--format raw"]));
    }
    let output_bytes = output_bytes(facts);
    if let Some(output) = &facts.output
        && !wish.force_output
    {
        refuse_output(output, output_bytes)?;
    }
    let (store, store_why) = store(facts, wish)?;
    if !wish.force_output {
        refuse_memory(facts, store, output_bytes)?;
    }
    Ok(Plan {
        method,
        class: Class::None,
        why,
        rejected,
        store,
        store_why,
        format: wish.format,
        hold_ns: 0,
        output_bytes,
        changes: changes(facts, store),
        warnings: warnings(facts),
    })
}

fn refuse_unreadable(facts: &Facts) -> Result<(), Refusal> {
    if let Some(what) = &facts.confidential {
        return Err(Refusal::new(
            format!("confidential guest ({what}): the host sees only ciphertext or nothing"),
            &["take the memory from inside the guest, or from a guest without that protection"],
        ));
    }
    if facts.run_state == "inmigrate" || facts.run_state == "postmigrate" {
        return Err(Refusal::new(
            format!(
                "the VM is in run state {:?}: its memory is arriving from, or has gone to, another host",
                facts.run_state
            ),
            &["take it where the VM runs"],
        ));
    }
    if let Some(status) = &facts.migration {
        return Err(Refusal::new(
            format!("a migration is under way (status {status:?})"),
            &["wait for it to end, or cancel it"],
        ));
    }
    if facts.image_bytes == 0 {
        return Err(Refusal::new("the memory map holds no memory that can be imaged", &[]));
    }
    Ok(())
}

fn refuse_swap(facts: &Facts, wish: &Wish) -> Result<(), Refusal> {
    if facts.swapped_bytes > facts.available_bytes / 2 && !wish.swap_in {
        return Err(Refusal::new(
            format!(
                "{} bytes of the guest are swapped out; reading brings them back, and the host has only {} bytes available",
                facts.swapped_bytes, facts.available_bytes
            ),
            &["--swap-in"],
        ));
    }
    Ok(())
}

fn method(wish: &Wish) -> Result<(Method, String, Vec<Rejected>), Refusal> {
    let mut rejected: Vec<Rejected> = NOT_YET
        .iter()
        .map(|(method, gives)| Rejected {
            method: *method,
            reason: format!("not in this version ({gives})"),
        })
        .collect();
    match (wish.method, wish.consistency) {
        (Some(method), _) if method != Method::Live => Err(Refusal::new(
            format!("the method {} is not in this version", method.word()),
            &["--method live"],
        )),
        (Some(method), _) => {
            Ok((method, format!("asked for by name: --method {}", method.word()), rejected))
        }
        (None, Consistency::Any) => Ok((
            Method::Live,
            "the only method here, and --consistency any allows a smeared image".to_owned(),
            rejected,
        )),
        (None, Consistency::PointInTime) => {
            rejected.push(Rejected {
                method: Method::Live,
                reason:
                    "its image is smeared over the time of reading, and one instant is asked for"
                        .to_owned(),
            });
            let refusal = Refusal::new(
                "no method gives an image of one instant here",
                &["--consistency any", "--method live"],
            );
            Err(Refusal { rejected, ..refusal })
        }
    }
}

fn refuse_output(output: &OutputFacts, needed: u64) -> Result<(), Refusal> {
    let with_margin = needed.saturating_add(needed / 10);
    if output.free_bytes < with_margin {
        return Err(Refusal::new(
            format!(
                "{} has {} bytes free; the exhibit may need {needed} and a tenth more",
                output.path, output.free_bytes
            ),
            &["-o DIR on a filesystem with more room", "--force-output"],
        ));
    }
    if let Some(disk) = &output.vm_disk
        && output.free_bytes - needed < output.total_bytes / 10
    {
        return Err(Refusal::new(
            format!(
                "{} holds the VM's disk {disk} and would be left with less than a tenth free: a full \
                 filesystem stops the VM",
                output.path
            ),
            &["-o DIR on another filesystem", "--force-output"],
        ));
    }
    Ok(())
}

/// An output that is the host's memory counts as memory, beside a RAM store.
fn refuse_memory(facts: &Facts, store: StoreKind, output: u64) -> Result<(), Refusal> {
    let Some(place) = facts.output.as_ref().filter(|output| output.in_memory) else {
        return Ok(());
    };
    let store = if store == StoreKind::Ram { facts.reserve_bytes } else { 0 };
    let needed = output.saturating_add(store);
    if needed > facts.ram_limit_bytes {
        return Err(Refusal::new(
            format!(
                "{} keeps files in memory: exhibit and store together may take {needed} bytes, and \
                 {} is the limit ({})",
                place.path, facts.ram_limit_bytes, facts.ram_limit_by
            ),
            &["-o DIR on a disk", "--force-output"],
        ));
    }
    Ok(())
}

fn store(facts: &Facts, wish: &Wish) -> Result<(StoreKind, String), Refusal> {
    let fits = facts.reserve_bytes <= facts.ram_limit_bytes;
    let limit = format!("{} bytes, set by {}", facts.ram_limit_bytes, facts.ram_limit_by);
    match wish.store {
        Some(StoreKind::Ram) if !fits => Err(Refusal::new(
            format!("a RAM store needs {} bytes and may take {limit}", facts.reserve_bytes),
            &["--store disk", "--max-ram N where it is --max-ram that limits"],
        )),
        Some(kind) => Ok((kind, format!("asked for: --store {}", kind.word()))),
        None if fits => {
            Ok((StoreKind::Ram, format!("the resident memory fits the limit ({limit})")))
        }
        None => Ok((
            StoreKind::Disk,
            format!("{} bytes do not fit a RAM store ({limit})", facts.reserve_bytes),
        )),
    }
}

fn changes(facts: &Facts, store: StoreKind) -> Vec<String> {
    let mut changes = vec![
        "queries are sent to QEMU's monitor; no command that changes anything".to_owned(),
        "host CPU time and memory bandwidth are used while memory is read".to_owned(),
    ];
    if facts.swapped_bytes > 0 {
        changes.push(format!(
            "{} bytes of the guest come back from swap by being read",
            facts.swapped_bytes
        ));
    }
    if store == StoreKind::Ram {
        changes.push(format!(
            "about {} bytes of host memory are taken until the image is written",
            facts.reserve_bytes
        ));
    }
    changes
}

fn warnings(facts: &Facts) -> Vec<String> {
    let mut warnings = Vec::new();
    if facts.run_state != "running" {
        warnings.push(format!("the VM's run state is {:?}; it is left so", facts.run_state));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            run_state: "running".into(),
            confidential: None,
            migration: None,
            image_bytes: 4 << 30,
            resident_bytes: 3 << 30,
            reserve_bytes: 3 << 30,
            swapped_bytes: 0,
            available_bytes: 16 << 30,
            ram_limit_bytes: 8 << 30,
            ram_limit_by: "half of MemAvailable".into(),
            output: Some(OutputFacts {
                path: "/evidence".into(),
                in_memory: false,
                free_bytes: 100 << 30,
                total_bytes: 200 << 30,
                vm_disk: None,
            }),
            format_unfit: None,
        }
    }

    fn live() -> Wish {
        Wish { method: Some(Method::Live), ..Wish::default() }
    }

    #[track_caller]
    fn refused(facts: &Facts, wish: &Wish, word: &str) -> Refusal {
        let refusal = choose(facts, wish).unwrap_err();
        assert!(refusal.reason.contains(word), "{refusal:?}");
        refusal
    }

    #[test]
    fn one_instant_is_never_quietly_given_up() {
        let refusal = refused(&facts(), &Wish::default(), "one instant");
        assert!(refusal.remedies.contains(&"--method live".to_owned()));
        let any = Wish { consistency: Consistency::Any, ..Wish::default() };
        let plan = choose(&facts(), &any).unwrap();
        assert_eq!((plan.method, plan.class), (Method::Live, Class::None));
        assert_eq!(plan.rejected.len(), NOT_YET.len());
    }

    #[test]
    fn the_store_is_ram_when_it_fits() {
        assert_eq!(choose(&facts(), &live()).unwrap().store, StoreKind::Ram);
        let small = Facts { ram_limit_bytes: (3 << 30) - 1, ..facts() };
        assert_eq!(choose(&small, &live()).unwrap().store, StoreKind::Disk);
        let ram = Wish { store: Some(StoreKind::Ram), ..live() };
        assert!(refused(&small, &ram, "RAM store").remedies.contains(&"--store disk".to_owned()));
    }

    #[test]
    fn a_full_output_is_refused_unless_forced() {
        let mut tight = facts();
        let needed = output_bytes(&tight);
        if let Some(output) = &mut tight.output {
            output.free_bytes = needed + needed / 10 - 1;
        }
        refused(&tight, &live(), "bytes free");
        assert!(choose(&tight, &Wish { force_output: true, ..live() }).is_ok());
    }

    #[test]
    fn the_vms_own_disk_keeps_a_tenth_of_its_filesystem() {
        let mut shared = facts();
        let needed = output_bytes(&shared);
        let output = shared.output.as_mut().unwrap();
        output.vm_disk = Some("/evidence/web-07.qcow2".into());
        output.free_bytes = output.total_bytes / 10 + needed;
        assert!(choose(&shared, &live()).is_ok());
        shared.output.as_mut().unwrap().free_bytes -= 1;
        refused(&shared, &live(), "web-07.qcow2");
        assert!(choose(&shared, &Wish { force_output: true, ..live() }).is_ok());
    }

    #[test]
    fn an_output_in_memory_counts_as_memory() {
        let mut facts = facts();
        facts.output.as_mut().unwrap().in_memory = true;
        assert!(choose(&facts, &live()).is_ok());
        facts.ram_limit_bytes = 5 << 30;
        refused(&facts, &live(), "in memory");
        assert!(choose(&facts, &Wish { store: Some(StoreKind::Disk), ..live() }).is_ok());
        assert!(choose(&facts, &Wish { force_output: true, ..live() }).is_ok());
    }

    #[test]
    fn what_cannot_be_read_truly_is_refused() {
        refused(&Facts { confidential: Some("SEV-SNP".into()), ..facts() }, &live(), "SEV-SNP");
        refused(&Facts { run_state: "inmigrate".into(), ..facts() }, &live(), "inmigrate");
        refused(&Facts { migration: Some("active".into()), ..facts() }, &live(), "migration");
        refused(&Facts { image_bytes: 0, ..facts() }, &live(), "no memory");
        let swapped = Facts { swapped_bytes: (8 << 30) + 1, ..facts() };
        refused(&swapped, &live(), "swapped");
        assert!(choose(&swapped, &Wish { swap_in: true, ..live() }).is_ok());
    }
}
