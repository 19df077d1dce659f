//! The VMM process: started, told what to boot, listened to until it ends.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::vmm::{self, CONTROL_FD, Event, ExitReason, Machine, Request};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::sys::wait::WaitStatus;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::error::{Error, Result, one_line};
use crate::fds;
use crate::pidfd::{self, PidFd, ProcessId};
use crate::ports::Ports;

/// How long a VMM that has closed its control socket may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Lines of the VMM's standard error and of the guest's console that an error shows.
const TAIL: usize = 10;

/// A VMM process.
pub struct Vmm {
    control: Arc<AsyncFd<OwnedFd>>,
    /// The answers to requests to attach and to park; whoever has asked takes the next one.
    answers: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Answer>>>,
    processes: watch::Receiver<Vec<ProcessId>>,
    running: watch::Receiver<bool>,
    plugged: watch::Receiver<u64>,
    template: watch::Receiver<Option<Made>>,
    /// Whether its end is our doing.
    killed: Arc<AtomicBool>,
    ended: watch::Receiver<Option<Arc<End>>>,
}

/// Whether the VMM has made the template, or why not.
type Made = std::result::Result<(), String>;

/// The id of a thread that was asked for, otherwise 0; or what has failed.
type Answer = std::result::Result<i32, String>;

/// A thread of the VMM that does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread {
    /// Its id on the host.
    pub pid: u32,
    /// Its id in the VMM's pid namespace.
    inner: i32,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// In one line.
    pub reason: String,
    /// The last lines of the guest's console, or of the VMM's standard error.
    pub tail: String,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)?;
        if self.tail.is_empty() { Ok(()) } else { write!(f, "; last console lines: {}", self.tail) }
    }
}

/// The last lines of the VMM's standard error.
type Said = Arc<Mutex<VecDeque<String>>>;

