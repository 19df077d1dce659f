//! virtio-net (virtio 1.2, 5.1): a slot for a network card whose tap may come later.
//!
//! Wiring: `Net::new()` makes a card with its link down. `attach(tap, mac)`, on the device thread, connects it to a tap
//! that was opened with IFF_VNET_HDR, gives it its address and raises the link.
//!
//! Linux takes address and MTU from the configuration space only while it probes the device, so a slot is hidden from
//! the guest until it is attached. F_MTU is not offered: it would limit what can be set later.
//!
//! Packets move between tap and guest memory without a copy in between, with the 12 bytes of virtio_net_hdr that
//! the tap itself writes and reads. With vhost-net the host's kernel moves them, and the queues are not looked at here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::base::{self, Active, Base, Event};
use super::chain::{Buffers, Chain, MAX_DESCRIPTORS};
use super::queue::DeviceQueue;
use super::vhost::Vhost;
use super::{Activation, VirtioDevice};
use crate::memory::GuestMemory;

const QUEUE_SIZES: [u16; 2] = [256, 256];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The tap's token among the event sources.
const TAP: u64 = 0;

/// struct virtio_net_hdr of a modern device, virtio 1.2, 5.1.6.
const HEADER: usize = 12;
/// Where in it the number of buffers is that a packet takes.
const NUM_BUFFERS: usize = 10;
/// Header, Ethernet header, and an IP packet of the greatest length, with a VLAN tag.
const LONGEST_PACKET: usize = HEADER + 18 + 65535;
/// Packets in either direction before other devices have their turn.
const BUDGET: usize = 256;

// linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// A network card.
pub struct Net {
    base: Base,
    mac: [u8; 6],
    tap: Option<Tap>,
    /// Who serves the queues instead.
    vhost: Option<Vhost>,
}

struct Tap {
    fd: OwnedFd,
    /// Whether it may have packets: its event has come, and no read has found it empty since.
    readable: bool,
    /// What the guest takes off the tap's hands (TUN_F_*), as last set.
    offloads: u32,
}

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// One tap for each slot, for good.
    #[error("network slot: it is in use")]
    InUse,
    /// Not a tap, most likely.
    #[error("tap: {0}: {1}")]
    Tap(&'static str, #[source] io::Error),
    /// A tap whose packets look different.
    #[error("tap: its flags are {0:#x}, without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR")]
    Flags(libc::c_int),
}

impl Net {
    /// A card without a network.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { base: Base::new("net")?, mac: [0; 6], tap: None, vhost: None })
    }

    /// Connects the card to `tap`, gives it its address and raises its link. `vhost` is a /dev/vhost-net, if the kernel is
    /// to move the packets.
    ///
    /// # Errors
    /// When the card is connected already, or it is not a tap with IFF_VNET_HDR.
    pub fn attach(&mut self, tap: OwnedFd, mac: [u8; 6], vhost: Option<OwnedFd>) -> Result<(), AttachError> {
        if self.tap.is_some() {
            return Err(AttachError::InUse);
        }
        check(&tap)?;
        let size = HEADER as libc::c_int;
        // SAFETY: the call reads one integer.
        if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } != 0 {
            return Err(AttachError::Tap("TUNSETVNETHDRSZ", io::Error::last_os_error()));
        }
        self.vhost = vhost.and_then(|fd| {
            Vhost::new(fd).inspect_err(|e| log::warn!("vhost-net: {e}; packets take the longer way")).ok()
        });
        self.connect(tap, mac)
    }

    /// The part of [`Self::attach`] for which anything does that keeps packets apart.
    fn connect(&mut self, tap: OwnedFd, mac: [u8; 6]) -> Result<(), AttachError> {
        fcntl(&tap, FcntlArg::F_GETFL)
            .and_then(|flags| {
                fcntl(&tap, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))
            })
            .map_err(|error| AttachError::Tap("O_NONBLOCK", error.into()))?;
        if self.vhost.is_none() {
            self.watch(&tap).map_err(|error| AttachError::Tap("epoll", error))?;
        }
        self.mac = mac;
        self.tap = Some(Tap { fd: tap, readable: false, offloads: 0 });
        self.base.config_changed();
        Ok(())
    }

    fn watch(&self, tap: &OwnedFd) -> io::Result<()> {
        self.base.sources().add(tap.as_fd(), TAP, EventSet::IN | EventSet::OUT)
    }

    /// Has the kernel serve the driver that is ready; where it does not, this process does.
    fn start_vhost(&mut self) {
        let (Some(vhost), Some(tap)) = (&mut self.vhost, &mut self.tap) else { return };
        let Some(activation) = vhost.waiting.take() else { return };
        tap.set_offloads(activation.features);
        let Err(error) = vhost.start(tap.fd.as_fd(), &activation) else { return };
        log::warn!("vhost-net: {error}; packets take the longer way");
        self.vhost = None;
        self.base.activate(activation);
        if let Some(tap) = &self.tap
            && let Err(error) = self.watch(&tap.fd)
        {
            log::error!("net: the tap cannot be watched: {error}");
        }
    }

    /// virtio 1.2, 5.1.4: address and status.
    fn config(&self) -> [u8; 8] {
        let [a, b, c, d, e, f] = self.mac;
        let status = if self.tap.is_some() { VIRTIO_NET_S_LINK_UP as u8 } else { 0 };
        [a, b, c, d, e, f, status, 0]
    }

    fn receive(&mut self) {
        if let (Some(tap), Some(active)) = (&mut self.tap, self.base.active()) {
            tap.set_offloads(active.features);
            let mergeable = active.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
            let Active { memory, queues, .. } = active;
            if let Some(queue) = queues.get_mut(RECEIVE) {
                tap.receive(memory, queue, mergeable);
            }
        }
    }

    fn transmit(&mut self) {
        if let Some((memory, queue)) = self.base.queue(TRANSMIT) {
            match &self.tap {
                Some(tap) => tap.transmit(memory, queue),
                // The link is down.
                None => queue.serve(memory, |_| Ok::<_, io::Error>(0)),
            }
        }
    }
}

