//! Stand-ins for sockets of the host that a container mounts: the agent listens in the guest, and passes each
//! connection on over vsock, with a word on who has connected.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::GUEST_SOCKETS;
use katana_protocol::agent::HostSocket;
use katana_protocol::caller::{Caller, MOST_GROUPS, SECRET};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockopt, sockopt};
use nix::sys::stat::{Mode, SFlag, mknod};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, JoinSet};

use crate::stream::Stream;
use crate::transport::Transport;

/// Connections to a socket at once. More wait in its queue.
const MOST_AT_ONCE: usize = 256;
/// Those of them that the host is being asked for.
const MOST_ASKING: usize = 16;
/// Of a socket, as programs usually have it.
const QUEUE: i32 = 128;
/// Pause after a connection that could not be taken, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that cannot be stood in for.
#[derive(Debug, thiserror::Error)]
#[error("socket {0} of the host: {1}")]
pub struct Error(u32, io::Error);

/// Those of a container. Dropped, they are gone, and their connections end.
#[derive(Debug, Default)]
pub struct Sockets(#[expect(dead_code, reason = "what is in it ends with it")] Vec<StandIn>);

#[derive(Debug)]
struct StandIn {
    path: PathBuf,
    serving: Option<JoinHandle<()>>,
}

/// Where connections go.
#[derive(Debug)]
struct Host {
    transport: Transport,
    port: u32,
    secret: [u8; SECRET],
    asking: Semaphore,
    /// Notified when nobody listens any more on the host, nor will.
    refuses: Notify,
}

impl Sockets {
    /// Makes stand-ins.
    pub fn serve(sockets: &[HostSocket], transport: &Transport) -> Result<Self, Error> {
        let serve = |socket: &HostSocket| {
            StandIn::serve(socket, transport).map_err(|error| Error(socket.port, error))
        };
        sockets.iter().map(serve).collect::<Result<_, _>>().map(Self)
    }
}

impl StandIn {
    fn serve(socket: &HostSocket, transport: &Transport) -> io::Result<Self> {
        fs::create_dir_all(GUEST_SOCKETS)?;
        let path = Path::new(GUEST_SOCKETS).join(socket.port.to_string());
        let mut stand_in = Self { path, serving: None };
        if socket.refuses {
            mknod(&stand_in.path, SFlag::S_IFSOCK, Mode::empty(), 0)?;
            set_access(&stand_in.path, socket)?;
            return Ok(stand_in);
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        socket::bind(listener.as_raw_fd(), &UnixAddr::new(&stand_in.path)?)?;
        set_access(&stand_in.path, socket)?;
        socket::listen(&listener, Backlog::new(QUEUE)?)?;
        let host = Host {
            transport: transport.clone(),
            port: socket.port,
            secret: socket.secret.as_slice().try_into().map_err(io::Error::other)?,
            asking: Semaphore::new(MOST_ASKING),
            refuses: Notify::new(),
        };
        let listener = UnixListener::from_std(listener.into())?;
        stand_in.serving = Some(tokio::spawn(serve(listener, Arc::new(host))));
        Ok(stand_in)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("remove {}: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

/// Owner, mode and access control list, so that the guest's kernel lets those connect whom the host's would.
fn set_access(path: &Path, socket: &HostSocket) -> io::Result<()> {
    chown(path, Some(socket.uid), Some(socket.gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(socket.mode & 0o7777))?;
    if socket.acl.is_empty() {
        return Ok(());
    }
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (name, list) = (c"system.posix_acl_access", &socket.acl);
    // SAFETY: strings and a buffer of the given length that live through the call.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), list.as_ptr().cast(), list.len(), 0) };
    Errno::result(set)?;
    Ok(())
}

/// Takes connections until nobody listens on the host any more, then waits for those that there are.
async fn serve(listener: UnixListener, host: Arc<Host>) {
    let (places, mut connections) = (Arc::new(Semaphore::new(MOST_AT_ONCE)), JoinSet::new());
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = host.refuses.notified() => break,
        };
        let Ok((client, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let host = Arc::clone(&host);
        connections.spawn(async move {
            let _place = place;
            if let Err(error) = host.connect(client).await {
                log::debug!("socket {} of the host: {error}", host.port);
            }
        });
    }
    // From now on, the guest's kernel refuses connections.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

impl Host {
    async fn connect(&self, client: UnixStream) -> io::Result<()> {
        let caller = caller(&client)?;
        let message =
            caller.message(&self.secret).ok_or_else(|| io::Error::other("a caller in too many groups"))?;
        let asking = self.asking.acquire().await.map_err(io::Error::other)?;
        let mut host = self.transport.connect(self.port).await?;
        host.write_all(&message).await?;
        let answer = i32::from(host.read_u8().await?);
        drop(asking);
        match answer {
            0 => relay(client, host).await,
            error => {
                // A closed socket never listens again, and a file is of one type.
                if [libc::ECONNREFUSED, libc::EPROTOTYPE].contains(&error) {
                    self.refuses.notify_one();
                }
                Err(io::Error::from_raw_os_error(error))
            }
        }
    }
}

/// Who has connected, by the ids of the guest's first user namespace, which are the host's.
fn caller(client: &UnixStream) -> io::Result<Caller> {
    let credentials = getsockopt(client, sockopt::PeerCredentials)?;
    let mut groups: Vec<libc::gid_t> = vec![0; MOST_GROUPS];
    let mut length = libc::socklen_t::try_from(size_of_val(groups.as_slice())).unwrap_or(0);
    // SAFETY: a buffer of the given length, and the length, which live through the call.
    Errno::result(unsafe {
        let (fd, buffer) = (client.as_raw_fd(), groups.as_mut_ptr().cast());
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, buffer, &mut length)
    })?;
    groups.truncate(usize::try_from(length).unwrap_or(0) / size_of::<libc::gid_t>());
    Ok(Caller { uid: credentials.uid(), gid: credentials.gid(), groups })
}

/// Passes on what comes from either, and its end. Over when the client has hung up and the host has got all of its
/// data; or when either cannot be written any more.
async fn relay(mut client: UnixStream, host: Stream) -> io::Result<()> {
    let of_client = client.as_fd().try_clone_to_owned()?;
    let (from_client, to_client) = client.split();
    let (from_host, to_host) = tokio::io::split(host);
    let (up, down) = (pass(from_client, to_host), pass(from_host, to_client));
    let up = async {
        up.await?;
        hung_up(of_client).await
    };
    let down = async {
        down.await?;
        // The client has got the end. When it takes it for one, it hangs up.
        std::future::pending().await
    };
    tokio::select! {
        passed = up => passed,
        passed = down => passed,
    }
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await
}

/// Waits until the other end of a socket is closed, or both have shut down their sides.
async fn hung_up(socket: OwnedFd) -> io::Result<()> {
    // Of what epoll reports unasked (EPOLLHUP) tokio makes an end of what can be read, which is part of every interest
    // but the one in writing. Nothing is ever out of band, so nothing else wakes this up. SAFETY: an OwnedFd always
    // answers the same descriptor, and keeps it open while it lives.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::PRIORITY) }?;
    socket.ready(Interest::PRIORITY).await.map(drop)
}
