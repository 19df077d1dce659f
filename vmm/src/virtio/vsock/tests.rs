use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use std::os::unix::net::UnixStream;
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUFFER;
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::virtio::testing::{Bench, READ, WRITE};

mod ends;
mod fuzzing;
mod long;

const GUEST_CID: u32 = 3;
const PORT: u32 = 1024;
const OWN: u32 = 5000;
const RX: u64 = 0x10_0000;
const RX_LENGTH: u32 = 4096;
const TX: u64 = 0x50_0000;
const TX_LENGTH: u64 = 0x2_0000;

/// A guest's driver, and the host to which connections go.
struct Guest {
    bench: Bench<Vsock>,
    incoming: Receiver<(u32, UnixStream)>,
    next_transmit: u16,
}

fn guest() -> Guest {
    let (sender, incoming) = channel();
    let vsock = Vsock::new(
        GUEST_CID,
        Box::new(move |port, fd| {
            if port == 13 {
                return Err(ErrorKind::ConnectionRefused.into());
            }
            sender.send((port, fd.into())).unwrap();
            Ok(())
        }),
    );
    let mut guest = Guest { bench: Bench::new(vsock.unwrap()), incoming, next_transmit: 0 };
    guest.bench.activate(0);
    guest.fill(128);
    guest
}

fn header(op: u16) -> Header {
    Header {
        src_cid: u64::from(GUEST_CID).into(),
        dst_cid: HOST_CID.into(),
        src_port: OWN.into(),
        dst_port: PORT.into(),
        kind: TYPE_STREAM.into(),
        op: op.into(),
        buf_alloc: (1 << 30).into(),
        ..Header::default()
    }
}

impl Guest {
    fn fill(&mut self, count: u16) {
        for head in 0..count {
            let at = RX + u64::from(head) * u64::from(RX_LENGTH);
            self.bench.rings[RECEIVE].chain(head, &[(at, RX_LENGTH, WRITE)]);
            self.bench.rings[RECEIVE].publish(head);
        }
        self.bench.kick(RECEIVE);
    }

    /// Sends one packet, header and data in two descriptors.
    fn send(&mut self, header: Header, data: &[u8]) {
        let head = self.next_transmit;
        self.next_transmit = (head + 2) % 32;
        let at = TX + u64::from(head / 2) * TX_LENGTH;
        let header = Header { len: (data.len() as u32).into(), ..header };
        self.bench.memory.write_slice(header.as_slice(), GuestAddress(at)).unwrap();
        self.bench.memory.write_slice(data, GuestAddress(at + 64)).unwrap();
        let ring = &mut self.bench.rings[TRANSMIT];
        ring.chain(head, &[(at, HEADER_LENGTH as u32, READ), (at + 64, data.len() as u32, READ)]);
        ring.publish(head);
        self.bench.kick(TRANSMIT);
        assert_eq!(self.bench.used(TRANSMIT), Some((head, 0)));
    }

    /// The next packet that the device sent; its buffer goes back.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.bench.used(RECEIVE)?;
        let at = RX + u64::from(head) * u64::from(RX_LENGTH);
        let header: Header = self.bench.memory.read_obj(GuestAddress(at)).unwrap();
        assert_eq!(
            (header.src_cid.to_native(), header.dst_cid.to_native()),
            (HOST_CID, u64::from(GUEST_CID))
        );
        assert_eq!(header.len.to_native() + HEADER_LENGTH as u32, length);
        let data = self.bench.bytes(at + HEADER_LENGTH as u64, header.len.to_native() as usize);
        self.bench.rings[RECEIVE].publish(head);
        self.bench.kick(RECEIVE);
        Some((header, data))
    }

    /// The next packet, which is of this kind.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.receive().expect("a packet");
        assert_eq!(packet.0.op.to_native(), op, "{:?}", packet.0);
        packet
    }

    fn expect_nothing(&mut self) {
        self.bench.run();
        assert!(self.receive().is_none_or(|(header, _)| panic!("{header:?}")));
    }

    /// Opens a connection to the host; the host's end.
    fn connect(&mut self) -> UnixStream {
        self.send(header(op::REQUEST), &[]);
        self.expect(op::RESPONSE);
        self.incoming.recv_timeout(Duration::from_secs(1)).unwrap().1
    }

    /// All data packets that are there, as one.
    fn data(&mut self) -> Vec<u8> {
        self.bench.run();
        std::iter::from_fn(|| self.receive())
            .inspect(|(header, _)| assert_eq!(header.op.to_native(), op::RW))
            .fold(Vec::new(), |mut all, (_, data)| {
                all.extend(data);
                all
            })
    }
}

