//! What the VMM says. It runs hostile guests, so this is the one place where its messages enter, and each is checked
//! here: whether it may come now, what is in it, and how many come in a time. What may not be is dropped and counted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::vmm::{self, Event, ExitReason, Received};
use nix::sys::socket::{AddressFamily, SockType, getsockname, getsockopt, sockopt};
use nix::sys::wait::WaitStatus;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Answer, Asked, Done, End, Made};
use crate::error::{cut, one_line, plain};
use crate::guest::ports::Ports;
use crate::host::durations;
use crate::host::logger;
use crate::host::pidfd::{PidFd, ProcessId};
use crate::host::rate::Rate;
use crate::host::threads;

/// How long a VMM that has closed its control socket may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Lines of the VMM's standard error and of the guest's console that an error shows.
pub(super) const TAIL: usize = 10;
/// Longest of these lines, bytes.
const LONGEST_LINE: usize = 300;
/// Messages at once, and then in a second. Each connection of the guest is one, such as each question to a name server
/// of the host. Those beyond wait in the socket, and the VMM with them.
const RATE: (u32, u32) = (500, 2000);

/// The last lines of the VMM's standard error.
type Said = Arc<Mutex<VecDeque<String>>>;

/// Where accepted messages are reported.
pub(super) struct Reports {
    pub pids: watch::Sender<Vec<ProcessId>>,
    pub runs: watch::Sender<bool>,
    pub plugs: watch::Sender<u64>,
    pub makes: watch::Sender<Option<Made>>,
    pub asked: Asked,
    /// Read as well: whether the VMM is to end.
    pub killed: Arc<AtomicBool>,
}

/// Hears what the VMM says until it is gone.
pub(super) struct Listener {
    control: Arc<AsyncFd<OwnedFd>>,
    process: PidFd,
    ports: Arc<Ports>,
    said: Said,
    log: Option<JoinHandle<()>>,
    /// The machine in the kernel, once it runs.
    machine: Option<OwnedFd>,
    jailed: bool,
    reports: Reports,
    rate: Rate,
    dropped: u64,
}

impl Listener {
    pub fn new(
        control: Arc<AsyncFd<OwnedFd>>,
        process: PidFd,
        ports: Arc<Ports>,
        stderr: Option<pipe::Receiver>,
        reports: Reports,
    ) -> Self {
        let said = Said::default();
        let log = stderr.map(|stderr| tokio::spawn(log_lines(stderr, Arc::clone(&said))));
        let rate = Rate::new(RATE.0, RATE.1);
        Self { control, process, ports, said, log, machine: None, jailed: false, reports, rate, dropped: 0 }
    }

    pub async fn run(mut self) -> End {
        let announced = loop {
            self.rate.wait().await;
            match receive(&self.control).await {
                // The last words; the process ends now.
                Ok(Received { message: Event::Exit { reason, console }, .. }) => {
                    break Some(exit(&reason, &console));
                }
                Ok(Received { message: Event::Failed(why), .. }) => {
                    break Some(End { reason: one_line(&why), tail: String::new() });
                }
                Ok(received) => {
                    if let Err(why) = self.hear(received) {
                        self.dropped += 1;
                        log::warn!("message {} of kata-vmm that may not be: {why}", self.dropped);
                    }
                }
                Err(vmm::Error::Closed) => break None,
                Err(e) => {
                    log::error!("kata-vmm: {e}");
                    self.process.kill();
                    break None;
                }
            }
        };
        let status = end_of(&self.process).await;
        // The kernel takes its time to tear it down, and nobody needs to wait for that.
        let machine = self.machine.take();
        let _ = threads::detached(move || drop(machine));
        if let Some(log) = self.log.take() {
            // To its end, unless somebody else holds the pipe.
            let _ = tokio::time::timeout(Duration::from_millis(500), log).await;
        }
        announced.unwrap_or_else(|| self.unannounced(status))
    }

