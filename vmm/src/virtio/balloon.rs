//! virtio-balloon (virtio 1.2, 5.5) for one purpose: the guest reports pages that it does not use (5.5.6.7), and the
//! host gets their memory back. The guest touches such a page again when it needs it, and finds zeros.
//!
//! Wiring: `Balloon::new()`.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::queue::DeviceQueue;
use super::simple::{Answer, Simple};
use crate::memory::GuestMemory;

/// The queue of reports.
const REPORTS: usize = 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING, 5.5.3.
const PAGE_REPORTING: u64 = 1 << 5;

/// The device.
pub struct Balloon;

impl Balloon {
    /// A balloon that stays empty.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Simple<Self>> {
        Simple::new(Self)
    }
}

impl Answer for Balloon {
    const NAME: &'static str = "balloon";
    const TYPE: u32 = VIRTIO_ID_BALLOON;
    const FEATURES: u64 = PAGE_REPORTING;
    /// The inflate and deflate queues, which nobody uses since no size is asked for, and the queue of reports.
    const QUEUE_SIZES: &'static [u16] = &[64, 64, 64];

    fn answer(&mut self, index: usize, memory: &GuestMemory, queue: &mut DeviceQueue) {
        queue.serve(memory, |chain| match index {
            REPORTS => chain.writable.discard().map(|()| 0),
            _ => Ok(0),
        });
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
