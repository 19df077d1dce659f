//! The writable layer of a root as a disk of the guest: an image in the upper directory of the snapshot, and of the
//! snapshotter's overlay the read-only rest, which is shared.
//!
//! The image lies where what a container writes would lie otherwise, so that containerd and kubelet count it and it goes
//! with the snapshot. It is the guest's: nothing on the host ever mounts it.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use katana_config::{Hypervisor, WritableLayer};
use katana_protocol::GUEST_SHARE;

use super::ext4::{self, Access};
use super::rootfs::Layer;
use crate::error::{Error, Result};
use crate::host::mark::{is_marked, mark};
use crate::spec::Spec;

/// The image's name in the upper directory, and while it is being made.
const IMAGE: &str = ".katana-layer.ext4";
const UNFINISHED: &str = ".katana-layer.new";
/// An attribute of images that were made here. A container whose upper directory is shared can make a file of that name,
/// but not with this.
const MARK: &CStr = c"trusted.katana.layer";

/// What containers' writable layers are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    layer: Option<WritableLayer>,
    mib: u32,
}

impl Policy {
    /// As the configuration of the pod says.
    pub fn of(hypervisor: &Hypervisor) -> Self {
        Self { layer: hypervisor.writable_layer, mib: hypervisor.writable_layer_size }
    }

    /// Whether a container's writes go to a disk if they can.
    fn is_disk(self, spec: &Spec) -> bool {
        let read_only =
            spec.root.as_ref().is_some_and(|root| root.rest.get("readonly") == Some(&true.into()));
        !read_only && self.layer.map_or(spec.has_own_root(), |layer| layer == WritableLayer::Disk)
    }
}

/// A writable layer that is to be a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writable {
    /// The image, which may not be there yet.
    pub image: PathBuf,
    /// Bytes that it has when it is made.
    bytes: u64,
    /// What is shared of the root.
    below: Layer,
    /// The name of that in the container's directory of the share.
    name: &'static str,
    /// Whether nobody reads it when the container is gone.
    volatile: bool,
}

impl Writable {
    /// That of a root that is an overlay; `None` if its upper directory has to be shared. Blocks.
    pub fn of(layers: &[Layer], spec: &Spec, policy: Policy) -> Option<Self> {
        let [layer] = layers else { return None };
        let (upper, below) = split(layer)?;
        let image = upper.join(IMAGE);
        let may_be = is_marked(&image, MARK) || policy.is_disk(spec) && is_empty(upper);
        may_be.then(|| Self {
            image,
            bytes: u64::from(policy.mib) << 20,
            below,
            name: spec.shared_root(),
            volatile: spec.has_own_root(),
        })
    }

    /// Whether nobody reads it when its container is gone: containers of pods are not started again on what one has left.
    pub fn is_volatile(&self) -> bool {
        self.volatile
    }

    /// What is mounted on the host and shared.
    pub fn below(&self) -> &Layer {
        &self.below
    }

    /// Where a container's guest has that.
    pub fn lower(&self, container: &str) -> String {
        format!("{GUEST_SHARE}/{container}/{}", self.name)
    }

    /// Whether the image is there. Blocks.
    pub fn is_there(&self) -> bool {
        is_marked(&self.image, MARK)
    }

    /// Makes the image, unless it is there. Blocks.
    pub fn make(&self) -> Result<()> {
        let failed = |e: &io::Error| Error::io(format_args!("writable layer {}", self.image.display()), e);
        if self.is_there() { Ok(()) } else { self.try_make().map_err(|e| failed(&e)) }
    }

    fn try_make(&self) -> io::Result<()> {
        let upper = self.image.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let unfinished = upper.join(UNFINISHED);
        let made = (|| {
            let status = fs::metadata(upper)?;
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
            ext4::make(&file, self.bytes, access, crate::host::random().map_err(io::Error::other)?)?;
            mark(&unfinished, MARK)?;
            if !self.volatile {
                // A name that is there after a failure of power has its contents.
                file.sync_all()?;
            }
            fs::rename(&unfinished, &self.image)
        })();
        if made.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        made
    }

    /// Removes an image that was made and is not used. Blocks.
    pub fn discard(&self) {
        let _ = fs::remove_file(&self.image);
    }
}

/// The upper directory of an overlay, and the overlay without it.
fn split(layer: &Layer) -> Option<(&Path, Layer)> {
    if layer.kind != "overlay" || !layer.target.is_empty() {
        return None;
    }
    let (mut upper, mut lower, mut rest) = (None, None, Vec::new());
    for option in &layer.options {
        match option.split_once('=') {
            Some(("upperdir", path)) => upper = Some(path),
            Some(("workdir", _)) => {}
            Some(("lowerdir", paths)) => lower = Some(paths),
            // Ids are translated by the file system, which is done to the whole of it.
            Some(("uidmap" | "gidmap", _)) => return None,
            _ if matches!(option.as_str(), "rw" | "volatile") => {}
            // Nobody writes to it, or its mount has restrictions that the guest's would not have.
            _ if ["ro", "nosuid", "nodev", "noexec"].contains(&option.as_str()) => return None,
            _ => rest.push(option.clone()),
        }
    }
    let (upper, lower) = (upper?, lower?);
    // Escapes are the kernel's to read.
    if [upper, lower].iter().any(|path| path.contains('\\')) {
        return None;
    }
    let below = if lower.contains(':') {
        rest.extend([format!("lowerdir={lower}"), "ro".to_owned()]);
        Layer { options: rest, ..layer.clone() }
    } else {
        // An overlay has two layers or more.
        Layer { kind: "bind".into(), source: lower.into(), target: String::new(), options: vec!["ro".into()] }
    };
    Some((Path::new(upper), below))
}

/// But for what an earlier shim did not finish.
fn is_empty(upper: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(upper) else { return false };
    entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == UNFINISHED))
}

#[cfg(test)]
#[path = "writable/tests.rs"]
mod tests;
