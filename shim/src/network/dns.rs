//! Name servers on the loopback interface of the pod's network namespace, such as Docker's on user networks
//! (127.0.0.11). The guest's loopback interface is another one, so the agent takes their place there and the shim
//! passes on what it is asked.
//!
//! The guest reaches these servers and nothing else: addresses come from the file that the client gave the container.

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::agent as api;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::namespace::Namespace;
use crate::error::{Error, Result};
use crate::guest::ports::{Listener, Ports};
use crate::spec::Spec;
use crate::storage::mounts::path_of_fd;

const PORT: u16 = 53;
/// As many as resolv.conf(5) may name.
const MOST_SERVERS: usize = 3;
/// Of the file, in bytes.
const LONGEST_FILE: u64 = 64 * 1024;
/// Questions and connections of a pod at once. More wait.
const MOST_AT_ONCE: usize = 32;
/// How long a server may take; clients ask again after 5 seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may last.
const LONGEST_CONNECTION: Duration = Duration::from_secs(60);

/// The loopback name servers that a container is given.
pub fn servers_of(spec: &Spec) -> Vec<Ipv4Addr> {
    let mut mounts = spec.mounts.iter().filter(|mount| mount.destination == Path::new("/etc/resolv.conf"));
    let Some(source) = mounts.next_back().and_then(|mount| mount.source.as_ref()) else { return Vec::new() };
    let text = read_file(source).unwrap_or_else(|e| {
        log::warn!("{}: {e}", source.display());
        String::new()
    });
    loopback_servers(&text)
}

/// Reads a file that a container's author has named. It may be anything: a FIFO or a device is not waited for, as all
/// of the pod would wait.
fn read_file(path: &Path) -> io::Result<String> {
    // To open a device, or a FIFO, is to do something already.
    let found = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let file = File::open(path_of_fd(found.as_fd()))?;
    let mut text = String::new();
    file.take(LONGEST_FILE).read_to_string(&mut text)?;
    Ok(text)
}

fn loopback_servers(text: &str) -> Vec<Ipv4Addr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address: Ipv4Addr =
            words.next().filter(|word| *word == "nameserver").and(words.next())?.parse().ok()?;
        address.is_loopback().then_some(address)
    };
    text.lines().filter_map(server).take(MOST_SERVERS).collect()
}

/// Passes on what is asked of a server until the guest is gone. The answer is for the agent.
pub fn serve(server: Ipv4Addr, namespace: &Arc<Namespace>, ports: &Arc<Ports>) -> api::NameServer {
    let (questions, connections) = (ports.listen_any(), ports.listen_any());
    let (udp_port, tcp_port) = (questions.port(), connections.port());
    let server_address = SocketAddr::from((server, PORT));
    let namespace = Arc::clone(namespace);
    let (of_questions, of_connections) = (Arc::clone(&namespace), namespace);
    tokio::spawn(each(questions, PATIENCE, move |guest| {
        ask(guest, Arc::clone(&of_questions), server_address)
    }));
    tokio::spawn(each(connections, LONGEST_CONNECTION, move |guest| {
        connect(guest, Arc::clone(&of_connections), server_address)
    }));
    api::NameServer { address: server.octets().to_vec(), udp_port, tcp_port, ..Default::default() }
}

async fn each<F: Future<Output = io::Result<()>> + Send + 'static>(
    mut connections: Listener,
    limit: Duration,
    work: impl Fn(tokio::net::UnixStream) -> F,
) {
    let places = Arc::new(Semaphore::new(MOST_AT_ONCE));
    while let Some(guest) = connections.connection().await {
        let guest = guest.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(guest));
        let (Ok(guest), Ok(place)) = (guest, Arc::clone(&places).acquire_owned().await) else { continue };
        let work = work(guest);
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(limit, work).await {
                Ok(Ok(())) => {}
                // A client that has asked in vain asks again, or another server.
                Ok(Err(e)) => log::debug!("name server: {e}"),
                Err(_) => log::debug!("name server: no answer in time"),
            }
        });
    }
}

async fn ask(
    mut guest: tokio::net::UnixStream,
    namespace: Arc<Namespace>,
    server: SocketAddr,
) -> io::Result<()> {
    let length = guest.read_u16().await?;
    let mut packet = vec![0; usize::from(length)];
    guest.read_exact(&mut packet).await?;
    let socket = inside(namespace, move || {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    let socket = tokio::net::UdpSocket::from_std(socket.await?)?;
    socket.send(&packet).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    guest.write_u16(u16::try_from(length).map_err(io::Error::other)?).await?;
    guest.write_all(answer.get(..length).unwrap_or_default()).await
}

async fn connect(
    mut guest: tokio::net::UnixStream,
    namespace: Arc<Namespace>,
    server: SocketAddr,
) -> io::Result<()> {
    let connection = inside(namespace, move || {
        let connection = TcpStream::connect_timeout(&server, PATIENCE)?;
        connection.set_nonblocking(true)?;
        Ok(connection)
    });
    let mut connection = tokio::net::TcpStream::from_std(connection.await?)?;
    tokio::io::copy_bidirectional(&mut guest, &mut connection).await.map(drop)
}

/// A socket belongs to the network namespace in which it was made.
async fn inside<T: Send + 'static>(
    namespace: Arc<Namespace>,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let made = move || -> Result<T> { namespace.inside(|| make().map_err(|e| Error::io("socket", &e))) };
    crate::host::threads::blocking(made).await.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("katana-resolv-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (source, (sender, answer)) = (path.clone(), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            let mount =
                serde_json::json!({"destination": "/etc/resolv.conf", "type": "bind", "source": source});
            let spec = serde_json::json!({"mounts": [mount]});
            sender.send(servers_of(&serde_json::from_value(spec).unwrap())).unwrap();
        });
        let servers = answer.recv_timeout(Duration::from_secs(180)).expect("nobody writes into the FIFO");
        assert!(servers.is_empty());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "nameserver 127.0.0.11\n").unwrap();
        assert_eq!(read_file(&path).unwrap(), "nameserver 127.0.0.11\n");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn only_loopback_servers_are_passed_on() {
        let text = "# nameserver 127.0.0.1\nsearch a\nnameserver 10.0.0.1\nnameserver 127.0.0.11\n\
                    nameserver ::1\nnameserver\nnameserver 127.0.0.256\n nameserver\t127.1.2.3 x\noptions ndots:0\n";
        let expected = [Ipv4Addr::new(127, 0, 0, 11), Ipv4Addr::new(127, 1, 2, 3)];
        assert_eq!(loopback_servers(text), expected);
        assert_eq!(loopback_servers(&"nameserver 127.0.0.1\n".repeat(9)).len(), MOST_SERVERS);
    }
}
