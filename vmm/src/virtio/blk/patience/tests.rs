use std::cell::Cell;
use std::thread::sleep;

use super::*;
use crate::virtio::blk::slot::Serial;

/// Short enough for a test; not so short that a busy machine makes one of it.
const SHORT: Duration = Duration::from_millis(200);

fn full<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::ENOSPC))
}

/// Has `requests` served by one disk whose time passes as `pause` says.
fn with<T>(pause: &dyn Fn(Duration) -> bool, requests: impl FnOnce(&mut Patience, &Slot<'_>) -> T) -> T {
    let mut patience = Patience { longest: SHORT, ..Patience::new() };
    requests(&mut patience, &Slot { serial: &Serial::default(), pause })
}

fn moment(_: Duration) -> bool {
    sleep(Duration::from_millis(1));
    true
}

#[test]
fn room_that_comes_is_taken() {
    let (tries, pauses) = (Cell::new(0), Cell::new(Vec::new()));
    let pause = |time| {
        pauses.set([pauses.take(), vec![time]].concat());
        true
    };
    let written = with(&pause, |patience, slot| {
        let written = patience.write(slot, || {
            tries.set(tries.get() + 1);
            match tries.get() {
                1 => full(),
                2 => Err(io::Error::from_raw_os_error(libc::EDQUOT)),
                _ => Ok(512),
            }
        });
        patience.end(slot, written.is_ok());
        assert!(patience.since.is_none());
        written
    });
    assert_eq!((written.unwrap(), tries.get(), pauses.take().len()), (512, 3, 2));
}

#[test]
fn a_pause_is_a_second_or_what_is_left() {
    let paused = |longest| {
        let asked = Cell::new(None);
        let pause = |time| {
            asked.set(Some(time));
            false
        };
        with(&pause, |patience, slot| {
            patience.longest = longest;
            patience.write(slot, full::<()>).unwrap_err();
        });
        asked.take()
    };
    assert_eq!(paused(LONGEST), Some(PAUSE));
    assert_eq!(paused(SHORT), Some(SHORT));
}

#[test]
fn a_host_that_stays_full_is_waited_for_once() {
    let tries = Cell::new(0);
    let count = || {
        tries.set(tries.get() + 1);
        full::<()>()
    };
    with(&moment, |patience, slot| {
        let start = Instant::now();
        let failed = patience.write(slot, count).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::StorageFull);
        assert!(start.elapsed() >= SHORT && tries.get() > 2, "{:?}, {} tries", start.elapsed(), tries.get());
        patience.end(slot, false);

        // Those behind it fail at once; later ones wait again.
        tries.set(0);
        patience.write(slot, count).unwrap_err();
        patience.end(slot, false);
        assert_eq!((tries.get(), patience.waits), (1, 1));
        sleep(SHORT);
        patience.write(slot, count).unwrap_err();
        assert!(tries.get() > 2);
        assert_eq!(patience.waits, 2);
    });
}

#[test]
fn all_parts_of_a_request_wait_no_longer_than_one() {
    with(&moment, |patience, slot| {
        let start = Instant::now();
        // There is room for a little more each time.
        let mut parts = 0;
        let failed = loop {
            let mut tries = 0;
            let part = patience.write(slot, || {
                tries += 1;
                if tries > 2 { Ok(()) } else { full() }
            });
            match part {
                Ok(()) => parts += 1,
                Err(error) => break error,
            }
            assert!(start.elapsed() < 50 * SHORT);
        };
        assert_eq!((failed.kind(), patience.waits), (io::ErrorKind::StorageFull, 1));
        assert!(parts > 1);
    });
}

#[test]
fn a_disk_that_is_not_wanted_waits_for_nothing() {
    with(&|_| false, |patience, slot| {
        let mut tries = 0;
        let failed = patience.write(slot, || {
            tries += 1;
            full::<()>()
        });
        assert_eq!((failed.unwrap_err().kind(), tries), (io::ErrorKind::StorageFull, 1));
        patience.end(slot, false);
        // It did not wait in vain: the next one may.
        assert!(patience.since.is_none() && patience.gave_up.is_none());
    });
}

#[test]
fn other_errors_are_not_waited_for() {
    with(&|_| panic!("a pause"), |patience, slot| {
        for error in [libc::EIO, libc::EFBIG, libc::EROFS, libc::EOPNOTSUPP] {
            let failed = patience.write(slot, || Err::<(), _>(io::Error::from_raw_os_error(error)));
            assert_eq!(failed.unwrap_err().raw_os_error(), Some(error));
        }
        assert_eq!(patience.waits, 0);
    });
}

#[test]
fn a_guest_that_waits_again_and_again_does_not_flood_the_log() {
    with(&|_| false, |patience, slot| {
        let mut logged = Vec::new();
        for _ in 0..1000 {
            patience.write(slot, full::<()>).unwrap_err();
            patience.end(slot, false);
            logged.extend(patience.is_logged().then_some(patience.waits));
        }
        assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    });
}
