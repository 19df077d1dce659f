//! A disk, and what a driver can ask of it (virtio 1.2, 5.2.6).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use katana_protocol::counters::Counter;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{ByteValued, Le32, Le64};

use super::patience::Patience;
use super::slot::Slot;
use crate::counters;
use crate::virtio::chain::{Buffers, Chain};

/// The unit of capacity and position, whatever the block size.
pub const SECTOR: u64 = 512;
/// Data of one request: with less work at once, a reset need not wait for long. Linux sends 1.25 MiB unless configured
/// otherwise.
const LONGEST_TRANSFER: usize = 64 << 20;
/// Ranges of one request to clear.
pub const MOST_RANGES: u32 = 16;
/// Sectors of such a range, 1 GiB: as with transfers, the host's file system is not to be busy for long.
pub const LONGEST_RANGE: u32 = 1 << 21;
/// What file systems give back is whole blocks of this many sectors.
pub const RANGE_ALIGNMENT: u32 = 8;

/// A file or block device that serves as a disk. Dropped, it is closed.
pub struct Disk {
    file: File,
    shape: Shape,
    patience: Patience,
}

/// What a driver sees of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Its size.
    pub sectors: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether it takes requests to discard sectors and to write zeros.
    pub clears: bool,
}

/// Why a file is no disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file's size cannot be read.
    #[error("its size cannot be read: {0}")]
    Size(#[source] io::Error),
    /// No file or block device, or an empty one.
    #[error("it holds not even one sector")]
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

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Range {
    sector: Le64,
    sectors: Le32,
    flags: Le32,
}

// SAFETY: plain integers without padding.
unsafe impl ByteValued for Range {}

/// Why a request has no answer at all.
#[derive(Debug, thiserror::Error)]
#[error("a request without room for a status")]
pub struct NoStatus;

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

/// Serves one request, or fails it without a disk; returns how many bytes of its memory were written.
///
/// # Errors
/// When it has no room for an answer.
pub fn request(mut chain: Chain<'_>, disk: Option<&mut Disk>, slot: &Slot<'_>) -> Result<u32, NoStatus> {
    // How the parts are spread over descriptors is the driver's business (virtio 1.2, 2.7.4.1): the status is the
    // last byte that can be written.
    let room = chain.writable.len().checked_sub(1).ok_or(NoStatus)?;
    let mut answer = chain.writable.split_front(room);
    let result = match (chain.readable.read::<Header>(), disk) {
        (Some(header), Some(disk)) => {
            let result = disk.perform(header, &chain.readable, &mut answer, slot);
            disk.patience.end(slot, result.is_ok());
            result
        }
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

/// As what a request is counted.
fn counter(kind: u32) -> Counter {
    match kind {
        VIRTIO_BLK_T_IN => Counter::DiskRead,
        VIRTIO_BLK_T_OUT => Counter::DiskWrite,
        VIRTIO_BLK_T_FLUSH => Counter::DiskFlush,
        _ => Counter::DiskOther,
    }
}

impl Disk {
    /// A disk of what is in a regular file or a block device.
    ///
    /// # Errors
    /// When the file is none of these.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(Error::Size)?;
        // A block device's metadata have no size, but its end can be found.
        let size = if metadata.is_file() { Ok(metadata.len()) } else { file.seek(SeekFrom::End(0)) };
        let sectors = size.map_err(Error::Size)? / SECTOR;
        if sectors == 0 {
            return Err(Error::Empty);
        }
        let shape = Shape { sectors, read_only, clears: metadata.is_file() && !read_only };
        Ok(Self { file, shape, patience: Patience::new() })
    }

    /// What a driver sees of it.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    fn perform(
        &mut self,
        header: Header,
        data: &Buffers<'_>,
        answer: &mut Buffers<'_>,
        slot: &Slot<'_>,
    ) -> Result<usize, Failure> {
        let sector = header.sector.to_native();
        let kind = header.kind.to_native();
        counters::count(counter(kind));
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, answer),
            VIRTIO_BLK_T_OUT => self.write(sector, data, slot),
            VIRTIO_BLK_T_FLUSH => {
                // Once only, even if the host is full: it has then dropped what it could not write, and the next try
                // would find nothing amiss.
                self.file.sync_data()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(answer.write_bytes(slot.serial)),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if self.shape.clears => {
                self.clear(kind, data, slot)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Where a transfer starts, in bytes, if all of it is inside the disk.
    fn offset(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let whole = (length as u64).is_multiple_of(SECTOR) && length <= LONGEST_TRANSFER;
        let end = sector.checked_add(length as u64 / SECTOR);
        match end {
            Some(end) if whole && end <= self.shape.sectors => Ok(sector * SECTOR),
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
        counters::add(Counter::DiskBytesRead, length);
        Ok(length)
    }

    fn write(&mut self, sector: u64, data: &Buffers<'_>, slot: &Slot<'_>) -> Result<usize, Failure> {
        let mut offset = self.offset(sector, data.len())?;
        if self.shape.read_only {
            return Err(Failure::Io);
        }
        let mut data = data.clone();
        while !data.is_empty() {
            match self.patience.write(slot, || data.write_to_at(self.file.as_fd(), offset))? {
                0 => return Err(Failure::Io),
                count => {
                    data.advance(count);
                    offset += count as u64;
                    counters::add(Counter::DiskBytesWritten, count);
                }
            }
        }
        Ok(0)
    }

    /// Has ranges of sectors read as zeros. None is touched unless all of them are right.
    fn clear(&mut self, kind: u32, data: &Buffers<'_>, slot: &Slot<'_>) -> Result<usize, Failure> {
        let (count, rest) = (data.len() / size_of::<Range>(), data.len() % size_of::<Range>());
        if rest != 0 || !(1..=MOST_RANGES as usize).contains(&count) {
            return Err(Failure::Io);
        }
        let mut data = data.clone();
        let mut ranges = Vec::with_capacity(count);
        while let Some(range) = data.read::<Range>() {
            ranges.push((clearing(kind, range.flags.to_native())?, self.range(range)?));
        }
        for (mode, (offset, length)) in ranges {
            let clear = || allocate(&self.file, mode, offset, length);
            // The driver can do without a discard, which is to make room.
            let done = if kind == VIRTIO_BLK_T_DISCARD { clear() } else { self.patience.write(slot, clear) };
            match done {
                // From now on it does without this as well.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return Err(Failure::Unsupported);
                }
                done => done?,
            }
        }
        Ok(0)
    }

    /// Where a range starts and how long it is, in bytes, if all of it is inside the disk.
    fn range(&self, range: Range) -> Result<(i64, i64), Failure> {
        let (sector, sectors) = (range.sector.to_native(), range.sectors.to_native());
        let end = sector.checked_add(sectors.into()).filter(|end| *end <= self.shape.sectors);
        if end.is_none() || !(1..=LONGEST_RANGE).contains(&sectors) {
            return Err(Failure::Io);
        }
        // No file is longer than an offset can say.
        let bytes = |sectors: u64| i64::try_from(sectors * SECTOR).map_err(|_| Failure::Io);
        Ok((bytes(sector)?, bytes(sectors.into())?))
    }
}

fn allocate(file: &File, mode: FallocateFlags, offset: i64, length: i64) -> io::Result<()> {
    loop {
        match fallocate(file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, length) {
            Err(Errno::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

/// How to clear a range (virtio 1.2, 5.2.6.2): what may be given back to the host is.
fn clearing(kind: u32, flags: u32) -> Result<FallocateFlags, Failure> {
    match (kind, flags) {
        (VIRTIO_BLK_T_DISCARD, 0) | (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => {
            Ok(FallocateFlags::FALLOC_FL_PUNCH_HOLE)
        }
        (VIRTIO_BLK_T_WRITE_ZEROES, 0) => Ok(FallocateFlags::FALLOC_FL_ZERO_RANGE),
        _ => Err(Failure::Unsupported),
    }
}
