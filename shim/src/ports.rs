//! The vsock ports on the host: who waits for the guest to connect to which.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katana_protocol::FIRST_STREAM_PORT;
use tokio::sync::{mpsc, oneshot};

/// Connections to a listener that nobody has taken yet; those beyond are closed.
const BACKLOG: usize = 32;

/// The ports that the guest may connect to: each once, but for those of listeners.
#[derive(Debug)]
pub struct Ports(Mutex<Table>);

#[derive(Debug)]
struct Table {
    waiting: HashMap<u32, oneshot::Sender<UnixStream>>,
    listening: HashMap<u32, mpsc::Sender<UnixStream>>,
    next: u32,
    closed: bool,
}

/// Takes what the guest connects to a port. Dropped, the port is closed.
#[derive(Debug)]
pub struct Listener {
    ports: Arc<Ports>,
    port: u32,
    connections: mpsc::Receiver<UnixStream>,
}

/// Waits for the guest to connect to a port. Dropped, the port is closed.
#[derive(Debug)]
pub struct Waiter {
    ports: Arc<Ports>,
    port: u32,
    connection: oneshot::Receiver<UnixStream>,
}

impl Ports {
    /// No ports.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Table {
            waiting: HashMap::new(),
            listening: HashMap::new(),
            next: FIRST_STREAM_PORT,
            closed: false,
        })))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a given port.
    pub fn open(self: &Arc<Self>, port: u32) -> Waiter {
        let (sender, connection) = oneshot::channel();
        let mut table = self.table();
        if !table.closed {
            table.waiting.insert(port, sender);
        }
        Waiter { ports: Arc::clone(self), port, connection }
    }

    /// Opens a port that nobody has yet.
    pub fn open_any(self: &Arc<Self>) -> Waiter {
        let port = self.table().free_port();
        self.open(port)
    }

    /// Opens a port that nobody has yet to any number of connections.
    pub fn listen_any(self: &Arc<Self>) -> Listener {
        let (sender, connections) = mpsc::channel(BACKLOG);
        let mut table = self.table();
        let port = table.free_port();
        if !table.closed {
            table.listening.insert(port, sender);
        }
        Listener { ports: Arc::clone(self), port, connections }
    }

    /// The guest has connected. A connection that nobody waits for is closed.
    pub fn connected(&self, port: u32, connection: UnixStream) {
        let mut table = self.table();
        if let Some(listening) = table.listening.get(&port) {
            if listening.try_send(connection).is_err() {
                log::warn!("too many connections of the guest to port {port}");
            }
            return;
        }
        let waiting = table.waiting.remove(&port);
        drop(table);
        if waiting.is_none_or(|sender| sender.send(connection).is_err()) {
            log::warn!("the guest connected to port {port}, for which nothing waits");
        }
    }

    /// The guest is gone: whoever waits is told.
    pub fn close(&self) {
        let mut table = self.table();
        table.closed = true;
        table.waiting.clear();
        table.listening.clear();
    }
}

impl Table {
    fn free_port(&mut self) -> u32 {
        let mut port = self.next;
        // After four thousand million streams the numbers start again.
        while self.waiting.contains_key(&port) || self.listening.contains_key(&port) {
            port = following(port);
        }
        self.next = following(port);
        port
    }
}

fn following(port: u32) -> u32 {
    port.checked_add(1).unwrap_or(FIRST_STREAM_PORT)
}

impl Listener {
    /// The number to tell the guest.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next connection; nothing when the guest has ended.
    pub async fn connection(&mut self) -> Option<UnixStream> {
        self.connections.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.ports.table().listening.remove(&self.port);
    }
}

impl Waiter {
    /// The number to tell the guest.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The connection; nothing when the guest has ended.
    pub async fn connection(mut self) -> Option<UnixStream> {
        (&mut self.connection).await.ok()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.ports.table().waiting.remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_gets_every_connection_up_to_its_backlog() {
        let ports = Ports::new();
        let mut listener = ports.listen_any();
        for _ in 0..BACKLOG + 5 {
            ports.connected(listener.port(), UnixStream::pair().unwrap().0);
        }
        assert_ne!(ports.open_any().port(), listener.port());
        ports.close();
        let mut count = 0;
        while listener.connection().await.is_some() {
            count += 1;
        }
        assert_eq!(count, BACKLOG);
    }

    #[tokio::test]
    async fn a_listener_that_is_dropped_closes_its_port() {
        let ports = Ports::new();
        let listener = ports.listen_any();
        let port = listener.port();
        drop(listener);
        assert!(ports.table().listening.is_empty());
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        ports.connected(port, theirs);
        assert_eq!(std::io::Read::read(&mut mine, &mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn each_connection_finds_its_waiter_once() {
        let ports = Ports::new();
        let (a, b) = (ports.open_any(), ports.open_any());
        assert_ne!(a.port(), b.port());
        let (mine, theirs) = UnixStream::pair().unwrap();
        let (port, unknown) = (b.port(), UnixStream::pair().unwrap().0);
        ports.connected(9, unknown);
        ports.connected(port, theirs);
        let connection = b.connection().await.unwrap();
        assert_eq!(mine.local_addr().unwrap().as_pathname(), connection.local_addr().unwrap().as_pathname());
        drop(a);
        assert!(ports.table().waiting.is_empty());
        let left = ports.open_any();
        ports.close();
        assert!(left.connection().await.is_none());
        assert!(ports.open_any().connection().await.is_none());
    }
}
