//! The tree that a stream is unpacked into: every place is reached from a descriptor of its directory, by names that are
//! no links (openat2(2), RESOLVE_NO_SYMLINKS).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};

use crate::entries::Head;
use crate::{Error, Result, at};

const PLACE: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
const EXISTING: OFlag =
    OFlag::O_WRONLY.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);
const NEW: OFlag = OFlag::O_WRONLY.union(OFlag::O_CREAT).union(OFlag::O_EXCL).union(OFlag::O_CLOEXEC);
const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// A directory below which all is written.
pub struct Tree {
    directory: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// Whether owners and set-id bits are kept.
    keeps: bool,
}

impl Tree {
    /// `path` may lead through links: it is the user's.
    pub fn open(path: &Path, keeps: bool) -> Result<Self> {
        let directory = open(path, PLACE, Mode::empty()).map_err(at(path))?;
        Ok(Self { directory, path: path.to_owned(), keeps })
    }

    fn failed<E: Into<io::Error>>(&self, path: &Path) -> impl FnOnce(E) -> Error + use<E> {
        at(self.path.join(path))
    }

    fn unfit(&self, path: &Path, why: &'static str) -> Error {
        Error::Destination(self.path.join(path), why)
    }

    /// The directory of a place, and the place's name. Directories that the stream has not mentioned are made.
    fn parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or_else(|| self.unfit(path, "there is a directory"))?;
        let way = path.parent().unwrap_or(Path::new(""));
        let directory = match self.resolve(way) {
            Err(Errno::ENOENT) => {
                self.make_way(way)?;
                self.resolve(way)
            }
            directory => directory,
        };
        match directory {
            Ok(directory) => Ok((directory, name)),
            Err(Errno::ELOOP) => {
                Err(self.unfit(way, "there is a symbolic link, through which nothing is written"))
            }
            Err(e) => Err(self.failed(way)(e)),
        }
    }

    fn resolve(&self, way: &Path) -> nix::Result<OwnedFd> {
        let way = if way.as_os_str().is_empty() { Path::new(".") } else { way };
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        openat2(&self.directory, way, OpenHow::new().flags(PLACE).resolve(resolve))
    }

    fn make_way(&self, way: &Path) -> Result<()> {
        let mut made = PathBuf::new();
        for part in way {
            let outer = self.resolve(&made).map_err(self.failed(&made))?;
            made.push(part);
            match mkdirat(&outer, part, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(self.failed(&made)(e)),
            }
        }
        Ok(())
    }

    /// A directory, which may be there.
    pub fn directory(&self, head: &Head) -> Result<()> {
        if head.path.as_os_str().is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent(&head.path)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o700)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(self.failed(&head.path)(e)),
        }
        let made = openat(&parent, name, DIRECTORY, Mode::empty()).map_err(|e| match e {
            Errno::ENOTDIR | Errno::ELOOP => {
                self.unfit(&head.path, "there is something else than a directory")
            }
            e => self.failed(&head.path)(e),
        })?;
        self.own(&made, head).map_err(self.failed(&head.path))
    }

    /// The time of a directory, once nothing is written in it any more.
    pub fn leave(&self, path: &Path, mtime: i64) {
        if !path.as_os_str().is_empty()
            && let Ok((parent, name)) = self.parent(path)
        {
            let time = TimeSpec::new(mtime, 0);
            // Who moves it away meanwhile has it without its time.
            let _ = utimensat(&parent, name, &time, &time, UtimensatFlags::NoFollowSymlink);
        }
    }

    /// A file with these contents, in the place of another one.
    pub fn file(&self, head: &Head, contents: &mut dyn Read) -> Result<()> {
        let (parent, name) = self.parent(&head.path)?;
        let file = match self.make_room(&parent, name, head) {
            // Something is mounted there, such as /etc/hosts of a container.
            Err(Error::File { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                openat(&parent, name, EXISTING, Mode::empty())
            }
            room => {
                room?;
                openat(&parent, name, NEW, Mode::from_bits_truncate(0o600))
            }
        };
        let failed = |e: io::Error| self.failed(&head.path)(e);
        let mut file = file.map(File::from).map_err(|e| failed(e.into()))?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(self.unfit(&head.path, "there is something else than a file"));
        }
        file.set_len(0).map_err(failed)?;
        self.fill(&mut file, head, contents)?;
        self.own(&file, head).map_err(|e| failed(e.into()))?;
        let time = TimeSpec::new(head.mtime, 0);
        futimens(&file, &time, &time).map_err(|e| failed(e.into()))
    }

    /// It is to be told who has failed: the stream or the file.
    fn fill(&self, file: &mut File, head: &Head, contents: &mut dyn Read) -> Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match contents.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    let written = file.write_all(buffer.get(..length).unwrap_or_default());
                    written.map_err(self.failed(&head.path))?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::Stream(e)),
            }
        }
    }

    /// A symbolic link, which may lead anywhere: nobody follows it here.
    pub fn link(&self, head: &Head, target: &Path) -> Result<()> {
        let (parent, name) = self.parent(&head.path)?;
        self.make_room(&parent, name, head)?;
        symlinkat(target, &parent, name).map_err(self.failed(&head.path))?;
        if self.keeps {
            let (uid, gid) = (Some(Uid::from_raw(head.uid)), Some(Gid::from_raw(head.gid)));
            let owned = fchownat(&parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW);
            owned.map_err(self.failed(&head.path))?;
        }
        Ok(())
    }

    /// Another name of a file of the tree.
    pub fn same(&self, head: &Head, target: &Path) -> Result<()> {
        let (from, old) = self.parent(target)?;
        let (parent, name) = self.parent(&head.path)?;
        self.make_room(&parent, name, head)?;
        linkat(&from, old, &parent, name, AtFlags::empty()).map_err(self.failed(&head.path))
    }

    /// Takes away what has the name, unless it is a directory.
    fn make_room(&self, parent: &OwnedFd, name: &OsStr, head: &Head) -> Result<()> {
        match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => Err(self.unfit(&head.path, "there is a directory")),
            Err(e) => Err(self.failed(&head.path)(e)),
        }
    }

    fn own(&self, file: &impl AsFd, head: &Head) -> nix::Result<()> {
        if self.keeps {
            // First: it takes set-id bits away.
            fchown(file, Some(Uid::from_raw(head.uid)), Some(Gid::from_raw(head.gid)))?;
        }
        let kept = if self.keeps { 0o7777 } else { 0o777 };
        fchmod(file, Mode::from_bits_truncate(head.mode & kept))
    }
}
