//! Loading the guest's kernel, an ELF file, by Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst):
//! the kernel begins in long mode, and finds what it needs to know in a page of parameters. Of all ways to
//! start Linux, this one can also bring a seed for its random numbers, without which a guest on a processor that has
//! none boots for a third longer, and can have it lie and run somewhere else each time (`boot/kaslr.rs`).
//!
//! The kernel file comes from the host, but it may be cut or be another file altogether.

mod kaslr;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use crate::memory::{BIOS, GuestMemory, LOW_END, ONE_MIB, Range, ranges};
use crate::mptable;
use kaslr::{Relocations, Shift, Wishes};

/// Where what the kernel finds is put: low memory that nobody else uses.
const GDT: u64 = 0x6000;
const PARAMETERS: u64 = 0x7000;
const SEED: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x9000;
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
    pub const EXECUTABLE: u32 = 1;
    pub const WRITABLE: u32 = 2;
}

/// struct boot_params (arch/x86/include/uapi/asm/bootparam.h): where its fields are, and what they say.
mod parameters {
    pub const SIZE: usize = 4096;
    pub const MAP_ENTRIES: usize = 0x1e8;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const LOADER: usize = 0x210;
    pub const LOAD_FLAGS: usize = 0x211;
    pub const COMMAND_LINE: usize = 0x228;
    pub const COMMAND_LINE_SIZE: usize = 0x238;
    pub const SETUP_DATA: usize = 0x250;
    pub const MAP: usize = 0x2d0;
    pub const MAP_ENTRY: usize = 20;

    pub const MAGIC: &[u8] = b"HdrS";
    pub const PROTOCOL: u16 = 0x20f;
    pub const UNDEFINED_LOADER: u8 = 0xff;
    /// Has the kernel choose where it maps memory (RANDOMIZE_MEMORY).
    pub const KASLR: u8 = 1 << 1;
    pub const RAM: u32 = 1;
    pub const RESERVED: u32 = 2;
    /// struct setup_data with a seed.
    pub const RNG_SEED: u32 = 9;
}

/// Bytes of the seed: what Linux takes for enough, twice.
const SEED_LENGTH: usize = 64;

/// Page table entries: Intel SDM volume 3, 4.5.
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const TABLE: u64 = 4096;
/// What the first page tables reach.
const MAPPED: u64 = ENTRIES << 21;

/// Flat segments of the GDT, by their selectors, which the protocol fixes: Intel SDM volume 3, 3.4.5.
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

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
    /// The host has no random numbers.
    #[error("random numbers for the guest: {0}")]
    Random(io::Error),
    /// Guest memory that must be there is not.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the first vCPU starts, in long mode. All addresses are physical ones, and the page tables know no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub address: u64,
    /// The parameters, for RSI.
    pub parameters: u64,
    /// The page tables, for CR3.
    pub page_tables: u64,
    /// The GDT, which has [`GDT_ENTRIES`].
    pub gdt: u64,
}

/// Puts kernel, parameters and MP table into the guest's memory; answers also where the kernel's code is, bytes.
///
/// # Errors
/// When the kernel is not one or does not fit.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    parameters: &str,
    mib: u64,
    vcpus: u8,
) -> Result<(Entry, Range), Error> {
    let wishes = Wishes::of(parameters);
    let (address, code) = load_kernel(memory, kernel, &wishes)?;
    put_command_line(memory, parameters)?;
    memory.write_slice(&mptable::build(vcpus), GuestAddress(BIOS))?;
    put_seed(memory)?;
    let flags = if wishes.off { 0 } else { parameters::KASLR };
    put_parameters(memory, parameters.len(), mib, flags)?;
    Ok((enter_at(memory, address)?, code))
}

