//! Standard streams: one connection to the host each, copied to and from the process's pipe or terminal.

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::stream::Stream;
use crate::transport::Transport;

/// What one copy moves at once: the capacity of a pipe.
const CHUNK: usize = 64 * 1024;
/// How long the exit of a process waits for a host that takes nothing of what lies in its terminal.
const STALL: Duration = Duration::from_secs(10);

/// The ports of a process's streams on the host; 0 is "no such stream".
#[derive(Debug, Clone, Copy, Default)]
pub struct Ports {
    /// Standard input.
    pub stdin: u32,
    /// Standard output, or the output of the terminal.
    pub stdout: u32,
    /// Standard error.
    pub stderr: u32,
}

/// The streams of a process that is about to start, connected to the host.
#[derive(Debug, Default)]
pub struct Connected {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// A port of the host could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("connect standard stream to port {port} of the host: {source}")]
pub struct ConnectError {
    port: u32,
    source: io::Error,
}

impl Connected {
    /// Connects what has a port. With a terminal standard error has none.
    pub async fn connect(transport: &Transport, ports: Ports, terminal: bool) -> Result<Self, ConnectError> {
        let to = async |port| match port {
            0 => Ok(None),
            port => transport.connect(port).await.map(Some).map_err(|source| ConnectError { port, source }),
        };
        let stderr = if terminal { 0 } else { ports.stderr };
        Ok(Self { stdin: to(ports.stdin).await?, stdout: to(ports.stdout).await?, stderr: to(stderr).await? })
    }

    /// Makes the pipes of a process without a terminal: its own three ends, and the copies to run.
    pub fn pipes(self) -> io::Result<([OwnedFd; 3], Plan)> {
        let null =
            nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?;
        let mut plan = Plan::default();
        let stdin = match self.stdin {
            None => null.try_clone()?,
            Some(host) => {
                let (process, ours) = pipe2(OFlag::O_CLOEXEC)?;
                plan.input = Some((host, Arc::new(Stream::new(ours)?)));
                process
            }
        };
        let mut outputs = Vec::new();
        for (host, slot) in [(self.stdout, &mut plan.stdout), (self.stderr, &mut plan.stderr)] {
            outputs.push(match host {
                None => null.try_clone()?,
                Some(host) => {
                    let (ours, process) = pipe2(OFlag::O_CLOEXEC)?;
                    *slot = Some((Arc::new(Stream::new(ours)?), host));
                    process
                }
            });
        }
        let [stdout, stderr] = <[OwnedFd; 2]>::try_from(outputs).map_err(|_| io::ErrorKind::Other)?;
        Ok(([stdin, stdout, stderr], plan))
    }

    /// Plans the copies of a process with a terminal.
    pub fn terminal(self, master: &Arc<Stream>) -> Plan {
        Plan {
            input: self.stdin.map(|host| (host, master.clone())),
            stdout: self.stdout.map(|host| (master.clone(), host)),
            stderr: None,
        }
    }
}

/// Which copies a process needs.
#[derive(Debug, Default)]
pub struct Plan {
    input: Option<(Stream, Arc<Stream>)>,
    stdout: Option<(Arc<Stream>, Stream)>,
    stderr: Option<(Arc<Stream>, Stream)>,
}

impl Plan {
    /// Starts them.
    pub fn start(self) -> Copies {
        Copies {
            input: self.input.map(|(host, process)| tokio::spawn(copy_in(host, process))),
            stdout: self.stdout.map(Output::start),
            stderr: self.stderr.map(Output::start),
        }
    }
}

/// The running copies of a process's streams.
#[derive(Debug)]
pub struct Copies {
    input: Option<JoinHandle<()>>,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

impl Copies {
    /// The process is dead: ends its input and answers how many bytes it wrote to standard output and standard error.
    /// They are on their way to the host, which waits for them. Children that hold a pipe open can continue to write;
    /// their copy continues too.
    pub async fn finish(self) -> (u64, u64) {
        if let Some(input) = self.input {
            input.abort();
        }
        let total = async |output: Option<Output>| match output {
            Some(output) => output.total().await,
            None => 0,
        };
        (total(self.stdout).await, total(self.stderr).await)
    }
}

/// One stream from the process to the host.
#[derive(Debug)]
struct Output {
    process: Arc<Stream>,
    /// Bytes that were taken from the process. This and the pipe's own count change within one step of the agent's only
    /// thread.
    copied: Arc<AtomicU64>,
    process_ended: oneshot::Sender<()>,
    drained: oneshot::Receiver<()>,
}

impl Output {
    fn start((process, host): (Arc<Stream>, Stream)) -> Self {
        let (process_ended, ended) = oneshot::channel();
        let (drained_sender, drained) = oneshot::channel();
        let copied = Arc::new(AtomicU64::new(0));
        let copy = CopyOut { process: process.clone(), host, copied: copied.clone(), refused: false };
        tokio::spawn(copy_out(copy, ended, drained_sender));
        Self { process, copied, process_ended, drained }
    }

