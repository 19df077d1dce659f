use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};

use super::*;
use crate::virtio::testing::wait_until;

/// A disk whose reads come to no end before they are let go: for each, the kernel asks this one, which lets it wait.
struct SlowDisk {
    file: TempFile,
    asked: Fanotify,
}

impl SlowDisk {
    /// None where the host does not let this user ask.
    fn new() -> Option<Self> {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC;
        let asked = match Fanotify::init(flags, EventFFlags::O_RDONLY) {
            Err(error @ (Errno::EPERM | Errno::ENOSYS)) => {
                eprintln!("skipped: fanotify: {error}");
                return None;
            }
            asked => asked.unwrap(),
        };
        let file = TempFile::new().unwrap();
        file.as_file().write_all(&[5; 4096]).unwrap();
        asked
            .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_ACCESS_PERM, AT_FDCWD, Some(file.as_path()))
            .unwrap();
        Some(Self { file, asked })
    }

    /// The same file, opened for the slot alone.
    fn open(&self) -> File {
        File::options().read(true).write(true).open(self.file.as_path()).unwrap()
    }

    /// How many descriptors of this process are of the file.
    fn opened(&self) -> usize {
        let is_it = |fd: &fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|to| to == self.file.as_path());
        fs::read_dir("/proc/self/fd").unwrap().flatten().filter(is_it).count()
    }

    /// Waits for a read, which then waits for [`Self::let_go`].
    fn hold(&self) -> FanotifyEvent {
        self.asked.read_events().unwrap().remove(0)
    }

    fn let_go(&self, held: &FanotifyEvent) {
        let response = FanotifyResponse::new(held.fd().unwrap(), Response::FAN_ALLOW);
        self.asked.write_response(response).unwrap();
    }
}

/// Offers a read of one sector, with its chain and status at a place of its own.
fn offer_read(bench: &mut Bench<Blk>, place: u16) {
    let at = bench.data(&[0; 16]);
    bench.memory.write_obj(0xaa_u8, GuestAddress(STATUS + u64::from(place))).unwrap();
    let pieces = [(at, 16, READ), (DATA, 512, WRITE), (STATUS + u64::from(place), 1, WRITE)];
    let ring = &mut bench.rings[REQUESTS];
    ring.chain(4 * place, &pieces);
    ring.publish(4 * place);
    bench.kick(REQUESTS);
}

pub fn status(bench: &Bench<Blk>, place: u16) -> u8 {
    bench.bytes(STATUS + u64::from(place), 1)[0]
}

fn attached(serial: &str, file: File) -> Bench<Blk> {
    let mut bench = slot(serial);
    bench.device().attach(file, false).unwrap();
    bench.activate(0);
    bench
}

/// How many threads of this process have this name.
pub fn threads(name: &str) -> usize {
    let named = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    fs::read_dir("/proc/self/task").unwrap().flatten().filter(named).count()
}

pub fn wait_for_no_thread(name: &str) {
    wait_until("the thread has ended", || (threads(name) == 0).then_some(()));
}

#[test]
fn a_slow_disk_holds_up_nobody_else() {
    let Some(slow) = SlowDisk::new() else { return };
    let mut one = attached("slow", slow.open());
    let (mut other, _) = bench(false);
    offer_read(&mut one, 0);
    let held = slow.hold();
    // Neither the slot itself nor another disk waits, nor does who kicks all the time.
    assert_eq!(one.config(0, 8), 8_u64.to_le_bytes());
    assert_eq!(request(&mut other, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, WRITE)]), (OK, 513));
    (0..100).for_each(|_| one.kick(REQUESTS));
    assert_eq!(one.used(REQUESTS), None);
    slow.let_go(&held);
    assert_eq!((one.wait_used(REQUESTS), status(&one, 0)), ((0, 513), OK));
}

