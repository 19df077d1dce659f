use super::*;
use crate::boot::load;
use crate::boot::tests::{CODE, Image, KERNEL, MIB};
use std::collections::BTreeSet;
use vm_memory::Bytes;

/// The virtual address of the kernel's first byte as it is linked, less what fits into the list's 32 bits.
const LINKED: u64 = VIRTUAL_BASE + KERNEL;

/// A kernel with one place of each kind, all in its code, and the table that lists them.
fn movable() -> Image {
    let mut image = Image::new();
    image.put(CODE, &(LINKED + 8).to_le_bytes());
    image.put(
        CODE + 8,
        &[(LINKED as u32).wrapping_neg().to_le_bytes(), (LINKED as u32).to_le_bytes()].concat(),
    );
    let place = |offset: u64| (LINKED + offset) as u32;
    with_table(image, &[0, place(0), 0, place(8), 0, place(12)].map(u32::to_le_bytes).concat())
}

/// Adds sections at the end of the file: none, their names, and `.relocs`.
fn with_table(mut image: Image, table: &[u8]) -> Image {
    let names = b"\0.shstrtab\0.relocs\0";
    let at = image.bytes.len();
    image.bytes.extend_from_slice(names);
    image.bytes.extend_from_slice(table);
    let headers = image.bytes.len();
    let mut section = |name: u32, offset: usize, size: usize| {
        let mut header = [0; SECTION_HEADER];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        image.bytes.extend_from_slice(&header);
    };
    section(0, 0, 0);
    section(1, at, names.len());
    section(11, at + names.len(), table.len());
    image.put(40, &(headers as u64).to_le_bytes());
    image.put(58, &[64, 0, 3, 0, 1, 0]);
    image
}

/// Where a kernel lies, and the numbers in it.
fn loaded(parameters: &str) -> (u64, u64, u32, u32) {
    let (entry, memory) = movable().load(parameters);
    let (entry, code) = entry.unwrap();
    assert_eq!(code, (entry.address - 8, 0x2000));
    let address = GuestAddress(code.0);
    let number = |offset| memory.read_obj::<u32>(GuestAddress(code.0 + offset)).unwrap();
    (code.0, memory.read_obj(address).unwrap(), number(8), number(12))
}

#[test]
fn each_boot_has_its_own_place() {
    let (mut lies, mut runs) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..64 {
        let (place, wide, inverse, narrow) = loaded("quiet");
        let linear = wide - 8 - LINKED;
        assert_eq!((place % STEP, linear % STEP), (0, 0));
        assert!((KERNEL..MIB << 20).contains(&place) && linear < VIRTUAL_SIZE, "{place:#x} {linear:#x}");
        assert_eq!(narrow, (LINKED + linear) as u32);
        assert_eq!(inverse, narrow.wrapping_neg());
        lies.insert(place);
        runs.insert(linear);
    }
    // Of 8 places and of 504.
    assert!(lies.len() > 2 && runs.len() > 16, "{lies:x?} {runs:x?}");
}

#[test]
fn who_asks_for_it_gets_one_place() {
    let linked = (KERNEL, LINKED + 8, (LINKED as u32).wrapping_neg(), LINKED as u32);
    for _ in 0..8 {
        assert_eq!(loaded("quiet nokaslr"), linked);
        assert_eq!(loaded("mem=24M").0, KERNEL);
    }
    let flags = |parameters| {
        let (entry, memory) = movable().load(parameters);
        memory.read_obj::<u8>(GuestAddress(entry.unwrap().0.parameters + 0x211)).unwrap()
    };
    assert_eq!((flags("nokaslr"), flags("nokaslrs")), (0, 2));
}

