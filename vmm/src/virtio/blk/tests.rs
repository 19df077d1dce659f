mod clearing;
mod full;
mod fuzzing;
mod threads;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::seccomp::{self, Kind};
use crate::virtio::testing::{Bench, Piece, READ, WRITE};

const STATUS: u64 = 0x70_0000;
const DATA: u64 = 0x60_0000;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// A disk of eight sectors, each filled with its number.
fn disk() -> File {
    let mut file = TempFile::new().unwrap().into_file();
    (0..8).for_each(|sector| file.write_all(&[sector; 512]).unwrap());
    file
}

/// Starts threads as the VMM does, under the filters of the real thing: a system call that they lack ends the test.
fn starter() -> Starter {
    let (sender, wanted) = channel::<Box<dyn FnOnce() + Send>>();
    std::thread::spawn(move || {
        seccomp::install(Kind::Starter).unwrap();
        wanted.into_iter().for_each(|start| start());
    });
    Arc::new(move |start| sender.send(start).unwrap())
}

fn slot(serial: &str) -> Bench<Blk> {
    Bench::new(Blk::new(serial, starter()))
}

/// Takes the disk away, and waits until it is closed.
fn detach(bench: &mut Bench<Blk>) {
    let (sender, detached) = channel();
    bench.device().detach(Box::new(move || sender.send(()).unwrap()));
    detached.recv().unwrap();
}

fn bench(read_only: bool) -> (Bench<Blk>, File) {
    let file = disk();
    let mut bench = slot("disk0");
    bench.device().attach(file.try_clone().unwrap(), read_only).unwrap();
    bench.activate(0);
    (bench, file)
}

/// Sends a request with `data` between header and status; its status, and how many bytes the device says it wrote.
fn request(bench: &mut Bench<Blk>, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let header = bench.data(&header);
    bench.memory.write_obj(0xaa_u8, GuestAddress(STATUS)).unwrap();
    let pieces: Vec<Piece> =
        [(header, 16, READ)].into_iter().chain(data.iter().copied()).chain([(STATUS, 1, WRITE)]).collect();
    bench.offer(REQUESTS, &pieces);
    let (_, length) = bench.wait_used(REQUESTS);
    (bench.bytes(STATUS, 1)[0], length)
}

#[test]
fn reads_and_writes_sectors_through_any_split() {
    let (mut bench, file) = bench(false);
    let pieces = [(DATA, 100, WRITE), (DATA + 100, 412, WRITE), (DATA + 512, 512, WRITE)];
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 3, &pieces), (OK, 1025));
    assert_eq!(bench.bytes(DATA, 1024), [[3; 512], [4; 512]].concat());

    bench.memory.write_slice(&[9; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, 6, &[(DATA, 1000, READ), (DATA, 24, READ)]), (OK, 1));
    let mut end = [0; 1024];
    file.read_exact_at(&mut end, 6 * 512).unwrap();
    assert_eq!(end, [9; 1024]);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn header_and_status_need_no_descriptors_of_their_own() {
    let (mut bench, file) = bench(false);
    let request = [&VIRTIO_BLK_T_OUT.to_le_bytes()[..], &[0; 12], &[7; 512]].concat();
    let at = bench.data(&request);
    bench.offer(REQUESTS, &[(at, 7, READ), (at + 7, 521, READ), (STATUS, 1, WRITE)]);
    assert_eq!(bench.wait_used(REQUESTS), (0, 1));
    let mut start = [0; 512];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, [7; 512]);

    let header = bench.data(&[0; 16]);
    bench.offer(REQUESTS, &[(header, 16, READ), (DATA, 513, WRITE)]);
    assert_eq!(bench.wait_used(REQUESTS), (0, 513));
    assert_eq!(bench.bytes(DATA + 512, 1), [OK]);
}

#[test]
fn bad_requests_fail_and_touch_nothing() {
    let (mut bench, file) = bench(false);
    for (sector, length) in
        [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511)]
    {
        assert_eq!(
            request(&mut bench, VIRTIO_BLK_T_IN, sector, &[(DATA, length, WRITE)]),
            (IOERR, 1),
            "{sector}"
        );
        assert_eq!(
            request(&mut bench, VIRTIO_BLK_T_OUT, sector, &[(DATA, length, READ)]),
            (IOERR, 1),
            "{sector}"
        );
    }
    // The same memory many times over is more than the disk has.
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, READ); 100]), (IOERR, 1));
    assert_eq!(request(&mut bench, 77, 0, &[(DATA, 512, WRITE)]), (UNSUPP, 1));
    // A short header; no room for a status.
    bench.offer(REQUESTS, &[(DATA, 15, READ), (STATUS, 1, WRITE)]);
    assert_eq!((bench.wait_used(REQUESTS), bench.bytes(STATUS, 1)), ((0, 1), vec![IOERR]));
    bench.offer(REQUESTS, &[(DATA, 16, READ)]);
    assert_eq!(bench.wait_used(REQUESTS), (0, 0));
    let mut all = [0; 4096];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all.chunks(512).zip(0..).all(|(sector, number)| sector == [number; 512]));
}

#[test]
fn malformed_chains_come_back() {
    let (mut bench, _) = bench(false);
    bench.offer_hostile(REQUESTS);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]), (OK, 513));
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let (mut bench, file) = bench(true);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, READ)]), (IOERR, 1));
    let mut start = [1; 512];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, [0; 512]);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 1, &[(DATA, 512, WRITE)]), (OK, 513));
    let says_so = |bench: &mut Bench<Blk>| bench.device().features() & 1 << VIRTIO_BLK_F_RO != 0;
    assert!(says_so(&mut bench));
    detach(&mut bench);
    assert!(!says_so(&mut bench));
}

#[test]
fn a_slot_can_be_used_again() {
    let (mut bench, _) = bench(false);
    detach(&mut bench);
    assert_eq!(bench.config(0, 8), [0; 8]);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]), (IOERR, 1));
    bench.device().attach(disk(), false).unwrap();
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(bench.bytes(DATA, 1), [3]);
}

#[test]
fn a_driver_is_told_of_a_disk_that_comes() {
    let mut bench = slot("a serial that is far too long");
    bench.activate(0);
    assert_eq!(bench.config(0, 8), [0; 8]);

    bench.device().attach(disk(), false).unwrap();
    assert_eq!(bench.config_interrupts(), 1);
    assert_eq!(bench.config(0, 8), 8_u64.to_le_bytes());
    assert_eq!(bench.config(12, 12), [126, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 2, &[(DATA, 512, WRITE)]), (OK, 513));
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(bench.bytes(DATA, 20), b"a serial that is far");
    assert!(matches!(bench.device().attach(disk(), false), Err(AttachError::Worker(thread::Error::InUse))));
}

#[test]
fn what_is_no_disk_is_refused() {
    let mut blk = Blk::new("", starter());
    let empty = TempFile::new().unwrap().into_file();
    assert!(matches!(blk.attach(empty, false), Err(AttachError::Disk(disk::Error::Empty))));
    let (pipe, _) = nix::unistd::pipe().unwrap();
    let refused = blk.attach(File::from(pipe), false);
    assert!(matches!(refused, Err(AttachError::Disk(disk::Error::Size(_)))));
}

#[test]
fn a_truncated_file_is_an_error() {
    let (mut bench, file) = bench(false);
    file.set_len(512).unwrap();
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 0, &[(DATA, 1024, WRITE)]), (IOERR, 1));
}
