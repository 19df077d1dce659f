//! The connections of clients, counted, so that the shim can wait until they are closed.

use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// Pause after a connection that could not be taken, for lack of descriptors or memory. It goes on waiting, and whoever
/// asks for connections asks again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// How many connections are open.
#[derive(Clone)]
pub struct Clients(Arc<watch::Sender<usize>>);

impl Clients {
    /// Has the server accept and count them.
    ///
    /// # Errors
    /// When the runtime cannot wait for the listener.
    pub fn listen(listener: UnixListener) -> io::Result<(Listener, Self)> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let clients = Self(Arc::new(watch::Sender::new(0)));
        let counting = clients.clone();
        let accepted = futures::stream::unfold((listener, counting), |(listener, clients)| async {
            let accepted = listener.accept().await.map(|(stream, _)| clients.connection(stream));
            if accepted.is_err() {
                tokio::time::sleep(PAUSE).await;
            }
            Some((accepted, (listener, clients)))
        });
        Ok((Listener::new(accepted), clients))
    }

    fn connection(&self, stream: UnixStream) -> Connection {
        self.0.send_modify(|open| *open += 1);
        Connection { stream, clients: self.clone() }
    }

    /// Waits until none is open.
    pub async fn gone(&self) {
        // The sender is here, so it cannot fail.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

struct Connection {
    stream: UnixStream,
    clients: Clients,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.clients.0.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, StreamExt};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::unix::net;

    #[tokio::test]
    async fn gone_returns_when_the_last_one_is_closed() {
        let path = std::env::temp_dir().join(format!("katana-clients-{}", std::process::id()));
        let (_listener, clients) = Clients::listen(UnixListener::bind(&path).unwrap()).unwrap();
        clients.gone().await;
        let pairs = [0; 2].map(|_| net::UnixStream::pair().unwrap());
        let open = pairs.map(|(stream, _)| {
            stream.set_nonblocking(true).unwrap();
            clients.connection(UnixStream::from_std(stream).unwrap())
        });
        let [one, other] = open;
        drop(one);
        assert!(clients.gone().now_or_never().is_none());
        drop(other);
        clients.gone().await;
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_gives_no_connection_is_not_asked_all_the_time() {
        // It does not listen: so it is ready and gives none, as to a process that may have no more descriptors.
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let (mut listener, _clients) = Clients::listen(socket.into()).unwrap();
        tokio::time::pause();
        let (begin, mut errors) = (tokio::time::Instant::now(), 0);
        while errors < 100 && begin.elapsed() < 10 * PAUSE {
            assert!(listener.next().await.unwrap().is_err());
            errors += 1;
        }
        assert_eq!(errors, 10);
    }
}
