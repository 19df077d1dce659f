//! The directory that the guest sees: each container's root, and the volumes.
//!
//! On the host it holds nothing but empty directories and files. The VMM gets a read-only mount of it as its root, and
//! what the guest is to see is mounted on them in the VMM's mount namespace only: see [`crate::storage::mounts`]. Only
//! what is mounted there is writable, so nothing can be turned into a link that leads the shim's next mount elsewhere.

use std::fs;
use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katana_protocol::{OWN_ROOT, SHARED_ROOT, SHARED_VOLUMES};

use super::mount_table::{self, Mounted};
use super::mounts::{self, AddedFlags, Attachments, Detached};
use super::rootfs;
use super::volumes::{self, Changes, Volumes};
use crate::error::{Error, Result};
use crate::host::create_private;
use crate::spec::{Source, Spec};

/// A pod's shared directory.
pub struct Share {
    /// Its path on the host.
    path: PathBuf,
    /// The read-only mount of it, which becomes the VMM's root.
    root: Arc<OwnedFd>,
    added_flags: AddedFlags,
    volumes: Mutex<Volumes>,
}

/// What was mounted for a container.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// The new volumes, relative to the share, in which the host's changes are to raise events: those that only the
    /// host changes, and those that kubelet updates.
    pub watched: Vec<PathBuf>,
    /// What is mounted below the container's root and volumes, and those of these that restrict what can be done with
    /// their files, by paths relative to the share, outer ones first.
    pub mounts: Vec<Mounted>,
    /// Whether there are volumes in which later mounts of the host are to appear: see [`Share::follow`].
    pub follows: bool,
}

impl Share {
    /// Makes the directory and its mount, which is not attached yet. Blocks.
    pub fn create(path: &Path) -> Result<Self> {
        Self::try_create(path).map_err(|e| Error::io(format_args!("shared directory {}", path.display()), &e))
    }

    fn try_create(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            create_private(parent)?;
        }
        fs::create_dir(path)?;
        let mount = Detached::copy(path, false)?;
        // There are only places for mounts in it.
        let nothing = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        mount.set(libc::MOUNT_ATTR_RDONLY | nothing, 0, libc::MS_PRIVATE, false)?;
        fs::create_dir(path.join(SHARED_VOLUMES))?;
        let root = Arc::new(OwnedFd::from(mount));
        Ok(Self {
            path: path.to_owned(),
            root,
            added_flags: AddedFlags::default(),
            volumes: Mutex::default(),
        })
    }

    /// For the VMM, whose root it becomes: what is mounted in it is found below it ever after.
    pub fn root(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.root)
    }

    /// Mounts a container's root, unless that is on a disk, and its bind mounts, whose sources become volumes, in the
    /// mount namespace of the VMM: its process as a pidfd, or the namespace itself. On failure nothing is left. Blocks.
    pub fn add(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        sources: &mut [Source],
        namespace: BorrowedFd<'_>,
    ) -> Result<Added> {
        let wanted = sources.to_vec();
        let mut mounts = Attachments::new(namespace, self.root.as_fd(), &self.added_flags);
        match self.try_add(id, bundle, spec, layers, sources, &mut mounts) {
            Err(Failed::Loop) => {
                sources.clone_from_slice(&wanted);
                let mut mounts = Attachments::piecewise(namespace, self.root.as_fd(), &self.added_flags);
                Ok(self.try_add(id, bundle, spec, layers, sources, &mut mounts)?)
            }
            added => Ok(added?),
        }
    }

    fn try_add(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        sources: &mut [Source],
        mounts: &mut Attachments<'_>,
    ) -> std::result::Result<Added, Failed> {
        let added = self.add_root(id, bundle, spec, layers, mounts).map_err(Failed::from).and_then(|()| {
            // Until all are attached: another container that finds a volume is to find it there.
            let mut volumes = self.volumes();
            let watched = self.add_volumes(id, spec, sources, &mut volumes, mounts)?;
            let follows = volumes.any_follows();
            let root = Path::new("/").join(id).join(spec.shared_root());
            Ok(Added { follows, ..attach(root, watched, sources, mounts)? })
        });
        if added.is_err() {
            self.remove(id);
        }
        added
    }

    fn add_root(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        mounts: &mut Attachments<'_>,
    ) -> Result<()> {
        let (directory, target) = (self.path.join(id), Path::new(id).join(spec.shared_root()));
        let point = directory.join(spec.shared_root());
        for part in [&directory, &point] {
            fs::create_dir(part).map_err(|e| Error::io(format_args!("create {}", part.display()), &e))?;
        }
        layers.map_or(Ok(()), |layers| rootfs::mount(layers, bundle, spec, &point, &target, mounts))
    }

    fn add_volumes(
        &self,
        id: &str,
        spec: &Spec,
        sources: &mut [Source],
        volumes: &mut Volumes,
        mounts: &mut Attachments<'_>,
    ) -> Result<Vec<PathBuf>> {
        let (point, target) = (self.path.join(SHARED_VOLUMES), Path::new(SHARED_VOLUMES));
        let mut wanted: Vec<_> = spec.mounts.iter().zip(sources).collect();
        // Those that may be read only can be of a volume that may be written, not the other way round.
        wanted.sort_by_key(|(mount, _)| !volumes::access(&mount.options).lets_write());
        let mut watched = Vec::new();
        for (mount, source) in wanted {
            let Source::Host(path) = source else { continue };
            let bound = volumes.bind(id, mount, path, &point, target, mounts)?;
            let updated = || path.join("..data").is_symlink();
            if bound.new && path.is_dir() && (bound.read_only || updated()) {
                watched.push(Path::new(SHARED_VOLUMES).join(bound.number.to_string()));
            }
            *source = Source::Volume(bound.number);
        }
        Ok(watched)
    }

    /// Makes the volumes that follow the host have the mounts that it has now. Blocks.
    pub fn follow(&self, namespace: BorrowedFd<'_>) -> io::Result<Changes> {
        let mut volumes = self.volumes();
        if !volumes.any_follows() {
            return Ok(Changes::default());
        }
        let mut mounts = Attachments::new(namespace, self.root.as_fd(), &self.added_flags);
        let changes = volumes.follow(&mount_table::host()?, Path::new(SHARED_VOLUMES), &mut mounts);
        if changes != Changes::default() {
            mounts.attach_all()?;
        }
        Ok(changes)
    }

    fn volumes(&self) -> MutexGuard<'_, Volumes> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Share::remove`] from async code.
    pub async fn remove_beside(self: Arc<Self>, id: String) -> Vec<PathBuf> {
        let removed = crate::host::threads::cleanup(move || Ok(self.remove(&id)));
        removed.await.inspect_err(|e| log::error!("{e}")).unwrap_or_default()
    }

    /// Removes a container's mounts and directories. The answer is the volumes that are gone, relative to the share.
    /// Blocks.
    pub fn remove(&self, id: &str) -> Vec<PathBuf> {
        if let Err(e) = remove_root(&self.path, id) {
            log::error!("remove {}: {e}", self.path.join(id).display());
        }
        let released = self.volumes().release(id, &self.path.join(SHARED_VOLUMES));
        let released = released.iter().map(|number| Path::new(SHARED_VOLUMES).join(number.to_string()));
        let released: Vec<_> = released.collect();
        released
            .iter()
            .map(PathBuf::as_path)
            .chain([Path::new(id)])
            .for_each(|place| self.added_flags.forget(place));
        released
    }
}

