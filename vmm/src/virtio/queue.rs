//! One queue of a running device: taking chains, returning them, and who has to wake whom.

use std::fmt::Display;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain, ChainError};
use super::{Interrupt, VirtQueue};
use crate::memory::GuestMemory;

/// A queue in use.
///
/// A driver that breaks the rings themselves gets no more service until it resets the device; a chain that is
/// malformed goes back with length 0.
pub struct DeviceQueue {
    rings: Queue,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
    broken: bool,
    used: bool,
    complaints: Complaints,
}

impl DeviceQueue {
    /// Takes over what the transport has set up; `device` is the name for the log.
    pub fn new(queue: VirtQueue, device: &'static str) -> Self {
        let VirtQueue { queue: rings, kick, interrupt } = queue;
        Self { rings, kick, interrupt, broken: false, used: false, complaints: Complaints::new(device) }
    }

    /// What the driver uses to announce buffers.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// What interrupts its driver. For who keeps the queue in use for long: [`Self::serve`] does it at its end.
    pub fn interrupt_of_driver(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Has the queue served again: by another thread, or after others had their turn.
    pub fn kick_again(&self) {
        // Only a full counter could fail it, and that one wakes as well.
        let _ = self.kick.write(1);
    }

    /// Number of entries in the rings.
    pub fn size(&self) -> u16 {
        self.rings.size()
    }

    /// Where complaints about this queue's driver go.
    pub fn complaints(&mut self) -> &mut Complaints {
        &mut self.complaints
    }

    /// The next chain. None if there is none, and for each that is malformed: a driver that makes one after the other
    /// available does not hold the caller, who finds by [`Self::sleep`] that there are more.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        self.pop_checked(memory, |raw| Chain::new(memory, raw))
    }

    /// As [`Self::pop`], of a chain of proper shape, for whom reads its descriptors on his own.
    pub fn pop_raw<'m>(&mut self, memory: &'m GuestMemory) -> Option<DescriptorChain<&'m GuestMemory>> {
        self.pop_checked(memory, |raw| chain::check(raw.clone()).map(|()| raw))
    }

    fn pop_checked<'m, T>(
        &mut self,
        memory: &'m GuestMemory,
        check: impl Fn(DescriptorChain<&'m GuestMemory>) -> Result<T, ChainError>,
    ) -> Option<T> {
        if self.broken {
            return None;
        }
        let raw = match self.rings.iter(memory) {
            Ok(mut available) => available.next()?,
            Err(error) => return self.fail(&error),
        };
        let head = raw.head_index();
        if head >= self.rings.size() {
            return self.fail(&"the available ring names a descriptor beyond the table");
        }
        check(raw)
            .inspect_err(|error| {
                self.complaints.add(&format_args!("a malformed chain: {error}"));
                self.push(memory, head, 0);
            })
            .ok()
    }

    fn fail<T>(&mut self, why: &dyn Display) -> Option<T> {
        self.broken = true;
        self.complaints.add(&format_args!("{why}; the queue is out of service until the next reset"));
        None
    }

    /// Puts the last `count` chains back: they are the next to be popped again.
    pub fn unpop(&mut self, count: u16) {
        self.rings.set_next_avail(self.rings.next_avail().wrapping_sub(count));
    }

    /// Returns a chain into which `length` bytes were written.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, length: u32) {
        match self.rings.add_used(memory, head, length) {
            Ok(()) => self.used = true,
            Err(error) => {
                self.fail::<()>(&error);
            }
        }
    }

    /// Interrupts the driver if chains were returned since the last call and it wants to know.
    pub fn interrupt(&mut self, memory: &GuestMemory) {
        // An error means that the ring is gone; a driver that did this may be woken.
        if std::mem::take(&mut self.used) && self.rings.needs_notification(memory).unwrap_or(true) {
            self.interrupt.trigger();
        }
    }

    /// Asks for a kick at the next chain. True: there is one already, pop again.
    pub fn sleep(&mut self, memory: &GuestMemory) -> bool {
        !self.broken && self.rings.enable_notification(memory).unwrap_or(false)
    }

    /// Asks for no kicks until [`Self::sleep`].
    pub fn quiet(&mut self, memory: &GuestMemory) {
        // Kicks that come all the same do no harm.
        let _ = self.rings.disable_notification(memory);
    }

    /// Serves what is available, one ring full at most before others have their turn. `handle` returns how many
    /// bytes it wrote, or what it has to complain about.
    pub fn serve<E: Display>(
        &mut self,
        memory: &GuestMemory,
        mut handle: impl FnMut(Chain<'_>) -> Result<u32, E>,
    ) {
        self.quiet(memory);
        for _ in 0..self.size() {
            if let Some(chain) = self.pop(memory) {
                let head = chain.head();
                let length = handle(chain).unwrap_or_else(|error| {
                    self.complaints.add(&error);
                    0
                });
                self.push(memory, head, length);
            } else if !self.sleep(memory) {
                self.interrupt(memory);
                return;
            }
        }
        self.interrupt(memory);
        self.kick_again();
    }
}

/// A log of what a driver does wrong which it cannot flood: the first, second, fourth, eighth ... complaint is
/// written.
pub struct Complaints {
    device: &'static str,
    count: u64,
}

impl Complaints {
    /// About the driver of `device`.
    pub fn new(device: &'static str) -> Self {
        Self { device, count: 0 }
    }

    /// Logs `what`, or only counts it.
    pub fn add(&mut self, what: &dyn Display) {
        self.count = self.count.saturating_add(1);
        if self.count.is_power_of_two() {
            log::warn!("{}: complaint {}: {what}", self.device, self.count);
        }
    }
}
