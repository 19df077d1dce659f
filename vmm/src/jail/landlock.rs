//! A second lock on the same door (Documentation/userspace-api/landlock.rst): this process opens nothing that is not
//! below the share, by whatever way it gets there.
//!
//! The first one, the root of the mount namespace, does not hold for files that the process has been handed: by its
//! descriptor, /proc/self/fd opens a file anew, with rights that the descriptor does not have. A disk that is to be
//! read only could be written.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_long};

/// linux/landlock.h: rights to files, in the order of their bits: EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR,
/// REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM; REFER (version 2), TRUNCATE
/// (3), IOCTL_DEV (5).
const RIGHTS: [(c_long, u64); 4] = [(1, (1 << 13) - 1), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15)];
/// What is not even allowed in the share: to execute, to make block devices, and to control devices. Whiteouts of
/// overlayfs are character devices.
const NEVER: u64 = 1 | 1 << 11 | 1 << 15;
/// Before, no file could be renamed or linked into another directory.
const FIRST_USABLE: c_long = 2;
const GET_VERSION: c_int = 1;
const RULE_PATH_BENEATH: c_int = 1;

/// `struct landlock_ruleset_attr`, as far as it is used.
#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: c_int,
}

/// Lets this process, which has one thread and no new privileges, open what is at and below `share` and nothing else.
/// Pipes, sockets and the like, which are in no file system that can be mounted, are not concerned. Does nothing where
/// the kernel has no Landlock, or one that is too old, or has it switched off.
///
/// # Errors
/// When the kernel has it and refuses.
pub fn restrict(share: &OwnedFd) -> io::Result<()> {
    // SAFETY: this asks for the version; no ruleset is read.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>(), 0, GET_VERSION)
    };
    if version < FIRST_USABLE {
        return Ok(());
    }
    let known =
        RIGHTS.iter().filter(|(since, _)| *since <= version).fold(0, |known, (_, rights)| known | rights);
    let ruleset = Ruleset { handled_access_fs: known };
    // SAFETY: the structure lives through the call, and has the size that is given.
    let ruleset = checked(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size_of::<Ruleset>(), 0)
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as c_int) };
    let beneath = PathBeneath { allowed_access: known & !NEVER, parent_fd: share.as_raw_fd() };
    let (fd, rule) = (ruleset.as_raw_fd(), &raw const beneath);
    // SAFETY: the structure lives through the call.
    checked(unsafe { libc::syscall(libc::SYS_landlock_add_rule, fd, RULE_PATH_BENEATH, rule, 0) })?;
    // SAFETY: the call takes integers.
    checked(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd, 0) }).map(drop)
}

fn checked(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
