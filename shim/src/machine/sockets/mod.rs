//! Sockets of the host that a container's mounts name, such as Docker's. Both ends of a Unix socket have to be in one
//! kernel, so the file alone, below the share, would refuse every connection. In its place the agent listens in the
//! guest, and each connection there is one here.
//!
//! The guest reaches the sockets that the client has mounted and nothing else, while their container lives. The agent
//! says who has connected, and the connection is made as that user: the host's kernel checks permissions and reports
//! the user to the server as if the process were on the host. A guest that lies is a root of its container; one in a
//! user namespace cannot get beyond that namespace's ids.

mod connect;
mod relay;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::agent as api;
use katana_protocol::caller::{Caller, HEAD, Head, SECRET};
use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::connect::{HostSocket, Kind};
use crate::error::{Error, Result, reason};
use crate::guest::ports::{Listener, Ports, is_same};
use crate::spec::{Source, Spec};
use crate::storage::mounts;

/// Connections to a socket at once. More wait in the guest.
const MOST_AT_ONCE: usize = 256;
/// How long the agent may take to say who has connected.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of an extended attribute (XATTR_SIZE_MAX).
const LONGEST_ATTRIBUTE: usize = 64 * 1024;

/// What passes the connections of one container on. Dropped, they end.
#[derive(Debug, Default)]
pub struct Sockets(JoinSet<()>);

/// A socket, opened by path alone (O_PATH). It is this file whatever gets its name later, as with a mount.
#[derive(Debug)]
struct Socket {
    socket: Arc<HostSocket>,
    kind: Kind,
    /// What is sent to the agent, but for the port.
    message: api::HostSocket,
}

/// Where connections go.
#[derive(Debug)]
struct Target {
    socket: Arc<HostSocket>,
    secret: [u8; SECRET],
    ids: Ids,
}

/// Opens the sockets among the sources of a container's mounts, and takes connections to them. The answer is for the
/// agent.
pub async fn open(
    spec: &Spec,
    sources: &mut [Source],
    ports: &Arc<Ports>,
) -> Result<(Vec<api::HostSocket>, Sockets)> {
    let (mut messages, mut sockets) = (Vec::new(), Sockets::default());
    for (mount, source) in spec.mounts.iter().zip(sources) {
        let Source::Socket(path) = source else { continue };
        let (path, destination) = (path.clone(), mount.destination.clone());
        let socket = crate::host::threads::blocking(move || {
            Socket::open(&path).map_err(|e| {
                // The words of runc, which tests and users look for.
                let (source, destination, reason) = (path.display(), destination.display(), reason(&e));
                Error::Host(format!("error mounting \"{source}\" to rootfs at \"{destination}\": {reason}"))
            })
        });
        let Socket { socket, kind, message } = socket.await?;
        let (listener, secret) = (ports.listen_any(), crate::host::random()?);
        *source = Source::StandIn(listener.port());
        messages.push(api::HostSocket {
            port: listener.port(),
            secret: secret.to_vec(),
            refuses: kind != Kind::Streams,
            ..message
        });
        if kind == Kind::Streams {
            sockets.0.spawn(serve(listener, Arc::new(Target { socket, secret, ids: Ids::of(spec) })));
        }
    }
    Ok((messages, sockets))
}

impl Socket {
    /// Blocks.
    fn open(path: &Path) -> io::Result<Self> {
        let file: OwnedFd = File::options().read(true).custom_flags(libc::O_PATH).open(path)?.into();
        let status = std::fs::metadata(mounts::path_of_fd(file.as_fd()))?;
        if !status.file_type().is_socket() {
            return Err(io::Error::other("it was a socket and is none any more"));
        }
        let message = api::HostSocket {
            mode: status.mode() & 0o7777,
            uid: status.uid(),
            gid: status.gid(),
            acl: access_list(&mounts::path_of_fd(file.as_fd()))?,
            ..Default::default()
        };
        let socket = Arc::new(HostSocket::new(file, path));
        let kind = socket.kind();
        if kind == Kind::Datagrams {
            log::warn!("{}: a socket for datagrams is not connected with the guest", path.display());
        }
        Ok(Self { socket, kind, message })
    }
}

