//! The agent's side of a process up to its execve: starts [`crate::init`], hands it its task, hears its reports.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use katana_protocol::vmm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Pid, write};
use oci_spec::runtime::LinuxIdMapping;
use tokio::sync::oneshot;

use crate::init::control::{Failure, Order, Report, Task, Work};
use crate::read_ahead::SmallPieces;
use crate::reaper::{ExitStatus, Launch};
use crate::stream::Stream;
use crate::syscalls::open_process;

/// A process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent's own part failed.
    #[error("start a process: {step}: {source}")]
    Agent {
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The connection to the process failed.
    #[error("start a process: {0}")]
    Control(#[from] vmm::Error),
    /// The process says why.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The process died, killed by the kernel for lack of memory, say.
    #[error("the process ended before it was set up; is its memory limit too low?")]
    Died,
}

fn agent<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Agent { step, source: source.into() }
}

/// The maps of a user namespace.
#[derive(Debug, Default)]
pub struct IdMaps {
    /// `linux.uidMappings`
    pub users: Vec<LinuxIdMapping>,
    /// `linux.gidMappings`
    pub groups: Vec<LinuxIdMapping>,
}

/// A process that has been set up.
#[derive(Debug)]
pub struct Launched {
    /// In the agent's pid namespace.
    pub pid: Pid,
    /// Stays with the process whatever its number is used for later.
    pub pidfd: OwnedFd,
    /// When it ends.
    pub ended: oneshot::Receiver<ExitStatus>,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// For a container's first process: what it waits at.
    pub gate: Option<Gate>,
}

/// A container's first process waits here for its start.
#[derive(Debug)]
pub struct Gate {
    socket: Stream,
    small: bool,
}

/// Processes that were started ahead, before anybody waits for them: this program, waiting for its task. Those of a
/// template are there in every guest that comes from it.
#[derive(Debug, Clone, Default)]
pub struct Spares(Arc<Mutex<Vec<Spare>>>);

/// A process that waits for its task at the other end of the socket.
#[derive(Debug)]
struct Spare {
    socket: OwnedFd,
    pid: Pid,
    pidfd: OwnedFd,
}

impl Spares {
    /// Starts so many.
    pub fn prepare(&self, count: usize) -> Result<(), Error> {
        for _ in 0..count {
            let spare = Spare::start()?;
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(spare);
        }
        Ok(())
    }

    /// One of them, or a new one.
    fn take(&self) -> Result<Spare, Error> {
        while let Some(spare) = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            // It may have been the out-of-memory killer's choice.
            let mut ended = [PollFd::new(spare.pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ended, PollTimeout::ZERO) == Ok(0) {
                return Ok(spare);
            }
        }
        Spare::start()
    }
}