/// What a vCPU needs to begin at an address below [`MAPPED`]: page tables and segments.
///
/// # Errors
/// When the guest's memory does not even reach so far.
pub fn enter_at(memory: &GuestMemory, address: u64) -> Result<Entry, Error> {
    // One table of each level, the last one with 512 pages of 2 MiB.
    let [top, second, third] = [0, 1, 2].map(|level| PAGE_TABLES + level * TABLE);
    memory.write_obj(second | PRESENT_WRITABLE, GuestAddress(top))?;
    memory.write_obj(third | PRESENT_WRITABLE, GuestAddress(second))?;
    let pages = (0..ENTRIES).flat_map(|page| (page << 21 | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes());
    memory.write_slice(&pages.collect::<Vec<_>>(), GuestAddress(third))?;
    let gdt = GDT_ENTRIES.map(u64::to_le_bytes).concat();
    memory.write_slice(&gdt, GuestAddress(GDT))?;
    Ok(Entry { address, parameters: PARAMETERS, page_tables: top, gdt: GDT })
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
    flags: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: dword(bytes, 0),
            flags: dword(bytes, 4),
            offset: qword(bytes, 8),
            address: qword(bytes, 24),
            file_size: qword(bytes, 32),
            memory_size: qword(bytes, 40),
        }
    }

    /// Whether it makes sense in a file of so many bytes.
    fn check(&self, length: u64) -> Result<(), Error> {
        if self.offset.checked_add(self.file_size).is_none_or(|end| end > length) {
            return Err(Error::Damaged("a segment reaches beyond the end of the file"));
        }
        if self.file_size > self.memory_size {
            return Err(Error::Damaged("a segment is larger in the file than in memory"));
        }
        if self.address.checked_add(self.memory_size).is_none() {
            return Err(Error::Damaged("a segment ends beyond all memory"));
        }
        Ok(())
    }
}

/// Loads the segments; answers the entry, and what is code and never written to, with the constants beside it.
fn load_kernel(memory: &GuestMemory, kernel: &mut File, wishes: &Wishes) -> Result<(u64, Range), Error> {
    let length = kernel.metadata().map_err(|error| Error::Read { what: "size", error })?.len();
    let header = header(kernel)?;
    let (entry, segments) = segments(kernel, &header, length)?;
    let loaded: Vec<_> = segments.iter().filter(|segment| segment.kind == elf::LOAD).collect();
    for segment in &loaded {
        segment.check(length)?;
    }
    let relocations = if wishes.off { None } else { Relocations::read(kernel, &header, length)? };
    let whole = whole(&loaded);
    let shift = match relocations {
        Some(_) => shift(memory, whole, wishes)?,
        None => {
            if wishes.off {
                log::info!("guest kernel: at its own address, as nokaslr says");
            } else {
                log::warn!("guest kernel: at its own address: the file has no section .relocs");
            }
            Shift::default()
        }
    };
    for segment in &loaded {
        load_segment(memory, kernel, segment, shift.physical)?;
    }
    if !loaded.iter().any(|s| (s.address..s.address + s.memory_size).contains(&entry)) {
        return Err(Error::Damaged("the entry is outside of the kernel"));
    }
    if let Some(relocations) = relocations {
        relocations.apply(memory, whole, shift)?;
    }
    let is_code = |segment: &&&Segment| segment.flags & (elf::EXECUTABLE | elf::WRITABLE) == elf::EXECUTABLE;
    let place = |segment: &&Segment| (segment.address + shift.physical, segment.memory_size);
    Ok((entry + shift.physical, loaded.iter().find(is_code).map_or((0, 0), place)))
}

/// From the first byte of the first segment to the last one of the last.
fn whole(loaded: &[&Segment]) -> Range {
    let start = loaded.iter().map(|segment| segment.address).min().unwrap_or_default();
    let end = loaded.iter().map(|segment| segment.address + segment.memory_size).max();
    (start, end.unwrap_or_default() - start)
}

/// A place for a kernel that can be moved.
fn shift(memory: &GuestMemory, kernel: Range, wishes: &Wishes) -> Result<Shift, Error> {
    let top = memory.find_region(GuestAddress(kernel.0)).map_or(0, |region| region.last_addr().0 + 1);
    let chosen = Shift::choose(kernel, top, random::<2>()?);
    Ok(if wishes.fewer_places { Shift { physical: 0, ..chosen } } else { chosen })
}

fn header(kernel: &File) -> Result<[u8; elf::HEADER], Error> {
    let mut header = [0; elf::HEADER];
    match kernel.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::NotElf),
        Err(error) => return Err(Error::Read { what: "header", error }),
    }
    let ours = header.starts_with(elf::MAGIC)
        && header[4..6] == [elf::CLASS_64, elf::LITTLE_ENDIAN]
        && word(&header, 18) == elf::MACHINE_X86_64;
    if ours { Ok(header) } else { Err(Error::NotElf) }
}

