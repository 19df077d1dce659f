//! Directories of the host that belong to one pod: emptyDirs, and those that the CRI plugin of containerd makes for the
//! volumes of an image. Instead of being shared, such a one can be a disk of the guest, whose image lies in it.
//!
//! That is decided once for each directory and machine (`machine::disks`): its containers all have it as a disk or all
//! have it shared. What has an image is a disk, since its contents are in there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use katana_protocol::GUEST_VOLUMES;

use super::image::{Image, NAME};
use super::mount_table::{self, Mounted};
use super::writable::Policy;
use crate::error::{Error, Result};
use crate::spec::{Mount, Source, Spec};

/// How kubelet and containerd name them, below a directory of their own.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const SUB_PATHS: &str = "volume-subpaths";
const CRI_PLUGIN: &str = "io.containerd.grpc.v1.cri";

/// What is the same for the same directory, and for no other while it is there: device and inode.
pub type Directory = (u64, u64);

/// A directory that a pod has alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodVolume {
    /// Its image, which may not be there.
    pub image: Image,
    /// What of it the container mounts: numbers of mounts, and relative paths.
    pub mounts: Vec<(usize, PathBuf)>,
    /// It.
    directory: PathBuf,
    /// Whether a mount asks for what only the host could give: mounts made elsewhere, translated ids.
    asks_host: bool,
}

/// Those that a container mounts. Blocks.
///
/// # Errors
/// When a part of one is mounted, and it cannot be found out which.
pub fn all(id: &str, spec: &Spec, sources: &[Source], policy: Policy) -> Result<Vec<PodVolume>> {
    let mut volumes = Vec::<PodVolume>::new();
    let Some(pod) = spec.pod_uid() else { return Ok(volumes) };
    for (number, (mount, source)) in spec.mounts.iter().zip(sources).enumerate() {
        let Source::Host(source) = source else { continue };
        // Most mounts are of other files, and nothing is asked of the host for these. What is not there is an error when
        // it is shared.
        let Some(Ok(source)) = Place::of(source, id, &pod).map(|_| fs::canonicalize(source)) else {
            continue;
        };
        let (directory, path, volatile) = match Place::of(&source, id, &pod) {
            None => continue,
            Some(Place::EmptyDir) => (source, PathBuf::new(), false),
            Some(Place::OfImage) => (source, PathBuf::new(), true),
            Some(Place::SubPath(directory)) => match origin(&source, &directory)? {
                Some(path) => (directory, path, false),
                None => continue,
            },
        };
        let asks_host = asks_host(mount);
        match volumes.iter_mut().find(|volume| volume.directory == directory) {
            Some(volume) => {
                volume.mounts.push((number, path));
                volume.asks_host |= asks_host;
            }
            None => {
                let bytes = if volatile { policy.bytes() } else { policy.volume_bytes(&directory) };
                let image = Image::of(&directory, bytes, volatile);
                volumes.push(PodVolume { image, mounts: vec![(number, path)], directory, asks_host });
            }
        }
    }
    Ok(volumes)
}

impl PodVolume {
    /// Whether it may become a disk, if so many emptyDirs of a pod may. Blocks.
    pub fn may_be_disk(&self, policy: Policy, most: usize) -> bool {
        policy.volumes
            && !self.asks_host
            && !is_mounted(&self.directory)
            && self.would_hide_nothing()
            && (self.image.is_volatile() || others_with_images(&self.directory) < most)
    }

