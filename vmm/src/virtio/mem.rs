//! virtio-mem (virtio 1.2, 5.15): memory beyond the machine's base, plugged and unplugged in blocks while it runs.
//!
//! The host asks for an amount, the guest plugs or unplugs blocks until that is what it has. What is not plugged cannot
//! be accessed: a guest that tries ends its VM.
//!
//! Wiring: `Mem::new(region, on_plugged)`, where `region` is a range of guest memory.

use std::io;
use std::ops::Range;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::{Le16, Le64};

use super::base::{self, Base, Event};
use super::chain::Chain;
use super::{Activation, VirtioDevice};
use crate::memory::Pluggable;

const QUEUE_SIZES: [u16; 1] = [64];
const REQUESTS: usize = 0;
/// What is plugged or unplugged at once. Linux takes no less than its page blocks of 2 MiB.
const BLOCK: u64 = 2 << 20;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE, 5.15.3.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Requests, 5.15.6.
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// Responses, 5.15.6.
mod response {
    pub const ACK: u16 = 0;
    pub const NACK: u16 = 1;
    pub const ERROR: u16 = 3;
}

/// States of a range, 5.15.6.6.
mod state {
    pub const PLUGGED: u16 = 0;
    pub const UNPLUGGED: u16 = 1;
    pub const MIXED: u16 = 2;
}

/// Called with how many bytes are plugged, once that is what was asked for.
pub type OnPlugged = Box<dyn FnMut(u64) + Send>;

/// The device.
pub struct Mem {
    base: Base,
    blocks: Blocks,
    on_plugged: OnPlugged,
    /// Whether it has been called for the last request.
    done: bool,
}

impl Mem {
    /// Nothing is plugged, and nothing asked for.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(region: Pluggable, on_plugged: OnPlugged) -> io::Result<Self> {
        let plugged = vec![false; (region.size() / BLOCK) as usize];
        Ok(Self {
            base: Base::new("mem")?,
            blocks: Blocks { region, plugged, requested: 0 },
            on_plugged,
            done: false,
        })
    }

    /// Asks the guest to have this many bytes plugged, in whole blocks and as far as the region goes.
    pub fn request(&mut self, bytes: u64) {
        let most = self.blocks.plugged.len() as u64 * BLOCK;
        self.blocks.requested = bytes.min(most).next_multiple_of(BLOCK);
        self.done = false;
        self.base.config_changed();
        self.notify();
    }

    fn notify(&mut self) {
        let bytes = self.blocks.plugged_bytes();
        if bytes == self.blocks.requested && !std::mem::replace(&mut self.done, true) {
            (self.on_plugged)(bytes);
        }
    }
}

/// The region's blocks.
struct Blocks {
    region: Pluggable,
    /// One for each.
    plugged: Vec<bool>,
    /// Bytes.
    requested: u64,
}

impl Blocks {
    fn plugged_bytes(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK
    }

    /// The blocks from an address, if they are whole ones inside the region.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.region.start())?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (offset.is_multiple_of(BLOCK) && count > 0 && end <= self.plugged.len()).then_some(first..end)
    }

    /// The response to a request, and the state that the range was in.
    fn answer(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        if kind == request::UNPLUG_ALL {
            return (self.set(0..self.plugged.len(), false), 0);
        }
        let Some(range) = self.range(address, count) else { return (response::ERROR, 0) };
        let blocks = &self.plugged[range.clone()];
        let (all, none) = (blocks.iter().all(|plugged| *plugged), blocks.iter().all(|plugged| !plugged));
        let wanted = self.plugged_bytes() + u64::from(count) * BLOCK;
        let response = match kind {
            request::PLUG if none && wanted > self.requested => response::NACK,
            request::PLUG if none => self.set(range, true),
            request::UNPLUG if all => self.set(range, false),
            request::STATE => response::ACK,
            _ => response::ERROR,
        };
        let state = match (all, none) {
            (true, _) => state::PLUGGED,
            (_, true) => state::UNPLUGGED,
            _ => state::MIXED,
        };
        (response, state)
    }

    fn set(&mut self, range: Range<usize>, plugged: bool) -> u16 {
        let (offset, length) = (range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
        let (region, blocks) = (&self.region, &mut self.plugged[range]);
        match if plugged { region.open(offset, length) } else { region.shut(offset, length) } {
            Ok(()) => {
                blocks.fill(plugged);
                response::ACK
            }
            Err(error) => {
                log::error!("mem: {} MiB at {offset:#x}: {error}", length >> 20);
                response::ERROR
            }
        }
    }

    fn serve(&mut self, mut chain: Chain<'_>) -> Result<u32, Error> {
        let mut words = [0; 4].map(|_: u16| chain.readable.read::<Le16>().map(Le16::to_native));
        let kind = words[0].take().ok_or(Error::Short)?;
        let address = chain.readable.read::<Le64>().map(Le64::to_native);
        let count = chain.readable.read::<Le16>().map(Le16::to_native);
        let (address, count) = address.zip(count).ok_or(Error::Short)?;
        let (response, state) = self.answer(kind, address, count);
        let mut answer = [0; 10];
        answer[..2].copy_from_slice(&response.to_le_bytes());
        answer[8..].copy_from_slice(&state.to_le_bytes());
        // A driver may leave out what it does not ask for.
        match chain.writable.write_bytes(&answer) {
            0..2 => Err(Error::NoAnswer),
            length => Ok(length as u32),
        }
    }
}

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a request that is too short")]
    Short,
    #[error("a request without room for the answer")]
    NoAnswer,
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// 5.15.4: block size, node (there is one), start and size of the region, what of it can be used (all), what is
    /// plugged, and what is asked for.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Blocks { region, requested, .. } = &self.blocks;
        let plugged = self.blocks.plugged_bytes();
        let fields = [BLOCK, 0, region.start(), region.size(), region.size(), plugged, *requested];
        base::read_config(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.base.activate(activation);
        Ok(())
    }

    /// What is plugged stays so, 5.15.5.1.
    fn reset(&mut self) {
        self.base.reset();
    }
}

