//! The execs of a container: added, started, deleted.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use serde_json::{Map, Value};

use super::Container;
use crate::error::{Error, Result};
use crate::guest::agent::ProcessName;
use crate::pod::process::{Exit, Phase, Process};
use crate::pod::stdio::{Paths, Streams};

impl Container {
    pub(super) async fn start_exec(self: &Arc<Self>, process: &Arc<Process>) -> Result<()> {
        process.may_start()?;
        match self.try_start_exec(process).await {
            Ok(pid) => {
                process.started();
                self.events.publish(&TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: process.name.exec.clone(),
                    pid,
                    ..Default::default()
                });
                self.follow(process);
                Ok(())
            }
            Err(e) => {
                // It will never run, and nobody must wait for its end.
                process.stopped(Exit { status: 255, at: SystemTime::now() });
                Err(e)
            }
        }
    }

    async fn try_start_exec(&self, process: &Process) -> Result<u32> {
        let namespace = self.events.namespace();
        let mut streams = Streams::open(&process.paths, &self.id, namespace, &self.machine.ports).await?;
        let spec = process.spec_for_guest();
        let answer = self.agent.exec_process(&process.name, spec, streams.ports(), false).await;
        let pid = self.with_streams(process, &mut streams, answer).await?;
        process.exists(pid, streams);
        Ok(pid)
    }

    /// Adds an exec, to be started later.
    pub fn add_exec(&self, exec: &str, spec: Map<String, Value>, paths: Paths) -> Result<()> {
        match self.init.phase() {
            Phase::Stopped(_) => {
                return Err(Error::FailedPrecondition("cannot exec in a stopped state".into()));
            }
            _ if self.is_paused() => {
                return Err(Error::FailedPrecondition("cannot exec in a paused state".into()));
            }
            _ => {}
        }
        let name = ProcessName { container: self.id.clone(), exec: exec.to_owned() };
        {
            let mut execs = self.execs();
            if execs.contains_key(exec) {
                return Err(Error::AlreadyExists(format!("id {exec}")));
            }
            execs.insert(exec.to_owned(), Process::new(name, paths, spec));
        }
        let (container_id, exec_id) = (self.id.clone(), exec.to_owned());
        self.events.publish(&TaskExecAdded { container_id, exec_id, ..Default::default() });
        Ok(())
    }

    /// Removes an exec that does not run. One whose start is under way will run, so that is waited for.
    pub async fn delete_exec(&self, exec: &str) -> Result<(u32, Exit)> {
        let process = self.process(exec)?;
        let _starting = process.starting.lock().await;
        if !self.execs().get(exec).is_some_and(|known| Arc::ptr_eq(known, &process)) {
            // By another Delete meanwhile; what has its id now is another exec.
            return Err(Error::NotFound(format!("process does not exist {exec}")));
        }
        let exit = match process.phase() {
            Phase::Running => {
                return Err(Error::FailedPrecondition("cannot delete a running process".into()));
            }
            Phase::Stopped(exit) => exit,
            Phase::Created => Exit { status: 0, at: SystemTime::now() },
        };
        if process.guest_pid() != 0
            && !self.machine.is_dead()
            && let Err(e) = self.agent.remove_process(&process.name).await
        {
            log::warn!("remove exec {exec} of container {}: {e}", self.id);
        }
        // Whoever waits for an exec that never ran stops waiting.
        process.stopped(exit);
        self.execs().remove(exec);
        Ok((process.guest_pid(), exit))
    }
}
