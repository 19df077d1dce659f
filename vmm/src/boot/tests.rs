use super::*;
use std::io::Write;
use vmm_sys_util::tempfile::TempFile;

pub const MIB: u64 = 32;
pub const KERNEL: u64 = 0x100_0000;

/// A kernel of one segment, as a list of edits away from a good one.
pub struct Image {
    pub bytes: Vec<u8>,
}

pub const CODE: usize = 0x1000;
/// A kind of segment that is not loaded.
const NOTE: u32 = 4;

impl Image {
    pub fn new() -> Self {
        let mut bytes = vec![0; CODE + 16];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        let mut image = Self { bytes };
        image.put(18, &62u16.to_le_bytes());
        image.put(24, &(KERNEL + 8).to_le_bytes());
        image.put(32, &(elf::HEADER as u64).to_le_bytes());
        image.put(54, &(elf::PROGRAM_HEADER as u16).to_le_bytes());
        image.put(56, &2u16.to_le_bytes());
        image.segment(0, elf::LOAD, [CODE as u64, KERNEL, 16, 0x2000]);
        image.put(elf::HEADER + 4, &5u32.to_le_bytes());
        image.segment(1, NOTE, [0, 0, 36, 36]);
        image.bytes[CODE..].fill(0x90);
        image
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn segment(&mut self, number: usize, kind: u32, [offset, address, file, memory]: [u64; 4]) -> &mut Self {
        let at = elf::HEADER + number * elf::PROGRAM_HEADER;
        self.put(at, &kind.to_le_bytes());
        self.put(at + 8, &offset.to_le_bytes());
        self.put(at + 24, &address.to_le_bytes());
        self.put(at + 32, &file.to_le_bytes());
        self.put(at + 40, &memory.to_le_bytes())
    }

    pub fn file(&self) -> File {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&self.bytes).unwrap();
        file
    }

    pub fn load(&self, parameters: &str) -> (Result<(Entry, Range), Error>, GuestMemory) {
        let memory = crate::memory::create(MIB, None).unwrap();
        (load(&memory, &mut self.file(), parameters, MIB, 2), memory)
    }

    pub fn error(&self) -> String {
        self.load("").0.unwrap_err().to_string()
    }
}

#[test]
fn a_kernel_and_what_it_expects_are_in_memory() {
    let (entry, memory) = Image::new().load("quiet");
    let (entry, code) = entry.unwrap();
    assert_eq!((entry.address, code), (KERNEL + 8, (KERNEL, 0x2000)));
    let mut code = [0; 18];
    memory.read_slice(&mut code, GuestAddress(KERNEL)).unwrap();
    assert_eq!(code, *b"\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\0\0");
    let mut page = [0; parameters::SIZE];
    memory.read_slice(&mut page, GuestAddress(entry.parameters)).unwrap();
    assert_eq!((word(&page, 0x1fe), &page[0x202..0x206]), (0xaa55, &b"HdrS"[..]));
    let mut line = [0; 6];
    memory.read_slice(&mut line, GuestAddress(u64::from(dword(&page, 0x228)))).unwrap();
    assert_eq!((&line, dword(&page, 0x238)), (b"quiet\0", 5));
    let last = &page[0x2d0 + 20 * (usize::from(page[0x1e8]) - 1)..];
    assert_eq!(
        (qword(last, 0), qword(last, 8), dword(last, 16)),
        (ONE_MIB, (MIB - 1) << 20, parameters::RAM)
    );
    let mut signature = [0; 4];
    memory.read_slice(&mut signature, GuestAddress(BIOS)).unwrap();
    assert_eq!(&signature, b"_MP_");
}

#[test]
fn each_kernel_gets_a_seed_of_its_own() {
    let seed = || {
        let (entry, memory) = Image::new().load("");
        let mut data = [0; 0x50];
        let at: u64 = memory.read_obj(GuestAddress(entry.unwrap().0.parameters + 0x250)).unwrap();
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        assert_eq!((qword(&data, 0), dword(&data, 8), dword(&data, 12)), (0, 9, 64), "struct setup_data");
        data
    };
    assert_ne!(seed(), seed());
}

