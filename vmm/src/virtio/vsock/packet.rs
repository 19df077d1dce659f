//! The header of a vsock packet, virtio 1.2, 5.10.6.

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// The host's context id, the same in all guests.
pub const HOST_CID: u64 = 2;
/// Bytes of a header.
pub const HEADER_LENGTH: usize = size_of::<Header>();
/// Longest payload, in either direction. Linux sends as much at most.
pub const LONGEST_PAYLOAD: usize = 64 * 1024;
/// The only kind of socket that is served.
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`op::SHUTDOWN`]: the sender of it receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`op::SHUTDOWN`]: the sender of it sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends it.
    pub const RST: u16 = 3;
    /// Announces that no more is sent, received, or both.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Announces how much room there is.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks how much room there is.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// struct virtio_vsock_hdr.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, packed)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: Le64,
    /// Context id of the receiver.
    pub dst_cid: Le64,
    /// Port of the sender.
    pub src_port: Le32,
    /// Port of the receiver.
    pub dst_port: Le32,
    /// Bytes of payload.
    pub len: Le32,
    /// Kind of socket.
    pub kind: Le16,
    /// One of [`op`].
    pub op: Le16,
    /// Flags of the operation.
    pub flags: Le32,
    /// How much the sender of this has room for.
    pub buf_alloc: Le32,
    /// How much it has taken out of there since the connection began, modulo 2^32.
    pub fwd_cnt: Le32,
}

// SAFETY: plain integers, packed: no padding.
unsafe impl ByteValued for Header {}

/// The two ends of a connection; the context ids are the same for all of a guest's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host_port: u32,
    /// Port in the guest.
    pub guest_port: u32,
}

impl Key {
    /// The connection to which a packet from the guest belongs.
    pub fn of(header: &Header) -> Self {
        Self { host_port: header.dst_port.to_native(), guest_port: header.src_port.to_native() }
    }

    /// A packet to the guest on this connection; the guest's context id is yet to be put in.
    pub fn header(self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            src_port: self.host_port.into(),
            dst_port: self.guest_port.into(),
            kind: TYPE_STREAM.into(),
            op: op.into(),
            ..Header::default()
        }
    }

    /// The number by which the event sources know the connection.
    pub fn token(self) -> u64 {
        u64::from(self.host_port) << 32 | u64::from(self.guest_port)
    }

    /// The connection of a [`Self::token`].
    pub fn from_token(token: u64) -> Self {
        Self { host_port: (token >> 32) as u32, guest_port: token as u32 }
    }
}
