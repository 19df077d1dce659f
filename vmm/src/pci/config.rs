//! The configuration space of one PCI function: PCI Local Bus Specification 3.0, chapter 6.

use crate::bus::copy_out;

/// Bytes of a conventional configuration space.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
/// First byte after the type 0 header.
const FIRST_CAPABILITY: usize = 0x40;

const STATUS_CAPABILITIES_LIST: u16 = 1 << 4;
/// Command bits that a driver may set: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;

/// Who the function is.
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass, programming interface, from the highest byte down.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem device id; the subsystem vendor is the vendor.
    pub subsystem: u16,
}

/// A type 0 configuration space.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_link: usize,
    bar: Option<Bar>,
}

/// BAR 0: 32-bit memory at a fixed place. A driver may ask for its size but not move it: the machine's layout
/// is fixed, and the doorbells behind the BAR are wired to its addresses.
struct Bar {
    address: u32,
    size: u32,
    sizing: bool,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES_POINTER,
            bar: None,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space
    }

    /// Sets what the driver reads.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Sets BAR 0; `size` is a power of two and `address` a multiple of it.
    pub fn set_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && address.is_multiple_of(size));
        self.put(BAR0, &address.to_le_bytes());
        self.bar = Some(Bar { address, size, sizing: false });
    }

    /// Appends a capability: its `body` after id and link, and which bits of the body the driver may write.
    /// Answers where it starts.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let start = self.next_capability;
        self.put(self.last_link, &[start as u8]);
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        self.writable[start + 2..start + 2 + writable.len()].copy_from_slice(writable);
        self.put(STATUS, &STATUS_CAPABILITIES_LIST.to_le_bytes());
        self.last_link = start + 1;
        self.next_capability = (start + 2 + body.len()).next_multiple_of(4);
        start
    }

    /// All bytes, to be kept.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over the bytes that were kept of a function like this one.
    pub fn restore(&mut self, saved: &[u8]) {
        self.bytes.iter_mut().zip(saved).for_each(|(byte, saved)| *byte = *saved);
    }

    /// Reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        copy_out(&self.bytes, offset as u64, data);
    }

    /// Writes what is writable.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let writable = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), value) in writable.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
        if (BAR0..BAR0 + 4).contains(&offset) {
            self.write_bar(offset, data);
        }
    }

    /// PCI 3.0, 6.2.5.1: software writes all ones and reads back the size. Whatever else it writes, the BAR
    /// stays where it is.
    fn write_bar(&mut self, offset: usize, data: &[u8]) {
        let Some(bar) = &mut self.bar else { return };
        bar.sizing = offset == BAR0 && data == [0xff; 4];
        let value = if bar.sizing { !(bar.size - 1) } else { bar.address };
        self.put(BAR0, &value.to_le_bytes());
    }

    /// Two bytes of the space.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes of the space.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1044,
            class: 0xff_0000,
            revision: 1,
            subsystem: 0x40,
        })
    }

    #[test]
    fn identity_cannot_be_overwritten() {
        let mut space = space();
        space.write(0, &[0xaa; 4]);
        space.write(8, &[0xaa; 4]);
        space.write(0x2c, &[0xaa; 4]);
        assert_eq!(space.dword(0), 0x1044_1af4);
        assert_eq!(space.dword(8), 0xff00_0001);
        assert_eq!(space.dword(0x2c), 0x0040_1af4);
        space.write(COMMAND, &[0xff; 2]);
        assert_eq!(space.word(COMMAND), COMMAND_WRITABLE);
    }

    #[test]
    fn a_bar_reports_its_size_and_stays_where_it_is() {
        let mut space = space();
        space.set_bar(0xe000_0000, 0x8000);
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.dword(BAR0), 0xffff_8000);
        space.write(BAR0, &0xd000_0000u32.to_le_bytes());
        assert_eq!(space.dword(BAR0), 0xe000_0000);
        space.write(BAR0 + 2, &[0xff; 2]);
        assert_eq!(space.dword(BAR0), 0xe000_0000);
        // The other five do not exist.
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.dword(BAR0 + 4), 0);
    }

    #[test]
    fn capabilities_are_linked_and_only_writable_bits_change() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0, 0, 5], &[0, 0x80]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.word(STATUS) & STATUS_CAPABILITIES_LIST, STATUS_CAPABILITIES_LIST);
        let mut link = [0];
        space.read(CAPABILITIES_POINTER, &mut link);
        assert_eq!(usize::from(link[0]), first);
        assert_eq!(usize::from(space.word(first) >> 8), second);
        assert_eq!(space.word(second) >> 8, 0);
        space.write(second, &[0xff; 8]);
        assert_eq!(space.dword(second), 0x8000_0011);
        assert_eq!(space.word(second + 4), 5);
    }

    #[test]
    fn accesses_across_the_end_do_no_harm() {
        let mut space = space();
        space.write(SIZE - 1, &[1; 8]);
        let mut data = [0; 4];
        space.read(SIZE - 2, &mut data);
        assert_eq!(data, [0; 4]);
        space.read(usize::MAX - 1, &mut data[..1]);
        space.write(usize::MAX - 1, &data);
    }
}
