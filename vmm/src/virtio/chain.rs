//! Descriptor chains, checked: the one door through which devices reach the memory that a driver names.
//!
//! A [`Chain`] is read from the descriptor table once. What it hands out are slices that lie in guest memory, so
//! device code does no arithmetic on guest addresses. The bytes in them can change at any time: a value is
//! copied out ([`Buffers::read`]) before it is looked at.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, GuestMemory as _, VolatileSlice};

use crate::memory::GuestMemory;

/// Longest chain; as many pieces as readv(2) and its relatives take (UIO_MAXIOV).
pub const MAX_DESCRIPTORS: usize = 1024;
/// Bytes of a page of the host.
const PAGE: usize = 4096;

/// What is wrong with a chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The first descriptor cannot be read, or an indirect table is malformed.
    #[error("it has no descriptor that can be read")]
    Empty,
    /// Longer than any driver needs.
    #[error("it has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A loop, a next index beyond the table, or more than 4 GiB.
    #[error("it does not end properly")]
    Unterminated,
    /// virtio 1.2, 2.7.4.2: what the device writes comes after what it reads.
    #[error("a descriptor to be read follows one to be written")]
    Order,
    /// Memory that is not there.
    #[error("{length} bytes at {address:#x} are not memory")]
    Address {
        /// Guest address.
        address: u64,
        /// Bytes from there.
        length: u32,
    },
}

/// A request of the driver: buffers for the device to read, and buffers for it to write.
pub struct Chain<'m> {
    head: u16,
    /// Written by the driver.
    pub readable: Buffers<'m>,
    /// To be written by the device.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Reads and checks all descriptors of a chain.
    ///
    /// # Errors
    /// When the chain breaks the specification or names memory that is not there.
    pub fn new(memory: &'m GuestMemory, raw: DescriptorChain<&'m GuestMemory>) -> Result<Self, ChainError> {
        let mut chain =
            Self { head: raw.head_index(), readable: Buffers::default(), writable: Buffers::default() };
        walk(raw, |descriptor| {
            let (address, length) = (descriptor.addr(), descriptor.len());
            if length == 0 {
                return Ok(());
            }
            let bytes = memory
                .get_slice(address, length as usize)
                .map_err(|_| ChainError::Address { address: address.0, length })?;
            // SAFETY: the slice was just checked to lie in one region of `memory`, whose mapping lives for 'm. It is
            // taken without its bitmap, since nothing tracks writes to guest memory.
            let bytes = unsafe { VolatileSlice::new(bytes.ptr_guard_mut().as_ptr(), bytes.len()) };
            if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable }.push(bytes);
            Ok(())
        })?;
        Ok(chain)
    }

    /// The index by which the chain is returned.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// Checks the shape of a chain whose memory somebody else is going to check.
///
/// # Errors
/// When the chain breaks the specification.
pub fn check(raw: DescriptorChain<&GuestMemory>) -> Result<(), ChainError> {
    walk(raw, |_| Ok(()))
}

/// Visits each descriptor. The iterator of virtio-queue ends at whatever is wrong; that shows in a last
/// descriptor that has a successor.
fn walk(
    raw: DescriptorChain<&GuestMemory>,
    mut visit: impl FnMut(Descriptor) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let (mut count, mut writing, mut more) = (0, false, true);
    for descriptor in raw {
        count += 1;
        if count > MAX_DESCRIPTORS {
            return Err(ChainError::TooLong);
        }
        if writing && !descriptor.is_write_only() {
            return Err(ChainError::Order);
        }
        (writing, more) = (descriptor.is_write_only(), descriptor.has_next());
        visit(descriptor)?;
    }
    match (count, more) {
        (0, _) => Err(ChainError::Empty),
        (_, true) => Err(ChainError::Unterminated),
        (_, false) => Ok(()),
    }
}