    /// Takes a message, unless it may not come or say what it says.
    fn hear(&mut self, received: Received<Event>) -> Result<(), &'static str> {
        let Received { message, fds, cut_off } = received;
        match message {
            Event::Jailed { pid } => self.jailed(pid),
            Event::Connection { port } => {
                match fds.into_iter().next() {
                    Some(fd) => self.ports.connected(port, stream(fd)?),
                    None if cut_off => self.ports.unconnected(port),
                    None => return Err("a connection without its descriptor"),
                }
                Ok(())
            }
            Event::Running if *self.reports.runs.borrow() => Err("the machine runs already"),
            Event::Running => {
                durations::reached("guest runs");
                self.machine = fds.into_iter().next();
                self.reports.runs.send_replace(true);
                Ok(())
            }
            Event::MemoryPlugged { mib } => {
                self.reports.plugs.send_replace(mib);
                Ok(())
            }
            Event::TemplateMade(_) if self.reports.makes.borrow().is_some() => Err("a second template"),
            Event::TemplateMade(failed) => {
                self.reports.makes.send_replace(Some(failed.map_or(Ok(()), |why| Err(one_line(&why)))));
                Ok(())
            }
            Event::Done(outcome) => self.answer(outcome.map_or(Ok(Done::Plain), |why| Err(one_line(&why)))),
            Event::PlaceholderAdded { thread } => self.answer(Ok(Done::Thread(thread))),
            Event::Console(text) => self.answer(Ok(Done::Console(text))),
            Event::Counts(counts) => self.answer(Ok(Done::Counts(counts))),
            Event::Exit { .. } | Event::Failed(_) => Ok(()),
        }
    }

    fn answer(&self, answer: Answer) -> Result<(), &'static str> {
        let mut asked = self.reports.asked.lock().unwrap_or_else(PoisonError::into_inner);
        match &*asked {
            None => return Err("an answer to nothing"),
            // A request for a thread can fail, but not be done without one.
            Some(waiting) if answer.as_ref().is_ok_and(|done| done.kind() != waiting.request) => {
                return Err("an answer to another request");
            }
            Some(_) => {}
        }
        if let Some(waiting) = asked.take() {
            // Nobody is left to hear it.
            let _ = waiting.answer.send(answer);
        }
        Ok(())
    }

    /// The VMM has forked into its jail: its first process ends, the second one is ours to wait for. Only before it has
    /// begun with its guest, and only of a child of this process: it will be killed some day, and clients get its pid.
    fn jailed(&mut self, pid: i32) -> Result<(), &'static str> {
        if std::mem::replace(&mut self.jailed, true) || *self.reports.runs.borrow() {
            return Err("it is in its jail already");
        }
        let process = PidFd::open(pid).map_err(|_| "there is no process of this id")?;
        // Looked up after the descriptor is open: if it has ended meanwhile and the id is another one's now, the
        // descriptor kills nobody, and `PidFd::find` will see another time of start.
        let id = ProcessId::of_child(pid).map_err(|_| "a process that is no child of the shim")?;
        let first = std::mem::replace(&mut self.process, process);
        tokio::spawn(async move { end_of(&first).await });
        self.reports.pids.send_modify(|ids| ids.push(id));
        // Afterwards: whoever kills sets this first and then looks at the ids.
        if self.reports.killed.load(Ordering::Relaxed) {
            self.process.kill();
        }
        Ok(())
    }

    /// The VMM ended without a word, so its exit status must do.
    fn unannounced(&self, status: Option<WaitStatus>) -> End {
        let reason = match status {
            Some(WaitStatus::Signaled(_, signal, _)) => format!("kata-vmm was killed by {signal}"),
            Some(WaitStatus::Exited(_, code)) => format!("kata-vmm ended with exit code {code}"),
            _ => "kata-vmm ended".to_owned(),
        };
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = said.iter().map(String::as_str).collect::<Vec<_>>().join(" | ");
        let reason = if said.is_empty() { reason } else { format!("{reason}: {said}") };
        End { reason, tail: String::new() }
    }
}

/// A connection, if it is one: a read from another kind of descriptor may block in spite of O_NONBLOCK.
fn stream(fd: OwnedFd) -> Result<UnixStream, &'static str> {
    let is_stream = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream);
    let is_unix = getsockname::<nix::sys::socket::SockaddrStorage>(fd.as_fd().as_raw_fd())
        .is_ok_and(|address| nix::sys::socket::SockaddrLike::family(&address) == Some(AddressFamily::Unix));
    if is_stream && is_unix { Ok(UnixStream::from(fd)) } else { Err("a connection that is none") }
}

fn exit(reason: &ExitReason, console: &str) -> End {
    // The guest chose these bytes, and a user's terminal will show them.
    let lines: Vec<_> = console.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let last = lines.iter().skip(lines.len().saturating_sub(TAIL));
    let tail = last.map(|line| cut(plain(line), LONGEST_LINE)).collect::<Vec<_>>().join(" | ");
    End { reason: cut(one_line(&reason.to_string()), 2 * LONGEST_LINE), tail }
}

/// Passes the VMM's standard error on to the log, and remembers the last lines. Lines are cut at the buffer's
/// size: what they say is decided in a process that runs hostile guests.
async fn log_lines(stderr: pipe::Receiver, said: Said) {
    let mut reader = BufReader::with_capacity(4096, stderr);
    while let Ok(bytes) = reader.fill_buf().await
        && !bytes.is_empty()
    {
        let length = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
        let line = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).trim_end().to_owned();
        reader.consume(length);
        let level = match line.split_once(' ') {
            Some(("ERROR", _)) => log::Level::Error,
            Some(("WARN", _)) => log::Level::Warn,
            _ => log::Level::Info,
        };
        log::log!(target: logger::VMM, level, "kata-vmm: {line}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == TAIL {
            said.pop_front();
        }
        said.push_back(cut(plain(&line), LONGEST_LINE));
    }
}

/// Waits for a child to end, kills it when it does not, and takes its exit status.
async fn end_of(process: &PidFd) -> Option<WaitStatus> {
    if tokio::time::timeout(END_LIMIT, process.ended()).await.is_err() {
        process.kill();
        let _ = tokio::time::timeout(END_LIMIT, process.ended()).await;
    }
    process.reap()
}

async fn receive(control: &AsyncFd<OwnedFd>) -> Result<Received<Event>, vmm::Error> {
    loop {
        let mut ready = control.ready(Interest::READABLE).await?;
        match vmm::receive_any::<Event>(control.get_ref()) {
            Err(vmm::Error::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // A peer that was killed with unread messages in its socket.
            Err(vmm::Error::Socket(e)) if e.kind() == io::ErrorKind::ConnectionReset => {
                return Err(vmm::Error::Closed);
            }
            outcome => return outcome,
        }
    }
}
