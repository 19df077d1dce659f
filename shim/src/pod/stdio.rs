//! A process's standard streams: FIFOs, files or loggers of the host on one side, connections of the guest on
//! the other.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::agent::Stdio as Ports;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::logger_binary;
use crate::error::{Error, Result};
use crate::guest::ports::{self, Waiter};

/// After the end of a process, a client that takes nothing for this long does not get the rest of its output.
const PATIENCE: Duration = Duration::from_secs(10);
/// Nor does one that takes, or a guest that gives, so little at a time that it is not done after this. What is on its
/// way when a process ends are the buffers in between: less than a MiB.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// Where containerd wants the streams, as in its requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// FIFO or nothing.
    pub stdin: String,
    /// FIFO, URI or nothing.
    pub stdout: String,
    /// FIFO, URI or nothing; nothing with a terminal.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// The streams of one process.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    ports: (u32, u32, u32),
    /// What became of the connections that the guest is to make.
    connections: Vec<Connected>,
}

type Connected = oneshot::Receiver<Result<()>>;

#[derive(Debug)]
struct Input {
    /// Keeps the FIFO open for writing, so that a client may come and go until CloseIO.
    writer: Mutex<Option<File>>,
    copy: JoinHandle<()>,
}

#[derive(Debug)]
struct Output {
    progress: watch::Receiver<Progress>,
    copy: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    delivered: u64,
    ended: bool,
}

/// What output is written to.
#[derive(Debug)]
pub enum Sink {
    /// A FIFO, or a logger's pipe.
    Pipe(pipe::Sender),
    /// A file.
    File(File),
    /// The guest.
    Guest(UnixStream),
}

impl Streams {
    /// Opens the host's side and the ports for the guest's side. Copying starts when the guest connects.
    pub async fn open(
        paths: &Paths,
        container: &str,
        namespace: &str,
        ports: &Arc<ports::Ports>,
    ) -> Result<Self> {
        let stderr = if paths.terminal { "" } else { paths.stderr.as_str() };
        let (stdout, stderr) = sinks(&paths.stdout, stderr, container, namespace).await?;
        let mut streams = Self::default();
        if !paths.stdin.is_empty() {
            let waiter = ports.open_any();
            streams.ports.0 = waiter.port();
            let made = streams.expect_connection();
            streams.stdin = Some(Input::open(Path::new(&paths.stdin), waiter, made)?);
        }
        if let Some(sink) = stdout {
            let waiter = ports.open_any();
            streams.ports.1 = waiter.port();
            let made = streams.expect_connection();
            streams.stdout = Some(Output::start(sink, waiter, made));
        }
        if let Some(sink) = stderr {
            let waiter = ports.open_any();
            streams.ports.2 = waiter.port();
            let made = streams.expect_connection();
            streams.stderr = Some(Output::start(sink, waiter, made));
        }
        Ok(streams)
    }

    fn expect_connection(&mut self) -> oneshot::Sender<Result<()>> {
        let (made, connected) = oneshot::channel();
        self.connections.push(connected);
        made
    }

    /// The agent says that the process is there: ends when its streams are, too.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no descriptor for one, [`Error::DeadlineExceeded`] when the agent has not
    /// connected one.
    pub async fn connected(&mut self) -> Result<()> {
        for connected in self.connections.drain(..) {
            match tokio::time::timeout(PATIENCE, connected).await {
                Ok(Ok(connected)) => connected?,
                // The end of the process is heard of in another way.
                Ok(Err(_)) => {}
                Err(_) => return Err(Error::DeadlineExceeded("the guest did not connect a stream".into())),
            }
        }
        Ok(())
    }

    /// The ports to send to the guest.
    pub fn ports(&self) -> Ports {
        let (stdin_port, stdout_port, stderr_port) = self.ports;
        Ports { stdin_port, stdout_port, stderr_port, ..Default::default() }
    }

