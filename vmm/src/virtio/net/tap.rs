//! A queue of a tap, and the packets between it and the queues of the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use katana_protocol::counters::Counter;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::AttachError;
use crate::counters;
use crate::memory::GuestMemory;
use crate::virtio::chain::{Buffers, Chain, MAX_DESCRIPTORS};
use crate::virtio::queue::DeviceQueue;

/// struct virtio_net_hdr of a modern device, virtio 1.2, 5.1.6.
pub const HEADER: usize = 12;
/// Where in it the number of buffers is that a packet takes.
const NUM_BUFFERS: usize = 10;
/// Header, Ethernet header, and an IP packet of the greatest length, with a VLAN tag.
const LONGEST_PACKET: usize = HEADER + 18 + 65535;
/// Packets in either direction before other devices have their turn.
const BUDGET: usize = 256;

// linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
pub const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// A queue of a tap.
pub struct Tap {
    fd: OwnedFd,
    /// Whether it may have packets: its event has come, and no read has found it empty since.
    pub readable: bool,
    /// What the guest takes off the tap's hands (TUN_F_*), as last set.
    offloads: u32,
    /// Whether the tap puts packets into this queue.
    attached: bool,
}

/// Checks that packets on the tap have the one shape that the device knows: any other is garbage to the guest.
pub fn check(tap: &OwnedFd) -> Result<(), AttachError> {
    // SAFETY: struct ifreq holds plain integers and pointers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills a struct ifreq.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &raw mut request) } != 0 {
        return Err(AttachError::Tap("TUNGETIFF", io::Error::last_os_error()));
    }
    // SAFETY: these are the flags that the call has set.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if flags & needed == needed { Ok(()) } else { Err(AttachError::Flags(flags)) }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Tap {
    /// A queue that the tap fills, without offloads, as the kernel makes it.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, readable: false, offloads: 0, attached: true }
    }

    /// Has the tap put packets into this queue, or leave it alone. One that has only this one knows no such thing.
    pub fn attach(&mut self, attached: bool) {
        if attached == self.attached {
            return;
        }
        // SAFETY: struct ifreq holds plain integers and pointers, for all of which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: the call reads a struct ifreq.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETQUEUE, &raw const request) } != 0 {
            log::warn!("net: TUNSETQUEUE: {}", io::Error::last_os_error());
        }
        self.attached = attached;
    }

    /// Has the tap leave to the guest what the guest does itself, by the features that it accepted.
    pub fn set_offloads(&mut self, features: u64) {
        let map = [
            (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        ];
        let accepted = map.iter().filter(|(feature, _)| features & (1 << feature) != 0);
        let offloads = accepted.fold(0, |all, (_, offload)| all | offload);
        if offloads != self.offloads {
            self.offloads = offloads;
            // SAFETY: the call takes an integer.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads)) } != 0
            {
                // The tap then does checksums and segmentation itself.
                log::warn!("net: TUNSETOFFLOAD: {}", io::Error::last_os_error());
            }
        }
    }

    /// Moves packets from the tap to the guest until one of them has no more.
    pub fn receive(&mut self, memory: &GuestMemory, queue: &mut DeviceQueue, mergeable: bool) {
        let mut buffers = Receiving::default();
        let mut budget = BUDGET;
        queue.quiet(memory);
        while self.readable {
            if !buffers.grow(memory, queue, mergeable) {
                // Buffers that come from now on are announced; a packet waits in the tap until then. Those that have
                // come meanwhile may not suffice either, and others are to have their turn.
                if queue.sleep(memory) {
                    queue.kick_again();
                }
                break;
            }
            if budget == 0 {
                queue.kick_again();
                break;
            }
            budget -= 1;
            match buffers.buffers().read_from(self.fd.as_fd()) {
                Ok(length) => {
                    counters::count(Counter::NetPacketsReceived);
                    counters::add(Counter::NetBytesReceived, length.saturating_sub(HEADER));
                    buffers.give(memory, queue, length);
                }
                Err(error) => {
                    self.readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        queue.complaints().add(&format_args!("tap: {error}"));
                    }
                }
            }
        }
        queue.unpop(buffers.chains.len() as u16);
        queue.interrupt(memory);
    }

    /// Moves packets from the guest to the tap until one of them can do no more.
    pub fn transmit(&self, memory: &GuestMemory, queue: &mut DeviceQueue) {
        queue.quiet(memory);
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop(memory) else {
                if queue.sleep(memory) {
                    continue;
                }
                queue.interrupt(memory);
                return;
            };
            let length = chain.readable.len();
            if !(HEADER..=LONGEST_PACKET).contains(&length) {
                queue.complaints().add(&format_args!("a packet of {length} bytes"));
            } else if let Err(error) = chain.readable.write_to(self.fd.as_fd()) {
                if error.kind() == io::ErrorKind::WouldBlock {
                    // Sending continues at the tap's next event.
                    queue.unpop(1);
                    queue.interrupt(memory);
                    return;
                }
                // A packet that the tap refuses is lost, as on any network.
                queue.complaints().add(&format_args!("tap: {error}"));
            } else {
                counters::count(Counter::NetPacketsSent);
                counters::add(Counter::NetBytesSent, length - HEADER);
            }
            queue.push(memory, chain.head(), 0);
        }
        queue.interrupt(memory);
        queue.kick_again();
    }
}

