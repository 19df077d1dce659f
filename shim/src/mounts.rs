//! Mounts on the host: the few system calls, and what is mounted where.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, Result};

/// Longest option string mount(2) takes: one page.
const OPTIONS_MAX: usize = 4095;

/// Read-only for the mount alone, or for all below it as well ("rro").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// As the source is.
    Inherited,
    /// The mount itself is read-only.
    ReadOnly,
    /// The mount and all mounts below it are read-only.
    RecursivelyReadOnly,
}

fn path_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// A copy of the mount at `source` that is attached nowhere yet. Its flags are set before anybody can see it:
/// a mount that is attached first and made read-only later stays writable in the VMM's mount namespace, to
/// which attaching propagates and changing flags does not.
pub struct Detached(OwnedFd);

impl Detached {
    /// open_tree(2) with OPEN_TREE_CLONE.
    pub fn copy(source: &Path, recursive: bool) -> io::Result<Self> {
        let path = path_of(source)?;
        let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | u32::try_from(recursive).unwrap_or(0);
        // SAFETY: a path that outlives the call, and integers.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// mount_setattr(2): sets attributes and the propagation type.
    pub fn set(&self, attributes: u64, propagation: u64, recursive: bool) -> io::Result<()> {
        let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: an empty path, and a structure of the given size that outlives the call.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const attr,
                size_of::<libc::mount_attr>(),
            )
        })?;
        Ok(())
    }

    /// move_mount(2): attaches it.
    pub fn attach(&self, target: &Path) -> io::Result<()> {
        let path = path_of(target)?;
        // SAFETY: paths that outlive the call, and integers.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        })?;
        Ok(())
    }
}

/// Binds `source` to `target`. Mounts that the host makes below `source` later appear if the mount `follows`; none goes
/// back.
pub fn bind(source: &Path, target: &Path, recursive: bool, follows: bool, access: Access) -> io::Result<()> {
    let tree = Detached::copy(source, recursive)?;
    tree.set(0, if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE }, recursive)?;
    if access != Access::Inherited {
        tree.set(libc::MOUNT_ATTR_RDONLY, 0, access == Access::RecursivelyReadOnly)?;
    }
    tree.attach(target)
}

/// Options as mount(2) takes them.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags.
    pub flags: MsFlags,
    /// For the file system.
    pub data: Vec<String>,
}

/// Sorts options in the form of fstab.
pub fn options<'a>(list: impl IntoIterator<Item = &'a str>) -> Options {
    let mut options = Options { flags: MsFlags::empty(), data: Vec::new() };
    for option in list {
        let (flag, set) = match option {
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "diratime" => (MsFlags::MS_NODIRATIME, false),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "norelatime" => (MsFlags::MS_RELATIME, false),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
            "" | "defaults" => continue,
            _ => {
                options.data.push(option.to_owned());
                continue;
            }
        };
        options.flags.set(flag, set);
    }
    options
}

/// Mounts a file system. Blocks.
pub fn file_system(kind: &str, source: &str, list: &[String], target: &Path) -> Result<()> {
    let Options { flags, data } = options(list.iter().map(String::as_str));
    if let Some(option) = data.iter().find(|option| *option == "loop" || option.starts_with("uidmap=")) {
        let text = format!("mount of {kind} {source:?}: option {option:?} is not supported");
        return Err(Error::Unimplemented(text));
    }
    let (directory, data) = shorten(kind, &data.join(","));
    if data.len() > OPTIONS_MAX {
        return Err(Error::InvalidArgument(format!(
            "mount of {kind} {source:?}: options of {} bytes",
            data.len()
        )));
    }
    let failed = |errno| Error::os(format_args!("mount of {kind} {source:?} ({data})"), errno);
    let call = || mount(Some(source), target, Some(kind), flags, Some(data.as_str()));
    let Some(directory) = directory else { return call().map_err(failed) };
    // Relative directories need a working directory of their own, so this happens on a thread that ends.
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&directory)?;
            call()
        });
        thread.join().unwrap_or(Err(Errno::EIO))
    });
    outcome.map_err(failed)
}

/// An image of many layers has more lower directories than a page holds. Their common parent is taken as the
/// working directory then, and they become relative, as containerd does it.
fn shorten(kind: &str, data: &str) -> (Option<PathBuf>, String) {
    if kind != "overlay" || data.len() <= OPTIONS_MAX {
        return (None, data.to_owned());
    }
    let lower = data.split(',').find_map(|option| option.strip_prefix("lowerdir=")).unwrap_or_default();
    let mut layers = lower.split(':');
    let first = layers.next().unwrap_or_default();
    let shared = layers.fold(first.len(), |length, layer| {
        first.bytes().zip(layer.bytes()).take(length).take_while(|(a, b)| a == b).count()
    });
    let Some(parent) =
        first.as_bytes().get(..shared).and_then(|head| head.iter().rposition(|byte| *byte == b'/'))
    else {
        return (None, data.to_owned());
    };
    let prefix = first.get(..=parent).unwrap_or_default();
    let relative = |option: &str| match option.strip_prefix("lowerdir=") {
        Some(list) => {
            let layers: Vec<_> =
                list.split(':').map(|layer| layer.strip_prefix(prefix).unwrap_or(layer)).collect();
            format!("lowerdir={}", layers.join(":"))
        }
        None => option.to_owned(),
    };
    let data: Vec<_> = data.split(',').map(relative).collect();
    (Some(PathBuf::from(prefix)), data.join(","))
}

