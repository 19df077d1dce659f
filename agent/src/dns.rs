//! Name servers that are on the loopback interface of the pod's network namespace on the host: the agent takes their
//! places on that of the guest, and passes on what it is asked over vsock.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::agent::NameServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::Semaphore;

use crate::transport::Transport;

const PORT: u16 = 53;
/// Questions at once. More wait in the socket.
const MOST_AT_ONCE: usize = 32;
/// Clients ask again after 5 seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a connection that could not be taken, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// The servers whose places are taken.
#[derive(Debug, Default)]
pub struct Names(Mutex<Vec<Ipv4Addr>>);

/// A server whose place cannot be taken.
#[derive(Debug, thiserror::Error)]
#[error("name server {0}: {1}")]
pub struct Error(String, io::Error);

impl Names {
    /// Takes the place of these servers, until the guest ends.
    pub async fn serve(&self, servers: &[NameServer], transport: &Transport) -> Result<(), Error> {
        for server in servers {
            let failed = |error| Error(format!("{:?}", server.address), error);
            let address = <[u8; 4]>::try_from(server.address.as_slice()).map(Ipv4Addr::from);
            let address = address.map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
            if self.servers().contains(&address) {
                continue;
            }
            let failed = |error| Error(address.to_string(), error);
            let udp = UdpSocket::bind((address, PORT)).await.map_err(failed)?;
            let tcp = TcpListener::bind((address, PORT)).await.map_err(failed)?;
            tokio::spawn(questions(Arc::new(udp), transport.clone(), server.udp_port));
            tokio::spawn(connections(tcp, transport.clone(), server.tcp_port));
            self.servers().push(address);
        }
        Ok(())
    }

    fn servers(&self) -> std::sync::MutexGuard<'_, Vec<Ipv4Addr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn questions(socket: Arc<UdpSocket>, transport: Transport, port: u32) {
    let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
    let mut packet = vec![0; usize::from(u16::MAX)];
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        // An error is one of an earlier answer, such as that its receiver is gone.
        let Ok((length, client)) = socket.recv_from(&mut packet).await else { continue };
        let question = packet.get(..length).unwrap_or_default().to_vec();
        let (socket, transport) = (Arc::clone(&socket), transport.clone());
        tokio::spawn(async move {
            let _place = place;
            let answered =
                tokio::time::timeout(PATIENCE, answer(&socket, client, &question, &transport, port));
            if let Ok(Err(error)) = answered.await {
                log::debug!("name server: {error}");
            }
        });
    }
}

async fn answer(
    socket: &UdpSocket,
    client: SocketAddr,
    question: &[u8],
    transport: &Transport,
    port: u32,
) -> io::Result<()> {
    let mut host = transport.connect(port).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    host.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let length = host.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    host.read_exact(&mut answer).await?;
    socket.send_to(&answer, client).await.map(drop)
}

async fn connections(listener: TcpListener, transport: Transport, port: u32) {
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let transport = transport.clone();
        tokio::spawn(async move {
            if let Ok(mut host) = transport.connect(port).await {
                // Either end may go at any time.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut host).await;
            }
        });
    }
}
