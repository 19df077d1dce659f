//! virtio-net (virtio 1.2, 5.1): a slot for a NIC whose tap may come later.
//!
//! Wiring: `Net::new()` makes a NIC with its link down. `attach(taps, mac, ...)`, on the device thread, connects it to
//! a tap that was opened with IFF_VNET_HDR, gives it its address and raises the link. A tap that was opened several
//! times, with IFF_MULTI_QUEUE, gives the NIC as many pairs of queues.
//!
//! Linux takes address and MTU from the configuration space only while it probes the device, so a slot is hidden from
//! the guest until it is attached. F_MTU is not offered: it would limit what can be set later.
//!
//! Packets move between tap and guest memory without a copy in between, with the 12 bytes of virtio_net_hdr that
//! the tap itself writes and reads. With vhost-net the host's kernel moves them, and the queues are not looked at here.

mod tap;

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

use self::tap::{HEADER, TUNSETVNETHDRSZ, Tap, check};
use super::base::{self, Active, Base, Event};
use super::chain::Chain;
use super::vhost::Vhost;
use super::{Activation, VirtioDevice};

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

    /// Connects the NIC to the queues of a tap, gives it its address and raises its link. `vhosts` are as many
    /// /dev/vhost-net, if the kernel is to move the packets.
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
        self.taps = taps.into_iter().map(Tap::new).collect();
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
            self.base.sources().add(tap.as_fd(), pair, EventSet::IN | EventSet::OUT)
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
            vhost.start(tap.as_fd(), activation, queues)?;
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
mod tests;
