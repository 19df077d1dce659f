//! virtio over PCI, modern only: virtio 1.2, 4.1. One function with one BAR, in which the structures lie as
//! [`super::layout`] says.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::PciDevice;
use super::common::{CommonConfig, Effect, NO_VECTOR, STATUS, status};
use super::config::ConfigSpace;
use super::layout::{
    COMMON, DEVICE, ISR, Layout, NOTIFY, NOTIFY_MULTIPLIER, PAGE, PENDING, Structure, TABLE, WINDOW_DATA,
    window,
};
use super::msix::{Line, Msix, MsixState};
use crate::bus::{BusDevice, copy_out};
use crate::memory::GuestMemory;
use crate::sync::lock;
use crate::virtio::{Activation, Interrupt, Trigger, VirtQueue, VirtioDevice};

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A virtio device on the PCI bus: a function with its configuration space and its BAR.
pub struct VirtioPci {
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    space: Mutex<ConfigSpace>,
    common: Mutex<CommonConfig>,
    msix: Arc<Msix>,
    isr: Arc<AtomicU8>,
    generation: Arc<AtomicU8>,
    config_interrupt: Arc<Source>,
    queues: Vec<Ends>,
    msix_capability: usize,
    window_capability: usize,
    structures: Vec<Structure>,
}

/// How a queue's two sides notify each other.
struct Ends {
    /// Made when there is such a queue.
    kick: OnceLock<Arc<EventFd>>,
    interrupt: Arc<Source>,
}

/// A doorbell: a write to `address`, whatever its value, must make `event` readable.
pub struct Doorbell {
    /// Guest physical address.
    pub address: u64,
    /// Readable when the queue has work.
    pub event: Arc<EventFd>,
}

/// What may interrupt: a queue, or the configuration. Knows the vector that the driver chose for it.
struct Source {
    vector: AtomicU16,
    msix: Arc<Msix>,
    isr: Arc<AtomicU8>,
    isr_bit: u8,
    /// Counts the changes, for the configuration's source.
    generation: Option<Arc<AtomicU8>>,
}

impl Trigger for Source {
    fn trigger(&self) {
        if let Some(generation) = &self.generation {
            generation.fetch_add(1, Ordering::AcqRel);
        }
        if self.msix.enabled() {
            self.msix.trigger(self.vector.load(Ordering::Acquire));
        } else {
            self.isr.fetch_or(self.isr_bit, Ordering::AcqRel);
        }
    }

    fn event(&self) -> Option<Arc<EventFd>> {
        self.msix.event(self.vector.load(Ordering::Acquire))
    }
}

/// What is kept of a function in a template. Its device keeps nothing: all its pending work is in the queues.
#[derive(Serialize, Deserialize)]
pub struct FunctionState {
    space: Vec<u8>,
    common: CommonConfig,
    msix: MsixState,
    isr: u8,
    generation: u8,
    /// Of each queue, and of configuration changes.
    vectors: Vec<u16>,
}

/// Why a function cannot be restored to where another one stopped.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another device.
    #[error("a device with other features or queues")]
    Other,
    /// Its queues are not in memory.
    #[error("its queues: {0}")]
    Queues(std::io::Error),
}

/// How many vectors a device with so many queues has: each queue its own, and the configuration.
pub fn vectors(queues: usize) -> usize {
    queues + 1
}

