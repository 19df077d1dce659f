//! Sends what connects to a network namespace's own loopback addresses, whatever the port, to one listening socket.
//!
//! A `BPF_PROG_TYPE_SK_LOOKUP` program answers which socket a new connection is for (Linux, bpf/prog_sk_lookup.rst). It
//! needs no packet filter in the namespace, which others may look at and change, and ends with its descriptor.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use katana_protocol::bpf::code::*;
use katana_protocol::bpf::{self, Instruction, op};

/// A socket and the program that sends connections to it.
#[derive(Debug)]
pub struct Redirected {
    /// Non-blocking. A connection's own address is what the client connected to.
    pub listener: TcpListener,
    /// Ends the program when dropped.
    pub link: OwnedFd,
}

impl Redirected {
    /// Listens in the network namespace of the calling thread, which is this one.
    pub fn listen(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        // A socket of IPv6 takes both, unless it is bound to an address; without IPv6 there is one kind only.
        let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
            .or_else(|_| TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))))?;
        listener.set_nonblocking(true)?;
        let sockets = map_of(&listener)?;
        let program = bpf::load(&program(sockets.as_raw_fd()), BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP)?;
        let link = attach(&program, namespace)?;
        Ok(Self { listener, link })
    }
}

// Registers: the answer, arguments, what calls leave alone, the frame.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

// linux/bpf.h: helpers; the mark of a map's descriptor; the answer that goes on.
const MAP_LOOKUP: i32 = 1;
const RELEASE: i32 = 86;
const ASSIGN: i32 = 124;
const PSEUDO_MAP_FD: u8 = 1;
const SK_PASS: i32 = 1;

// struct bpf_sk_lookup. Addresses are in the network's byte order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IPV4: i16 = 40;
const LOCAL_IPV6: [i16; 4] = [44, 48, 52, 56];

/// A jump to the program's end, until its distance is known.
const TO_THE_END: i16 = i16::MAX;

/// TCP to 127.0.0.1 or ::1 goes to the socket in the map; all else where it would have gone. Other addresses of
/// 127.0.0.0/8 are left to those who listen there: Docker's name server has 127.0.0.11.
fn program(map: i32) -> Vec<Instruction> {
    let word = |at: i16| op(LOAD_WORD, R2, CONTEXT, at, 0);
    let must_be = |value: i32| op(JUMP_NOT_EQUAL, R2, 0, TO_THE_END, value);
    let v4 = [word(LOCAL_IPV4), must_be(i32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets()))];
    let last = i32::from_ne_bytes([0, 0, 0, 1]);
    let v6 = LOCAL_IPV6.iter().zip([0, 0, 0, last]).flat_map(|(at, value)| [word(*at), must_be(value)]);
    let mut program = vec![
        op(MOVE_REGISTER, CONTEXT, R1, 0, 0),
        word(PROTOCOL),
        must_be(libc::IPPROTO_TCP),
        word(FAMILY),
        op(JUMP_EQUAL, R2, 0, 3, libc::AF_INET6),
    ];
    program.extend(v4);
    program.push(op(JUMP, 0, 0, 8, 0));
    program.extend(v6);
    program.extend([
        op(STORE_WORD, FRAME, 0, -4, 0),
        op(MOVE_REGISTER, R2, FRAME, 0, 0),
        op(ADD, R2, 0, 0, -4),
        op(LOAD_IMMEDIATE, R1, PSEUDO_MAP_FD, 0, map),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP),
        op(JUMP_EQUAL, R0, 0, TO_THE_END, 0),
        op(MOVE_REGISTER, SOCKET, R0, 0, 0),
        op(MOVE_REGISTER, R1, CONTEXT, 0, 0),
        op(MOVE_REGISTER, R2, SOCKET, 0, 0),
        op(MOVE, R3, 0, 0, 0),
        op(CALL, 0, 0, 0, ASSIGN),
        op(MOVE_REGISTER, R1, SOCKET, 0, 0),
        op(CALL, 0, 0, 0, RELEASE),
    ]);
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_THE_END {
            instruction.offset = i16::try_from(end - at - 1).unwrap_or(TO_THE_END);
        }
    }
    program.extend([op(MOVE, R0, 0, 0, SK_PASS), op(EXIT, 0, 0, 0, 0)]);
    program
}

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// The start of `union bpf_attr` for BPF_MAP_CREATE.
#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

/// The same for BPF_MAP_UPDATE_ELEM.
#[repr(C)]
struct UpdateAttributes {
    map: i32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The same for BPF_LINK_CREATE.
#[repr(C)]
struct LinkAttributes {
    program: i32,
    target: i32,
    attach_type: u32,
    flags: u32,
}

/// A map of sockets with this one at 0.
fn map_of(listener: &TcpListener) -> io::Result<OwnedFd> {
    let attributes = MapAttributes { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, entries: 1 };
    // SAFETY: the attributes are plain numbers; the kernel has just made the descriptor for us.
    let map = unsafe { OwnedFd::from_raw_fd(bpf::call(BPF_MAP_CREATE, &attributes)?) };
    let (key, value) = (0_u32, listener.as_raw_fd());
    let attributes = UpdateAttributes {
        map: map.as_raw_fd(),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value are of the map's sizes and live through the call.
    unsafe { bpf::call(BPF_MAP_UPDATE_ELEM, &attributes) }?;
    Ok(map)
}

/// The link that attaches a program to a network namespace.
fn attach(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: program.as_raw_fd(),
        target: namespace.as_fd().as_raw_fd(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes are plain numbers; the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(bpf::call(BPF_LINK_CREATE, &attributes)?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use katana_protocol::netlink::{Body, Socket, kind};
    use nix::sched::{CloneFlags, unshare};
    use std::net::TcpStream;
    use std::time::Duration;

    fn connect(address: &str) -> io::Result<TcpStream> {
        let address = address.parse().map_err(io::Error::other)?;
        TcpStream::connect_timeout(&address, Duration::from_secs(5))
    }

    /// Tests are threads, and so are alone in what they unshare.
    #[test]
    fn every_port_of_the_two_loopback_addresses_leads_to_the_socket() {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return crate::host::say_skipped("only root can make a network namespace");
        }
        let up = libc::IFF_UP as u32;
        Socket::open().unwrap().set(kind::LINK, 0, Body::link(1, up, up).bytes()).unwrap();
        let namespace = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        let redirected = match Redirected::listen(namespace.as_fd()) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return crate::host::say_skipped(&format!("no BPF here: {e}"));
            }
            outcome => outcome.unwrap(),
        };
        for address in ["127.0.0.1:1", "127.0.0.1:65535", "[::1]:80"] {
            let client = connect(address).unwrap_or_else(|e| panic!("{address}: {e}"));
            let (accepted, peer) = redirected.listener.accept().unwrap();
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
            assert_eq!(accepted.local_addr().unwrap().port(), client.peer_addr().unwrap().port());
        }
        let other = TcpListener::bind("127.0.0.11:53").unwrap();
        connect("127.0.0.11:53").unwrap();
        other.accept().unwrap();
        assert_eq!(connect("127.0.0.2:80").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(redirected);
        assert_eq!(connect("127.0.0.1:80").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
