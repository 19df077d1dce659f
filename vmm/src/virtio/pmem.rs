//! virtio-pmem (virtio 1.2, 5.19): tells the guest where its image lies in its physical memory.
//!
//! Wiring: `Pmem::new(start, size)`, where `size` bytes from guest address `start` are a read-only KVM slot of the
//! mapped image.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::Le32;

use super::base::{self, Base, Event};
use super::chain::Chain;
use super::{Activation, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
const REQUESTS: usize = 0;
/// The only request, virtio 1.2, 5.19.6.
const TYPE_FLUSH: u32 = 0;

/// The image's device.
pub struct Pmem {
    base: Base,
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
    pub fn new(start: u64, size: u64) -> io::Result<Self> {
        let mut config = [0; 16];
        let (low, high) = config.split_at_mut(8);
        low.copy_from_slice(&start.to_le_bytes());
        high.copy_from_slice(&size.to_le_bytes());
        Ok(Self { base: Base::new("pmem")?, config })
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

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.base.activate(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.base.reset();
    }
}

impl MutEventSubscriber for Pmem {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            if let Event::Queue(REQUESTS) = event
                && let Some((memory, queue)) = self.base.queue(REQUESTS)
            {
                queue.serve(memory, answer);
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
