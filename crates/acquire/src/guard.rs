//! Guard: before the first byte of the guest is read, everything that can fail has its place. The
//! exhibit's directory, the journal on disk, the store's memory, the image's disk space.

use crate::event::{Event, Observer, Phase};
use crate::log::Log;
use crate::look::Looked;
use crate::plan::{Method, Plan, StoreKind};
use crate::record;
use crate::seal::SealError;
use crate::stop::Stop;
use crate::{Ending, Failure, Request, told};
use evidence::exhibit;
use evidence::format::{Layout, Note};
use evidence::manifest::FileRecord;
use evidence::{GuestRange, Segments};
use host::exhibit_dir::{ExhibitError, NewExhibit};
use host::{DiskStore, RamStore, Store, StoreError};
use serde_json::json;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Type of the ELF note that names the record: the first of ours.
const NOTE_RECORD: u32 = 1;

/// Everything that a run writes to.
pub struct Guarded {
    /// The record's id.
    pub record_id: String,
    /// Where memory lies in the image.
    pub layout: Layout,
    /// The image file.
    pub file: DiskStore,
    /// The map's text before the first read, already written.
    pub map_before: FileRecord,
    /// Why the run cannot begin, when its store or its disk space was not to be had.
    pub refusal: Option<Ending>,
    draft: NewExhibit,
    image_name: String,
    ram: Option<RamStore>,
    /// What the RAM store took, once it is given back.
    ram_taken: Option<u64>,
}

/// Makes the exhibit's directory and everything in it that must not fail later.
///
/// # Errors
/// [`Failure`] when there is no exhibit; what fails after its directory exists is a
/// [`Guarded::refusal`], and the record says so.
pub fn guard(
    request: &Request,
    looked: &Looked,
    plan: &Plan,
    log: &Log,
    began: &host::clock::Moment,
    tell: &dyn Observer,
    stop: &Stop,
) -> Result<Guarded, Failure> {
    let parent = request.output.clone().unwrap_or_else(|| PathBuf::from("."));
    let output = |cause| Failure::Output { path: parent.clone(), cause };
    let record_id = host::random::uuid();
    let layout = looked.layout(plan.format, &[note(&record_id)]).map_err(|error| {
        Failure::Refused(crate::plan::Refusal {
            reason: error.to_string(),
            rejected: Vec::new(),
            remedies: vec!["--format lime".to_owned()],
        })
    })?;
    let name = looked.exhibit_name(&began.utc, &record_id);
    let draft = NewExhibit::create(&parent, &name).map_err(output)?;
    let image_name = exhibit::image_name(plan.format);
    let (file, map_before) = files(looked, log, &draft, &image_name, &layout).map_err(|cause| {
        Failure::Record { exhibit: draft.partial_path(), cause: Box::new(cause) }
    })?;
    log.add("guard", json!({ "exhibit": name, "record_id": record_id, "plan": plan }));
    let (ram, refusal) = match reserve(request, looked, plan, &file, tell, stop) {
        Ok(ram) => (ram, None),
        Err(StoreError::Cancelled { .. }) => (None, Some(Ending::Interrupted)),
        Err(error) => (None, Some(Ending::Failed(told(&error)))),
    };
    let ram_taken = None;
    Ok(Guarded { record_id, layout, file, map_before, refusal, draft, image_name, ram, ram_taken })
}

/// The image says which record it belongs to, wherever it is copied.
fn note(record_id: &str) -> Note {
    Note { name: "stillframe".to_owned(), kind: NOTE_RECORD, desc: record_id.as_bytes().to_vec() }
}

/// The journal, the first map text, and the empty image.
fn files(
    looked: &Looked,
    log: &Log,
    draft: &NewExhibit,
    image_name: &str,
    layout: &Layout,
) -> Result<(DiskStore, FileRecord), ExhibitError> {
    let journal = draft.file(exhibit::JOURNAL)?;
    log.move_to(journal).map_err(|e| draft.error("write", exhibit::JOURNAL, e))?;
    let text = looked.located.text().into_bytes();
    draft.write(exhibit::MAP_BEFORE, &text)?;
    let image = draft.file(image_name)?;
    let file = DiskStore::new(image, layout.segments.clone())
        .map_err(|e| draft.error("use", image_name, e))?;
    Ok((file, record::file_record(exhibit::MAP_BEFORE, &text)))
}

