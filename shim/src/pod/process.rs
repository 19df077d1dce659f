//! One process of a container, its first or an exec: its state and how it ended.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value};
use tokio::sync::watch;

use super::stdio::{Paths, Streams};
use crate::error::{Error, Result};
use crate::guest::agent::{Agent, ProcessName};

/// What a process that was killed with its VM exits with: as by SIGKILL.
pub const KILLED: u32 = 128 + 9;

/// How a process ended, kept so that it can be asked for later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 and the signal's number.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It waits for Start.
    Created,
    /// It runs, or is frozen.
    Running,
    /// It has ended.
    Stopped(Exit),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// How the agent knows it.
    pub name: ProcessName,
    /// Its streams on the host.
    pub paths: Paths,
    /// An exec's OCI process.
    pub spec: Map<String, Value>,
    /// Held while the process is started, until its start is published: its end is published afterwards. Held as well
    /// by who deletes an exec, and taken by who signals one: the program that comes of a start would be nobody's.
    pub starting: tokio::sync::Mutex<()>,
    phase: watch::Sender<Phase>,
    guest_pid: AtomicU32,
    /// Whether it has ended in the guest; its output may still be on its way.
    ended: AtomicBool,
    streams: OnceLock<Streams>,
    stdin_closed: AtomicBool,
    size: Mutex<Option<(u32, u32)>>,
}

impl Process {
    /// A process that waits for Start.
    pub fn new(name: ProcessName, paths: Paths, spec: Map<String, Value>) -> Arc<Self> {
        Arc::new(Self {
            name,
            paths,
            spec,
            starting: tokio::sync::Mutex::default(),
            phase: watch::channel(Phase::Created).0,
            guest_pid: AtomicU32::new(0),
            ended: AtomicBool::new(false),
            streams: OnceLock::new(),
            stdin_closed: AtomicBool::new(false),
            size: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Where it is, once it is not being started.
    pub async fn settled(&self) -> Phase {
        let _starting = self.starting.lock().await;
        self.phase()
    }

    /// Start is for what has been created only.
    pub fn may_start(&self) -> Result<()> {
        match self.phase() {
            Phase::Created => Ok(()),
            Phase::Running => Err(Error::FailedPrecondition("cannot start a running process".into())),
            Phase::Stopped(_) => Err(Error::FailedPrecondition("cannot start a stopped process".into())),
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        let stopped = phase.wait_for(|phase| matches!(phase, Phase::Stopped(_))).await;
        match stopped.map(|phase| *phase) {
            Ok(Phase::Stopped(exit)) => exit,
            // The sender is this process itself.
            _ => Exit { status: KILLED, at: SystemTime::now() },
        }
    }

    /// It exists in the guest.
    pub fn exists(&self, pid: u32, streams: Streams) {
        self.guest_pid.store(pid, Ordering::Relaxed);
        let _ = self.streams.set(streams);
        if self.stdin_closed.load(Ordering::Relaxed) {
            self.close_stdin();
        }
    }

    /// Its pid in the guest; 0 before it exists.
    pub fn guest_pid(&self) -> u32 {
        self.guest_pid.load(Ordering::Relaxed)
    }

    /// Whether it has ended in the guest, or with it.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// It runs, unless it has ended already.
    pub fn started(&self) {
        self.advance(Phase::Running);
    }

    /// It has ended. Only the first end counts.
    pub fn stopped(&self, exit: Exit) {
        self.advance(Phase::Stopped(exit));
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let ended = matches!(phase, Phase::Stopped(_));
            if !ended {
                *phase = to;
            }
            !ended
        });
    }

    /// CloseIO. A client whose input is short asks for it before an exec has started.
    pub fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::Relaxed);
        if let Some(streams) = self.streams.get() {
            streams.close_stdin();
        }
    }

    /// Sets the terminal's size, now or when the process starts.
    pub async fn resize(&self, agent: &Agent, columns: u32, rows: u32) -> Result<()> {
        if !self.paths.terminal {
            return Ok(());
        }
        match self.phase() {
            Phase::Stopped(_) => Err(Error::FailedPrecondition("cannot resize a stopped container".into())),
            Phase::Created if !self.name.exec.is_empty() => {
                *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some((columns, rows));
                Ok(())
            }
            _ => agent.resize_terminal(&self.name, columns, rows).await,
        }
    }

    /// An exec's OCI process as the guest gets it.
    pub fn spec_for_guest(&self) -> Vec<u8> {
        let mut spec = self.spec.clone();
        crate::spec::process_for_guest(&mut spec, self.paths.terminal);
        if let Some((columns, rows)) = *self.size.lock().unwrap_or_else(PoisonError::into_inner) {
            spec.insert("consoleSize".into(), serde_json::json!({ "width": columns, "height": rows }));
        }
        Value::Object(spec).to_string().into_bytes()
    }

    /// Waits for the process's end in the guest, and until its output has been delivered. The end of the VM
    /// is the end of all processes.
    pub async fn follow(&self, agent: &Agent) -> Exit {
        let answer = agent.wait_process(&self.name).await;
        let at = SystemTime::now();
        self.ended.store(true, Ordering::Relaxed);
        let streams = self.streams.get();
        match answer {
            Ok(answer) => {
                if let Some(streams) = streams {
                    streams.drain(answer.stdout_bytes, answer.stderr_bytes).await;
                }
                Exit { status: answer.exit_status, at }
            }
            Err(e) => {
                log::warn!("container {} exec {:?}: {e}", self.name.container, self.name.exec);
                Exit { status: KILLED, at }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Arc<Process> {
        let name = ProcessName { container: "c".into(), exec: "e".into() };
        Process::new(name, Paths { terminal: true, ..Paths::default() }, Map::new())
    }

    #[tokio::test]
    async fn the_first_end_counts_and_can_be_asked_for_later() {
        let process = process();
        assert_eq!((process.phase(), process.exit()), (Phase::Created, None));
        process.started();
        assert_eq!(process.phase(), Phase::Running);
        let exit = Exit { status: 3, at: SystemTime::now() };
        let waiter = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.wait().await }
        });
        tokio::task::yield_now().await;
        process.stopped(exit);
        process.stopped(Exit { status: 4, ..exit });
        process.started();
        assert_eq!((waiter.await.unwrap(), process.wait().await, process.exit()), (exit, exit, Some(exit)));
    }

    #[test]
    fn an_exec_keeps_the_size_it_was_given_before_its_start() {
        let process = process();
        *process.size.lock().unwrap() = Some((80, 24));
        let spec: Value = serde_json::from_slice(&process.spec_for_guest()).unwrap();
        assert_eq!(spec, serde_json::json!({"terminal": true, "consoleSize": {"width": 80, "height": 24}}));
    }
}
