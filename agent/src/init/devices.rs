//! Device nodes of a container (runtime-spec, config-linux.md, "Devices", "Default Devices"; runtime-linux.md, "Dev
//! symbolic links").

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use katana_protocol::mount::{attach_mount, clone_mount};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, makedev, mknod, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::confined::{Make, is};
use super::control::{Failure, Result, reason};
use super::mounts;
use super::rootfs::Rootfs;

/// Where nodes are made that a container can only have by a bind mount, below a directory of the container's: whoever
/// may change the mode of one changes the file itself, so that no two have one in common.
const STAGE: &str = "/run/kata-containers/devices";

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    path: PathBuf,
    kind: SFlag,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

const DEFAULT: &[(&str, u64, u64)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Containers that may use all devices find on a host what `mount -o loop` needs: where a free loop device is asked
/// for, and the first eight, as many as Linux makes at boot unless configured otherwise. Here they come when they are
/// opened. Linux, Documentation/admin-guide/devices.txt.
const LOOP_CONTROL: (u64, u64) = (10, 237);
const LOOP_MAJOR: u64 = 7;
const LOOPS: u64 = 8;

const LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
];

/// Makes the container's nodes aside if it has a user namespace, in which it could make none.
pub fn prepare(id: &str, spec: &Spec, user_namespace: bool) -> Result<()> {
    if user_namespace && !mounts::binds_dev(spec) {
        for device in all(spec)? {
            device.stage(id).map_err(|error| device.failure(&error))?;
        }
    }
    Ok(())
}

/// Makes every node and link, unless /dev is bound from somewhere that has them.
pub fn create(id: &str, rootfs: &Rootfs, spec: &Spec) -> Result<()> {
    if mounts::binds_dev(spec) {
        return Ok(());
    }
    for device in all(spec)? {
        device.create(rootfs, id).map_err(|error| device.failure(&error))?;
    }
    let core = if Path::new("/proc/kcore").exists() { LINKS.len() } else { LINKS.len() - 1 };
    for (link, target) in LINKS.iter().take(core) {
        make_link(rootfs, link, target).map_err(Failure::during(format!("create {link}")))?;
    }
    // The multiplexer of the container's own devpts. One that an image brings would be the guest's.
    replace_link(rootfs, "/dev/ptmx", "pts/ptmx").map_err(Failure::during("create /dev/ptmx"))
}

fn all(spec: &Spec) -> Result<Vec<Device>> {
    let listed = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let mut devices = listed.into_iter().flatten().map(Device::of).collect::<Result<Vec<_>>>()?;
    // The container's own terminal takes this place.
    devices
        .retain(|device| device.path != Path::new("/dev/ptmx") && device.path != Path::new("/dev/console"));
    let mut add = |path: PathBuf, kind, (major, minor), mode| {
        if !devices.iter().any(|device| device.path == path) {
            devices.push(Device { path, kind, major, minor, mode, uid: 0, gid: 0 });
        }
    };
    for (path, major, minor) in DEFAULT {
        add(PathBuf::from(path), SFlag::S_IFCHR, (*major, *minor), 0o666);
    }
    if may_use_all(spec) {
        add(PathBuf::from("/dev/loop-control"), SFlag::S_IFCHR, LOOP_CONTROL, 0o660);
        for minor in 0..LOOPS {
            add(format!("/dev/loop{minor}").into(), SFlag::S_IFBLK, (LOOP_MAJOR, minor), 0o660);
        }
    }
    Ok(devices)
}

/// Whether the last rule that speaks of all devices allows them: the container is privileged.
fn may_use_all(spec: &Spec) -> bool {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let of_all = |rule: &&LinuxDeviceCgroup| matches!(rule.typ(), None | Some(LinuxDeviceType::A));
    rules.iter().rev().find(of_all).is_some_and(LinuxDeviceCgroup::allow)
}

impl Device {
    fn of(device: &LinuxDevice) -> Result<Self> {
        let wrong = |why| Failure::invalid(format!("device {}: {why}", device.path().display()));
        let kind = match device.typ() {
            LinuxDeviceType::B => SFlag::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
            LinuxDeviceType::P => SFlag::S_IFIFO,
            LinuxDeviceType::A => return Err(wrong("\"a\" is no type of a node")),
        };
        // The kernel's device numbers: 12 and 20 bits.
        let number = |number: i64, bits: u32| {
            u64::try_from(number)
                .ok()
                .filter(|number| *number < 1 << bits)
                .ok_or_else(|| wrong("number out of range"))
        };
        Ok(Self {
            path: device.path().clone(),
            kind,
            major: number(device.major(), 12)?,
            minor: number(device.minor(), 20)?,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        })
    }

    fn failure(&self, error: &io::Error) -> Failure {
        Failure::internal(format!("create device {}: {}", self.path.display(), reason(error)))
    }

    fn number(&self) -> libc::dev_t {
        makedev(self.major, self.minor)
    }