impl Vmm {
    /// Starts the VMM in a network namespace. `spawned` is called with its pid before it is told anything, so that all
    /// it does happens after its pid is written down.
    ///
    /// The VMM ends with the thread that calls this (PR_SET_PDEATHSIG), so it must be the one that serves.
    pub fn spawn(
        program: &Path,
        network: BorrowedFd<'_>,
        ports: Arc<Ports>,
        spawned: impl FnOnce(u32) -> Result<()>,
    ) -> Result<Self> {
        let failed = |e: &io::Error| Error::io(format_args!("start \"{}\"", program.display()), e);
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|e| Error::os("control socket", e))?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        fds::pass(&mut command, &[(theirs.as_fd(), CONTROL_FD)]).map_err(|e| failed(&e))?;
        fds::enter_network(&mut command, network).map_err(|e| failed(&e))?;
        let mut child = command.spawn().map_err(|e| failed(&e))?;
        // The command holds a copy as well, and only the VMM's must be left.
        drop((theirs, command));
        let pid = child.id();
        let process = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData.into()).and_then(PidFd::open);
        let process = process.map_err(|e| failed(&e))?;
        // The kernel passes the shim's own protection from the OOM killer on to its children.
        if let Err(e) = fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
            log::warn!("oom_score_adj of the VMM: {e}");
        }
        if let Err(e) = spawned(pid) {
            process.kill();
            let _ = child.wait();
            return Err(e);
        }
        let stderr = child.stderr.take();
        Self::listen(ours, process, pid, ports, stderr).map_err(|e| failed(&e))
    }

    fn listen(
        control: OwnedFd,
        process: PidFd,
        pid: u32,
        ports: Arc<Ports>,
        stderr: Option<ChildStderr>,
    ) -> io::Result<Self> {
        nonblocking(&control)?;
        let said = Said::default();
        let stderr = stderr.map(|stderr| pipe::Receiver::from_owned_fd(stderr.into())).transpose()?;
        let log = stderr.map(|stderr| tokio::spawn(log_lines(stderr, Arc::clone(&said))));
        // SAFETY: the descriptor is owned by what is registered, and never taken out of it.
        let control = Arc::new(unsafe { AsyncFd::register(control) }?);
        let ids = i32::try_from(pid).ok().and_then(|pid| ProcessId::of(pid).ok());
        let (pids, processes) = watch::channel(ids.into_iter().collect());
        let (runs, running) = watch::channel(false);
        let (plugs, plugged) = watch::channel(0);
        let (makes, template) = watch::channel(None);
        let (end, ended) = watch::channel(None);
        let (answer, answers) = mpsc::unbounded_channel();
        let listener = Listener {
            control: Arc::clone(&control),
            process,
            ports,
            said,
            log,
            machine: None,
            pids,
            runs,
            plugs,
            makes,
            answer,
        };
        let killed = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&killed);
        tokio::spawn(async move {
            let ports = Arc::clone(&listener.ports);
            let told = listener.run().await;
            if asked.load(Ordering::Relaxed) {
                log::debug!("timeline: VM gone");
            } else {
                log::warn!("the VM has ended: {told}");
            }
            ports.close();
            end.send_replace(Some(Arc::new(told)));
        });
        Ok(Self {
            control,
            answers: Arc::new(answers.into()),
            processes,
            running,
            plugged,
            template,
            killed,
            ended,
        })
    }

    /// Tells the VMM to boot a machine.
    pub fn boot(&self, machine: Machine, files: &[BorrowedFd<'_>]) -> Result<()> {
        vmm::send(self.control.get_ref(), &Request::Boot(machine), files)
            .map_err(|e| Error::Unavailable(format!("kata-vmm: {e}")))
    }

    /// Has the guest plug or unplug memory.
    pub fn plug_memory(&self, mib: u64) -> Result<()> {
        vmm::send(self.control.get_ref(), &Request::PlugMemory { mib }, &[])
            .map_err(|e| Error::Unavailable(format!("kata-vmm: {e}")))
    }

    /// Follows what the guest has plugged, in MiB.
    pub fn plugged(&self) -> watch::Receiver<u64> {
        self.plugged.clone()
    }

    /// Follows the making of a template.
    pub fn template(&self) -> watch::Receiver<Option<Made>> {
        self.template.clone()
    }

    /// Gives a tap's queues, and each a /dev/vhost-net to serve it or none, to a network slot. The VMM serves requests in
    /// their order, so it need not run yet.
    pub async fn attach_net(
        &self,
        slot: u8,
        mac: [u8; 6],
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
    ) -> Result<()> {
        // A tap is gone when nobody holds it any more, which is to be the VMM's doing alone.
        let pairs = u8::try_from(taps.len()).unwrap_or(u8::MAX);
        self.ask(Request::AttachNet { slot, mac, pairs }, taps.into_iter().chain(vhosts).collect())
            .await
            .map(drop)
    }

    /// Gives a disk to a slot.
    pub async fn attach_disk(&self, slot: u8, read_only: bool, disk: OwnedFd) -> Result<()> {
        self.ask(Request::AttachDisk { slot, read_only }, vec![disk]).await.map(drop)
    }

    /// Takes the disk out of a slot.
    pub async fn detach_disk(&self, slot: u8) -> Result<()> {
        self.ask(Request::DetachDisk { slot }, Vec::new()).await.map(drop)
    }

    /// Has the VMM make vCPUs until there are so many.
    pub async fn add_vcpus(&self, count: u8) -> Result<()> {
        self.ask(Request::AddVcpus { count }, Vec::new()).await.map(drop)
    }

    /// Has the VMM make a thread that does nothing.
    pub async fn park(&self) -> Result<Thread> {
        let inner = self.ask(Request::Park, Vec::new()).await?;
        let vmm = self.pid();
        // The VMM knows itself by other ids, and none of a process but its own is believed.
        let found =
            crate::blocking(move || pidfd::thread(vmm, inner).map_err(|e| Error::io("its thread", &e)));
        match found.await {
            Ok(pid) => Ok(Thread { pid, inner }),
            Err(e) => {
                self.ask(Request::Unpark { thread: inner }, Vec::new()).await?;
                Err(e)
            }
        }
    }

    /// Ends such a thread.
    pub async fn unpark(&self, thread: Thread) -> Result<()> {
        self.ask(Request::Unpark { thread: thread.inner }, Vec::new()).await.map(drop)
    }

    /// Passes descriptors on, which are closed here before the answer comes. On a task of its own: the answer is taken even
    /// if nobody waits for it any more, so that the next one who asks does not take it for his.
    async fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> Result<i32> {
        let (control, answers, mut ended) =
            (Arc::clone(&self.control), Arc::clone(&self.answers), self.ended());
        let asked = tokio::spawn(async move {
            let mut answers = answers.lock().await;
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            vmm::send(control.get_ref(), &request, &borrowed)
                .map_err(|e| Error::Unavailable(format!("kata-vmm: {e}")))?;
            drop(borrowed);
            drop(fds);
            match answers.recv().await {
                Some(Ok(thread)) => Ok(thread),
                Some(Err(why)) => Err(Error::Host(format!("kata-vmm: {}", one_line(&why)))),
                None => Err(Error::Unavailable(wait_end(&mut ended).await.to_string())),
            }
        });
        asked.await.map_err(|e| Error::Host(format!("kata-vmm: {e}")))?
    }

    /// The VMM's process on the host, the jailed one once it is known.
    pub fn pid(&self) -> i32 {
        self.processes.borrow().last().map_or(0, |process| process.pid)
    }

    /// That process, unless it has ended.
    pub fn process(&self) -> Option<PidFd> {
        self.processes.borrow().last().and_then(PidFd::find)
    }

    /// Follows the VMM's processes, to write them down.
    pub fn processes(&self) -> watch::Receiver<Vec<ProcessId>> {
        self.processes.clone()
    }

    /// Waits until the VM runs; false when it has ended instead.
    pub async fn running(&self) -> bool {
        self.running.clone().wait_for(|running| *running).await.is_ok()
    }

    /// Follows the VM's end.
    pub fn ended(&self) -> watch::Receiver<Option<Arc<End>>> {
        self.ended.clone()
    }

    /// Asks the VMM to end and gives it a moment to say what was on the console; then kills it.
    pub async fn stop(&self, patience: Duration) -> Arc<End> {
        let mut ended = self.ended.clone();
        let _ = shutdown(self.control.get_ref().as_raw_fd(), Shutdown::Write);
        if tokio::time::timeout(patience, ended.wait_for(Option::is_some)).await.is_err() {
            self.kill();
        }
        wait_end(&mut ended).await
    }

    /// Kills the VMM.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        for process in self.processes.borrow().iter().filter_map(PidFd::find) {
            process.kill();
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until the VM has ended, and tells how.
pub async fn wait_end(ended: &mut watch::Receiver<Option<Arc<End>>>) -> Arc<End> {
    let told = ended.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
    told.unwrap_or_else(|| Arc::new(End { reason: "the VM is gone".into(), tail: String::new() }))
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(())
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
        log::log!(level, "kata-vmm: {line}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == TAIL {
            said.pop_front();
        }
        said.push_back(line);
    }
}

