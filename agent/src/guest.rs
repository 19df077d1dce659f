//! Processes of the guest itself, outside of all containers: what the operator of the host runs to look around. Each has a
//! cgroup of its own, so that all that it has started ends with it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Pid;
use oci_spec::runtime::Process as ProcessSpec;

use crate::cgroup::Cgroup;
use crate::container::{Error, Pod};
use crate::execs::{self, Execs};
use crate::init::control::{Task, Work};
use crate::launch::IdMaps;
use crate::process::{self, Process, Surroundings};
use crate::streams::Ports;

type Result<T> = std::result::Result<T, Error>;

/// The cgroup above theirs. No id of a container begins with a dot.
const CGROUPS: &str = ".guest";

/// These processes.
#[derive(Debug)]
pub struct Guest {
    pod: Pod,
    execs: Execs,
    cgroups: Mutex<HashMap<String, Arc<Cgroup>>>,
}

impl Guest {
    /// None yet.
    pub fn new(pod: Pod) -> Self {
        Self { pod, execs: Execs::default(), cgroups: Mutex::default() }
    }

    fn cgroups(&self) -> MutexGuard<'_, HashMap<String, Arc<Cgroup>>> {
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one.
    pub async fn exec(&self, id: &str, process: &[u8], ports: Ports) -> Result<Pid> {
        let process: ProcessSpec = serde_json::from_slice(process)?;
        if id.starts_with('.') || id.contains('/') {
            return Err(Error::Invalid("the id of a process of the guest must be a plain name"));
        }
        self.execs.start(id, self.start(id, process, ports)).await
    }

    async fn start(&self, id: &str, process: ProcessSpec, ports: Ports) -> Result<Process> {
        let cgroup = Arc::new(Cgroup::create(Some(&Path::new(CGROUPS).join(id)), id)?);
        let cgroups = vec![cgroup.path().to_owned()];
        let task = Task { cgroups, process, seccomp: None, personality: None, work: Work::Guest };
        let Pod { transport, reaper, spares, .. } = &self.pod;
        let surroundings = Surroundings { transport, reaper, spares, ports, maps: IdMaps::default() };
        let at_end = {
            let cgroup = cgroup.clone();
            move || {
                if let Err(error) = cgroup.kill() {
                    log::debug!("{error}");
                }
            }
        };
        match Process::start(&task, None, surroundings, at_end).await {
            Ok((process, _)) => {
                self.cgroups().insert(id.to_owned(), cgroup);
                Ok(process)
            }
            Err(error) => {
                remove(&cgroup).await;
                Err(error.into())
            }
        }
    }

    /// One of them.
    pub fn process(&self, id: &str) -> Result<Arc<Process>> {
        Ok(self.execs.get(id)?)
    }

    /// Those that run.
    pub fn processes(&self) -> Vec<(Pid, String)> {
        self.execs.running()
    }

    /// Kills one, and what it has started.
    pub fn kill(&self, id: &str) -> Result<()> {
        if self.process(id)?.exit().is_some() {
            return Err(process::Error::Finished.into());
        }
        let cgroup = self.cgroups().get(id).cloned();
        Ok(cgroup.ok_or_else(|| execs::Error::NoProcess(id.to_owned()))?.kill()?)
    }

    /// Forgets one that has ended.
    pub async fn remove(&self, id: &str) -> Result<()> {
        self.execs.remove(id)?;
        let cgroup = self.cgroups().remove(id);
        if let Some(cgroup) = cgroup {
            remove(&cgroup).await;
        }
        Ok(())
    }
}

async fn remove(cgroup: &Cgroup) {
    if let Err(error) = cgroup.remove().await {
        log::warn!("process of the guest: {error}");
    }
}
