//! KASLR: the kernel is put and runs somewhere else at each boot. That is the work of who loads a kernel; a bzImage
//! brings a loader that does it (arch/x86/boot/compressed/kaslr.c and misc.c). An ELF kernel has the table that this
//! takes in its section `.relocs`, where guest-kernel/build has put `vmlinux.relocs` of Linux's build.
//!
//! Physical and virtual address are chosen apart, in steps of 2 MiB, which is what the kernel's first page tables can
//! map.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory as _};

use super::{Error, MAPPED, dword, qword, word};
use crate::memory::{GuestMemory, Range};

/// The name of the table's section.
const SECTION: &[u8] = b".relocs\0";
/// Where virtual addresses of the kernel begin: __START_KERNEL_map.
const VIRTUAL_BASE: u64 = 0xffff_ffff_8000_0000;
/// What of them a kernel that can be moved has for itself: KERNEL_IMAGE_SIZE.
const VIRTUAL_SIZE: u64 = 1 << 30;
const STEP: u64 = 2 << 20;

/// ELF-64's section headers, System V ABI chapter 4.
const SECTION_HEADER: usize = 64;
/// Names of sections take some hundred bytes.
const LONGEST_NAMES: u64 = 1 << 16;

/// How far from where it was linked to be a kernel lies and runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shift {
    /// Added to physical addresses.
    pub physical: u64,
    /// Added to virtual ones, which Intel calls linear.
    pub linear: u64,
}

/// The words of a command line that bear on it.
pub struct Wishes {
    /// Nothing is to be random.
    pub off: bool,
    /// Memory is not to be used, of which only the kernel finds out which.
    pub fewer_places: bool,
}

impl Wishes {
    /// Of these parameters.
    pub fn of(parameters: &str) -> Self {
        let any = |found: fn(&str) -> bool| parameters.split_ascii_whitespace().any(found);
        Self {
            off: any(|word| word == "nokaslr"),
            fewer_places: any(|word| word.starts_with("mem=") || word.starts_with("memmap=")),
        }
    }
}

impl Shift {
    /// Any of the places for a kernel that was linked to lie in `kernel`, in memory whose low part ends at `top`. The
    /// same numbers lead to the same place.
    pub fn choose(kernel: Range, top: u64, [physical, linear]: [u64; 2]) -> Self {
        let (start, size) = kernel;
        // Not below where it was linked to be: low memory has other uses.
        let within = |end: u64, random: u64| {
            let places = end.saturating_sub(start).saturating_sub(size) / STEP + 1;
            random % places * STEP
        };
        Self { physical: within(top.min(MAPPED), physical), linear: within(VIRTUAL_SIZE, linear) }
    }
}

/// Where in a kernel its own addresses are.
pub struct Relocations {
    table: Vec<u8>,
}

impl Relocations {
    /// Those of a kernel with this header, in a file of so many bytes; nothing if it cannot be moved.
    ///
    /// # Errors
    /// When the file is damaged or cannot be read.
    pub fn read(kernel: &File, header: &[u8], length: u64) -> Result<Option<Self>, Error> {
        let (offset, size) = (qword(header, 40), word(header, 58));
        let (count, names) = (word(header, 60), word(header, 62));
        if count == 0 {
            return Ok(None);
        }
        if usize::from(size) != SECTION_HEADER || names >= count {
            return Err(Error::Damaged("its section headers are none"));
        }
        let part = |what, offset: u64, size: u64| {
            if offset.checked_add(size).is_none_or(|end| end > length) {
                return Err(Error::Damaged("its sections reach beyond the end of the file"));
            }
            let mut bytes = vec![0; size as usize];
            kernel.read_exact_at(&mut bytes, offset).map_err(|error| Error::Read { what, error })?;
            Ok(bytes)
        };
        let headers = part("section headers", offset, u64::from(count) * SECTION_HEADER as u64)?;
        let place = |header: &[u8]| (qword(header, 24), qword(header, 32));
        let mut sections = headers.chunks_exact(SECTION_HEADER);
        let (offset, size) = sections.clone().nth(usize::from(names)).map(place).unwrap_or_default();
        if size > LONGEST_NAMES {
            return Err(Error::Damaged("its sections have no names"));
        }
        let names = part("names of sections", offset, size)?;
        let ours = |header: &&[u8]| {
            names.get(dword(header, 0) as usize..).is_some_and(|name| name.starts_with(SECTION))
        };
        let Some((offset, size)) = sections.find(ours).map(place) else { return Ok(None) };
        Ok(Some(Self { table: part("relocations", offset, size)? }))
    }

