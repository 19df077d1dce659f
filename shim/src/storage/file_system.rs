//! File systems of the host, made for a container's root: detached mounts, see [`crate::storage::mounts`].

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use katana_protocol::kernel;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::mounts::{Detached, owned};
use crate::error::{Error, Result};
use crate::host::threads::on_own_thread;

/// Longest option string mount(2) takes: one page.
const OPTIONS_MAX: usize = 4095;
/// Longest value fsconfig(2) takes.
const VALUE_MAX: usize = 255;

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

/// Makes a file system. `place` is an empty directory of the host. Blocks.
pub fn make(kind: &str, source: &str, list: &[String], place: &Path) -> Result<Detached> {
    let options = options(list.iter().map(String::as_str));
    let data = &options.data;
    if let Some(option) = data.iter().find(|option| *option == "loop" || option.starts_with("uidmap=")) {
        let text = format!("mount of {kind} {source:?}: option {option:?} is not supported");
        return Err(Error::Unimplemented(text));
    }
    let (directory, data) = shorten(kind, data);
    let length = data.join(",").len();
    if length > OPTIONS_MAX {
        return Err(Error::InvalidArgument(format!("mount of {kind} {source:?}: options of {length} bytes")));
    }
    let failed = |e| Error::io(format_args!("mount of {kind} {source:?} ({})", data.join(",")), &e);
    let call = || {
        if data.iter().chain([&source.to_owned()]).all(|option| fits_fsconfig(option)) {
            new(kind, source, options.flags, &data)
        } else {
            mount_and_take(kind, source, options.flags, &data.join(","), place)
        }
    };
    let Some(directory) = directory else { return call().map_err(failed) };
    // Relative directories need a working directory of their own, so this happens on a thread that ends.
    let outcome = on_own_thread(|| {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&directory)?;
        call()
    });
    outcome.map_err(failed)
}

/// Whether an option means to fsconfig(2) what it means to mount(2), which takes escapes and longer ones.
fn fits_fsconfig(option: &str) -> bool {
    let value = option.split_once('=').map_or(option, |(_, value)| value);
    value.len() <= VALUE_MAX && !option.contains(['\\', ','])
}

/// fsopen(2), fsconfig(2), fsmount(2): nobody sees the mount on the host.
fn new(kind: &str, source: &str, flags: MsFlags, data: &[String]) -> io::Result<Detached> {
    let invalid = |_| Errno::EINVAL;
    let name = CString::new(kind).map_err(invalid)?;
    // SAFETY: a string that outlives the call, and a number.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), libc::FSOPEN_CLOEXEC) })
        .map_err(|e| kernel::FSOPEN.explain(e))?;
    let set = |command: libc::c_uint, key: &str, value: Option<&str>| {
        let key = CString::new(key).map_err(invalid)?;
        let value = value.map(CString::new).transpose().map_err(invalid)?;
        let (key, value) = (key.as_ptr(), value.as_ref().map_or(std::ptr::null(), |value| value.as_ptr()));
        // SAFETY: strings that outlive the call or null, and numbers.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
        Errno::result(result).map(drop).map_err(|e| kernel::FSCONFIG.explain(e))
    };
    set(libc::FSCONFIG_SET_STRING, "source", Some(source))?;
    let of_the_whole =
        [(MsFlags::MS_RDONLY, "ro"), (MsFlags::MS_SYNCHRONOUS, "sync"), (MsFlags::MS_DIRSYNC, "dirsync")];
    for (_, name) in of_the_whole.iter().filter(|(flag, _)| flags.contains(*flag)) {
        set(libc::FSCONFIG_SET_FLAG, name, None)?;
    }
    for option in data {
        match option.split_once('=') {
            Some((key, value)) => set(libc::FSCONFIG_SET_STRING, key, Some(value))?,
            None => set(libc::FSCONFIG_SET_FLAG, option, None)?,
        }
    }
    let create = libc::FSCONFIG_CMD_CREATE;
    // SAFETY: numbers, and null pointers, which this command wants.
    let result = unsafe {
        let none = std::ptr::null::<libc::c_char>();
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), create, none, none, 0)
    };
    Errno::result(result)?;
    // SAFETY: numbers only.
    let mount = owned(unsafe {
        let (context, flags) = (context.as_raw_fd(), attributes(flags));
        libc::syscall(libc::SYS_fsmount, context, libc::FSMOUNT_CLOEXEC, flags)
    });
    Ok(mount.map_err(|e| kernel::FSMOUNT.explain(e))?.into())
}

/// Flags of mount(2) as those of fsmount(2).
fn attributes(flags: MsFlags) -> u64 {
    let pairs = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    ];
    let set = pairs.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |set, (_, bit)| set | bit);
    // One value of three; as with mount(2), the strict one wins.
    set | match flags {
        flags if flags.contains(MsFlags::MS_STRICTATIME) => libc::MOUNT_ATTR_STRICTATIME,
        flags if flags.contains(MsFlags::MS_NOATIME) => libc::MOUNT_ATTR_NOATIME,
        _ => libc::MOUNT_ATTR_RELATIME,
    }
}

/// For what fsconfig(2) does not take: mounted on the host for a moment.
fn mount_and_take(
    kind: &str,
    source: &str,
    flags: MsFlags,
    data: &str,
    place: &Path,
) -> io::Result<Detached> {
    mount(Some(source), place, Some(kind), flags, Some(data))?;
    let copy = Detached::copy(place, false).and_then(|copy| {
        copy.set(0, 0, libc::MS_PRIVATE, false)?;
        Ok(copy)
    });
    umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    copy
}