#[test]
fn a_kernel_stays_within_its_memory() {
    let kernel = (KERNEL, 18 << 20);
    let last = [u64::MAX; 2].map(|number| number - 1);
    for random in (0..2048).map(|number| [number; 2]).chain([last]) {
        let at = |top: u64| Shift::choose(kernel, top, random);
        assert_eq!(at(34 << 20).physical, 0, "exactly one place");
        assert_eq!(at(30 << 20).physical, 0, "none at all: who puts it there finds out");
        for top in [64 << 20, 1 << 30, 3 << 30] {
            let Shift { physical, linear } = at(top);
            assert!(kernel.0 + physical + kernel.1 <= top.min(MAPPED), "{random:?}");
            assert!(kernel.0 + linear + kernel.1 <= VIRTUAL_SIZE, "{random:?}");
        }
    }
    let places: BTreeSet<_> = (0..2048).map(|n| Shift::choose(kernel, 64 << 20, [n; 2]).physical).collect();
    assert_eq!(places.len(), 16);
}

#[test]
fn tables_of_newer_kernels_have_two_lists() {
    let place = |offset: u64| (LINKED + offset) as u32;
    let table = [0, place(0), 0, place(12)].map(u32::to_le_bytes).concat();
    let (entry, memory) = with_table(Image::new(), &table).load("");
    let entry = entry.unwrap().0.address - 8;
    let linear = memory.read_obj::<u64>(GuestAddress(entry)).unwrap() - 0x9090_9090_9090_9090;
    let narrow = memory.read_obj::<u32>(GuestAddress(entry + 12)).unwrap() - 0x9090_9090;
    assert_eq!((linear % STEP, u64::from(narrow)), (0, linear));
}

#[test]
fn damaged_tables_are_refused() {
    let place = |offset: u64| (LINKED + offset) as u32;
    for table in [
        vec![],
        vec![1],
        vec![0],
        vec![place(0), 0, place(8)],
        vec![0, 0, 0, 0, place(0)],
        // Before the kernel, behind it, over its end.
        vec![0, 0, 0, (LINKED - 1) as u32],
        vec![0, 0, 0, place(0x2000)],
        vec![0, place(0x1ffc), 0, 0],
        vec![0, 0, 1, 0],
    ] {
        let bytes = table.iter().copied().map(u32::to_le_bytes).collect::<Vec<_>>().concat();
        let error = with_table(Image::new(), &bytes).error();
        assert!(error.contains("damaged"), "{table:x?}: {error}");
    }
    assert!(with_table(Image::new(), &[0; 7]).error().contains("damaged"));
    let headers = movable().bytes.len() - 3 * SECTION_HEADER;
    for (at, bytes) in [
        (40, u64::MAX.to_le_bytes().to_vec()),
        (58, vec![63, 0]),
        (60, vec![0xff, 0xff]),
        (62, vec![3, 0]),
        (headers + SECTION_HEADER + 32, u64::MAX.to_le_bytes().to_vec()),
        (headers + 2 * SECTION_HEADER + 24, u64::MAX.to_le_bytes().to_vec()),
        (headers + 2 * SECTION_HEADER + 32, (1u64 << 40).to_le_bytes().to_vec()),
    ] {
        let error = movable().put(at, &bytes).error();
        assert!(error.contains("damaged"), "{at}: {error}");
    }
}

#[test]
fn a_kernel_without_a_table_lies_where_it_was_linked_to_be() {
    for mut image in [Image::new(), movable()] {
        // Another name than that of the table.
        if let Some(at) = image.bytes.windows(SECTION.len()).position(|bytes| bytes == SECTION) {
            image.bytes[at + 1] = b'R';
        }
        let (entry, memory) = image.load("");
        let entry = entry.unwrap().0;
        assert_eq!(entry.address, KERNEL + 8);
        // Where memory is mapped needs no table.
        assert_eq!(memory.read_obj::<u8>(GuestAddress(entry.parameters + 0x211)).unwrap(), 2);
    }
}

#[test]
fn two_boots_of_one_kernel_are_two() {
    let boot = || {
        let memory = crate::memory::create(512, None).unwrap();
        let mut file = movable().file();
        let (entry, _) = load(&memory, &mut file, "", 512, 1).unwrap();
        (entry.address, memory.read_obj::<u64>(GuestAddress(entry.address - 8)).unwrap())
    };
    // One in 120,000 is the same.
    let [a, b, c] = [boot(), boot(), boot()];
    assert!(a != b || b != c, "{a:x?}");
}