    /// Has a kernel run at its shifted virtual addresses. It was linked to lie in `kernel`, and has been put where it
    /// lies. Nothing else knows of `memory` yet.
    ///
    /// # Errors
    /// When a relocation is of something else than this kernel.
    pub fn apply(&self, memory: &GuestMemory, kernel: Range, shift: Shift) -> Result<(), Error> {
        let (start, size) = kernel;
        let slice = memory.get_slice(GuestAddress(start + shift.physical), size as usize)?;
        let guard = slice.ptr_guard_mut();
        // There are hundreds of thousands; each through the memory's own door would be a tenth of a boot.
        // SAFETY: the guard holds `size` mapped bytes. No vCPU and no device exists so far, so that nobody else reaches
        // them.
        let bytes = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), size as usize) };
        let mut image = Image { bytes, start: VIRTUAL_BASE + start };
        let [wide, inverse, narrow] = self.lists()?;
        // 32 bits hold the lower half of an address, or its negative.
        let half = shift.linear as u32;
        let add = |number: u64| number.wrapping_add(shift.linear);
        places(wide).try_for_each(|place| {
            image.change(place, |bytes| add(u64::from_le_bytes(bytes)).to_le_bytes())
        })?;
        let mut change = |list, by: u32| {
            places(list).try_for_each(|place| {
                image.change(place, |bytes| u32::from_le_bytes(bytes).wrapping_add(by).to_le_bytes())
            })
        };
        change(inverse, half.wrapping_neg())?;
        change(narrow, half)
    }

    /// The places of addresses of 64 bits, of those of 32 that count the other way round, and of others of 32. Each
    /// list has a zero before it. Linux 6.15 and newer have none that count the other way round.
    fn lists(&self) -> Result<[&[[u8; 4]]; 3], Error> {
        let (words, rest) = self.table.as_chunks();
        let mut lists = words.split(|word| *word == [0; 4]);
        match [lists.next(), lists.next(), lists.next(), lists.next(), lists.next()] {
            [Some([]), Some(wide), Some(narrow), None, None] if rest.is_empty() => Ok([wide, &[], narrow]),
            [Some([]), Some(wide), Some(inverse), Some(narrow), None] if rest.is_empty() => {
                Ok([wide, inverse, narrow])
            }
            _ => Err(Error::Damaged("its relocations are none")),
        }
    }
}

/// The virtual addresses in a list, of which the upper halves are all ones.
fn places(list: &[[u8; 4]]) -> impl Iterator<Item = u64> {
    list.iter().map(|word| i64::from(i32::from_le_bytes(*word)) as u64)
}

/// A kernel in memory.
struct Image<'a> {
    bytes: &'a mut [u8],
    /// The virtual address for which its first byte was linked.
    start: u64,
}

impl Image<'_> {
    fn change<const N: usize>(
        &mut self,
        place: u64,
        change: impl Fn([u8; N]) -> [u8; N],
    ) -> Result<(), Error> {
        let bytes = place.checked_sub(self.start).and_then(|offset| self.bytes.get_mut(offset as usize..));
        let bytes = bytes.and_then(<[u8]>::first_chunk_mut);
        let bytes = bytes.ok_or(Error::Damaged("a relocation is outside of the kernel"))?;
        *bytes = change(*bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
