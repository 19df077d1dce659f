//! The writable layer of a root as a disk of the guest: an image in the upper directory of the snapshot, and of the
//! snapshotter's overlay the read-only rest, which is shared.
//!
//! The image lies where what a container writes would lie otherwise, so that containerd and kubelet count it and it goes
//! with the snapshot.

use std::path::Path;

use katana_config::{Config, WritableLayer};
use katana_protocol::GUEST_SHARE;
use nix::sys::statfs::statfs;

use super::ext4::LEAST;
use super::image::Image;
use super::rootfs::Layer;
use crate::spec::Spec;

/// What becomes a disk of the guest instead of being shared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    /// Where what is written to roots goes; by default it depends on the container.
    pub layer: Option<WritableLayer>,
    /// MiB of an image.
    pub mib: u32,
    /// Whether directories of a pod alone do.
    pub volumes: bool,
    /// MiB of the image of one, at most.
    pub volume_mib: u32,
}

impl Policy {
    /// Nothing does.
    #[cfg(test)]
    pub const NONE: Self =
        Self { layer: Some(WritableLayer::Shared), mib: 64, volumes: false, volume_mib: 64 };

    /// As the configuration of the pod says.
    pub fn of(config: &Config) -> Self {
        let (hypervisor, runtime) = (&config.hypervisor, &config.runtime);
        Self {
            layer: hypervisor.writable_layer,
            mib: hypervisor.writable_layer_size,
            volumes: !runtime.disable_guest_empty_dir,
            volume_mib: runtime.empty_dir_size,
        }
    }

    /// Bytes of the image of a root.
    pub fn bytes(self) -> u64 {
        u64::from(self.mib) << 20
    }

    /// Bytes of the image of a volume: what is as large as the host's file system has room for what that has.
    pub fn volume_bytes(self, directory: &Path) -> u64 {
        let most = u64::from(self.volume_mib) << 20;
        let host = statfs(directory)
            .ok()
            .and_then(|status| status.blocks().checked_mul(u64::try_from(status.block_size()).ok()?));
        host.map_or(most, |host| host.clamp(LEAST, most.max(LEAST)))
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
    /// It.
    pub image: Image,
    /// What is shared of the root.
    below: Layer,
    /// The name of that in the container's directory of the share.
    name: &'static str,
}

impl Writable {
    /// That of a root that is an overlay; `None` if its upper directory has to be shared. Blocks.
    pub fn of(layers: &[Layer], spec: &Spec, policy: Policy) -> Option<Self> {
        let [layer] = layers else { return None };
        let (upper, below) = split(layer)?;
        // Containers of pods are not started again on what one has left.
        let image = Image::of(upper, policy.bytes(), spec.has_own_root());
        let may_be = image.is_there() || policy.is_disk(spec) && image.would_hide_nothing();
        may_be.then(|| Self { image, below, name: spec.shared_root() })
    }

    /// What is mounted on the host and shared.
    pub fn below(&self) -> &Layer {
        &self.below
    }

    /// Where a container's guest has that.
    pub fn lower(&self, container: &str) -> String {
        format!("{GUEST_SHARE}/{container}/{}", self.name)
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

#[cfg(test)]
#[path = "writable/tests.rs"]
mod tests;
