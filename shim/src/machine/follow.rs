//! Later mounts of the host, in volumes that are to show them (propagation `rslave` or `rshared`; HostToContainer).
//!
//! The kernel reports each mount and unmount; nothing is looked at in intervals. See [`crate::storage::volumes`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::Machine;
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::host::pidfd::PidFd;
use crate::storage::share::Share;
use crate::storage::volumes::Changes;

/// Attempts to follow one change.
const MOST_FAILED: u32 = 10;
/// What the host does in so short a time is looked at once: it may have thousands of mounts.
const PAUSE: Duration = Duration::from_millis(100);

/// Follows the host until it is dropped.
pub struct Follower(AbortHandle);

impl Follower {
    /// Begins with what has changed since the volumes were bound. `vmm` is the process in whose mount namespace the
    /// share is.
    pub fn start(share: Arc<Share>, vmm: PidFd, agent: Agent) -> io::Result<Self> {
        // proc(5): the file is ready with priority when the namespace's mounts change.
        let table = File::open("/proc/self/mountinfo")?;
        // SAFETY: the file is owned by what is registered, and never taken out of it.
        let table = unsafe { AsyncFd::register_with_interest(table, Interest::PRIORITY) }?;
        Ok(Self(tokio::spawn(follow(table, share, Arc::new(vmm), agent)).abort_handle()))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(table: AsyncFd<File>, share: Arc<Share>, vmm: Arc<PidFd>, agent: Agent) {
    let mut failed = 0;
    loop {
        let (share, vmm) = (Arc::clone(&share), Arc::clone(&vmm));
        let followed = crate::host::threads::blocking(move || {
            share.follow(vmm.as_fd()).map_err(|e| Error::io("follow mounts", &e))
        });
        match followed.await {
            Ok(changes) if changes == Changes::default() => {}
            Ok(changes) => match agent.follow_mounts(&changes).await {
                Err(Error::Agent { text, .. } | Error::DeadlineExceeded(text)) => {
                    log::warn!("mounts of the host: {text}");
                }
                Err(e) => return log::debug!("mounts of the host are not followed any more: {e}"),
                Ok(()) => {}
            },
            Err(e) => {
                log::warn!("{e}");
                // For lack of a thread, a descriptor: no further change of the host's mounts may come.
                if failed < MOST_FAILED {
                    failed += 1;
                    tokio::time::sleep(PAUSE * failed).await;
                    continue;
                }
            }
        }
        failed = 0;
        tokio::time::sleep(PAUSE).await;
        match table.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(e) => return log::error!("mounts of the host are not followed any more: {e}"),
        }
    }
}

impl Machine {
    /// From now on the host's mounts appear in volumes that are to show them.
    pub async fn follow_mounts(&self) -> Result<()> {
        let mut follower = self.follower.lock().await;
        if follower.is_none() {
            let (vmm, agent) = (self.running().await?, self.agent().await?);
            let started = Follower::start(Arc::clone(&self.share), vmm, agent);
            *follower = Some(started.map_err(|e| Error::io("/proc/self/mountinfo", &e))?);
        }
        Ok(())
    }
}
