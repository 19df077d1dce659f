//! The mounts of a container (runtime-spec, config.md, "Mounts").

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use katana_protocol::GUEST_VOLUMES;
use katana_protocol::mount::{MountAttributes, attach_mount, clone_mount, set_mount};
use libc::MOUNT_ATTR_RDONLY;
use nix::fcntl::{OFlag, open};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use oci_spec::runtime::{Mount, Spec};

use super::confined::{Make, Root, is};
use super::control::{Failure, Result, reason};
use super::mount_options::{Bind, Options, parse};
use super::namespaces::Wanted;
use super::rootfs::{MOUNT_POINT, Rootfs};
use crate::syscalls::new_mount;

/// File systems that are not on a device: read-only is the mount's business alone.
const VIRTUAL: &[&str] =
    &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay", "bpf"];

/// What the mounts of one container need to know.
pub struct Mounter<'a> {
    /// The container's root.
    pub rootfs: &'a Rootfs,
    /// Its namespaces.
    pub namespaces: &'a Wanted,
    /// Its cgroup, a path in the guest.
    pub cgroup: &'a Path,
}

impl Mounter<'_> {
    /// Mounts everything that the specification lists, in its order.
    pub fn mount_all(&self, spec: &Spec) -> Result<()> {
        for mount in spec.mounts().iter().flatten() {
            let source = mount.source().as_deref().unwrap_or(Path::new("")).display().to_string();
            let destination = mount.destination();
            let options = parse(mount.options().as_deref().unwrap_or_default())?;
            if has_mappings(mount) {
                return Err(Failure::invalid(format!(
                    "id-mapped mount {} is not supported",
                    destination.display()
                )));
            }
            self.mount(mount, &options).map_err(|error| {
                let (destination, why) = (destination.display(), reason(&error));
                Failure::internal(format!("error mounting {source:?} to rootfs at \"{destination}\": {why}"))
            })?;
        }
        Ok(())
    }

    fn mount(&self, mount: &Mount, options: &Options) -> io::Result<()> {
        let root = &self.rootfs.root;
        let kind = mount.typ().as_deref().unwrap_or_default();
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let destination = mount.destination();
        let bind = options.bind.or(if kind == "bind" { Some(Bind::Single) } else { None });
        match (kind, bind) {
            (_, Some(bind)) => bind_mount(root, source, destination, bind, options),
            ("cgroup" | "cgroup2", None) => self.mount_cgroup(destination, options),
            ("proc" | "sysfs", None) => mount_kernel_files(root, kind, destination, options),
            ("tmpfs", None) => mount_tmpfs(root, destination, options),
            _ => {
                let mut data = options.data.clone();
                if options.attributes.set & MOUNT_ATTR_RDONLY != 0 && !VIRTUAL.contains(&kind) {
                    data.push("ro".to_owned());
                }
                let target = root.ensure(destination, Make::Directory)?;
                check_proc(&target, false)?;
                finish(&new_mount(kind, &source.to_string_lossy(), &data)?, &target, options)
            }
        }
    }

    /// With a cgroup namespace of its own the container sees its own cgroup as the root of the hierarchy; without
    /// one it gets that cgroup bound.
    fn mount_cgroup(&self, destination: &Path, options: &Options) -> io::Result<()> {
        let root = &self.rootfs.root;
        if self.namespaces.private(CloneFlags::CLONE_NEWCGROUP) {
            let made = new_mount("cgroup2", "cgroup2", &[]);
            if !is_denied(&made) {
                let target = root.ensure(destination, Make::Directory)?;
                check_proc(&target, false)?;
                return finish(&made?, &target, options);
            }
        }
        bind_mount(root, self.cgroup, destination, Bind::Recursive, options)
    }
}

fn has_mappings(mount: &Mount) -> bool {
    [mount.uid_mappings(), mount.gid_mappings()]
        .iter()
        .any(|maps| maps.as_ref().is_some_and(|maps| !maps.is_empty()))
}

fn is_denied(result: &io::Result<OwnedFd>) -> bool {
    result.as_ref().is_err_and(|error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EBUSY)))
}

/// Sets the attributes of a detached mount, those for all below it last as runc does, attaches it, and sets its
/// propagation.
fn finish(mount: &OwnedFd, target: &OwnedFd, options: &Options) -> io::Result<()> {
    for (attributes, recursive) in [(options.attributes, false), (options.recursive, true)] {
        if attributes != MountAttributes::default() {
            set_mount(mount, &attributes, recursive)?;
        }
    }
    attach_mount(mount, target)?;
    for (propagation, recursive) in &options.propagation {
        set_mount(mount, &MountAttributes { propagation: *propagation, ..Default::default() }, *recursive)?;
    }
    Ok(())
}

