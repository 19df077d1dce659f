//! Which device answers at which port or address.

use std::ops::Range;
use std::sync::Arc;

/// A device behind ports or memory addresses. Offsets count from the start of its range; an access never
/// reaches beyond the range's end.
pub trait BusDevice: Send + Sync {
    /// Reads; `data` comes filled with ones, which is what the guest reads from nothing.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices at one address: a mistake in the machine's layout.
#[derive(Debug, thiserror::Error)]
#[error("two devices share the addresses {first:#x?} and {second:#x?}")]
pub struct Overlap {
    first: Range<u64>,
    second: Range<u64>,
}

/// Reads at `offset` of a device whose registers look like `image`; what lies beyond its end is left as it is.
pub fn copy_out(image: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
    let length = from.len().min(data.len());
    data[..length].copy_from_slice(&from[..length]);
}

/// The ports or the memory addresses of the machine. Fixed once the machine is built, so nothing is locked.
#[derive(Default)]
pub struct Bus {
    devices: Vec<(Range<u64>, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts a device at `range`.
    ///
    /// # Errors
    /// When another device is there.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let at = self.devices.partition_point(|(other, _)| other.end <= range.start);
        if let Some((other, _)) = self.devices.get(at)
            && other.start < range.end
        {
            return Err(Overlap { first: other.clone(), second: range });
        }
        self.devices.insert(at, (range, device));
        Ok(())
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &dyn BusDevice)> {
        let at = self.devices.partition_point(|(range, _)| range.end <= address);
        let (range, device) = self.devices.get(at)?;
        let end = address.checked_add(length as u64)?;
        (range.start <= address && end <= range.end).then(|| (address - range.start, &**device))
    }

    /// Reads at `address`; ones where no device is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes at `address`; lost where no device is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::lock;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            lock(&self.0).push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_owns_the_whole_range() {
        let recorder = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x10..0x20, recorder.clone()).unwrap();
        bus.insert(0x20..0x28, Arc::new(Recorder::default())).unwrap();
        bus.insert(0..0x8, Arc::new(Recorder::default())).unwrap();

        let mut data = [0; 2];
        bus.read(0x13, &mut data);
        assert_eq!(data, [3, 3]);
        for nobody in [0x8, 0xf, 0x1f, 0x28, u64::MAX] {
            bus.read(nobody, &mut data);
            assert_eq!(data, [0xff, 0xff], "{nobody:#x}");
            bus.write(nobody, &data);
        }
        bus.write(0x1e, &data);
        assert_eq!(*lock(&recorder.0), [(0xe, vec![0xff, 0xff])]);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x10..0x20, Arc::new(Recorder::default())).unwrap();
        for range in [0x10..0x20, 0..0x11, 0x1f..0x30, 0..0x40, 0x14..0x15] {
            assert!(bus.insert(range, Arc::new(Recorder::default())).is_err());
        }
    }
}
