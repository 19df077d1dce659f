use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{Bench, READ, WRITE};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const BUFFERS: u64 = 0x10_0000;

/// A NIC whose tap is one end of a pair of datagram sockets.
fn bench(features: u64) -> (Bench<Net>, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut bench = Bench::new(Net::new().unwrap());
    bench.device().connect(vec![far.into()], [2, 0, 0, 0, 0, 1]).unwrap();
    bench.activate(features);
    (bench, near)
}

/// Makes `count` receive buffers of `length` bytes available.
fn fill(bench: &mut Bench<Net>, count: u16, length: u32) {
    for head in 0..count {
        bench.rings[RECEIVE].chain(head, &[(BUFFERS + u64::from(head) * u64::from(length), length, WRITE)]);
        bench.rings[RECEIVE].publish(head);
    }
    bench.kick(RECEIVE);
}

#[test]
fn the_link_comes_up_with_the_tap() {
    let mut bench = Bench::new(Net::new().unwrap());
    bench.activate(0);
    assert_eq!(bench.config(0, 12), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    let packet = bench.data(&[0; 60]);
    bench.offer(TRANSMIT, &[(packet, 60, READ)]);
    assert_eq!(bench.used(TRANSMIT), Some((0, 0)));

    let (_near, far) = UnixDatagram::pair().unwrap();
    bench.device().connect(vec![far.into()], [2, 1, 2, 3, 4, 5]).unwrap();
    let config = vec![2, 1, 2, 3, 4, 5, 1, 0, 1, 0];
    assert_eq!((bench.config(0, 10), bench.config_interrupts()), (config, 1));
    let (_, other) = UnixDatagram::pair().unwrap();
    assert!(matches!(bench.device().attach(vec![other.into()], [0; 6], vec![]), Err(AttachError::InUse)));
    let mut nic = Net::new().unwrap();
    let (_, no_tap) = UnixDatagram::pair().unwrap();
    assert!(matches!(nic.attach(vec![no_tap.into()], [0; 6], vec![]), Err(AttachError::Tap("TUNGETIFF", _))));
    assert!(matches!(nic.attach(vec![], [0; 6], vec![]), Err(AttachError::Pairs(0))));
}

#[test]
fn packets_leave_whole_from_any_split() {
    let (mut bench, near) = bench(0);
    let at = bench.data(b"hhhhhhhhhhhhpacket");
    bench.offer(TRANSMIT, &[(at, 5, READ), (at + 5, 9, READ), (at + 14, 4, READ)]);
    let mut bytes = [0; 64];
    assert_eq!(near.recv(&mut bytes).unwrap(), 18);
    assert_eq!(&bytes[..18], b"hhhhhhhhhhhhpacket");
    assert_eq!((bench.used(TRANSMIT), bench.interrupts(TRANSMIT)), (Some((0, 0)), 1));
}

#[test]
fn bad_packets_are_dropped() {
    let (mut bench, near) = bench(0);
    bench.offer_hostile(TRANSMIT);
    bench.offer(TRANSMIT, &[(BUFFERS, 11, READ)]);
    bench.offer(TRANSMIT, &[(BUFFERS, 0x8000, READ); 3]);
    bench.offer(TRANSMIT, &[(BUFFERS, 100, WRITE)]);
    for _ in 0..3 {
        assert_eq!(bench.used(TRANSMIT), Some((0, 0)));
    }
    assert!(near.recv(&mut [0; 64]).is_err());
    // Receive buffers are looked at when there is a packet: the first good one is used.
    near.send(&[7; 60]).unwrap();
    bench.run();
    bench.offer_hostile(RECEIVE);
    bench.rings[RECEIVE].chain(0, &[(BUFFERS, 11, WRITE)]);
    bench.rings[RECEIVE].chain(1, &[(BUFFERS, 2000, WRITE)]);
    bench.rings[RECEIVE].publish(0);
    bench.rings[RECEIVE].publish(1);
    bench.kick(RECEIVE);
    assert_eq!((bench.used(RECEIVE), bench.used(RECEIVE)), (Some((0, 0)), Some((1, 60))));
}

/// On one processor, the guest makes useless buffers available while another one waits for the device thread.
#[test]
fn a_driver_that_never_stops_does_not_hold_the_thread() {
    for (queue, piece) in [(RECEIVE, (BUFFERS, 11, WRITE)), (TRANSMIT, (BUFFERS, 11, READ))] {
        for malformed in [false, true] {
            let (mut bench, near) = bench(MERGE);
            near.send(&[7; 60]).unwrap();
            // The tap's event and a kick at once would be two turns.
            bench.run();
            // A descriptor that is its own successor, or one that is too short.
            let next = u16::from(malformed);
            bench.rings[queue].describe(0, (piece.0, piece.1, piece.2 | next), 0);
            let stop = Arc::new(AtomicBool::new(false));
            let publishing = std::thread::spawn(bench.rings[queue].publish_for_ever(Arc::clone(&stop)));
            let mut worked = 0;
            while worked < 20 && !publishing.is_finished() {
                let before = bench.rings[queue].peek_used();
                bench.rings[queue].kick.write(1).unwrap();
                bench.wake_ups(1);
                let done = bench.rings[queue].peek_used().wrapping_sub(before);
                assert!(done <= 257, "{done} chains at once, queue {queue}, malformed {malformed}");
                worked += usize::from(done > 0);
            }
            stop.store(true, Ordering::Relaxed);
            assert!(publishing.join().unwrap(), "queue {queue}, malformed {malformed}");
        }
    }
}

#[test]
fn a_full_tap_holds_the_packet_until_it_has_room() {
    let (mut bench, near) = bench(0);
    let at = bench.data(&[5; 60]);
    let mut sent = 0;
    let mut returned = 0;
    loop {
        bench.offer(TRANSMIT, &[(at, 60, READ)]);
        sent += 1;
        if bench.used(TRANSMIT).is_none() {
            break;
        }
        returned += 1;
        assert!(returned < 10_000);
    }
    assert_eq!(sent, returned + 1);
    while near.recv(&mut [0; 64]).is_ok() {
        sent -= 1;
    }
    assert_eq!(sent, 1);
    bench.wait();
    assert_eq!((bench.used(TRANSMIT), near.recv(&mut [0; 64]).unwrap()), (Some((0, 0)), 60));
}

#[test]
fn packets_wait_in_the_tap_for_buffers() {
    let (mut bench, near) = bench(0);
    near.send(&[1; 100]).unwrap();
    near.send(&[2; 90]).unwrap();
    bench.run();
    fill(&mut bench, 1, 2000);
    assert_eq!((bench.used(RECEIVE), bench.used(RECEIVE)), (Some((0, 100)), None));
    // Without mergeable buffers it says 1 as well.
    assert_eq!(bench.bytes(BUFFERS, 14), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1]);
    fill(&mut bench, 1, 2000);
    assert_eq!(bench.used(RECEIVE), Some((0, 90)));
    near.send(&[3; 80]).unwrap();
    bench.run();
    assert_eq!(bench.used(RECEIVE), None);
    fill(&mut bench, 2, 2000);
    assert_eq!((bench.used(RECEIVE), bench.used(RECEIVE)), (Some((0, 80)), None));
}

