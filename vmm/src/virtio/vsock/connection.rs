//! One connection: a stream in the guest, a Unix stream on the host.
//!
//! Data go from the socket into the guest's buffers and from those into the socket without a copy in between. Only
//! what the socket does not take at once is kept, and the guest's credit (virtio 1.2, 5.10.6.3) bounds that to
//! [`BUFFER`].

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use katana_protocol::counters::Counter;

use super::packet::{Header, Key, LONGEST_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::counters;
use crate::virtio::chain::Buffers;

/// How much the guest may send before the host's end has taken it.
pub const BUFFER: u32 = 256 * 1024;
/// How much is taken before it is credited to the guest without a request.
const UPDATE_AFTER: u32 = BUFFER / 4;

/// What becomes of a connection after a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It continues.
    Keep,
    /// It ends; the guest must be sent a reset.
    Reset,
    /// It ends; the guest knows.
    Close,
}

/// Packets to send to the guest as soon as it has a buffer.
#[derive(Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// Flags of a SHUTDOWN that are not yet sent.
    shutdown: u32,
}

/// A connection.
pub struct Connection {
    key: Key,
    outlet: Outlet,
    /// Whether the guest has granted, or was granted, the connection.
    established: bool,
    due: Due,

    /// Whether the socket may have data: its event came, and no read has found it empty since.
    readable: bool,
    /// Whether the host's end is gone altogether.
    hung_up: bool,
    /// Flags of the SHUTDOWN that the guest was or will be sent.
    host_shutdown: u32,
    /// Bytes sent to the guest, the room it says it has, and what it says it has taken out of there.
    sent: Wrapping<u32>,
    guest_room: u32,
    guest_taken: Wrapping<u32>,
    /// Whether the guest was asked for credit since it last gave some.
    asked: bool,

    /// Flags of the SHUTDOWNs that the guest has sent.
    guest_shutdown: u32,
    /// Bytes that the socket has taken, and how many of them were credited to the guest (`fwd_cnt`).
    taken: Wrapping<u32>,
    credited: Wrapping<u32>,

    /// Whether it is in the round of connections with something to send.
    pub queued: bool,
    /// What the socket is watched for.
    pub watched: EventSet,
}

impl Connection {
    /// A connection that the guest asked for by `request`; granted.
    pub fn accepted(key: Key, socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(key, socket);
        connection.established = true;
        connection.due.response = true;
        connection.take_credit(request);
        connection
    }

    /// A connection that the guest is to be asked for.
    pub fn requested(key: Key, socket: UnixStream) -> Self {
        let mut connection = Self::new(key, socket);
        connection.due.request = true;
        connection
    }

    fn new(key: Key, socket: UnixStream) -> Self {
        Self {
            key,
            outlet: Outlet::new(socket),
            established: false,
            due: Due::default(),
            readable: false,
            hung_up: false,
            host_shutdown: 0,
            sent: Wrapping(0),
            guest_room: 0,
            guest_taken: Wrapping(0),
            asked: false,
            guest_shutdown: 0,
            taken: Wrapping(0),
            credited: Wrapping(0),
            queued: false,
            watched: EventSet::empty(),
        }
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.outlet.socket.as_fd()
    }

    /// What still has to go to the socket after the connection's end.
    pub fn into_outlet(self) -> Outlet {
        self.outlet
    }

    /// Notes what the guest says about its room; every packet does (5.10.6.3).
    pub fn take_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc.to_native();
        self.guest_taken = Wrapping(header.fwd_cnt.to_native());
        // A guest that has no room says so once; asking again would be polling. It sends an update when it has some.
        self.asked &= self.credit() == 0;
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> usize {
        // A guest that claims to have taken more than it was sent has no credit.
        self.guest_room.saturating_sub((self.sent - self.guest_taken).0) as usize
    }

