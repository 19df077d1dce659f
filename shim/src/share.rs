//! The directory that the guest sees: one below the other, each container's root and bind mounts.
//!
//! The guest gets the directory as a read-only mount; only what is mounted below it is writable. So nothing
//! in it can be turned into a link that leads the shim's next mount elsewhere on the host. The shim makes its
//! directories through a descriptor of the place below that mount.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::layout::create_private;
use crate::mounts::{self, Access};
use crate::rootfs;
use crate::spec::{Mount, Source, Spec};

/// A pod's shared directory.
pub struct Share {
    /// Its path: the read-only mount.
    path: PathBuf,
    /// The place below that mount.
    beneath: OwnedFd,
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
        Ok(Self { path: path.to_owned(), beneath })
    }

    /// Opens it for the VMM.
    pub fn open(&self) -> Result<OwnedFd> {
        let opened = File::open(&self.path).map(OwnedFd::from);
        opened.map_err(|e| Error::io(format_args!("shared directory {}", self.path.display()), &e))
    }

    fn directory(&self, id: &str) -> PathBuf {
        mounts::path_of_fd(self.beneath.as_fd()).join(id)
    }

    /// Mounts a container's root, unless that is on a disk, and its bind mounts. On failure nothing is left. Blocks.
    pub fn add(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        sources: &[Source],
    ) -> Result<()> {
        let added = self.try_add(id, bundle, spec, layers, sources);
        if added.is_err() {
            self.remove(id);
        }
        added
    }

    fn try_add(
        &self,
        id: &str,
        bundle: &Path,
        spec: &Spec,
        layers: Option<&[rootfs::Layer]>,
        sources: &[Source],
    ) -> Result<()> {
        let directory = self.directory(id);
        let made = |what: &Path, result: io::Result<()>| {
            result.map_err(|e| Error::io(format_args!("create {}", what.display()), &e))
        };
        for part in ["", "rootfs", "mounts"] {
            let part = directory.join(part);
            made(&part, fs::create_dir(&part))?;
        }
        if let Some(layers) = layers {
            rootfs::mount(layers, bundle, spec, &self.path.join(id).join("rootfs"))?;
        }
        for (number, (mount, source)) in spec.mounts.iter().zip(sources).enumerate() {
            if let Source::Host(source) = source {
                let point = directory.join("mounts").join(number.to_string());
                let target = self.path.join(id).join("mounts").join(number.to_string());
                bind(mount, source, &point, &target)?;
            }
        }
        Ok(())
    }

    /// [`Share::remove`] from async code.
    pub async fn remove_beside(self: Arc<Self>, id: String) {
        let removed = crate::blocking(move || {
            self.remove(&id);
            Ok(())
        });
        if let Err(e) = removed.await {
            log::error!("{e}");
        }
    }

    /// Removes a container's mounts and directories. Blocks.
    pub fn remove(&self, id: &str) {
        let mounted = self.path.join(id);
        if let Err(e) = mounts::unmount_all(&mounted) {
            log::error!("unmount {}: {e}", mounted.display());
        }
        // Below the mount no mount of a container is in the way, so this cannot reach a user's files.
        match fs::remove_dir_all(self.directory(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => log::error!("remove {}: {e}", mounted.display()),
            _ => {}
        }
    }
}

/// The volumes of a container in which the host's changes are to raise events, relative to the share: those that only the
/// host changes, and those that kubelet updates. Blocks.
pub fn watched(id: &str, spec: &Spec, sources: &[Source]) -> Vec<PathBuf> {
    let volumes = spec.mounts.iter().zip(sources).enumerate();
    let watched = volumes.filter(|(_, (mount, source))| {
        let Source::Host(source) = source else { return false };
        let updated = || source.join("..data").is_symlink();
        source.is_dir() && (is_read_only(&mount.options) || updated())
    });
    watched.map(|(number, _)| Path::new(id).join("mounts").join(number.to_string())).collect()
}

/// Binds a file or directory of the host. `point` and `target` are the same place, the first below the share's
/// read-only mount and the second in it.
fn bind(mount: &Mount, source: &Path, point: &Path, target: &Path) -> Result<()> {
    let failed = |what: &str, e: &io::Error| {
        let (source, destination) = (source.display(), mount.destination.display());
        let reason = crate::error::reason(e).to_lowercase();
        // The words of runc, which tests and users look for.
        Error::Host(format!(
            "error mounting \"{source}\" to rootfs at \"{destination}\": {what} {source}: {reason}"
        ))
    };
    let kind = fs::metadata(source).map_err(|e| failed("stat", &e))?.file_type();
    if kind.is_socket() || kind.is_fifo() {
        log::warn!(
            "{}: a {} of the host does not connect the guest with the host",
            source.display(),
            if kind.is_fifo() { "fifo" } else { "socket" }
        );
    }
    let created = if kind.is_dir() { fs::create_dir(point) } else { File::create_new(point).map(drop) };
    created.map_err(|e| failed("create mount point for", &e))?;
    let recursive = mount.bind().unwrap_or(false);
    let (follows, access) = (follows(&mount.options), access(&mount.options));
    mounts::bind(source, target, recursive, follows, access).map_err(|e| failed("mount", &e))
}

/// Whether later mounts of the host are to appear: as with runc, unless the mount is private.
fn follows(options: &[String]) -> bool {
    let private =
        |option: &String| ["private", "rprivate", "unbindable", "runbindable"].contains(&option.as_str());
    !options.iter().any(private)
}

/// Read-only on the host as well: the guest's word is not enough.
fn access(options: &[String]) -> Access {
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

/// Removes a whole share without a [`Share`]: its mounts, then its directories. Blocks.
pub fn destroy(path: &Path) -> io::Result<()> {
    mounts::unmount_all(path)?;
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes one container's part of a share without a [`Share`], as far as the read-only mount lets it: the
/// mounts go now, the empty directories with the share. Blocks.
pub fn unmount_container(path: &Path, id: &str) -> io::Result<()> {
    mounts::unmount_all(&path.join(id))
}

#[cfg(test)]
#[path = "share/tests.rs"]
mod tests;