#[test]
fn the_guest_connects_and_is_echoed() {
    let mut guest = guest();
    guest.send(header(op::REQUEST), &[]);
    let (response, _) = guest.expect(op::RESPONSE);
    let ports = (response.src_port.to_native(), response.dst_port.to_native());
    assert_eq!((ports, response.buf_alloc.to_native()), ((PORT, OWN), BUFFER));
    let (port, mut host) = guest.incoming.try_recv().unwrap();
    assert_eq!(port, PORT);

    guest.send(header(op::RW), b"hello");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    host.write_all(&bytes).unwrap();
    assert_eq!(guest.data(), b"hello");
    guest.send(header(op::CREDIT_REQUEST), &[]);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).0.fwd_cnt.to_native(), 5);

    guest.send(Header { flags: SHUTDOWN_BOTH.into(), ..header(op::SHUTDOWN) }, &[]);
    guest.expect(op::RST);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    guest.send(header(op::RW), b"late");
    guest.expect(op::RST);
    guest.expect_nothing();
}

#[test]
fn the_host_connects_even_before_the_driver_is_there() {
    let mut bench = Bench::new(Vsock::new(GUEST_CID, Box::new(|_, _| Ok(()))).unwrap());
    let (mut host, far) = UnixStream::pair().unwrap();
    host.write_all(b"early").unwrap();
    bench.device().connect(77, far.into()).unwrap();
    bench.activate(0);
    let (_, incoming) = channel();
    let mut guest = Guest { bench, incoming, next_transmit: 0 };
    guest.fill(8);
    let (request, _) = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port.to_native(), 77);
    guest.expect_nothing();
    let reply = |op| Header { src_port: 77.into(), dst_port: request.src_port, ..header(op) };
    guest.send(reply(op::RESPONSE), &[]);
    assert_eq!(guest.data(), b"early");
    guest.send(reply(op::RST), &[]);
    guest.expect_nothing();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_refused_connection_is_closed() {
    let mut guest = guest();
    let (mut host, far) = UnixStream::pair().unwrap();
    guest.bench.device().connect(77, far.into()).unwrap();
    guest.bench.run();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(Header { src_port: 77.into(), dst_port: request.src_port, ..header(op::RST) }, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    // The host gives up before the guest has answered.
    let (host, far) = UnixStream::pair().unwrap();
    guest.bench.device().connect(77, far.into()).unwrap();
    guest.bench.run();
    guest.expect(op::REQUEST);
    drop(host);
    guest.bench.run();
    guest.expect(op::RST);
    // And the host refuses.
    guest.send(Header { dst_port: 13.into(), ..header(op::REQUEST) }, &[]);
    guest.expect(op::RST);
    guest.expect_nothing();
}

#[test]
fn the_guests_credit_is_kept_to() {
    let mut guest = guest();
    guest.send(Header { buf_alloc: 10.into(), ..header(op::REQUEST) }, &[]);
    guest.expect(op::RESPONSE);
    let (_, mut host) = guest.incoming.try_recv().unwrap();
    host.write_all(b"0123456789abcdef").unwrap();
    guest.bench.run();
    assert_eq!(guest.expect(op::RW).1, b"0123456789");
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_nothing();
    guest.send(Header { buf_alloc: 10.into(), fwd_cnt: 4.into(), ..header(op::CREDIT_UPDATE) }, &[]);
    assert_eq!(guest.expect(op::RW).1, b"abcd");
    // Less room than is taken, or more taken than was sent: no credit, no harm.
    guest.send(Header { buf_alloc: 1.into(), fwd_cnt: 4.into(), ..header(op::CREDIT_UPDATE) }, &[]);
    guest.send(Header { buf_alloc: 10.into(), fwd_cnt: 99.into(), ..header(op::CREDIT_UPDATE) }, &[]);
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_nothing();
    guest.send(Header { buf_alloc: 10.into(), fwd_cnt: 14.into(), ..header(op::CREDIT_UPDATE) }, &[]);
    assert_eq!(guest.data(), b"ef");
}

#[test]
fn a_guest_that_exceeds_its_credit_is_cut_off() {
    let mut guest = guest();
    let mut host = guest.connect();
    let mut sent = 0;
    // The socket takes some, the buffer the rest, and then there is an end.
    loop {
        guest.send(header(op::RW), &[7; 0x8000]);
        sent += 0x8000;
        assert!(sent < 4 << 20);
        match guest.receive() {
            Some((header, _)) if header.op.to_native() == op::RST => break,
            Some((header, _)) => assert_eq!(header.op.to_native(), op::CREDIT_UPDATE),
            None => {}
        }
    }
    // What was taken before arrives.
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all.len()
    });
    while !reader.is_finished() {
        guest.bench.wait();
    }
    let received = reader.join().unwrap();
    assert!(received >= BUFFER as usize - 0x8000 && received < sent, "{received} of {sent}");
}

