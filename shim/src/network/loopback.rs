//! What listens on the guest's loopback interface, for clients on that of the pod's network namespace: containerd's CRI
//! plugin and CRI-O forward ports by connecting to `localhost` there.
//!
//! Whoever can connect is in that namespace, and so could connect to a container without a virtual machine in the same
//! way. The guest answers connections and can begin none.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use super::namespace::Namespace;
use super::sk_lookup::Redirected;
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::guest::ports::Ports;

/// Connections of a pod at once. More wait in the socket.
const MOST_AT_ONCE: usize = 256;
/// How long the guest may take to connect to itself.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a connection that could not be taken, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Where clients connect to. Dropped, there is nothing.
#[derive(Debug)]
pub struct Loopback(Redirected);

impl Loopback {
    /// Listens in a namespace.
    pub async fn listen(namespace: Arc<Namespace>) -> Result<Self> {
        let listen = move || {
            let listen =
                || Redirected::listen(namespace.as_fd()).map_err(|e| Error::io("listen on localhost", &e));
            namespace.inside(listen)
        };
        crate::host::threads::blocking(listen).await.map(Self)
    }

    /// Passes connections on to the guest until this is dropped.
    pub async fn serve(self, agent: Agent, ports: Arc<Ports>) -> io::Result<()> {
        let Self(Redirected { listener, link: _link }) = self;
        let listener = TcpListener::from_std(listener)?;
        let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let Ok((client, _)) = listener.accept().await else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let (agent, ports) = (agent.clone(), Arc::clone(&ports));
            tokio::spawn(async move {
                let _place = place;
                if let Err(e) = relay(client, &agent, &ports).await {
                    log::debug!("forwarding of a port: {e}");
                }
            });
        }
        Ok(())
    }
}

async fn relay(mut client: TcpStream, agent: &Agent, ports: &Arc<Ports>) -> Result<()> {
    let failed = |e| Error::io("connection", &e);
    let port = client.local_addr().map_err(failed)?.port();
    let guest = tokio::time::timeout(PATIENCE, connect(port, agent, ports)).await;
    match guest.unwrap_or_else(|_| Err(Error::DeadlineExceeded(format!("no answer of port {port}")))) {
        Ok(mut guest) => {
            tokio::io::copy_bidirectional(&mut client, &mut guest).await.map(drop).map_err(failed)
        }
        Err(e) => {
            // The kernel has accepted the connection already. A reset is the nearest to a refusal that is left.
            let reset = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&client, sockopt::Linger, &reset).map_err(|e| Error::os("connection", e))?;
            Err(e)
        }
    }
}

async fn connect(port: u16, agent: &Agent, ports: &Arc<Ports>) -> Result<UnixStream> {
    let waiter = ports.open_any();
    agent.forward_port(port, waiter.port()).await?;
    let connection = waiter.connection().await?;
    let stream = connection.set_nonblocking(true).and_then(|()| UnixStream::from_std(connection));
    stream.map_err(|e| Error::io("connection to the guest", &e))
}
