//! Sectors that are discarded, or filled with zeros.

use std::os::unix::fs::MetadataExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::*;

const UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
const BOTH: u64 = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// Of the disk here.
const SECTORS: u64 = 256;

/// A file on a file system that can make holes, and cannot write zeros otherwise (tmpfs).
fn in_memory() -> File {
    filled(File::from(memfd_create("disk", MFdFlags::empty()).unwrap()))
}

fn filled(mut file: File) -> File {
    file.write_all(&[7; (SECTORS * SECTOR) as usize]).unwrap();
    file
}

fn bench(file: &File) -> Bench<Blk> {
    let mut bench = slot("disk0");
    bench.device().attach(file.try_clone().unwrap(), false).unwrap();
    bench.activate(BOTH);
    bench
}

/// Sector, sectors, flags.
type Range = (u64, u32, u32);

fn clear(bench: &mut Bench<Blk>, kind: u32, ranges: &[Range]) -> u8 {
    let bytes = |(sector, sectors, flags): &Range| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let ranges: Vec<u8> = ranges.iter().flat_map(bytes).collect();
    let at = bench.data(&ranges);
    let (status, length) = request(bench, kind, u64::MAX, &[(at, ranges.len() as u32, READ)]);
    assert_eq!(length, 1);
    status
}

/// Which sectors read as zeros; all others are as they were.
fn zeros(file: &File) -> Vec<u64> {
    let mut all = vec![0; (SECTORS * SECTOR) as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    let sectors = (0..).zip(all.chunks(SECTOR as usize));
    let zeros = sectors.filter(|(_, sector)| {
        assert!(sector.iter().all(|byte| *byte == sector[0]) && matches!(sector[0], 0 | 7));
        sector[0] == 0
    });
    zeros.map(|(number, _)| number).collect()
}

#[test]
fn a_discarded_range_goes_back_to_the_host() {
    let file = in_memory();
    let mut bench = bench(&file);
    let blocks = || file.metadata().unwrap().blocks();
    let before = blocks();
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[(8, 64, 0)]), OK);
    assert_eq!(before - blocks(), 64);
    // Also at the end, and in several ranges, however they lie.
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[(SECTORS - 8, 8, 0), (80, 8, 0), (80, 16, 0)]), OK);
    assert_eq!(before - blocks(), 64 + 8 + 16);
    let expected: Vec<u64> = (8..72).chain(80..96).chain(SECTORS - 8..SECTORS).collect();
    assert_eq!(zeros(&file), expected);
    assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
    // What lies within a block is no less zero.
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[(1, 3, 0)]), OK);
    assert_eq!(zeros(&file)[..3], [1, 2, 3]);
    // The disk is still as large, and can be written to there.
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, SECTORS - 1, &[(DATA, 512, READ)]), (OK, 1));
}

#[test]
fn zeros_take_no_room_if_the_driver_allows_that() {
    let file = in_memory();
    let mut bench = bench(&file);
    let before = file.metadata().unwrap().blocks();
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, &[(16, 8, UNMAP)]), OK);
    assert_eq!(before - file.metadata().unwrap().blocks(), 8);
    assert_eq!(zeros(&file), (16..24).collect::<Vec<_>>());
    // Of this file system's the driver learns that it has to write them itself.
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, &[(32, 8, 0)]), UNSUPP);
    assert_eq!(zeros(&file), (16..24).collect::<Vec<_>>());
}

#[test]
fn zeros_keep_their_room_otherwise() {
    let file = filled(TempFile::new().unwrap().into_file());
    file.sync_all().unwrap();
    let mut bench = bench(&file);
    let before = file.metadata().unwrap().blocks();
    match clear(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, &[(16, 8, 0), (25, 1, 0)]) {
        OK => assert_eq!(zeros(&file), (16..24).chain([25]).collect::<Vec<_>>()),
        // Where temporary files are on tmpfs.
        status => assert_eq!((status, zeros(&file)), (UNSUPP, vec![])),
    }
    assert_eq!(file.metadata().unwrap().blocks(), before);
    assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
}

#[test]
fn bad_ranges_fail_and_clear_nothing() {
    let file = in_memory();
    let mut bench = bench(&file);
    let good = (0, 8, 0);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for bad in [
            (SECTORS, 1, 0),
            (SECTORS - 1, 2, 0),
            (0, SECTORS as u32 + 1, 0),
            (0, u32::MAX, 0),
            (u64::MAX, 1, 0),
            (u64::MAX, u32::MAX, 0),
            (u64::MAX / 512 + 1, 8, 0),
            (1 << 55, 8, 0),
            (8, 0, 0),
        ] {
            assert_eq!(clear(&mut bench, kind, &[good, bad]), IOERR, "{bad:?}");
        }
        for flags in [2, 3, 1 << 31, u32::MAX] {
            assert_eq!(clear(&mut bench, kind, &[good, (8, 8, flags)]), UNSUPP, "{flags:#x}");
        }
        // None, more than there may be, and what is no range.
        assert_eq!(clear(&mut bench, kind, &[]), IOERR);
        assert_eq!(clear(&mut bench, kind, &[good; MOST_RANGES as usize + 1]), IOERR);
        assert_eq!(request(&mut bench, kind, 0, &[(DATA, 15, READ)]), (IOERR, 1));
        assert_eq!(request(&mut bench, kind, 0, &[(DATA, 17, READ)]), (IOERR, 1));
    }
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[good, (8, 8, UNMAP)]), UNSUPP);
    assert!(zeros(&file).is_empty());
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[good; MOST_RANGES as usize]), OK);
}

#[test]
fn a_range_is_not_longer_than_is_said() {
    let file = File::from(memfd_create("disk", MFdFlags::empty()).unwrap());
    file.set_len(4 << 30).unwrap();
    let mut bench = bench(&file);
    assert_eq!(
        bench.config(36, 24),
        [
            0, 0, 0x20, 0, 16, 0, 0, 0, 8, 0, 0, 0, // Discard: sectors, ranges, alignment.
            0, 0, 0x20, 0, 16, 0, 0, 0, 1, 0, 0,
            0, // Zeros: sectors, ranges, whether room may be given back.
        ]
    );
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[(0, LONGEST_RANGE, 0)]), OK);
    assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, &[(0, LONGEST_RANGE + 1, 0)]), IOERR);
}

#[test]
fn only_a_file_that_can_be_written_to_is_cleared() {
    let file = in_memory();
    let mut bench = slot("disk0");
    let offered = |bench: &mut Bench<Blk>| bench.device().features() & BOTH;
    assert_eq!(offered(&mut bench), 0);
    bench.device().attach(file.try_clone().unwrap(), true).unwrap();
    bench.activate(0);
    assert_eq!(offered(&mut bench), 0);
    // A driver that does not look.
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(clear(&mut bench, kind, &[(0, 8, 0)]), UNSUPP);
    }
    assert!(zeros(&file).is_empty());
    detach(&mut bench);
    bench.device().attach(file, false).unwrap();
    assert_eq!(offered(&mut bench), BOTH);
}
