//! The VMM process: started, asked to boot a machine, listened to until it ends.

mod listen;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::counters::Counter;
use katana_protocol::vmm::{self, CONTROL_FD, Machine, Request};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use super::ports::Ports;
use crate::error::{Error, Result};
use crate::host::fds;
use crate::host::pidfd::{self, PidFd, ProcessId};
use listen::Listener;

/// How long the VMM may take over a request. The host's kernel may have to wait for disks meanwhile.
const LIMIT: Duration = Duration::from_secs(20);

/// A VMM process.
pub struct Vmm {
    control: Arc<AsyncFd<OwnedFd>>,
    /// Held by who asks, until there is an answer.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Who waits for an answer.
    asked: Asked,
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

/// What the VMM has done, or what has failed.
type Answer = std::result::Result<Done, String>;

/// Who waits for the answer to a request: one at a time, as the VMM answers in the order of the requests. An answer for
/// which nobody waits is none.
type Asked = Arc<Mutex<Option<Waiting>>>;

struct Waiting {
    request: Kind,
    answer: oneshot::Sender<Answer>,
}

/// Requests by what their answers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Thread,
    Counts,
    Console,
}

impl Kind {
    fn of(request: &Request) -> Self {
        match request {
            Request::AddPlaceholder => Self::Thread,
            Request::Counts => Self::Counts,
            Request::Console => Self::Console,
            _ => Self::Plain,
        }
    }
}

/// What was done.
#[derive(Debug)]
enum Done {
    Plain,
    /// By its id in the VMM's pid namespace.
    Thread(i32),
    Counts(Vec<u64>),
    Console(String),
}

impl Done {
    fn kind(&self) -> Kind {
        match self {
            Self::Plain => Kind::Plain,
            Self::Thread(_) => Kind::Thread,
            Self::Counts(_) => Kind::Counts,
            Self::Console(_) => Kind::Console,
        }
    }
}

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

