//! Disks whose host is full.

use std::thread::sleep;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

use super::threads::{status, threads, wait_for_no_thread};
use super::*;
use crate::virtio::testing::{small_file_system, wait_until};

/// Of the file system, and of the disk, which is empty.
const PAGES: usize = 8;
/// A request's data.
const LENGTH: u32 = 4 * 4096;
/// Less than what passes between two tries.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A file system with a disk, and with something else that leaves so many pages of room.
struct Host {
    directory: TempDir,
    file: File,
}

impl Host {
    fn with_room(pages: usize) -> Self {
        let directory = small_file_system(PAGES);
        let mut options = File::options();
        let file =
            options.read(true).write(true).create_new(true).open(directory.as_path().join("disk")).unwrap();
        file.set_len((PAGES * 4096) as u64).unwrap();
        std::fs::write(directory.as_path().join("other"), vec![1; (PAGES - pages) * 4096]).unwrap();
        Self { directory, file }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.directory.as_path().join("other")).unwrap();
    }

    fn attached(&self, serial: &str) -> Bench<Blk> {
        let mut bench = slot(serial);
        bench.device().attach(self.file.try_clone().unwrap(), false).unwrap();
        bench.activate(0);
        bench
    }
}

/// Offers reads and writes, each at the start of the disk, with its chain and status at a place of its own.
fn offer(bench: &mut Bench<Blk>, kinds: &[u32]) {
    bench.memory.write_slice(&[9; LENGTH as usize], GuestAddress(DATA)).unwrap();
    for (place, kind) in (0..).zip(kinds) {
        let header = bench.data(&[&kind.to_le_bytes()[..], &[0; 12]].concat());
        let data =
            if *kind == VIRTIO_BLK_T_OUT { (DATA, LENGTH, READ) } else { (DATA + 0x1_0000, 512, WRITE) };
        let status = STATUS + u64::from(place);
        bench.memory.write_obj(0xaa_u8, GuestAddress(status)).unwrap();
        let ring = &mut bench.rings[REQUESTS];
        ring.chain(4 * place, &[(header, 16, READ), data, (status, 1, WRITE)]);
        ring.publish(4 * place);
    }
    bench.kick(REQUESTS);
}

/// Offers writes, and waits until the first has taken the room that there was.
fn write_until_full(host: &Host, bench: &mut Bench<Blk>, writes: usize) {
    offer(bench, &vec![VIRTIO_BLK_T_OUT; writes]);
    let mut start = [0; 8192];
    wait_until("the host is full", || {
        host.file.read_exact_at(&mut start, 0).unwrap();
        (start == [9; 8192]).then_some(())
    });
    // For the try that finds no room.
    sleep(Duration::from_millis(20));
    assert_eq!((bench.used(REQUESTS), status(bench, 0)), (None, 0xaa));
}

#[test]
fn a_write_waits_for_room_and_goes_on_where_it_stopped() {
    let host = Host::with_room(2);
    let mut bench = host.attached("full");
    write_until_full(&host, &mut bench, 1);
    // Neither the slot itself nor another disk waits, and kicks are no reason to try again.
    assert_eq!(bench.config(0, 8), (PAGES as u64 * 8).to_le_bytes());
    let (mut other, _) = super::bench(false);
    assert_eq!(request(&mut other, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, WRITE)]), (OK, 513));
    (0..100).for_each(|_| bench.kick(REQUESTS));
    sleep(Duration::from_millis(1500));
    assert_eq!(bench.used(REQUESTS), None);

    // What is on the disk is not written again, as other bytes at its place would show.
    bench.memory.write_slice(&[8; 8192], GuestAddress(DATA)).unwrap();
    host.make_room();
    assert_eq!((bench.wait_used(REQUESTS), status(&bench, 0)), ((0, 1), OK));
    let mut all = [0; LENGTH as usize];
    host.file.read_exact_at(&mut all, 0).unwrap();
    assert_eq!(all, [9; LENGTH as usize]);
}

#[test]
fn what_was_answered_before_does_not_wait_along() {
    let host = Host::with_room(0);
    let mut bench = host.attached("answers");
    offer(&mut bench, &[VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT]);
    wait_until("the driver is told", || (bench.interrupts(REQUESTS) > 0).then_some(()));
    assert_eq!((bench.used(REQUESTS), status(&bench, 0)), (Some((0, 513)), OK));
    assert_eq!((bench.used(REQUESTS), status(&bench, 1)), (None, 0xaa));
}

/// Of what takes no time but on a machine that is busy, one of several tries does so. What waits for the next try to
/// write takes longer each time.
fn ends_at_once(mut attempt: impl FnMut() -> Duration) {
    assert!((0..5).any(|_| attempt() < AT_ONCE));
}

#[test]
fn a_reset_ends_the_wait() {
    ends_at_once(|| {
        let host = Host::with_room(2);
        let mut bench = host.attached("reset");
        write_until_full(&host, &mut bench, 3);
        let start = Instant::now();
        bench.reset();
        let elapsed = start.elapsed();
        assert!((0..3).all(|place| status(&bench, place) != OK));

        // The next driver may wait again.
        bench.activate(0);
        write_until_full(&host, &mut bench, 1);
        host.make_room();
        assert_eq!((bench.wait_used(REQUESTS), status(&bench, 0)), ((0, 1), OK));
        elapsed
    });
}

#[test]
fn a_detach_ends_the_wait() {
    ends_at_once(|| {
        let host = Host::with_room(2);
        let mut bench = host.attached("detach");
        write_until_full(&host, &mut bench, 2);
        let start = Instant::now();
        detach(&mut bench);
        let elapsed = start.elapsed();
        let answers = [0, 1].map(|place| (bench.wait_used(REQUESTS), status(&bench, place)));
        assert_eq!(answers, [((0, 1), IOERR), ((4, 1), IOERR)]);
        elapsed
    });
}

#[test]
fn a_slot_that_is_gone_waits_no_longer() {
    ends_at_once(|| {
        let host = Host::with_room(2);
        let mut bench = host.attached("gone");
        write_until_full(&host, &mut bench, 1);
        assert_eq!(threads("gone"), 1);
        let start = Instant::now();
        drop(bench);
        wait_for_no_thread("gone");
        start.elapsed()
    });
}