/// Mounts a proc or sysfs. No link may lead there: it would let an image choose which files stand for the kernel's
/// (CVE-2019-19921).
fn mount_kernel_files(root: &Root, kind: &str, destination: &Path, options: &Options) -> io::Result<()> {
    root.ensure(destination, Make::Directory)?;
    let target = root.open_without_links(destination)?;
    check_proc(&target, kind == "proc")?;
    let made = new_mount(kind, kind, &options.data);
    // sysfs belongs to the network namespace, which is the guest's: a user namespace has no right to mount it, but
    // may show the guest's.
    if kind == "sysfs" && is_denied(&made) {
        return bind_mount(root, Path::new("/sys"), destination, Bind::Recursive, options);
    }
    finish(&made?, &target, options)
}

fn bind_mount(
    root: &Root,
    source: &Path,
    destination: &Path,
    bind: Bind,
    options: &Options,
) -> io::Result<()> {
    let source = open_source(source)?;
    let make = if is(&fstat(&source)?, SFlag::S_IFDIR) { Make::Directory } else { Make::File };
    let target = root.ensure(destination, make)?;
    check_proc(&target, is_proc(&source))?;
    finish(&clone_mount(&source, bind == Bind::Recursive)?, &target, options)
}

/// What is to be bound. In a volume on a disk, to which containers write, no link leads out of it.
fn open_source(source: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    match volume_of(source) {
        Some((top, path)) => Root::new(open(&top, flags, Mode::empty())?).open(&path),
        None => Ok(open(source, flags, Mode::empty())?),
    }
}

/// The volume in which a path is, and the path from there.
fn volume_of(path: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut names = path.strip_prefix(GUEST_VOLUMES).ok()?.components();
    let (slot, top) = (names.next()?, names.next()?);
    Some((Path::new(GUEST_VOLUMES).join(slot).join(top), names.as_path().to_owned()))
}

/// The container's /proc is a proc file system, and nothing is mounted in it but over files that cannot grant anything:
/// the rest is trusted by whatever sets labels and limits. An image or a volume that could put other files in the place
/// of the kernel's would make a show of being confined (CVE-2019-16884; for other mounts than binds, CVE-2019-19921).
/// What counts is where the target is, whichever way has led there; `of_proc`: it is a proc, or a part of one, that is
/// to be mounted.
pub fn check_proc(target: &OwnedFd, of_proc: bool) -> io::Result<()> {
    const FILES: &[&str] = &[
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "net/dev",
        "slabinfo",
        "stat",
        "swaps",
        "uptime",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    ];
    // Through the guest's own /proc, which is still in sight.
    let place = fs::read_link(format!("/proc/self/fd/{}", target.as_raw_fd()))?;
    let in_root = place.strip_prefix(MOUNT_POINT).map_err(|_| io::Error::other("outside of the root"))?;
    match in_root.strip_prefix("proc") {
        Ok(whole) if whole.as_os_str().is_empty() && of_proc => Ok(()),
        Ok(whole) if whole.as_os_str().is_empty() => Err(io::Error::other("not of type proc")),
        Ok(file) if FILES.iter().any(|allowed| file == Path::new(allowed)) => Ok(()),
        Ok(_) => Err(io::Error::other("inside /proc")),
        // There may be a second one.
        Err(_) if is_proc(target) && !of_proc => Err(io::Error::other("inside a proc file system")),
        Err(_) => Ok(()),
    }
}

fn is_proc(fd: &OwnedFd) -> bool {
    fstatfs(fd).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC)
}

/// A tmpfs takes the mode of the directory that it covers, unless an option gives another, and its contents if asked.
fn mount_tmpfs(root: &Root, destination: &Path, options: &Options) -> io::Result<()> {
    let existing = root.open(destination).ok();
    let target = root.ensure(destination, Make::Directory)?;
    check_proc(&target, false)?;
    let mut data = options.data.clone();
    if existing.is_some() && !data.iter().any(|option| option.starts_with("mode=")) {
        data.push(format!("mode={:o}", fstat(&target)?.st_mode & 0o7777));
    }
    let mount = new_mount("tmpfs", "tmpfs", &data)?;
    if options.copy_up && existing.is_some() {
        copy_tree(&proc_path(&target), &proc_path(&mount))?;
    }
    finish(&mount, &target, options)
}

/// A path to what a descriptor stands for, through the guest's own /proc.
fn proc_path(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", fd.as_fd().as_raw_fd()))
}

/// Copies what a directory holds: directories, files, links, with owners and modes. Links are not followed.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let status = entry.metadata()?;
        if status.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&source, &target)?;
        } else if status.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if status.is_file() {
            fs::copy(&source, &target)?;
        } else {
            continue;
        }
        lchown(&target, Some(status.uid()), Some(status.gid()))?;
        if !status.is_symlink() {
            fs::set_permissions(&target, fs::Permissions::from_mode(status.mode() & 0o7777))?;
        }
    }
    Ok(())
}

/// Whether the specification binds something over the whole of /dev, so that its devices are there already.
pub fn binds_dev(spec: &Spec) -> bool {
    let dev = |mount: &&Mount| mount.destination().components().eq(Path::new("/dev").components());
    spec.mounts().iter().flatten().filter(dev).any(|mount| {
        let bind = |option: &String| option == "bind" || option == "rbind";
        mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind)
    })
}
