//! The first process of a pod: does nothing, reaps what it inherits when the pod shares its pid namespace, ends by
//! SIGTERM or SIGINT. It is this program again so that a pod needs no image for it.

use std::process::ExitCode;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// Runs until SIGTERM or SIGINT.
pub fn main() -> ExitCode {
    // For ps; a program that was run through a descriptor is called by the descriptor's number.
    let _ = prctl::set_name(c"pause");
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    // Blocked, they wait to be asked for, even by the first process of a pid namespace.
    if signals.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        reap();
        match signals.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return ExitCode::SUCCESS,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// Collects all children that have ended.
fn reap() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            // A death by a real-time signal is one, though nix has no word for it.
            Ok(_) | Err(_) => {}
        }
    }
}
