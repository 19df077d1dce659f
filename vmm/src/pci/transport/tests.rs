use super::super::common::{Effect, QueueError, TRANSPORT_FEATURES, status};
use super::super::layout::{BAR_SIZE, CAPABILITY_VENDOR, kind};
use super::super::msix::tests::{Call, Recorder};
use super::*;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::io;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

const MEMORY: usize = 0x10_0000;
const QUEUES: &[u16] = &[256, 64];

#[derive(Default)]
struct Device {
    active: Option<Activation>,
    resets: usize,
    refuse: bool,
    busy: bool,
    written: Vec<(u64, Vec<u8>)>,
}

impl MutEventSubscriber for Device {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
    fn init(&mut self, _: &mut EventOps<'_>) {}
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }
    fn busy_queues(&self) -> &[usize] {
        &[1]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.refuse {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.active = None;
        self.resets += 1;
    }
    fn at_rest(&self) -> bool {
        !self.busy
    }
}

struct Bench {
    function: VirtioPci,
    device: Arc<Mutex<Device>>,
    lines: Vec<Recorder>,
}

fn bench() -> Bench {
    let device = Arc::new(Mutex::new(Device::default()));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let lines: Vec<Recorder> = (0..vectors(QUEUES.len())).map(|_| Recorder::default()).collect();
    let boxed = lines.iter().map(|line| Box::new(line.clone()) as Box<dyn Line>).collect();
    let function = VirtioPci::new(device.clone(), memory, 0xe000_0000, boxed).unwrap();
    Bench { function, device, lines }
}

impl Bench {
    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.read(offset, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.get::<1>(0x14)[0]
    }

