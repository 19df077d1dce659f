//! virtio-net (virtio 1.2, 5.1): a slot for a NIC whose tap may come later.
//!
//! Wiring: `Net::new()` makes a NIC with its link down. `attach(taps, mac, ...)`, on the device thread, connects it to a tap
//! that was opened with IFF_VNET_HDR, gives it its address and raises the link. A tap that was opened several times, with
//! IFF_MULTI_QUEUE, gives the NIC as many pairs of queues.
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
use katana_protocol::vmm::MOST_NET_PAIRS;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::Le16;

use super::base::{self, Active, Base, Event};
use super::chain::{Buffers, Chain, MAX_DESCRIPTORS};
use super::queue::DeviceQueue;
use super::vhost::Vhost;
use super::{Activation, VirtioDevice};
use crate::memory::GuestMemory;

/// Two queues of each pair, and behind them the one for commands (5.1.2).
const MOST_QUEUES: usize = 2 * MOST_NET_PAIRS + 1;
const QUEUE_SIZES: [u16; MOST_QUEUES] = [256; MOST_QUEUES];
const QUEUES: [usize; MOST_QUEUES] = {
    let mut queues = [0; MOST_QUEUES];
    let mut number = 1;
    while number < MOST_QUEUES {
        queues[number] = number;
        number += 1;
    }
    queues
};

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
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// A NIC.
pub struct Net {
    base: Base,
    mac: [u8; 6],
    /// A tap's queues, one for each pair of the NIC's; none while the link is down.
    taps: Vec<Tap>,
    /// How many pairs the driver uses: the first one, until it asks for more.
    in_use: usize,
    /// Who serves the pairs instead, each one of them.
    vhosts: Vec<Vhost>,
    /// What those are to serve, until the device thread has set it up.
    waiting: Option<Activation>,
}

struct Tap {
    fd: OwnedFd,
    /// Whether it may have packets: its event has come, and no read has found it empty since.
    readable: bool,
    /// What the guest takes off the tap's hands (TUN_F_*), as last set.
    offloads: u32,
    /// Whether the tap puts packets into this queue.
    attached: bool,
}

/// What a queue is for.
enum Role {
    /// Of this pair.
    Receive(usize),
    /// Of this pair.
    Transmit(usize),
    Control,
}

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// One tap for each slot, for good.
    #[error("network slot: it is in use")]
    InUse,
    /// None, or too many.
    #[error("network slot: a tap with {0} queues")]
    Pairs(usize),
    /// Not a tap, most likely.
    #[error("tap: {0}: {1}")]
    Tap(&'static str, #[source] io::Error),
    /// A tap whose packets look different.
    #[error("tap: its flags are {0:#x}, without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR")]
    Flags(libc::c_int),
}