#[test]
fn a_long_packet_is_spread_over_mergeable_buffers() {
    let (mut bench, near) = bench(MERGE);
    fill(&mut bench, 200, 1000);
    let packet: Vec<u8> = (0..2500_u32).map(|n| n as u8 | 1).collect();
    near.send(&packet).unwrap();
    near.send(&[9; 999]).unwrap();
    bench.run();
    let used: Vec<_> = std::iter::from_fn(|| bench.used(RECEIVE)).collect();
    assert_eq!(used, [(0, 1000), (1, 1000), (2, 500), (3, 999)]);
    let bytes = bench.bytes(BUFFERS, 2500);
    assert_eq!((&bytes[..10], &bytes[10..12], &bytes[12..]), (&packet[..10], &[3, 0][..], &packet[12..]));
    assert_eq!(bench.bytes(BUFFERS + 3010, 2), [1, 0]);
    // The buffers that were taken beside went back: all 196 of them are used in turn.
    for _ in 0..100 {
        near.send(&[9; 60]).unwrap();
        bench.run();
    }
    let heads: Vec<_> = std::iter::from_fn(|| bench.used(RECEIVE)).map(|(head, _)| head).collect();
    assert_eq!(heads, (4..104).collect::<Vec<_>>());
}

#[test]
fn a_ring_full_of_small_buffers_still_works() {
    let (mut bench, near) = bench(MERGE);
    fill(&mut bench, 256, 64);
    near.send(&[9; 200]).unwrap();
    bench.run();
    let used: Vec<_> = std::iter::from_fn(|| bench.used(RECEIVE)).collect();
    assert_eq!(used, [(0, 64), (1, 64), (2, 64), (3, 8)]);
}

#[test]
fn reset_keeps_the_tap() {
    let (mut bench, near) = bench(0);
    bench.reset();
    near.send(&[1; 100]).unwrap();
    bench.run();
    bench.activate(0);
    fill(&mut bench, 1, 2000);
    assert_eq!(bench.used(RECEIVE), Some((0, 100)));
}

/// A new tap, if there are taps here.
fn tap(name: &[u8], flags: libc::c_int) -> Option<OwnedFd> {
    let tap = std::fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name);
    request[16..18].copy_from_slice(&(flags as u16).to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which is 40 bytes long.
    (unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) } == 0).then(|| tap.into())
}