    /// CloseIO: once the client's end is closed as well, the process reads the end of its input.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// The process has ended after it wrote so many bytes: waits until the host has them, and lets the input go.
    pub async fn drain(&self, stdout: u64, stderr: u64) {
        if let Some(stdin) = &self.stdin {
            stdin.copy.abort();
        }
        self.close_stdin();
        let drained = |output: &Option<Output>, bytes| {
            let progress = output.as_ref().map(|output| output.progress.clone());
            async move {
                if let Some(progress) = progress {
                    delivered(progress, bytes).await;
                }
            }
        };
        tokio::join!(drained(&self.stdout, stdout), drained(&self.stderr, stderr));
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let outputs = [&self.stdout, &self.stderr].into_iter().flatten().map(|output| &output.copy);
        for copy in outputs.chain(self.stdin.as_ref().map(|input| &input.copy)) {
            copy.abort();
        }
    }
}

async fn delivered(mut progress: watch::Receiver<Progress>, bytes: u64) {
    let end = tokio::time::Instant::now() + DRAIN_LIMIT;
    loop {
        let now = *progress.borrow_and_update();
        if now.delivered >= bytes {
            return;
        }
        let lost = bytes - now.delivered;
        if now.ended {
            log::warn!("{lost} bytes of output are lost: a stream ended early");
            return;
        }
        let last = end.min(tokio::time::Instant::now() + PATIENCE);
        if tokio::time::timeout_at(last, progress.changed()).await.is_err() {
            log::warn!(
                "{lost} bytes of output did not come or were not read in time after the process's end"
            );
            return;
        }
    }
}

impl Input {
    fn open(path: &Path, waiter: Waiter, made: oneshot::Sender<Result<()>>) -> Result<Self> {
        let failed = |e: &io::Error| Error::io(format_args!("open stdin {}", path.display()), e);
        // The reader first: opening a FIFO for writing fails as long as nobody reads.
        let reader = pipe::OpenOptions::new().open_receiver(path).map_err(|e| failed(&e))?;
        let writer = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let writer = Mutex::new(Some(writer.map_err(|e| failed(&e))?));
        let copy = tokio::spawn(async move {
            let Some(guest) = connect(waiter, made).await else { return };
            let guest = Sink::Guest(guest);
            match copy(&reader, &guest, |_| ()).await {
                // The process has closed its input, or is gone.
                Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
                Err(e) => log::warn!("input: {e}"),
                Ok(()) => {}
            }
            // The client learns at once that nobody reads any more.
            drop(reader);
            if let Sink::Guest(guest) = guest {
                half_close(&guest).await;
            }
        });
        Ok(Self { writer, copy })
    }
}

impl Output {
    fn start(sink: Sink, waiter: Waiter, made: oneshot::Sender<Result<()>>) -> Self {
        let (sender, progress) = watch::channel(Progress::default());
        let copy = tokio::spawn(async move {
            if let Some(guest) = connect(waiter, made).await {
                let count = |bytes| sender.send_modify(|progress| progress.delivered += bytes);
                if let Err(e) = copy(&guest, &sink, count).await {
                    log::warn!("output: {e}");
                }
            }
            // Closed before the end is announced, so that a client that waits for the end of the FIFO finds it.
            drop(sink);
            sender.send_modify(|progress| progress.ended = true);
        });
        Self { progress, copy }
    }
}

/// Waits for the guest's end of a stream, and sends the outcome.
async fn connect(waiter: Waiter, made: oneshot::Sender<Result<()>>) -> Option<UnixStream> {
    let connection = waiter.connection().await.and_then(|connection| {
        let stream = connection.set_nonblocking(true).and_then(|()| UnixStream::from_std(connection));
        stream.map_err(|e| Error::io("connection of the guest", &e))
    });
    let (connection, outcome) = match connection {
        Ok(connection) => (Some(connection), Ok(())),
        Err(e) => (None, Err(e)),
    };
    // Nobody asks a second time.
    let _ = made.send(outcome);
    connection
}

/// Signals the end of the input to the guest, and waits until it has read all: closing at once would reset the
/// connection, and what the guest has not read yet would be gone.
async fn half_close(guest: &UnixStream) {
    let _ = shutdown(guest.as_raw_fd(), Shutdown::Write);
    let mut byte = [0; 1];
    while guest.readable().await.is_ok() {
        match guest.try_read(&mut byte) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(1..) => {}
            _ => return,
        }
    }
}

