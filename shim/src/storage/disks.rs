//! Disks: block devices and images that a container uses, in the machine's slots for them.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use katana_protocol::agent as api;
use nix::sys::stat::{major, minor};
use serde_json::{Map, Value};

use super::image::Image;
use super::pod_volumes::{self, PodVolume};
use super::rootfs::Layer;
use super::vmm_files;
use super::writable::{Policy, Writable};
use crate::error::{Error, Result};
use crate::spec::{Device, Source, Spec};

/// File systems on disks that the guest's kernel can mount.
const GUEST_FILE_SYSTEMS: [&str; 2] = ["ext4", "erofs"];

/// What a container uses a disk for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// A device of its specification, or the source of the mount of this number.
    Device(Option<usize>),
    /// Its root.
    Root {
        /// The file system.
        kind: String,
        /// How it is mounted, in the form of fstab.
        options: Vec<String>,
    },
    /// The writable layer of its root.
    Writable(Writable),
    /// A directory that its pod has alone.
    Volume(PodVolume),
}

/// What a disk is to the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is no limit.
    Device,
    /// The writable layer of a root.
    Root,
    /// An emptyDir.
    EmptyDir,
    /// A volume of an image.
    VolumeOfImage,
}

/// A disk that a container wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The device or image on the host.
    pub path: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What for.
    pub purpose: Purpose,
    /// The device that the container's rules were asked about, if the path is the container's to choose: it may lead
    /// elsewhere by now.
    pub checked: Option<(i64, i64)>,
}

/// A disk that is open.
pub struct Opened {
    path: PathBuf,
    file: File,
    read_only: bool,
    purpose: Purpose,
    /// The device's numbers; 0 for an image.
    numbers: (u32, u32),
    identity: Identity,
}

/// The same disk has the same: of a device its number, of an image file system and inode.
pub type Identity = (bool, u64, u64);

/// The disks that a container wants: block devices that its specification names, and a root that the guest can mount
/// itself, or its writable layer, and directories that its pod has alone. Blocks.
pub fn wanted(
    id: &str,
    spec: &Spec,
    sources: &[Source],
    layers: &[Layer],
    policy: Policy,
) -> Result<Vec<Wanted>> {
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let rules = Rules::of(resources);
    let writable = || {
        let writable = Writable::of(layers, spec, policy)?;
        let path = writable.image.path().to_owned();
        Some(Wanted { path, read_only: false, purpose: Purpose::Writable(writable), checked: None })
    };
    let mut wanted: Vec<_> = root(layers).into_iter().collect();
    let has_root = !wanted.is_empty();
    for device in spec.linux.iter().flat_map(|linux| &linux.devices).filter(|device| device.kind == "b") {
        // Privileged containers get the numbers of all disks of the host, for what they might need.
        if !rules.allow_all() {
            let path = path_of(device)?;
            let read_only = !rules.allow(device.major, device.minor, 'w');
            wanted.push(Wanted { path, read_only, purpose: Purpose::Device(None), checked: None });
        }
    }
    for (number, (mount, source)) in spec.mounts.iter().zip(sources).enumerate() {
        if let Source::BlockDevice(path) = source {
            // Whoever may name the node has not been given the device: with runc its node is there and cannot be
            // opened.
            let node = fs::metadata(path).map_err(|e| Error::io(path.display(), &e))?;
            let (major, minor) = numbers(&node).ok_or_else(|| is_another(path))?;
            if !rules.allow(major, minor, 'r') {
                return Err(Error::InvalidArgument(format!(
                    "mount of block device {}: the container's device rules do not allow {major}:{minor} (a volume with \
                     volumeMode: Block, or --device, does)",
                    path.display()
                )));
            }
            let writes = crate::storage::volumes::access(&mount.options).lets_write()
                && rules.allow(major, minor, 'w');
            let read_only = !writes;
            let (purpose, checked) = (Purpose::Device(Some(number)), Some((major, minor)));
            wanted.push(Wanted { path: path.clone(), read_only, purpose, checked });
        }
    }
    // Last: the others are needed.
    if !has_root {
        wanted.extend(writable());
    }
    wanted.extend(pod_volumes::all(id, spec, sources, policy)?.into_iter().map(|volume| {
        let path = volume.image.path().to_owned();
        Wanted { path, read_only: false, purpose: Purpose::Volume(volume), checked: None }
    }));
    Ok(wanted)
}

