//! The vsock ports on the host: who waits for the guest to connect to which.
//!
//! Any process of the guest can connect to any port, also one in a container without privileges, and the numbers are
//! easy to guess. So whoever connects has to say the machine's key first, which only the agent has. Until then, and if
//! it is another one, the port goes on waiting. The exceptions are ports below [`FIRST_STREAM_PORT`]: the agent
//! connects there before it gets the key, and before there is any container.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use katana_protocol::{FIRST_STREAM_PORT, STREAM_KEY};
use nix::errno::Errno;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::error::{Error, Result};

/// Connections to a listener that nobody has taken yet; those beyond are closed.
const BACKLOG: usize = 32;
/// How long a connection may take to say the key.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once that have not said the key yet. With one more, the oldest is closed: the agent, which says it at
/// once, is among the youngest.
const MOST_STRANGERS: usize = 256;

/// The ports that the guest may connect to: each once, but for those of listeners.
#[derive(Debug)]
pub struct Ports {
    table: Mutex<Table>,
    key: OnceLock<[u8; STREAM_KEY]>,
}

#[derive(Debug)]
struct Table {
    waiting: HashMap<u32, oneshot::Sender<Result<UnixStream>>>,
    listening: HashMap<u32, mpsc::Sender<UnixStream>>,
    next: u32,
    closed: bool,
    /// Who has yet to say the key, the oldest first.
    strangers: VecDeque<AbortHandle>,
    /// Connections that nobody has taken.
    strays: u64,
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
    connection: oneshot::Receiver<Result<UnixStream>>,
}

impl Ports {
    /// No ports.
    pub fn new() -> Arc<Self> {
        let table = Mutex::new(Table {
            waiting: HashMap::new(),
            listening: HashMap::new(),
            next: FIRST_STREAM_PORT,
            closed: false,
            strangers: VecDeque::new(),
            strays: 0,
        });
        Arc::new(Self { table, key: OnceLock::new() })
    }

    /// What the agent is to say on its connections.
    pub fn key(&self) -> Result<[u8; STREAM_KEY]> {
        if let Some(key) = self.key.get() {
            return Ok(*key);
        }
        let key = crate::host::random()?;
        Ok(*self.key.get_or_init(|| key))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The guest has connected. A connection that nobody waits for is closed, and so is one without the key.
    pub fn connected(self: &Arc<Self>, port: u32, connection: UnixStream) {
        if port < FIRST_STREAM_PORT || !self.table().is_open(port) {
            return self.deliver(port, connection);
        }
        let ports = Arc::clone(self);
        let greeted = tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, ports.greet(connection)).await {
                Ok(Ok(Some(connection))) => ports.deliver(port, connection),
                // Only for debugging: a guest could fill the log with these.
                _ => log::debug!("a process of the guest connected to port {port} without the key"),
            }
        });
        let mut table = self.table();
        table.strangers.retain(|stranger| !stranger.is_finished());
        table.strangers.push_back(greeted.abort_handle());
        let most = if table.closed { 0 } else { MOST_STRANGERS };
        while table.strangers.len() > most {
            table.strangers.pop_front().inspect(AbortHandle::abort);
        }
    }

    /// The connection if it begins with the key.
    async fn greet(&self, connection: UnixStream) -> io::Result<Option<UnixStream>> {
        connection.set_nonblocking(true)?;
        let mut connection = tokio::net::UnixStream::from_std(connection)?;
        let mut said = [0; STREAM_KEY];
        connection.read_exact(&mut said).await?;
        let known = self.key.get().is_some_and(|key| is_same(key, &said));
        if known { connection.into_std().map(Some) } else { Ok(None) }
    }

    fn deliver(&self, port: u32, connection: UnixStream) {
        let mut table = self.table();
        if let Some(listening) = table.listening.get(&port) {
            if listening.try_send(connection).is_err() {
                table.stray("too many connections", port);
            }
            return;
        }
        let waiting = table.waiting.remove(&port);
        drop(table);
        if waiting.is_none_or(|sender| sender.send(Ok(connection)).is_err()) {
            self.table().stray("nothing waits for connections", port);
        }
    }

    /// The guest has connected, and this process may have no more descriptors. Whether it was the agent nobody knows; it
    /// does not connect a second time, so whoever waits is notified at once.
    pub fn unconnected(&self, port: u32) {
        let mut table = self.table();
        table.stray("there are too many open files", port);
        let waiting = table.waiting.remove(&port);
        drop(table);
        if let Some(sender) = waiting {
            // Whoever has stopped waiting need not know.
            let _ = sender.send(Err(Error::os("connection of the guest", Errno::EMFILE)));
        }
    }

    /// The guest is gone: whoever waits is notified.
    pub fn close(&self) {
        let mut table = self.table();
        table.closed = true;
        table.waiting.clear();
        table.listening.clear();
        table.strangers.drain(..).for_each(|stranger| stranger.abort());
    }
}

