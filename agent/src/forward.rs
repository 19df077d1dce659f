//! Ports of the guest's localhost for clients on the host: one connection over vsock is one by TCP.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpStream;

use crate::transport::Transport;

/// Connects to a port of localhost, then to the host, and passes on what comes from either until both have ended.
pub async fn start(port: u32, host_port: u32, transport: &Transport) -> io::Result<()> {
    let port = u16::try_from(port).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut local = connect(port).await?;
    let mut host = transport.connect(host_port).await?;
    tokio::spawn(async move {
        // Either end may go at any time.
        let _ = tokio::io::copy_bidirectional(&mut local, &mut host).await;
    });
    Ok(())
}

/// In the order in which clients of the host try them.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Err(refused) => {
            let v6 = TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await;
            v6.map_err(|_| refused)
        }
        connected => connected,
    }
}
