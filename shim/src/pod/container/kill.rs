//! How a container is made to end, if need be with its machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::libc::SIGKILL;

use super::Container;
use crate::error::{Error, Result};
use crate::pod::process::{Exit, Phase, Process};
use crate::pod::stdio::Streams;

/// How long a process that was never started may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long a container may take to end by SIGKILL, until its machine ends. What it waits for may be slow: the guest's
/// disks and the host's file systems.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// How long what is on its way within this process may take.
const MOMENT: Duration = Duration::from_millis(100);

impl Container {
    /// Ends a first process that was never started.
    pub(super) async fn discard(&self) -> Result<Exit> {
        let signalled = self.agent.signal_process(&self.init.name, SIGKILL.unsigned_abs(), true).await;
        if let Err(e) = &signalled {
            log::debug!("container {}: {e}", self.id);
        }
        if !matches!(signalled, Err(Error::DeadlineExceeded(_)))
            && let Ok(exit) = tokio::time::timeout(END_LIMIT, self.init.wait()).await
        {
            return Ok(exit);
        }
        self.end_machine();
        let ended = tokio::time::timeout(END_LIMIT, self.init.wait()).await;
        ended.map_err(|_| Error::DeadlineExceeded(format!("container {} does not end", self.id)))
    }

    /// What the agent has answered of a new process, once it has its streams. Without them it is of no use, and ends.
    pub(super) async fn with_streams(
        &self,
        process: &Process,
        streams: &mut Streams,
        answer: Result<u32>,
    ) -> Result<u32> {
        match answer {
            Ok(pid) => match streams.connected().await {
                Ok(()) => Ok(pid),
                // Why it has ended says more.
                Err(e @ Error::Unavailable(_)) => Err(self.machine.agent().await.err().unwrap_or(e)),
                Err(lost) => {
                    self.withdraw(process).await;
                    Err(lost)
                }
            },
            // Why the host has closed a stream says more than that the guest has found it closed.
            Err(e) => match tokio::time::timeout(MOMENT, streams.connected()).await {
                Ok(Err(lost @ Error::Host(_))) => Err(lost),
                _ => Err(e),
            },
        }
    }

    /// Ends a process whose start is reported to nobody: an exec, or the container if it is its first.
    async fn withdraw(&self, process: &Process) {
        let name = &process.name;
        let is_init = name.exec.is_empty();
        let ended = async {
            // It may have ended already, and is to be removed all the same.
            if let Err(e) = self.agent.signal_process(name, SIGKILL.unsigned_abs(), is_init).await {
                log::debug!("container {} exec {:?}: {e}", name.container, name.exec);
            }
            self.agent.wait_process(name).await?;
            if is_init {
                let writes = self.machine.has_lasting_disks(&self.id).await;
                self.agent.remove_container(&self.id, writes).await
            } else {
                self.agent.remove_process(name).await
            }
        };
        match tokio::time::timeout(END_LIMIT, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => log::warn!("container {} exec {:?}: {e}", name.container, name.exec),
            Err(_) => log::warn!("container {} exec {:?} does not end", name.container, name.exec),
        }
    }

    /// The guest does not do what nothing can refuse, so it ends with all that is in it.
    fn end_machine(&self) {
        log::error!("container {} does not end by SIGKILL: its machine is ended", self.id);
        self.machine.kill();
    }

    /// After a SIGKILL: whatever the agent has answered, the container ends.
    fn see_to_the_end(self: &Arc<Self>) {
        if self.killed.swap(true, Ordering::Relaxed) {
            return;
        }
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let ended = tokio::time::timeout(KILL_LIMIT, container.init.wait()).await;
            // Whose output is still taken away has ended.
            if ended.is_err() && !container.init.has_ended() {
                container.end_machine();
            }
        });
    }

    /// Signals a process, or all of the container. An exec's start is waited for: it has a limit. The container's first
    /// process is in the guest from Create on, so its end waits for nothing.
    pub async fn kill(self: &Arc<Self>, exec: &str, signal: u32, all: bool) -> Result<()> {
        let process = self.process(exec)?;
        let phase = if exec.is_empty() { process.phase() } else { process.settled().await };
        match phase {
            Phase::Stopped(_) => return Err(Error::already_finished()),
            Phase::Created if !exec.is_empty() => {
                return Err(Error::FailedPrecondition(format!("process {exec} is not started")));
            }
            _ => {}
        }
        let ends = exec.is_empty() && signal == SIGKILL.unsigned_abs();
        let signalled = self.agent.signal_process(&process.name, signal, all).await;
        if ends {
            self.see_to_the_end();
        }
        match signalled {
            Err(Error::DeadlineExceeded(why)) if ends => {
                log::error!("{why}");
                self.end_machine();
                Ok(())
            }
            Err(Error::Agent { code: ttrpc::Code::NOT_FOUND, .. } | Error::Unavailable(_)) => {
                Err(Error::already_finished())
            }
            outcome => outcome,
        }
    }
}
