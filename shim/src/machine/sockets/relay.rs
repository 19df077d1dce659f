//! A connection of the guest and one of the host, made one.

use std::io;
use std::os::fd::AsFd;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};

/// Passes on what comes from either, and its end. Over when both have ended, or when one has hung up and the other has
/// got all of what it sent: an end alone leaves the other direction open, and a server may have nothing to say for
/// years.
pub async fn relay(mut guest: UnixStream, mut host: UnixStream) -> io::Result<()> {
    let ((from_guest, to_guest), (from_host, to_host)) = (guest.split(), host.split());
    tokio::select! {
        passed = pass(from_guest, to_host) => passed,
        passed = pass(from_host, to_guest) => passed,
    }
}

/// One direction, until its sender has hung up.
async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await?;
    hung_up(from.as_ref()).await
}

/// Waits until the other end of a socket is closed, or both have shut down their sides.
async fn hung_up(socket: &UnixStream) -> io::Result<()> {
    // A second descriptor, since tokio keeps one state for each.
    let socket = socket.as_fd().try_clone_to_owned()?;
    // Of what epoll reports unasked (EPOLLHUP) tokio makes an end of what can be read, which is part of every interest
    // but the one in writing. Nothing is ever out of band, so nothing else wakes this up. SAFETY: an OwnedFd always
    // answers the same descriptor, and keeps it open while it lives.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::PRIORITY) }?;
    socket.ready(Interest::PRIORITY).await.map(drop)
}
