//! Mounts that are attached nowhere yet: the mount API of Linux 5.2, and mount_setattr(2), for which rustix has no
//! function.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::kernel;

/// What is to change of a mount, in the numbers of mount_setattr(2): `struct mount_attr`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    /// `MOUNT_ATTR_...`
    pub set: u64,
    /// Likewise.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE` and the like.
    pub propagation: u64,
    /// A descriptor.
    pub user_namespace: u64,
}

/// A copy of the mount at a path, with those below it if `recursive`.
///
/// # Errors
/// open_tree(2)
pub fn copy_mount(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    clone(AT_FDCWD, path, OpenTreeFlags::empty(), recursive)
}

/// Likewise of the mount at a descriptor.
///
/// # Errors
/// open_tree(2)
pub fn clone_mount(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    clone(fd, Path::new(""), OpenTreeFlags::AT_EMPTY_PATH, recursive)
}

fn clone(at: impl AsFd, path: &Path, flags: OpenTreeFlags, recursive: bool) -> io::Result<OwnedFd> {
    let flags = flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let deep = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    open_tree(at, path, flags | deep).map_err(|e| kernel::OPEN_TREE.explain(e))
}

/// Attaches it, in this thread's mount namespace, over the directory or file at a descriptor.
///
/// # Errors
/// move_mount(2)
pub fn attach_mount(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", target, c"", flags).map_err(|e| kernel::MOVE_MOUNT.explain(e))
}

/// Likewise at a path.
///
/// # Errors
/// move_mount(2)
pub fn attach_mount_at(mount: impl AsFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount, c"", AT_FDCWD, target, flags).map_err(|e| kernel::MOVE_MOUNT.explain(e))
}

/// Changes the mount at a descriptor, with those below it if `recursive`.
///
/// # Errors
/// mount_setattr(2)
pub fn set_mount(mount: impl AsFd, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    set_attributes(mount, Path::new(""), attributes, libc::AT_EMPTY_PATH, recursive)
}

/// Likewise the mount whose root is at a path.
///
/// # Errors
/// mount_setattr(2); EINVAL if no mount's root is there.
pub fn set_mount_path(path: &Path, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    set_attributes(AT_FDCWD, path, attributes, 0, recursive)
}

fn set_attributes(
    at: impl AsFd,
    path: &Path,
    attributes: &MountAttributes,
    flags: libc::c_int,
    recursive: bool,
) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let (at, size) = (at.as_fd().as_raw_fd(), size_of::<MountAttributes>());
    let flags = flags | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: path and attributes live through the call, and the size is theirs.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, at, path.as_ptr(), flags, &raw const *attributes, size)
    };
    nix::errno::Errno::result(result).map(drop).map_err(|e| kernel::MOUNT_SETATTR.explain(e))
}
