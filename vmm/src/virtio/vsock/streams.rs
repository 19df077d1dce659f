//! All connections, and the order in which they send to the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use katana_protocol::counters::Counter;

use super::connection::{Connection, Outlet, Verdict};
use super::packet::{HOST_CID, Header, Key, LONGEST_PAYLOAD, TYPE_STREAM, op};
use crate::counters;
use crate::virtio::base::Sources;
use crate::virtio::chain::Buffers;

/// Connections at once, with those whose last bytes the host has yet to take.
const MOST_CONNECTIONS: usize = 4096;
/// Resets at once that wait for a receive buffer; more are dropped. Only a guest that sends what nobody asked for
/// comes there.
const MOST_RESETS: usize = 1024;
/// Ports from here on are the host's ends of connections that the host asked for.
const FIRST_OWN_PORT: u32 = 0x8000_0000;
/// Ports from here on are nobody's: as upper halves of tokens they mean something else.
const FIRST_RESERVED_PORT: u32 = LINGERING;
/// The upper half of an outlet's token.
const LINGERING: u32 = 0xffff_fffe;

/// Is given the host's end of a connection that the guest made to a port.
pub type Incoming = Box<dyn Fn(u32, OwnedFd) -> io::Result<()> + Send>;

/// Why the guest cannot be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A guest that opens connections without end.
    #[error("vsock: {MOST_CONNECTIONS} connections are open")]
    TooMany,
    /// The descriptor is none of a socket.
    #[error("vsock: the descriptor cannot be used: {0}")]
    Socket(#[from] io::Error),
}

/// What is wrong with a packet of the guest.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// Shorter than its header.
    #[error("a packet without a header")]
    NoHeader,
    /// Longer than what was sent, or than what is allowed.
    #[error("a packet that claims {0} bytes of data")]
    Length(u32),
    /// Not from this guest to the host.
    #[error("a packet from context {from} to {to}")]
    Context {
        /// Sender.
        from: u64,
        /// Receiver.
        to: u64,
    },
    /// The host does not want the connection.
    #[error("a connection to port {0} was refused: {1}")]
    Refused(u32, #[source] io::Error),
}

/// All connections.
#[derive(Default)]
pub struct Streams {
    /// The guest's context id.
    cid: u64,
    /// The one that it had in the template which it comes from, and may still use for its first packets.
    former_cid: Option<u64>,
    connections: HashMap<Key, Connection>,
    /// Connections that have something to send, each once, in turn.
    round: VecDeque<Key>,
    /// Resets to send, of connections that are not there (any more).
    resets: VecDeque<Key>,
    /// What the host has yet to take of connections that are over.
    lingering: HashMap<u32, Outlet>,
    next_lingering: u32,
    next_port: u32,
}

impl Streams {
    /// No connections, with a guest of this context id.
    pub fn new(cid: u64) -> Self {
        Self { cid, ..Self::default() }
    }

    /// The guest's context id.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// The guest has yet to learn its context id.
    pub fn set_former_cid(&mut self, cid: u64) {
        self.former_cid = Some(cid);
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.lingering.len() >= MOST_CONNECTIONS
    }

    /// Whether there is nothing to send to the guest.
    pub fn is_idle(&self) -> bool {
        self.resets.is_empty() && self.round.is_empty()
    }

    /// Asks the guest to connect `socket` to a port of its.
    ///
    /// # Errors
    /// When there are too many connections or the descriptor is unusable.
    pub fn connect(&mut self, port: u32, socket: OwnedFd, sources: &Sources) -> Result<(), ConnectError> {
        if self.is_full() {
            return Err(ConnectError::TooMany);
        }
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let key = self.free_key(port);
        Ok(self.add(key, Connection::requested(key, socket), sources)?)
    }