    /// Handles a packet that the guest sent on this connection.
    pub fn handle(&mut self, header: &Header, data: Buffers<'_>) -> Verdict {
        self.take_credit(header);
        match header.op.to_native() {
            op::RST => return Verdict::Close,
            op::RESPONSE if !self.established && !self.due.request => self.established = true,
            // Before the guest has granted it, there is nothing else to say.
            _ if !self.established => return Verdict::Reset,
            op::RW => return self.forward(data),
            op::SHUTDOWN => return self.shut_down(header.flags.to_native()),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.due.credit_update = true,
            _ => return Verdict::Reset,
        }
        Verdict::Keep
    }

    fn forward(&mut self, data: Buffers<'_>) -> Verdict {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Verdict::Reset;
        }
        match self.outlet.send(data) {
            Some(taken) => self.count_taken(taken),
            None => return Verdict::Reset,
        }
        Verdict::Keep
    }

    fn count_taken(&mut self, count: usize) {
        counters::add(Counter::VsockBytesSent, count);
        // Never more than BUFFER at once.
        self.taken += Wrapping(count as u32);
        if (self.taken - self.credited).0 >= UPDATE_AFTER {
            self.due.credit_update = true;
        }
        if self.outlet.broken {
            self.announce(SHUTDOWN_RECEIVE);
        }
    }

    fn shut_down(&mut self, flags: u32) -> Verdict {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // 5.10.6.6: a reset confirms the end. What the socket has yet to take is sent all the same.
            return Verdict::Reset;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.outlet.finish();
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.outlet.refuse();
        }
        Verdict::Keep
    }

    /// Owes the guest a SHUTDOWN with these flags.
    fn announce(&mut self, flags: u32) {
        self.due.shutdown |= flags & !self.host_shutdown;
        self.host_shutdown |= flags;
    }

    /// Handles events of the socket.
    pub fn ready(&mut self, events: EventSet) -> Verdict {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone && !self.established {
            // Whoever wanted the connection wants it no longer. The guest knows of it if it was asked.
            return if self.due.request { Verdict::Close } else { Verdict::Reset };
        }
        self.readable |= gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.hung_up |= gone;
        if self.hung_up && self.host_shutdown & SHUTDOWN_SEND != 0 {
            self.announce(SHUTDOWN_RECEIVE);
        }
        if events.contains(EventSet::OUT) || gone {
            let taken = self.outlet.flush();
            self.count_taken(taken);
        }
        Verdict::Keep
    }

    /// What the socket is to be watched for.
    pub fn interest(&self) -> EventSet {
        EventSet::IN | EventSet::READ_HANG_UP | self.outlet.interest()
    }

    /// Whether the socket's end or data can be looked for.
    fn may_read(&self) -> bool {
        let ended = self.host_shutdown & SHUTDOWN_SEND != 0 || self.guest_shutdown & SHUTDOWN_RECEIVE != 0;
        self.established && self.readable && !ended
    }

    /// Whether there is something to send to the guest.
    pub fn has_packet(&self) -> bool {
        let due = &self.due;
        due.request
            || due.response
            || due.credit_update
            || due.credit_request
            || due.shutdown != 0
            || (self.may_read() && (self.credit() > 0 || !self.asked))
    }

    /// The next packet to the guest, with its payload in `room`, if there is one.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if std::mem::take(&mut self.due.request) {
            return Some(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.due.response) {
            return Some(self.header(op::RESPONSE));
        }
        let count = if self.may_read() { self.read(room) } else { 0 };
        if count > 0 {
            self.sent += Wrapping(count as u32);
            return Some(Header { len: (count as u32).into(), ..self.header(op::RW) });
        }
        match std::mem::take(&mut self.due.shutdown) {
            0 => {}
            flags => return Some(Header { flags: flags.into(), ..self.header(op::SHUTDOWN) }),
        }
        if self.due.credit_update {
            return Some(self.header(op::CREDIT_UPDATE));
        }
        std::mem::take(&mut self.due.credit_request).then(|| self.header(op::CREDIT_REQUEST))
    }

    /// Reads from the socket as much as the guest has credit and room for.
    fn read(&mut self, room: &Buffers<'_>) -> usize {
        let credit = self.credit();
        if credit == 0 {
            self.due.credit_request = !std::mem::replace(&mut self.asked, true);
            return 0;
        }
        let mut room = room.clone();
        room.truncate(credit.min(LONGEST_PAYLOAD));
        match room.read_from(self.fd()) {
            Ok(0) => {
                let flags = if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                self.announce(flags);
                0
            }
            Ok(count) => {
                counters::add(Counter::VsockBytesReceived, count);
                count
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(error) => {
                note(&error, "what the host sends is lost");
                self.announce(SHUTDOWN_BOTH);
                0
            }
        }
    }

    /// A header of this connection; each announces to the guest what the socket has taken.
    fn header(&mut self, op: u16) -> Header {
        self.credited = self.taken;
        self.due.credit_update = false;
        Header { buf_alloc: BUFFER.into(), fwd_cnt: self.taken.0.into(), ..self.key.header(op) }
    }
}

