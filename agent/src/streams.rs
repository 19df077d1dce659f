//! Standard streams: one connection to the host each, copied to and from the process's pipe or terminal.

use std::io;
use std::os::fd::OwnedFd;
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
/// How long the exit of a process waits for a host that takes none of its output.
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
    /// The process is dead: sends what it left in its pipes and answers how many bytes of standard output and standard
    /// error the host has got. Children that hold a pipe open can continue to write; their copy continues too.
    pub async fn finish(self) -> (u64, u64) {
        if let Some(input) = self.input {
            input.abort();
        }
        let (stdout, stderr) = (self.stdout.map(Output::finish), self.stderr.map(Output::finish));
        let count = async |output| match output {
            Some(output) => Output::drained(output).await,
            None => 0,
        };
        (count(stdout).await, count(stderr).await)
    }
}

/// One stream from the process to the host.
#[derive(Debug)]
struct Output {
    sent: Arc<AtomicU64>,
    process_ended: oneshot::Sender<()>,
    drained: oneshot::Receiver<u64>,
}

/// An [`Output`] whose process is dead.
#[derive(Debug)]
struct Draining {
    sent: Arc<AtomicU64>,
    drained: oneshot::Receiver<u64>,
}

impl Output {
    fn start((process, host): (Arc<Stream>, Stream)) -> Self {
        let (process_ended, ended) = oneshot::channel();
        let (drained_sender, drained) = oneshot::channel();
        let sent = Arc::new(AtomicU64::new(0));
        let copy = CopyOut { process, host, sent: sent.clone(), copied: 0 };
        tokio::spawn(copy_out(copy, ended, drained_sender));
        Self { sent, process_ended, drained }
    }

    fn finish(self) -> Draining {
        // The copy is gone when the stream ended before the process did: `drained` then has the answer.
        let _ = self.process_ended.send(());
        Draining { sent: self.sent, drained: self.drained }
    }

    async fn drained(mut draining: Draining) -> u64 {
        let mut before = draining.sent.load(Ordering::Relaxed);
        loop {
            match tokio::time::timeout(STALL, &mut draining.drained).await {
                Ok(count) => return count.unwrap_or_else(|_| draining.sent.load(Ordering::Relaxed)),
                Err(_) => {
                    let now = draining.sent.load(Ordering::Relaxed);
                    if now == before {
                        log::warn!(
                            "the host takes no output of a dead process; its exit is sent without the rest"
                        );
                        return now;
                    }
                    before = now;
                }
            }
        }
    }
}

/// The copy of one output.
struct CopyOut {
    process: Arc<Stream>,
    host: Stream,
    sent: Arc<AtomicU64>,
    copied: u64,
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
                ready = self.process.readable() => if ready.is_err() { return true },
            }
            buffer.resize(CHUNK, 0);
            match self.process.try_read(&mut buffer) {
                Ok(None) => buffer = Vec::new(),
                Ok(Some(0)) | Err(_) => return true,
                Ok(Some(count)) => self.send(buffer.get(..count).unwrap_or_default()).await,
            }
        }
    }

    /// Copies what lies in the pipe, or in the terminal, now that the process is dead. True at the end.
    async fn drain(&mut self) -> bool {
        // A terminal is hung up when its session's leader dies: nobody can keep writing to it for ever.
        let terminal = nix::unistd::isatty(&*self.process).unwrap_or(false);
        let goal = if terminal { u64::MAX } else { self.copied + self.process.pending() };
        let mut buffer = vec![0; CHUNK];
        while self.copied < goal {
            match read(&*self.process, &mut buffer) {
                Err(Errno::EAGAIN) => break,
                Ok(0) | Err(_) => return true,
                Ok(count) => self.send(buffer.get(..count).unwrap_or_default()).await,
            }
        }
        false
    }

    /// A host that hung up must neither block nor kill the process: its output is read and dropped.
    async fn send(&mut self, bytes: &[u8]) {
        self.copied += bytes.len() as u64;
        let wrote = |part: usize| {
            self.sent.fetch_add(part as u64, Ordering::Relaxed);
        };
        let _ = self.host.write_counted(bytes, wrote).await;
    }
}

/// Copies a process's output until its end. Reports through `drained` how many bytes were sent when all that lay in the
/// pipe at the process's death is.
async fn copy_out(mut copy: CopyOut, ended: oneshot::Receiver<()>, drained: oneshot::Sender<u64>) {
    let at_end = copy.copy_until(ended).await || copy.drain().await;
    let _ = drained.send(copy.sent.load(Ordering::Relaxed));
    if !at_end {
        copy.copy_until(std::future::pending::<()>()).await;
    }
}

/// Copies the host's input to the process. At its end the process's pipe is closed; a terminal stays.
async fn copy_in(host: Stream, process: Arc<Stream>) {
    let mut buffer = Vec::new();
    while host.readable().await.is_ok() {
        buffer.resize(CHUNK, 0);
        while let Ok(Some(count)) = host.try_read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default();
            if bytes.is_empty() || process.write_counted(bytes, |_| ()).await.is_err() {
                return;
            }
        }
        buffer = Vec::new();
    }
}

/// Copies both ways between two streams until one ends.
pub async fn join(a: Stream, b: Stream) {
    let (a, b) = (Arc::new(a), Arc::new(b));
    let copy = async |from: &Stream, to: &Stream| {
        let mut buffer = vec![0; 4096];
        while from.readable().await.is_ok() {
            while let Ok(Some(count)) = from.try_read(&mut buffer) {
                let bytes = buffer.get(..count).unwrap_or_default();
                if bytes.is_empty() || to.write_counted(bytes, |_| ()).await.is_err() {
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = copy(&a, &b) => (),
        () = copy(&b, &a) => (),
    }
}
