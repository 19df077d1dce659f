//! Connections to a socket of the host, as the user who has connected in the guest.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use katana_protocol::caller::Caller;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::error::reason;
use crate::storage::mounts;

/// How long a server with a full queue is waited for.
const LIMIT: Duration = Duration::from_secs(30);
/// Of a thread that makes some system calls.
const STACK: usize = 64 * 1024;

/// A socket's file.
#[derive(Debug)]
pub struct HostSocket {
    file: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// Whether it was logged that this is no stream.
    complained: AtomicBool,
}

/// What is behind a socket's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A socket for streams, or for packets in a connection (SOCK_SEQPACKET).
    Streams,
    /// A socket for datagrams.
    Datagrams,
    /// Nothing: its socket is closed. A new one makes a new file.
    Nobody,
}

impl HostSocket {
    /// Takes a descriptor that stands for the file of this path.
    pub fn new(file: OwnedFd, path: &Path) -> Self {
        Self { file, path: path.to_owned(), complained: AtomicBool::new(false) }
    }

    /// The file as a socket address, whatever has its path now.
    fn address(&self) -> nix::Result<UnixAddr> {
        UnixAddr::new(&mounts::path_of_fd(self.file.as_fd()))
    }

    /// Looks by a way that no server notices: to connect a socket for datagrams is to note the other end's address, and
    /// the kernel checks that it is one of the same type.
    pub fn kind(&self) -> Kind {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let connected = socket::socket(AddressFamily::Unix, SockType::Datagram, flags, None)
            .and_then(|probe| socket::connect(probe.as_raw_fd(), &self.address()?));
        match connected {
            // EPERM: of the other end, which is connected to somebody else.
            Ok(()) | Err(Errno::EPERM) => Kind::Datagrams,
            Err(Errno::ECONNREFUSED) => Kind::Nobody,
            // EPROTOTYPE is the expected one. Whatever else is wrong, those who connect will learn.
            Err(_) => Kind::Streams,
        }
    }

    /// Connects as this thread's user. Blocks.
    fn connect(&self) -> io::Result<OwnedFd> {
        let stream = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let limit = TimeVal::milliseconds(i64::try_from(LIMIT.as_millis()).unwrap_or(i64::MAX));
        // unix(7), connect(2): it bounds how long this waits for room in the server's queue; EAGAIN afterwards.
        setsockopt(&stream, sockopt::SendTimeout, &limit)?;
        let address = self.address()?;
        loop {
            match socket::connect(stream.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EINTR) => {}
                // It may listen later, but not after it is closed.
                Err(Errno::ECONNREFUSED) if self.kind() != Kind::Nobody => return Err(Errno::EAGAIN.into()),
                Err(error) => {
                    if error == Errno::EPROTOTYPE && !self.complained.swap(true, Ordering::Relaxed) {
                        log::warn!("{self}: a socket for packets is not connected with the guest");
                    }
                    return Err(error.into());
                }
            }
        }
        setsockopt(&stream, sockopt::SendTimeout, &TimeVal::zero())?;
        Ok(stream)
    }
}

impl fmt::Display for HostSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// Connects as this user.
pub async fn connect(socket: &Arc<HostSocket>, caller: Caller) -> io::Result<UnixStream> {
    let (sender, connected) = oneshot::channel();
    let socket = Arc::clone(socket);
    // A thread of its own, which ends, so that nothing else ever runs as somebody else.
    std::thread::Builder::new().name("connect".into()).stack_size(STACK).spawn(move || {
        let connected = become_user(&caller).and_then(|()| socket.connect());
        if let Err(e) = &connected {
            log::debug!("connect to {socket} as {}:{}: {}", caller.uid, caller.gid, reason(e));
        }
        // Nobody waits any more when the container is gone.
        let _ = sender.send(connected);
    })?;
    let stream = connected.await.map_err(|_| io::Error::other("the thread has ended"))??;
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Gives this thread a user's credentials. To the kernel they are a thread's; the functions of the C library would
/// change those of all threads.
fn become_user(caller: &Caller) -> io::Result<()> {
    let Caller { uid, gid, groups } = caller;
    // SAFETY: a list of the given length that lives through the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid) })?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid) })?;
    Ok(())
}
