//! The containers of a machine by their ids, and the agent's reports of a lack of memory in them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::events::task::TaskOOM;

use crate::guest::agent::Agent;
use crate::host::events::Publisher;
use crate::host::rate::Rate;

/// Reports of a lack of memory at once, and then in a second. An agent has one answer for each container; those beyond
/// wait in the guest.
const RATE: (u32, u32) = (20, 4);

/// The containers of a machine.
#[derive(Debug, Default)]
pub struct Members(Mutex<BTreeSet<String>>);

impl Members {
    fn ids(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before a container is sent to the agent.
    pub fn add(&self, id: &str) {
        self.ids().insert(id.to_owned());
    }

    /// There is no such container any more.
    pub fn remove(&self, id: &str) {
        self.ids().remove(id);
    }

    fn has(&self, id: &str) -> bool {
        self.ids().contains(id)
    }

    /// Publishes which containers run out of memory, until the agent is gone.
    pub async fn report_oom(self: Arc<Self>, agent: Agent, events: Arc<Publisher>) {
        let (mut rate, mut dropped) = (Rate::new(RATE.0, RATE.1), 0_u64);
        loop {
            rate.wait().await;
            match agent.next_oom().await {
                Ok(container_id) if self.has(&container_id) => {
                    events.publish_once(&TaskOOM { container_id, ..Default::default() });
                }
                Ok(_) => {
                    dropped = dropped.saturating_add(1);
                    log::warn!("{dropped} reports of the agent are of containers that it does not have");
                }
                Err(e) => {
                    log::debug!("out-of-memory reports end: {e}");
                    return;
                }
            }
        }
    }
}
