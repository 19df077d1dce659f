//! The PCI bus: one bus, no bridges but the host's, reached by configuration mechanism #1. Functions have fixed
//! addresses; there is no firmware that could assign others.

mod common;
mod config;
mod layout;
mod msix;
mod transport;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use katana_protocol::bridge;

pub use layout::BAR_SIZE;
pub use msix::Line;
pub use transport::{Doorbell, FunctionState, RestoreError, VirtioPci, vectors};

use crate::bus::BusDevice;
use crate::sync::lock;
use config::{ConfigSpace, Identity};

/// The ports of configuration mechanism #1: PCI Local Bus Specification 3.0, 3.2.2.3.2.
pub const PORTS: Range<u64> = 0xcf8..0xd00;
/// Devices on the bus, number 0 being the host bridge.
pub const SLOTS: usize = 32;

const CONFIG_ADDRESS: u64 = 0;
const CONFIG_DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;

/// One function of the bus, by its configuration space.
pub trait PciDevice: Send + Sync {
    /// Reads the configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes the configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);
}

/// What guest and VMM exchange about a template ([`bridge`]).
#[derive(Default)]
pub struct TemplateRegister {
    wanted: AtomicBool,
    written: AtomicU8,
    closed: AtomicBool,
}

impl TemplateRegister {
    /// A template is to be made of the guest.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    /// What the guest has written last, once; otherwise 0.
    pub fn take(&self) -> u8 {
        self.written.swap(0, Ordering::AcqRel)
    }

    /// From now on, whatever the guest writes is not its agent's word.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether that is so.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// The bridge between CPU and bus. Linux looks for one before it believes that there is a bus (pci_sanity_check). It
/// also has a register that the agent reaches, which user space can.
struct HostBridge {
    space: ConfigSpace,
    template: Arc<TemplateRegister>,
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
        if offset as u64 == bridge::REGISTER
            && self.template.wanted.load(Ordering::Acquire)
            && let Some(byte) = data.first_mut()
        {
            *byte = bridge::WANTED;
        }
    }
    fn write_config(&self, offset: usize, data: &[u8]) {
        if let (bridge::REGISTER, [value]) = (offset as u64, data) {
            self.template.written.store(*value, Ordering::Release);
        }
    }
}

/// The bus, as the device behind [`PORTS`].
pub struct PciBus {
    address: Mutex<u32>,
    devices: Vec<Arc<dyn PciDevice>>,
}

impl PciBus {
    /// A bus with its host bridge.
    pub fn new(template: Arc<TemplateRegister>) -> Self {
        // The vendor of QEMU's generic host bridge; any known one does.
        let identity =
            Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, revision: 0, subsystem: 0 };
        let bridge: Arc<dyn PciDevice> =
            Arc::new(HostBridge { space: ConfigSpace::new(&identity), template });
        Self { address: Mutex::new(0), devices: vec![bridge] }
    }

    /// The next free slot, if there is one.
    pub fn next_slot(&self) -> Option<usize> {
        (self.devices.len() < SLOTS).then_some(self.devices.len())
    }

    /// Puts a device into the next free slot.
    pub fn push(&mut self, device: Arc<dyn PciDevice>) {
        self.devices.push(device);
    }

    /// The function and register that the address register selects.
    fn selected(&self) -> Option<(&dyn PciDevice, usize)> {
        let address = *lock(&self.address);
        let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let reserved = address & !ENABLE & 0xff00_0000;
        if address & ENABLE == 0 || reserved != 0 || bus != 0 || function != 0 {
            return None;
        }
        Some((&**self.devices.get(slot as usize)?, (address & 0xfc) as usize))
    }
}

impl BusDevice for PciBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (CONFIG_ADDRESS, 4) = (offset, data.len()) {
            data.copy_from_slice(&lock(&self.address).to_le_bytes());
        } else if offset >= CONFIG_DATA
            && let Some((device, register)) = self.selected()
        {
            device.read_config(register + (offset - CONFIG_DATA) as usize, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Only whole words reach the address register.
        if let (CONFIG_ADDRESS, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            *lock(&self.address) = u32::from_le_bytes(word) & !3;
        } else if offset >= CONFIG_DATA
            && let Some((device, register)) = self.selected()
        {
            device.write_config(register + (offset - CONFIG_DATA) as usize, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bus: &PciBus, address: u32, port: u64, length: usize) -> Vec<u8> {
        bus.write(CONFIG_ADDRESS, &address.to_le_bytes());
        let mut data = vec![0xff; length];
        bus.read(port, &mut data);
        data
    }

    #[test]
    fn linux_finds_mechanism_1_and_the_host_bridge() {
        let bus = PciBus::new(Arc::default());
        bus.write(3, &[1]);
        assert_eq!(read(&bus, ENABLE, CONFIG_ADDRESS, 4), ENABLE.to_le_bytes());
        assert_eq!(read(&bus, ENABLE | 8, CONFIG_DATA + 2, 2), [0x00, 0x06]);
        assert_eq!(read(&bus, ENABLE, CONFIG_DATA, 4), [0x36, 0x1b, 0x08, 0x00]);
    }

    #[test]
    fn guest_and_maker_hear_each_other() {
        let register = Arc::new(TemplateRegister::default());
        let bus = PciBus::new(register.clone());
        assert_eq!(read(&bus, ENABLE | 0x40, CONFIG_DATA, 1), [0]);
        register.want();
        assert_eq!(read(&bus, ENABLE | 0x40, CONFIG_DATA, 1), [bridge::WANTED]);
        assert_eq!(read(&bus, ENABLE | 0x44, CONFIG_DATA, 1), [0]);
        bus.write(CONFIG_DATA, &[bridge::LATER]);
        assert_eq!(register.take(), 0, "another register");
        read(&bus, ENABLE | 0x40, CONFIG_DATA, 1);
        bus.write(CONFIG_DATA, &[bridge::LATER]);
        assert_eq!((register.take(), register.take()), (bridge::LATER, 0));
    }

    #[test]
    fn nothing_answers_elsewhere() {
        let bus = PciBus::new(Arc::default());
        for address in [0, ENABLE | 1 << 11, ENABLE | 1 << 8, ENABLE | 1 << 16, ENABLE | 31 << 11] {
            assert_eq!(read(&bus, address, CONFIG_DATA, 4), [0xff; 4], "{address:#x}");
            bus.write(CONFIG_DATA, &[0; 4]);
        }
        assert_eq!(read(&bus, ENABLE | 0xfc, CONFIG_DATA + 3, 1), [0]);
    }
}
