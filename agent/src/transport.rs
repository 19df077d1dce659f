//! How the agent reaches its host: vsock in a guest, Unix sockets in a directory on a host.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, sockopt};

use crate::streams::Stream;

/// Where the host's ports are.
#[derive(Debug, Clone)]
pub enum Transport {
    /// Ports of the host, CID 2.
    Vsock,
    /// Sockets `<port>.sock` in this directory.
    Unix(PathBuf),
}

impl Transport {
    /// Connects to a port of the host.
    pub async fn connect(&self, port: u32) -> io::Result<Stream> {
        match self {
            Self::Vsock => connect(AddressFamily::Vsock, &VsockAddr::new(libc::VMADDR_CID_HOST, port)).await,
            Self::Unix(directory) => {
                let address = UnixAddr::new(&directory.join(format!("{port}.sock")))?;
                connect(AddressFamily::Unix, &address).await
            }
        }
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
