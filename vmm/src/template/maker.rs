//! Makes a template of the machine that it is in.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use katana_protocol::bridge;
use katana_protocol::vmm::Machine as Shape;
use kvm_ioctls::{VcpuFd, VmFd};
use sha2::{Digest, Sha256};
use vm_memory::{Bytes, GuestMemory as _};

use super::{Error, MAGIC, PAGE, State, failed, locate, program};
use crate::cpu::{self, CpuState};
use crate::kvm;
use crate::memory::{GuestMemory, Range, ranges};
use crate::pci::{TemplateRegister, VirtioPci};
use crate::sync::lock;

const HUGE_PAGE: u64 = 2 << 20;
/// Pages that are looked at at once.
const CHUNK: u64 = 512;
/// So many pages that the guest has not touched are mapped along when others on both sides are: a mapping more
/// costs more than what a hole in the file would.
const GAP: u64 = 16;

/// What a guest asks the maker for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Others may be restored from here.
    Template,
    /// Time may pass.
    Later,
    /// Nothing, and it is too late.
    Nothing,
}

/// What it takes to make a template.
pub struct Maker {
    /// Where the guest says how far it is.
    pub register: Arc<TemplateRegister>,
    /// The kernel's machine.
    pub vm: Arc<VmFd>,
    /// The registers of its vCPUs.
    pub msr_indices: Vec<u32>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The devices in their order on the bus.
    pub functions: Vec<Arc<VirtioPci>>,
    /// The machine.
    pub shape: Shape,
    /// Where the guest's code is.
    pub code: Range,
    /// Empty, to become the template.
    pub file: File,
    /// Called with the result.
    pub made: Box<dyn FnOnce(Result<(), Error>) + Send>,
}

impl Maker {
    /// What the guest has asked for since the last call.
    pub fn asked(&self) -> Option<Asked> {
        match self.register.take() {
            _ if self.register.is_closed() => Some(Asked::Nothing),
            bridge::READY => Some(Asked::Template),
            bridge::LATER => Some(Asked::Later),
            _ => None,
        }
    }

    /// Advances the guest's clocks by a few seconds at once, so that what its kernel has put off is done before others
    /// are restored from it.
    ///
    /// # Errors
    /// When KVM does not take it. The guest continues all the same.
    pub fn advance_clock(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        kvm::set_clock(&self.vm, kvm::clock(&self.vm)? + bridge::SKIPPED * 1_000_000_000)?;
        Ok(cpu::skip(vcpu, bridge::SKIPPED)?)
    }

    /// Makes the template, closes the file, and reports the result. The vCPU is the only one that has run, has
    /// completed its last exit, and continues afterwards.
    pub fn make(self, vcpu: &VcpuFd) {
        let made = self.try_make(vcpu);
        // Whoever gets the report makes sure that nobody can write to the file any more.
        drop(self.file);
        (self.made)(made);
    }

    /// Reports that there will be none.
    pub fn give_up(self) {
        (self.made)(Err(Error::TooLate));
    }

    fn try_make(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        // Whoever serves a queue holds the device; so nothing is on its way anywhere as long as this thread does.
        let held: Vec<_> = self.functions.iter().map(|function| lock(function.device())).collect();
        let mut state = State {
            program: program(),
            shape: self.shape.clone(),
            extents: Vec::new(),
            cpu: CpuState::take(vcpu, &self.msr_indices)?,
            clock: kvm::clock(&self.vm)?,
            functions: self.functions.iter().map(|function| function.save()).collect(),
        };
        state.extents = self.write_memory().map_err(failed("write memory"))?;
        drop(held);
        self.gather_code();
        let mut bytes = postcard::to_allocvec(&state).map_err(Error::Encoding)?;
        let hash = Sha256::digest(&bytes);
        let length = (bytes.len() as u64).to_le_bytes();
        for part in [&MAGIC[..], &length, &hash] {
            bytes.extend_from_slice(part);
        }
        self.file.write_all_at(&bytes, self.shape.memory_mib << 20).map_err(failed("write state"))
    }

    /// Writes the pages that are not empty to their places; answers where they are.
    fn write_memory(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let total: u64 = ranges(self.shape.memory_mib << 20).map(|(_, size)| size).sum();
        for chunk in (0..total).step_by((CHUNK * PAGE) as usize) {
            for page in self.touched(chunk, CHUNK.min((total - chunk) / PAGE))? {
                let (offset, mut bytes) = (chunk + page * PAGE, [0; PAGE as usize]);
                let at = locate(self.shape.memory_mib, offset).ok_or(io::ErrorKind::InvalidInput)?;
                self.memory.read_slice(&mut bytes, at).map_err(io::Error::other)?;
                if bytes.iter().all(|byte| *byte == 0) {
                    continue;
                }
                self.file.write_all_at(&bytes, offset)?;
                match extents.last_mut() {
                    // Memory below and above the hole are mappings of their own.
                    Some((start, length))
                        if offset <= *start + *length + GAP * PAGE
                            && locate(self.shape.memory_mib, *start)
                                .is_some_and(|s| at.0 - s.0 == offset - *start) =>
                    {
                        *length = offset + PAGE - *start;
                    }
                    _ => extents.push((offset, PAGE)),
                }
            }
        }
        Ok(extents)
    }

    /// Has the file's pages with the guest's code lie in huge pages, so that whoever maps them there takes a few faults
    /// for all of it, and the guest's CPU finds it quickly. Not every file system can.
    fn gather_code(&self) {
        const MADV_COLLAPSE: libc::c_int = 25;
        let start = self.code.0.next_multiple_of(HUGE_PAGE);
        let length = ((self.code.0 + self.code.1) / HUGE_PAGE * HUGE_PAGE).saturating_sub(start) as usize;
        if length == 0 {
            return;
        }
        // Room to move the mapping to a boundary of huge pages.
        let room = length + HUGE_PAGE as usize;
        let (reserved, shared) =
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let all = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, reserved, -1, 0) };
        if all == libc::MAP_FAILED {
            log::debug!("the guest's code in huge pages: {}", io::Error::last_os_error());
            return;
        }
        let at = all.wrapping_byte_add(all.align_offset(HUGE_PAGE as usize));
        // SAFETY: the range lies inside of the mapping just made, which nobody else knows. Huge pages change no
        // content. Below the hole, the file has memory at the addresses where the guest has it.
        let gathered = unsafe {
            libc::mmap(at, length, libc::PROT_READ, shared, self.file.as_raw_fd(), start as i64) == at
                && libc::madvise(at, length, MADV_COLLAPSE) == 0
        };
        if !gathered {
            log::debug!("the guest's code in huge pages: {}", io::Error::last_os_error());
        }
        // SAFETY: nobody uses it.
        unsafe { libc::munmap(all, room) };
    }

    /// Which of these pages the host has memory for.
    fn touched(&self, offset: u64, pages: u64) -> io::Result<Vec<u64>> {
        let at = locate(self.shape.memory_mib, offset).ok_or(io::ErrorKind::InvalidInput)?;
        let slice = self.memory.get_slice(at, (pages * PAGE) as usize).map_err(io::Error::other)?;
        let mut present = vec![0; pages as usize];
        let address = slice.ptr_guard().as_ptr().cast_mut().cast();
        // SAFETY: the range is mapped for as long as `memory` lives, and there is a byte for each of its pages.
        if unsafe { libc::mincore(address, (pages * PAGE) as usize, present.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((0..pages).zip(present).filter(|(_, present)| present & 1 != 0).map(|(page, _)| page).collect())
    }
}