impl Net {
    /// A NIC without a network.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let (taps, vhosts) = (Vec::new(), Vec::new());
        Ok(Self { base: Base::new("net")?, mac: [0; 6], taps, in_use: 1, vhosts, waiting: None })
    }

    /// Connects the NIC to the queues of a tap, gives it its address and raises its link. `vhosts` are as many /dev/vhost-net,
    /// if the kernel is to move the packets.
    ///
    /// # Errors
    /// When the NIC is connected already, or it is not a tap with IFF_VNET_HDR.
    pub fn attach(
        &mut self,
        taps: Vec<OwnedFd>,
        mac: [u8; 6],
        vhosts: Vec<OwnedFd>,
    ) -> Result<(), AttachError> {
        if !self.taps.is_empty() {
            return Err(AttachError::InUse);
        }
        taps.iter().try_for_each(check)?;
        if let Some(tap) = taps.first() {
            let size = HEADER as libc::c_int;
            // SAFETY: the call reads one integer.
            if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } != 0 {
                return Err(AttachError::Tap("TUNSETVNETHDRSZ", io::Error::last_os_error()));
            }
        }
        if vhosts.len() == taps.len() {
            let taken = vhosts.into_iter().map(Vhost::new).collect::<io::Result<_>>();
            let taken = taken.inspect_err(|e| log::warn!("vhost-net: {e}; packets take the longer way"));
            self.vhosts = taken.unwrap_or_default();
        }
        self.connect(taps, mac)
    }

    /// The part of [`Self::attach`] for which anything does that keeps packets apart.
    fn connect(&mut self, taps: Vec<OwnedFd>, mac: [u8; 6]) -> Result<(), AttachError> {
        if !(1..=MOST_NET_PAIRS).contains(&taps.len()) {
            return Err(AttachError::Pairs(taps.len()));
        }
        for tap in &taps {
            fcntl(tap, FcntlArg::F_GETFL)
                .and_then(|flags| {
                    fcntl(tap, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))
                })
                .map_err(|error| AttachError::Tap("O_NONBLOCK", error.into()))?;
        }
        let tap = |fd| Tap { fd, readable: false, offloads: 0, attached: true };
        self.taps = taps.into_iter().map(tap).collect();
        if self.vhosts.is_empty() {
            self.watch().map_err(|error| AttachError::Tap("epoll", error))?;
        }
        self.use_pairs();
        self.mac = mac;
        self.base.config_changed();
        Ok(())
    }

    fn watch(&self) -> io::Result<()> {
        let mut taps = (0..).zip(&self.taps);
        taps.try_for_each(|(pair, tap)| {
            self.base.sources().add(tap.fd.as_fd(), pair, EventSet::IN | EventSet::OUT)
        })
    }

    /// Has the tap fill the queues that the driver looks at.
    fn use_pairs(&mut self) {
        for (pair, tap) in self.taps.iter_mut().enumerate() {
            tap.attach(pair < self.in_use);
        }
    }

    /// Has the kernel serve the driver that is ready; where it does not, this process does.
    fn start_vhosts(&mut self) {
        let Some(mut activation) = self.waiting.take() else { return };
        if let Some(tap) = self.taps.first_mut() {
            tap.set_offloads(activation.features);
        }
        match self.try_start_vhosts(&activation) {
            // What is left is for this process: the queue for commands.
            Ok(()) => drop(activation.queues.drain(..pairs(&activation) * 2)),
            Err(error) => {
                log::warn!("vhost-net: {error}; packets take the longer way");
                // Those that have been started stop.
                self.vhosts.clear();
                if let Err(error) = self.watch() {
                    log::error!("net: the tap cannot be watched: {error}");
                }
            }
        }
        self.base.activate(activation);
    }

    fn try_start_vhosts(&mut self, activation: &Activation) -> io::Result<()> {
        let queues = activation.queues.chunks_exact(2).take(pairs(activation));
        for ((vhost, tap), queues) in self.vhosts.iter_mut().zip(&self.taps).zip(queues) {
            vhost.start(tap.fd.as_fd(), activation, queues)?;
        }
        Ok(())
    }

    /// virtio 1.2, 5.1.4: address, status, and the greatest number of pairs.
    fn config(&self) -> [u8; 10] {
        let [a, b, c, d, e, f] = self.mac;
        let status = if self.taps.is_empty() { 0 } else { VIRTIO_NET_S_LINK_UP as u8 };
        [a, b, c, d, e, f, status, 0, self.pairs() as u8, 0]
    }

    /// How many pairs of queues the NIC has.
    fn pairs(&self) -> usize {
        self.taps.len().max(1)
    }

    /// What a queue of the base is for. 5.1.2: without F_MQ, there is one pair.
    fn role(&mut self, queue: usize) -> Role {
        let in_kernel = !self.vhosts.is_empty();
        let many = self.base.active().is_some_and(|active| active.features & (1 << VIRTIO_NET_F_MQ) != 0);
        let pairs = if many { self.pairs() } else { 1 };
        match queue {
            _ if in_kernel || queue >= 2 * pairs => Role::Control,
            _ if queue.is_multiple_of(2) => Role::Receive(queue / 2),
            _ => Role::Transmit(queue / 2),
        }
    }

    fn receive(&mut self, pair: usize) {
        let Some(active) = self.base.active() else { return };
        if let Some(first) = self.taps.first_mut() {
            first.set_offloads(active.features);
        }
        let mergeable = active.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let Active { memory, queues, .. } = active;
        if let (Some(tap), Some(queue)) = (self.taps.get_mut(pair), queues.get_mut(2 * pair)) {
            tap.receive(memory, queue, mergeable);
        }
    }

    fn transmit(&mut self, pair: usize) {
        if let Some((memory, queue)) = self.base.queue(2 * pair + 1) {
            match self.taps.get(pair) {
                Some(tap) => tap.transmit(memory, queue),
                // The link is down.
                None => queue.serve(memory, |_| Ok::<_, io::Error>(0)),
            }
        }
    }

    /// virtio 1.2, 5.1.6.5: the one command there is says how many pairs the driver uses (5.1.6.5.5).
    fn control(&mut self, queue: usize) {
        let most = self.pairs();
        let mut in_use = self.in_use;
        if let Some((memory, queue)) = self.base.queue(queue) {
            queue.serve(memory, |mut chain| {
                let wanted = wanted_pairs(&mut chain).filter(|pairs| (1..=most).contains(pairs));
                let answer = if wanted.is_some() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
                in_use = wanted.unwrap_or(in_use);
                Ok::<_, io::Error>(chain.writable.write_bytes(&[answer as u8]) as u32)
            });
        }
        self.in_use = in_use;
        self.use_pairs();
    }
}