/// A root that is one file system on a device or in an image. More than one mount, overlays, and what the guest's
/// kernel does not know are mounted on the host.
fn root(layers: &[Layer]) -> Option<Wanted> {
    let [layer] = layers else { return None };
    let mountable = GUEST_FILE_SYSTEMS.contains(&layer.kind.as_str()) && layer.target.is_empty();
    let path = PathBuf::from(&layer.source);
    let kind = fs::metadata(&path).ok().filter(|_| mountable)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let loops = |option: &&String| *option == "loop" || option.starts_with("loop=");
    let options: Vec<_> = layer.options.iter().filter(|option| !loops(option)).cloned().collect();
    // erofs has no other way.
    let read_only = layer.kind == "erofs" || options.iter().any(|option| option == "ro");
    let purpose = Purpose::Root { kind: layer.kind.clone(), options };
    Some(Wanted { path, read_only, purpose, checked: None })
}

/// The node of a device that a specification names by its numbers: the kernel knows it.
fn path_of(device: &Device) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", device.major, device.minor));
    let path = text.ok().and_then(|text| {
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        Some(Path::new("/dev").join(name))
    });
    path.ok_or_else(|| {
        let (path, major, minor) = (device.path.display(), device.major, device.minor);
        Error::InvalidArgument(format!("device {path}: the host has no block device {major}:{minor}"))
    })
}

fn is_another(path: &Path) -> Error {
    Error::InvalidArgument(format!(
        "disk {}: it is not the block device any more that it was",
        path.display()
    ))
}

/// Those of the device that a node stands for; nothing of what is none.
fn numbers(node: &fs::Metadata) -> Option<(i64, i64)> {
    let number = |part: u64| i64::try_from(part).unwrap_or(i64::MAX);
    let is_device = node.file_type().is_block_device();
    is_device.then(|| (number(major(node.rdev())), number(minor(node.rdev()))))
}

impl Purpose {
    /// The image that a shim makes for it.
    fn image(&self) -> Option<&Image> {
        match self {
            Self::Writable(writable) => Some(&writable.image),
            Self::Volume(volume) => Some(&volume.image),
            Self::Device(_) | Self::Root { .. } => None,
        }
    }

    /// What it is to the slots.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Writable(_) => Kind::Root,
            Self::Volume(volume) if volume.image.is_volatile() => Kind::VolumeOfImage,
            Self::Volume(_) => Kind::EmptyDir,
            Self::Device(_) | Self::Root { .. } => Kind::Device,
        }
    }
}

impl Wanted {
    /// Whether there is no other way: a root on a device can also be mounted on the host, and a directory be shared that has
    /// no image yet.
    pub fn is_needed(&self) -> bool {
        match &self.purpose {
            Purpose::Device(_) => true,
            Purpose::Writable(Writable { image, .. }) | Purpose::Volume(PodVolume { image, .. }) => {
                image.is_there()
            }
            Purpose::Root { .. } => {
                !fs::metadata(&self.path).is_ok_and(|status| status.file_type().is_block_device())
            }
        }
    }

    /// The directory that it is of, if it is a volume. Blocks.
    pub fn directory(&self) -> Option<pod_volumes::Directory> {
        match &self.purpose {
            Purpose::Volume(volume) => volume.identity(),
            _ => None,
        }
    }

    /// Opens it; an image is made, if it is not there. Blocks.
    pub fn open(self) -> Result<Opened> {
        let Some(image) = self.purpose.image().cloned() else { return self.open_what_is_there() };
        let was_there = image.is_there();
        if !was_there {
            image.make()?;
        }
        let opened = self.open_what_is_there();
        if opened.is_err() && !was_there {
            image.discard();
        }
        opened
    }

    fn open_what_is_there(self) -> Result<Opened> {
        let failed = |e: &io::Error| Error::io(format_args!("disk {}", self.path.display()), e);
        let file = vmm_files::open(&self.path, File::options().read(true).write(!self.read_only));
        let file = file.map_err(|e| failed(&e))?;
        let status = file.metadata().map_err(|e| failed(&e))?;
        if self.checked.is_some() && self.checked != numbers(&status) {
            return Err(is_another(&self.path));
        }
        let parts = |number| {
            let part = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
            (part(major(number)), part(minor(number)))
        };
        let (numbers, identity) = if status.file_type().is_block_device() {
            (parts(status.rdev()), (true, status.rdev(), 0))
        } else {
            ((0, 0), (false, status.dev(), status.ino()))
        };
        let Self { path, read_only, purpose, .. } = self;
        Ok(Opened { path, file, read_only, purpose, numbers, identity })
    }
}

