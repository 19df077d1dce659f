//! virtio-blk (virtio 1.2, 5.2): a slot for a disk that may come later.
//!
//! Wiring: `Blk::new(serial)` makes an empty slot of capacity 0; the guest finds the serial in
//! /sys/block/vdX/serial. `attach(file, read_only)`, on the device thread, gives it a disk, and `detach` takes it away.
//! The guest's driver is to start after the one and to let go before the other; to a driver that is there all the time,
//! the capacity changes, and a read-only disk refuses writes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{ByteValued, Le32, Le64};

use super::base::{self, Base, Event};
use super::chain::{Buffers, Chain};
use super::{Activation, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [128];
const REQUESTS: usize = 0;
/// The unit of capacity and position, whatever the block size.
const SECTOR: u64 = 512;
const SERIAL_LENGTH: usize = 20;
/// Data of one request: with less work at once, one disk does not keep the other devices waiting. Linux sends 1.25 MiB
/// unless configured otherwise.
const LONGEST_TRANSFER: usize = 64 << 20;

/// A slot for a disk.
pub struct Blk {
    base: Base,
    serial: [u8; SERIAL_LENGTH],
    disk: Option<Disk>,
}

struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// One disk for each slot.
    #[error("disk slot: it is in use")]
    InUse,
    /// The file's size cannot be read.
    #[error("disk: its size cannot be read: {0}")]
    Size(#[source] io::Error),
    /// No file or block device, or an empty one.
    #[error("disk: it holds not even one sector")]
    Empty,
}

/// The start of a request, virtio 1.2, 5.2.6.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

// SAFETY: plain integers without padding.
unsafe impl ByteValued for Header {}

/// Why a request has no answer at all.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a request without room for a status")]
    NoStatus,
}

/// Why a request failed; what its status says.
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // The guest's driver reports it with the sector; this is for the host's log, where a full disk is found.
        log::debug!("blk: a request failed: {error}");
        Self::Io
    }
}

impl Blk {
    /// An empty slot.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(serial: &str) -> io::Result<Self> {
        let mut bytes = [0; SERIAL_LENGTH];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self { base: Base::new("blk")?, serial: bytes, disk: None })
    }

    /// Puts a disk, a regular file or a block device, into the slot.
    ///
    /// # Errors
    /// When the slot is in use or the file is no disk.
    pub fn attach(&mut self, mut file: File, read_only: bool) -> Result<(), AttachError> {
        if self.disk.is_some() {
            return Err(AttachError::InUse);
        }
        // A block device's metadata have no size, but its end can be found.
        let sectors = file.seek(SeekFrom::End(0)).map_err(AttachError::Size)? / SECTOR;
        if sectors == 0 {
            return Err(AttachError::Empty);
        }
        self.disk = Some(Disk { file, sectors, read_only });
        self.base.config_changed();
        Ok(())
    }

    /// Takes the disk out of the slot.
    pub fn detach(&mut self) {
        self.disk = None;
        self.base.config_changed();
    }

    /// virtio 1.2, 5.2.4, as far as the offered features give it a meaning.
    fn config(&self) -> [u8; 24] {
        let mut config = [0; 24];
        let capacity = self.disk.as_ref().map_or(0, |disk| disk.sectors);
        let fields: [(usize, &[u8]); 3] = [
            (0, &capacity.to_le_bytes()),
            // All of a queue but header and status.
            (12, &(u32::from(QUEUE_SIZES[REQUESTS]) - 2).to_le_bytes()),
            (20, &(SECTOR as u32).to_le_bytes()),
        ];
        for (offset, bytes) in fields {
            config.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
        }
        config
    }

    fn serve(&mut self) {
        let Self { base, serial, disk } = self;
        if let Some((memory, queue)) = base.queue(REQUESTS) {
            queue.serve(memory, |chain| request(chain, disk.as_ref(), serial));
        }
    }
}

/// Serves one request; returns how many bytes of its memory were written.
fn request(mut chain: Chain<'_>, disk: Option<&Disk>, serial: &[u8; SERIAL_LENGTH]) -> Result<u32, Error> {
    // How the parts are spread over descriptors is the driver's business (virtio 1.2, 2.7.4.1): the status is the
    // last byte that can be written.
    let room = chain.writable.len().checked_sub(1).ok_or(Error::NoStatus)?;
    let mut answer = chain.writable.split_front(room);
    let result = match (chain.readable.read::<Header>(), disk) {
        (Some(header), Some(disk)) => perform(header, disk, &chain.readable, &mut answer, serial),
        _ => Err(Failure::Io),
    };
    let (status, written) = match result {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    chain.writable.write_bytes(&[status as u8]);
    Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
}

fn perform(
    header: Header,
    disk: &Disk,
    data: &Buffers<'_>,
    answer: &mut Buffers<'_>,
    serial: &[u8; SERIAL_LENGTH],
) -> Result<usize, Failure> {
    let sector = header.sector.to_native();
    match header.kind.to_native() {
        VIRTIO_BLK_T_IN => disk.read(sector, answer),
        VIRTIO_BLK_T_OUT => disk.write(sector, data),
        VIRTIO_BLK_T_FLUSH => {
            disk.file.sync_data()?;
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => Ok(answer.write_bytes(serial)),
        _ => Err(Failure::Unsupported),
    }
}

impl Disk {
    /// Where a transfer starts, in bytes, if all of it is inside the disk.
    fn offset(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let whole = (length as u64).is_multiple_of(SECTOR) && length <= LONGEST_TRANSFER;
        let end = sector.checked_add(length as u64 / SECTOR);
        match end {
            Some(end) if whole && end <= self.sectors => Ok(sector * SECTOR),
            _ => Err(Failure::Io),
        }
    }

    fn read(&self, sector: u64, answer: &mut Buffers<'_>) -> Result<usize, Failure> {
        let length = answer.len();
        let mut offset = self.offset(sector, length)?;
        while !answer.is_empty() {
            match answer.read_from_at(self.file.as_fd(), offset)? {
                // The file was truncated under the guest.
                0 => return Err(Failure::Io),
                count => {
                    answer.advance(count);
                    offset += count as u64;
                }
            }
        }
        Ok(length)
    }

    fn write(&self, sector: u64, data: &Buffers<'_>) -> Result<usize, Failure> {
        let mut offset = self.offset(sector, data.len())?;
        if self.read_only {
            return Err(Failure::Io);
        }
        let mut data = data.clone();
        while !data.is_empty() {
            match data.write_to_at(self.file.as_fd(), offset)? {
                0 => return Err(Failure::Io),
                count => {
                    data.advance(count);
                    offset += count as u64;
                }
            }
        }
        Ok(0)
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = self.disk.as_ref().is_some_and(|disk| disk.read_only);
        1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | u64::from(read_only) << VIRTIO_BLK_F_RO
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
        self.base.activate(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.base.reset();
    }
}

impl MutEventSubscriber for Blk {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for event in self.base.events() {
            if event == Event::Queue(REQUESTS) {
                self.serve();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.base.init(ops);
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
