//! Templates: a machine that has booted up to where its agent waits for a pod, kept in a file, from which others are
//! restored.
//!
//! The file is the guest's memory from its first byte on, with holes where the guest has touched nothing, then
//! everything else ([`State`]), then a trailer with the length and hash of that. When the file is complete, its time of
//! modification is set to one that no write can leave behind ([`SEALED`]): the memory is too large to be looked at on
//! each start, but a file that was written to afterwards is known by its time.

mod maker;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use katana_protocol::vmm::{Machine as Shape, SEALED};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::cpu::CpuState;
use crate::memory::{GuestMemory, ranges};
use crate::pci::FunctionState;

pub use maker::{Asked, Maker};

const MAGIC: [u8; 8] = *b"KATANA\0\x01";
/// Magic, length, hash.
const TRAILER: u64 = 8 + 8 + 32;
/// Far more than a state takes.
const LONGEST_STATE: u64 = 16 << 20;
const PAGE: u64 = 4096;

/// Why a template cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No descriptor came with the request.
    #[error("no file")]
    NoFile,
    /// Reading or writing it.
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    /// Cut, or not one at all.
    #[error("the file is not a complete template")]
    Incomplete,
    /// Somebody wrote to it.
    #[error("the file was changed after it had been made")]
    Changed,
    /// A bit flipped.
    #[error("the file is damaged")]
    Damaged,
    /// The guest has connected to the host: from now on it knows a pod, and whatever it says may be a container's word.
    #[error("the guest's agent has not said that one can be made of it")]
    TooLate,
    /// Of another machine or another program.
    #[error("the file is of another machine or another version")]
    Other,
    /// The state of a vCPU.
    #[error(transparent)]
    Cpu(#[from] crate::cpu::Error),
    /// The clock.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::Error),
    /// It cannot be written down.
    #[error("the machine's state: {0}")]
    Encoding(postcard::Error),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Io(what, error)
}

/// All of a machine but its memory.
#[derive(Serialize, Deserialize)]
pub struct State {
    program: String,
    shape: Shape,
    /// Start and length of what the file has of the memory, in whole pages.
    extents: Vec<(u64, u64)>,
    /// Nanoseconds of kvm-clock.
    pub clock: u64,
    /// The first vCPU; the others have not run.
    pub cpu: CpuState,
    /// The devices in their order on the bus.
    pub functions: Vec<FunctionState>,
}

/// What a machine has to have in common with the one that it comes from.
fn comparable(shape: &Shape) -> Shape {
    Shape { guest_cid: 0, template: katana_protocol::vmm::Template::None, ..shape.clone() }
}

fn program() -> String {
    format!("kata-vmm {}", env!("CARGO_PKG_VERSION"))
}

impl State {
    /// The guest's context id in the template.
    pub fn guest_cid(&self) -> u32 {
        self.shape.guest_cid
    }

    /// Reads a template for a machine of this shape, but for its memory.
    ///
    /// # Errors
    /// When there is any doubt about it.
    pub fn read(file: &File, shape: &Shape) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(failed("look at the file"))?;
        let memory = shape.memory_mib << 20;
        let length = metadata.len().checked_sub(memory + TRAILER).ok_or(Error::Incomplete)?;
        if length > LONGEST_STATE {
            return Err(Error::Incomplete);
        }
        let mut bytes = vec![0; (length + TRAILER) as usize];
        file.read_exact_at(&mut bytes, memory).map_err(failed("read the file"))?;
        let (state, trailer) = bytes.split_at(length as usize);
        if !trailer.starts_with(&MAGIC) || trailer[8..16] != length.to_le_bytes() {
            return Err(Error::Incomplete);
        }
        if trailer[16..] != Sha256::digest(state)[..] {
            return Err(Error::Damaged);
        }
        if (metadata.mtime(), metadata.mtime_nsec()) != (SEALED, 0) {
            return Err(Error::Changed);
        }
        let state: Self = postcard::from_bytes(state).map_err(|_| Error::Other)?;
        if state.program != program() || comparable(&state.shape) != comparable(shape) {
            return Err(Error::Other);
        }
        Ok(state)
    }

    /// Maps what the file has of the memory over `memory`, private: whoever writes gets a page of his own. The rest
    /// stays what it is, fresh memory.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn map_memory(&self, file: &File, memory: &GuestMemory) -> Result<(), Error> {
        for (offset, length) in &self.extents {
            let at = locate(self.shape.memory_mib, *offset).ok_or(Error::Damaged)?;
            let slice = memory.get_slice(at, *length as usize).map_err(|_| Error::Damaged)?;
            let address = slice.ptr_guard_mut().as_ptr().cast();
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the range is guest memory, which holds no Rust objects and stays mapped in its place.
            let mapped = unsafe {
                libc::mmap(address, *length as usize, access, flags, file.as_raw_fd(), *offset as i64)
            };
            if mapped == libc::MAP_FAILED {
                return Err(Error::Io("map the file", io::Error::last_os_error()));
            }
        }
        Ok(())
    }
}

/// Where in the guest's memory a byte of the file belongs.
fn locate(mib: u64, offset: u64) -> Option<GuestAddress> {
    let mut before = 0;
    for (start, size) in ranges(mib << 20) {
        if offset < before + size {
            return Some(GuestAddress(start + offset - before));
        }
        before += size;
    }
    None
}

#[cfg(test)]
mod tests;
