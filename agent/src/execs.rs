//! Processes that were started after the first one, by their ids: of a container, or of the guest itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Pid;

use crate::process::Process;

/// What is wrong with an id.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("an exec needs an id")]
    NoId,
    /// There is no such process.
    #[error("process {0:?} does not exist")]
    NoProcess(String),
    /// There is such a process already.
    #[error("process {0:?} already exists")]
    Exists(String),
    /// It has not ended.
    #[error("cannot remove a running process")]
    Running,
}

/// The table of these processes.
#[derive(Debug, Default)]
pub struct Execs(Mutex<HashMap<String, Exec>>);

#[derive(Debug)]
enum Exec {
    Starting,
    Started(Arc<Process>),
}

impl Execs {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process, which has the id from now on unless it does not start.
    pub async fn start<E: From<Error>>(
        &self,
        id: &str,
        start: impl Future<Output = Result<Process, E>>,
    ) -> Result<Pid, E> {
        if id.is_empty() {
            return Err(Error::NoId.into());
        }
        {
            let mut table = self.table();
            if table.contains_key(id) {
                return Err(Error::Exists(id.to_owned()).into());
            }
            table.insert(id.to_owned(), Exec::Starting);
        }
        let started = start.await;
        let mut table = self.table();
        match started {
            Ok(process) => {
                let pid = process.pid();
                table.insert(id.to_owned(), Exec::Started(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                table.remove(id);
                Err(error)
            }
        }
    }

    /// The process with this id.
    pub fn get(&self, id: &str) -> Result<Arc<Process>, Error> {
        match self.table().get(id) {
            Some(Exec::Started(process)) => Ok(process.clone()),
            Some(Exec::Starting) | None => Err(Error::NoProcess(id.to_owned())),
        }
    }

    /// The id of the process with this pid, if it runs.
    pub fn id_of(&self, pid: Pid) -> Option<String> {
        let is_it = |exec: &Exec| matches!(exec, Exec::Started(p) if p.pid() == pid && p.exit().is_none());
        self.table().iter().find(|(_, exec)| is_it(exec)).map(|(id, _)| id.clone())
    }

    /// Those that run.
    pub fn running(&self) -> Vec<(Pid, String)> {
        let table = self.table();
        let running = table.iter().filter_map(|(id, exec)| match exec {
            Exec::Started(process) if process.exit().is_none() => Some((process.pid(), id.clone())),
            _ => None,
        });
        running.collect()
    }

    /// Forgets a process that has ended.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        if self.get(id)?.exit().is_none() {
            return Err(Error::Running);
        }
        self.table().remove(id).map(drop).ok_or_else(|| Error::NoProcess(id.to_owned()))
    }
}
