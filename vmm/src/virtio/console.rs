//! virtio-console with one port that only prints (virtio 1.2, 5.3): the guest's hvc0.
//!
//! Wiring: `Console::new(sink)`; the sink is called on the device thread with what the guest prints.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::chain::Buffers;
use super::queue::DeviceQueue;
use super::simple::{Answer, Simple};
use crate::memory::GuestMemory;

/// Where the console's output goes.
pub type ConsoleSink = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What the guest prints.
const TRANSMIT: usize = 1;
/// Longest output taken from one chain. Linux sends a page at most; without a limit, descriptors that all name
/// the same memory would keep the device thread busy for gigabytes.
const LONGEST_OUTPUT: usize = 64 * 1024;

/// The console.
pub struct Console {
    sink: ConsoleSink,
}

impl Console {
    /// A console that prints to `sink`.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(sink: ConsoleSink) -> io::Result<Simple<Self>> {
        Simple::new(Self { sink })
    }
}

fn print(mut output: Buffers<'_>, sink: &ConsoleSink) {
    output.truncate(LONGEST_OUTPUT);
    let mut bytes = [0; 4096];
    while !output.is_empty() {
        let count = output.read_bytes(&mut bytes);
        sink(bytes.get(..count).unwrap_or_default());
    }
}

impl Answer for Console {
    const NAME: &'static str = "console";
    const TYPE: u32 = VIRTIO_ID_CONSOLE;
    /// Receive and transmit. Nothing is ever typed, so the buffers of the first stay with the device.
    const QUEUE_SIZES: &'static [u16] = &[64, 64];

    fn answer(&mut self, index: usize, memory: &GuestMemory, queue: &mut DeviceQueue) {
        if index == TRANSMIT {
            queue.serve(memory, |chain| {
                print(chain.readable, &self.sink);
                Ok::<_, Infallible>(0)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, READ, WRITE};
    use std::sync::Mutex;

    fn bench() -> (Bench<Simple<Console>>, Arc<Mutex<Vec<u8>>>) {
        let printed = Arc::new(Mutex::new(Vec::new()));
        let sink = printed.clone();
        let console = Console::new(Arc::new(move |bytes: &[u8]| sink.lock().unwrap().extend(bytes))).unwrap();
        (Bench::new(console), printed)
    }

    #[test]
    fn prints_what_the_guest_transmits() {
        let (mut bench, printed) = bench();
        bench.activate(0);
        let at = bench.data(b"hello, world\n");
        bench.offer(TRANSMIT, &[(at, 7, READ), (at + 7, 0, READ), (at + 7, 6, READ)]);
        assert_eq!(bench.used(TRANSMIT), Some((0, 0)));
        assert_eq!(*printed.lock().unwrap(), b"hello, world\n");
        assert_eq!(bench.interrupts(TRANSMIT), 1);
    }

    #[test]
    fn malformed_chains_come_back_and_the_next_one_is_printed() {
        let (mut bench, printed) = bench();
        bench.activate(0);
        bench.offer_hostile(TRANSMIT);
        let at = bench.data(b"still there");
        bench.offer(TRANSMIT, &[(at, 11, READ)]);
        assert_eq!(*printed.lock().unwrap(), b"still there");
    }

    #[test]
    fn output_of_one_chain_is_bounded() {
        let (mut bench, printed) = bench();
        bench.activate(0);
        let same = [(0x10_0000, 0x8000, READ); 60];
        bench.offer(TRANSMIT, &same);
        assert_eq!(bench.used(TRANSMIT), Some((0, 0)));
        assert_eq!(printed.lock().unwrap().len(), LONGEST_OUTPUT);
        bench.offer(TRANSMIT, &[(0x10_0000, 10, WRITE)]);
        assert_eq!(printed.lock().unwrap().len(), LONGEST_OUTPUT);
    }

    #[test]
    fn reset_ends_service_and_activation_brings_it_back() {
        let (mut bench, printed) = bench();
        bench.activate(0);
        bench.reset();
        let at = bench.data(b"x");
        bench.offer(TRANSMIT, &[(at, 1, READ)]);
        assert_eq!(bench.used(TRANSMIT), None);
        bench.activate(0);
        bench.offer(TRANSMIT, &[(at, 1, READ)]);
        assert_eq!(*printed.lock().unwrap(), b"x");
    }

    #[test]
    fn a_broken_ring_ends_service() {
        let (mut bench, printed) = bench();
        bench.activate(0);
        bench.break_ring(TRANSMIT);
        let at = bench.data(b"x");
        bench.offer(TRANSMIT, &[(at, 1, READ)]);
        assert!(printed.lock().unwrap().is_empty());
    }
}