impl Vmm {
    /// Starts the VMM in a network namespace. `spawned` is called with its pid before it is sent anything, so that all
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
        let process = PidFd::of_child(&mut child).map_err(|e| failed(&e))?;
        // The kernel passes the shim's own protection from the OOM killer on to its children.
        if let Err(e) = fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
            log::warn!("oom_score_adj of the VMM: {e}");
        }
        let stderr = child.stderr.take();
        let started = spawned(pid)
            .and_then(|()| Self::listen(ours, process, pid, ports, stderr).map_err(|e| failed(&e)));
        if started.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        started
    }

    fn listen(
        control: OwnedFd,
        process: PidFd,
        pid: u32,
        ports: Arc<Ports>,
        stderr: Option<ChildStderr>,
    ) -> io::Result<Self> {
        nonblocking(&control)?;
        let stderr = stderr.map(|stderr| pipe::Receiver::from_owned_fd(stderr.into())).transpose()?;
        // SAFETY: the descriptor is owned by what is registered, and never taken out of it.
        let control = Arc::new(unsafe { AsyncFd::register(control) }?);
        let ids = i32::try_from(pid).ok().and_then(|pid| ProcessId::of(pid).ok());
        let (pids, processes) = watch::channel(ids.into_iter().collect());
        let (runs, running) = watch::channel(false);
        let (plugs, plugged) = watch::channel(0);
        let (makes, template) = watch::channel(None);
        let (end, ended) = watch::channel(None);
        let (asked, killed) = (Asked::default(), Arc::new(AtomicBool::new(false)));
        let listener = Listener::new(
            Arc::clone(&control),
            process,
            Arc::clone(&ports),
            stderr,
            listen::Reports {
                pids,
                runs,
                plugs,
                makes,
                asked: Arc::clone(&asked),
                killed: Arc::clone(&killed),
            },
        );
        let (is_ours, nobody) = (Arc::clone(&killed), Arc::clone(&asked));
        tokio::spawn(async move {
            let outcome = listener.run().await;
            if is_ours.load(Ordering::Relaxed) {
                log::debug!("timeline: VM gone");
            } else {
                log::warn!("the VM has ended: {outcome}");
            }
            ports.close();
            end.send_replace(Some(Arc::new(outcome)));
            drop(nobody.lock().unwrap_or_else(PoisonError::into_inner).take());
        });
        Ok(Self {
            control,
            turn: Arc::default(),
            asked,
            processes,
            running,
            plugged,
            template,
            killed,
            ended,
        })
    }

    /// Has the VMM boot a machine.
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

    /// Gives a tap's queues, and each a /dev/vhost-net to serve it or none, to a network slot. The VMM serves requests
    /// in their order, so it need not run yet.
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
    pub async fn add_placeholder(&self) -> Result<Thread> {
        let Done::Thread(inner) = self.ask(Request::AddPlaceholder, Vec::new()).await? else {
            // No other answer comes to it.
            return Err(Error::Unavailable("the VM is gone".into()));
        };
        let vmm = self.pid();
        // The VMM knows itself by other ids, and none of a process but its own is believed.
        let found = crate::host::threads::blocking(move || {
            pidfd::thread(vmm, inner).map_err(|e| Error::io("its thread", &e))
        });
        match found.await {
            Ok(pid) => Ok(Thread { pid, inner }),
            Err(e) => {
                self.ask(Request::RemovePlaceholder { thread: inner }, Vec::new()).await?;
                Err(e)
            }
        }
    }

    /// Ends such a thread.
    pub async fn remove_placeholder(&self, thread: Thread) -> Result<()> {
        self.ask(Request::RemovePlaceholder { thread: thread.inner }, Vec::new()).await.map(drop)
    }

    /// What the VMM has counted, each beside its number; nothing unless it answers in this time. Who gives up before it
    /// is his turn leaves nothing behind that would ask later.
    pub async fn counts(&self, limit: Duration) -> Option<Vec<(Counter, u64)>> {
        let counts = async {
            let turn = Arc::clone(&self.turn).lock_owned().await;
            self.ask_in_turn(async move { turn }, Request::Counts, Vec::new()).await
        };
        match tokio::time::timeout(limit, counts).await {
            Ok(Ok(Done::Counts(counts))) if counts.len() == Counter::ALL.len() => {
                Some(Counter::ALL.into_iter().zip(counts).collect())
            }
            Ok(Err(e)) => {
                log::debug!("counts: {e}");
                None
            }
            _ => None,
        }
    }

    /// The last lines of the guest's console.
    pub async fn console(&self) -> Result<String> {
        match self.ask(Request::Console, Vec::new()).await? {
            Done::Console(text) => Ok(text),
            // No other answer comes to it.
            _ => Err(Error::Unavailable("the VM is gone".into())),
        }
    }

    async fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Done> {
        self.ask_in_turn(Arc::clone(&self.turn).lock_owned(), request, fds).await
    }

    /// Passes descriptors on, which are closed here before the answer comes. On a task of its own: the answer is taken
    /// even if nobody waits for it any more, so that the next one who asks does not take it for his.
    async fn ask_in_turn<T: Send>(
        &self,
        turn: impl Future<Output = T> + Send + 'static,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Done> {
        let (control, asked, mut ended) = (Arc::clone(&self.control), Arc::clone(&self.asked), self.ended());
        let kind = Kind::of(&request);
        let answered = tokio::spawn(async move {
            let _turn = turn.await;
            let (answer, answered) = oneshot::channel();
            let waiting = Waiting { request: kind, answer };
            *asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
            if let Some(end) = ended.borrow().clone() {
                return Err(Error::Unavailable(end.to_string()));
            }
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if let Err(e) = vmm::send(control.get_ref(), &request, &borrowed) {
                drop(asked.lock().unwrap_or_else(PoisonError::into_inner).take());
                return Err(Error::Unavailable(format!("kata-vmm: {e}")));
            }
            drop(borrowed);
            drop(fds);
            match answered.await {
                Ok(Ok(done)) => Ok(done),
                Ok(Err(why)) => Err(Error::Host(format!("kata-vmm: {why}"))),
                Err(_) => Err(Error::Unavailable(wait_end(&mut ended).await.to_string())),
            }
        });
        let limit = LIMIT.as_secs();
        let answer = tokio::time::timeout(LIMIT, answered).await;
        let answer = answer
            .map_err(|_| Error::DeadlineExceeded(format!("kata-vmm did not answer within {limit} s")))?;
        answer.map_err(|e| Error::Host(format!("kata-vmm: {e}")))?
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

    /// Kills the VMM. Its jailed process may not be known yet: who hears of it then kills it.
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

/// Waits until the VM has ended; returns how.
pub async fn wait_end(ended: &mut watch::Receiver<Option<Arc<End>>>) -> Arc<End> {
    let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
    end.unwrap_or_else(|| Arc::new(End { reason: "the VM is gone".into(), tail: String::new() }))
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
#[path = "vmm/tests.rs"]
mod tests;
