//! How the agent reaches its host: vsock in a guest, Unix sockets in a directory on a host.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use katana_protocol::{FIRST_STREAM_PORT, STREAM_KEY};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, sockopt};
use tokio::io::AsyncWriteExt;

use crate::stream::Stream;

/// The way to the host's ports. Clones share the key.
#[derive(Debug, Clone)]
pub struct Transport {
    address: Address,
    key: Arc<OnceLock<[u8; STREAM_KEY]>>,
}

/// Where the host's ports are.
#[derive(Debug, Clone)]
enum Address {
    /// Ports of the host, CID 2.
    Vsock,
    /// Sockets `<port>.sock` in this directory.
    Unix(PathBuf),
}

impl Transport {
    /// Out of a guest.
    pub fn vsock() -> Self {
        Self { address: Address::Vsock, key: Arc::default() }
    }

    /// To sockets `<port>.sock` in this directory.
    pub fn unix(directory: PathBuf) -> Self {
        Self { address: Address::Unix(directory), key: Arc::default() }
    }

    /// Whether this is a guest.
    pub fn is_guest(&self) -> bool {
        matches!(self.address, Address::Vsock)
    }

    /// Sets the key by which the host knows the agent. Only the first one counts.
    pub fn set_key(&self, key: [u8; STREAM_KEY]) {
        // Another one would be the same: the host has one.
        let _ = self.key.set(key);
    }

    /// Connects to a port of the host, and says the key once there is one.
    pub async fn connect(&self, port: u32) -> io::Result<Stream> {
        let mut stream = match &self.address {
            Address::Vsock => {
                connect(AddressFamily::Vsock, &VsockAddr::new(libc::VMADDR_CID_HOST, port)).await?
            }
            Address::Unix(directory) => {
                let address = UnixAddr::new(&directory.join(format!("{port}.sock")))?;
                connect(AddressFamily::Unix, &address).await?
            }
        };
        // The port to which the agent connects first is the one where it learns the key.
        if port >= FIRST_STREAM_PORT
            && let Some(key) = self.key.get()
        {
            stream.write_all(key).await?;
        }
        Ok(stream)
    }
}

async fn connect(family: AddressFamily, address: &(dyn SockaddrLike + Sync)) -> io::Result<Stream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(family, SockType::Stream, flags, None)?;
    let pending = match socket::connect(socket.as_raw_fd(), address) {
        Ok(()) => false,
        Err(Errno::EINPROGRESS) => true,
        Err(error) => return Err(error.into()),
    };
    let stream = Stream::new(socket)?;
    if pending {
        stream.writable().await?;
        let error = socket::getsockopt(&stream, sockopt::SocketError)?;
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
    }
    Ok(stream)
}
