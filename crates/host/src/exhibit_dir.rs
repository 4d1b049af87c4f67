//! The exhibit's directory: made so that nothing is overwritten and no link followed, visible
//! under its name only when complete; and read so that a hostile one does no harm.

use evidence::digest::{Digest, Hasher};
use evidence::exhibit::{Entry, EntryKind, ExhibitDir, ExhibitFile, MAX_ENTRIES, is_file_name};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, SeekFrom as RawSeek, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What an exhibit is called until it is complete: its name and this.
pub const PARTIAL: &str = ".partial";

/// Why an exhibit's directory could not be made, completed or opened.
#[derive(Debug, thiserror::Error)]
pub enum ExhibitError {
    /// The name is not one component of a path, or too long.
    #[error("{0:?} cannot be the name of an exhibit or of a file in one")]
    Name(String),
    /// A symbolic link, file, FIFO or device stands where a directory is wanted.
    #[error("{path} is {what}, not a directory; links are not followed here")]
    NotADirectory {
        /// Its path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Something has the name already.
    #[error("{path} exists already; nothing is overwritten")]
    Exists {
        /// Its path.
        path: PathBuf,
    },
    /// Someone exchanged the directory while it was being written.
    #[error("{path} is not the directory any more that was made under this name")]
    Exchanged {
        /// Its path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {what} {path}")]
    Os {
        /// What was to be done.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A function that makes the error of doing `what` to `path` from its cause.
fn os<E: Into<io::Error>>(what: &'static str, path: PathBuf) -> impl FnOnce(E) -> ExhibitError {
    move |source| match source.into() {
        source if source.kind() == io::ErrorKind::AlreadyExists => ExhibitError::Exists { path },
        source => ExhibitError::Os { what, path, source },
    }
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens the directory at `path`, which must be one itself.
fn open_directory(path: &Path) -> Result<OwnedFd, ExhibitError> {
    // A slash at the end would make the kernel follow the link before it.
    let plain: PathBuf = path.components().collect();
    rustix::fs::open(&plain, DIRECTORY, Mode::empty()).map_err(|e| match e {
        Errno::NOTDIR | Errno::LOOP => {
            let what = rustix::fs::lstat(&plain).map_or("something else", |s| word(&s));
            ExhibitError::NotADirectory { path: plain, what }
        }
        e => os("open", plain)(e),
    })
}

/// Whether an exhibit can be made in `parent`: a directory, and not by way of a link.
///
/// # Errors
/// As [`NewExhibit::create`].
pub fn check_parent(parent: &Path) -> Result<(), ExhibitError> {
    open_directory(parent).map(drop)
}

/// What a file is, in words.
fn word(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => "a symbolic link",
        FileType::RegularFile => "a file",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "something else",
    }
}

/// An exhibit that is being made, in `NAME.partial`.
///
/// Dropped without [`NewExhibit::commit`] it stays as it is, under that name.
#[derive(Debug)]
pub struct NewExhibit {
    parent: OwnedFd,
    parent_path: PathBuf,
    dir: OwnedFd,
    name: String,
}

impl NewExhibit {
    /// Makes `NAME.partial` (mode 0700) in the directory `parent`, which must not be a symbolic
    /// link itself.
    ///
    /// # Errors
    /// [`ExhibitError::Exists`] when `NAME` or `NAME.partial` does.
    pub fn create(parent: &Path, name: &str) -> Result<Self, ExhibitError> {
        let harmless = !name.is_empty()
            && name.len() + PARTIAL.len() <= 255
            && !name.starts_with(['.', '-'])
            && !name.chars().any(|c| c == '/' || c.is_control());
        if !harmless {
            return Err(ExhibitError::Name(name.into()));
        }
        let parent_path: PathBuf = parent.components().collect();
        let parent = open_directory(&parent_path)?;
        let name = name.to_owned();
        let path = parent_path.join(&name);
        match rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(ExhibitError::Exists { path }),
            Err(e) => return Err(os("look at", path)(e)),
        }
        let partial = format!("{name}{PARTIAL}");
        let path = parent_path.join(&partial);
        rustix::fs::mkdirat(&parent, &partial, Mode::RWXU).map_err(os("make", path.clone()))?;
        let dir = rustix::fs::openat(&parent, &partial, DIRECTORY, Mode::empty())
            .map_err(os("open", path.clone()))?;
        let new = Self { parent, parent_path, dir, name };
        // In a directory that others may write, another one may stand there by now.
        let stat = rustix::fs::fstat(&new.dir).map_err(os("look at", path.clone()))?;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if !ours || !entries(&new.dir).map_err(os("list", path.clone()))?.is_empty() {
            return Err(ExhibitError::Exchanged { path });
        }
        // The umask may have taken rights from the owner too.
        rustix::fs::fchmod(&new.dir, Mode::RWXU).map_err(os("set the rights of", path))?;
        Ok(new)
    }

    /// Where it is until it is complete.
    pub fn partial_path(&self) -> PathBuf {
        self.parent_path.join(self.partial())
    }

    /// Where it will be.
    pub fn path(&self) -> PathBuf {
        self.parent_path.join(&self.name)
    }

    fn partial(&self) -> String {
        format!("{}{PARTIAL}", self.name)
    }

    /// The directory, for `fstat` and `statvfs`.
    pub fn dir(&self) -> impl AsFd + '_ {
        self.dir.as_fd()
    }

    /// Makes the file `name`, open for reading and writing, mode 0600.
    ///
    /// # Errors
    /// [`ExhibitError::Exists`] when there is one, or anything else of that name.
    pub fn file(&self, name: &str) -> Result<File, ExhibitError> {
        if !is_file_name(name) {
            return Err(ExhibitError::Name(name.into()));
        }
        let path = self.partial_path().join(name);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = rustix::fs::openat(&self.dir, name, flags, mode).map_err(os("make", path))?;
        Ok(File::from(fd))
    }

    /// Takes a file away again, such as a disk store that is not the image.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, name: &str) -> Result<(), ExhibitError> {
        if !is_file_name(name) {
            return Err(ExhibitError::Name(name.into()));
        }
        let path = self.partial_path().join(name);
        rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()).map_err(os("remove", path))
    }