/// A sequence of pieces of guest memory, consumed from the front.
#[derive(Clone, Default)]
pub struct Buffers<'m> {
    pieces: VecDeque<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, piece: VolatileSlice<'m>) {
        self.length += piece.len();
        self.pieces.push_back(piece);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, count: usize) {
        self.split_front(count);
    }

    /// Keeps the first `count` bytes only.
    pub fn truncate(&mut self, count: usize) {
        *self = self.split_front(count);
    }

    /// Takes the first `count` bytes, or all if there are fewer.
    pub fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        while front.length < count {
            let Some(piece) = self.pieces.pop_front() else { break };
            self.length -= piece.len();
            match piece.split_at(count - front.length) {
                Ok((taken, rest)) if !rest.is_empty() => {
                    front.push(taken);
                    self.length += rest.len();
                    self.pieces.push_front(rest);
                }
                _ => front.push(piece),
            }
        }
        front
    }

    /// Appends what `other` has.
    pub fn extend(&mut self, other: &Self) {
        self.pieces.extend(other.pieces.iter().cloned());
        self.length += other.length;
    }

    /// Copies bytes out until `bytes` is full or nothing is left; returns how many.
    pub fn read_bytes(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.split_front(bytes.len()).pieces {
            done += bytes.get_mut(done..).map_or(0, |rest| piece.copy_to(rest));
        }
        done
    }

    /// Copies bytes in until none is left or there is no more room; returns how many.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for piece in &self.split_front(bytes.len()).pieces {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        }
        bytes.len() - rest.len()
    }

    /// Copies a value out, if it is there in full.
    pub fn read<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut value = T::default();
        (self.read_bytes(value.as_mut_slice()) == size_of::<T>()).then_some(value)
    }

    /// Fills the memory with what `fd` has to offer, as readv(2).
    ///
    /// # Errors
    /// What the system call says.
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: the iovecs describe guest memory that is mapped for 'm; it holds no Rust objects.
        retry(|| unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) })
    }

    /// As [`Self::read_from`], from a position in a file.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read_from_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (iovecs, offset) = (self.iovecs(), position(offset)?);
        // SAFETY: as in `read_from`.
        retry(|| unsafe { libc::preadv(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs), offset) })
    }

    /// Gives the bytes to `fd`, as writev(2).
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        // SAFETY: as in `read_from`; the memory is only read.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) })
    }

    /// As [`Self::write_to`], to a position in a file.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_to_at(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (iovecs, offset) = (self.iovecs(), position(offset)?);
        // SAFETY: as in `write_to`.
        retry(|| unsafe { libc::pwritev(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs), offset) })
    }

    /// The pieces, as many as one system call takes.
    fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |piece: &VolatileSlice<'m>| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        };
        self.pieces.iter().take(MAX_DESCRIPTORS).map(iovec).collect()
    }

    /// In how many pieces the memory lies.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Gives the memory of all whole pages back to the host. They read as zeros, or as the file that is mapped there.
    ///
    /// # Errors
    /// What madvise(2) says.
    pub fn discard(&self) -> io::Result<()> {
        for piece in &self.pieces {
            let guard = piece.ptr_guard_mut();
            let skip = guard.as_ptr().align_offset(PAGE).min(guard.len());
            let length = (guard.len() - skip) / PAGE * PAGE;
            if length == 0 {
                continue;
            }
            // SAFETY: the range lies in guest memory, which holds no Rust objects; whoever reads it next expects
            // nothing.
            let done = unsafe { libc::madvise(guard.as_ptr().add(skip).cast(), length, libc::MADV_DONTNEED) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Fills the memory with random bytes, up to `limit` of them; returns how many.
    ///
    /// # Errors
    /// What getrandom(2) says.
    pub fn fill_random(&self, limit: usize) -> io::Result<usize> {
        let mut done = 0;
        for piece in &self.pieces {
            let wanted = piece.len().min(limit - done);
            if wanted == 0 {
                break;
            }
            // SAFETY: the piece is guest memory of at least `wanted` bytes.
            done += retry(|| unsafe { libc::getrandom(piece.ptr_guard_mut().as_ptr().cast(), wanted, 0) })?;
        }
        Ok(done)
    }
}

fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    // At most MAX_DESCRIPTORS.
    iovecs.len() as libc::c_int
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Repeats a system call that a signal interrupted.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
