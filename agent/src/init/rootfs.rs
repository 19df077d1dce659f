//! A container's root file system: attached, made the root, its kernel files hidden.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use katana_protocol::mount::{MountAttributes, attach_mount, clone_mount, set_mount, set_mount_path};
use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, makedev};
use nix::unistd::{chdir, fchdir, pivot_root};
use oci_spec::runtime::Spec;

use super::confined::{Root, is};
use super::control::{Failure, Result};
use super::mount_options;
use crate::syscalls::new_mount;

/// Where the agent keeps a directory over which each container, in its own mount namespace, mounts its root.
pub const MOUNT_POINT: &str = "/run/kata-containers/rootfs";

/// The root file system of the container that this process becomes.
#[derive(Debug)]
pub struct Rootfs {
    /// Paths in it.
    pub root: Root,
    /// The guest's own /dev/null, which no image can replace.
    guests_null: OwnedFd,
}

impl Rootfs {
    /// Mounts `root.path` as a mount of its own in this new mount namespace, which keeps what happens here from the
    /// guest.
    pub fn attach(spec: &Spec) -> Result<Self> {
        let path = spec
            .root()
            .as_ref()
            .map(|root| root.path().as_path())
            .ok_or_else(|| Failure::invalid("no root"))?;
        prepare_namespace(root_propagation(spec)?)?;
        let failed = |what| Failure::during(format!("{what} the root file system {}", path.display()));
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let source = open(path, flags, Mode::empty()).map_err(|error| failed("open")(error.into()))?;
        let tree = clone_mount(&source, true).map_err(failed("copy the mount of"))?;
        Self::of_tree(tree)
    }

    /// An empty root that nothing can be written to, for a process that needs no files.
    pub fn empty() -> Result<Self> {
        prepare_namespace(None)?;
        let options = ["nr_blocks=1".to_owned(), "nr_inodes=1".to_owned()];
        let tree = new_mount("tmpfs", "tmpfs", &options).map_err(Failure::during("make an empty root"))?;
        let set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
        set_mount(&tree, &MountAttributes { set, ..MountAttributes::default() }, false)
            .map_err(Failure::during("make the empty root read-only"))?;
        Self::of_tree(tree)
    }

