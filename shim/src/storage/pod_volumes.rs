//! Directories of the host that belong to one pod: emptyDirs, and those that the CRI plugin of containerd makes for the
//! volumes of an image. Instead of being shared, such a one becomes a disk of the guest, whose image lies in it.
//!
//! Either all of a pod's containers have it as a disk or none: one that is shared once is marked, and stays so.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use katana_protocol::GUEST_VOLUMES;

use super::image::Image;
use super::mount_table::{self, Mounted};
use super::writable::Policy;
use crate::host::mark::{is_marked, mark};
use crate::spec::Mount;

/// How kubelet and containerd name them, below a directory of their own.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const SUB_PATHS: &str = "volume-subpaths";
const CRI_PLUGIN: &str = "io.containerd.grpc.v1.cri";
/// An attribute of directories that are shared.
const SHARED: &CStr = c"trusted.katana.shared";

/// A directory that is to be a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodVolume {
    /// Its image.
    pub image: Image,
    /// What of it the container mounts, a relative path.
    pub path: PathBuf,
    directory: PathBuf,
}

impl PodVolume {
    /// That of a mount with this source; `None` if it is to be shared. Blocks.
    pub fn of(mount: &Mount, source: &Path, policy: Policy) -> Option<Self> {
        let source = fs::canonicalize(source).ok()?;
        let (directory, path, volatile) = match Place::of(&source)? {
            Place::EmptyDir => (source, PathBuf::new(), false),
            Place::OfImage => (source, PathBuf::new(), true),
            Place::SubPath => {
                let mounts = mount_table::host().ok()?;
                let (directory, path) = origin(&source, &mounts)?;
                (directory, path, false)
            }
        };
        let volume = Self { image: Image::of(&directory, policy.bytes(), volatile), path, directory };
        if volume.image.is_there() {
            return Some(volume);
        }
        if is_marked(&volume.directory, SHARED) {
            return None;
        }
        let can = policy.volumes
            && is_plain(mount)
            && !is_mounted(&volume.directory)
            && volume.image.would_hide_nothing();
        if can {
            return Some(volume);
        }
        volume.share();
        None
    }

    /// It is not made a disk, now and later. Blocks.
    pub fn share(&self) {
        if let Err(e) = mark(&self.directory, SHARED) {
            // Then no image can be marked there either, and none is used that is not.
            log::debug!("{}: {e}", self.directory.display());
        }
    }

    /// Where the guest has what the container mounts.
    pub fn in_guest(&self, slot: u32) -> PathBuf {
        let top = Path::new(GUEST_VOLUMES).join(slot.to_string()).join("upper");
        if self.path.as_os_str().is_empty() { top } else { top.join(&self.path) }
    }
}

/// Which of them a path names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    EmptyDir,
    /// Part of a volume, which may be an emptyDir.
    SubPath,
    OfImage,
}

impl Place {
    fn of(path: &Path) -> Option<Self> {
        let names: Vec<_> = path
            .components()
            .rev()
            .map_while(|component| match component {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .take(5)
            .collect();
        match *names.as_slice() {
            [_, EMPTY_DIR, "volumes", _, "pods"] => Some(Self::EmptyDir),
            [_, _, _, SUB_PATHS, _] => Some(Self::SubPath),
            [_, "volumes", _, "containers", CRI_PLUGIN] => Some(Self::OfImage),
            _ => None,
        }
    }
}

/// The emptyDir of which `point`, PODS/UID/volume-subpaths/VOLUME/CONTAINER/NUMBER, shows a part, and the part's path in
/// it. kubelet binds it there.
fn origin(point: &Path, mounts: &[Mounted]) -> Option<(PathBuf, PathBuf)> {
    let volume = point.ancestors().nth(2)?;
    let pod = volume.ancestors().nth(2)?;
    let directory = pod.join("volumes").join(EMPTY_DIR).join(volume.file_name()?);
    // Paths in mountinfo are relative to the root of the file system, which may be mounted anywhere.
    let known: PathBuf = directory.components().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect();
    let root = mounts.iter().rfind(|mounted| mounted.point == point)?.root()?;
    let path =
        root.ancestors().find(|part| part.ends_with(&known)).and_then(|top| root.strip_prefix(top).ok());
    let device = |path: &Path| fs::metadata(path).map(|status| status.dev()).ok();
    Some((directory.clone(), path?.to_owned())).filter(|_| device(point) == device(&directory))
}

/// Whether nothing is asked for that only the host could give: mounts made elsewhere, translated ids.
fn is_plain(mount: &Mount) -> bool {
    let asks = |option: &String| {
        ["shared", "rshared", "slave", "rslave", "idmap", "ridmap"].contains(&option.as_str())
    };
    let mapped =
        |name| mount.rest.get(name).and_then(|map| map.as_array()).is_some_and(|map| !map.is_empty());
    !mount.options.iter().any(asks) && !mapped("uidMappings") && !mapped("gidMappings")
}

/// An emptyDir in memory or in huge pages is a mount.
fn is_mounted(directory: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|status| status.dev()).ok();
    directory.parent().is_none_or(|parent| device(parent).is_none() || device(parent) != device(directory))
}

#[cfg(test)]
#[path = "pod_volumes/tests.rs"]
mod tests;
