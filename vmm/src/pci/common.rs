//! The common configuration structure: virtio 1.2, 4.1.4.3. How a driver and a device agree on features and
//! queues. Everything in here is written by the guest and checked before a device sees it.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::bus::copy_out;
use crate::memory::GuestMemory;

/// Bytes of the structure.
pub const SIZE: u64 = 64;
/// Offset of the device status.
pub const STATUS: u64 = 0x14;
/// The vector that means "no vector".
pub const NO_VECTOR: u16 = 0xffff;

/// Device status, virtio 1.2, 2.1.
pub mod status {
    /// The driver has accepted features.
    pub const FEATURES_OK: u8 = 8;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The device cannot continue.
    pub const NEEDS_RESET: u8 = 64;
}

/// Features of transport and rings, offered for every device: indirect descriptors, event index, version 1.
pub const TRANSPORT_FEATURES: u64 = 1 << 28 | 1 << 29 | VERSION_1;
const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Offsets of the fields.
mod field {
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub const DEVICE_FEATURE: usize = 0x04;
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const CONFIG_VECTOR: usize = 0x10;
    pub const NUM_QUEUES: usize = 0x12;
    pub const STATUS: usize = super::STATUS as usize;
    pub const GENERATION: usize = 0x15;
    pub const QUEUE_SELECT: usize = 0x16;
    pub const QUEUE_SIZE: usize = 0x18;
    pub const QUEUE_VECTOR: usize = 0x1a;
    pub const QUEUE_ENABLE: usize = 0x1c;
    pub const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub const QUEUE_DESC: usize = 0x20;
    pub const QUEUE_DRIVER: usize = 0x28;
    pub const QUEUE_DEVICE: usize = 0x30;
    pub const ADDRESSES_END: usize = 0x38;
}

/// What a write asks of the device.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// To be reset.
    Reset,
    /// To be activated.
    Activate,
    /// A vector was chosen anew; for a queue, or for configuration changes.
    Vector(Option<u16>, u16),
}

/// A queue that the device must not use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// Not even the first queue is there.
    #[error("the driver enabled no queue")]
    None,
    /// A queue is enabled and the one before it is not.
    #[error("queue {0} is enabled but not the one before it")]
    Gap(usize),
    /// A ring of it is misaligned (virtio 1.2, 2.7).
    #[error("queue {index}: {ring} at {address:#x} is misaligned")]
    Misaligned {
        /// Number of the queue.
        index: usize,
        /// Which of the three parts.
        ring: &'static str,
        /// Where it should be.
        address: u64,
    },
    /// A ring of it is not wholly inside guest memory.
    #[error("queue {index}: {ring} at {address:#x} is not in guest memory")]
    Outside {
        /// Number of the queue.
        index: usize,
        /// Which of the three parts.
        ring: &'static str,
        /// Where it should be.
        address: u64,
    },
}

/// The registers.
#[derive(Clone, Serialize, Deserialize)]
pub struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    vectors: u16,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

#[derive(Clone, Serialize, Deserialize)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        let (size, vector) = (max_size, NO_VECTOR);
        Self { max_size, size, vector, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// Checks where the rings are: virtio 1.2, 2.7 gives sizes and alignments.
    fn check(&self, index: usize, memory: &GuestMemory) -> Result<(), QueueError> {
        let size = usize::from(self.size);
        for (ring, address, length, alignment) in [
            ("descriptor table", self.descriptors, 16 * size, 16),
            ("available ring", self.driver, 6 + 2 * size, 2),
            ("used ring", self.device, 6 + 8 * size, 4),
        ] {
            if !address.is_multiple_of(alignment) {
                return Err(QueueError::Misaligned { index, ring, address });
            }
            let end = address.checked_add(length as u64);
            if end.is_none() || !memory.check_range(GuestAddress(address), length) {
                return Err(QueueError::Outside { index, ring, address });
            }
        }
        Ok(())
    }
}

fn halves(value: u64) -> (Option<u32>, Option<u32>) {
    (Some(value as u32), Some((value >> 32) as u32))
}

fn set_half(value: &mut u64, high: bool, half: u32) {
    let shift = if high { 32 } else { 0 };
    *value = *value & !(0xffff_ffff << shift) | u64::from(half) << shift;
}