impl MutEventSubscriber for Mem {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            if let Event::Queue(REQUESTS) = event
                && let Some((memory, queue)) = self.base.queue(REQUESTS)
            {
                let blocks = &mut self.blocks;
                queue.serve(memory, |chain| blocks.serve(chain));
                self.notify();
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
    use crate::memory;
    use crate::virtio::testing::{Bench, READ, WRITE};
    use std::sync::{Arc, Mutex};

    const MIB: u64 = 1 << 20;

    fn bench() -> (Bench<Mem>, u64, Arc<Mutex<Vec<u64>>>) {
        let range = memory::pluggable_range(32, MIB, 128).unwrap();
        let region = Pluggable::new(memory::create(32, Some(range)).unwrap(), range).unwrap();
        let reported = Arc::new(Mutex::new(Vec::new()));
        let list = reported.clone();
        let mut bench =
            Bench::new(Mem::new(region, Box::new(move |bytes| list.lock().unwrap().push(bytes))).unwrap());
        bench.activate(UNPLUGGED_INACCESSIBLE);
        (bench, range.0, reported)
    }

    /// Response and state.
    fn ask(bench: &mut Bench<Mem>, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        let request = bench.data(&bytes);
        let answer = bench.data(&[0xff; 16]);
        bench.offer(REQUESTS, &[(request, 24, READ), (answer, 10, WRITE)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 10)));
        let bytes = bench.bytes(answer, 10);
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    fn config(bench: &Bench<Mem>, field: u64) -> u64 {
        u64::from_le_bytes(bench.config(8 * field, 8).try_into().unwrap())
    }

    #[test]
    fn memory_comes_and_goes_as_it_is_asked_for() {
        let (mut bench, start, reported) = bench();
        assert_eq!(ask(&mut bench, request::PLUG, start, 1).0, response::NACK);
        bench.device().request(5 * MIB);
        assert_eq!((bench.config_interrupts(), config(&bench, 6)), (1, 6 * MIB));
        assert_eq!(ask(&mut bench, request::PLUG, start, 2).0, response::ACK);
        assert_eq!(*reported.lock().unwrap(), [0]);
        assert_eq!(ask(&mut bench, request::PLUG, start + 4 * MIB, 1).0, response::ACK);
        assert_eq!(*reported.lock().unwrap(), [0, 6 * MIB]);
        assert_eq!(config(&bench, 5), 6 * MIB);
        assert_eq!(ask(&mut bench, request::PLUG, start + 6 * MIB, 1).0, response::NACK);
        assert_eq!(ask(&mut bench, request::STATE, start, 3), (response::ACK, state::PLUGGED));
        assert_eq!(ask(&mut bench, request::STATE, start, 4), (response::ACK, state::MIXED));
        assert_eq!(ask(&mut bench, request::STATE, start + 8 * MIB, 4), (response::ACK, state::UNPLUGGED));
        bench.device().request(2 * MIB);
        assert_eq!(ask(&mut bench, request::UNPLUG, start, 2).0, response::ACK);
        assert_eq!(*reported.lock().unwrap(), [0, 6 * MIB, 2 * MIB]);
        assert_eq!(ask(&mut bench, request::UNPLUG_ALL, 0, 0).0, response::ACK);
        assert_eq!(config(&bench, 5), 0);
        bench.device().request(u64::MAX);
        assert_eq!(config(&bench, 6), 128 * MIB);
    }

    #[test]
    fn ranges_that_are_not_there_are_errors() {
        let (mut bench, start, _) = bench();
        bench.device().request(128 * MIB);
        let outside = [
            (start - 2 * MIB, 1),
            (start + MIB, 1),
            (start, 0),
            (start, 65),
            (start + 126 * MIB, 2),
            (u64::MAX, u16::MAX),
            (0, 1),
        ];
        for (address, count) in outside {
            for kind in [request::PLUG, request::UNPLUG, request::STATE, 77] {
                assert_eq!(
                    ask(&mut bench, kind, address, count).0,
                    response::ERROR,
                    "{kind} {address:#x} {count}"
                );
            }
        }
        assert_eq!(ask(&mut bench, request::UNPLUG, start, 1).0, response::ERROR);
        assert_eq!(ask(&mut bench, request::PLUG, start, 2).0, response::ACK);
        assert_eq!(ask(&mut bench, request::PLUG, start + 2 * MIB, 2).0, response::ERROR);
        assert_eq!(ask(&mut bench, request::UNPLUG, start + 2 * MIB, 2).0, response::ERROR);
    }

    #[test]
    fn malformed_chains_come_back() {
        let (mut bench, ..) = bench();
        bench.offer_hostile(REQUESTS);
        let address = bench.data(&[0; 24]);
        bench.offer(REQUESTS, &[(address, 12, READ), (address + 16, 8, WRITE)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 0)));
        bench.offer(REQUESTS, &[(address, 24, READ)]);
        assert_eq!(bench.used(REQUESTS), Some((0, 0)));
    }
}
