//! Where the structures of a virtio function lie in its BAR, and the capabilities that tell a driver so (virtio 1.2,
//! 4.1.4).

use super::common::SIZE as COMMON_SIZE;
use super::config::{ConfigSpace, Identity};
use super::msix::CONTROL_WRITABLE;

/// Bytes of the BAR.
pub const BAR_SIZE: u32 = 0x8000;

// One page for each structure, so that a driver could map each on its own (4.1.4).
/// The common configuration.
pub const COMMON: u64 = 0x0000;
/// The interrupt status.
pub const ISR: u64 = 0x1000;
/// The device's configuration.
pub const DEVICE: u64 = 0x2000;
/// The queues' doorbells.
pub const NOTIFY: u64 = 0x3000;
/// The table of MSI-X.
pub const TABLE: u64 = 0x4000;
/// Its pending bits.
pub const PENDING: u64 = 0x5000;
/// Bytes of each.
pub const PAGE: u64 = 0x1000;
/// Distance of two queues' doorbells (notify_off_multiplier).
pub const NOTIFY_MULTIPLIER: u64 = 4;
/// Where the window's data are in its capability.
pub const WINDOW_DATA: usize = 16;

/// Capability id of a structure's.
pub const CAPABILITY_VENDOR: u8 = 0x09;

const VENDOR: u16 = 0x1af4;
const DEVICE_ID_BASE: u16 = 0x1040;
const CAPABILITY_MSIX: u8 = 0x11;

/// Structure types, 4.1.4.
pub mod kind {
    /// The common configuration.
    pub const COMMON: u8 = 1;
    /// The queues' doorbells.
    pub const NOTIFY: u8 = 2;
    /// The interrupt status.
    pub const ISR: u8 = 3;
    /// The device's configuration.
    pub const DEVICE: u8 = 4;
    /// The window to the BAR in the configuration space.
    pub const PCI: u8 = 5;
}

/// Where a capability says which structure it is for, and which that is.
pub struct Structure {
    /// Offset in the configuration space.
    pub at: usize,
    /// The type, of the list in 4.1.4.
    pub kind: u8,
}

/// The configuration space of a device, and where in it MSI-X, the window to the BAR and the structures' types are.
pub struct Layout {
    /// The configuration space.
    pub space: ConfigSpace,
    /// Offset of the capability of MSI-X.
    pub msix: usize,
    /// Offset of the window's.
    pub window: usize,
    /// All structures that a driver can see.
    pub structures: Vec<Structure>,
}

impl Layout {
    /// Of a device of this type with so many vectors, whose BAR is at `address`.
    pub fn new(kind: u32, address: u32, vectors: u16) -> Self {
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + kind as u16,
            class: class(kind),
            revision: 1,
            subsystem: 0x40,
        });
        space.set_bar(address, BAR_SIZE);
        let mut structures = Vec::new();
        let mut add = |kind: u8, offset: u64, length: u64, more: &[u8], writable: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
            body.extend_from_slice(&(offset as u32).to_le_bytes());
            body.extend_from_slice(&(length as u32).to_le_bytes());
            body.extend_from_slice(more);
            let start = space.add_capability(CAPABILITY_VENDOR, &body, writable);
            structures.push(Structure { at: start + 3, kind });
            start
        };
        add(kind::COMMON, COMMON, COMMON_SIZE, &[], &[]);
        add(kind::ISR, ISR, 1, &[], &[]);
        add(kind::DEVICE, DEVICE, PAGE, &[], &[]);
        add(kind::NOTIFY, NOTIFY, PAGE, &(NOTIFY_MULTIPLIER as u32).to_le_bytes(), &[]);
        // The driver writes bar, offset and length, then reads or writes the data.
        let mut writable = vec![0, 0, 0xff, 0, 0, 0];
        writable.extend_from_slice(&[0xff; 12]);
        let window = add(kind::PCI, 0, 0, &[0; 4], &writable);

        let mut body = vectors.wrapping_sub(1).to_le_bytes().to_vec();
        body.extend_from_slice(&(TABLE as u32).to_le_bytes());
        body.extend_from_slice(&(PENDING as u32).to_le_bytes());
        let msix = space.add_capability(CAPABILITY_MSIX, &body, &CONTROL_WRITABLE.to_le_bytes());
        Self { space, msix, window, structures }
    }
}

/// The target of the window whose capability is at `at`, if the driver has set up a valid one (4.1.4.9): offset in the
/// BAR, and length.
pub fn window(space: &ConfigSpace, at: usize) -> Option<(u64, usize)> {
    let bar = space.word(at + 4) & 0xff;
    let (offset, length) = (space.dword(at + 8), space.dword(at + 12));
    let valid = bar == 0 && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && offset < BAR_SIZE;
    valid.then_some((u64::from(offset), length as usize))
}

/// Class codes, for tools that print them; drivers go by the device id.
fn class(kind: u32) -> u32 {
    match kind {
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}
