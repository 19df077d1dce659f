//! A pod's virtual machine: launched for its first container ([`launch`]), ended after its last ([`Machine::end`]). In
//! between it takes containers' disks, files and limits.
//!
//! May use [`crate::network`], [`crate::storage`] and what is below them.

pub mod cleanup;
mod connect;
pub mod disks;
mod follow;
mod host_limits;
mod launch;
pub mod layout;
pub mod members;
mod pids;
mod record;
mod resize;
mod shape;
pub mod size;
pub mod sockets;
mod template;
mod watch;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use katana_config::HostNamespaces;
use katana_protocol::agent as api;
use katana_protocol::counters::Counter;
use tokio::sync::watch::{Receiver, Sender};

use self::follow::Follower;
use self::host_limits::HostLimits;
pub use self::launch::{First, Launch};
use self::layout::Layout;
use self::members::Members;
use self::pids::Threads;
use self::size::{Bounds, Size};
use self::watch::Watcher;
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::guest::ports::Ports;
use crate::guest::vmm::{Vmm, wait_end};
use crate::host::pidfd::PidFd;
use crate::network::Network;
use crate::storage::disk_slots::Slots;
use crate::storage::pod_volumes::Directory;
use crate::storage::share::Share;
use crate::storage::writable::Policy;

/// How long the end of a killed VMM is waited for.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A pod's virtual machine.
pub struct Machine {
    /// The shared directory.
    pub share: Arc<Share>,
    /// The ports that the guest may connect to.
    pub ports: Arc<Ports>,
    /// The directory of the host for which the guest has a tmpfs: the pod's /dev/shm.
    pub shared_memory: Option<PathBuf>,
    /// What becomes of containers that ask for namespaces of the host.
    pub host_namespaces: HostNamespaces,
    /// What of containers' files is on disks.
    pub disk_policy: Policy,
    /// Whether the host's tools may run programs in the guest itself.
    pub debug_console: bool,
    /// The containers that the agent may speak of.
    pub members: Arc<Members>,
    vmm: Vmm,
    /// The VMM's threads that stand for containers, by the containers' ids.
    threads: Sender<Threads>,
    network: Network,
    /// The network that was last sent to the agent.
    sent_network: tokio::sync::Mutex<api::Network>,
    /// Whether a container has been started; the pod's network is complete then.
    started: AtomicBool,
    layout: Layout,
    /// Whether a template is made of the machine: then it stays empty until the agent is there, or the machines that
    /// are restored from the template would have its NICs, disks and memory.
    becomes_template: bool,
    /// Where it was to begin.
    start: &'static str,
    agent: Receiver<Option<Result<Agent>>>,
    bounds: Bounds,
    size: tokio::sync::Mutex<Size>,
    /// On a host with cgroup v2.
    host_limits: Option<Arc<HostLimits>>,
    disks: tokio::sync::Mutex<Slots>,
    /// The directories of the pod alone that are shared and no disks. Held while a container gets disks that another one
    /// may have, and while such are taken away.
    shared_volumes: tokio::sync::Mutex<HashSet<Directory>>,
    /// For the first volume that is watched.
    watcher: tokio::sync::Mutex<Option<Watcher>>,
    /// For the first volume that follows the host's mounts.
    follower: tokio::sync::Mutex<Option<Follower>>,
}

impl Machine {
    /// Waits until the VMM is in its jail, in whose mount namespace containers' mounts are made from now on; the answer
    /// is its process.
    pub async fn running(&self) -> Result<PidFd> {
        let process = if self.vmm.running().await { self.vmm.process() } else { None };
        match process {
            Some(process) => Ok(process),
            None => {
                Err(self.agent().await.err().unwrap_or_else(|| Error::Unavailable("the VM is gone".into())))
            }
        }
    }

    /// The agent, as soon as it is there, or why it is not.
    pub async fn agent(&self) -> Result<Agent> {
        let mut agent = self.agent.clone();
        let ready = agent.wait_for(Option::is_some).await.ok().and_then(|agent| agent.clone());
        let agent = ready.unwrap_or_else(|| Err(Error::Unavailable("the VM is gone".into())))?;
        match &*self.vmm.ended().borrow() {
            Some(end) => Err(Error::Unavailable(end.to_string())),
            None => Ok(agent),
        }
    }

    /// The agent, if it is there already.
    pub fn agent_now(&self) -> Option<Agent> {
        self.agent.borrow().clone().and_then(Result::ok).filter(|_| !self.is_dead())
    }

    /// What the VMM has counted; nothing unless it answers in this time.
    pub async fn counts(&self, limit: Duration) -> Option<Vec<(Counter, u64)>> {
        self.vmm.counts(limit).await
    }

    /// The last lines of the guest's console.
    pub async fn console(&self) -> Result<String> {
        self.vmm.console().await
    }

    /// Where the machine began, in a word: at its boot if the template turned out to be of no use.
    pub fn start(&self) -> &'static str {
        let refused = matches!(&*self.vmm.template().borrow(), Some(Err(_)));
        if refused && self.start == template::TEMPLATE { template::BOOT } else { self.start }
    }

    /// The VMM's pid on the host.
    pub fn pid(&self) -> u32 {
        u32::try_from(self.vmm.pid()).unwrap_or(0)
    }

    /// Whether the VM has ended.
    pub fn is_dead(&self) -> bool {
        self.vmm.ended().borrow().is_some()
    }

    /// Has the VM end; what is left of it stays.
    pub fn kill(&self) {
        self.vmm.kill();
    }

    /// Ends the VM and removes all that is left of it.
    pub async fn end(&self) {
        self.vmm.kill();
        if tokio::time::timeout(END_LIMIT, wait_end(&mut self.vmm.ended())).await.is_err() {
            log::error!("the killed VMM does not end");
        }
        cleanup::remove_blocking(&self.layout).await;
    }
}