    /// How many bytes the dead process wrote.
    async fn total(self) -> u64 {
        let Self { process, copied, process_ended, mut drained } = self;
        let copied = || copied.load(Ordering::Relaxed);
        if !nix::unistd::isatty(&*process).unwrap_or(false) {
            return copied() + process.pending();
        }
        // What lies in a terminal cannot be counted, only read: the kernel moves it to where it can be read by and by.
        // The copy is gone when the stream ended before the process did.
        let _ = process_ended.send(());
        let mut before = copied();
        while tokio::time::timeout(STALL, &mut drained).await.is_err() {
            let now = copied();
            if now == before {
                log::warn!("the host takes no output of a dead process; its exit is sent without the rest");
                break;
            }
            before = now;
        }
        copied()
    }
}

/// The copy of one output.
struct CopyOut {
    process: Arc<Stream>,
    host: Stream,
    copied: Arc<AtomicU64>,
    /// Whether the host was seen to take no more.
    refused: bool,
}

impl CopyOut {
    /// Copies until `stop`, or the end of the stream, which is answered with true.
    async fn copy_until(&mut self, mut stop: impl Future + Unpin) -> bool {
        // The buffer is there only while something flows: a pod has many streams and most are idle.
        let mut buffer = Vec::new();
        loop {
            tokio::select! {
                biased;
                _ = &mut stop => return false,
                ready = self.process.readable() => if let Err(error) = ready { return Self::failed(&error) },
            }
            buffer.resize(CHUNK, 0);
            match self.process.try_read(&mut buffer) {
                Ok(None) => buffer = Vec::new(),
                Ok(Some(0)) => return true,
                Ok(Some(count)) => self.send(buffer.get(..count).unwrap_or_default()).await,
                Err(error) => return Self::failed(&error),
            }
        }
    }

    /// Copies what lies in the terminal, now that its process is dead. True at the end, which comes: a terminal is hung
    /// up when its session's leader dies, and nobody can keep writing to it.
    async fn drain(&mut self) -> bool {
        let mut buffer = vec![0; CHUNK];
        loop {
            match read(&*self.process, &mut buffer) {
                Err(Errno::EAGAIN) => return false,
                Ok(0) | Err(Errno::EIO) => return true,
                Ok(count) => self.send(buffer.get(..count).unwrap_or_default()).await,
                Err(error) => return Self::failed(&error.into()),
            }
        }
    }

    fn failed(error: &io::Error) -> bool {
        log::warn!("output of a process: {error}");
        true
    }

    /// A host that hung up must neither block nor kill the process: its output is read and dropped.
    async fn send(&mut self, bytes: &[u8]) {
        self.copied.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if let Err(error) = self.host.send_all(bytes).await
            && !std::mem::replace(&mut self.refused, true)
        {
            log::warn!("the host does not take a process's output: {error}");
        }
    }
}

/// Copies a process's output until its end. Reports through `drained` when all that lay in its terminal at the process's
/// death is sent.
async fn copy_out(mut copy: CopyOut, ended: oneshot::Receiver<()>, drained: oneshot::Sender<()>) {
    let stop = pin!(async {
        // Of a pipe, nobody says it.
        if ended.await.is_err() {
            pending::<()>().await;
        }
    });
    let at_end = copy.copy_until(stop).await || copy.drain().await;
    let _ = drained.send(());
    if !at_end {
        copy.copy_until(pending::<()>()).await;
    }
}

/// Copies the host's input to the process. At its end the process's pipe is closed; a terminal stays.
async fn copy_in(host: Stream, process: Arc<Stream>) {
    let mut buffer = Vec::new();
    while host.readable().await.is_ok() {
        buffer.resize(CHUNK, 0);
        while let Ok(Some(count)) = host.try_read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default();
            if bytes.is_empty() || process.send_all(bytes).await.is_err() {
                return;
            }
        }
        buffer = Vec::new();
    }
}