/// Receive buffers taken from the queue, room for one packet or more.
#[derive(Default)]
struct Receiving<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: usize,
    pieces: usize,
}

impl<'m> Receiving<'m> {
    /// Takes chains until any packet fits. False if the driver has too few of them.
    fn grow(&mut self, memory: &'m GuestMemory, queue: &mut DeviceQueue, mergeable: bool) -> bool {
        // A ring full at most: a driver can make one useless chain available after the other.
        for _ in 0..=queue.size() {
            // Without mergeable buffers the driver has promised that each chain is long enough. A ring full of
            // small ones is all that this driver will ever have.
            let enough = if mergeable { self.bytes >= LONGEST_PACKET } else { !self.chains.is_empty() };
            if enough || self.chains.len() >= queue.size().into() || self.pieces >= MAX_DESCRIPTORS {
                return true;
            }
            let Some(chain) = queue.pop(memory) else { return false };
            if chain.writable.len() < HEADER {
                // virtio 1.2, 5.1.6.3.1
                queue.complaints().add(&"a receive buffer without room for a header");
                queue.push(memory, chain.head(), 0);
                continue;
            }
            self.bytes += chain.writable.len();
            self.pieces += chain.writable.pieces();
            self.chains.push_back(chain);
        }
        false
    }

    fn buffers(&self) -> Buffers<'m> {
        let mut all = Buffers::default();
        self.chains.iter().for_each(|chain| all.extend(&chain.writable));
        all
    }

    /// Gives the driver the packet of `length` bytes that was read into the first buffers.
    fn give(&mut self, memory: &GuestMemory, queue: &mut DeviceQueue, length: usize) {
        if length < HEADER {
            return;
        }
        let (mut sum, mut count) = (0, 0_u16);
        while let Some(chain) = self.chains.get(usize::from(count))
            && sum < length
        {
            sum += chain.writable.len();
            count += 1;
        }
        if let Some(first) = self.chains.front() {
            // The tap leaves this field alone. 5.1.6.4.1: it is set with and without mergeable buffers.
            let mut header = first.writable.clone();
            header.advance(NUM_BUFFERS);
            header.write_bytes(&count.to_le_bytes());
        }
        let mut rest = length;
        for chain in self.chains.drain(..usize::from(count)) {
            let part = rest.min(chain.writable.len());
            rest -= part;
            self.bytes -= chain.writable.len();
            self.pieces -= chain.writable.pieces();
            queue.push(memory, chain.head(), part as u32);
        }
    }
}
