//! Pids of the host that stand for containers: threads of the VMM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Machine;
use crate::error::Error;
use crate::guest::vmm::Thread;

/// By the ids of the containers that they stand for.
pub type Threads = BTreeMap<String, Thread>;

/// How long the end of a thread of the VMM is waited for. Nothing depends on it.
const REMOVAL_LIMIT: Duration = Duration::from_secs(2);

impl Machine {
    /// The pid on the host by which clients are to know one more container of a pod, so that they can name it by that.
    /// If it cannot have one of its own, it is the VMM's. On a task of its own: see [`Machine::attach_disks`].
    pub async fn take_pid(self: &Arc<Self>, container: &str) -> u32 {
        let (machine, container) = (Arc::clone(self), container.to_owned());
        let taken = tokio::spawn(async move {
            let thread = machine.vmm.add_placeholder().await?;
            machine.threads.send_modify(|threads| {
                threads.insert(container, thread);
            });
            Ok::<_, Error>(thread.pid)
        });
        match taken.await {
            Ok(Ok(pid)) => return pid,
            Ok(Err(e)) => log::warn!("a container has the VMM's pid: {e}"),
            Err(e) => log::warn!("a container has the VMM's pid: {e}"),
        }
        self.pid()
    }

    /// A container is gone, and its pid with it. On a task of its own.
    pub async fn release_pid(self: &Arc<Self>, container: &str) {
        let mut thread = None;
        // Without a word to who writes it down: a wrong pid of what is gone does no harm, a file that is written while
        // the pod is removed does.
        self.threads.send_if_modified(|threads| {
            thread = threads.remove(container);
            false
        });
        let Some(thread) = thread.filter(|_| !self.is_dead()) else { return };
        let machine = Arc::clone(self);
        let released = tokio::spawn(async move { machine.vmm.remove_placeholder(thread).await });
        match tokio::time::timeout(REMOVAL_LIMIT, released).await {
            Ok(Ok(Err(e))) => log::warn!("the pid of container {container}: {e}"),
            Err(_) => log::warn!("the pid of container {container}: kata-vmm does not answer"),
            Ok(_) => {}
        }
    }
}
