//! rtnetlink(7), as far as a pod's network is read on the host and made again in the guest.
//!
//! Addresses, routes, neighbours and rules pass from one kernel to the other as the messages that `ip route save` and
//! `ip route restore` use: nobody in between has to know all of their members, and none is lost.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

/// The index of `lo` in every network namespace.
pub const LOOPBACK: u32 = 1;

// linux/netlink.h
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_DUMP: u16 = 0x300;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
const SOL_NETLINK: i32 = 270;
const NETLINK_CAP_ACK: i32 = 10;
const NETLINK_EXT_ACK: i32 = 11;

/// To create what is not there.
pub const CREATE: u16 = 0x400;
/// To replace what is there.
pub const REPLACE: u16 = 0x100;
/// To refuse when it is there.
pub const EXCLUSIVE: u16 = 0x200;

/// The kernel's buffer for one part of a dump is no longer than this (NLMSG_GOODSIZE, and 32 KiB at most).
const BUFFER: usize = 64 * 1024;
/// How often a list that changed while it was read is read again.
const ATTEMPTS: usize = 8;

/// Message types, and with each how long the structure is that its attributes follow: linux/rtnetlink.h,
/// linux/if_link.h, linux/if_addr.h, linux/neighbour.h, linux/fib_rules.h, linux/pkt_sched.h.
pub mod kind {
    /// struct ifinfomsg.
    pub const LINK: super::Kind = super::Kind { new: 16, header: 16 };
    /// struct ifaddrmsg.
    pub const ADDRESS: super::Kind = super::Kind { new: 20, header: 8 };
    /// struct rtmsg.
    pub const ROUTE: super::Kind = super::Kind { new: 24, header: 12 };
    /// struct ndmsg.
    pub const NEIGHBOUR: super::Kind = super::Kind { new: 28, header: 12 };
    /// struct fib_rule_hdr.
    pub const RULE: super::Kind = super::Kind { new: 32, header: 12 };
    /// struct tcmsg of a queueing discipline.
    pub const QDISC: super::Kind = super::Kind { new: 36, header: 20 };
    /// struct tcmsg of a filter.
    pub const FILTER: super::Kind = super::Kind { new: 44, header: 20 };
}

/// A kind of object that the kernel has a table of.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// RTM_NEW...; RTM_DEL... and RTM_GET... are the next two.
    new: u16,
    /// Bytes of the structure at the start.
    pub header: usize,
}

/// What came of a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("netlink: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{}", refusal(*.0, .1))]
    Refused(Errno, String),
}

fn refusal(errno: Errno, why: &str) -> String {
    if why.is_empty() { errno.desc().to_owned() } else { format!("{} ({why})", errno.desc()) }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

impl Error {
    /// The kernel's reason.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused(errno, _) => Some(*errno),
            Self::Socket(_) => None,
        }
    }
}

/// A socket to the kernel. It belongs to the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens one for requests.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn open() -> Result<Self, Error> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
            set_option(&socket, option)?;
        }
        Ok(Self(socket))
    }

    /// Opens one that is notified of changes of links, and does not block.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn of_links() -> Result<Self, Error> {
        const RTMGRP_LINK: u32 = 1;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_LINK))?;
        Ok(Self(socket))
    }

    /// Discards the notifications received so far.
    pub fn drain(&self) {
        let mut buffer = [0; 256];
        while !matches!(
            recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC),
            Err(Errno::EAGAIN) | Ok(0)
        ) {}
    }

    /// Creates or changes an object.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&self, kind: Kind, flags: u16, body: &[u8]) -> Result<(), Error> {
        self.request(kind.new, flags, body)
    }

    /// Removes an object.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete(&self, kind: Kind, body: &[u8]) -> Result<(), Error> {
        self.request(kind.new + 1, 0, body)
    }

    fn request(&self, number: u16, flags: u16, body: &[u8]) -> Result<(), Error> {
        self.send(number, flags | NLM_F_ACK, body)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for message in Messages(buffer.get(..length).unwrap_or_default()) {
                if message.number == NLMSG_ERROR {
                    return message.outcome();
                }
            }
        }
    }

    /// All objects of a kind, each as the body of its message. `body` narrows them down.
    ///
    /// # Errors
    /// When the kernel refuses, or the list does not stop changing.
    pub fn list(&self, kind: Kind, body: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        for _ in 0..ATTEMPTS {
            if let Some(list) = self.try_list(kind, body)? {
                return Ok(list);
            }
        }
        Err(Error::Refused(Errno::EINTR, "the list changes all the time".to_owned()))
    }

    fn try_list(&self, kind: Kind, body: &[u8]) -> Result<Option<Vec<Vec<u8>>>, Error> {
        self.send(kind.new + 2, NLM_F_DUMP, body)?;
        let mut buffer = vec![0; BUFFER];
        let (mut list, mut consistent) = (Vec::new(), true);
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for message in Messages(buffer.get(..length).unwrap_or_default()) {
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.number {
                    NLMSG_DONE => return Ok(consistent.then_some(list)),
                    NLMSG_ERROR => return message.outcome().map(|()| None),
                    number if number == kind.new => list.push(message.body.to_vec()),
                    _ => {}
                }
            }
        }
    }

    fn send(&self, number: u16, flags: u16, body: &[u8]) -> Result<(), Error> {
        let length = u32::try_from(HEADER + body.len()).map_err(|_| Errno::EMSGSIZE)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend_from_slice(&number.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        // Sequence number and sender; one request is answered before the next is sent.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn set_option(socket: &OwnedFd, option: i32) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    let size = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the value is an integer that outlives the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), SOL_NETLINK, option, (&raw const on).cast(), size) };
    Errno::result(result).map(drop)
}

/// The messages in what one call received.
struct Messages<'a>(&'a [u8]);