/// Checks that packets on the tap have the one shape that the device knows: any other is garbage to the guest.
fn check(tap: &OwnedFd) -> Result<(), AttachError> {
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

impl Tap {
    fn set_offloads(&mut self, features: u64) {
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
    fn receive(&mut self, memory: &GuestMemory, queue: &mut DeviceQueue, mergeable: bool) {
        let mut room = Room::default();
        let mut budget = BUDGET;
        queue.quiet(memory);
        while self.readable {
            if !room.grow(memory, queue, mergeable) {
                // Buffers that come from now on are announced; a packet waits in the tap until then.
                if queue.sleep(memory) {
                    continue;
                }
                break;
            }
            if budget == 0 {
                queue.kick_again();
                break;
            }
            budget -= 1;
            match room.buffers().read_from(self.fd.as_fd()) {
                Ok(length) => room.give(memory, queue, length),
                Err(error) => {
                    self.readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        queue.complaints().add(&format_args!("tap: {error}"));
                    }
                }
            }
        }
        queue.unpop(room.chains.len() as u16);
        queue.interrupt(memory);
    }

    /// Moves packets from the guest to the tap until one of them can do no more.
    fn transmit(&self, memory: &GuestMemory, queue: &mut DeviceQueue) {
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
                    // The tap's event goes on here.
                    queue.unpop(1);
                    queue.interrupt(memory);
                    return;
                }
                // A packet that the tap refuses is lost, as on any network.
                queue.complaints().add(&format_args!("tap: {error}"));
            }
            queue.push(memory, chain.head(), 0);
        }
        queue.interrupt(memory);
        queue.kick_again();
    }
}

/// Receive buffers taken from the queue, room for one packet or more.
#[derive(Default)]
struct Room<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: usize,
    pieces: usize,
}

impl<'m> Room<'m> {
    /// Takes chains until any packet fits. False if the driver has too few of them.
    fn grow(&mut self, memory: &'m GuestMemory, queue: &mut DeviceQueue, mergeable: bool) -> bool {
        loop {
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

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let features = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        features.iter().fold(0, |all, feature| all | 1 << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn busy_queues(&self) -> &[usize] {
        &[RECEIVE, TRANSMIT]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        match &mut self.vhost {
            // Setting it up is the device thread's part.
            Some(vhost) => {
                vhost.waiting = Some(activation);
                self.base.sources().wake();
            }
            None => self.base.activate(activation),
        }
        Ok(())
    }

    fn reset(&mut self) {
        match &mut self.vhost {
            // At once: the driver takes its memory back after this.
            Some(vhost) => vhost.stop(),
            None => self.base.reset(),
        }
    }
}

impl MutEventSubscriber for Net {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            match event {
                Event::Wake => self.start_vhost(),
                Event::Queue(RECEIVE) => self.receive(),
                Event::Queue(TRANSMIT) => self.transmit(),
                Event::Other { token: TAP, ready } => {
                    if let Some(tap) = &mut self.tap {
                        tap.readable |= ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                    }
                    self.receive();
                    if ready.contains(EventSet::OUT) {
                        self.transmit();
                    }
                }
                _ => {}
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.base.init(ops);
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