    /// Makes the file `name` with `bytes` in it.
    ///
    /// # Errors
    /// As [`NewExhibit::file`]; the file system's.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), ExhibitError> {
        let mut file = self.file(name)?;
        io::Write::write_all(&mut file, bytes).map_err(|e| self.error("write", name, e))
    }

    /// SHA-256 of a file as it stands now.
    ///
    /// # Errors
    /// The file system's.
    pub fn digest_of(&self, name: &str) -> Result<Digest, ExhibitError> {
        let mut hasher = Hasher::default();
        open_file(&self.dir, name)
            .and_then(|mut file| io::copy(&mut file, &mut hasher))
            .map_err(|e| self.error("read", name, e))?;
        Ok(hasher.finish())
    }

    /// The error of doing `what` to the file `name`.
    pub fn error(&self, what: &'static str, name: &str, source: io::Error) -> ExhibitError {
        ExhibitError::Os { what, path: self.partial_path().join(name), source }
    }

    /// Leaves it partial for ever: every file to the disk and read-only, the name as it is. Gives
    /// the path.
    ///
    /// # Errors
    /// The file system's.
    pub fn keep_partial(self) -> Result<PathBuf, ExhibitError> {
        self.settle(Some(Mode::RUSR))?;
        Ok(self.partial_path())
    }

    /// Completes it: every file to the disk and read-only, then the directory renamed to its
    /// name, without replacing anything. Gives the path.
    ///
    /// # Errors
    /// It stays `.partial` then. [`ExhibitError::Exists`] when something took the name.
    pub fn commit(self) -> Result<PathBuf, ExhibitError> {
        self.settle(Some(Mode::RUSR))?;
        let (from, to) = (self.partial_path(), self.path());
        if self.id_of(&self.partial()) != Some(id(&self.stat_dir()?)) {
            return Err(ExhibitError::Exchanged { path: from });
        }
        self.rename()?;
        rustix::fs::fsync(&self.parent).map_err(os("write", self.parent_path.clone()))?;
        if self.id_of(&self.name) != Some(id(&self.stat_dir()?)) {
            return Err(ExhibitError::Exchanged { path: to });
        }
        Ok(to)
    }

    /// Brings a partial exhibit to the disk as it is, without completing it.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync(&self) -> Result<(), ExhibitError> {
        self.settle(None)
    }

    /// Writes out all files, with `mode` if given, and the directory.
    fn settle(&self, mode: Option<Mode>) -> Result<(), ExhibitError> {
        let path = self.partial_path();
        for entry in entries(&self.dir).map_err(os("list", path.clone()))? {
            let path = path.join(&entry.name);
            let file = open_file(&self.dir, &entry.name).map_err(os("open", path.clone()))?;
            file.sync_all().map_err(os("write", path.clone()))?;
            if let Some(mode) = mode {
                rustix::fs::fchmod(&file, mode).map_err(os("set the rights of", path.clone()))?;
                // The rights are part of what must survive a crash.
                file.sync_all().map_err(os("write", path))?;
            }
        }
        rustix::fs::fsync(&self.dir).map_err(os("write", path))
    }

    fn rename(&self) -> Result<(), ExhibitError> {
        let partial = self.partial();
        let rename = |flags| {
            rustix::fs::renameat_with(&self.parent, &partial, &self.parent, &self.name, flags)
        };
        let done = match rename(RenameFlags::NOREPLACE) {
            // NFS and some FUSE file systems cannot. There, a directory can still replace
            // nothing but an empty directory, and that only when it appears just now.
            Err(Errno::INVAL | Errno::NOSYS) => match self.id_of(&self.name) {
                None => rename(RenameFlags::empty()),
                Some(_) => Err(Errno::EXIST),
            },
            done => done,
        };
        done.map_err(|e| match e {
            Errno::NOTEMPTY | Errno::NOTDIR => ExhibitError::Exists { path: self.path() },
            e => os("give its name to", self.partial_path())(e),
        })
    }

    fn stat_dir(&self) -> Result<Stat, ExhibitError> {
        rustix::fs::fstat(&self.dir).map_err(os("look at", self.partial_path()))
    }

    fn id_of(&self, name: &str) -> Option<(u64, u64)> {
        let stat = rustix::fs::statat(&self.parent, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some(id(&stat))
    }
}