/// The entry and the program headers.
fn segments(kernel: &File, header: &[u8], length: u64) -> Result<(u64, Vec<Segment>), Error> {
    let (entry, offset) = (qword(header, 24), qword(header, 32));
    let (size, count) = (word(header, 54), word(header, 56));
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
    Ok((entry, table.chunks_exact(elf::PROGRAM_HEADER).map(Segment::parse).collect()))
}

fn load_segment(memory: &GuestMemory, kernel: &mut File, segment: &Segment, shift: u64) -> Result<(), Error> {
    let Segment { offset, file_size, memory_size, .. } = *segment;
    let start = segment.address.saturating_add(shift);
    let end = start.saturating_add(memory_size);
    // Below 1 MiB are the structures for the kernel.
    let fits = start >= ONE_MIB && memory.check_range(GuestAddress(start), memory_size.max(1) as usize);
    if !fits {
        return Err(Error::NoRoom { start, end });
    }
    if end > MAPPED {
        return Err(Error::Damaged("a segment lies above 1 GiB, where the kernel could not begin"));
    }
    // What the file does not fill stays zero: the memory is fresh.
    kernel.seek(SeekFrom::Start(offset)).map_err(|error| Error::Read { what: "segment", error })?;
    memory.read_exact_volatile_from(GuestAddress(start), kernel, file_size as usize)?;
    Ok(())
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
    let mut map = vec![(0, LOW_END, parameters::RAM), (BIOS, ONE_MIB - BIOS, parameters::RESERVED)];
    for (start, size) in ranges(mib << 20) {
        let from = start.max(ONE_MIB);
        map.push((from, start + size - from, parameters::RAM));
    }
    map
}

/// Random numbers of the host.
fn random<const N: usize>() -> Result<[u64; N], Error> {
    let mut numbers = [0; N];
    let size = size_of_val(&numbers);
    // SAFETY: the kernel writes no more than the array's size.
    let got = unsafe { libc::getrandom(numbers.as_mut_ptr().cast(), size, 0) };
    if usize::try_from(got) != Ok(size) {
        return Err(Error::Random(io::Error::last_os_error()));
    }
    Ok(numbers)
}

/// Entropy from the host, with which the kernel's generator is seeded from its first use on.
fn put_seed(memory: &GuestMemory) -> Result<(), Error> {
    let seed = random::<{ SEED_LENGTH / 8 }>()?.map(u64::to_le_bytes);
    // struct setup_data: the next one (there is none), type, length.
    let mut data = vec![0; 8];
    data.extend_from_slice(&parameters::RNG_SEED.to_le_bytes());
    data.extend_from_slice(&(SEED_LENGTH as u32).to_le_bytes());
    data.extend_from_slice(seed.as_flattened());
    memory.write_slice(&data, GuestAddress(SEED))?;
    Ok(())
}

fn put_parameters(memory: &GuestMemory, command_line: usize, mib: u64, flags: u8) -> Result<(), Error> {
    let mut page = [0; parameters::SIZE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(parameters::BOOT_FLAG, &[0x55, 0xaa]);
    put(parameters::HEADER, parameters::MAGIC);
    put(parameters::VERSION, &parameters::PROTOCOL.to_le_bytes());
    put(parameters::LOADER, &[parameters::UNDEFINED_LOADER]);
    put(parameters::LOAD_FLAGS, &[flags]);
    put(parameters::COMMAND_LINE, &(COMMAND_LINE as u32).to_le_bytes());
    put(parameters::COMMAND_LINE_SIZE, &(command_line as u32).to_le_bytes());
    put(parameters::SETUP_DATA, &SEED.to_le_bytes());
    let map = memory_map(mib);
    put(parameters::MAP_ENTRIES, &[map.len() as u8]);
    for (number, (start, size, kind)) in map.iter().enumerate() {
        let at = parameters::MAP + number * parameters::MAP_ENTRY;
        put(at, &start.to_le_bytes());
        put(at + 8, &size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    memory.write_slice(&page, GuestAddress(PARAMETERS))?;
    Ok(())
}

#[cfg(test)]
mod tests;
