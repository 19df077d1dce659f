//! virtio-rng (virtio 1.2, 5.4): the host's random numbers for the guest.
//!
//! Wiring: `Rng::new()`.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::queue::DeviceQueue;
use super::simple::{Answer, Simple};
use crate::memory::GuestMemory;

/// Most bytes for one request. Descriptors may overlap: without a limit, a small request for the guest would be
/// gigabytes of work for the host.
const LONGEST_ANSWER: usize = 64 * 1024;

/// The source of entropy.
pub struct Rng;

impl Rng {
    /// An entropy device.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Simple<Self>> {
        Simple::new(Self)
    }
}

impl Answer for Rng {
    const NAME: &'static str = "rng";
    const TYPE: u32 = VIRTIO_ID_RNG;
    const QUEUE_SIZES: &'static [u16] = &[64];

    fn answer(&mut self, _index: usize, memory: &GuestMemory, queue: &mut DeviceQueue) {
        queue.serve(memory, |chain| chain.writable.fill_random(LONGEST_ANSWER).map(|count| count as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, READ, WRITE};

    const REQUESTS: usize = 0;

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