/// Device and inode.
fn id(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// All entries of `dir`.
fn entries(dir: impl AsFd) -> io::Result<Vec<Entry>> {
    let mut out = Vec::new();
    for entry in Dir::read_from(dir.as_fd())? {
        let entry = entry?;
        let name = entry.file_name();
        if [&b"."[..], b".."].contains(&name.to_bytes()) {
            continue;
        }
        if out.len() == MAX_ENTRIES {
            return Err(io::Error::other(format!("more than {MAX_ENTRIES} entries")));
        }
        let stat = rustix::fs::statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => EntryKind::File,
            _ => EntryKind::Other,
        };
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        out.push(Entry { name: name.to_string_lossy().into_owned(), kind, len });
    }
    Ok(out)
}

/// Opens the regular file `name` in `dir` for reading. Does not wait for the other end of a FIFO.
fn open_file(dir: impl AsFd, name: &str) -> io::Result<File> {
    if !is_file_name(name) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file here"));
    }
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// The directory of an exhibit, open for reading.
#[derive(Debug)]
pub struct ExhibitFiles {
    dir: OwnedFd,
}

impl ExhibitFiles {
    /// Opens the directory at `path`, which must not be a symbolic link itself.
    ///
    /// # Errors
    /// [`ExhibitError::NotADirectory`] says what is there instead.
    pub fn open(path: &Path) -> Result<Self, ExhibitError> {
        Ok(Self { dir: open_directory(path)? })
    }

