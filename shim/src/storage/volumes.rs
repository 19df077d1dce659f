//! The files and directories of the host that a pod's containers mount, each bound below the share once.
//!
//! What is bound twice is two file systems to the guest: what changes by the one shows in the other when its caches
//! have expired, and a lock in the one is none in the other. Containers that mount the same directory, as a program and
//! its sidecar do, would notice.
//!
//! Volumes that show later mounts of the host get them from the shim ([`Volumes::follow`]). By propagation in the
//! kernel they would come by themselves, but could not go: the file server holds descriptors of what the guest
//! remembers, and a file system with a busy copy in another namespace is busy for the host's umount(2)
//! (`propagate_mount_busy` in fs/pnode.c).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::mount_table::{self, Mounted, Sight};
use super::mounts::{Access, Attachments, Detached};
use crate::error::{Error, Result};
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
    followed: Option<Followed>,
}

/// Whose later mounts are to appear in a volume.
#[derive(Debug)]
struct Followed {
    /// A path without links.
    source: PathBuf,
    /// The mounts in it that the volume has, by their relative paths, with their ids.
    mounts: BTreeMap<PathBuf, u64>,
}

impl Followed {
    fn of(source: &Path) -> io::Result<Self> {
        let source = fs::canonicalize(source)?;
        let host = mount_table::host()?;
        let mounts = below(&host, &source).into_iter().map(|(path, mounted)| (path, mounted.id)).collect();
        Ok(Self { source, mounts })
    }
}

/// The mounts in a directory, outer ones first.
fn below<'a>(all: &'a [Mounted], directory: &Path) -> BTreeMap<PathBuf, &'a Mounted> {
    let mounts = mount_table::tree(all, directory).into_iter().filter(|mounted| mounted.point != directory);
    let relative =
        |mounted: &'a Mounted| Some((mounted.point.strip_prefix(directory).ok()?.to_owned(), mounted));
    mounts.filter_map(relative).collect()
}

