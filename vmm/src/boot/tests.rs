use super::*;
use std::io::Write;
use vmm_sys_util::tempfile::TempFile;

const MIB: u64 = 32;
const KERNEL: u64 = 0x100_0000;

/// A kernel of one segment with one note, as a list of edits away from a good one.
struct Image {
    bytes: Vec<u8>,
}

const NOTES: usize = elf::HEADER + 2 * elf::PROGRAM_HEADER;
const CODE: usize = 0x1000;

impl Image {
    fn new() -> Self {
        let mut bytes = vec![0; CODE + 16];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        let mut image = Self { bytes };
        image.put(18, &62u16.to_le_bytes());
        image.put(32, &(elf::HEADER as u64).to_le_bytes());
        image.put(54, &(elf::PROGRAM_HEADER as u16).to_le_bytes());
        image.put(56, &2u16.to_le_bytes());
        image.segment(0, elf::LOAD, [CODE as u64, KERNEL, 16, 0x2000]);
        image.segment(1, elf::NOTE, [NOTES as u64, 0, 36, 36]);
        // Another note first.
        image.put(NOTES, &[4, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0]);
        image.put(NOTES + 12, b"Xen\0\x01\0\0\0");
        image.put(NOTES + 20, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        image.put(NOTES + 32, b"Xen\0");
        image.put(NOTES + 36, &(KERNEL as u32 + 8).to_le_bytes());
        image.segment(1, elf::NOTE, [NOTES as u64, 0, 40, 40]);
        image.bytes[CODE..].fill(0x90);
        image
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
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

    fn load(&self, parameters: &str) -> (Result<Entry, Error>, GuestMemory) {
        let memory = crate::memory::create(MIB, None).unwrap();
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&self.bytes).unwrap();
        (load(&memory, &mut file, parameters, MIB, 2), memory)
    }

    fn error(&self) -> String {
        self.load("").0.unwrap_err().to_string()
    }
}

#[test]
fn a_kernel_and_what_it_expects_are_in_memory() {
    let (entry, memory) = Image::new().load("quiet");
    assert_eq!(entry.unwrap(), Entry { address: KERNEL + 8, start_info: START_INFO });
    let mut code = [0; 18];
    memory.read_slice(&mut code, GuestAddress(KERNEL)).unwrap();
    assert_eq!(code, *b"\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90\0\0");
    let mut info = [0; 56];
    memory.read_slice(&mut info, GuestAddress(START_INFO)).unwrap();
    assert_eq!((dword(&info, 0), dword(&info, 4), dword(&info, 12)), (START_MAGIC, START_VERSION, 0));
    let mut line = [0; 6];
    memory.read_slice(&mut line, GuestAddress(qword(&info, 24))).unwrap();
    assert_eq!(&line, b"quiet\0");
    let mut map = vec![0; 24 * dword(&info, 48) as usize];
    memory.read_slice(&mut map, GuestAddress(qword(&info, 40))).unwrap();
    let last = &map[map.len() - 24..];
    assert_eq!((qword(last, 0), qword(last, 8), dword(last, 16)), (ONE_MIB, (MIB - 1) << 20, MEMORY_RAM));
    let mut signature = [0; 4];
    memory.read_slice(&mut signature, GuestAddress(BIOS)).unwrap();
    assert_eq!(&signature, b"_MP_");
}

#[test]
fn memory_above_the_hole_is_in_the_map() {
    let map = memory_map(4096);
    assert!(map.contains(&(ONE_MIB, crate::memory::HOLE - ONE_MIB, MEMORY_RAM)));
    assert!(map.contains(&(crate::memory::HIGH, 1 << 30, MEMORY_RAM)));
}

#[test]
fn other_files_are_named_for_what_they_are_not() {
    let text = "not an ELF file";
    assert!(Image { bytes: vec![] }.error().contains(text));
    assert!(Image { bytes: b"MZ".repeat(4096) }.error().contains(text));
    assert!(Image::new().put(4, &[1]).error().contains(text), "32 bit");
    assert!(Image::new().put(18, &183u16.to_le_bytes()).error().contains(text), "Arm");
    assert!(Image::new().put(NOTES + 28, &[17]).error().contains("CONFIG_PVH"));
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
fn hostile_notes_hold_no_entry() {
    let max = u32::MAX.to_le_bytes();
    for notes in [
        vec![],
        vec![0; 11],
        [max, max, max].concat(),
        [4u32.to_le_bytes(), max, 18u32.to_le_bytes(), *b"Xen\0"].concat(),
        [max, 4u32.to_le_bytes(), 18u32.to_le_bytes(), *b"Xen\0"].concat(),
        [4u32.to_le_bytes(), 3u32.to_le_bytes(), 18u32.to_le_bytes(), *b"Xen\0", [0; 4]].concat(),
    ] {
        assert_eq!(pvh_entry(&notes), None, "{notes:x?}");
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