    /// Whether there is nothing in the directory but what the guest makes as well: the directories that lead to what the
    /// container mounts, which kubelet makes for subPaths. What an image has in a volume is copied by containerd.
    fn would_hide_nothing(&self) -> bool {
        if self.image.is_volatile() {
            return self.image.would_hide_nothing();
        }
        let mounted = |path: &Path| self.mounts.iter().any(|(_, mounted)| mounted.starts_with(path));
        let mut left = vec![PathBuf::new()];
        while let Some(next) = left.pop() {
            let Ok(entries) = fs::read_dir(self.directory.join(&next)) else { return false };
            for entry in entries {
                let Ok(entry) = entry else { return false };
                let path = next.join(entry.file_name());
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() && mounted(&path) => left.push(path),
                    _ if Image::is_unfinished(path.as_os_str()) => {}
                    _ => return false,
                }
            }
        }
        true
    }

    /// What tells it from other directories; nothing if it is gone. Blocks.
    pub fn identity(&self) -> Option<Directory> {
        fs::metadata(&self.directory).map(|status| (status.dev(), status.ino())).ok()
    }

    /// Where the guest has what the mounts are of.
    pub fn in_guest(&self, slot: u32) -> impl Iterator<Item = (usize, PathBuf)> {
        let top = Path::new(GUEST_VOLUMES).join(slot.to_string()).join("upper");
        self.mounts.iter().map(move |(number, path)| {
            (*number, if path.as_os_str().is_empty() { top.clone() } else { top.join(path) })
        })
    }
}

/// Which of them a path names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    EmptyDir,
    /// Part of a volume, which is this directory if it is an emptyDir.
    SubPath(PathBuf),
    OfImage,
}

impl Place {
    /// Those of other pods, which a hostPath may name, are none of them.
    fn of(path: &Path, container: &str, pod: &str) -> Option<Self> {
        let names: Vec<_> = path
            .components()
            .rev()
            .map_while(|component| match component {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .take(6)
            .collect();
        match *names.as_slice() {
            [_, EMPTY_DIR, "volumes", uid, "pods", ..] if uid == pod => Some(Self::EmptyDir),
            [_, _, volume, SUB_PATHS, uid, "pods", ..] if uid == pod => {
                let directory = path.ancestors().nth(4)?;
                Some(Self::SubPath(directory.join("volumes").join(EMPTY_DIR).join(volume)))
            }
            [_, "volumes", id, "containers", CRI_PLUGIN, ..] if id == container => Some(Self::OfImage),
            _ => None,
        }
    }
}

/// The path in a directory of what kubelet has bound to `point`; nothing if `point` is part of another volume, whose name
/// may be the same.
fn origin(point: &Path, directory: &Path) -> Result<Option<PathBuf>> {
    if !directory.exists() {
        return Ok(None);
    }
    let mounts = mount_table::host().map_err(|e| Error::io("mountinfo", &e))?;
    if !mounts.iter().any(|mounted| mounted.point == point) {
        return Err(Error::FailedPrecondition(format!(
            "subPath {}: nothing is mounted there",
            point.display()
        )));
    }
    Ok(relative(point, directory, &mounts))
}

fn relative(point: &Path, directory: &Path, mounts: &[Mounted]) -> Option<PathBuf> {
    let bound = mounts.iter().rfind(|mounted| mounted.point == point)?;
    // The mount that shows the directory, as that of the longest path.
    let around = mounts.iter().filter(|mounted| directory.starts_with(&mounted.point));
    let around = around.max_by_key(|mounted| mounted.point.components().count())?;
    let within = around.root()?.join(directory.strip_prefix(&around.point).ok()?);
    let path = bound.root()?.strip_prefix(within).ok()?.to_owned();
    (bound.device() == around.device()).then_some(path)
}

fn asks_host(mount: &Mount) -> bool {
    let asks = |option: &String| {
        ["shared", "rshared", "slave", "rslave", "idmap", "ridmap"].contains(&option.as_str())
    };
    let mapped =
        |name| mount.rest.get(name).and_then(|map| map.as_array()).is_some_and(|map| !map.is_empty());
    mount.options.iter().any(asks) || mapped("uidMappings") || mapped("gidMappings")
}

/// An emptyDir in memory or in huge pages is a mount.
fn is_mounted(directory: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|status| status.dev()).ok();
    directory.parent().is_none_or(|parent| device(parent).is_none() || device(parent) != device(directory))
}

/// How many of a pod's emptyDirs have images.
fn others_with_images(directory: &Path) -> usize {
    let all = directory.parent().map(fs::read_dir);
    let Some(Ok(entries)) = all else { return usize::MAX };
    entries.flatten().filter(|entry| entry.path().join(NAME).exists()).count()
}

#[cfg(test)]
#[path = "pod_volumes/tests.rs"]
mod tests;