    /// Mounts a tree at its place in this mount namespace.
    fn of_tree(tree: OwnedFd) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let failed = |what| Failure::during(format!("{what} the root file system"));
        let target = open(MOUNT_POINT, flags, Mode::empty())
            .map_err(Failure::during(format!("open {MOUNT_POINT}")))?;
        attach_mount(&tree, target).map_err(failed("attach"))?;
        let private = MountAttributes { propagation: libc::MS_PRIVATE, ..MountAttributes::default() };
        set_mount(&tree, &private, false).map_err(failed("make private"))?;
        let null = open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        Ok(Self { root: Root::new(tree), guests_null: null.map_err(Failure::during("open /dev/null"))? })
    }

    /// Applies `maskedPaths` and `readonlyPaths`. What does not exist needs no hiding.
    pub fn hide_paths(&self, spec: &Spec) -> Result<()> {
        let Some(linux) = spec.linux() else { return Ok(()) };
        for path in linux.readonly_paths().iter().flatten() {
            self.make_read_only(Path::new(path))
                .map_err(Failure::during(format!("make {path} read-only")))?;
        }
        for path in linux.masked_paths().iter().flatten() {
            self.mask(Path::new(path)).map_err(Failure::during(format!("mask {path}")))?;
        }
        Ok(())
    }

    fn make_read_only(&self, path: &Path) -> std::io::Result<()> {
        let Some(place) = existing(self.root.open(path))? else { return Ok(()) };
        let copy = clone_mount(&place, true)?;
        set_mount(&copy, &MountAttributes { set: MOUNT_ATTR_RDONLY, ..MountAttributes::default() }, false)?;
        attach_mount(copy, place)
    }

    fn mask(&self, path: &Path) -> std::io::Result<()> {
        let Some(place) = existing(self.root.open(path))? else { return Ok(()) };
        let cover = if is(&fstat(&place)?, SFlag::S_IFDIR) {
            let cover = new_mount("tmpfs", "tmpfs", &["nr_blocks=1".to_owned(), "nr_inodes=1".to_owned()])?;
            let set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
            set_mount(&cover, &MountAttributes { set, ..MountAttributes::default() }, false)?;
            cover
        } else {
            self.null()?
        };
        attach_mount(cover, place)
    }

    /// Covers a file. The container's own /dev/null, if what has this name is one: whoever may change owner and mode of
    /// the file that it covers changes that node's, and the guest's is everybody's. Otherwise the guest's, which is
    /// read-only then.
    fn null(&self) -> std::io::Result<OwnedFd> {
        if let Ok(own) = self.root.open_without_links(Path::new("/dev/null")) {
            let status = fstat(&own)?;
            if is(&status, SFlag::S_IFCHR) && status.st_rdev == makedev(1, 3) {
                return clone_mount(&own, false);
            }
        }
        let cover = clone_mount(&self.guests_null, false)?;
        set_mount(&cover, &MountAttributes { set: MOUNT_ATTR_RDONLY, ..MountAttributes::default() }, false)?;
        Ok(cover)
    }

    /// Makes it the root of this process, and detaches the guest's.
    pub fn enter(&self, spec: &Spec) -> Result<()> {
        if spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true) {
            let read_only = MountAttributes { set: MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
            set_mount(&self.root, &read_only, false).map_err(Failure::during("make the root read-only"))?;
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let old = open("/", flags, Mode::empty()).map_err(Failure::during("open the old root"))?;
        fchdir(&self.root).map_err(Failure::during("enter the root"))?;
        // pivot_root(2), NOTES: the old root ends up over the new one, and is unmounted from there.
        pivot_root(".", ".").map_err(Failure::during("pivot_root"))?;
        fchdir(&old).map_err(Failure::during("enter the old root"))?;
        // Unmounting must not spread to the guest.
        let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        mount(None::<&str>, ".", None::<&str>, slave, None::<&str>)
            .map_err(Failure::during("detach the old root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(Failure::during("unmount the old root"))?;
        chdir("/").map_err(Failure::during("enter /"))?;
        // The root alone: what is mounted below has its propagation already.
        root_propagation(spec)?
            .map_or(Ok(()), |(propagation, _)| set_propagation(Path::new("/"), (propagation, false)))
    }
}

/// Before anything is copied in this mount namespace: what happens here does not reach the guest.
fn prepare_namespace(propagation: Option<(u64, bool)>) -> Result<()> {
    set_propagation(Path::new("/"), propagation.unwrap_or((libc::MS_SLAVE, true)))?;
    make_parent_private(Path::new(MOUNT_POINT))
}

/// `None` for what is not there.
fn existing(place: std::io::Result<OwnedFd>) -> std::io::Result<Option<OwnedFd>> {
    match place {
        Ok(place) => Ok(Some(place)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn root_propagation(spec: &Spec) -> Result<Option<(u64, bool)>> {
    let name = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
    name.filter(|name| !name.is_empty()).map(mount_options::propagation).transpose()
}

fn set_propagation(path: &Path, (propagation, recursive): (u64, bool)) -> Result<()> {
    let attributes = MountAttributes { propagation, ..MountAttributes::default() };
    set_mount_path(path, &attributes, recursive)
        .map_err(Failure::during(format!("set the propagation of {}", path.display())))
}

/// pivot_root(2) wants the mount that the new root lies on to be private; it is the nearest one above.
fn make_parent_private(place: &Path) -> Result<()> {
    let private = MountAttributes { propagation: libc::MS_PRIVATE, ..MountAttributes::default() };
    for path in place.ancestors() {
        match set_mount_path(path, &private, false) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (),
            other => return other.map_err(Failure::during(format!("make {} private", path.display()))),
        }
    }
    Ok(())
}

/// Makes the directory over which roots are mounted.
pub fn prepare() -> std::io::Result<()> {
    fs::create_dir_all(MOUNT_POINT)
}
