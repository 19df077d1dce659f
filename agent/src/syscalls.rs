//! System calls that the C library has no function for: the mount API of Linux 5.2 and 5.12.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::read;

pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
pub const MOUNT_ATTR_NOEXEC: u64 = 0x8;
/// The mask of the access time settings: relatime is 0.
pub const MOUNT_ATTR_ATIME: u64 = 0x70;
pub const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
pub const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
pub const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// `struct mount_attr`, mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub user_namespace: u64,
}

const OPEN_TREE_CLONE: libc::c_uint = 1;
const AT_RECURSIVE: libc::c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const AT_EMPTY_PATH: libc::c_uint = libc::AT_EMPTY_PATH.cast_unsigned();

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| io::ErrorKind::Other)?;
    // SAFETY: the callers pass what a system call has just answered with: a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_string(text: &[u8]) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// A detached copy of the mount at `fd`, with those below it if `recursive`.
pub fn clone_mount(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned() | AT_EMPTY_PATH;
    let flags = if recursive { flags | AT_RECURSIVE } else { flags };
    // SAFETY: the path is an empty string, the rest numbers.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, fd.as_fd().as_raw_fd(), c"".as_ptr(), flags) })
}

/// Mounts what is detached over the directory or file at `target`.
pub fn attach_mount(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let (from, to) = (mount.as_fd().as_raw_fd(), target.as_fd().as_raw_fd());
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: the paths are empty strings, the rest numbers.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags) };
    Errno::result(result)?;
    Ok(())
}

/// Changes the mount at `fd`.
pub fn set_mount(fd: impl AsFd, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    set_mount_at(fd.as_fd(), c"", attributes, AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 })
}

/// Changes the mount whose root is at `path`; EINVAL if there is none.
pub fn set_mount_path(path: &Path, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    let path = c_string(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: AT_FDCWD stands for the working directory; it is no descriptor that could be closed.
    let here = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };
    set_mount_at(here, &path, attributes, if recursive { AT_RECURSIVE } else { 0 })
}

fn set_mount_at(fd: BorrowedFd<'_>, path: &CStr, attributes: &MountAttributes, flags: u32) -> io::Result<()> {
    let (fd, size) = (fd.as_raw_fd(), size_of::<MountAttributes>());
    // SAFETY: path and attributes live through the call, and the size is theirs.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, fd, path.as_ptr(), flags, &raw const *attributes, size)
    };
    Errno::result(result)?;
    Ok(())
}

/// A new, detached mount of a file system. An error has the kernel's own words if it said any.
pub fn new_mount(kind: &str, source: &str, options: &[String]) -> io::Result<OwnedFd> {
    let name = c_string(kind.as_bytes())?;
    // SAFETY: the name is a string that lives through the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })?;
    let configured = configure(&context, source, options);
    configured.map_err(|error| explain(&context, error))?;
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}

fn configure(context: &OwnedFd, source: &str, options: &[String]) -> io::Result<()> {
    if !source.is_empty() {
        fsconfig(context, FSCONFIG_SET_STRING, Some("source"), Some(source))?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig(context, FSCONFIG_SET_STRING, Some(key), Some(value))?,
            None => fsconfig(context, FSCONFIG_SET_FLAG, Some(option), None)?,
        }
    }
    fsconfig(context, FSCONFIG_CMD_CREATE, None, None)
}

fn fsconfig(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&str>,
    value: Option<&str>,
) -> io::Result<()> {
    let c = |text: Option<&str>| text.map(|text| c_string(text.as_bytes())).transpose();
    let (key, value) = (c(key)?, c(value)?);
    let pointer = |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
    let (fd, key, value) = (context.as_raw_fd(), pointer(&key), pointer(&value));
    // SAFETY: key and value are null or strings that live through the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) })?;
    Ok(())
}

/// The kernel leaves messages in the context: `e <file system>: <what is wrong>`.
fn explain(context: &OwnedFd, error: io::Error) -> io::Error {
    let mut message = [0; 512];
    match read(context, &mut message) {
        Ok(length) if error.raw_os_error() == Some(libc::EINVAL) => {
            let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
            io::Error::other(text.trim_end().trim_start_matches("e ").to_owned())
        }
        _ => error,
    }
}

/// Opens a pidfd.
pub fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only. The descriptor is close-on-exec, pidfd_open(2).
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal through a pidfd.
pub fn signal_process(process: impl AsFd, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no siginfo is passed, the rest are numbers.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_fd().as_raw_fd(), signal, none, 0) };
    Errno::result(result)?;
    Ok(())
}
