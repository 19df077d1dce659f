//! The machine's disks: made ready for a container, released after the last one.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use katana_protocol::agent::Disk;
use katana_protocol::mount::{MountAttributes, attach_mount, set_mount};
use katana_protocol::{GUEST_DISKS, GUEST_ROOTS, GUEST_VOLUMES};
use libc::MOUNT_ATTR_RDONLY;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, makedev, mknod};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, Spec};

use crate::init::{Make, Root, parse_mount_options};
use crate::pci::{self, Kind};
use crate::syscalls::new_mount;

/// How long the kernel may take to end a file system whose last mount is gone, and between two looks at it.
const END_LIMIT: Duration = Duration::from_secs(10);
/// The same for one that is not written any more: the shim waits for less as well.
const VOLATILE_END_LIMIT: Duration = Duration::from_secs(5);
const END_INTERVAL: Duration = Duration::from_millis(5);

/// The directory of a volume's file system that is the volume.
const VOLUME: &str = "upper";

/// What cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine has no such disk, or its driver does not take it.
    #[error("disk {0}: {1}")]
    Disk(u32, io::Error),
    /// The thread that does it has ended.
    #[error("the disks cannot be taken into use")]
    Thread,
    /// A root cannot be mounted.
    #[error("mount of {kind} on disk {slot}: {error}")]
    Mount {
        /// Of the disk.
        slot: u32,
        /// The file system.
        kind: String,
        /// Why.
        error: io::Error,
    },
}

/// The disks of a container. Its root, if that is on one, is unmounted when this is dropped, which blocks until all of it
/// is written.
#[derive(Debug, Default)]
pub struct Disks {
    devices: Vec<Device>,
    root: Option<PathBuf>,
    /// The file system of a writable layer that nobody reads later.
    volatile: Option<File>,
}

/// A block device by its numbers, on the host and in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Device {
    host: (i64, i64),
    guest: (i64, i64),
}

impl Disks {
    /// Takes disks into use.
    pub async fn take(container: &str, disks: Vec<Disk>) -> Result<Self, Error> {
        if disks.is_empty() {
            return Ok(Self::default());
        }
        let container = container.to_owned();
        let taken = tokio::task::spawn_blocking(move || Self::take_all(&container, &disks));
        taken.await.map_err(|_| Error::Thread)?
    }

    /// The root is used no more.
    pub async fn unmount(self) {
        if self.root.is_some() {
            // It may have to write much.
            let _ = tokio::task::spawn_blocking(move || drop(self)).await;
        }
    }

    fn take_all(container: &str, disks: &[Disk]) -> Result<Self, Error> {
        let mut taken = Self::default();
        for disk in disks {
            let _slot = lock_slot(disk.slot);
            let failed = |error| Error::Disk(disk.slot, error);
            let (name, guest) = find(disk.slot).map_err(failed)?;
            make_node(disk.slot, guest).map_err(failed)?;
            let numbers = |(major, minor): (u32, u32)| (i64::from(major), i64::from(minor));
            if (disk.major, disk.minor) != (0, 0) {
                taken.devices.push(Device { host: numbers((disk.major, disk.minor)), guest: numbers(guest) });
            }
            let point = Path::new(GUEST_ROOTS).join(container);
            let failed = |kind: &str| {
                let (slot, kind) = (disk.slot, kind.to_owned());
                move |error| Error::Mount { slot, kind, error }
            };
            if !disk.file_system.is_empty() {
                taken.root = Some(point.clone());
                mount(&name, disk, &point).map_err(failed(&disk.file_system))?;
            } else if !disk.lower.is_empty() {
                taken.root = Some(point.clone());
                mount(&name, &writable_layer(disk.volatile), &point).map_err(failed("ext4"))?;
                if disk.volatile {
                    taken.volatile = Some(File::open(&point).map_err(failed("ext4"))?);
                }
                mount_overlay(&disk.lower, &point).map_err(failed("overlay"))?;
            } else if !disk.volumes.is_empty() {
                let top = mount_volume(&name, disk).map_err(failed("ext4"))?;
                for path in &disk.volumes {
                    make_path(&top, Path::new(path)).map_err(failed("ext4"))?;
                }
            }
        }
        Ok(taken)
    }

    /// Replaces the host's numbers of devices by the guest's.
    pub fn translate(&self, spec: &mut Spec) {
        let Some(linux) = spec.linux_mut().as_mut() else { return };
        for device in linux.devices_mut().iter_mut().flatten() {
            let host = (device.major(), device.minor());
            if let Some((major, minor)) = self.guest(host).filter(|_| device.typ() == LinuxDeviceType::B) {
                device.set_major(major);
                device.set_minor(minor);
            }
        }
        if let Some(resources) = linux.resources_mut() {
            self.translate_rules(resources);
        }
    }

    /// Replaces the host's numbers in the rules of who may use what.
    pub fn translate_rules(&self, resources: &mut LinuxResources) {
        for rule in resources.devices_mut().iter_mut().flatten() {
            self.translate_rule(rule);
        }
    }