/// The POSIX access control list of a file as the kernel gives it; nothing if it has none.
fn access_list(path: &Path) -> io::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut list = vec![0; LONGEST_ATTRIBUTE];
    // SAFETY: strings and a buffer of the given length that live through the call.
    let length = unsafe {
        let name = c"system.posix_acl_access".as_ptr();
        libc::getxattr(path.as_ptr(), name, list.as_mut_ptr().cast(), list.len())
    };
    match Errno::result(length) {
        Ok(length) => list.truncate(usize::try_from(length).unwrap_or(0)),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => list.clear(),
        Err(error) => return Err(error.into()),
    }
    Ok(list)
}

/// Passes connections on until the guest is gone.
async fn serve(mut listener: Listener, target: Arc<Target>) {
    let (slots, mut connections) = (Arc::new(Semaphore::new(MOST_AT_ONCE)), JoinSet::new());
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        let Some(guest) = listener.connection().await else { return };
        while connections.try_join_next().is_some() {}
        let target = Arc::clone(&target);
        connections.spawn(async move {
            let _slot = slot;
            let guest = guest.set_nonblocking(true).and_then(|()| UnixStream::from_std(guest));
            let passed = match guest {
                Ok(guest) => target.pass_on(guest).await,
                Err(e) => Err(e),
            };
            if let Err(e) = passed {
                log::debug!("connection to {}: {e}", target.socket);
            }
        });
    }
}

impl Target {
    async fn pass_on(&self, mut guest: UnixStream) -> io::Result<()> {
        let caller = tokio::time::timeout(PATIENCE, self.greet(&mut guest)).await??;
        match connect::connect(&self.socket, caller).await {
            Ok(host) => {
                guest.write_u8(0).await?;
                relay::relay(guest, host).await
            }
            Err(e) => {
                // The numbers of all errors are below 256 (errno(3)), and none is 0.
                let number = e.raw_os_error().and_then(|number| u8::try_from(number).ok());
                guest.write_u8(number.unwrap_or(libc::EIO as u8)).await?;
                Err(e)
            }
        }
    }

    /// Learns who has connected, from one who knows the secret.
    async fn greet(&self, guest: &mut UnixStream) -> io::Result<Caller> {
        let refused = |why| io::Error::new(io::ErrorKind::PermissionDenied, why);
        let mut head = [0; HEAD];
        guest.read_exact(&mut head).await?;
        let head = Head::parse(&head).ok_or_else(|| refused("a caller in too many groups"))?;
        if !is_same(&head.secret, &self.secret) {
            return Err(refused("a caller without the secret"));
        }
        let mut rest = vec![0; head.rest()];
        guest.read_exact(&mut rest).await?;
        let caller = head.caller(&rest);
        if self.ids.allow(&caller) {
            Ok(caller)
        } else {
            Err(refused("a caller from another user namespace"))
        }
    }
}

/// The host's ids that processes of a container can have; all, without a user namespace.
#[derive(Debug)]
struct Ids {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// The first, and how many.
type Range = (u64, u64);

impl Ids {
    fn of(spec: &Spec) -> Self {
        let ranges = |member: &str| {
            let maps = spec.linux.as_ref().and_then(|linux| linux.rest.get(member)?.as_array());
            let range =
                |map: &serde_json::Value| Some((map.get("hostID")?.as_u64()?, map.get("size")?.as_u64()?));
            maps.into_iter().flatten().filter_map(range).collect()
        };
        Self { users: ranges("uidMappings"), groups: ranges("gidMappings") }
    }

    fn allow(&self, caller: &Caller) -> bool {
        let within = |ranges: &[Range], id: u32| {
            let is_in = |&(first, count): &Range| u64::from(id).checked_sub(first).is_some_and(|n| n < count);
            // To the system calls, the highest number means "as it was".
            id != u32::MAX && (ranges.is_empty() || ranges.iter().any(is_in))
        };
        within(&self.users, caller.uid)
            && within(&self.groups, caller.gid)
            && caller.groups.iter().all(|group| within(&self.groups, *group))
    }
}

#[cfg(test)]
mod tests;