/// The rules of a device cgroup.
struct Rules<'a>(Vec<&'a Map<String, Value>>);

impl<'a> Rules<'a> {
    fn of(resources: Option<&'a Map<String, Value>>) -> Self {
        let list = resources.and_then(|resources| resources.get("devices")).and_then(Value::as_array);
        Self(list.into_iter().flatten().filter_map(Value::as_object).collect())
    }

    fn allow_all(&self) -> bool {
        let any = |rule: &&Map<String, Value>| {
            matches!(rule.get("type").and_then(Value::as_str), None | Some("a"))
                && rule.get("major").and_then(Value::as_i64).is_none_or(|number| number < 0)
        };
        self.0.iter().any(|rule| any(rule) && rule.get("allow").and_then(Value::as_bool) == Some(true))
    }

    /// Whether a block device may be read ('r') or written to ('w'): the last rule that speaks of it decides.
    fn allow(&self, major: i64, minor: i64, wanted: char) -> bool {
        let is = |rule: &Map<String, Value>, name, number| {
            rule.get(name).and_then(Value::as_i64).is_none_or(|given| given < 0 || given == number)
        };
        let speaks = |rule: &&&Map<String, Value>| {
            let kind = rule.get("type").and_then(Value::as_str).unwrap_or("a");
            let access = rule.get("access").and_then(Value::as_str).unwrap_or_default();
            let everything = kind == "a";
            (everything || kind == "b" && access.contains(wanted))
                && is(rule, "major", major)
                && is(rule, "minor", minor)
        };
        let last = self.0.iter().rev().find(speaks);
        last.is_none_or(|rule| rule.get("allow").and_then(Value::as_bool) == Some(true))
    }
}

impl Opened {
    /// The descriptor, for the VMM.
    pub fn into_file(self) -> OwnedFd {
        self.file.into()
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Has an image for this VMM alone, until that has closed it. Two guests would destroy the file system.
    ///
    /// # Errors
    /// When another one has it.
    pub fn lock(&self) -> Result<()> {
        let Some(image) = self.purpose.image() else { return Ok(()) };
        // flock(2)
        self.file.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => {
                Error::FailedPrecondition(format!("image {}: another pod uses it", image.path().display()))
            }
            TryLockError::Error(e) => Error::io(format_args!("lock image {}", image.path().display()), &e),
        })
    }

    /// It is not used after all: an image that was made for it is removed. Blocks.
    pub fn discard(self) {
        if let Some(image) = self.purpose.image() {
            image.discard();
        }
    }

    /// The device or image on the host.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same for the same disk.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// What it is to the slots.
    pub fn kind(&self) -> Kind {
        self.purpose.kind()
    }

    /// Whether nobody reads it when the last container that uses it is gone.
    pub fn is_volatile(&self) -> bool {
        self.purpose.image().is_some_and(Image::is_volatile)
    }

    /// What for.
    pub fn purpose(&self) -> &Purpose {
        &self.purpose
    }

    /// For the agent.
    pub fn message(&self, slot: u8, container: &str) -> api::Disk {
        let (major, minor) = self.numbers;
        let disk = api::Disk { slot: slot.into(), major, minor, ..Default::default() };
        match &self.purpose {
            Purpose::Root { kind, options } => {
                api::Disk { file_system: kind.clone(), options: options.clone(), ..disk }
            }
            Purpose::Writable(writable) => {
                api::Disk { lower: writable.lower(container), volatile: self.is_volatile(), ..disk }
            }
            Purpose::Volume(volume) => {
                let paths = volume.mounts.iter().map(|(_, path)| path.to_string_lossy().into_owned());
                api::Disk { volumes: paths.collect(), volatile: self.is_volatile(), ..disk }
            }
            Purpose::Device(_) => disk,
        }
    }
}

#[cfg(test)]
#[path = "disks/tests.rs"]
mod tests;
