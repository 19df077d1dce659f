//! Loading the guest's kernel: an ELF file with the PVH entry, and the structures which that entry expects.
//! The kernel file comes from the host, but it may be cut or be another file altogether.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::memory::{BIOS, GuestMemory, LOW_END, ONE_MIB, ranges};
use crate::mptable;

/// Where the start information, its memory map and the command line are put: low memory that nobody else uses.
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Linux's COMMAND_LINE_SIZE on x86, with the zero at the end.
const COMMAND_LINE_SIZE: usize = 2048;

/// ELF-64, System V ABI chapter 4 and 5.
mod elf {
    pub const MAGIC: &[u8] = b"\x7fELF";
    pub const CLASS_64: u8 = 2;
    pub const LITTLE_ENDIAN: u8 = 1;
    pub const MACHINE_X86_64: u16 = 62;
    pub const HEADER: usize = 64;
    pub const PROGRAM_HEADER: usize = 56;
    pub const LOAD: u32 = 1;
    pub const NOTE: u32 = 4;
}
/// XEN_ELFNOTE_PHYS32_ENTRY: xen/include/public/elfnote.h.
const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Notes of a kernel are a few hundred bytes.
const LARGEST_NOTES: u64 = 64 * 1024;

/// struct hvm_start_info and its memory map: xen/include/public/arch-x86/hvm/start_info.h.
const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
const MEMORY_RAM: u32 = 1;
const MEMORY_RESERVED: u32 = 2;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("guest kernel: {what}: {error}")]
    Read {
        /// Which part of it.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// Another kind of file.
    #[error("guest kernel: not an ELF file for x86-64 (a vmlinux, not a bzImage, is needed)")]
    NotElf,
    /// Offsets or sizes that contradict each other.
    #[error("guest kernel: damaged: {0}")]
    Damaged(&'static str),
    /// Built without CONFIG_PVH.
    #[error("guest kernel: no PVH entry (CONFIG_PVH=y is needed)")]
    NoPvhEntry,
    /// Does not fit into the guest's memory.
    #[error("guest kernel: needs memory at {start:#x}..{end:#x}, which this VM does not have")]
    NoRoom {
        /// First byte.
        start: u64,
        /// Last byte and one.
        end: u64,
    },
    /// Too long for Linux.
    #[error("guest kernel command line: {0} bytes, more than {limit}", limit = COMMAND_LINE_SIZE - 1)]
    CommandLineLength(usize),
    /// A zero would cut it.
    #[error("guest kernel command line: contains a control character")]
    CommandLineCharacter,
    /// Guest memory that must be there is not.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Physical address of the first instruction, in 32-bit mode.
    pub address: u64,
    /// Physical address of the start information, for EBX.
    pub start_info: u64,
}

/// Puts kernel, command line, memory map and MP table into the guest's memory.
///
/// # Errors
/// When the kernel is not one or does not fit.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    parameters: &str,
    mib: u64,
    vcpus: u8,
) -> Result<Entry, Error> {
    let address = load_kernel(memory, kernel)?;
    put_command_line(memory, parameters)?;
    memory.write_slice(&mptable::build(vcpus), GuestAddress(BIOS))?;
    put_start_info(memory, mib)?;
    Ok(Entry { address, start_info: START_INFO })
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn word(bytes: &[u8], offset: usize) -> u16 {
    at(bytes, offset).map_or(0, u16::from_le_bytes)
}

fn dword(bytes: &[u8], offset: usize) -> u32 {
    at(bytes, offset).map_or(0, u32::from_le_bytes)
}

fn qword(bytes: &[u8], offset: usize) -> u64 {
    at(bytes, offset).map_or(0, u64::from_le_bytes)
}

/// A program header.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: dword(bytes, 0),
            offset: qword(bytes, 8),
            address: qword(bytes, 24),
            file_size: qword(bytes, 32),
            memory_size: qword(bytes, 40),
        }
    }
}

/// Loads the segments and answers the PVH entry.
fn load_kernel(memory: &GuestMemory, kernel: &mut File) -> Result<u64, Error> {
    let read = |what| move |error| Error::Read { what, error };
    let length = kernel.metadata().map_err(read("size"))?.len();
    let segments = segments(kernel, length)?;
    let mut entry = None;
    for segment in &segments {
        let end = segment.offset.checked_add(segment.file_size);
        if end.is_none_or(|end| end > length) {
            return Err(Error::Damaged("a segment reaches beyond the end of the file"));
        }
        match segment.kind {
            elf::LOAD => load_segment(memory, kernel, segment)?,
            elf::NOTE if segment.file_size <= LARGEST_NOTES => {
                let mut notes = vec![0; segment.file_size as usize];
                kernel.read_exact_at(&mut notes, segment.offset).map_err(read("notes"))?;
                entry = entry.or(pvh_entry(&notes));
            }
            _ => {}
        }
    }
    let entry = entry.ok_or(Error::NoPvhEntry)?;
    let inside =
        |s: &&Segment| s.kind == elf::LOAD && (s.address..s.address + s.memory_size).contains(&entry);
    if !segments.iter().any(|segment| inside(&segment)) {
        return Err(Error::Damaged("the entry is outside of the kernel"));
    }
    Ok(entry)
}