#[test]
fn a_real_tap_carries_packets() {
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let Some(tap) = tap(b"ktest0", needed) else { return };
    // What is no /dev/vhost-net is not used.
    let no_vhost = std::fs::File::open("/dev/null").unwrap().into();
    let mut bench = Bench::new(Net::new().unwrap());
    bench.device().attach(vec![tap], [2, 0, 0, 0, 0, 1], vec![no_vhost]).unwrap();
    let features = bench.device().features();
    bench.activate(features);
    bench.memory.write_slice(&[0; 12], GuestAddress(BUFFERS)).unwrap();
    fill(&mut bench, 200, 2000);
    // The interface is down, so nothing arrives and nothing is taken; neither makes trouble.
    bench.offer(TRANSMIT, &[(BUFFERS, 72, READ)]);
    assert_eq!((bench.used(TRANSMIT), bench.used(RECEIVE)), (Some((0, 0)), None));
}

#[test]
fn a_tap_without_the_header_is_refused() {
    let Some(tap) = tap(b"ktest1", libc::IFF_TAP | libc::IFF_NO_PI) else { return };
    assert!(matches!(Net::new().unwrap().attach(vec![tap], [0; 6], vec![]), Err(AttachError::Flags(0x1002))));
}

const MANY: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

/// What the device answers when the driver asks with these bytes for so many pairs.
fn command(bench: &mut Bench<Net>, queue: usize, bytes: &[u8]) -> Option<u8> {
    let (at, answer) = (bench.data(bytes), bench.data(&[0xff]));
    bench.offer(queue, &[(at, bytes.len() as u32, READ), (answer, 1, WRITE)]);
    bench.used(queue).filter(|(_, length)| *length == 1).map(|_| bench.bytes(answer, 1)[0])
}

#[test]
fn each_pair_has_packets_of_its_own() {
    let pairs: Vec<_> = (0..3).map(|_| UnixDatagram::pair().unwrap()).collect();
    let (near, far): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let mut bench = Bench::new(Net::new().unwrap());
    assert_eq!(bench.device().features() & MANY, 0);
    bench.device().connect(far.into_iter().map(OwnedFd::from).collect(), [2, 0, 0, 0, 0, 1]).unwrap();
    assert_eq!(bench.device().features() & MANY, MANY);
    assert_eq!(bench.config(8, 2), [3, 0]);
    bench.activate(MANY);
    assert_eq!(bench.rings.len(), 7);
    assert_eq!(command(&mut bench, 6, &[4, 0, 3, 0]), Some(0));
    assert_eq!(bench.device().in_use, 3);
    for (pair, near) in near.iter().enumerate() {
        let packet = [pair as u8; 60];
        bench.rings[2 * pair].chain(0, &[(BUFFERS, 2000, WRITE)]);
        bench.rings[2 * pair].publish(0);
        bench.kick(2 * pair);
        near.send(&packet).unwrap();
        bench.run();
        assert_eq!(bench.used(2 * pair), Some((0, 60)));
        let at = bench.data(&packet);
        bench.offer(2 * pair + 1, &[(at, 60, READ)]);
        let mut bytes = [0xff; 64];
        near.set_nonblocking(true).unwrap();
        assert_eq!((near.recv(&mut bytes).unwrap(), &bytes[..60]), (60, &packet[..]));
    }
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let (_near, far): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixDatagram::pair().unwrap()).unzip();
    let mut bench = Bench::new(Net::new().unwrap());
    bench.device().connect(far.into_iter().map(OwnedFd::from).collect(), [0; 6]).unwrap();
    bench.activate(MANY);
    for bytes in [[4, 0, 0, 0], [4, 0, 3, 0], [4, 0, 1, 1], [4, 1, 2, 0], [0, 0, 2, 0]] {
        assert_eq!(command(&mut bench, 4, &bytes), Some(1), "{bytes:?}");
    }
    assert_eq!(command(&mut bench, 4, &[4, 0, 2]), Some(1));
    bench.offer_hostile(4);
    assert_eq!(bench.device().in_use, 1);
    assert_eq!(command(&mut bench, 4, &[4, 0, 2, 0]), Some(0));
    assert_eq!(bench.device().in_use, 2);
    // The next driver begins with one pair, and one that does not know of pairs has the queue for commands behind the
    // first.
    bench.reset();
    assert_eq!(bench.device().in_use, 1);
    bench.activate(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(command(&mut bench, 2, &[4, 0, 2, 0]), Some(0));
}

#[test]
fn fuzz_net() {
    let (mut bench, near) = bench(MERGE);
    katana_fuzz::fuzz("net", |input| {
        // As many packets as may be, of all lengths.
        (0..input.below(8)).for_each(|_| drop(near.send(&vec![7; input.edge() as usize % 70_000])));
        let features = if input.once_in(2) { MERGE } else { 0 };
        crate::virtio::fuzzing::drive(&mut bench, features, input);
        while near.recv(&mut [0; 64]).is_ok() {}
    });
}