/// The way to the socket, with what it did not take yet.
pub struct Outlet {
    socket: UnixStream,
    backlog: VecDeque<u8>,
    /// Whether nothing follows the backlog.
    finished: bool,
    /// Whether the host's end takes nothing any more; data are dropped.
    broken: bool,
    /// The halves that have been shut down: `SHUTDOWN_SEND` and `SHUTDOWN_RECEIVE`.
    shut: u32,
}

impl Outlet {
    fn new(socket: UnixStream) -> Self {
        Self { socket, backlog: VecDeque::new(), finished: false, broken: false, shut: 0 }
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the socket is to be watched for. Edge-triggered as it is, an interest in OUT costs an event for
    /// whatever the host's end reads: so only while there is a backlog.
    pub fn interest(&self) -> EventSet {
        if self.backlog.is_empty() { EventSet::empty() } else { EventSet::OUT }
    }

    /// Whether the socket has taken all there was.
    pub fn is_done(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Sends data and keeps what is not taken now; returns how much was taken. None if the guest sent more than it had
    /// credit for.
    fn send(&mut self, mut data: Buffers<'_>) -> Option<usize> {
        let length = data.len();
        while self.backlog.is_empty() && !self.broken && !data.is_empty() {
            match data.write_to(self.socket.as_fd()) {
                Ok(count) => data.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.fail(&error),
            }
        }
        if self.broken {
            return Some(length);
        }
        let taken = length - data.len();
        if self.backlog.len() + data.len() > BUFFER as usize {
            return None;
        }
        let mut bytes = [0; 4096];
        while !data.is_empty() {
            let count = data.read_bytes(&mut bytes);
            self.backlog.extend(bytes.get(..count).unwrap_or_default());
        }
        Some(taken)
    }

    /// Sends from the backlog; returns how much was taken.
    pub fn flush(&mut self) -> usize {
        let before = self.backlog.len();
        while !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            match self.socket.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.fail(&error);
                    return before;
                }
            }
        }
        if self.backlog.is_empty() {
            // Most connections never need one again.
            self.backlog = VecDeque::new();
            self.end();
        }
        before - self.backlog.len()
    }

    fn fail(&mut self, error: &io::Error) {
        note(error, "what the guest sends is lost");
        self.broken = true;
        self.backlog = VecDeque::new();
    }

    /// Nothing more will be sent.
    fn finish(&mut self) {
        self.finished = true;
        self.end();
    }

    fn end(&mut self) {
        if self.finished && self.backlog.is_empty() {
            self.shut_down(SHUTDOWN_SEND, Shutdown::Write);
        }
    }

    /// Nothing more will be received: whoever writes at the host's end learns of it.
    pub fn refuse(&mut self) {
        self.shut_down(SHUTDOWN_RECEIVE, Shutdown::Read);
    }

    /// Once only: shutdown(2) is an event of the socket each time (`unix_shutdown` in net/unix/af_unix.c calls
    /// `sk_state_change`), and what an event brings about must not be the next one.
    fn shut_down(&mut self, half: u32, how: Shutdown) {
        if self.shut & half == 0 {
            self.shut |= half;
            // If it fails, the other end is gone and needs no notification.
            let _ = self.socket.shutdown(how);
        }
    }
}

/// That the host's end is closed is nothing to speak of.
fn note(error: &io::Error, what: &str) {
    if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
        log::warn!("vsock: a connection ends, {what}: {error}");
    }
}