#[test]
fn credit_comes_back_as_the_host_reads() {
    let mut guest = guest();
    let mut host = guest.connect();
    for _ in 0..8 {
        guest.send(header(op::RW), &[3; 50 << 10]);
    }
    let mut fwd_cnt = 0;
    while let Some((header, _)) = guest.receive() {
        fwd_cnt = header.fwd_cnt.to_native();
    }
    assert!(fwd_cnt < 400 << 10);
    let mut bytes = vec![0; 400 << 10];
    let reader = thread::spawn(move || host.read_exact(&mut bytes).map(|()| host).unwrap());
    while !reader.is_finished() {
        guest.bench.wait();
    }
    guest.bench.run();
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op.to_native(), op::CREDIT_UPDATE);
        fwd_cnt = header.fwd_cnt.to_native();
    }
    assert!(fwd_cnt > (400 << 10) - BUFFER / 4, "{fwd_cnt}");
}

#[test]
fn nonsense_is_answered_or_dropped() {
    let mut guest = guest();
    guest.bench.offer_hostile(TRANSMIT);
    // No header; data that are not there; too much of them.
    guest.bench.offer(TRANSMIT, &[(TX, 43, READ)]);
    assert_eq!(guest.bench.used(TRANSMIT), Some((0, 0)));
    guest.expect_nothing();
    for length in [1_u32, 100_000, u32::MAX] {
        let at = guest.bench.data(Header { len: length.into(), ..header(op::RW) }.as_slice());
        guest.bench.offer(TRANSMIT, &[(at, 44, READ)]);
        assert_eq!(guest.bench.used(TRANSMIT), Some((0, 0)));
        guest.expect(op::RST);
    }
    // Strange addresses get no answer, strange kinds and operations a reset.
    guest.send(Header { src_cid: 4.into(), ..header(op::REQUEST) }, &[]);
    guest.send(Header { dst_cid: 1.into(), ..header(op::REQUEST) }, &[]);
    guest.send(header(op::RST), &[]);
    guest.expect_nothing();
    guest.send(Header { kind: 2.into(), ..header(op::REQUEST) }, &[]);
    guest.expect(op::RST);
    for op in [0, op::RESPONSE, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, op::SHUTDOWN, 99, u16::MAX] {
        guest.send(header(op), &[]);
        guest.expect(op::RST);
        let mut host = guest.connect();
        guest.send(header(op::REQUEST), &[]);
        guest.expect(op::RST);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
    // Ports that mean something else inside.
    for port in [u32::MAX, u32::MAX - 1] {
        guest.send(Header { dst_port: port.into(), ..header(op::REQUEST) }, &[]);
        guest.expect(op::RST);
    }
    guest.connect();
}

#[test]
fn bad_receive_buffers_come_back() {
    let mut guest = guest();
    guest.bench.activate(0);
    guest.bench.offer_hostile(RECEIVE_WITH_DATA_WAITING);
    let (mut host, far) = UnixStream::pair().unwrap();
    host.write_all(b"x").unwrap();
    guest.bench.device().connect(7, far.into()).unwrap();
    guest.bench.run();
    guest.bench.offer(RECEIVE, &[(RX, 44, WRITE)]);
    guest.bench.offer(RECEIVE, &[(RX, 100, READ)]);
    assert_eq!((guest.bench.used(RECEIVE), guest.bench.used(RECEIVE)), (Some((0, 0)), Some((0, 0))));
    guest.bench.offer(RECEIVE, &[(RX, 20, WRITE), (RX + 20, 80, WRITE)]);
    assert_eq!(guest.bench.used(RECEIVE), Some((0, 44)));
}

/// Its chains come back only as they are needed, so the queue that is served at once stands in.
const RECEIVE_WITH_DATA_WAITING: usize = TRANSMIT;

#[test]
fn hostile_receive_buffers_come_back_when_they_are_needed() {
    let mut bench = Bench::new(Vsock::new(GUEST_CID, Box::new(|_, _| Ok(()))).unwrap());
    let (_host, far) = UnixStream::pair().unwrap();
    bench.device().connect(7, far.into()).unwrap();
    bench.activate(0);
    bench.offer_hostile(RECEIVE);
    bench.offer(RECEIVE, &[(RX, 100, WRITE)]);
    assert_eq!(bench.used(RECEIVE), Some((0, 44)));
}

#[test]
fn what_is_to_be_sent_waits_for_buffers() {
    let mut guest = guest();
    let mut host = guest.connect();
    guest.bench.reset();
    guest.bench.activate(0);
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "connections end with the driver");

    let (mut host, far) = UnixStream::pair().unwrap();
    host.write_all(&[9; 9000]).unwrap();
    guest.bench.device().connect(7, far.into()).unwrap();
    guest.fill(1);
    let (request, _) = {
        let (_, length) = guest.bench.used(RECEIVE).unwrap();
        assert_eq!(length, 44);
        (guest.bench.memory.read_obj::<Header>(GuestAddress(RX)).unwrap(), ())
    };
    guest.send(Header { src_port: 7.into(), dst_port: request.src_port, ..header(op::RESPONSE) }, &[]);
    let mut received = 0;
    for _ in 0..3 {
        assert_eq!(guest.bench.used(RECEIVE), None);
        guest.fill(1);
        received += guest.bench.used(RECEIVE).unwrap().1 - 44;
    }
    assert_eq!(received, 9000);
}

