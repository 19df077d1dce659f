//! The files and directories of the host that a pod's containers mount, each bound below the share once.
//!
//! What is bound twice is two file systems to the guest: what changes by the one shows in the other when its caches have
//! expired, and a lock in the one is none in the other. Containers that mount the same directory, as a program and its
//! sidecar do, would notice.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::mounts::{self, Access};
use crate::spec::Mount;

/// Those of a pod.
#[derive(Debug, Default)]
pub struct Volumes {
    bound: Vec<Volume>,
    /// The number of the next one. None is used twice, so that the guest mistakes none for another.
    next: u32,
}

#[derive(Debug)]
struct Volume {
    number: u32,
    manner: Manner,
    access: Access,
    /// Ids of containers, one for each mount.
    users: Vec<String>,
}

/// What two mounts must have in common to be one volume.
#[derive(Debug, PartialEq, Eq)]
struct Manner {
    /// The file: while it is bound, no other has these numbers.
    device: u64,
    inode: u64,
    recursive: bool,
    follows: bool,
}

/// A mount's volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Its number, which is its name.
    pub number: u32,
    /// Whether it was bound for this mount.
    pub new: bool,
    /// Whether only the host can change it.
    pub read_only: bool,
}

impl Volumes {
    /// Binds the `source` of a container's mount to a place of its own, or finds it bound already. `point` and `target` are
    /// the same directory, the first below the share's read-only mount and the second in it. Blocks.
    pub fn bind(
        &mut self,
        id: &str,
        mount: &Mount,
        source: &Path,
        point: &Path,
        target: &Path,
    ) -> Result<Bound> {
        let failed = |what: &str, e: &io::Error| {
            let (source, destination) = (source.display(), mount.destination.display());
            let reason = crate::error::reason(e).to_lowercase();
            // The words of runc, which tests and users look for.
            Error::Host(format!(
                "error mounting \"{source}\" to rootfs at \"{destination}\": {what} {source}: {reason}"
            ))
        };
        let metadata = fs::metadata(source).map_err(|e| failed("stat", &e))?;
        let manner = Manner {
            device: metadata.dev(),
            inode: metadata.ino(),
            recursive: mount.bind().unwrap_or(false),
            follows: follows(&mount.options),
        };
        let access = access(&mount.options);
        if let Some(volume) = self.find(&manner, access, source, target).map_err(|e| failed("mount", &e))? {
            volume.users.push(id.to_owned());
            return Ok(Bound {
                number: volume.number,
                new: false,
                read_only: volume.access != Access::Inherited,
            });
        }
        let kind = metadata.file_type();
        if kind.is_fifo() {
            log::warn!("{}: a fifo of the host does not connect the guest with the host", source.display());
        }
        let number = self.next;
        self.next += 1;
        let (point, target) = (point.join(number.to_string()), target.join(number.to_string()));
        let made = if kind.is_dir() { fs::create_dir(&point) } else { File::create_new(&point).map(drop) };
        made.map_err(|e| failed("create mount point for", &e))?;
        if let Err(e) = mounts::bind(source, &target, manner.recursive, manner.follows, access) {
            remove_point(&point);
            return Err(failed("mount", &e));
        }
        self.bound.push(Volume { number, manner, access, users: vec![id.to_owned()] });
        Ok(Bound { number, new: true, read_only: access != Access::Inherited })
    }

    /// A volume that shows what binding `source` anew would show. Where the pod can write anyway, the guest is trusted to keep
    /// a mount read-only.
    fn find(
        &mut self,
        manner: &Manner,
        access: Access,
        source: &Path,
        target: &Path,
    ) -> io::Result<Option<&mut Volume>> {
        for volume in self.bound.iter_mut().filter(|volume| volume.manner == *manner) {
            let serves =
                volume.access == access || (volume.access, access) == (Access::Inherited, Access::ReadOnly);
            if serves {
                let source = fs::canonicalize(source)?;
                let place = target.join(volume.number.to_string());
                if mounts::look_alike(&source, &place, volume.access == Access::Inherited)? {
                    return Ok(Some(volume));
                }
            }
        }
        Ok(None)
    }

    /// Unmounts what only this container has used; the answer is the numbers. Blocks.
    pub fn release(&mut self, id: &str, point: &Path, target: &Path) -> Vec<u32> {
        let mut released = Vec::new();
        self.bound.retain_mut(|volume| {
            volume.users.retain(|user| user != id);
            if volume.users.is_empty() {
                released.push(volume.number);
            }
            !volume.users.is_empty()
        });
        for number in &released {
            let place = target.join(number.to_string());
            match mounts::unmount_all(&place) {
                Ok(()) => remove_point(&point.join(number.to_string())),
                Err(e) => log::error!("unmount {}: {e}", place.display()),
            }
        }
        released
    }
}

/// Removes an empty directory or a file that something was mounted on.
fn remove_point(point: &Path) {
    if let Err(e) = fs::remove_dir(point).or_else(|_| fs::remove_file(point)) {
        log::error!("remove {}: {e}", point.display());
    }
}

/// Whether later mounts of the host are to appear: as with runc, unless the mount is private.
fn follows(options: &[String]) -> bool {
    let private =
        |option: &String| ["private", "rprivate", "unbindable", "runbindable"].contains(&option.as_str());
    !options.iter().any(private)
}

/// Read-only on the host as well: the guest's word is not enough.
pub fn access(options: &[String]) -> Access {
    options.iter().fold(Access::Inherited, |access, option| match option.as_str() {
        "ro" => Access::ReadOnly,
        "rro" => Access::RecursivelyReadOnly,
        "rw" => Access::Inherited,
        _ => access,
    })
}

/// Whether a mount is to be read-only.
pub fn is_read_only(options: &[String]) -> bool {
    access(options) != Access::Inherited
}

#[cfg(test)]
#[path = "volumes/tests.rs"]
mod tests;