/// Takes the memory and the disk space that what is resident needs.
fn reserve(
    request: &Request,
    looked: &Looked,
    plan: &Plan,
    file: &DiskStore,
    tell: &dyn Observer,
    stop: &Stop,
) -> Result<Option<RamStore>, StoreError> {
    file.reserve(&looked.resident)?;
    if plan.store == StoreKind::Disk {
        return Ok(None);
    }
    let segments = Segments::packed(&looked.located.map)
        .map_err(|error| StoreError::Layout(error.to_string()))?;
    let limit = RamStore::limit(request.max_ram)?;
    let progress = |done_bytes, total_bytes| {
        tell.event(Event::Progress { phase: Phase::Reserve, pass: None, done_bytes, total_bytes });
    };
    let reserve = match plan.method {
        Method::Snapshot | Method::Dump => RamStore::reserve_for_another,
        _ => RamStore::reserve,
    };
    let store = reserve(segments, &looked.resident, &limit, progress, || stop.asked())?;
    if plan.method == Method::Freeze {
        // A page of the store in swap would be waited for while the guest is held.
        store.lock().map_err(|source| StoreError::Os {
            what: "locking the store in memory (RLIMIT_MEMLOCK, CAP_IPC_LOCK)",
            source,
        })?;
    }
    Ok(Some(store))
}

impl Guarded {
    /// Where captured bytes rest.
    pub fn store(&self) -> &dyn Store {
        match &self.ram {
            Some(ram) => ram,
            None => &self.file,
        }
    }

    /// The RAM store, when there is one.
    pub fn ram(&self) -> Option<&RamStore> {
        self.ram.as_ref()
    }

    /// Faults in what the guest has touched since the store was reserved: shortly before a hold.
    /// Gives back what is resident now.
    ///
    /// # Errors
    /// The host's; the store's limit.
    pub fn top_up(&self, looked: &Looked) -> Result<Vec<GuestRange>, StoreError> {
        let Some(ram) = &self.ram else { return Ok(Vec::new()) };
        let blocks = evidence::block::cut(&looked.located.map)
            .map_err(|error| StoreError::Layout(error.to_string()))?;
        let resident = looked.memory.resident(&blocks)?;
        ram.extend(&resident)?;
        Ok(resident)
    }

    /// The store's file for the process that writes it, and where memory lies in it.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn open_store(&self) -> io::Result<(OwnedFd, &Segments)> {
        match &self.ram {
            Some(ram) => Ok((ram.share_writable()?, ram.segments())),
            None => Ok((self.file.file().try_clone()?.into(), self.file.segments())),
        }
    }

    /// That process has ended, and may have written `written`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn close_store(&mut self, written: &[GuestRange]) -> Result<(), StoreError> {
        match &mut self.ram {
            Some(ram) => ram.close(written),
            None => Ok(()),
        }
    }

    /// Gives the RAM store's memory back: everything in it is in the image.
    pub fn give_back_ram(&mut self) {
        self.ram_taken = self.store_bytes();
        self.ram = None;
    }

    /// Bytes of memory that a RAM store took.
    pub fn store_bytes(&self) -> Option<u64> {
        self.ram.as_ref().map(RamStore::taken).or(self.ram_taken)
    }

    /// The draft's directory.
    pub fn path(&self) -> PathBuf {
        self.draft.partial_path()
    }

    /// A new file of the exhibit.
    ///
    /// # Errors
    /// [`SealError::File`].
    pub fn new_file(&self, name: &'static str) -> Result<File, SealError> {
        self.draft.file(name).map_err(|cause| SealError::File { name, cause })
    }

    /// A new file of the exhibit beside the image.
    ///
    /// # Errors
    /// The host's.
    pub fn aside(&self, name: &str) -> Result<File, ExhibitError> {
        self.draft.file(name)
    }

    /// Takes such a file away that did not come to its end.
    pub fn remove_aside(&self, name: &str) {
        // What cannot be removed makes the exhibit one that verify finds fault with.
        let _ = self.draft.remove(name);
    }

    /// A whole new file of the exhibit.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), ExhibitError> {
        self.draft.write(name, bytes)
    }

    /// Takes an image that was not sealed, and its unfinished records, out of the exhibit.
    pub fn remove_image(&self) {
        // What cannot be removed stays in a directory that is `.partial` and that verify refuses.
        let _ = self.draft.remove(&self.image_name);
        let _ = self.draft.remove(exhibit::BLOCKS);
    }

    /// Digest of a file that is already written.
    ///
    /// # Errors
    /// The host's.
    pub fn digest_of(&self, name: &str) -> Result<evidence::digest::Digest, ExhibitError> {
        self.draft.digest_of(name)
    }

    /// Makes everything durable and read-only; gives the exhibit its final name when it is
    /// `whole`. Gives back its path.
    ///
    /// # Errors
    /// The host's.
    pub fn finish(self, whole: bool) -> Result<PathBuf, ExhibitError> {
        if whole { self.draft.commit() } else { self.draft.keep_partial() }
    }
}
