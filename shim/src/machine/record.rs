//! What is written down of a machine, so that it can be removed whatever becomes of this process.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::sync::watch;

use super::layout::{Identity, Layout, State};
use super::pids::Threads;
use crate::error::{Error, Result};
use crate::host::pidfd::ProcessId;
use crate::network;

/// What is written down of a pod, but for its processes.
pub struct Record {
    pub layout: Layout,
    pub identity: Identity,
    pub cgroup: Option<PathBuf>,
    pub network: Option<network::Record>,
}

impl Record {
    pub fn write(&self, vmm: Vec<ProcessId>, pids: BTreeMap<String, u32>) -> Result<()> {
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        let written = ProcessId::of(pid).and_then(|shim| {
            self.layout.write(&State {
                namespace: self.identity.namespace.clone(),
                sandbox: self.identity.sandbox.clone(),
                shim,
                vmm,
                pids,
                cgroup: self.cgroup.clone(),
                network: self.network.clone(),
            })
        });
        written.map_err(|e| Error::io(self.layout.state.display(), &e))
    }

    /// Writes the VMM's processes down as they become known, and the pids of containers.
    pub async fn follow(
        self,
        mut processes: watch::Receiver<Vec<ProcessId>>,
        mut threads: watch::Receiver<Threads>,
    ) {
        loop {
            let changed = tokio::select! {
                changed = processes.changed() => changed,
                changed = threads.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            let processes = processes.borrow_and_update().clone();
            let pids = threads.borrow_and_update().clone().into_iter();
            let pids = pids.map(|(container, thread)| (container, thread.pid)).collect();
            // Once the state is gone the pod is, and must not come back.
            if self.layout.read().is_some()
                && let Err(e) = self.write(processes, pids)
            {
                log::error!("{e}");
            }
        }
    }
}