/// How the mounts in volumes have changed, by paths relative to the share.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Mounts that have come, outer ones first.
    pub come: Vec<Mounted>,
    /// Mounts that have gone.
    pub gone: Vec<PathBuf>,
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
    /// Binds the `source` of a container's mount to a target of its own, or finds it bound already. `point` and `target`
    /// are the same directory, the first on the host and the second in the share. Blocks.
    pub fn bind(
        &mut self,
        id: &str,
        mount: &Mount,
        source: &Path,
        point: &Path,
        target: &Path,
        mounts: &mut Attachments<'_>,
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
        let found = self.find(&manner, access, source, target, mounts);
        if let Some(volume) = found.map_err(|e| failed("mount", &e))? {
            volume.users.push(id.to_owned());
            return Ok(Bound { number: volume.number, new: false, read_only: !volume.access.lets_write() });
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
        // First: what is mounted between is found to be new then.
        let followed = (manner.follows && kind.is_dir()).then(|| Followed::of(source)).transpose();
        let copied = followed.and_then(|followed| {
            mounts.add_tree(target, source, manner.recursive, access)?;
            Ok(followed)
        });
        let followed = match copied {
            Ok(followed) => followed,
            Err(e) => {
                remove_point(&point);
                return Err(failed("mount", &e));
            }
        };
        self.bound.push(Volume { number, manner, access, users: vec![id.to_owned()], followed });
        Ok(Bound { number, new: true, read_only: !access.lets_write() })
    }

    /// A volume that shows what binding `source` anew would show. Where the pod can write anyway, the guest is trusted
    /// to keep a mount read-only.
    fn find(
        &mut self,
        manner: &Manner,
        access: Access,
        source: &Path,
        target: &Path,
        mounts: &mut Attachments<'_>,
    ) -> io::Result<Option<&mut Volume>> {
        let serves = |volume: &&mut Volume| {
            volume.manner == *manner
                && (volume.access == access
                    || (volume.access, access) == (Access::Inherited, Access::ReadOnly))
        };
        let mut able = self.bound.iter_mut().filter(serves).peekable();
        if able.peek().is_none() {
            return Ok(None);
        }
        let source = fs::canonicalize(source)?;
        let (host, mounted) = (mount_table::host()?, mounts.attach_all()?);
        let source = Sight { place: &source, all: &host };
        Ok(able.find(|volume| {
            let place = Path::new("/").join(target).join(volume.number.to_string());
            let volume_there = Sight { place: &place, all: &mounted };
            mount_table::look_alike(source, volume_there, volume.access == Access::Inherited)
        }))
    }

    /// Whether there is a volume in which later mounts of the host are to appear.
    pub fn any_follows(&self) -> bool {
        self.bound.iter().any(|volume| volume.followed.is_some())
    }

    /// Makes the volumes that follow the host have the mounts that it has now. `target` is their directory in the
    /// share.
    pub fn follow(&mut self, host: &[Mounted], target: &Path, mounts: &mut Attachments<'_>) -> Changes {
        let mut changes = Changes::default();
        for Volume { number, followed, access, .. } in &mut self.bound {
            let Some(Followed { source, mounts: known }) = followed else { continue };
            let root = target.join(number.to_string());
            let now = below(host, source);
            known.retain(|path, id| {
                let stays = now.get(path).is_some_and(|mounted| mounted.id == *id);
                if !stays {
                    mounts.remove(root.join(path));
                    changes.gone.push(root.join(path));
                }
                stays
            });
            let mut come = Vec::new();
            for (path, mounted) in now {
                // As by propagation, only from mounts that are shared, and with what comes itself.
                let spreads = |parent: &Mounted| parent.id == mounted.parent && parent.shared;
                if known.contains_key(&path) || !(come.contains(&mounted.parent) || host.iter().any(spreads))
                {
                    continue;
                }
                come.push(mounted.id);
                let access = if *access == Access::RecursivelyReadOnly { *access } else { Access::Inherited };
                let copied = Detached::bound(&mounted.point, false, false, access);
                if let Err(e) = copied.and_then(|copy| mounts.try_to_add(root.join(&path), copy, mounted)) {
                    log::info!("{}: {e}", mounted.point.display());
                    continue;
                }
                changes.come.push(mounted.at(root.join(&path)));
                known.insert(path, mounted.id);
            }
        }
        changes
    }

    /// Unmounts what only this container has used; the answer is the numbers. Blocks.
    pub fn release(&mut self, id: &str, point: &Path) -> Vec<u32> {
        let mut released = Vec::new();
        self.bound.retain_mut(|volume| {
            volume.users.retain(|user| user != id);
            if volume.users.is_empty() {
                released.push(volume.number);
            }
            !volume.users.is_empty()
        });
        released.iter().for_each(|number| remove_point(&point.join(number.to_string())));
        released
    }
}

/// Removes an empty directory or a file. What is mounted on it in the VMM's mount namespace is unmounted by that, with
/// all below: the kernel does so where somebody removes a mount point of other namespaces than his own (since Linux
/// 3.18).
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

/// Read-only on the host as well: the guest's word is not enough. Of the options for the mount itself the last one
/// counts, and of those for all below; the latter are applied later, as runc does. All other options are for the
/// container's processes, and the guest's to apply.
pub fn access(options: &[String]) -> Access {
    let last = |names: [&str; 2]| {
        let found = options.iter().rev().find(|option| names.contains(&option.as_str()));
        found.map(|option| option == names[0])
    };
    match (last(["rro", "rrw"]), last(["ro", "rw"])) {
        (Some(true), _) => Access::RecursivelyReadOnly,
        (Some(false), _) => Access::RecursivelyWritable,
        (None, Some(true)) => Access::ReadOnly,
        (None, _) => Access::Inherited,
    }
}

#[cfg(test)]
#[path = "volumes/tests.rs"]
mod tests;
