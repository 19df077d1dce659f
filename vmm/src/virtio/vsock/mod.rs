//! virtio-vsock (virtio 1.2, 5.10) in user space: streams between the guest and Unix sockets on the host.
//!
//! Wiring: `Vsock::new(cid, incoming)`. When the guest connects to a port of the host, `incoming(port, fd)` is
//! called on the device thread with the host's end of a new Unix stream pair; an error refuses the connection. It must
//! neither block nor call the device. `connect(port, fd)`, on the device thread, connects `fd`, one end of a Unix
//! stream pair, to a port in the guest; it is closed if the guest refuses.
//!
//! Connections take turns, one packet each, at the guest's receive buffers. When these run out, sending continues at
//! the next kick of the queue; nothing is polled.

mod connection;
mod packet;
mod streams;

use std::io;
use std::os::fd::OwnedFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::ByteValued;

use self::packet::HEADER_LENGTH;
use self::streams::Streams;
pub use self::streams::{ConnectError, Incoming};
use super::base::{self, Active, Base, Event};
use super::{Activation, VirtioDevice};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, 5.10.6.7: connections are gone, and the context id is to be read again.
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// Packets to the guest before other devices have their turn, and before the driver is interrupted.
const BUDGET: usize = 256;
const INTERRUPT_AFTER: usize = 32;

/// The socket device.
pub struct Vsock {
    base: Base,
    incoming: Incoming,
    streams: Streams,
    /// Whether the driver has reset the device and the streams have yet to be ended.
    reset: bool,
    /// Whether the guest has yet to be notified that its context id is another one.
    moved: bool,
}

impl Vsock {
    /// A device for a guest of this context id that hands connections of the guest to `incoming`.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(cid: u32, incoming: Incoming) -> io::Result<Self> {
        let (base, streams) = (Base::new("vsock")?, Streams::new(u64::from(cid)));
        Ok(Self { base, incoming, streams, reset: false, moved: false })
    }

    /// The guest comes from a template, in which it had another context id: notifies it as soon as its driver is there.
    pub fn moved_from(&mut self, cid: u32) {
        self.streams.set_former_cid(u64::from(cid));
        self.moved = true;
        self.base.sources().wake();
    }

    fn notify_move(&mut self) {
        if let Some((memory, queue)) = self.base.queue(EVENTS).filter(|_| self.moved)
            && let Some(mut chain) = queue.pop(memory)
        {
            let length = chain.writable.write_bytes(&TRANSPORT_RESET);
            queue.push(memory, chain.head(), length as u32);
            queue.interrupt(memory);
            self.moved = false;
        }
    }

    /// Connects `socket` to a port in the guest, as soon as its driver is ready.
    ///
    /// # Errors
    /// When there are too many connections or the descriptor is unusable.
    pub fn connect(&mut self, port: u32, socket: OwnedFd) -> Result<(), ConnectError> {
        self.catch_up();
        self.streams.connect(port, socket, self.base.sources())?;
        self.base.sources().wake();
        Ok(())
    }

    /// Ends the connections of a driver that is gone.
    fn catch_up(&mut self) {
        if std::mem::take(&mut self.reset) {
            self.streams.end_all(self.base.sources());
        }
    }

    /// Handles what the guest sends.
    fn transmit(&mut self) {
        let Self { base, incoming, streams, .. } = self;
        if let (sources, Some(Active { memory, queues, .. })) = base.split()
            && let Some(queue) = queues.get_mut(TRANSMIT)
        {
            queue.serve(memory, |chain| streams.handle(chain.readable, sources, incoming));
        }
    }

    /// Sends to the guest until there is nothing to send or it has no buffers.
    fn receive(&mut self) {
        let Self { base, streams, .. } = self;
        let (sources, Some(Active { memory, queues, .. })) = base.split() else { return };
        let Some(queue) = queues.get_mut(RECEIVE) else { return };
        queue.quiet(memory);
        for count in 1.. {
            if streams.is_idle() {
                break;
            }
            if count > BUDGET {
                sources.wake();
                break;
            }
            let Some(mut chain) = queue.pop(memory) else {
                // Sending continues at the kick for the next buffer.
                if queue.sleep(memory) {
                    continue;
                }
                break;
            };
            let mut head = chain.writable.split_front(HEADER_LENGTH);
            if chain.writable.is_empty() {
                queue.complaints().add(&"a receive buffer without room for a packet");
                queue.push(memory, chain.head(), 0);
                continue;
            }
            let Some(header) = streams.next_packet(&chain.writable, sources) else {
                queue.unpop(1);
                break;
            };
            head.write_bytes(header.as_slice());
            queue.push(memory, chain.head(), HEADER_LENGTH as u32 + header.len.to_native());
            if count % INTERRUPT_AFTER == 0 {
                queue.interrupt(memory);
            }
        }
        queue.interrupt(memory);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Stream sockets are served without any (5.10.3).
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn busy_queues(&self) -> &[usize] {
        &[RECEIVE, TRANSMIT]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.streams.cid().to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.base.activate(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.reset = true;
        self.base.reset();
    }
}

impl MutEventSubscriber for Vsock {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.catch_up();
        self.notify_move();
        for event in self.base.events() {
            match event {
                Event::Queue(TRANSMIT) => self.transmit(),
                Event::Other { token, ready } => self.streams.ready(token, ready, self.base.sources()),
                // Whatever happened: what there is to send is sent below.
                Event::Wake | Event::Queue(_) => {}
            }
        }
        self.receive();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.base.init(ops);
    }
}

#[cfg(test)]
mod tests;
