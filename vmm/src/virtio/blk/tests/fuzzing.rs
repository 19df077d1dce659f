use katana_fuzz::{Input, fuzz};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};

use super::super::slot::Slot;
use super::*;
use crate::memory::GuestMemory;
use crate::virtio::fuzzing::{self, drive};
use crate::virtio::simple::{Answer, Simple};
use crate::virtio::testing::wait_until;

/// Requests as the disk's thread serves them, on the thread that asks: so an input has been dealt with when the next
/// one comes.
struct Direct(Disk);

impl Answer for Direct {
    const NAME: &'static str = "blk";
    const TYPE: u32 = VIRTIO_ID_BLOCK;
    const QUEUE_SIZES: &'static [u16] = &QUEUE_SIZES;

    fn answer(&mut self, _index: usize, memory: &GuestMemory, queue: &mut DeviceQueue) {
        let slot = Slot { serial: &Serial::default(), pause: &|_| true };
        queue.serve(memory, |chain| disk::request(chain, Some(&mut self.0), &slot));
    }
}

fn file() -> File {
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(&[7; 64 * 512]).unwrap();
    file
}

/// A header of some kind, and three ranges, which make sense more often than anything at random.
fn a_request(number: u64) -> Vec<u8> {
    let kinds = [
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ];
    let kind = kinds[number as usize % kinds.len()];
    let range =
        |unmap: u64| [(number % 66).to_le_bytes(), (number % 5 + (unmap << 32)).to_le_bytes()].concat();
    let header = [u64::from(kind).to_le_bytes(), (number % 65).to_le_bytes()].concat();
    [header, range(0), range(number / 6 % 2), range(0)].concat()
}

#[test]
fn fuzz_blk() {
    let file = file();
    let disk = Disk::new(file.try_clone().unwrap(), false).unwrap();
    let mut bench = Bench::new(Simple::new(Direct(disk)).unwrap());
    let requests: Vec<u8> = (0..256).flat_map(a_request).collect();
    fuzz("blk", |input| {
        bench.memory.write_slice(&requests, GuestAddress(fuzzing::DATA)).unwrap();
        drive(&mut bench, 0, input);
        assert_eq!(file.metadata().unwrap().len(), 64 * 512, "a disk keeps its size");
    });
}

/// The thread, while disks come and go, and its driver as well.
struct Life<'i, 'b> {
    bench: Bench<Blk>,
    input: &'i mut Input<'b>,
    attached: bool,
    /// Requests of this driver: made, and answered.
    made: u16,
    answered: u16,
}

impl Life<'_, '_> {
    fn step(&mut self, file: &File) {
        match self.input.below(8) {
            0 => {
                let attached = self.bench.device().attach(file.try_clone().unwrap(), false);
                assert_eq!(attached.is_ok(), !self.attached, "{attached:?}");
                self.attached = true;
            }
            1 => {
                detach(&mut self.bench);
                self.attached = false;
            }
            2 => {
                self.bench.reset();
                self.take_answers();
                let returned = self.bench.bytes(0, 0x2_0000);
                self.bench.rings[REQUESTS].kick.write(1).unwrap();
                std::thread::yield_now();
                assert_eq!(self.bench.bytes(0, 0x2_0000), returned, "the queue after a reset");
                self.bench.activate(0);
                (self.made, self.answered) = (0, 0);
            }
            _ => self.offer(),
        }
    }

    fn offer(&mut self) {
        if self.made - self.answered == QUEUE_SIZES[REQUESTS] / 4 {
            return self.take_answers();
        }
        let head = self.made % 32 * 4;
        self.made += 1;
        let ring = &mut self.bench.rings[REQUESTS];
        ring.chain(
            head,
            &[(DATA, 16, READ), (DATA + 0x1000, 512, WRITE), (STATUS + u64::from(head), 1, WRITE)],
        );
        ring.publish(head);
        if self.input.below(2) == 0 {
            ring.kick.write(1).unwrap();
        }
    }

    /// Each is answered once, in its turn.
    fn take_answers(&mut self) {
        while let Some((head, length)) = self.bench.used(REQUESTS) {
            assert!(self.answered < self.made && head == self.answered % 32 * 4, "{head}");
            let expected = match self.bench.bytes(STATUS + u64::from(head), 1)[0] {
                OK => 513,
                IOERR => 1,
                status => panic!("status {status}"),
            };
            assert_eq!(length, expected);
            self.answered += 1;
        }
    }
}

#[test]
fn fuzz_blk_thread() {
    let (file, starter) = (file(), starter());
    fuzz("blk-thread", |input| {
        let mut bench = Bench::new(Blk::new("disk0", starter.clone()));
        bench.activate(0);
        let mut life = Life { bench, input, attached: false, made: 0, answered: 0 };
        while !life.input.is_empty() {
            life.step(&file);
        }
        // Whatever happened, a disk and a kick are enough.
        if !life.attached {
            life.bench.device().attach(file.try_clone().unwrap(), false).unwrap();
        }
        life.bench.kick(REQUESTS);
        wait_until("all requests are answered", || {
            life.take_answers();
            (life.answered == life.made).then_some(())
        });
    });
}
