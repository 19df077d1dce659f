//! Streams of which one half or both have ended.

use super::*;

#[test]
fn half_closed_streams_go_on_in_the_other_direction() {
    let mut guest = guest();
    let mut host = guest.connect();
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.bench.run();
    assert_eq!(guest.expect(op::RW).1, b"last words");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags.to_native(), SHUTDOWN_SEND);
    guest.send(header(op::RW), b"answer");
    let mut bytes = [0; 6];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
    // The host's end goes away: the guest need not send any more.
    drop(host);
    guest.bench.run();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags.to_native(), SHUTDOWN_RECEIVE);
    guest.send(header(op::RST), &[]);

    let mut host = guest.connect();
    guest.send(header(op::RW), b"all of it");
    guest.send(Header { flags: SHUTDOWN_SEND.into(), ..header(op::SHUTDOWN) }, &[]);
    let mut all = String::new();
    host.read_to_string(&mut all).unwrap();
    assert_eq!(all, "all of it");
    host.write_all(b"still open").unwrap();
    assert_eq!(guest.data(), b"still open");
    // Data after the guest's own end.
    guest.send(header(op::RW), b"x");
    guest.expect(op::RST);

    let mut host = guest.connect();
    guest.send(Header { flags: SHUTDOWN_RECEIVE.into(), ..header(op::SHUTDOWN) }, &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(header(op::RW), b"one way");
    let mut bytes = [0; 7];
    host.read_exact(&mut bytes).unwrap();
    guest.expect_nothing();
}

#[test]
fn a_host_that_closes_is_announced_after_its_data() {
    let mut guest = guest();
    let mut host = guest.connect();
    host.write_all(&[1; 10_000]).unwrap();
    drop(host);
    guest.bench.run();
    let mut length = 0;
    while length < 10_000 {
        length += guest.expect(op::RW).1.len();
    }
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags.to_native(), SHUTDOWN_BOTH);
    // What the guest has under way is dropped.
    guest.send(header(op::RW), b"nobody there");
    guest.expect_nothing();
    guest.send(header(op::RST), &[]);
}

#[test]
fn bytes_sent_before_close_arrive_however_slow_the_host_is() {
    let mut guest = guest();
    let mut host = guest.connect();
    let mut sent = 0;
    while sent < 400 << 10 {
        guest.send(header(op::RW), &[3; 50 << 10]);
        sent += 50 << 10;
    }
    guest.send(Header { flags: SHUTDOWN_BOTH.into(), ..header(op::SHUTDOWN) }, &[]);
    while guest.receive().is_some_and(|(header, _)| header.op.to_native() != op::RST) {}
    // The same ports at once again.
    let mut next = guest.connect();
    guest.send(header(op::RW), b"next");
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all.len()
    });
    while !reader.is_finished() {
        guest.bench.wait();
    }
    assert_eq!(reader.join().unwrap(), sent);
    let mut bytes = [0; 4];
    next.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"next");
}

/// An event must not bring about the next one, whichever half of a connection has ended.
#[test]
fn a_half_closed_connection_rests() {
    for ends in [SHUTDOWN_SEND, SHUTDOWN_RECEIVE, 0] {
        for host_ends in [None, Some(Shutdown::Write), Some(Shutdown::Read), Some(Shutdown::Both)] {
            for backlog in [0, 200 << 10] {
                let mut guest = guest();
                let host = guest.connect();
                if backlog > 0 {
                    host.set_nonblocking(true).unwrap();
                    let size = 16 << 10;
                    (0..backlog / size).for_each(|_| guest.send(header(op::RW), &vec![1; size]));
                }
                if ends != 0 {
                    guest.send(Header { flags: ends.into(), ..header(op::SHUTDOWN) }, &[]);
                }
                match host_ends {
                    Some(how) => host.shutdown(how).unwrap(),
                    None => drop(host.try_clone().unwrap()),
                }
                assert!(guest.bench.wake_ups(1000) < 10, "{ends} {host_ends:?} {backlog}");
                drop(host);
                assert!(guest.bench.wake_ups(1000) < 10, "{ends} {host_ends:?} {backlog}");
                // Whatever the guest says once more is answered, and that is all.
                for _ in 0..3 {
                    guest.send(Header { flags: SHUTDOWN_RECEIVE.into(), ..header(op::SHUTDOWN) }, &[]);
                    assert!(guest.bench.wake_ups(1000) < 10);
                }
            }
        }
    }
}

/// Nobody reads what is left of a connection that the guest has reset.
#[test]
fn what_lingers_rests() {
    let mut guest = guest();
    let host = guest.connect();
    (0..14).for_each(|_| guest.send(header(op::RW), &[1; 16 << 10]));
    guest.send(header(op::RST), &[]);
    assert!(guest.bench.wake_ups(1000) < 10);
    host.shutdown(Shutdown::Write).unwrap();
    assert!(guest.bench.wake_ups(1000) < 10);
    drop(host);
    assert!(guest.bench.wake_ups(1000) < 10);
}