    /// A connection to a guest's port that is not there yet. It ends: there are more ports than connections.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            if !(FIRST_OWN_PORT..FIRST_RESERVED_PORT).contains(&self.next_port) {
                self.next_port = FIRST_OWN_PORT;
            }
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port += 1;
            if !self.connections.contains_key(&key) {
                return key;
            }
        }
    }

    fn add(&mut self, key: Key, mut connection: Connection, sources: &Sources) -> io::Result<()> {
        connection.watched = connection.interest();
        sources.add(connection.fd(), key.token(), connection.watched)?;
        counters::count(Counter::VsockConnections);
        self.connections.insert(key, connection);
        self.apply(key, Verdict::Keep, sources);
        Ok(())
    }

    /// Handles a packet of the guest.
    ///
    /// # Errors
    /// What is wrong with it. If a connection is concerned, it was reset.
    pub fn handle(
        &mut self,
        mut packet: Buffers<'_>,
        sources: &Sources,
        incoming: &Incoming,
    ) -> Result<u32, PacketError> {
        let header = packet.read::<Header>().ok_or(PacketError::NoHeader)?;
        let (from, to) = (header.src_cid.to_native(), header.dst_cid.to_native());
        if to != HOST_CID || (from != self.cid && Some(from) != self.former_cid) {
            return Err(PacketError::Context { from, to });
        }
        let (key, op) = (Key::of(&header), header.op.to_native());
        let length = header.len.to_native();
        if length as usize > packet.len().min(LONGEST_PAYLOAD) {
            self.apply(key, Verdict::Reset, sources);
            return Err(PacketError::Length(length));
        }
        packet.truncate(length as usize);
        match self.connections.get_mut(&key) {
            Some(connection) => {
                let verdict = connection.handle(&header, packet);
                self.apply(key, verdict, sources);
            }
            None if op == op::RST => {}
            None if op == op::REQUEST && header.kind.to_native() == TYPE_STREAM => {
                self.accept(key, &header, sources, incoming).map_err(|error| {
                    self.reset(key);
                    PacketError::Refused(key.host_port, error)
                })?;
            }
            None => self.reset(key),
        }
        // The device writes nothing into what the guest sends.
        Ok(0)
    }

    fn accept(
        &mut self,
        key: Key,
        request: &Header,
        sources: &Sources,
        incoming: &Incoming,
    ) -> io::Result<()> {
        if self.is_full() || key.host_port >= FIRST_RESERVED_PORT {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        incoming(key.host_port, far.into())?;
        self.add(key, Connection::accepted(key, near, request), sources)
    }

    /// Handles events of the socket that is known by `token`.
    pub fn ready(&mut self, token: u64, events: EventSet, sources: &Sources) {
        let key = Key::from_token(token);
        if key.host_port == LINGERING {
            let id = key.guest_port;
            if let Some(outlet) = self.lingering.get_mut(&id) {
                outlet.flush();
                if outlet.is_done() {
                    self.lingering.remove(&id);
                }
            }
        } else if let Some(connection) = self.connections.get_mut(&key) {
            let verdict = connection.ready(events);
            self.apply(key, verdict, sources);
        }
    }

    /// Draws the conclusions after something happened to a connection.
    fn apply(&mut self, key: Key, verdict: Verdict, sources: &Sources) {
        match verdict {
            Verdict::Keep => {}
            Verdict::Reset => {
                self.reset(key);
                return self.remove(key, sources);
            }
            Verdict::Close => return self.remove(key, sources),
        }
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let interest = connection.interest();
        if interest != connection.watched {
            connection.watched = interest;
            if let Err(error) = sources.modify(connection.fd(), key.token(), interest) {
                log::error!("vsock: a socket cannot be watched: {error}");
            }
        }
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.round.push_back(key);
        }
    }

    fn reset(&mut self, key: Key) {
        if self.resets.len() < MOST_RESETS {
            self.resets.push_back(key);
        }
    }

    /// Forgets a connection, but not what the guest has sent on it.
    fn remove(&mut self, key: Key, sources: &Sources) {
        let Some(connection) = self.connections.remove(&key) else { return };
        if connection.queued {
            self.round.retain(|other| *other != key);
        }
        let mut outlet = connection.into_outlet();
        if outlet.is_done() {
            return;
        }
        outlet.refuse();
        while self.lingering.contains_key(&self.next_lingering) {
            self.next_lingering = self.next_lingering.wrapping_add(1);
        }
        let id = self.next_lingering;
        let token = Key { host_port: LINGERING, guest_port: id }.token();
        match sources.modify(outlet.fd(), token, outlet.interest()) {
            Ok(()) => drop(self.lingering.insert(id, outlet)),
            Err(error) => log::error!("vsock: a socket cannot be watched: {error}"),
        }
    }

    /// Ends all connections.
    pub fn end_all(&mut self, sources: &Sources) {
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.remove(key, sources));
        self.round.clear();
        self.resets.clear();
    }

    /// The next packet to the guest, its payload in `room`.
    pub fn next_packet(&mut self, room: &Buffers<'_>, sources: &Sources) -> Option<Header> {
        let packet = self.next_in_turn(room, sources)?;
        Some(Header { dst_cid: self.cid.into(), ..packet })
    }

    fn next_in_turn(&mut self, room: &Buffers<'_>, sources: &Sources) -> Option<Header> {
        if let Some(key) = self.resets.pop_front() {
            return Some(key.header(op::RST));
        }
        while let Some(key) = self.round.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let packet = connection.next_packet(room);
            // It goes to the end of the round if it has more.
            self.apply(key, Verdict::Keep, sources);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }
}