#[test]
fn a_busy_stream_does_not_starve_others() {
    let mut guest = guest();
    let mut busy = guest.connect();
    busy.set_nonblocking(true).unwrap();
    while busy.write(&[1; 4096]).is_ok() {}
    guest.send(Header { src_port: (OWN + 1).into(), ..header(op::REQUEST) }, &[]);
    let (_, mut quiet) = guest.incoming.try_recv().unwrap();
    quiet.write_all(b"me too").unwrap();
    guest.bench.run();
    let mut others = 0;
    let found = std::iter::from_fn(|| guest.receive()).any(|(header, data)| {
        others += 1;
        header.dst_port.to_native() == OWN + 1 && data == b"me too"
    });
    assert!(found, "{others} packets");
}

#[test]
fn thousands_of_connections_work_at_once_and_then_there_is_a_limit() {
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    if nix::sys::resource::setrlimit(limit, 20_000, 20_000).is_err() {
        return;
    }
    let mut guest = guest();
    let mut hosts = Vec::new();
    let port = |number: u32| Header { src_port: number.into(), ..header(op::REQUEST) };
    for number in 0..4096 {
        guest.send(port(number), &[]);
        guest.expect(op::RESPONSE);
        hosts.push(guest.incoming.try_recv().unwrap().1);
    }
    guest.send(port(5000), &[]);
    guest.expect(op::RST);
    for (number, host) in (0..).zip(&mut hosts) {
        guest.send(Header { op: op::RW.into(), ..port(number) }, &number.to_le_bytes());
        let mut bytes = [0; 4];
        host.read_exact(&mut bytes).unwrap();
        host.write_all(&bytes).unwrap();
        guest.bench.run();
        let (header, data) = guest.expect(op::RW);
        assert_eq!((header.dst_port.to_native(), data), (number, number.to_le_bytes().to_vec()));
    }
    guest.bench.reset();
    assert_eq!(hosts[4095].read(&mut [0]).unwrap(), 0);
}