/// An image of many layers has more lower directories than one option holds. Their common parent is taken as the
/// working directory then, and they become relative, as containerd does it.
fn shorten(kind: &str, data: &[String]) -> (Option<PathBuf>, Vec<String>) {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap_or_default();
    if kind != "overlay" || lower.len() <= VALUE_MAX {
        return (None, data.to_vec());
    }
    let mut layers = lower.split(':');
    let first = layers.next().unwrap_or_default();
    let shared = layers.fold(first.len(), |length, layer| {
        first.bytes().zip(layer.bytes()).take(length).take_while(|(a, b)| a == b).count()
    });
    let Some(parent) =
        first.as_bytes().get(..shared).and_then(|head| head.iter().rposition(|byte| *byte == b'/'))
    else {
        return (None, data.to_vec());
    };
    let prefix = first.get(..=parent).unwrap_or_default();
    let relative = |option: &String| match option.strip_prefix("lowerdir=") {
        Some(list) => {
            let layers: Vec<_> =
                list.split(':').map(|layer| layer.strip_prefix(prefix).unwrap_or(layer)).collect();
            format!("lowerdir={}", layers.join(":"))
        }
        None => option.clone(),
    };
    (Some(PathBuf::from(prefix)), data.iter().map(relative).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};
    use without::without;

    mod without {
        include!("../../../protocol/src/kernel/without.rs");
    }

    #[test]
    fn options_become_flags_and_data() {
        let found = options(["ro", "nosuid", "suid", "rbind", "upperdir=/u", "defaults"]);
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC;
        assert_eq!(found, Options { flags, data: vec!["upperdir=/u".into()] });
    }

    #[test]
    fn flags_of_mount_are_those_of_fsmount() {
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
        let expected = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOATIME;
        assert_eq!(attributes(flags), expected);
        assert!(fits_fsconfig("lowerdir=/a:/b") && fits_fsconfig("volatile"));
        let long = format!("lowerdir={}", "x".repeat(VALUE_MAX + 1));
        assert!(!fits_fsconfig(&long) && !fits_fsconfig(r"upperdir=/a\:b"));
    }

    #[test]
    fn the_error_on_an_older_kernel_names_what_it_lacks() {
        use katana_protocol::kernel::{
            FSCONFIG, FSMOUNT, FSOPEN, MOUNT_SETATTR, MOVE_MOUNT, OPEN_TREE, OPENAT2,
        };
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root = crate::storage::mounts::open_directory(Path::new("/")).unwrap();
        let namespace = std::fs::File::open("/proc/self/ns/mnt").unwrap();
        let attach = |namespace: &std::fs::File, root: &OwnedFd, at: &str| {
            let added_flags = crate::storage::mounts::AddedFlags::default();
            let mut mounts =
                crate::storage::mounts::Attachments::new(namespace.as_fd(), root.as_fd(), &added_flags);
            let copy = Detached::copy(Path::new("/tmp"), false);
            let added = copy.and_then(|copy| mounts.add(at.into(), copy));
            added.and_then(|()| mounts.attach_all()).map(drop).map_err(|e| crate::error::reason(&e))
        };
        let bound = || {
            let bound =
                Detached::bound(Path::new("/tmp"), false, false, crate::storage::mounts::Access::ReadOnly);
            bound.map(drop).map_err(|e| crate::error::reason(&e))
        };
        let made = || make("tmpfs", "tmpfs", &[], Path::new("/nowhere")).map(drop).map_err(|e| e.to_string());
        // A target that is not there: the first thing that is looked up in the namespace.
        let found = || attach(&namespace, &root, "nowhere");
        // One that is: in a mount namespace of this thread's.
        let attached = || {
            unshare(CloneFlags::CLONE_NEWNS).map_err(|e| e.to_string())?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(|e| e.to_string())?;
            let namespace = std::fs::File::open("/proc/thread-self/ns/mnt").map_err(|e| e.to_string())?;
            let root = crate::storage::mounts::open_directory(Path::new("/")).map_err(|e| e.to_string())?;
            attach(&namespace, &root, "tmp")
        };
        type Work<'a> = &'a (dyn Fn() -> std::result::Result<(), String> + Sync);
        let cases: [(kernel::Call, Work<'_>); 7] = [
            (OPEN_TREE, &bound),
            (MOUNT_SETATTR, &bound),
            (FSOPEN, &made),
            (FSCONFIG, &made),
            (FSMOUNT, &made),
            (OPENAT2, &found),
            (MOVE_MOUNT, &attached),
        ];
        for (call, work) in cases {
            let error = without(call.name, work).unwrap_err();
            let expected = format!("has no {}(2), which came with Linux {}, or", call.name, call.since);
            assert!(error.contains(&expected), "{error}");
        }
        assert_eq!((bound(), made()), (Ok(()), Ok(())));
    }

    #[test]
    fn many_layers_fit_a_page() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<_> = (100..228).map(|n| format!("{root}/{n}/fs")).collect();
        let data =
            |lower: &str| ["index=off".into(), format!("workdir={root}/9/work"), format!("lowerdir={lower}")];
        assert!(data(&lower.join(":")).join(",").len() > OPTIONS_MAX);
        let (directory, short) = shorten("overlay", &data(&lower.join(":")));
        let short = short.join(",");
        assert_eq!(directory, Some(PathBuf::from(format!("{root}/"))));
        assert!(short.len() < OPTIONS_MAX && short.ends_with(":226/fs:227/fs"), "{short}");
        assert!(short.starts_with(&format!("index=off,workdir={root}/9/work,lowerdir=100/fs:")));
        assert_eq!(shorten("overlay", &data("/a:/b")).0, None);
        let strange = data(&"x:".repeat(3000));
        assert_eq!(shorten("overlay", &strange), (None, strange.to_vec()));
    }
}