/// Hears what the VMM says until it is gone.
struct Listener {
    control: Arc<AsyncFd<OwnedFd>>,
    process: PidFd,
    ports: Arc<Ports>,
    said: Said,
    log: Option<JoinHandle<()>>,
    /// The machine in the kernel, once it runs.
    machine: Option<OwnedFd>,
    pids: watch::Sender<Vec<ProcessId>>,
    runs: watch::Sender<bool>,
    plugs: watch::Sender<u64>,
    makes: watch::Sender<Option<Made>>,
    answer: mpsc::UnboundedSender<Answer>,
}

impl Listener {
    async fn run(mut self) -> End {
        let told = loop {
            match receive(&self.control).await {
                // The last words; the process ends now.
                Ok((Event::Exit { reason, console }, _)) => break Some(exit(&reason, &console)),
                Ok((Event::Failed(why), _)) => {
                    break Some(End { reason: one_line(&why), tail: String::new() });
                }
                Ok((Event::Jailed { pid }, _)) => self.jailed(pid),
                Ok((Event::Connection { port }, fds)) => {
                    if let Some(fd) = fds.into_iter().next() {
                        self.ports.connected(port, UnixStream::from(fd));
                    }
                }
                Ok((Event::Running, fds)) => {
                    log::debug!("timeline: guest runs");
                    self.machine = self.machine.take().or(fds.into_iter().next());
                    self.runs.send_replace(true);
                }
                Ok((Event::MemoryPlugged { mib }, _)) => {
                    self.plugs.send_replace(mib);
                }
                Ok((Event::TemplateMade(failed), _)) => {
                    self.makes.send_replace(Some(failed.map_or(Ok(()), |why| Err(one_line(&why)))));
                }
                Ok((Event::Done(outcome), _)) => {
                    // Without a receiver, nobody will ask again.
                    let _ = self.answer.send(outcome.map_or(Ok(0), Err));
                }
                Ok((Event::Parked { thread }, _)) => {
                    let _ = self.answer.send(Ok(thread));
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
        // The kernel takes its time to undo it, and nobody needs to wait for that.
        let machine = self.machine.take();
        tokio::task::spawn_blocking(move || drop(machine));
        if let Some(log) = self.log.take() {
            // To its end, unless somebody else holds the pipe.
            let _ = tokio::time::timeout(Duration::from_millis(500), log).await;
        }
        told.unwrap_or_else(|| self.unannounced(status))
    }

    /// The VMM has forked into its jail: its first process ends, the second one is ours to wait for.
    fn jailed(&mut self, pid: i32) {
        let Ok(process) = PidFd::open(pid) else { return };
        let first = std::mem::replace(&mut self.process, process);
        tokio::spawn(async move { end_of(&first).await });
        if let Ok(id) = ProcessId::of(pid) {
            self.pids.send_modify(|ids| ids.push(id));
        }
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

fn exit(reason: &ExitReason, console: &str) -> End {
    // The guest chose these bytes, and a user's terminal will show them.
    let plain: String = console.chars().filter(|c| !c.is_control() || *c == '\n').collect();
    let lines: Vec<_> = plain.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let tail = lines.iter().skip(lines.len().saturating_sub(TAIL)).copied().collect::<Vec<_>>().join(" | ");
    End { reason: one_line(&reason.to_string()), tail }
}

/// Waits for a child to end, kills it when it does not, and takes its exit status.
async fn end_of(process: &PidFd) -> Option<WaitStatus> {
    if tokio::time::timeout(END_LIMIT, process.ended()).await.is_err() {
        process.kill();
        let _ = tokio::time::timeout(END_LIMIT, process.ended()).await;
    }
    process.reap()
}

async fn receive(control: &AsyncFd<OwnedFd>) -> std::result::Result<(Event, Vec<OwnedFd>), vmm::Error> {
    loop {
        let mut ready = control.ready(Interest::READABLE).await?;
        match vmm::receive::<Event>(control.get_ref()) {
            Err(vmm::Error::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // A peer that was killed with unread messages in its socket.
            Err(vmm::Error::Socket(e)) if e.kind() == io::ErrorKind::ConnectionReset => {
                return Err(vmm::Error::Closed);
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
#[path = "vmm/tests.rs"]
mod tests;