/// How many pairs a driver has set up: fewer than there are if it has not looked for more.
fn pairs(activation: &Activation) -> usize {
    let complete = activation.queues.len() / 2;
    if activation.features & (1 << VIRTIO_NET_F_MQ) == 0 { complete.min(1) } else { complete }
}

/// The number in a command to use so many pairs.
fn wanted_pairs(chain: &mut Chain<'_>) -> Option<usize> {
    let command = [chain.readable.read::<u8>()?, chain.readable.read::<u8>()?].map(u32::from);
    let pairs = chain.readable.read::<Le16>()?.to_native();
    (command == [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET]).then(|| pairs.into())
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
    /// Has the tap put packets into this queue, or leave it alone. One that has only this one knows no such thing.
    fn attach(&mut self, attached: bool) {
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
                // Buffers that come from now on are announced; a packet waits in the tap until then. Those that have
                // come meanwhile may be of no use either, and others are to have their turn.
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
        let many = [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ];
        let many = if self.pairs() > 1 { &many[..] } else { &[] };
        features.iter().chain(many).fold(0, |all, feature| all | 1 << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        let control = usize::from(self.pairs() > 1);
        &QUEUE_SIZES[..2 * self.pairs() + control]
    }

    fn most_queues(&self) -> usize {
        MOST_QUEUES
    }

    fn busy_queues(&self) -> &[usize] {
        &QUEUES[..2 * self.pairs()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.vhosts.is_empty() {
            self.base.activate(activation);
        } else {
            // Setting it up is the device thread's part.
            self.waiting = Some(activation);
            self.base.sources().wake();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.in_use = 1;
        self.waiting = None;
        // At once: the driver takes its memory back after this.
        self.vhosts.iter_mut().for_each(Vhost::stop);
        self.base.reset();
    }
}

impl MutEventSubscriber for Net {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            match event {
                Event::Wake => {
                    self.use_pairs();
                    self.start_vhosts();
                }
                Event::Queue(queue) => match self.role(queue) {
                    Role::Receive(pair) => self.receive(pair),
                    Role::Transmit(pair) => self.transmit(pair),
                    Role::Control => self.control(queue),
                },
                Event::Other { token, ready } => {
                    let pair = token as usize;
                    if let Some(tap) = self.taps.get_mut(pair) {
                        tap.readable |= ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                    }
                    self.receive(pair);
                    if ready.contains(EventSet::OUT) {
                        self.transmit(pair);
                    }
                }
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