impl CommonConfig {
    /// The registers of a device with these features and queues and so many MSI-X vectors.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: features | TRANSPORT_FEATURES,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            vectors,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueSetup::new).collect(),
        }
    }

    /// Changes what is offered. Seen by a driver that looks from now on.
    pub fn offer(&mut self, features: u64, queue_sizes: &[u16]) {
        self.offered = features | TRANSPORT_FEATURES;
        if self.queues.len() != queue_sizes.len() {
            self.queues = queue_sizes.iter().copied().map(QueueSetup::new).collect();
        }
    }

    /// Whether these are registers of a device with the same features and queues.
    pub fn fits(&self, other: &Self) -> bool {
        let sizes = |common: &Self| common.queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        (self.offered, self.vectors, sizes(self)) == (other.offered, other.vectors, sizes(other))
    }

    /// The features that both sides have accepted.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// The device cannot continue until it is reset.
    pub fn set_needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// Back to the state at power on.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// Reads `data` at `offset`; any size, any alignment.
    pub fn read(&self, offset: u64, data: &mut [u8], generation: u8) {
        copy_out(&self.image(generation), offset, data);
    }

    fn image(&self, generation: u8) -> [u8; SIZE as usize] {
        let mut image = [0; SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let word =
            |features: u64, select: u32| if select < 2 { (features >> (32 * select)) as u32 } else { 0 };
        put(field::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(field::DEVICE_FEATURE, &word(self.offered, self.device_feature_select).to_le_bytes());
        put(field::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(field::DRIVER_FEATURE, &word(self.accepted, self.driver_feature_select).to_le_bytes());
        put(field::CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(field::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(field::STATUS, &[self.status]);
        put(field::GENERATION, &[generation]);
        put(field::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has the size 0; its other fields mean nothing.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(field::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(field::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(field::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(field::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(field::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(field::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(field::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        image
    }

    /// Writes one field. A driver must use the field's own width (4.1.3.1), 64-bit ones also by halves;
    /// anything else is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        match *data {
            [value] if offset == field::STATUS => return self.write_status(value),
            [a, b] => return self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h]
                if matches!(offset, field::QUEUE_DESC | field::QUEUE_DRIVER | field::QUEUE_DEVICE) =>
            {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Bits are set one by one and cleared by a reset only (2.1.1); NEEDS_RESET is the device's.
        let mut new = value & !self.status & !status::NEEDS_RESET;
        let known = self.accepted & !self.offered == 0;
        if new & status::FEATURES_OK != 0 && (!known || self.accepted & VERSION_1 == 0) {
            new &= !status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && (self.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 { Effect::Activate } else { Effect::None }
    }

    fn write_word(&mut self, offset: usize, value: u16) -> Effect {
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        let started = self.driver_ok();
        match offset {
            field::CONFIG_VECTOR => {
                self.config_vector = vector;
                return Effect::Vector(None, vector);
            }
            field::QUEUE_SELECT => self.queue_select = value,
            _ => {
                let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
                    return Effect::None;
                };
                match offset {
                    field::QUEUE_VECTOR => {
                        queue.vector = vector;
                        return Effect::Vector(Some(self.queue_select), vector);
                    }
                    field::QUEUE_SIZE
                        if !queue.enabled && value.is_power_of_two() && value <= queue.max_size =>
                    {
                        queue.size = value;
                    }
                    // Only a reset disables a queue (4.1.4.3.2).
                    field::QUEUE_ENABLE if value == 1 && !started => queue.enabled = true,
                    _ => {}
                }
            }
        }
        Effect::None
    }

    fn write_dword(&mut self, offset: usize, value: u32) {
        match offset {
            field::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            field::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            field::DRIVER_FEATURE
                if self.status & status::FEATURES_OK == 0 && self.driver_feature_select < 2 =>
            {
                set_half(&mut self.accepted, self.driver_feature_select == 1, value);
            }
            field::QUEUE_DESC..field::ADDRESSES_END if offset.is_multiple_of(4) => {
                let high = offset & 4 != 0;
                let queue = self.queues.get_mut(usize::from(self.queue_select));
                let Some(queue) = queue.filter(|queue| !queue.enabled) else { return };
                match offset & !4 {
                    field::QUEUE_DESC => set_half(&mut queue.descriptors, high, value),
                    field::QUEUE_DRIVER => set_half(&mut queue.driver, high, value),
                    _ => set_half(&mut queue.device, high, value),
                }
            }
            _ => {}
        }
    }

    /// The enabled queues, checked. They are the first ones: a driver may leave out queues at the end.
    ///
    /// # Errors
    /// When a queue cannot be used.
    pub fn checked_queues(&self, memory: &GuestMemory) -> Result<Vec<Queue>, QueueError> {
        let enabled = self.queues.iter().take_while(|queue| queue.enabled).count();
        if let Some(gap) = self.queues.iter().skip(enabled).position(|queue| queue.enabled) {
            return Err(QueueError::Gap(enabled + gap));
        }
        if enabled == 0 && !self.queues.is_empty() {
            return Err(QueueError::None);
        }
        let mut queues = Vec::with_capacity(enabled);
        for (index, setup) in self.queues.iter().take(enabled).enumerate() {
            setup.check(index, memory)?;
            let Ok(mut queue) = Queue::new(setup.max_size) else { return Err(QueueError::None) };
            queue.set_size(setup.size);
            let (low, high) = halves(setup.descriptors);
            queue.set_desc_table_address(low, high);
            let (low, high) = halves(setup.driver);
            queue.set_avail_ring_address(low, high);
            let (low, high) = halves(setup.device);
            queue.set_used_ring_address(low, high);
            queue.set_event_idx(self.accepted & EVENT_INDEX != 0);
            queue.set_ready(true);
            queues.push(queue);
        }
        Ok(queues)
    }
}
