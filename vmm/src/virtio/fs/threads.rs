//! The threads that serve files: a few at first, and more while all of them wait for the host.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::{Shared, State};
use crate::seccomp::Kind;
use crate::sync::lock;

/// Threads that serve from the start.
const FEW: usize = 3;
/// The most there can be: a pod with more requests to servers that do not answer waits as a whole.
const MOST: usize = 64;
/// All threads have been busy for this long, and no request has come to its end: none will soon.
const STUCK: Duration = Duration::from_millis(100);
/// Bytes of a thread's stack. Small ones lie next to each other, which saves page tables.
const STACK: usize = 256 * 1024;

/// Confines the calling thread.
pub type Confine = fn(Kind) -> io::Result<()>;

/// Starts the first threads, and the one that starts others.
///
/// # Errors
/// When one cannot be started and confined.
pub fn start(shared: &Arc<Shared>, confine: Confine) -> io::Result<()> {
    let (sender, started) = channel();
    lock(&shared.state).threads = FEW;
    for number in 0..FEW {
        let (shared, sender) = (shared.clone(), sender.clone());
        spawn(format!("fs{number}"), move || {
            if report(&sender, prepare(confine)) {
                shared.wait_and_serve();
            }
        })?;
    }
    let shared = shared.clone();
    spawn("fs".to_owned(), move || {
        if report(&sender, confine(Kind::FsStarter)) {
            start_more(&shared, confine);
        }
    })?;
    started.iter().take(FEW + 1).collect()
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).stack_size(STACK).spawn(body).map(drop)
}

/// Tells whoever waits for a thread that it is ready; whether it is.
fn report(started: &Sender<io::Result<()>>, ready: io::Result<()>) -> bool {
    let is_ready = ready.is_ok();
    let _ = started.send(ready);
    is_ready
}

/// Has a thread serve on its own.
fn prepare(confine: Confine) -> io::Result<()> {
    // virtiofsd changes the umask and the working directory for single requests; those are then this thread's.
    unshare(CloneFlags::CLONE_FS)?;
    know_capabilities()?;
    confine(Kind::Fs)
}

fn start_more(shared: &Arc<Shared>, confine: Confine) {
    while let Some(number) = wait_until_stuck(shared) {
        let server = shared.clone();
        let started = spawn(format!("fs{number}"), move || match prepare(confine) {
            Ok(()) => server.wait_and_serve(),
            Err(error) => log::error!("fs: a further thread: {error}"),
        });
        if let Err(error) = started {
            return log::warn!(
                "fs: all {number} threads wait for the host, and there can be no more: {error}"
            );
        }
        lock(&shared.state).threads += 1;
    }
}

/// How many threads there are, all of which wait for the host. Nothing when there are to be no more.
fn wait_until_stuck(shared: &Shared) -> Option<usize> {
    loop {
        let some_are_free = |state: &mut State| !state.stopped && state.in_flight < state.threads;
        let state = shared.busy.wait_while(lock(&shared.state), some_are_free);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        let (finished, threads) = (state.finished, state.threads);
        if state.stopped || threads == MOST {
            return None;
        }
        drop(state);
        thread::sleep(STUCK);
        let state = lock(&shared.state);
        if state.finished == finished && state.in_flight == threads {
            return Some(threads);
        }
    }
}

/// Loads this thread's capabilities into libcap-ng. It would do so by itself when virtiofsd first drops CAP_FSETID for
/// a write, but from /proc, which is not there in the jail; the write would then continue with the capability and leave
/// set-user-ID bits in place.
pub fn know_capabilities() -> io::Result<()> {
    use capng::{Action, CUpdate, Set, Type};
    // linux/capability.h: struct __user_cap_header_struct, version 3, the calling thread; and effective, permitted,
    // inheritable, in two halves.
    let mut header = [0x2008_0522_u32, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: the kernel reads the header and fills the two structures of three words each.
    if unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [effective, permitted, _, effective_high, permitted_high, _] = sets;
    let held = [(Type::EFFECTIVE, effective, effective_high), (Type::PERMITTED, permitted, permitted_high)];
    capng::clear(Set::CAPS);
    let mut updates = Vec::new();
    for (cap_type, low, high) in held {
        let set = u64::from(high) << 32 | u64::from(low);
        let held = (0..u64::BITS).filter(|capability| set & (1 << capability) != 0);
        updates.extend(held.map(|capability| CUpdate { action: Action::ADD, cap_type, capability }));
    }
    capng::update(updates).map_err(|error| io::Error::other(error.to_string()))
}
