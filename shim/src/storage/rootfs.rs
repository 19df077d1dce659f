//! A container's root file system on the host.

use std::io;
use std::path::Path;

use containerd_shim_protos::api::Mount;

use super::file_system;
use super::mounts::{Access, Attachments, Detached};
use crate::error::{Error, Result};
use crate::spec::Spec;

/// One of the mounts that make up a root, as the snapshotter gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// File system, or "bind".
    pub kind: String,
    /// Device, directory or name.
    pub source: String,
    /// A directory in the root; unused by today's snapshotters.
    pub target: String,
    /// Options in the form of fstab.
    pub options: Vec<String>,
}

impl From<&Mount> for Layer {
    fn from(mount: &Mount) -> Self {
        Self {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            target: mount.target.clone(),
            options: mount.options.clone(),
        }
    }
}

impl Layer {
    fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }

    /// The directory of the host that is the root, if that is not another file system, and whether it can be written to.
    pub fn bound(&self) -> Option<(&Path, bool)> {
        let is_bind = self.kind == "bind" || self.has("bind") || self.has("rbind");
        is_bind.then(|| (Path::new(&self.source), !self.has("ro")))
    }
}

/// What makes up a root, to be mounted on `target` of the share: the snapshotter's mounts one after the other, or
/// without any the directory that the specification names. `point` is the empty directory of the host that is there.
/// Blocks.
pub fn mount(
    layers: &[Layer],
    bundle: &Path,
    spec: &Spec,
    point: &Path,
    target: &Path,
    mounts: &mut Attachments<'_>,
) -> Result<()> {
    if layers.is_empty() {
        let root = spec.root.as_ref().map_or(Path::new("rootfs"), |root| &root.path);
        bind(&bundle.join(root), true, false, target, mounts)?;
    }
    for layer in layers {
        if !layer.target.is_empty() {
            let text = format!(
                "root file system: mount of {:?} to {:?} in it is not supported",
                layer.source, layer.target
            );
            return Err(Error::Unimplemented(text));
        }
        if let Some((source, writable)) = layer.bound() {
            bind(source, layer.has("rbind"), !writable, target, mounts)?;
        } else {
            let made = file_system::make(&layer.kind, &layer.source, &layer.options, point)?;
            mounts.add(target.to_owned(), made).map_err(|e| failed(&layer.source, &e))?;
        }
    }
    Ok(())
}

fn bind(
    source: &Path,
    recursive: bool,
    read_only: bool,
    target: &Path,
    mounts: &mut Attachments<'_>,
) -> Result<()> {
    let access = if read_only { Access::ReadOnly } else { Access::Inherited };
    let bound = Detached::bound(source, recursive, true, access);
    let added = bound.and_then(|bound| mounts.add_copy(target.to_owned(), source, bound));
    added.map_err(|e| failed(&source.display(), &e))
}

fn failed(source: &dyn std::fmt::Display, error: &io::Error) -> Error {
    Error::io(format_args!("root file system {source}"), error)
}