impl Spare {
    /// Runs this program again, its standard input being the socket.
    fn start() -> Result<Self, Error> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(agent("make a socket pair"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("kata-agent").arg("container-init").env_clear().stdin(Stdio::from(theirs));
        let child = command.spawn().map_err(agent("run /proc/self/exe"))?;
        let pid = child.id().cast_signed();
        // The reaper has not run since: the number is still this child's.
        let pidfd = open_process(pid).map_err(agent("open the child"))?;
        Ok(Self { socket, pid: Pid::from_raw(pid), pidfd })
    }
}

/// Starts a process and sees it through to its execve, or for a container's first process to the gate.
pub async fn launch(
    task: &Task,
    container: Option<BorrowedFd<'_>>,
    stdio: Option<[OwnedFd; 3]>,
    maps: &IdMaps,
    launch: &Launch,
    spares: &Spares,
) -> Result<Launched, Error> {
    let Spare { socket: ours, pid, pidfd } = spares.take()?;
    hand_over(&ours, task, container, stdio)?;
    let socket = Stream::new(ours).map_err(agent("watch the socket"))?;
    let mut process =
        Starting { pid, pidfd, ended: launch.watch(pid), parent_ended: None, terminal: None, small: false };
    let at_gate = loop {
        match receive(&socket).await? {
            Some((Report::Failed(failure), _)) => {
                process.collect().await;
                return Err(failure.into());
            }
            Some((report, descriptors)) => {
                if process.hear(&socket, report, descriptors, maps, launch)? {
                    break true;
                }
            }
            None if matches!(task.work, Work::Container { .. }) => return Err(Error::Died),
            // The connection closes with the execve.
            None => break false,
        }
    };
    process.collect_parent().await;
    let Starting { pid, pidfd, ended, terminal, small, .. } = process;
    let gate = at_gate.then_some(Gate { socket, small });
    Ok(Launched { pid, pidfd, ended, terminal, gate })
}

struct Starting {
    pid: Pid,
    pidfd: OwnedFd,
    ended: oneshot::Receiver<ExitStatus>,
    /// Of the process that forked this one.
    parent_ended: Option<oneshot::Receiver<ExitStatus>>,
    terminal: Option<OwnedFd>,
    /// Whether its program is a small one.
    small: bool,
}

impl Starting {
    /// True when the process has reached the gate.
    fn hear(
        &mut self,
        socket: &Stream,
        report: Report,
        fds: Vec<OwnedFd>,
        maps: &IdMaps,
        launch: &Launch,
    ) -> Result<bool, Error> {
        let mut fds = fds.into_iter();
        match report {
            Report::Failed(failure) => return Err(failure.into()),
            Report::Unmapped => {
                write_maps(self.pid, maps).map_err(agent("write the maps of the user namespace"))?;
                vmm::send(socket, &Order::Mapped, &[])?;
            }
            Report::Forked { pid } => {
                self.pid = Pid::from_raw(pid);
                self.pidfd = fds.next().ok_or(Error::Died)?;
                self.parent_ended = Some(std::mem::replace(&mut self.ended, launch.watch(self.pid)));
            }
            Report::Terminal => self.terminal = fds.next(),
            Report::Ready { small } => {
                self.small = small;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits until the process that forked is gone: nobody is to see it among the container's processes.
    async fn collect_parent(&mut self) {
        if let Some(ended) = self.parent_ended.take() {
            let _ = ended.await;
        }
    }

    /// Waits for the end of a process that has failed.
    async fn collect(mut self) {
        self.collect_parent().await;
        let _ = self.ended.await;
    }
}

fn hand_over(
    socket: &OwnedFd,
    task: &Task,
    container: Option<BorrowedFd<'_>>,
    stdio: Option<[OwnedFd; 3]>,
) -> Result<(), Error> {
    let json = serde_json::to_vec(task).map_err(vmm::Error::Message)?;
    let file = memfd_create("task", MFdFlags::MFD_CLOEXEC).map_err(agent("make a memory file"))?;
    let mut rest = json.as_slice();
    while !rest.is_empty() {
        let count = write(&file, rest).map_err(agent("write the task"))?;
        rest = rest.get(count..).unwrap_or_default();
    }
    let order = Order::Prepare { stdio: stdio.is_some(), container: container.is_some() };
    let mut descriptors = vec![file.as_fd()];
    descriptors.extend(container);
    descriptors.extend(stdio.iter().flatten().map(AsFd::as_fd));
    let sent = vmm::send(socket, &order, &descriptors);
    // The process's ends of its pipes are its alone: they end with it.
    drop(stdio);
    Ok(sent?)
}

/// The next report; `None` when the process has closed its end.
async fn receive(socket: &Stream) -> Result<Option<(Report, Vec<OwnedFd>)>, Error> {
    let received = socket
        .when_readable(|fd| match vmm::receive(fd) {
            Err(vmm::Error::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            other => Ok(other),
        })
        .await;
    match received.map_err(agent("wait for the process"))? {
        Ok(report) => Ok(Some(report)),
        Err(vmm::Error::Closed) => Ok(None),
        // It died with an order unread.
        Err(vmm::Error::Socket(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Gate {
    /// Starts the container's program. Ends when it runs.
    pub async fn open(self) -> Result<(), Error> {
        let _until_it_runs = self.small.then(SmallPieces::new);
        match vmm::send(&self.socket, &Order::Run, &[]) {
            Err(vmm::Error::Socket(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Err(Error::Died);
            }
            other => other?,
        }
        match receive(&self.socket).await? {
            None => Ok(()),
            Some((Report::Failed(failure), _)) => Err(failure.into()),
            Some(_) => Err(Error::Died),
        }
    }
}

fn write_maps(pid: Pid, maps: &IdMaps) -> io::Result<()> {
    let lines = |maps: &[LinuxIdMapping]| -> String {
        maps.iter().map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size())).collect()
    };
    // user_namespaces(7): one write for the whole map.
    fs::write(format!("/proc/{pid}/uid_map"), lines(&maps.users))?;
    fs::write(format!("/proc/{pid}/gid_map"), lines(&maps.groups))
}