/// Takes the same time wherever the difference is.
pub fn is_same<const N: usize>(one: &[u8; N], other: &[u8; N]) -> bool {
    one.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

impl Table {
    /// Logs a connection that was closed, or only counts it: a guest can make any number of them.
    fn stray(&mut self, why: &str, port: u32) {
        self.strays = self.strays.saturating_add(1);
        if self.strays.is_power_of_two() {
            log::warn!(
                "{} connections of the guest were closed: {why}, the last one to port {port}",
                self.strays
            );
        }
    }

    fn is_open(&self, port: u32) -> bool {
        self.waiting.contains_key(&port) || self.listening.contains_key(&port)
    }

    fn free_port(&mut self) -> u32 {
        let mut port = self.next;
        // After four thousand million streams the numbers start again.
        while self.is_open(port) {
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
    /// The number to send to the guest.
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
    /// The number to send to the guest.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The connection.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the guest has ended, [`Error::Host`] when there is no descriptor for it.
    pub async fn connection(mut self) -> Result<UnixStream> {
        let connection = (&mut self.connection).await;
        connection.unwrap_or_else(|_| Err(Error::Unavailable("the guest is gone".into())))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.ports.table().waiting.remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Connects as the agent does; the guest's end.
    fn connect(ports: &Arc<Ports>, port: u32, says: &[u8]) -> UnixStream {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(says).unwrap();
        ports.connected(port, host);
        guest
    }

    async fn all_are_known(ports: &Ports) {
        while ports.table().strangers.iter().any(|stranger| !stranger.is_finished()) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_listener_gets_every_connection_up_to_its_backlog() {
        let ports = Ports::new();
        let key = ports.key().unwrap();
        let mut listener = ports.listen_any();
        for _ in 0..BACKLOG + 5 {
            connect(&ports, listener.port(), &key);
        }
        assert_ne!(ports.open_any().port(), listener.port());
        all_are_known(&ports).await;
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
        let mut guest = connect(&ports, port, &ports.key().unwrap());
        assert_eq!(guest.read(&mut [0]).unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn each_connection_finds_its_waiter_once() {
        let ports = Ports::new();
        let (a, b) = (ports.open_any(), ports.open_any());
        assert_ne!(a.port(), b.port());
        let port = b.port();
        connect(&ports, 9, &[]);
        let mut guest = connect(&ports, port, &ports.key().unwrap());
        b.connection().await.unwrap().write_all(b"x").unwrap();
        assert_eq!(guest.read(&mut [0; 64]).unwrap(), 1);
        drop(a);
        assert!(ports.table().waiting.is_empty());
        let (left, unconnected) = (ports.open_any(), ports.open_any());
        let strays = ports.table().strays;
        ports.unconnected(unconnected.port());
        let error = unconnected.connection().await.unwrap_err();
        assert_eq!(error.to_string(), "connection of the guest: Too many open files");
        ports.unconnected(9);
        assert_eq!(ports.table().strays, strays + 2);
        ports.close();
        assert!(matches!(left.connection().await, Err(Error::Unavailable(_))));
        assert!(ports.open_any().connection().await.is_err());
    }

    #[tokio::test]
    async fn whoever_comes_first_without_the_key_gets_nothing() {
        let ports = Ports::new();
        // Before it is sent to the agent, nobody has it.
        let waiter = ports.open_any();
        connect(&ports, waiter.port(), &[0; STREAM_KEY]);
        all_are_known(&ports).await;
        let key = ports.key().unwrap();
        assert_eq!(ports.key().unwrap(), key);
        assert_ne!(Ports::new().key().unwrap(), key);
        let mut other = key;
        other[STREAM_KEY - 1] ^= 1;
        let mut thieves = Vec::new();
        for says in [&other[..], &key[..STREAM_KEY - 1], &[], &[0; 64]] {
            thieves.push(connect(&ports, waiter.port(), says));
        }
        let mut guest = connect(&ports, waiter.port(), &[&key[..], b"output"].concat());
        let mut connection = waiter.connection().await.unwrap();
        connection.set_nonblocking(false).unwrap();
        connection.write_all(b"secret").unwrap();
        let (mut from_guest, mut from_host) = ([0; 6], [0; 6]);
        connection.read_exact(&mut from_guest).unwrap();
        guest.read_exact(&mut from_host).unwrap();
        assert_eq!((&from_guest, &from_host), (b"output", b"secret"));
        ports.close();
        all_are_known(&ports).await;
        tokio::task::yield_now().await;
        for mut thief in thieves {
            assert_eq!(thief.read(&mut [0; 64]).unwrap_or(0), 0);
        }
    }

    #[tokio::test]
    async fn those_who_say_nothing_do_not_shut_the_agent_out() {
        let ports = Ports::new();
        let (waiter, key) = (ports.open_any(), ports.key().unwrap());
        let mut silent: Vec<_> =
            (0..MOST_STRANGERS + 10).map(|_| connect(&ports, waiter.port(), b"")).collect();
        assert_eq!(ports.table().strangers.len(), MOST_STRANGERS);
        connect(&ports, waiter.port(), &key);
        assert!(waiter.connection().await.is_ok());
        assert_eq!(silent[0].read(&mut [0]).unwrap_or(0), 0);
        assert!(ports.table().strangers.len() <= MOST_STRANGERS);
    }
}
