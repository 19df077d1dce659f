//! A driver's side for tests: a device in a real event manager, with real queues in real memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};
use vmm_sys_util::tempdir::TempDir;

use super::{Activation, Interrupt, Trigger, VirtQueue, VirtioDevice};
use crate::memory::GuestMemory;

/// Bytes of guest memory.
pub const MEMORY: usize = 16 << 20;
/// Flag of a descriptor that the device reads.
pub const READ: u16 = 0;
/// Flag of a descriptor that the device writes.
pub const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
/// Where `data` puts things.
const DATA: u64 = 8 << 20;
/// From one queue's rings to the next one's; they start at 0.
const QUEUE_SPACE: u64 = 0x2_0000;

/// One heap for all threads, as in `main.rs`. For those of a thread's own, the C library looks around in /proc and /sys,
/// which filters do not allow.
#[used]
// SAFETY: what is in this section are functions, which are called before there are threads.
#[unsafe(link_section = ".init_array")]
static ONE_HEAP: extern "C" fn() = one_heap;

extern "C" fn one_heap() {
    // SAFETY: mallopt takes two integers, and no other thread exists yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Address, length, flags.
pub type Piece = (u64, u32, u16);

#[derive(Default)]
struct Counter(AtomicUsize);

impl Trigger for Counter {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn interrupt() -> (Interrupt, Arc<Counter>) {
    let counter = Arc::new(Counter::default());
    (Interrupt { vector: counter.clone() }, counter)
}

/// The driver's side of one queue.
pub struct Ring {
    memory: GuestMemory,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
    pub kick: Arc<EventFd>,
    interrupts: Arc<Counter>,
}

impl Ring {
    /// Empty rings in guest memory from `base`, and the device's side of them.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> (Self, VirtQueue) {
        memory.write_slice(&vec![0; QUEUE_SPACE as usize], GuestAddress(base)).unwrap();
        let mock = MockSplitQueue::create(memory, GuestAddress(base), size);
        let mut queue: Queue = mock.create_queue().unwrap();
        let avail = mock.avail_addr().0;
        // The mock leaves no room between its rings for what follows the entries.
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        queue.set_used_ring_address(Some(used as u32), Some(0));
        assert!(queue.is_valid(memory) && used + 6 + 8 * u64::from(size) < base + QUEUE_SPACE);
        let kick = Arc::new(EventFd::new(EFD_CLOEXEC).unwrap());
        let (interrupt, interrupts) = interrupt();
        let (memory, table) = (memory.clone(), mock.desc_table_addr().0);
        let ring = Self {
            memory,
            size,
            table,
            avail,
            used,
            next_avail: 0,
            next_used: 0,
            kick: kick.clone(),
            interrupts,
        };
        (ring, VirtQueue { queue, kick, interrupt })
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Writes one descriptor.
    pub fn describe(&self, index: u16, (address, length, flags): Piece, next: u16) {
        let at = self.table + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Writes a chain whose descriptors start at `head`.
    pub fn chain(&self, head: u16, pieces: &[Piece]) {
        for (index, (address, length, flags)) in (head..).zip(pieces) {
            let last = index + 1 == head + pieces.len() as u16;
            let flags = if last { *flags } else { flags | NEXT };
            self.describe(index, (*address, *length, flags), index + 1);
        }
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, head: u16) {
        self.put(self.avail + 4 + 2 * u64::from(self.next_avail % self.size), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.put(self.avail + 2, self.next_avail);
    }

    /// Claims that the chains up to this index are available.
    pub fn claim(&self, index: u16) {
        self.put(self.avail + 2, index);
    }

    /// How many chains are returned and not yet looked at.
    pub fn peek_used(&self) -> u16 {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        index.wrapping_sub(self.next_used)
    }

    /// What another processor of the guest does all the time: makes the chain at 0 available as often as there is room
    /// for it, until it is stopped or has done so very often; returns whether it was stopped.
    pub fn publish_for_ever(&self, stop: Arc<AtomicBool>) -> impl FnOnce() -> bool + Send + use<> {
        let (memory, size, avail, used) = (self.memory.clone(), self.size, self.avail, self.used);
        move || {
            let read = |at| memory.read_obj::<u16>(GuestAddress(at + 2)).unwrap();
            for _ in 0..20_000_000 {
                if stop.load(Ordering::Relaxed) {
                    return true;
                }
                memory.write_obj(read(used).wrapping_add(size), GuestAddress(avail + 2)).unwrap();
            }
            false
        }
    }

    /// The next returned chain: head and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.peek_used() == 0 {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let [head, length]: [u32; 2] =
            [0, 4].map(|field| self.memory.read_obj(GuestAddress(at + field)).unwrap());
        Some((head as u16, length))
    }

    /// Chains whose every one breaks a rule; their heads are 0, 4, 8 and so on.
    pub fn write_hostile(&mut self) -> usize {
        let end = MEMORY as u64;
        let size = self.size;
        // A loop of two, a loop of one.
        self.describe(0, (DATA, 16, NEXT), 1);
        self.describe(1, (DATA, 16, NEXT), 0);
        self.describe(4, (DATA, 16, NEXT | WRITE), 4);
        // A successor beyond the table.
        self.describe(8, (DATA, 16, NEXT), size);
        // Memory that is not there: beyond the end, across it, around 2^64.
        self.describe(12, (end, 16, READ), 0);
        self.describe(16, (end - 8, 16, WRITE), 0);
        self.describe(20, (u64::MAX - 7, 16, READ), 0);
        // A gigantic one.
        self.describe(24, (DATA, u32::MAX, WRITE), 0);
        // Written before read.
        self.describe(28, (DATA, 16, NEXT | WRITE), 29);
        self.describe(29, (DATA, 16, READ), 0);
        // Indirect tables: outside memory, empty, of odd length, one in itself.
        self.describe(32, (end, 32, INDIRECT), 0);
        self.describe(36, (DATA, 0, INDIRECT), 0);
        self.describe(40, (DATA, 17, INDIRECT), 0);
        self.describe(44, (self.table + 16 * 44, 16, INDIRECT), 0);
        // An indirect table with more descriptors than any driver needs: they all lead to the next.
        let table = 4 << 20;
        for index in 0..2000_u16 {
            let at = table + 16 * u64::from(index);
            self.put(at, DATA);
            self.put(at + 8, 1_u32);
            self.put(at + 12, NEXT | WRITE);
            self.put(at + 14, index + 1);
        }
        self.describe(48, (table, 16 * 2000, INDIRECT), 0);
        (0..13).for_each(|index| self.publish(4 * index));
        13
    }
}

/// Waits for what another thread does.
pub fn wait_until<T>(what: &str, mut is_there: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(there) = is_there() {
            return there;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{what}: not within ten seconds");
        if start.elapsed() > Duration::from_millis(1) {
            thread::sleep(Duration::from_millis(1));
        } else {
            thread::yield_now();
        }
    }
}

/// A file system of so many pages, which this thread and those that it starts see.
pub fn small_file_system(pages: usize) -> TempDir {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let dir = TempDir::new().unwrap();
    let options = format!("size={}", pages * 4096);
    mount(Some("small"), dir.as_path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
    dir
}

/// A device with its driver.
pub struct Bench<D> {
    pub device: Arc<Mutex<D>>,
    pub memory: GuestMemory,
    pub rings: Vec<Ring>,
    manager: EventManager<Arc<Mutex<D>>>,
    config_interrupts: Option<Arc<Counter>>,
    next_data: u64,
}

impl<D: VirtioDevice + MutEventSubscriber> Bench<D> {
    pub fn new(device: D) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let device = Arc::new(Mutex::new(device));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(device.clone());
        Self { device, memory, rings: Vec::new(), manager, config_interrupts: None, next_data: DATA }
    }

    pub fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    /// New rings for all queues, as after a reset.
    pub fn activate(&mut self, features: u64) {
        let sizes = self.device().queue_sizes().to_vec();
        let layout = (0..).step_by(QUEUE_SPACE as usize).zip(sizes);
        let (rings, queues) = layout.map(|(base, size)| Ring::new(&self.memory, base, size)).unzip();
        self.rings = rings;
        let (config_interrupt, counter) = interrupt();
        self.config_interrupts = Some(counter);
        let memory = self.memory.clone();
        self.device().activate(Activation { memory, features, queues, config_interrupt }).unwrap();
        self.run();
    }

    /// Resets the device, and waits until it is at rest.
    pub fn reset(&mut self) {
        self.device().reset();
        self.run();
        wait_until("the device is at rest", || self.device().at_rest().then_some(()));
    }

    /// Lets the device thread work until it has nothing more to do.
    pub fn run(&mut self) {
        assert!(self.wake_ups(100_000) < 100_000, "it never rests");
    }

    /// How many times the device thread is woken before it has nothing more to do, or as many as `most`.
    pub fn wake_ups(&mut self, most: usize) -> usize {
        (0..most).take_while(|_| self.manager.run_with_timeout(0).unwrap() > 0).count()
    }

    /// Like `run`, but waits a moment for something to happen.
    pub fn wait(&mut self) {
        self.manager.run_with_timeout(100).unwrap();
        self.run();
    }

    /// Puts bytes somewhere into guest memory.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next_data;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.next_data += (bytes.len() as u64).next_multiple_of(16);
        at
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Makes one chain available, whose head is descriptor 0, and lets the device work.
    pub fn offer(&mut self, queue: usize, pieces: &[Piece]) {
        self.rings[queue].chain(0, pieces);
        self.rings[queue].publish(0);
        self.kick(queue);
    }

    pub fn kick(&mut self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
        self.run();
    }

    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        self.rings[queue].used()
    }

    /// The next returned chain, for which it waits: a device may have threads.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        wait_until("a chain comes back", || self.rings[queue].used())
    }

    /// Offers chains that break the rules and checks that all come back empty.
    pub fn offer_hostile(&mut self, queue: usize) {
        let count = self.rings[queue].write_hostile();
        self.kick(queue);
        for index in 0..count {
            assert_eq!(self.wait_used(queue), (4 * index as u16, 0));
        }
        assert_eq!(self.used(queue), None);
    }

    /// Claims more available chains than the ring has entries.
    pub fn break_ring(&mut self, queue: usize) {
        let ring = &mut self.rings[queue];
        ring.next_avail = ring.next_avail.wrapping_add(ring.size + 1);
        ring.put(ring.avail + 2, ring.next_avail);
        self.kick(queue);
    }

    pub fn interrupts(&self, queue: usize) -> usize {
        self.rings[queue].interrupts.0.load(Ordering::Relaxed)
    }

    pub fn config_interrupts(&self) -> usize {
        self.config_interrupts.as_ref().map_or(0, |counter| counter.0.load(Ordering::Relaxed))
    }

    pub fn config(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; length];
        self.device().read_config(offset, &mut bytes);
        bytes
    }
}
