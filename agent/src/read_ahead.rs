//! How much the guest's kernel reads at once of a small program.
//!
//! Around each page of a mapping that is missed it reads a piece, by default of 128 KiB, so that a small program is
//! there as a whole at once, and most of it is never used. The host has the file in memory anyway: what the guest does
//! not have as well is memory that a pod does not weigh. A file keeps the size that is in force when it is opened,
//! which execve(2) does with programs: files that are read, and libraries, are opened later. (What another container of
//! the pod opens within the milliseconds of an execve keeps it as well.)

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use katana_protocol::GUEST_SHARE;
use nix::sys::stat::{major, minor, stat};

/// KiB, in the form of the kernel's file.
const PIECE: &str = "16";

/// While there is one of these, programs that are executed will be read in small pieces for as long as they run.
#[derive(Debug)]
pub struct SmallPieces(());

/// How many there are, and what was in force before the first one.
static IN_FORCE: Mutex<(usize, String)> = Mutex::new((0, String::new()));

impl SmallPieces {
    /// One more.
    pub fn new() -> Self {
        let mut in_force = IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *in_force;
        if *count == 0 {
            match set(PIECE) {
                Ok(old) => *before = old,
                Err(error) => log::debug!("read ahead: {error}"),
            }
        }
        *count += 1;
        Self(())
    }
}

impl Drop for SmallPieces {
    fn drop(&mut self) {
        let mut in_force = IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *in_force;
        *count -= 1;
        if *count == 0
            && !before.is_empty()
            && let Err(error) = set(&std::mem::take(before))
        {
            log::warn!("read ahead: {error}");
        }
    }
}

/// Sets it for the pod's shared directory; answers what it was.
fn set(kib: &str) -> io::Result<String> {
    // Not the standard library's metadata(), which asks the host for the time of birth as well.
    let device = stat(GUEST_SHARE)?.st_dev;
    let file = format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device));
    let old = fs::read_to_string(&file)?;
    fs::write(&file, kib)?;
    Ok(old.trim().to_owned())
}
