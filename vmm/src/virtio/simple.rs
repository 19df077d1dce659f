//! What devices have in common that only answer what the driver puts into their queues.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::base::{self, Base, Event};
use super::queue::DeviceQueue;
use super::{Activation, VirtioDevice};
use crate::memory::GuestMemory;

/// Such a device.
pub trait Answer: Send {
    /// Its name in the log.
    const NAME: &'static str;
    /// Its type, virtio 1.2, section 5.
    const TYPE: u32;
    /// The features that it offers.
    const FEATURES: u64 = 0;
    /// The largest size of each queue.
    const QUEUE_SIZES: &'static [u16];

    /// Its configuration.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Serves queue number `index`, which the driver has notified.
    fn answer(&mut self, index: usize, memory: &GuestMemory, queue: &mut DeviceQueue);
}

/// A device on the device thread that is nothing but its answers.
pub struct Simple<D> {
    base: Base,
    device: D,
}

impl<D: Answer> Simple<D> {
    /// A device that nobody uses yet.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(device: D) -> io::Result<Self> {
        Ok(Self { base: Base::new(D::NAME)?, device })
    }
}

impl<D: Answer> VirtioDevice for Simple<D> {
    fn device_type(&self) -> u32 {
        D::TYPE
    }

    fn features(&self) -> u64 {
        D::FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        D::QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(self.device.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.base.activate(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.base.reset();
    }
}

impl<D: Answer> MutEventSubscriber for Simple<D> {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            if let Event::Queue(index) = event
                && let Some((memory, queue)) = self.base.queue(index)
            {
                self.device.answer(index, memory, queue);
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.base.init(ops);
    }
}