#[test]
fn a_disk_is_detached_when_what_is_under_way_has_ended() {
    let Some(slow) = SlowDisk::new() else { return };
    let mut bench = attached("detached", slow.open());
    let before = slow.opened();
    (0..3).for_each(|place| offer_read(&mut bench, place));
    let held = slow.hold();
    let (closed, told) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for flag in [&closed, &told] {
        let flag = flag.clone();
        bench.device().detach(Box::new(move || flag.store(true, Ordering::SeqCst)));
    }
    // The test's own, the disk, and what came with the question.
    assert_eq!((before, slow.opened()), (2, 3));
    assert_eq!(bench.config(0, 8), [0; 8]);
    assert!(matches!(bench.device().attach(disk(), false), Err(AttachError::Worker(thread::Error::InUse))));
    assert!(!closed.load(Ordering::SeqCst));

    slow.let_go(&held);
    drop(held);
    wait_until("the disk is closed", || closed.load(Ordering::SeqCst).then_some(()));
    wait_until("all are told", || told.load(Ordering::SeqCst).then_some(()));
    assert_eq!(slow.opened(), 1);
    // The first was under way. The driver, which has not let go, gets an error for all that follow.
    let answers = [0, 1, 2].map(|place| (bench.wait_used(REQUESTS), status(&bench, place)));
    assert_eq!(answers, [((0, 513), OK), ((4, 1), IOERR), ((8, 1), IOERR)]);
    offer_read(&mut bench, 3);
    assert_eq!((bench.wait_used(REQUESTS), status(&bench, 3)), ((12, 1), IOERR));
    assert_eq!(threads("detached"), 1);
    bench.reset();
    wait_for_no_thread("detached");
}

#[test]
fn a_reset_is_over_when_what_is_under_way_has_ended() {
    let Some(slow) = SlowDisk::new() else { return };
    let mut bench = attached("reset", slow.open());
    (0..2).for_each(|place| offer_read(&mut bench, place));
    let held = slow.hold();
    bench.device().reset();
    bench.run();
    assert!(!bench.device().at_rest());
    // A second one changes nothing.
    bench.device().reset();
    assert!(!bench.device().at_rest());
    slow.let_go(&held);
    wait_until("the device is at rest", || bench.device().at_rest().then_some(()));
    assert_ne!(status(&bench, 1), OK, "a request that began after the reset");

    // From now on nothing changes but what a new driver asks for.
    let rings = bench.bytes(0, 0x2_0000);
    bench.kick(REQUESTS);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(bench.bytes(0, 0x2_0000), rings);
    bench.activate(0);
    offer_read(&mut bench, 5);
    slow.let_go(&slow.hold());
    assert_eq!((bench.wait_used(REQUESTS), status(&bench, 5)), ((20, 513), OK));
    assert_eq!(bench.used(REQUESTS), None);
}

#[test]
fn a_driver_that_does_not_wait_for_the_reset_gets_its_queue_served() {
    let Some(slow) = SlowDisk::new() else { return };
    let mut bench = attached("hasty", slow.open());
    offer_read(&mut bench, 0);
    let held = slow.hold();
    bench.device().reset();
    bench.activate(0);
    assert!(!bench.device().at_rest());
    slow.let_go(&held);
    wait_until("the device is at rest", || bench.device().at_rest().then_some(()));
    // The same memory is the ring of both.
    while bench.used(REQUESTS).is_some() {}
    detach(&mut bench);
    bench.device().attach(disk(), false).unwrap();
    bench.reset();
    bench.activate(0);
    offer_read(&mut bench, 1);
    assert_eq!((bench.wait_used(REQUESTS), status(&bench, 1)), ((4, 513), OK));
}

#[test]
fn only_a_slot_with_a_disk_has_a_thread() {
    let mut bench = slot("lonely");
    bench.activate(0);
    bench.reset();
    assert_eq!(threads("lonely"), 0);
    for _ in 0..3 {
        bench.device().attach(disk(), false).unwrap();
        assert_eq!(threads("lonely"), 1);
        bench.activate(0);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, WRITE)]), (OK, 513));
        // As the agent and the shim do it.
        bench.reset();
        detach(&mut bench);
        wait_for_no_thread("lonely");
    }
    // A slot that is gone leaves none behind.
    bench.device().attach(disk(), false).unwrap();
    bench.activate(0);
    drop(bench);
    wait_for_no_thread("lonely");
}

#[test]
fn without_a_thread_there_is_no_disk() {
    // Who should start it is gone, or there can be no more.
    let fails = Arc::new(AtomicBool::new(true));
    let (real, failing) = (starter(), fails.clone());
    let starter: Starter = Arc::new(move |start| {
        if !failing.load(Ordering::SeqCst) {
            real(start);
        }
    });
    let mut bench = Bench::new(Blk::new("disk0", starter));
    bench.activate(0);
    let refused = bench.device().attach(disk(), false);
    assert!(matches!(refused, Err(AttachError::Worker(thread::Error::Thread(_)))), "{refused:?}");
    assert_eq!(bench.config(0, 8), [0; 8]);
    detach(&mut bench);
    fails.store(false, Ordering::SeqCst);
    bench.device().attach(disk(), false).unwrap();
    assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, WRITE)]), (OK, 513));
}