#[test]
fn addresses_are_physical_ones_at_first() {
    let memory = crate::memory::create(MIB, None).unwrap();
    let entry = enter_at(&memory, KERNEL).unwrap();
    let next = |table: u64, index: u64| memory.read_obj::<u64>(GuestAddress(table + 8 * index)).unwrap();
    let (top, last) =
        (next(entry.page_tables, 0), |page| next(next(next(entry.page_tables, 0) & !3, 0) & !3, page));
    assert_eq!(top & 3, 3);
    assert_eq!((last(0), last(8), last(511)), (0x83, 16 << 20 | 0x83, 1022 << 20 | 0x83));
    assert_eq!(next(entry.gdt, 2) >> 40 & 0xff, 0x9b, "code");
}

#[test]
fn memory_above_the_hole_is_in_the_map() {
    let map = memory_map(4096);
    assert!(map.contains(&(ONE_MIB, crate::memory::HOLE - ONE_MIB, parameters::RAM)));
    assert!(map.contains(&(crate::memory::HIGH, 1 << 30, parameters::RAM)));
}

#[test]
fn other_files_are_named_for_what_they_are_not() {
    let text = "not an ELF file";
    assert!(Image { bytes: vec![] }.error().contains(text));
    assert!(Image { bytes: b"MZ".repeat(4096) }.error().contains(text));
    assert!(Image::new().put(4, &[1]).error().contains(text), "32 bit");
    assert!(Image::new().put(18, &183u16.to_le_bytes()).error().contains(text), "Arm");
}

#[test]
fn damaged_headers_are_refused() {
    for (at, bytes) in [
        (32, u64::MAX.to_le_bytes().to_vec()),
        (32, 0x1000u64.to_le_bytes().to_vec()),
        (54, vec![8, 0]),
        (56, vec![0, 0]),
        (56, vec![0xff, 0xff]),
    ] {
        let error = Image::new().put(at, &bytes).error();
        assert!(error.contains("damaged"), "{error}");
    }
    let memory = crate::memory::create(2048, None).unwrap();
    let mut high = TempFile::new().unwrap().into_file();
    let image = Image::new().segment(0, elf::LOAD, [CODE as u64, MAPPED, 16, 16]).bytes.clone();
    high.write_all(&image).unwrap();
    let error = load(&memory, &mut high, "", 2048, 1).unwrap_err().to_string();
    assert!(error.contains("above 1 GiB"), "{error}");
    let mut cut = Image::new();
    cut.bytes.truncate(CODE + 4);
    assert!(cut.error().contains("beyond the end of the file"));
}

#[test]
fn hostile_segments_are_refused() {
    let (code, max) = (CODE as u64, u64::MAX);
    for (segment, text) in [
        ([max, KERNEL, 16, 16], "beyond the end of the file"),
        ([code, KERNEL, max, max], "beyond the end of the file"),
        ([code, KERNEL, 16, 8], "larger in the file than in memory"),
        ([code, max - 8, 16, 16], "beyond all memory"),
        ([code, 0, 16, 16], "needs memory at 0x0..0x10"),
        ([code, MIB << 20, 16, 16], "needs memory"),
        ([code, KERNEL, 16, 1 << 40], "needs memory"),
        ([code, 0x20_0000, 16, 16], "the entry is outside"),
    ] {
        let error = Image::new().segment(0, elf::LOAD, segment).error();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn command_lines_are_checked() {
    let image = Image::new();
    assert!(image.load(&"a".repeat(COMMAND_LINE_SIZE - 1)).0.is_ok());
    let error = image.load(&"a".repeat(COMMAND_LINE_SIZE)).0.unwrap_err().to_string();
    assert_eq!(error, "guest kernel command line: 2048 bytes, more than 2047");
    assert!(matches!(image.load("a\0b").0, Err(Error::CommandLineCharacter)));
}