    /// Reads the exhibit that is being made.
    ///
    /// # Errors
    /// No file descriptors left.
    pub fn of(new: &NewExhibit) -> io::Result<Self> {
        Ok(Self { dir: new.dir.try_clone()? })
    }

    /// Opens a regular file as [`ExhibitDir::open`] does, as a plain file.
    ///
    /// # Errors
    /// The file's.
    pub fn file(&self, name: &str) -> io::Result<File> {
        open_file(&self.dir, name)
    }
}

impl ExhibitDir for ExhibitFiles {
    fn list(&self) -> io::Result<Vec<Entry>> {
        entries(&self.dir)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ExhibitFile>> {
        Ok(Box::new(ReadFile(self.file(name)?)))
    }
}

/// A file of an exhibit, open for reading.
struct ReadFile(File);

impl Read for ReadFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Seek for ReadFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

impl ExhibitFile for ReadFile {
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.0, RawSeek::Data(offset)) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::NXIO) => Ok(None),
            // A file system that cannot tell its holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn fifo(path: &Path) {
        rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
    }

    #[test]
    fn it_is_partial_until_committed() {
        let top = tempfile::tempdir().unwrap();
        let new = NewExhibit::create(top.path(), "web-07-ä").unwrap();
        assert_eq!(new.partial_path(), top.path().join("web-07-ä.partial"));
        new.file("memory.raw").unwrap().write_all(b"bytes").unwrap();
        new.file("scratch").unwrap();
        new.remove("scratch").unwrap();
        assert_eq!(
            (mode(&new.partial_path()), mode(&new.partial_path().join("memory.raw"))),
            (0o700, 0o600)
        );
        new.sync().unwrap();
        assert!(!new.path().exists());
        let read = ExhibitFiles::of(&new).unwrap();
        let path = new.commit().unwrap();
        assert_eq!(path, top.path().join("web-07-ä"));
        assert_eq!((mode(&path), mode(&path.join("memory.raw"))), (0o700, 0o400));
        assert!(!top.path().join("web-07-ä.partial").exists());
        assert_eq!(std::fs::read(path.join("memory.raw")).unwrap(), b"bytes");
        assert_eq!(read.list().unwrap().len(), 1);
    }

    #[test]
    fn dropped_it_stays_partial() {
        let top = tempfile::tempdir().unwrap();
        drop(NewExhibit::create(top.path(), "a").unwrap());
        assert!(top.path().join("a.partial").is_dir() && !top.path().join("a").exists());
        let again = NewExhibit::create(top.path(), "a");
        assert!(matches!(again, Err(ExhibitError::Exists { .. })), "{again:?}");
    }

    #[test]
    fn whatever_has_the_name_is_left_alone() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::create_dir(at("dir")).unwrap();
        std::fs::write(at("file"), "x").unwrap();
        symlink("/nowhere", at("link")).unwrap();
        symlink(top.path(), at("p.partial")).unwrap();
        fifo(&at("q.partial"));
        for name in ["dir", "file", "link", "p", "q"] {
            let made = NewExhibit::create(top.path(), name);
            assert!(matches!(made, Err(ExhibitError::Exists { .. })), "{name}: {made:?}");
        }
        assert_eq!(std::fs::read_dir(top.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_name_taken_meanwhile_is_not_replaced() {
        for take in [|p: &Path| std::fs::create_dir(p), |p: &Path| std::fs::write(p, "x")] {
            let top = tempfile::tempdir().unwrap();
            let new = NewExhibit::create(top.path(), "a").unwrap();
            take(&new.path()).unwrap();
            let inode = std::fs::metadata(new.path()).unwrap().ino();
            let path = new.path();
            let done = new.commit();
            assert!(matches!(done, Err(ExhibitError::Exists { .. })), "{done:?}");
            assert_eq!(std::fs::metadata(path).unwrap().ino(), inode);
            assert!(top.path().join("a.partial").is_dir());
        }
    }

    #[test]
    fn an_exchanged_directory_is_noticed() {
        let top = tempfile::tempdir().unwrap();
        let new = NewExhibit::create(top.path(), "a").unwrap();
        std::fs::rename(new.partial_path(), top.path().join("moved")).unwrap();
        std::fs::create_dir(new.partial_path()).unwrap();
        assert!(matches!(new.commit(), Err(ExhibitError::Exchanged { .. })));
        assert!(!top.path().join("a").exists());
    }

    #[test]
    fn the_parent_must_be_a_directory_itself() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::write(at("file"), "x").unwrap();
        symlink(top.path(), at("link")).unwrap();
        fifo(&at("fifo"));
        for (name, what) in [
            ("link", "a symbolic link"),
            ("link/", "a symbolic link"),
            ("file", "a file"),
            ("fifo", "a FIFO"),
        ] {
            let error = NewExhibit::create(&at(name), "a").unwrap_err().to_string();
            assert!(error.contains(what), "{name}: {error}");
            let error = ExhibitFiles::open(&at(name)).unwrap_err().to_string();
            assert!(error.contains(what), "{name}: {error}");
        }
        assert!(matches!(NewExhibit::create(&at("none"), "a"), Err(ExhibitError::Os { .. })));
    }

    #[test]
    fn names_are_one_component() {
        let top = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "a/b", "/a", "-a", "a\0", "a\n", &"x".repeat(250)] {
            let made = NewExhibit::create(top.path(), name);
            assert!(matches!(made, Err(ExhibitError::Name(_))), "{name:?}");
        }
        let new = NewExhibit::create(top.path(), "a").unwrap();
        for name in ["../b", "b/c", ".hidden", ""] {
            assert!(matches!(new.file(name), Err(ExhibitError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn files_are_made_once_and_links_not_followed() {
        let top = tempfile::tempdir().unwrap();
        let new = NewExhibit::create(top.path(), "a").unwrap();
        symlink(top.path().join("target"), new.partial_path().join("planted")).unwrap();
        new.file("once").unwrap();
        for name in ["once", "planted"] {
            assert!(matches!(new.file(name), Err(ExhibitError::Exists { .. })), "{name}");
        }
        assert!(!top.path().join("target").exists());
        // What is no file is not taken into an exhibit.
        assert!(new.commit().is_err());
        assert!(!top.path().join("a").exists());
    }

    #[test]
    fn hostile_entries_are_listed_and_not_opened() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::write(at("plain"), "text").unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        symlink("plain", at("link")).unwrap();
        fifo(&at("fifo"));
        let exhibit = ExhibitFiles::open(top.path()).unwrap();
        let mut list = exhibit.list().unwrap();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        let seen: Vec<_> = list.iter().map(|e| (e.name.as_str(), e.kind)).collect();
        use EntryKind::{File, Other};
        assert_eq!(seen, [("dir", Other), ("fifo", Other), ("link", Other), ("plain", File)]);
        assert_eq!(list[3].len, 4);
        for name in ["dir", "link", "fifo", "none", "../plain", "."] {
            assert!(exhibit.open(name).is_err(), "{name}");
        }
        let mut text = String::new();
        exhibit.open("plain").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }

    #[test]
    fn holes_are_passed_over_and_data_is_not() {
        let top = tempfile::tempdir().unwrap();
        let new = NewExhibit::create(top.path(), "a").unwrap();
        let file = new.file("sparse").unwrap();
        file.set_len(64 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 32 << 20).unwrap();
        let exhibit = ExhibitFiles::of(&new).unwrap();
        let mut sparse = exhibit.open("sparse").unwrap();
        assert!(sparse.next_data(0).unwrap().unwrap() <= 32 << 20);
        assert_eq!(sparse.next_data(32 << 20).unwrap(), Some(32 << 20));
        assert_eq!(sparse.next_data(65 << 20).unwrap(), None);
    }

    #[test]
    fn too_many_entries_are_refused() {
        let top = tempfile::tempdir().unwrap();
        for number in 0..=MAX_ENTRIES {
            File::create(top.path().join(number.to_string())).unwrap();
        }
        assert!(ExhibitFiles::open(top.path()).unwrap().list().is_err());
    }
}
