//! A running process of a container: signals, terminal, end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::early_signals;
use crate::init::control::{Failure, Task};
use crate::init::resize;
use crate::launch::{self, Gate, IdMaps, Launched, Spares};
use crate::reaper::Reaper;
use crate::stream::Stream;
use crate::streams::{ConnectError, Connected, Ports};
use crate::syscalls::signal_process;
use crate::transport::Transport;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 and the signal's number.
    pub status: u32,
    /// Bytes that were written to standard output.
    pub stdout_bytes: u64,
    /// Bytes that were written to standard error.
    pub stderr_bytes: u64,
}

/// What a process cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A stream has no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not start.
    #[error(transparent)]
    Launch(#[from] launch::Error),
    /// The agent has no descriptors left, say.
    #[error("standard streams: {0}")]
    Streams(io::Error),
    /// It is dead.
    #[error("process already finished")]
    Finished,
    /// There is no such signal, or the like.
    #[error("signal {0}: {1}")]
    Signal(u32, io::Error),
    /// Only terminals have a size.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The terminal does not take the size.
    #[error("resize the terminal: {0}")]
    Resize(io::Error),
}

impl Error {
    /// What the process itself said was wrong, if it did.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Launch(launch::Error::Failed(failure)) => Some(failure),
            _ => None,
        }
    }
}

/// A process: a container's first, or an exec's.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    terminal: Option<Arc<Stream>>,
    exit: watch::Receiver<Option<Exit>>,
    /// When its program began.
    started: OnceLock<Instant>,
}

/// What a process needs besides its task.
pub struct Surroundings<'a> {
    /// Where its streams go.
    pub transport: &'a Transport,
    /// What reports its end.
    pub reaper: &'a Reaper,
    /// Processes that were started ahead.
    pub spares: &'a Spares,
    /// The ports of its streams.
    pub ports: Ports,
    /// The maps of its user namespace, if it makes one.
    pub maps: IdMaps,
}

impl Process {
    /// Starts a process. `at_end` runs at its end, before anyone hears of it.
    pub async fn start(
        task: &Task,
        container: Option<&Self>,
        surroundings: Surroundings<'_>,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Result<(Self, Option<Gate>), Error> {
        let Surroundings { transport, reaper, spares, ports, maps } = surroundings;
        let wants_terminal = task.process.terminal() == Some(true);
        let connected = Connected::connect(transport, ports, wants_terminal).await?;
        let launch = reaper.launch();
        let container = container.map(|process| std::os::fd::AsFd::as_fd(&process.pidfd));
        let (launched, plan, terminal) = if wants_terminal {
            let mut launched = launch::launch(task, container, None, &maps, &launch, spares).await?;
            let master = launched.terminal.take().ok_or(Error::NoTerminal)?;
            let master = Arc::new(Stream::new(master).map_err(Error::Streams)?);
            (launched, connected.terminal(&master), Some(master))
        } else {
            let (pipes, plan) = connected.pipes().map_err(Error::Streams)?;
            (launch::launch(task, container, Some(pipes), &maps, &launch, spares).await?, plan, None)
        };
        let copies = plan.start();
        let Launched { pid, pidfd, ended, gate, .. } = launched;
        let (sender, exit) = watch::channel(None);
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let Ok(status) = ended.await else { return };
            at_end();
            let (stdout_bytes, stderr_bytes) = copies.finish().await;
            let _ = sender.send(Some(Exit { status, stdout_bytes, stderr_bytes }));
        });
        let process = Self { pid, pidfd, terminal, exit, started: OnceLock::new() };
        if gate.is_none() {
            process.started();
        }
        Ok((process, gate))
    }

    /// In the agent's pid namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end.
    pub fn wait(&self) -> impl Future<Output = Option<Exit>> + Send + 'static {
        let mut exit = self.exit.clone();
        async move { exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit) }
    }

    /// Its program runs from now on.
    pub fn started(&self) {
        // Once is enough.
        let _ = self.started.set(Instant::now());
    }

    /// Waits until it can take the signal, if it has only just been started.
    pub async fn ready_for(&self, signal: u32) {
        if let Some(start) = self.started.get() {
            early_signals::wait_until_ready(self.pid, *start, signal, || self.exit().is_some()).await;
        }
    }

    /// Sends a signal to this process alone.
    pub fn signal(&self, signal: u32) -> Result<(), Error> {
        let number = i32::try_from(signal).unwrap_or(-1);
        signal_process(&self.pidfd, number).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => Error::Finished,
            _ => Error::Signal(signal, error),
        })
    }

    /// Sets the size of the terminal.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), Error> {
        let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        if self.exit().is_some() {
            return Err(Error::Finished);
        }
        resize(&**terminal, cells(columns), cells(rows)).map_err(Error::Resize)
    }
}