struct Message<'a> {
    number: u16,
    flags: u16,
    body: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = usize::try_from(u32_at(self.0, 0)?).ok()?;
        let body = self.0.get(HEADER..length)?;
        let message = Message { number: u16_at(self.0, 4)?, flags: u16_at(self.0, 6)?, body };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

impl Message<'_> {
    /// struct nlmsgerr: the error number, the header of the request, and attributes.
    fn outcome(&self) -> Result<(), Error> {
        let code = u32_at(self.body, 0).ok_or(Errno::EBADMSG)?.cast_signed();
        if code == 0 {
            return Ok(());
        }
        let mut why = String::new();
        if self.flags & NLM_F_ACK_TLVS != 0 {
            let mut attributes = attributes(self.body, 4 + HEADER);
            let text = attributes.find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
            why = text.map(|(_, at)| text_of(self.body.get(at).unwrap_or_default())).unwrap_or_default();
        }
        Err(Error::Refused(Errno::from_raw(code.saturating_neg()), why))
    }
}

/// Where the attributes of a message are that follow its first `header` bytes, by type.
pub fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, Range<usize>)> {
    let mut at = header;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(body, at)?);
        let kind = u16_at(body, at + 2)? & NLA_TYPE_MASK;
        if length < 4 || at + length > body.len() {
            return None;
        }
        let value = at + 4..at + length;
        at += length.next_multiple_of(4);
        Some((kind, value))
    })
}

/// The value of an attribute.
pub fn attribute(body: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    let (_, at) = attributes(body, header).find(|(kind, _)| *kind == wanted)?;
    body.get(at)
}

/// Two bytes in the machine's order.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// Four bytes in the machine's order.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// A string up to its NUL.
pub fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The body of a message, assembled.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// Begins with a structure of the kernel.
    pub fn new(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    /// struct ifinfomsg: an interface, and of its flags those that change.
    pub fn link(index: u32, flags: u32, change: u32) -> Self {
        let mut body = Self::new(&[0; 4]);
        for word in [index, flags, change] {
            body.0.extend_from_slice(&word.to_ne_bytes());
        }
        body
    }

    /// struct tcmsg.
    pub fn traffic(index: u32, handle: u32, parent: u32, info: u32) -> Self {
        let mut body = Self::new(&[0; 4]);
        for word in [index, handle, parent, info] {
            body.0.extend_from_slice(&word.to_ne_bytes());
        }
        body
    }

    /// Appends an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value);
        self
    }

    /// Appends a string with its NUL.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        let value = [text.as_bytes(), &[0]].concat();
        self.with(kind, &value)
    }

    /// Appends attributes as the value of one.
    #[must_use]
    pub fn with_nested(self, kind: u16, inner: &Self) -> Self {
        self.with(kind | NLA_F_NESTED, &inner.0)
    }

    /// Appends an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let inner = Body::default().with(1, &[7]);
        let body = Body::link(5, 1, 1).with_text(3, "eth0").with(9, &[]).with_nested(26, &inner).into_bytes();
        let found: Vec<_> = attributes(&body, kind::LINK.header).map(|(kind, _)| kind).collect();
        assert_eq!(found, [3, 9, 26]);
        assert_eq!(attribute(&body, 16, 3).map(text_of).as_deref(), Some("eth0"));
        assert_eq!(attribute(attribute(&body, 16, 26).unwrap(), 0, 1), Some(&[7][..]));
        assert_eq!(u32_at(&body, 4), Some(5));
    }

    #[test]
    fn broken_messages_end_early() {
        for hostile in [&[][..], &[3, 0, 1, 0], &[255, 255, 1, 0, 1], &[8, 0, 1, 0, 1, 2, 3], &[0; 64]] {
            assert_eq!(attributes(hostile, 0).count(), 0, "{hostile:?}");
            assert_eq!(Messages(hostile).count(), 0, "{hostile:?}");
            assert_eq!(attributes(hostile, 100).count(), 0, "{hostile:?}");
        }
    }

    #[test]
    fn the_kernel_answers() {
        let socket = Socket::open().unwrap();
        let links = socket.list(kind::LINK, &[0; 16]).unwrap();
        let name = |link: &Vec<u8>| attribute(link, 16, 3).map(text_of);
        let loopback = links.iter().find(|link| u32_at(link, 4) == Some(LOOPBACK)).unwrap();
        assert_eq!(name(loopback).as_deref(), Some("lo"));
        let refused = socket.set(kind::LINK, 0, Body::link(0x7fff_ffff, 0, 0).bytes()).unwrap_err();
        assert!(matches!(refused.errno(), Some(Errno::ENODEV | Errno::EPERM)), "{refused}");
    }

    #[test]
    fn fuzz_netlink() {
        katana_fuzz::fuzz("netlink", |input| {
            let header = input.below(32);
            let bytes = input.rest();
            for message in Messages(bytes) {
                let _ = message.outcome().map_err(|error| error.to_string());
                assert!(message.body.len() + HEADER <= bytes.len());
            }
            let mut last = 0;
            for (kind, at) in attributes(bytes, header) {
                assert!(last <= at.start && at.end <= bytes.len() && kind & !NLA_TYPE_MASK == 0);
                last = at.end;
                let value = bytes.get(at).unwrap();
                let _ = (text_of(value), attributes(value, 0).count());
            }
        });
    }
}
