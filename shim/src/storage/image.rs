//! Sparse images with an ext4 of their own, which the guest has as disks instead of directories of the host.
//!
//! An image lies in the directory whose contents it has, so that whoever counts and removes that directory does so with
//! the image. It is the guest's: nothing on the host ever mounts it.

use std::ffi::{CStr, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ext4::{self, Access};
use crate::error::{Error, Result};
use crate::host::mark::{is_marked, mark};

/// The image's name in the directory, and while it is being made.
pub const NAME: &str = ".katana-disk.ext4";
const UNFINISHED: &str = ".katana-disk.new";
/// An attribute of images that were made here. A container that shares the directory can make a file of that name, but
/// not with this.
const MARK: &CStr = c"trusted.katana.disk";

/// An image, which may not be there yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    path: PathBuf,
    bytes: u64,
    volatile: bool,
}

impl Image {
    /// The image of a directory. If it is made, it has so many bytes; if it is `volatile`, nobody reads it when the last
    /// container that uses it is gone.
    pub fn of(directory: &Path, bytes: u64, volatile: bool) -> Self {
        Self { path: directory.join(NAME), bytes, volatile }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nobody reads it later.
    pub fn is_volatile(&self) -> bool {
        self.volatile
    }

    /// Whether it is there. Blocks.
    pub fn is_there(&self) -> bool {
        is_marked(&self.path, MARK)
    }

    /// Whether it would hide nothing: the directory is empty. Blocks.
    pub fn would_hide_nothing(&self) -> bool {
        let entries = self.path.parent().map(fs::read_dir);
        let Some(Ok(mut entries)) = entries else { return false };
        entries.all(|entry| entry.is_ok_and(|entry| Self::is_unfinished(&entry.file_name())))
    }

    /// Whether a file of the directory is an image that an earlier shim did not finish.
    pub fn is_unfinished(name: &OsStr) -> bool {
        name == UNFINISHED
    }

    /// Makes it, with the directory's owner and mode. Blocks.
    pub fn make(&self) -> Result<()> {
        self.try_make().map_err(|e| Error::io(format_args!("image {}", self.path.display()), &e))
    }

    fn try_make(&self) -> io::Result<()> {
        let directory = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let unfinished = directory.join(UNFINISHED);
        let made = (|| {
            let status = fs::metadata(directory)?;
            let access = Access {
                mode: u16::try_from(status.mode() & 0o7777).unwrap_or(0o755),
                uid: status.uid(),
                gid: status.gid(),
            };
            match fs::remove_file(&unfinished) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let file = File::options().write(true).create_new(true).mode(0o600).open(&unfinished)?;
            let random = crate::host::random().map_err(io::Error::other)?;
            // A journal is for those who read it after a crash.
            ext4::make(&file, self.bytes, access, random, !self.volatile)?;
            mark(&unfinished, MARK)?;
            if !self.volatile {
                // A name that is there after a failure of power has its contents.
                file.sync_all()?;
            }
            fs::rename(&unfinished, &self.path)
        })();
        if made.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        made
    }

    /// Removes it: it was made and is not used. Blocks.
    pub fn discard(&self) {
        let _ = fs::remove_file(&self.path);
    }
}
