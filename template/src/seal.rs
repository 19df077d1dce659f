//! The seal of a template: from it on, nobody writes to the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use katana_protocol::vmm::SEALED;
use libc::c_int;
use nix::errno::Errno;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;

/// fcntl(2), linux/fcntl.h.
const F_SETSIG: c_int = 10;

/// What of this process has a copy of a descriptor for a moment only, between fork and exec, is waited for.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// A file that nobody can write to as long as this is there: a lease on it (fcntl(2), F_SETLEASE). Afterwards, nobody
/// can who does not open it by its path.
pub(crate) struct Sealed<'a> {
    file: &'a File,
}

/// Seals a file that is open for reading, or answers nothing if somebody still has it open for writing: for the kernel
/// that is so until the last descriptor is closed and the last mapping removed that was made of such a one, in whatever
/// process. A time of modification that no write leaves behind shows those who use the file that it was sealed.
///
/// # Errors
/// When the file system knows no leases.
pub(crate) fn seal(file: &File) -> io::Result<Option<Sealed<'_>>> {
    // Whoever opens the file for writing meanwhile waits, and a signal notifies this process. SIGURG does nothing; the
    // default signal would end the process.
    control(file, F_SETSIG, libc::SIGURG)?;
    for _ in 0..TRIES {
        match control(file, libc::F_SETLEASE, libc::F_RDLCK) {
            Ok(()) => {
                let sealed = Sealed { file };
                let time = TimeSpec::new(SEALED, 0);
                futimens(file, &time, &time)?;
                return Ok(Some(sealed));
            }
            Err(Errno::EAGAIN) => thread::sleep(PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

impl Drop for Sealed<'_> {
    fn drop(&mut self) {
        // Cannot fail: the lease is ours.
        let _ = control(self.file, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

fn control(file: &File, command: c_int, argument: c_int) -> nix::Result<()> {
    // SAFETY: none of the commands used here takes a pointer.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }).map(drop)
}