    fn translate_rule(&self, rule: &mut LinuxDeviceCgroup) {
        if let (Some(LinuxDeviceType::B), Some(major), Some(minor)) = (rule.typ(), rule.major(), rule.minor())
            && let Some((major, minor)) = self.guest((major, minor))
        {
            rule.set_major(Some(major));
            rule.set_minor(Some(minor));
        }
    }

    fn guest(&self, host: (i64, i64)) -> Option<(i64, i64)> {
        self.devices.iter().find(|device| device.host == host).map(|device| device.guest)
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let Some(root) = &self.root else { return };
        if let Some(layer) = self.volatile.take()
            && let Err(error) = shut_down(&layer)
        {
            log::warn!("{}: {error}", root.display());
        }
        // An overlay is mounted on its writable layer.
        loop {
            match umount2(root, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                // Not mounted any more, or not at all: that is what failed.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(error) => {
                    log::warn!("unmount {}: {error}", root.display());
                    break;
                }
            }
        }
        let _ = fs::remove_dir(root);
    }
}

/// What is shared of a root whose writable layer is on one of these disks.
pub fn shared_layers(disks: &[Disk]) -> Option<PathBuf> {
    disks.iter().find(|disk| !disk.lower.is_empty()).map(|disk| PathBuf::from(&disk.lower))
}

/// Releases a disk that no container uses any more: what was written to it is on it afterwards, unless it is volatile.
/// Blocks.
pub fn release(slot: u32, volatile: bool) -> Result<(), Error> {
    try_release(slot, volatile).map_err(|error| Error::Disk(slot, error))
}