    fn negotiate(&self, features: u64) {
        self.function.write(0x14, &[1]);
        self.function.write(0x14, &[3]);
        for half in 0..2u32 {
            self.function.write(0x08, &half.to_le_bytes());
            self.function.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.function.write(0x14, &[3 | status::FEATURES_OK]);
    }

    fn set_up_queue(&self, queue: u16, size: u16, [descriptors, driver, device]: [u64; 3]) {
        self.function.write(0x16, &queue.to_le_bytes());
        self.function.write(0x18, &size.to_le_bytes());
        self.function.write(0x1a, &queue.to_le_bytes());
        self.function.write(0x20, &descriptors.to_le_bytes());
        self.function.write(0x28, &(driver as u32).to_le_bytes());
        self.function.write(0x2c, &((driver >> 32) as u32).to_le_bytes());
        self.function.write(0x30, &device.to_le_bytes());
        self.function.write(0x1c, &[1, 0]);
    }

    fn driver_ok(&self) {
        self.function.write(0x14, &[3 | status::FEATURES_OK | status::DRIVER_OK]);
    }

    fn enable_msix(&self) {
        for vector in 0..self.lines.len() as u64 {
            self.function.write(TABLE + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            self.function.write(TABLE + 16 * vector + 8, &(0x40 + vector).to_le_bytes());
        }
        let control = self.function.msix_capability + 2;
        self.function.write_config(control, &0x8000u16.to_le_bytes());
    }
}

const ALL: u64 = TRANSPORT_FEATURES | 1 << 5;
const GOOD: [u64; 3] = [0x1000, 0x3000, 0x4000];

#[test]
fn a_driver_brings_the_device_up_and_resets_it() {
    let bench = bench();
    bench.enable_msix();
    bench.function.write(0x10, &2u16.to_le_bytes());
    bench.negotiate(ALL);
    assert_eq!(bench.status(), 11);
    bench.set_up_queue(0, 128, GOOD);
    bench.set_up_queue(1, 64, [0x6000, 0x7000, 0x8000]);
    bench.driver_ok();
    assert_eq!(bench.status(), 15);
    {
        let mut device = lock(&bench.device);
        let active = device.active.as_mut().unwrap();
        assert_eq!((active.features, active.queues.len()), (ALL, 2));
        let queue = &active.queues[0].queue;
        assert_eq!((queue.size(), queue.max_size(), queue.event_idx_enabled()), (128, 256, true));
        assert_eq!([queue.desc_table(), queue.avail_ring(), queue.used_ring()], GOOD);
        active.queues[1].interrupt.trigger();
        assert_eq!(bench.lines[1].take(), [Call::Message(0xfee0_0000, 0x41), Call::Send]);
        active.config_interrupt.trigger();
    }
    assert_eq!(bench.lines[2].take().last(), Some(&Call::Send));
    assert_eq!(bench.get::<1>(0x15), [1], "the configuration's generation");

    bench.function.write(0x14, &[0]);
    assert_eq!((bench.status(), lock(&bench.device).resets), (0, 1));
    assert!(lock(&bench.device).active.is_none());
    bench.function.write(0x16, &[0, 0]);
    assert_eq!(bench.get::<2>(0x1c), [0, 0]);
    assert_eq!(bench.get::<2>(0x18), 256u16.to_le_bytes());
}

#[test]
fn without_msix_the_interrupt_status_is_set_until_it_is_read() {
    let bench = bench();
    bench.negotiate(ALL);
    bench.set_up_queue(0, 128, GOOD);
    bench.driver_ok();
    lock(&bench.device).active.as_ref().unwrap().queues[0].interrupt.trigger();
    assert_eq!(bench.get::<1>(ISR), [ISR_QUEUE]);
    assert_eq!(bench.get::<1>(ISR), [0]);
}

#[test]
fn a_reset_is_over_when_the_device_is_at_rest() {
    let bench = bench();
    bench.negotiate(ALL);
    bench.set_up_queue(0, 128, GOOD);
    bench.driver_ok();
    lock(&bench.device).busy = true;
    bench.function.write(0x14, &[0]);
    assert!(lock(&bench.device).active.is_none());
    assert_eq!(bench.status(), status::NEEDS_RESET);
    lock(&bench.device).busy = false;
    assert_eq!(bench.status(), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let bench = bench();
    bench.negotiate(ALL | 1 << 40);
    assert_eq!(bench.status(), 3);
    bench.driver_ok();
    assert!(lock(&bench.device).active.is_none());

    bench.function.write(0x14, &[0]);
    bench.negotiate(1 << 5);
    assert_eq!(bench.status() & status::FEATURES_OK, 0, "VERSION_1 is not optional");
}

#[test]
fn features_are_fixed_once_accepted() {
    let bench = bench();
    bench.negotiate(ALL);
    bench.function.write(0x0c, &[0; 4]);
    assert_ne!(bench.get::<4>(0x0c), [0; 4]);
}

#[test]
fn bad_queues_stop_the_device() {
    let end = MEMORY as u64;
    for rings in [
        [0x1008, 0x3000, 0x4000],
        [0x1000, 0x3001, 0x4000],
        [0x1000, 0x3000, 0x4002],
        [end - 16, 0x3000, 0x4000],
        [0x1000, end - 2, 0x4000],
        [0x1000, 0x3000, end],
        [0xffff_ffff_ffff_fff0, 0x3000, 0x4000],
        [0x1000, 0x3000, 0xffff_ffff_ffff_fffc],
    ] {
        let bench = bench();
        bench.enable_msix();
        bench.function.write(0x10, &2u16.to_le_bytes());
        bench.negotiate(ALL);
        bench.set_up_queue(0, 256, rings);
        bench.driver_ok();
        assert_eq!(bench.status() & status::NEEDS_RESET, status::NEEDS_RESET, "{rings:#x?}");
        assert!(lock(&bench.device).active.is_none());
        assert_eq!(bench.lines[2].take().last(), Some(&Call::Send));
    }
}

#[test]
fn rings_may_end_where_memory_ends() {
    let bench = bench();
    bench.negotiate(ALL);
    bench.set_up_queue(0, 16, [MEMORY as u64 - 256, 0x3000, 0x4000]);
    bench.driver_ok();
    assert!(lock(&bench.device).active.is_some());
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let bench = bench();
    lock(&bench.device).refuse = true;
    bench.negotiate(ALL);
    bench.set_up_queue(0, 16, GOOD);
    bench.driver_ok();
    assert_eq!(bench.status() & status::NEEDS_RESET, status::NEEDS_RESET);
}

#[test]
fn queues_may_be_left_out_at_the_end_only() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let mut common = CommonConfig::new(0, QUEUES, 3);
    assert_eq!(common.checked_queues(&memory).err(), Some(QueueError::None));
    common.write(0x16, &[1, 0]);
    common.write(0x1c, &[1, 0]);
    assert_eq!(common.checked_queues(&memory).err(), Some(QueueError::Gap(1)));
}

#[test]
fn sizes_and_vectors_out_of_range_are_not_taken() {
    let mut common = CommonConfig::new(0, QUEUES, 3);
    for size in [0u16, 3, 512, u16::MAX] {
        common.write(0x18, &size.to_le_bytes());
    }
    let mut data = [0; 2];
    common.read(0x18, &mut data, 0);
    assert_eq!(data, 256u16.to_le_bytes());
    assert_eq!(common.write(0x1a, &3u16.to_le_bytes()), Effect::Vector(Some(0), NO_VECTOR));
    assert_eq!(common.write(0x10, &2u16.to_le_bytes()), Effect::Vector(None, 2));
}

#[test]
fn a_live_queue_does_not_move() {
    let bench = bench();
    bench.negotiate(ALL);
    bench.set_up_queue(0, 16, GOOD);
    bench.set_up_queue(0, 32, [0; 3]);
    assert_eq!(bench.get::<8>(0x20), 0x1000u64.to_le_bytes());
    assert_eq!(bench.get::<2>(0x18), 16u16.to_le_bytes());
    bench.function.write(0x1c, &[0, 0]);
    assert_eq!(bench.get::<2>(0x1c), [1, 0]);
}

#[test]
fn odd_accesses_everywhere_do_no_harm() {
    let bench = bench();
    bench.negotiate(ALL);
    for offset in (0..u64::from(BAR_SIZE)).step_by(3) {
        for length in [1, 2, 3, 4, 7, 8] {
            // Not the status byte: that one would be a valid access.
            if offset != 0x14 || length != 1 {
                bench.function.write(offset, &vec![0xa5; length]);
                bench.function.read(offset, &mut vec![0; length]);
            }
        }
    }
    for queue in [2u16, 0x7fff, u16::MAX] {
        bench.set_up_queue(queue, 16, GOOD);
        assert_eq!(bench.get::<2>(0x18), [0, 0]);
    }
    for offset in 0..260 {
        bench.function.write_config(offset, &[0xa5; 4]);
        bench.function.read_config(offset, &mut [0; 4]);
    }
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_bar() {
    let bench = bench();
    let window = bench.function.window_capability;
    let aim = |bar: u8, offset: u32, length: u32| {
        bench.function.write_config(window + 4, &[bar]);
        bench.function.write_config(window + 8, &offset.to_le_bytes());
        bench.function.write_config(window + 12, &length.to_le_bytes());
    };
    aim(0, 0x12, 2);
    let mut data = [0; 4];
    bench.function.read_config(window + 16, &mut data);
    assert_eq!(data, [2, 0, 0, 0], "number of queues");

    aim(0, DEVICE as u32 + 8, 4);
    bench.function.write_config(window + 16, &[1, 2, 3, 4]);
    assert_eq!(lock(&bench.device).written, [(8, vec![1, 2, 3, 4])]);

    aim(0, NOTIFY as u32 + 4, 2);
    bench.function.write_config(window + 16, &[1, 0]);
    assert_eq!(bench.function.queues[1].kick.get().unwrap().read().unwrap(), 1);

    for (bar, offset, length) in [(1, 0x12, 2), (0, 0x13, 2), (0, 0x12, 3), (0, BAR_SIZE, 4), (0, 0, 0)] {
        aim(bar, offset, length);
        bench.function.write_config(window + 16, &[9; 4]);
        bench.function.read_config(window + 16, &mut data);
    }
    assert_eq!(lock(&bench.device).written.len(), 1);
}

#[test]
fn doorbells_are_where_the_driver_rings() {
    let bench = bench();
    let addresses: Vec<u64> = bench.function.doorbells(0xe000_0000).iter().map(|bell| bell.address).collect();
    // The first queue is not busy.
    assert_eq!(addresses, [0xe000_3004]);
    bench.function.write(0x16, &[1, 0]);
    assert_eq!(bench.get::<2>(0x1e), [1, 0]);
}

/// What a driver looks for: the types of the structures in the list of capabilities.
fn structures(function: &VirtioPci) -> Vec<u8> {
    let byte = |at: u8| {
        let mut data = [0];
        function.read_config(at.into(), &mut data);
        data[0]
    };
    let mut found = Vec::new();
    let mut at = byte(0x34);
    while at != 0 {
        if byte(at) == CAPABILITY_VENDOR {
            found.push(byte(at + 3));
        }
        at = byte(at + 1);
    }
    found
}

#[test]
fn a_hidden_function_has_no_structures_but_keeps_its_place() {
    let bench = bench();
    let all = structures(&bench.function);
    assert_eq!(all, [kind::COMMON, kind::ISR, kind::DEVICE, kind::NOTIFY, kind::PCI]);
    bench.function.hide();
    assert_eq!(structures(&bench.function), [0; 5]);
    let mut bar = [0; 4];
    bench.function.read_config(0x10, &mut bar);
    assert_eq!(bar, 0xe000_0000_u32.to_le_bytes());
    bench.function.show().unwrap();
    assert_eq!(structures(&bench.function), all);
}

/// A driver that does anything with the registers: of the function, of its BAR and of its vectors.
#[test]
fn fuzz_pci() {
    katana_fuzz::fuzz("pci", |input| {
        let bench = bench();
        let mut reached = 0;
        while !input.is_empty() {
            let sizes = [1, 2, 4, 8, 3, 16];
            let size = input.one_of(&sizes);
            // The structures, one after the other in the BAR; where it ends; anywhere.
            let offset = match input.below(8) {
                0..4 => input.below(0x40) as u64,
                4 => TABLE + input.below(0x40) as u64,
                5 => NOTIFY + input.below(0x40) as u64,
                6 => BAR_SIZE.saturating_sub(input.below(16) as u32).into(),
                _ => input.edge(),
            };
            match input.below(8) {
                0 => bench.function.read(offset, &mut vec![0; size]),
                1 => bench.function.read_config(offset as usize, &mut vec![0; size]),
                2 => bench
                    .function
                    .write_config(offset as usize & 0xff, &input.u64().to_le_bytes()[..size.min(8)]),
                3 => bench.negotiate(input.u64()),
                4 => {
                    let queue = input.below(3) as u16;
                    let addresses = [input.edge(), input.edge(), input.edge()];
                    let addresses = if input.once_in(2) { GOOD } else { addresses };
                    bench.set_up_queue(queue, input.edge() as u16, addresses);
                }
                5 => bench.driver_ok(),
                6 => bench.enable_msix(),
                _ => bench.function.write(offset, &input.u64().to_le_bytes()[..size.min(8)]),
            }
            let mut device = lock(&bench.device);
            if let Some(active) = &mut device.active {
                reached += 1;
                // What a device is given is as it is promised.
                assert!((1..=QUEUES.len()).contains(&active.queues.len()));
                for queue in &active.queues {
                    assert!(queue.queue.is_valid(&active.memory), "{:?}", queue.queue);
                    assert!(queue.queue.size() <= QUEUES[0]);
                    queue.interrupt.trigger();
                }
            }
            drop(device);
            bench.lines.iter().for_each(|line| drop(line.take()));
        }
        // Another one is restored to where it is now.
        let saved = bench.function.save();
        let other = self::bench();
        let _ = (other.function.restore(&saved), reached);
    });
}