fn segments(kernel: &File, length: u64) -> Result<Vec<Segment>, Error> {
    let mut header = [0; elf::HEADER];
    match kernel.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::NotElf),
        Err(error) => return Err(Error::Read { what: "header", error }),
    }
    let ours = header.starts_with(elf::MAGIC)
        && header[4..6] == [elf::CLASS_64, elf::LITTLE_ENDIAN]
        && word(&header, 18) == elf::MACHINE_X86_64;
    if !ours {
        return Err(Error::NotElf);
    }
    let (offset, size, count) = (qword(&header, 32), word(&header, 54), word(&header, 56));
    if usize::from(size) != elf::PROGRAM_HEADER || count == 0 {
        return Err(Error::Damaged("no program headers"));
    }
    let mut table = vec![0; usize::from(count) * elf::PROGRAM_HEADER];
    if offset.checked_add(table.len() as u64).is_none_or(|end| end > length) {
        return Err(Error::Damaged("the program headers lie beyond the end of the file"));
    }
    kernel
        .read_exact_at(&mut table, offset)
        .map_err(|error| Error::Read { what: "program headers", error })?;
    Ok(table.chunks_exact(elf::PROGRAM_HEADER).map(Segment::parse).collect())
}

fn load_segment(memory: &GuestMemory, kernel: &mut File, segment: &Segment) -> Result<(), Error> {
    let Segment { offset, address: start, file_size, memory_size, .. } = *segment;
    if file_size > memory_size {
        return Err(Error::Damaged("a segment is larger in the file than in memory"));
    }
    // Below 1 MiB are the structures for the kernel; above the hole a 32-bit entry cannot reach.
    let end = start.checked_add(memory_size).ok_or(Error::Damaged("a segment ends beyond all memory"))?;
    let fits = start >= ONE_MIB && memory.check_range(GuestAddress(start), memory_size.max(1) as usize);
    if !fits || end > crate::memory::HOLE {
        return Err(Error::NoRoom { start, end });
    }
    // What the file does not fill stays zero: the memory is fresh.
    kernel.seek(SeekFrom::Start(offset)).map_err(|error| Error::Read { what: "segment", error })?;
    memory.read_exact_volatile_from(GuestAddress(start), kernel, file_size as usize)?;
    Ok(())
}

/// Looks for the PVH entry among notes: a header of three words, then name and content, padded to four bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let (header, rest) = notes.split_at_checked(12)?;
        let (name_size, size) = (dword(header, 0) as usize, dword(header, 4) as usize);
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        let content = rest.get(..size)?;
        if dword(header, 8) == NOTE_PHYS32_ENTRY && name == NOTE_NAME {
            return match size {
                4 => Some(u64::from(dword(content, 0))),
                8 => Some(qword(content, 0)),
                _ => None,
            };
        }
        notes = rest.get(size.checked_next_multiple_of(4)?..)?;
    }
}

fn put_command_line(memory: &GuestMemory, parameters: &str) -> Result<(), Error> {
    if parameters.len() >= COMMAND_LINE_SIZE {
        return Err(Error::CommandLineLength(parameters.len()));
    }
    if parameters.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(Error::CommandLineCharacter);
    }
    let mut bytes = parameters.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(COMMAND_LINE))?;
    Ok(())
}

/// What memory there is, and what of it is taken.
fn memory_map(mib: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, LOW_END, MEMORY_RAM), (BIOS, ONE_MIB - BIOS, MEMORY_RESERVED)];
    for (start, size) in ranges(mib << 20) {
        let from = start.max(ONE_MIB);
        map.push((from, start + size - from, MEMORY_RAM));
    }
    map
}

fn put_start_info(memory: &GuestMemory, mib: u64) -> Result<(), Error> {
    let map = memory_map(mib);
    let mut bytes = Vec::new();
    for (start, size, kind) in &map {
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    memory.write_slice(&bytes, GuestAddress(MEMORY_MAP))?;

    let mut info = Vec::new();
    info.extend_from_slice(&START_MAGIC.to_le_bytes());
    info.extend_from_slice(&START_VERSION.to_le_bytes());
    // No flags, no modules.
    info.extend_from_slice(&[0; 16]);
    info.extend_from_slice(&COMMAND_LINE.to_le_bytes());
    // No ACPI.
    info.extend_from_slice(&[0; 8]);
    info.extend_from_slice(&MEMORY_MAP.to_le_bytes());
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&[0; 4]);
    memory.write_slice(&info, GuestAddress(START_INFO))?;
    Ok(())
}

#[cfg(test)]
mod tests;
