//! Descriptors for child processes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// Gives the child these descriptors at these numbers, which must be below 10.
///
/// The command keeps copies until it is dropped.
pub fn pass(command: &mut Command, fds: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<()> {
    // Copies at high numbers, so that no number is taken before it was read.
    let copies =
        fds.iter().map(|(fd, number)| Ok((duplicate(*fd)?, *number))).collect::<io::Result<Vec<_>>>()?;
    let place = move || {
        for (copy, number) in &copies {
            // SAFETY: dup2 takes two integers and is async-signal-safe; the child owns its descriptor table.
            Errno::result(unsafe { libc::dup2(copy.as_raw_fd(), *number) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls dup2 only and allocates nothing.
    unsafe {
        command.pre_exec(place);
    }
    Ok(())
}

/// Starts the child in this network namespace.
pub fn enter_network(command: &mut Command, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let copy = duplicate(namespace)?;
    // SAFETY: setns takes two integers and is async-signal-safe; the closure allocates nothing.
    let enter = move || Errno::result(unsafe { libc::setns(copy.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop);
    // SAFETY: as above, and the child has one thread.
    unsafe {
        command.pre_exec(move || Ok(enter()?));
    }
    Ok(())
}

/// The soft limit on descriptors with which this process was started.
static USUAL_LIMIT: OnceLock<rlim_t> = OnceLock::new();

/// Lets this process open as many descriptors as it may. A service of systemd starts with 1024, of which a pod of a
/// hundred containers needs more.
pub fn raise_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let _ = USUAL_LIMIT.set(soft);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// Gives the child the limit on descriptors from before [`raise_limit`]: programs that call select(2) can use no more
/// than 1024.
pub fn usual_limit(command: &mut Command) {
    let Some(&soft) = USUAL_LIMIT.get() else { return };
    let lower = move || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard)?)
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(lower);
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Takes a descriptor that this program was started with.
///
/// # Errors
/// When there is none at this number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl takes integers; the number is checked by the call itself.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: open, as the call has shown, and by the program's contract with its parent nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A pipe: its read end and its write end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}
