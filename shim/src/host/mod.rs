//! What all rooms need of the host's kernel and of containerd: threads, descriptors, processes, cgroups, log, events.
//!
//! May use [`crate::error`].

pub mod cgroup;
pub mod durations;
pub mod events;
pub mod fds;
pub mod logger;
pub mod mark;
pub mod pidfd;
pub mod rate;
pub mod recent;
pub mod threads;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Random bytes of the host's kernel.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: a buffer of the given length.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if usize::try_from(count) == Ok(N) {
        return Ok(bytes);
    }
    Err(Error::os("getrandom", nix::errno::Errno::last()))
}

/// Creates a directory and its parents for root only.
pub fn create_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Says, past the test runner and for tests/all to count, that a test cannot run here.
#[cfg(test)]
pub fn say_skipped(why: &str) {
    use std::io::Write;
    let thread = std::thread::current();
    let _ = writeln!(io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}
