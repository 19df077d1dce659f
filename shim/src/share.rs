//! The directory that the guest sees: each container's root, and the volumes.
//!
//! The guest gets the directory as a read-only mount; only what is mounted below it is writable. So nothing
//! in it can be turned into a link that leads the shim's next mount elsewhere on the host. The shim makes its
//! directories through a descriptor of the place below that mount.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katana_protocol::SHARED_VOLUMES;

use crate::error::{Error, Result};
use crate::layout::create_private;
use crate::mounts;
use crate::rootfs;
use crate::spec::{Source, Spec};
use crate::volumes::{self, Volumes};

/// A pod's shared directory.
pub struct Share {
    /// Its path: the read-only mount.
    path: PathBuf,
    /// The place below that mount.
    beneath: OwnedFd,
    volumes: Mutex<Volumes>,
}

impl Share {
    /// Makes the directory and the mount. Blocks.
    pub fn create(path: &Path) -> Result<Self> {
        Self::try_create(path).map_err(|e| Error::io(format_args!("shared directory {}", path.display()), &e))
    }

    fn try_create(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            create_private(parent)?;
        }
        fs::create_dir(path)?;
        let beneath = mounts::open_directory(path)?;
        let mount = mounts::Detached::copy(path, false)?;
        // First apart from the peers of the mount it is a copy of, then a group of its own: what is mounted
        // below reaches the VMM's mount namespace and nothing else.
        mount.set(libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE, false)?;
        mount.set(0, libc::MS_SHARED, false)?;
        mount.attach(path)?;
        let share = Self { path: path.to_owned(), beneath, volumes: Mutex::default() };
        fs::create_dir(share.directory(SHARED_VOLUMES))?;
        Ok(share)
    }

    /// Opens it for the VMM.
    pub fn open(&self) -> Result<OwnedFd> {
        let opened = File::open(&self.path).map(OwnedFd::from);
        opened.map_err(|e| Error::io(format_args!("shared directory {}", self.path.display()), &e))
    }

    fn directory(&self, name: &str) -> PathBuf {
        mounts::path_of_fd(self.beneath.as_fd()).join(name)
    }

    /// Mounts a container's root, unless that is on a disk, and its bind mounts, whose sources become volumes. The answer is the
    /// new volumes, relative to the share, in which the host's changes are to raise events: those that only the host
    /// changes, and those that kubelet updates. On failure nothing is left. Blocks.
    pub fn add(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        sources: &mut [Source],
    ) -> Result<Vec<PathBuf>> {
        let added =
            self.add_root(id, bundle, spec, layers).and_then(|()| self.add_volumes(id, spec, sources));
        if added.is_err() {
            self.remove(id);
        }
        added
    }

    fn add_root(&self, id: &str, bundle: &Path, spec: &Spec, layers: Option<&[rootfs::Layer]>) -> Result<()> {
        let directory = self.directory(id);
        for part in ["", "rootfs"] {
            let part = directory.join(part);
            fs::create_dir(&part).map_err(|e| Error::io(format_args!("create {}", part.display()), &e))?;
        }
        layers
            .map_or(Ok(()), |layers| rootfs::mount(layers, bundle, spec, &self.path.join(id).join("rootfs")))
    }

    fn add_volumes(&self, id: &str, spec: &Spec, sources: &mut [Source]) -> Result<Vec<PathBuf>> {
        let (point, target) = (self.directory(SHARED_VOLUMES), self.path.join(SHARED_VOLUMES));
        let mut wanted: Vec<_> = spec.mounts.iter().zip(sources).collect();
        // Those that may be read only can be of a volume that may be written, not the other way round.
        wanted.sort_by_key(|(mount, _)| volumes::is_read_only(&mount.options));
        let mut watched = Vec::new();
        for (mount, source) in wanted {
            let Source::Host(path) = source else { continue };
            let bound = self.volumes().bind(id, mount, path, &point, &target)?;
            let updated = || path.join("..data").is_symlink();
            if bound.new && path.is_dir() && (bound.read_only || updated()) {
                watched.push(Path::new(SHARED_VOLUMES).join(bound.number.to_string()));
            }
            *source = Source::Volume(bound.number);
        }
        Ok(watched)
    }

    fn volumes(&self) -> MutexGuard<'_, Volumes> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Share::remove`] from async code.
    pub async fn remove_beside(self: Arc<Self>, id: String) -> Vec<PathBuf> {
        let removed = crate::blocking(move || Ok(self.remove(&id)));
        removed.await.inspect_err(|e| log::error!("{e}")).unwrap_or_default()
    }

    /// Removes a container's mounts and directories. The answer is the volumes that are gone, relative to the share. Blocks.
    pub fn remove(&self, id: &str) -> Vec<PathBuf> {
        let mounted = self.path.join(id);
        if let Err(e) = mounts::unmount_all(&mounted) {
            log::error!("unmount {}: {e}", mounted.display());
        }
        // Below the mount no mount of a container is in the way, so this cannot reach a user's files.
        match fs::remove_dir_all(self.directory(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => log::error!("remove {}: {e}", mounted.display()),
            _ => {}
        }
        let (point, target) = (self.directory(SHARED_VOLUMES), self.path.join(SHARED_VOLUMES));
        let released = self.volumes().release(id, &point, &target);
        released.iter().map(|number| Path::new(SHARED_VOLUMES).join(number.to_string())).collect()
    }
}

/// Removes a whole share without a [`Share`]: its mounts, then its directories. Blocks.
pub fn destroy(path: &Path) -> io::Result<()> {
    mounts::unmount_all(path)?;
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes one container's root from a share without a [`Share`], as far as the read-only mount lets it: the
/// mounts go now, the empty directories and the volumes with the share. Blocks.
pub fn unmount_container(path: &Path, id: &str) -> io::Result<()> {
    mounts::unmount_all(&path.join(id))
}

#[cfg(test)]
#[path = "share/tests.rs"]
pub mod tests;
