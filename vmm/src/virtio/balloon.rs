//! virtio-balloon (virtio 1.2, 5.5) for one purpose: the guest reports pages that it does not use (5.5.6.7), and the
//! host gets their memory back. The guest touches such a page again when it needs it, and finds zeros.
//!
//! Wiring: `Balloon::new()`.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::base::{Base, Event};
use super::{Activation, VirtioDevice};

/// The inflate and deflate queues, which nobody uses since no size is asked for, and the queue of reports.
const QUEUE_SIZES: [u16; 3] = [64, 64, 64];
const REPORTS: usize = 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING, 5.5.3.
const PAGE_REPORTING: u64 = 1 << 5;

/// The device.
pub struct Balloon {
    base: Base,
}

impl Balloon {
    /// A balloon that stays empty.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { base: Base::new("balloon")? })
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// The wanted and the present size of the balloon: 0.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.base.activate(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.base.reset();
    }
}

impl MutEventSubscriber for Balloon {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            let Event::Queue(index) = event else { continue };
            let Some((memory, queue)) = self.base.queue(index) else { continue };
            queue.serve(memory, |chain| match index {
                REPORTS => chain.writable.discard().map(|()| 0),
                _ => Ok(0),
            });
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.base.init(ops);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, READ, WRITE};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn reported_pages_are_given_back_and_nothing_else() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.activate(PAGE_REPORTING);
        bench.memory.write_slice(&[7; 4 * 4096], GuestAddress(0x40_0000)).unwrap();
        // Two whole pages, and two pieces of which only the inner page is whole.
        bench.offer(REPORTS, &[(0x40_0000, 4096, WRITE), (0x40_1800, 0x2000, WRITE)]);
        assert_eq!(bench.used(REPORTS), Some((0, 0)));
        assert_eq!(bench.bytes(0x40_0000, 4096), [0; 4096]);
        assert_eq!(bench.bytes(0x40_1000, 4096), [7; 4096]);
        assert_eq!(bench.bytes(0x40_2000, 4096), [0; 4096]);
        assert_eq!(bench.bytes(0x40_3000, 4096), [7; 4096]);
        bench.offer(REPORTS, &[(0x40_3000, 4096, READ)]);
        assert_eq!(bench.used(REPORTS), Some((0, 0)));
        assert_eq!(bench.bytes(0x40_3000, 4096), [7; 4096]);
    }

    #[test]
    fn malformed_chains_come_back() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.activate(PAGE_REPORTING);
        bench.offer_hostile(REPORTS);
        bench.offer(0, &[(0x40_0000, 64, READ)]);
        assert_eq!(bench.used(0), Some((0, 0)));
    }
}
