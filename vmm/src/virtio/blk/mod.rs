//! virtio-blk (virtio 1.2, 5.2): a slot for a disk that may come later.
//!
//! Wiring: `Blk::new(serial, starter)` makes an empty slot of capacity 0; the guest finds the serial in
//! /sys/block/vdX/serial. `attach(file, read_only)`, on the device thread, gives it a disk, and with it a thread that
//! serves it ([`thread`]), which `starter` starts; `detach` takes the disk away. Neither waits for the disk. The guest's
//! driver is to start after the one and to let go before the other; to a driver that is there all the time, the capacity
//! changes, and a read-only disk refuses writes.

mod disk;
mod patience;
mod slot;
mod thread;

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::disk::{Disk, LONGEST_RANGE, MOST_RANGES, RANGE_ALIGNMENT, SECTOR, Shape};
use self::slot::Serial;
pub use self::thread::{Detached, Starter};
use self::thread::{Served, Worker};
use super::queue::DeviceQueue;
use super::{Activation, Interrupt, VirtioDevice, base};

const QUEUE_SIZES: [u16; 1] = [128];
const REQUESTS: usize = 0;

/// A slot for a disk.
pub struct Blk {
    worker: Arc<Worker>,
    starter: Starter,
    shape: Option<Shape>,
    /// Of the driver, while there is one.
    config_interrupt: Option<Interrupt>,
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The slot is in use, or there is no thread for it.
    #[error(transparent)]
    Worker(#[from] thread::Error),
    /// The file is no disk.
    #[error(transparent)]
    Disk(#[from] disk::Error),
}

impl Blk {
    /// An empty slot.
    pub fn new(serial: &str, starter: Starter) -> Self {
        let mut bytes = Serial::default();
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self { worker: Arc::new(Worker::new(bytes)), starter, shape: None, config_interrupt: None }
    }

    /// Puts a disk, a regular file or a block device, into the slot.
    ///
    /// # Errors
    /// When the slot is in use, the file is no disk, or the host has no thread for it.
    pub fn attach(&mut self, file: File, read_only: bool) -> Result<(), AttachError> {
        let disk = Disk::new(file, read_only)?;
        let shape = disk.shape();
        self.worker.attach(disk, &self.starter)?;
        self.shape = Some(shape);
        self.config_changed();
        Ok(())
    }

    /// Takes the disk out of the slot. `detached` is called, on any thread, when its file is closed, which is when the
    /// request that is under way has ended.
    pub fn detach(&mut self, detached: Detached) {
        self.shape = None;
        self.config_changed();
        self.worker.detach(detached);
    }

    fn config_changed(&self) {
        if let Some(interrupt) = &self.config_interrupt {
            interrupt.trigger();
        }
    }

    /// virtio 1.2, 5.2.4, as far as the offered features give it a meaning.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let capacity = self.shape.map_or(0, |shape| shape.sectors);
        let fields: [(usize, &[u8]); 9] = [
            (0, &capacity.to_le_bytes()),
            // All of a queue but header and status.
            (12, &(u32::from(QUEUE_SIZES[REQUESTS]) - 2).to_le_bytes()),
            (20, &(SECTOR as u32).to_le_bytes()),
            // max_discard_sectors, max_discard_seg, discard_sector_alignment.
            (36, &LONGEST_RANGE.to_le_bytes()),
            (40, &MOST_RANGES.to_le_bytes()),
            (44, &RANGE_ALIGNMENT.to_le_bytes()),
            // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
            (48, &LONGEST_RANGE.to_le_bytes()),
            (52, &MOST_RANGES.to_le_bytes()),
            (56, &[1]),
        ];
        for (offset, bytes) in fields {
            config.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
        }
        config
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.worker.reset();
        self.worker.detach(Box::new(|| ()));
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = self.shape.is_some_and(|shape| shape.read_only);
        let clears = u64::from(self.shape.is_some_and(|shape| shape.clears));
        1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | u64::from(read_only) << VIRTIO_BLK_F_RO
            | clears << VIRTIO_BLK_F_DISCARD
            | clears << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn busy_queues(&self) -> &[usize] {
        &[REQUESTS]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, queues, config_interrupt, .. } = activation;
        let queue = queues.into_iter().nth(REQUESTS).ok_or(io::ErrorKind::InvalidInput)?;
        self.config_interrupt = Some(config_interrupt);
        self.worker.activate(Served { memory, queue: DeviceQueue::new(queue, "blk") });
        Ok(())
    }

    fn reset(&mut self) {
        self.config_interrupt = None;
        self.worker.reset();
    }

    fn at_rest(&self) -> bool {
        self.worker.at_rest()
    }
}

/// The device's events are served by its thread.
impl MutEventSubscriber for Blk {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

#[cfg(test)]
mod tests;
