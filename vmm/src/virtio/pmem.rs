//! virtio-pmem (virtio 1.2, 5.19): announces to the guest where its image lies in its physical memory.
//!
//! Wiring: `Pmem::new(start, size)`, where `size` bytes from guest address `start` are a read-only KVM slot of the
//! mapped image.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::Le32;

use super::chain::Chain;
use super::queue::DeviceQueue;
use super::simple::{Answer, Simple};
use crate::memory::GuestMemory;

/// The only request, virtio 1.2, 5.19.6.
const TYPE_FLUSH: u32 = 0;

/// The image's device.
pub struct Pmem {
    config: [u8; 16],
}

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a request without a type")]
    NoType,
    #[error("a request without room for the answer")]
    NoAnswer,
}

impl Pmem {
    /// The image lies at guest address `start`.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(start: u64, size: u64) -> io::Result<Simple<Self>> {
        let mut config = [0; 16];
        let (low, high) = config.split_at_mut(8);
        low.copy_from_slice(&start.to_le_bytes());
        high.copy_from_slice(&size.to_le_bytes());
        Simple::new(Self { config })
    }
}

/// The image is read-only, so a flush has nothing to do.
fn answer(mut chain: Chain<'_>) -> Result<u32, Error> {
    let kind = chain.readable.read::<Le32>().ok_or(Error::NoType)?.to_native();
    let result: u32 = if kind == TYPE_FLUSH { 0 } else { u32::MAX };
    match chain.writable.write_bytes(&result.to_le_bytes()) {
        4 => Ok(4),
        _ => Err(Error::NoAnswer),
    }
}

impl Answer for Pmem {
    const NAME: &'static str = "pmem";
    const TYPE: u32 = VIRTIO_ID_PMEM;
    const QUEUE_SIZES: &'static [u16] = &[64];

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn answer(&mut self, _index: usize, memory: &GuestMemory, queue: &mut DeviceQueue) {
        queue.serve(memory, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::VirtioDevice;
    use crate::virtio::testing::{Bench, READ, WRITE};

    const REQUESTS: usize = 0;

    #[test]
    fn says_where_the_image_is() {
        let pmem = Pmem::new(0x1_0000_0000, 0x20_0000).unwrap();
        let mut config = [0xff; 20];
        pmem.read_config(0, &mut config);
        assert_eq!(config[..8], 0x1_0000_0000_u64.to_le_bytes());
        assert_eq!(config[8..16], 0x20_0000_u64.to_le_bytes());
        assert_eq!(config[16..], [0; 4]);
        pmem.read_config(u64::MAX, &mut config);
        assert_eq!(config, [0; 20]);
    }

    #[test]
    fn flush_succeeds_and_anything_else_fails() {
        let mut bench = Bench::new(Pmem::new(0, 0).unwrap());
        bench.activate(0);
        for (kind, result) in [(0_u32, 0_u32), (1, u32::MAX)] {
            let at = bench.data(&kind.to_le_bytes());
            bench.offer(REQUESTS, &[(at, 4, READ), (0x20_0000, 4, WRITE)]);
            assert_eq!(bench.used(REQUESTS), Some((0, 4)));
            assert_eq!(bench.bytes(0x20_0000, 4), result.to_le_bytes());
        }
    }

    #[test]
    fn malformed_requests_come_back() {
        let mut bench = Bench::new(Pmem::new(0, 0).unwrap());
        bench.activate(0);
        bench.offer_hostile(REQUESTS);
        for short in
            [&[(0x10_0000, 3, READ), (0x20_0000, 4, WRITE)][..], &[(0x10_0000, 4, READ)], &[(0, 3, WRITE)]]
        {
            bench.offer(REQUESTS, short);
            assert_eq!(bench.used(REQUESTS), Some((0, 0)));
        }
    }
}