/// Where bytes come from.
trait Source {
    async fn ready(&self) -> io::Result<()>;
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

impl Source for UnixStream {
    async fn ready(&self) -> io::Result<()> {
        self.readable().await
    }
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }
}

impl Source for pipe::Receiver {
    async fn ready(&self) -> io::Result<()> {
        self.readable().await
    }
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }
}

impl Sink {
    async fn ready(&self) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.writable().await,
            Self::Guest(stream) => stream.writable().await,
            Self::File(_) => Ok(()),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.try_write(bytes),
            Self::Guest(stream) => stream.try_write(bytes),
            Self::File(file) => (&mut &*file).write(bytes),
        }
    }
}

thread_local! {
    /// One buffer for all streams: an idle stream, of which most pods have only such, holds none.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 64 * 1024]);
}

/// Copies up to the source's end. What the sink does not take at once waits in a buffer of its own.
async fn copy(source: &impl Source, sink: &Sink, count: impl Fn(u64)) -> io::Result<()> {
    loop {
        source.ready().await?;
        let Some((written, rest)) = step(source, sink)? else { return Ok(()) };
        count(written);
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            sink.ready().await?;
            match sink.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => {
                    count(length as u64);
                    rest = rest.get(length..).unwrap_or_default();
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Reads what there is and writes as much of it as goes: how much went, and what did not. Nothing at the end.
fn step(source: &impl Source, sink: &Sink) -> io::Result<Option<(u64, Vec<u8>)>> {
    let again = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
        _ => Err(e),
    };
    BUFFER.with_borrow_mut(|buffer| {
        let length = match source.read(buffer) {
            Ok(0) => return Ok(None),
            Ok(length) => length,
            Err(e) => again(e)?,
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        let written = if bytes.is_empty() { 0 } else { sink.write(bytes).or_else(again)? };
        Ok(Some((written as u64, bytes.get(written..).unwrap_or_default().to_vec())))
    })
}

/// Opens what standard output and standard error go to.
async fn sinks(
    stdout: &str,
    stderr: &str,
    container: &str,
    namespace: &str,
) -> Result<(Option<Sink>, Option<Sink>)> {
    if let Some(uri) = stdout.strip_prefix("binary://") {
        let logger = logger_binary::start(uri, container, namespace).await?;
        return Ok((
            Some(Sink::Pipe(logger.stdout)),
            (!stderr.is_empty()).then_some(Sink::Pipe(logger.stderr)),
        ));
    }
    let open = |target: &str| if target.is_empty() { Ok(None) } else { sink(target).map(Some) };
    Ok((open(stdout)?, open(stderr)?))
}

fn sink(target: &str) -> Result<Sink> {
    let failed = |e: &io::Error| Error::io(format_args!("open {target}"), e);
    match target.split_once("://") {
        None | Some(("fifo", _)) => {
            let path = Path::new(target.strip_prefix("fifo://").unwrap_or(target));
            let kind = fs::metadata(path).map_err(|e| failed(&e))?.file_type();
            if kind.is_fifo() {
                // For reading as well, so that writing does not fail while no client reads.
                let sender = pipe::OpenOptions::new().read_write(true).open_sender(path);
                return sender.map(Sink::Pipe).map_err(|e| failed(&e));
            }
            OpenOptions::new().append(true).open(path).map(Sink::File).map_err(|e| failed(&e))
        }
        Some(("file", path)) => {
            let path = Path::new(path);
            let parent = path.parent().map_or(Ok(()), fs::create_dir_all);
            let opened = parent.and_then(|()| OpenOptions::new().create(true).append(true).open(path));
            opened.map(Sink::File).map_err(|e| failed(&e))
        }
        Some((scheme, _)) => {
            Err(Error::InvalidArgument(format!("{target}: output to {scheme}:// is not supported")))
        }
    }
}

/// Reads a file to its end and gives up after `limit` bytes.
pub fn read_limited(reader: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
#[path = "stdio/tests.rs"]
mod tests;
