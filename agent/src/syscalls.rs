//! File systems by the mount API of Linux 5.2, and processes by their descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::read;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| io::ErrorKind::Other)?;
    // SAFETY: the callers pass what a system call has just answered with: a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new, detached mount of a file system. An error has the kernel's own words if it said any.
pub fn new_mount(kind: &str, source: &str, options: &[String]) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    configure(&context, source, options).map_err(|error| explain(&context, error.into()))?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

fn configure(context: &OwnedFd, source: &str, options: &[String]) -> rustix::io::Result<()> {
    if !source.is_empty() {
        fsconfig_set_string(context, "source", source)?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, option.as_str())?,
        }
    }
    fsconfig_create(context)
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
