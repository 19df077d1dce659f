//! Collects every child that ends: processes of containers and whatever the guest's PID 1 inherits.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::stream::Stream;

/// The exit code of a process, or 128 and the signal's number.
pub type ExitStatus = u32;

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<Pid, oneshot::Sender<ExitStatus>>,
    /// Ends of processes that nobody had asked for yet, kept while someone may be about to.
    early: HashMap<Pid, ExitStatus>,
    launches: usize,
}

/// Knows who waits for which process.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

/// While one of these lives, the end of a process that is not watched yet is remembered.
#[derive(Debug)]
pub struct Launch(Reaper);

impl Reaper {
    /// Announces that a process is about to be started and watched.
    pub fn launch(&self) -> Launch {
        self.table().launches += 1;
        Launch(self.clone())
    }

    /// Collects children for ever.
    pub async fn run(&self) -> io::Result<std::convert::Infallible> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let descriptor = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
        let signals = Stream::new(descriptor.as_fd().try_clone_to_owned()?)?;
        loop {
            // Signals merge: each wake-up collects all that there is.
            while let Some((pid, status)) = collect()? {
                self.ended(pid, status);
            }
            signals.read(&mut [0; 128]).await?;
        }
    }

    fn ended(&self, pid: Pid, status: ExitStatus) {
        let mut table = self.table();
        match table.watched.remove(&pid) {
            Some(sender) => {
                let _ = sender.send(status);
            }
            None if table.launches > 0 => {
                table.early.insert(pid, status);
            }
            None => (),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Launch {
    /// The end of a process, which may have come already.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.0.table();
        match table.early.remove(&pid) {
            Some(status) => {
                let _ = sender.send(status);
            }
            None => {
                table.watched.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.early.clear();
        }
    }
}

/// One child that has ended, if there is one.
fn collect() -> io::Result<Option<(Pid, ExitStatus)>> {
    let mut status = 0;
    // Not nix's waitpid: it has no words for death by a real-time signal.
    // SAFETY: the status lives through the call.
    match Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) }) {
        Ok(0) | Err(Errno::ECHILD) => Ok(None),
        Ok(pid) if libc::WIFSIGNALED(status) => {
            Ok(Some((Pid::from_raw(pid), 128 + libc::WTERMSIG(status).cast_unsigned())))
        }
        Ok(pid) => Ok(Some((Pid::from_raw(pid), libc::WEXITSTATUS(status).cast_unsigned()))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_before_the_watch_is_not_lost() {
        let reaper = Reaper::default();
        let launch = reaper.launch();
        reaper.ended(Pid::from_raw(7), 3);
        assert_eq!(launch.watch(Pid::from_raw(7)).try_recv(), Ok(3));

        let mut watched = launch.watch(Pid::from_raw(8));
        reaper.ended(Pid::from_raw(8), 137);
        assert_eq!(watched.try_recv(), Ok(137));
    }

    #[test]
    fn ends_that_nobody_waits_for_are_forgotten() {
        let reaper = Reaper::default();
        reaper.ended(Pid::from_raw(7), 0);
        assert!(reaper.table().early.is_empty());
        let launch = reaper.launch();
        reaper.ended(Pid::from_raw(9), 0);
        drop(launch);
        assert!(reaper.table().early.is_empty());
    }
}