/// Why a container's mounts cannot be made.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    For(#[from] Error),
    /// See [`Attachments::piecewise`].
    #[error("a root has files in it that stand for mount namespaces")]
    Loop,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::For(error) => error,
            Failed::Loop => Self::Host(failed.to_string()),
        }
    }
}

/// Attaches a container's mounts.
fn attach(
    root: PathBuf,
    watched: Vec<PathBuf>,
    sources: &[Source],
    mounts: &mut Attachments<'_>,
) -> std::result::Result<Added, Failed> {
    // The namespace refuses nothing by itself; it is gone if the VMM is.
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(libc::ELOOP) => Failed::Loop,
        _ => Failed::For(Error::Unavailable(format!("mount in the VMM's namespace: {e}"))),
    };
    let all = mounts.attach_all().map_err(failed)?;
    let volumes = sources.iter().filter_map(|source| match source {
        Source::Volume(number) => Some(Path::new("/").join(SHARED_VOLUMES).join(number.to_string())),
        _ => None,
    });
    let mut mounts = Vec::new();
    for root in iter::once(root).chain(volumes) {
        let seen = mount_table::tree(&all, &root).into_iter();
        let listed = seen.filter(|mounted| mounted.point != root || !mounted.restrictions().is_empty());
        mounts.extend(listed.map(Mounted::relative));
    }
    Ok(Added { watched, mounts, follows: false })
}

/// Removes a container's directories. What is mounted on them in the VMM's namespace is unmounted by that, as for
/// volumes.
fn remove_root(path: &Path, id: &str) -> io::Result<()> {
    let top = path.join(id);
    for directory in [top.join(SHARED_ROOT), top.join(OWN_ROOT), top] {
        match fs::remove_dir(&directory) {
            // It was being made when its maker died.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                mounts::unmount_all(&directory)?;
                fs::remove_dir(&directory)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    Ok(())
}

/// Removes a whole share without a [`Share`], when its VMM is gone and with that all mounts. Blocks.
pub fn destroy(path: &Path) -> io::Result<()> {
    // For what was being made when its maker died: without this the next step would reach the files of others.
    mounts::unmount_all(path)?;
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes one container's root from a share without a [`Share`]; its volumes go with the share. Blocks.
pub fn unmount_container(path: &Path, id: &str) -> io::Result<()> {
    remove_root(path, id)
}

#[cfg(test)]
#[path = "share/tests.rs"]
pub mod tests;
