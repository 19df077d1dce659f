//! virtio-rng (virtio 1.2, 5.4): the host's random numbers for the guest.
//!
//! Wiring: `Rng::new()`.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::base::{Base, Event};
use super::{Activation, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
const REQUESTS: usize = 0;
/// Most bytes for one request. Descriptors may overlap: without a limit, a small request for the guest would be
/// gigabytes of work for the host.
const LONGEST_ANSWER: usize = 64 * 1024;

/// The source of entropy.
pub struct Rng {
    base: Base,
}

impl Rng {
    /// An entropy device.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { base: Base::new("rng")? })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

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

impl MutEventSubscriber for Rng {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            if let Event::Queue(REQUESTS) = event
                && let Some((memory, queue)) = self.base.queue(REQUESTS)
            {
                queue.serve(memory, |chain| {
                    chain.writable.fill_random(LONGEST_ANSWER).map(|count| count as u32)
                });
            }
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

    #[test]
    fn fills_what_is_writable() {
        let mut bench = Bench::new(Rng::new().unwrap());
        bench.activate(0);
        bench.offer(REQUESTS, &[(0x10_0000, 40, WRITE), (0x20_0000, 24, WRITE)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 64)));
        let (first, second) = (bench.bytes(0x10_0000, 40), bench.bytes(0x20_0000, 32));
        assert!(first.iter().any(|byte| *byte != 0) && second[..24].iter().any(|byte| *byte != 0));
        assert_eq!(second[24..], [0; 8]);
    }

    #[test]
    fn a_request_is_bounded_and_a_read_only_one_gets_nothing() {
        let mut bench = Bench::new(Rng::new().unwrap());
        bench.activate(0);
        bench.offer(REQUESTS, &[(0x10_0000, 0x8000, WRITE); 60]);
        assert_eq!(bench.used(REQUESTS), Some((0, LONGEST_ANSWER as u32)));
        bench.offer(REQUESTS, &[(0x10_0000, 64, READ)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 0)));
    }

    #[test]
    fn malformed_chains_come_back() {
        let mut bench = Bench::new(Rng::new().unwrap());
        bench.activate(0);
        bench.offer_hostile(REQUESTS);
        bench.offer(REQUESTS, &[(0x10_0000, 8, WRITE)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 8)));
    }
}