impl VirtioPci {
    /// Puts `device` on the bus: its BAR at `address`, its vectors on `lines` (see [`vectors`]).
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemory,
        address: u32,
        lines: Vec<Box<dyn Line>>,
    ) -> std::io::Result<Self> {
        let (kind, common, most_queues) = {
            let device = lock(&device);
            let vectors = u16::try_from(lines.len()).unwrap_or(u16::MAX);
            let common = CommonConfig::new(device.features(), device.queue_sizes(), vectors);
            (device.device_type(), common, device.most_queues())
        };
        let msix = Arc::new(Msix::new(lines));
        let isr = Arc::new(AtomicU8::new(0));
        let generation = Arc::new(AtomicU8::new(0));
        let source = |isr_bit, generation| {
            let vector = AtomicU16::new(NO_VECTOR);
            Arc::new(Source { vector, msix: msix.clone(), isr: isr.clone(), isr_bit, generation })
        };
        let config_interrupt = source(ISR_CONFIG, Some(generation.clone()));
        let ends = || Ends { kick: OnceLock::new(), interrupt: source(ISR_QUEUE, None) };
        let queues = (0..most_queues).map(|_| ends()).collect();
        let Layout { space, msix: msix_capability, window: window_capability, structures } =
            Layout::new(kind, address, msix.vectors());
        let function = Self {
            device,
            memory,
            space: Mutex::new(space),
            common: Mutex::new(common),
            msix,
            isr,
            generation,
            config_interrupt,
            queues,
            msix_capability,
            window_capability,
            structures,
        };
        function.make_kicks()?;
        Ok(function)
    }

    fn make_kicks(&self) -> std::io::Result<()> {
        let count = lock(&self.device).queue_sizes().len();
        for queue in self.queues.iter().take(count).filter(|queue| queue.kick.get().is_none()) {
            // A thread that serves nothing else waits in read(2).
            let kick = EventFd::new(EFD_CLOEXEC)?;
            queue.kick.get_or_init(|| Arc::new(kick));
        }
        Ok(())
    }

    /// Shows the structures to drivers, or hides them. A function without them is one that no driver takes (4.1.4:
    /// a driver ignores structures of a type that it does not know), but its place on the bus and its addresses are
    /// assigned when the guest boots. A driver that looks for the first time when they are shown finds a new device,
    /// with the features and queues that it has then.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn show(&self) -> std::io::Result<()> {
        self.make_kicks()?;
        // In the order of `write_common`: a driver need not wait until it sees the device.
        let mut common = lock(&self.common);
        let device = lock(&self.device);
        common.offer(device.features(), device.queue_sizes());
        drop((common, device));
        self.set_shown(true);
        Ok(())
    }

    /// See [`Self::show`].
    pub fn hide(&self) {
        self.set_shown(false);
    }

    fn set_shown(&self, shown: bool) {
        let mut space = lock(&self.space);
        for structure in &self.structures {
            space.put(structure.at, &[if shown { structure.kind } else { 0 }]);
        }
    }

    /// The doorbells of the device's busy queues. Those of the others come as writes to the BAR.
    pub fn doorbells(&self, bar: u32) -> Vec<Doorbell> {
        let address = |index: usize| u64::from(bar) + NOTIFY + NOTIFY_MULTIPLIER * index as u64;
        let busy = lock(&self.device).busy_queues().to_vec();
        let doorbell = |index: usize| {
            let event: &Arc<EventFd> = self.queues.get(index)?.kick.get()?;
            Some(Doorbell { address: address(index), event: event.clone() })
        };
        busy.into_iter().filter_map(doorbell).collect()
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        lock(&self.common).read(offset, data, self.generation.load(Ordering::Acquire));
        // A reset is over for the driver when it reads zero (4.1.4.3.2). Until then it is to leave its memory to the
        // device, which may still have it in use.
        if let ([value @ 0], STATUS) = (data, offset)
            && !lock(&self.device).at_rest()
        {
            *value = status::NEEDS_RESET;
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut common = lock(&self.common);
        match common.write(offset, data) {
            Effect::None => {}
            Effect::Reset => {
                lock(&self.device).reset();
                common.reset();
                self.isr.store(0, Ordering::Release);
                for source in self.sources() {
                    source.vector.store(NO_VECTOR, Ordering::Release);
                }
            }
            Effect::Activate => {
                if let Err(error) = self.activate(&common) {
                    let kind = lock(&self.device).device_type();
                    log::warn!("virtio device of type {kind}: activation failed: {error}");
                    common.set_needs_reset();
                    self.config_interrupt.trigger();
                }
            }
            Effect::Vector(None, vector) => self.config_interrupt.vector.store(vector, Ordering::Release),
            Effect::Vector(Some(queue), vector) => {
                if let Some(ends) = self.queues.get(usize::from(queue)) {
                    ends.interrupt.vector.store(vector, Ordering::Release);
                }
            }
        }
    }

    /// The device as it stands, which nobody may use meanwhile: see [`Self::device`].
    pub fn save(&self) -> FunctionState {
        FunctionState {
            space: lock(&self.space).save(),
            common: lock(&self.common).clone(),
            msix: self.msix.save(),
            isr: self.isr.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
            vectors: self.sources().map(|source| source.vector.load(Ordering::Acquire)).collect(),
        }
    }

    /// The device behind the function.
    pub fn device(&self) -> &Mutex<dyn VirtioDevice> {
        &self.device
    }

    /// Restores this function to where one like it stopped, whose memory this one has.
    ///
    /// # Errors
    /// When it was none like this one.
    pub fn restore(&self, saved: &FunctionState) -> Result<(), RestoreError> {
        let mut common = lock(&self.common);
        if !common.fits(&saved.common) {
            return Err(RestoreError::Other);
        }
        *common = saved.common.clone();
        lock(&self.space).restore(&saved.space);
        self.isr.store(saved.isr, Ordering::Release);
        self.generation.store(saved.generation, Ordering::Release);
        for (source, vector) in self.sources().zip(&saved.vectors) {
            source.vector.store(*vector, Ordering::Release);
        }
        self.msix.restore(&saved.msix);
        if common.driver_ok() {
            self.activate_again(&common).map_err(RestoreError::Queues)?;
        }
        Ok(())
    }

    /// As [`Self::activate`], with queues that have been in use. Nothing was on its way in them, so the device
    /// continues where it stopped: behind the last chain that it returned. What the driver made available, or was
    /// notified of, in the last moment may not have been noticed, so both sides look again.
    fn activate_again(&self, common: &CommonConfig) -> std::io::Result<()> {
        let mut queues = common.checked_queues(&self.memory).map_err(std::io::Error::other)?;
        for queue in &mut queues {
            let used = queue.used_idx(&self.memory, Ordering::Acquire).map_err(std::io::Error::other)?.0;
            queue.set_next_avail(used);
            queue.set_next_used(used);
        }
        let count = queues.len();
        self.start(common, queues)?;
        for (number, ends) in self.queues.iter().enumerate().take(count) {
            self.kick(number);
            ends.interrupt.trigger();
        }
        Ok(())
    }

    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.queues.iter().map(|ends| &*ends.interrupt).chain([&*self.config_interrupt])
    }

    fn activate(&self, common: &CommonConfig) -> std::io::Result<()> {
        let queues = common.checked_queues(&self.memory).map_err(std::io::Error::other)?;
        self.start(common, queues)
    }

    fn start(&self, common: &CommonConfig, queues: Vec<Queue>) -> std::io::Result<()> {
        let queues = queues.into_iter().zip(&self.queues).map_while(|(queue, ends)| {
            let interrupt = Interrupt { vector: ends.interrupt.clone() };
            Some(VirtQueue { queue, kick: ends.kick.get()?.clone(), interrupt })
        });
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            features: common.features(),
            queues: queues.collect(),
            config_interrupt: Interrupt { vector: self.config_interrupt.clone() },
        })
    }

    fn kick(&self, queue: usize) {
        if let Some(kick) = self.queues.get(queue).and_then(|ends| ends.kick.get()) {
            // Only a full counter could fail it, and that one wakes as well.
            let _ = kick.write(1);
        }
    }
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = lock(&self.space);
        space.read(offset, data);
        let window = window(&space, self.window_capability);
        drop(space);
        let start = self.window_capability + WINDOW_DATA;
        if let (Some((target, length)), true) = (window, (start..start + 4).contains(&offset)) {
            let mut value = [0; 4];
            self.read(target, &mut value[..length]);
            copy_out(&value, (offset - start) as u64, data);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut space = lock(&self.space);
        space.write(offset, data);
        let control = space.word(self.msix_capability + 2);
        let window = window(&space, self.window_capability);
        let start = self.window_capability + WINDOW_DATA;
        let mut value = [0; 4];
        space.read(start, &mut value);
        drop(space);
        let end = offset + data.len();
        if offset < self.msix_capability + 4 && end > self.msix_capability + 2 {
            self.msix.set_control(control);
        }
        if let (Some((target, length)), true) = (window, offset == start) {
            self.write(target, &value[..length]);
        }
    }
}

impl BusDevice for VirtioPci {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR => {
                if let ([isr, ..], 0) = (data, within) {
                    *isr = self.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => lock(&self.device).read_config(within, data),
            TABLE => self.msix.read_table(within, data),
            PENDING => self.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => lock(&self.device).write_config(within, data),
            // Not of a busy queue, or through the window in the configuration space.
            NOTIFY => self.kick((within / NOTIFY_MULTIPLIER) as usize),
            TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