/// Unmounts everything at and below `directory`, the last mounted first. Blocks.
///
/// # Errors
/// When mounts are left.
pub fn unmount_all(directory: &Path) -> io::Result<()> {
    for _ in 0..3 {
        let points = below(directory)?;
        if points.is_empty() {
            return Ok(());
        }
        for point in points.iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    let left = below(directory)?;
    if left.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!("{} mounts are left below {}", left.len(), directory.display())))
}

/// The mount points at and below `directory`, in the order of mounting.
pub fn below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(all()?.into_iter().map(|mounted| mounted.point).filter(|point| point.starts_with(directory)).collect())
}

/// Whether two places, given by paths without links, show the same if they are the same directory or file: mounts with the
/// same flags, and below them the same mounts. Whether they are read-only counts if `exactly`.
pub fn look_alike(one: &Path, other: &Path, exactly: bool) -> io::Result<bool> {
    let all = all()?;
    let look = |place: &Path| {
        let flags = |mounted: &Mounted| match mounted.flags.strip_prefix("ro").filter(|_| !exactly) {
            Some(others) => format!("rw{others}"),
            None => mounted.flags.clone(),
        };
        // Of several at one point, the last one is seen.
        let here = all.iter().filter(|mounted| place.starts_with(&mounted.point));
        let top = here.max_by_key(|mounted| mounted.point.components().count()).map(flags);
        let below = all.iter().filter(|mounted| mounted.point != place);
        let below = below.filter_map(|mounted| {
            let point = mounted.point.strip_prefix(place).ok()?;
            Some((point, &mounted.origin, flags(mounted)))
        });
        (top, below.collect::<Vec<_>>())
    };
    Ok(look(one) == look(other))
}

/// A line of mountinfo, proc(5).
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    point: PathBuf,
    /// The numbers of the device, and what of its file system is mounted.
    origin: String,
    flags: String,
}

fn all() -> io::Result<Vec<Mounted>> {
    let info = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(info.split(|byte| *byte == b'\n').filter_map(mounted).collect())
}

fn mounted(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let (device, root, point, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let origin = format!("{} {}", text(device), text(root));
    Some(Mounted { point: unescape(point), origin, flags: text(flags) })
}

/// White space is written as octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(value) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            path.push(value);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            path.push(byte);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(path))
}

/// Opens a directory as a mere place.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// The path of what a descriptor stands for.
pub fn path_of_fd(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_decoded() {
        let line = b"36 35 98:0 /part /mnt/a\\040b\\134c rw,noexec shared:1 - ext4 /dev/root rw";
        let found = mounted(line).unwrap();
        assert_eq!((found.point, found.origin.as_str()), (PathBuf::from("/mnt/a b\\c"), "98:0 /part"));
        assert_eq!(found.flags, "rw,noexec");
        assert_eq!(unescape(b"/x\\9"), PathBuf::from("/x\\9"));
        assert_eq!(unescape(b"/x\\04"), PathBuf::from("/x\\04"));
        assert_eq!(mounted(b"1 2"), None);
    }

    #[test]
    fn options_become_flags_and_data() {
        let found = options(["ro", "nosuid", "suid", "rbind", "upperdir=/u", "defaults"]);
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC;
        assert_eq!(found, Options { flags, data: vec!["upperdir=/u".into()] });
    }

    #[test]
    fn many_layers_fit_a_page() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<_> = (100..228).map(|n| format!("{root}/{n}/fs")).collect();
        let data = format!("index=off,workdir={root}/9/work,lowerdir={}", lower.join(":"));
        assert!(data.len() > OPTIONS_MAX);
        let (directory, short) = shorten("overlay", &data);
        assert_eq!(directory, Some(PathBuf::from(format!("{root}/"))));
        assert!(short.len() < OPTIONS_MAX && short.ends_with(":226/fs:227/fs"), "{short}");
        assert!(short.starts_with(&format!("index=off,workdir={root}/9/work,lowerdir=100/fs:")));
        assert_eq!(shorten("overlay", "lowerdir=/a:/b").0, None);
        let strange = format!("lowerdir={}", "x:".repeat(3000));
        assert_eq!(shorten("overlay", &strange), (None, strange.clone()));
    }
}
