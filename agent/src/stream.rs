//! A non-blocking descriptor of a socket, a pipe or a terminal.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// With the packet's header and the kernel's own this is still less than a page.
const SMALL: usize = 2048;

/// A non-blocking descriptor: socket, pipe or terminal.
#[derive(Debug)]
pub struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Makes `fd` non-blocking and watches it.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd always answers the same descriptor, and keeps it open while it lives.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Runs `operation` when the descriptor can be read, again until it does not answer `WouldBlock`.
    pub async fn when_readable<T>(
        &self,
        operation: impl Fn(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(result) = guard.try_io(|fd| operation(fd.as_fd())) {
                return result;
            }
        }
    }

    /// Reads what there is, once there is something.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(result) = guard.try_io(|fd| Ok(read(fd, buffer)?)) {
                return result;
            }
        }
    }

    /// Waits until the descriptor can be written.
    pub async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|mut guard| guard.retain_ready())
    }

    /// Waits until the descriptor can be read.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there, `None` when nothing is. 0 is the end; so is EIO, a terminal that no process has open.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let result = self.0.try_io(tokio::io::Interest::READABLE, |fd| match read(fd, buffer) {
            Err(Errno::EIO) => Ok(0),
            other => Ok(other?),
        });
        match result {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes all of `bytes`.
    pub async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            if let Ok(result) = guard.try_io(|fd| write_some(fd, bytes)) {
                bytes = bytes.get(result?..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// How many bytes lie in a pipe, unread.
    pub fn pending(&self) -> u64 {
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes an int, which lives through the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::FIONREAD, &mut count) };
        if result == 0 { u64::try_from(count).unwrap_or(0) } else { 0 }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What ttrpc wants of a connection.
impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            if let Ok(result) = guard.try_io(|fd| Ok(read(fd, buffer.initialize_unfilled())?)) {
                return Poll::Ready(result.map(|count| buffer.advance(count)));
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(result) = guard.try_io(|fd| write_some(fd, bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?))
    }
}

/// Writes what goes at once. A vsock packet lies in one block of memory, of up to 128 KiB (`virtio_vsock_alloc_skb` in
/// include/linux/virtio_vsock.h), which a guest whose free memory is in pieces does not have. A page it has.
fn write_some(fd: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    match write(&fd, bytes) {
        Err(Errno::ENOMEM | Errno::ENOBUFS) if bytes.len() > SMALL => {
            Ok(write(&fd, bytes.get(..SMALL).unwrap_or_default())?)
        }
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On this thread, write(2) of more than a page fails with ENOMEM (seccomp(2), bpf(4)).
    fn deny_long_writes() {
        let step = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
        // seccomp_data: the number, and the lower half of the third argument.
        let mut program = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_write as u32, 0, 3),
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 32, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 4096, 0, 1),
            step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOMEM as u32, 0, 0),
            step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let program = libc::sock_fprog { len: 6, filter: program.as_mut_ptr() };
        // SAFETY: numbers, and a program that outlives the call.
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
        };
        assert!(installed, "{}", io::Error::last_os_error());
    }

    #[test]
    fn a_kernel_without_large_blocks_of_memory_gets_small_pieces() {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n / 7) as u8).collect();
        let sent = bytes.clone();
        let sender = std::thread::spawn(move || {
            deny_long_writes();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { Stream::new(near.into()).unwrap().send_all(&sent).await })
        });
        let mut received = Vec::new();
        io::Read::read_to_end(&mut &far, &mut received).unwrap();
        sender.join().unwrap().unwrap();
        assert!(received == bytes);
    }
}