    fn create(&self, rootfs: &Rootfs, id: &str) -> io::Result<()> {
        let (directory, name) = rootfs.root.parent(&self.path)?;
        match mknodat(&directory, name, self.kind, Mode::from_bits_truncate(self.mode), self.number()) {
            Ok(()) => (),
            Err(Errno::EEXIST) if self.is_there(&directory, name) => (),
            // A user namespace, or a /dev on the shared file system: no node can be made there.
            Err(Errno::EPERM | Errno::EEXIST) => return self.bind(rootfs, id),
            Err(error) => return Err(error.into()),
        }
        let (uid, gid) = (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)));
        fchownat(&directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        Ok(fchmodat(&directory, name, Mode::from_bits_truncate(self.mode), FchmodatFlags::FollowSymlink)?)
    }

    fn is_there(&self, directory: &OwnedFd, name: &std::ffi::OsStr) -> bool {
        let status =
            openat(directory, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
                .and_then(|node| fstat(&node));
        status.is_ok_and(|status: FileStat| is(&status, self.kind) && status.st_rdev == self.number())
    }

    fn bind(&self, rootfs: &Rootfs, id: &str) -> io::Result<()> {
        let target = rootfs.root.ensure(&self.path, Make::File)?;
        mounts::check_proc(&target, false)?;
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let node = match open(&self.staged(id), flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                self.stage(id)?;
                open(&self.staged(id), flags, Mode::empty())?
            }
            other => other?,
        };
        attach_mount(clone_mount(node, false)?, target)
    }

    fn staged(&self, id: &str) -> PathBuf {
        Path::new(STAGE).join(id).join(format!("{:x}-{}-{}", self.kind.bits(), self.major, self.minor))
    }

    /// Makes the node aside.
    fn stage(&self, id: &str) -> io::Result<()> {
        let place = self.staged(id);
        fs::create_dir_all(place.parent().unwrap_or(Path::new(STAGE)))?;
        match mknod(&place, self.kind, Mode::from_bits_truncate(self.mode), self.number()) {
            Ok(()) => fs::set_permissions(&place, PermissionsExt::from_mode(self.mode)),
            // One device under two names.
            Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Removes what was made aside for a container that is gone.
pub fn forget(id: &str) {
    match fs::remove_dir_all(Path::new(STAGE).join(id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("devices of container {id}: {error}");
        }
        _ => {}
    }
}

fn make_link(rootfs: &Rootfs, link: &str, target: &str) -> io::Result<()> {
    let (directory, name) = rootfs.root.parent(Path::new(link))?;
    match symlinkat(target, directory.as_fd(), name) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn replace_link(rootfs: &Rootfs, link: &str, target: &str) -> io::Result<()> {
    let (directory, name) = rootfs.root.parent(Path::new(link))?;
    match unlinkat(directory.as_fd(), name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => (),
        Err(error) => return Err(error.into()),
    }
    Ok(symlinkat(target, directory.as_fd(), name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(devices: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"linux":{{"devices":{devices}}}}}"#)).unwrap()
    }

    #[test]
    fn a_listed_device_replaces_a_default_one() {
        let devices = all(&spec(
            r#"[{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384,"uid":5},
            {"path":"/dev/console","type":"c","major":5,"minor":1}]"#,
        ))
        .unwrap();
        assert_eq!(devices.len(), DEFAULT.len());
        assert_eq!((devices[0].mode, devices[0].uid), (0o600, 5));
    }

    #[test]
    fn loop_devices_are_for_those_who_may_use_all() {
        let count = |rules: &str| {
            let text = format!(
                r#"{{"linux":{{"resources":{{"devices":{rules}}},
                "devices":[{{"path":"/dev/loop0","type":"b","major":259,"minor":3}}]}}}}"#
            );
            all(&serde_json::from_str(&text).unwrap()).unwrap().len() - DEFAULT.len()
        };
        assert_eq!(count(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#), 9);
        assert_eq!(count(r#"[{"allow":true,"type":"a","access":"rwm"}]"#), 9);
        for rules in [
            "[]",
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"access":"rwm"}]"#,
            r#"[{"allow":true,"type":"c","access":"rwm"}]"#,
        ] {
            assert_eq!(count(rules), 1, "{rules}");
        }
    }

    #[test]
    fn numbers_and_types_that_cannot_be_are_refused() {
        for device in [
            r#"[{"path":"/dev/x","type":"a"}]"#,
            r#"[{"path":"/dev/x","type":"c","major":-1,"minor":0}]"#,
            r#"[{"path":"/dev/x","type":"c","major":4096,"minor":0}]"#,
            r#"[{"path":"/dev/x","type":"b","major":8,"minor":1048576}]"#,
        ] {
            assert_eq!(
                all(&spec(device)).unwrap_err().kind,
                super::super::control::Kind::Invalid,
                "{device}"
            );
        }
    }
}
