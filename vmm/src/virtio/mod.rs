//! virtio devices, virtio 1.2. A device knows its queues, its features and its configuration space; how the
//! guest reaches them is the business of the transport (`crate::pci`).

pub mod balloon;
mod base;
pub mod blk;
mod chain;
pub mod console;
pub mod fs;
#[cfg(test)]
mod fuzzing;
pub mod mem;
pub mod net;
pub mod pmem;
mod queue;
pub mod rng;
mod simple;
#[cfg(test)]
mod testing;
mod vhost;
pub mod vsock;

use std::io;
use std::sync::Arc;

use event_manager::MutEventSubscriber;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// A virtio device as the transport sees it.
///
/// Its queues are served on the device thread: the device is a subscriber of that thread's event manager and
/// is locked while it handles an event or a call of the transport. The file server and disks are the exceptions; they
/// have threads of their own.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// Device type, virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// Offered features, without those of the transport (VERSION_1, ring features), which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each queue; its length is the number of queues. It changes with what is attached, while no
    /// driver can see the device.
    fn queue_sizes(&self) -> &[u16];

    /// The greatest number of queues that there can be.
    fn most_queues(&self) -> usize {
        self.queue_sizes().len()
    }

    /// The queues that the driver notifies often. Their notifications do not stop the vCPU, for which the kernel keeps
    /// a list that takes it time to change.
    fn busy_queues(&self) -> &[usize] {
        &[]
    }

    /// Reads the device configuration at `offset`; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration; ignored by most devices.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK. An error sets DEVICE_NEEDS_RESET and is logged.
    ///
    /// Called on a vCPU's thread, whose seccomp filter lets it do little more than use locks, eventfds and memory:
    /// a device with threads of its own starts them in its constructor or when something is attached (each of them then
    /// calls `crate::seccomp::install` for its kind) and hands them the activation.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// The driver reset the device: forget the queues. On a vCPU's thread as well; for what takes long there is
    /// [`Self::at_rest`].
    fn reset(&mut self);

    /// Whether all that was under way at the last reset has ended: the device touches neither those queues nor the
    /// memory that they name any more. Until then the driver is not told that the reset is done.
    fn at_rest(&self) -> bool {
        true
    }
}

/// What a device is given when its driver is ready.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The features that both sides have accepted.
    pub features: u64,
    /// The queues, checked by the transport: ready, of a valid size, wholly inside guest memory. A driver may
    /// leave out queues at the end, so there may be fewer than the device has, but at least one.
    pub queues: Vec<VirtQueue>,
    /// Raised when the configuration changed.
    pub config_interrupt: Interrupt,
}

/// One queue of an active device.
pub struct VirtQueue {
    /// The rings.
    pub queue: Queue,
    /// Readable when the driver has made buffers available (an ioeventfd). Reading waits for that.
    pub kick: Arc<EventFd>,
    /// Raised when buffers were used.
    pub interrupt: Interrupt,
}

/// An MSI-X vector of a device, as the driver has set it up.
#[derive(Clone)]
pub struct Interrupt {
    pub(crate) vector: Arc<dyn Trigger>,
}

/// The transport's side of an [`Interrupt`].
pub(crate) trait Trigger: Send + Sync {
    /// Delivers the interrupt, or remembers it while the vector is masked.
    fn trigger(&self);
    /// What delivers the interrupt as well when it is written to, masked or not, if there is such a thing.
    fn event(&self) -> Option<Arc<EventFd>> {
        None
    }
}

impl Interrupt {
    /// Interrupts the driver.
    pub fn trigger(&self) {
        self.vector.trigger();
    }

    /// For the host's kernel, to interrupt without this process. A vector that is masked is not spared: drivers mask
    /// while they set up and move interrupts, and one too many does no harm.
    pub fn event(&self) -> Option<Arc<EventFd>> {
        self.vector.event()
    }
}