fn try_release(slot: u32, volatile: bool) -> io::Result<()> {
    let _slot = lock_slot(slot);
    let function = pci::function(Kind::Disk, slot)?;
    let was_volume = unmount_volume(slot, volatile)?;
    if let Some(disk) = pci::made_of(&function, "block") {
        let name = disk.file_name().ok_or(io::ErrorKind::InvalidData)?;
        let limit = if volatile { VOLATILE_END_LIMIT } else { END_LIMIT };
        let device = unused(&Path::new("/dev").join(name), limit)?;
        if !volatile && !was_volume {
            // What programs wrote to the device itself.
            device.sync_all()?;
        }
    }
    pci::unbind(&function)?;
    match fs::remove_file(Path::new(GUEST_DISKS).join(slot.to_string())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Has a slot for the caller alone: a release that is given up by the shim goes on here, and another one may follow.
fn lock_slot(slot: u32) -> MutexGuard<'static, ()> {
    // As many as a machine has at most, and more.
    static SLOTS: [Mutex<()>; 32] = [const { Mutex::new(()) }; 32];
    SLOTS[slot as usize % SLOTS.len()].lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a disk when no file system is on it any more. The kernel ends one some time after its last mount, in the
/// background, and writes to it until then; it notifies nobody of that.
fn unused(device: &Path, limit: Duration) -> io::Result<File> {
    let begun = Instant::now();
    loop {
        // For a block device O_EXCL means that no file system is mounted from it (open(2)).
        match fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < limit => {
                thread::sleep(END_INTERVAL);
            }
            outcome => return outcome,
        }
    }
}

/// The node and the numbers of the disk in a slot.
fn find(slot: u32) -> io::Result<(PathBuf, (u32, u32))> {
    let function = pci::function(Kind::Disk, slot)?;
    let disk = match pci::made_of(&function, "block") {
        Some(disk) => disk,
        None => {
            pci::probe(&function)?;
            pci::made_of(&function, "block").ok_or_else(|| io::Error::other("no driver takes it"))?
        }
    };
    let name = disk.file_name().ok_or(io::ErrorKind::InvalidData)?;
    let numbers = fs::read_to_string(disk.join("dev"))?;
    let numbers = numbers.trim().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    Ok((Path::new("/dev").join(name), numbers.ok_or(io::ErrorKind::InvalidData)?))
}

/// The node that mounts of the device itself have as their source.
fn make_node(slot: u32, (major, minor): (u32, u32)) -> io::Result<()> {
    fs::create_dir_all(GUEST_DISKS)?;
    let node = Path::new(GUEST_DISKS).join(slot.to_string());
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match mknod(&node, SFlag::S_IFBLK, mode, makedev(major.into(), minor.into())) {
        // Another container has the disk as well.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Mounts a volume, unless another container of the pod has done so, and returns its top directory. Shared in the sense of
/// propagation, as what is shared by the host is: a mount that one container makes in it with `rshared` shows in others.
fn mount_volume(name: &Path, disk: &Disk) -> io::Result<PathBuf> {
    let point = Path::new(GUEST_VOLUMES).join(disk.slot.to_string());
    let top = point.join(VOLUME);
    // What is there is on the file system, and not below it.
    if !top.exists() {
        mount(name, &writable_layer(disk.volatile), &point)?;
        let none = None::<&str>;
        nix::mount::mount(none, &point, none, MsFlags::MS_SHARED, none)?;
    }
    Ok(top)
}

/// Makes a directory of a volume, as kubelet makes one of a subPath: with the mode of the volume. What is there already
/// stays, and no link in it leads out of the volume.
fn make_path(top: &Path, path: &Path) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = Root::new(open(top, flags, Mode::empty())?);
    let mode = Mode::from_bits_truncate(fstat(&root)?.st_mode & 0o7777);
    let mut made = PathBuf::new();
    for name in path.components() {
        made.push(name);
        if matches!(root.open(&made), Err(error) if error.kind() == io::ErrorKind::NotFound) {
            let directory = root.ensure(&made, Make::Directory)?;
            // Through /proc, since what is open is only a place.
            let directory = format!("/proc/self/fd/{}", directory.as_raw_fd());
            fchmodat(AT_FDCWD, directory.as_str(), mode, FchmodatFlags::FollowSymlink)?;
        }
    }
    Ok(())
}

/// Unmounts the volume in a slot, if there is one, with what containers have mounted in it: that came here by propagation.
fn unmount_volume(slot: u32, volatile: bool) -> io::Result<bool> {
    let point = Path::new(GUEST_VOLUMES).join(slot.to_string());
    if volatile && point.join(VOLUME).exists() {
        shut_down(&File::open(&point)?)?;
    }
    match umount2(&point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) => {}
        Err(Errno::EINVAL | Errno::ENOENT) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    fs::remove_dir(&point)?;
    Ok(true)
}

/// How the disk of a writable layer is mounted. What is removed from it is given back to the host. A volatile one does not
/// outlive the host, so that it need not be on the host's disk, only in the host's hands.
fn writable_layer(volatile: bool) -> Disk {
    let options = ["discard"].into_iter().chain(volatile.then_some("barrier=0"));
    let options = options.map(String::from).collect();
    Disk { file_system: "ext4".to_owned(), options, ..Disk::default() }
}

/// Has a file system write nothing from now on (`EXT4_IOC_SHUTDOWN` with `EXT4_GOING_FLAGS_NOLOGFLUSH`).
fn shut_down(layer: &File) -> io::Result<()> {
    const NO_LOG_FLUSH: u32 = 2;
    nix::ioctl_write_ptr_bad!(shutdown, nix::request_code_read!(b'X', 125, size_of::<u32>()), u32);
    // SAFETY: a descriptor, and a number that outlives the call.
    unsafe { shutdown(layer.as_raw_fd(), &NO_LOG_FLUSH) }?;
    Ok(())
}

/// Covers a writable layer, which is mounted there, by the root of which it is a part. Inode numbers tell files of the one
/// layer from those of the other, and stay the same when a file is copied up (overlayfs.rst, "Inode properties").
/// Somebody has walked into `lower` (`submounts`): the kernel does not do so by itself at the end of a path.
fn mount_overlay(lower: &str, point: &Path) -> io::Result<()> {
    let layer = |name| point.join(name).to_string_lossy().into_owned();
    let options = [
        format!("lowerdir={lower}"),
        format!("upperdir={}", layer("upper")),
        format!("workdir={}", layer("work")),
        "xino=on".to_owned(),
    ];
    let root = new_mount("overlay", "overlay", &options)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    attach_mount(root, open(point, flags, Mode::empty())?)
}

fn mount(device: &Path, disk: &Disk, point: &Path) -> io::Result<()> {
    let options = parse_mount_options(&disk.options).map_err(io::Error::other)?;
    let mut data = options.data;
    if options.attributes.set & MOUNT_ATTR_RDONLY != 0 {
        data.push("ro".to_owned());
    }
    let mount = new_mount(&disk.file_system, &device.to_string_lossy(), &data)?;
    if options.attributes != MountAttributes::default() {
        set_mount(&mount, &options.attributes, false)?;
    }
    fs::create_dir_all(point)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    attach_mount(mount, open(point, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_host_become_those_of_the_guest() {
        let devices = vec![Device { host: (7, 3), guest: (254, 16) }];
        let disks = Disks { devices, root: None, volatile: None };
        let mut spec: Spec = serde_json::from_str(
            r#"{"linux": {
                "devices": [
                    {"path": "/dev/disk", "type": "b", "major": 7, "minor": 3},
                    {"path": "/dev/other", "type": "c", "major": 7, "minor": 3}
                ],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "r"},
                    {"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rw"},
                    {"allow": true, "type": "c", "major": 7, "minor": 3, "access": "rw"}
                ]}
            }}"#,
        )
        .unwrap();
        disks.translate(&mut spec);
        let linux = spec.linux().as_ref().unwrap();
        let devices = linux.devices().as_ref().unwrap();
        assert_eq!((devices[0].major(), devices[0].minor()), (254, 16));
        assert_eq!((devices[1].major(), devices[1].minor()), (7, 3));
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        let numbers: Vec<_> = rules.iter().map(|rule| (rule.major(), rule.minor())).collect();
        assert_eq!(numbers, [(None, None), (Some(254), Some(16)), (Some(7), Some(4)), (Some(7), Some(3))]);
    }
}
