//! What the agent and a container's process say to each other before the execve, over a `SOCK_SEQPACKET` pair that
//! is the process's standard input at first.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use katana_protocol::vmm::{receive, send};
use nix::fcntl::{FcntlArg, fcntl};
use oci_spec::runtime::{LinuxPersonalityDomain, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::seccomp::Filter;

/// Nothing: a step that never ends well in this program.
pub type Never = std::convert::Infallible;
/// What a step of the process's making gives.
pub type Result<T> = std::result::Result<T, Failure>;

/// What the process is to become. It passes in a memory file: a specification has no length limit.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    /// Where to be counted: the first cgroup that takes the process.
    pub cgroups: Vec<PathBuf>,
    /// User, capabilities, limits, program.
    pub process: Process,
    /// The compiled seccomp profile.
    pub seccomp: Option<Filter>,
    /// The execution domain, `linux.personality`.
    pub personality: Option<LinuxPersonalityDomain>,
    /// Container or exec.
    pub work: Work,
}

/// First process of a container, or one more.
#[derive(Debug, Serialize, Deserialize)]
pub enum Work {
    /// A container's first process.
    Container {
        /// The container's id.
        id: String,
        /// Its specification, without the seccomp profile and the process.
        spec: Box<Spec>,
        /// It runs [`crate::pause`] in an empty root instead of the program.
        pause: bool,
    },
    /// A further process; its first descriptor is a pidfd of the container's first.
    Exec {
        /// The namespaces to join: CLONE_* bits.
        namespaces: i32,
        /// It runs [`crate::copy`] with the arguments of the process.
        copies: bool,
    },
    /// A process of the guest itself.
    Guest,
}

/// What the agent sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// The first message. Descriptors: the memory file, for an exec the pidfd, and without a terminal the three
    /// standard streams.
    Prepare {
        /// There are standard streams.
        stdio: bool,
        /// There is a pidfd.
        container: bool,
    },
    /// The maps of the user namespace are written.
    Mapped,
    /// Start the program.
    Run,
}

/// What the process answers. The end of the connection says that the program runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// A new user namespace waits for its maps.
    Unmapped,
    /// The process continues as a child, in a new pid or time namespace. Descriptor: its pidfd.
    Forked {
        /// In the agent's pid namespace.
        pid: i32,
    },
    /// Descriptor: the master of the terminal.
    Terminal,
    /// All is set but for the start.
    Ready {
        /// Whether the program is a small one.
        small: bool,
    },
    /// It will not start.
    Failed(Failure),
}

/// The kind of a failure, for whoever picks an error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The program, or the user, or the directory is not there.
    NotFound,
    /// The program must not be run by the user.
    PermissionDenied,
    /// The specification asks for what cannot be.
    Invalid,
    /// Everything else.
    Internal,
}

/// Why a process could not be made: one line for the user. It crosses a process boundary, hence text and no source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    pub kind: Kind,
    /// What failed, on what, why.
    pub message: String,
}

impl Failure {
    /// Of a kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The specification asks for what cannot be.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// Anything, by its text.
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    pub fn internal(error: impl ToString) -> Self {
        Self::new(Kind::Internal, error.to_string())
    }

    /// For `map_err`: `step: reason`.
    pub fn during<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self::internal(format!("{}: {}", step.into(), reason(&error.into())))
    }
}

/// An error in the words that runtimes use: strerror(3), the first letter small.
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let Some((text, _)) = text.split_once(" (os error ") else { return text };
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_lowercase());
    first.into_iter().chain(letters).collect()
}

/// The process's end of the connection.
#[derive(Debug)]
pub struct Control(OwnedFd);

/// What came with the first message.
#[derive(Debug)]
pub struct Descriptors {
    container: Option<OwnedFd>,
    /// The three standard streams of a process without a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
}

impl Descriptors {
    /// A pidfd of the container's first process.
    pub fn container(&self) -> Result<BorrowedFd<'_>> {
        self.container.as_ref().map(AsFd::as_fd).ok_or_else(|| Failure::internal("no container to join"))
    }
}

impl Control {
    /// Takes over standard input, out of the way of the process's own.
    pub fn inherited() -> Self {
        let moved = fcntl(io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(3)).unwrap_or(0);
        // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor; if it failed it is standard input, which nothing
        // else here uses.
        Self(unsafe { OwnedFd::from_raw_fd(moved) })
    }

    /// Receives the first message.
    pub fn task(&self) -> Result<(Task, Descriptors)> {
        let (order, descriptors) = receive(&self.0).map_err(Failure::internal)?;
        let Order::Prepare { stdio, container } = order else {
            return Err(Failure::internal(format!("unexpected order {order:?}")));
        };
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| Failure::internal("a descriptor is missing"));
        let mut file = File::from(next()?);
        let container = if container { Some(next()?) } else { None };
        let stdio = if stdio { Some([next()?, next()?, next()?]) } else { None };
        let mut json = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut json)).map_err(Failure::during("read the task"))?;
        let task = serde_json::from_slice(&json).map_err(Failure::internal)?;
        Ok((task, Descriptors { container, stdio }))
    }

    /// Sends a report to the agent. When the agent is gone, nobody is there to receive it, and there is nothing to do.
    pub fn report(&self, report: &Report, descriptors: &[BorrowedFd<'_>]) {
        let _ = send(&self.0, report, descriptors);
    }

    /// Waits for an order.
    pub fn expect(&self, wanted: Order) -> Result<()> {
        let (order, _): (Order, _) = receive(&self.0).map_err(Failure::internal)?;
        if order == wanted { Ok(()) } else { Err(Failure::internal(format!("unexpected order {order:?}"))) }
    }
}
