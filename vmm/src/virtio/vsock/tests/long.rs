//! Long streams.

use super::*;

/// Bytes of a long stream, so that a lost, doubled or misplaced piece shows.
fn pattern(position: usize) -> u8 {
    (position ^ position >> 8 ^ position >> 16).wrapping_mul(167) as u8
}

const LONG: usize = 64 << 20;

#[test]
fn sixty_four_mebibytes_arrive_from_the_guest() {
    let mut guest = guest();
    let mut host = guest.connect();
    let reader = thread::spawn(move || {
        let (mut position, mut bytes) = (0, vec![0; 1 << 16]);
        loop {
            let count = host.read(&mut bytes).unwrap();
            if count == 0 {
                return position;
            }
            assert!(bytes[..count].iter().zip(position..).all(|(byte, at)| *byte == pattern(at)));
            position += count;
        }
    });
    let (mut sent, mut taken) = (0_usize, 0_u32);
    while sent < LONG {
        while let Some((header, _)) = guest.receive() {
            taken = header.fwd_cnt.to_native();
        }
        let free = BUFFER as usize - (sent - taken as usize);
        let count = free.min(64 << 10).min(LONG - sent);
        if count == 0 {
            guest.bench.wait();
            continue;
        }
        let data: Vec<u8> = (sent..sent + count).map(pattern).collect();
        guest.send(header(op::RW), &data);
        sent += count;
    }
    guest.send(Header { flags: SHUTDOWN_BOTH.into(), ..header(op::SHUTDOWN) }, &[]);
    while !reader.is_finished() {
        guest.bench.wait();
    }
    assert_eq!(reader.join().unwrap(), LONG);
}

#[test]
fn sixty_four_mebibytes_arrive_in_the_guest() {
    let mut guest = guest();
    let mut host = guest.connect();
    let writer = thread::spawn(move || {
        for start in (0..LONG).step_by(1 << 16) {
            let data: Vec<u8> = (start..start + (1 << 16)).map(pattern).collect();
            host.write_all(&data).unwrap();
        }
    });
    let mut position = 0_usize;
    let mut acknowledged = 0_usize;
    // The end of the data may be seen before that of the socket: two packets then, with one half each.
    let mut ended = 0;
    while ended != SHUTDOWN_BOTH {
        match guest.receive() {
            None => guest.bench.wait(),
            Some((packet, data)) if packet.op.to_native() == op::RW => {
                assert_eq!(ended & SHUTDOWN_SEND, 0, "data after the end of the data");
                assert!(data.iter().zip(position..).all(|(byte, at)| *byte == pattern(at)));
                position += data.len();
                // As Linux: an update each time that a quarter of the buffer was read.
                if position - acknowledged > 64 << 10 {
                    acknowledged = position;
                    let taken = position as u32;
                    let update = header(op::CREDIT_UPDATE);
                    guest.send(Header { buf_alloc: BUFFER.into(), fwd_cnt: taken.into(), ..update }, &[]);
                }
            }
            Some((packet, _)) if packet.op.to_native() == op::SHUTDOWN => {
                let flags = packet.flags.to_native();
                assert!(flags != 0 && ended & flags == 0, "{flags} after {ended}");
                ended |= flags;
                // The host reads for as long as it writes, so that half does not end first.
                assert_ne!(ended & SHUTDOWN_SEND, 0);
            }
            Some(_) => {}
        }
    }
    writer.join().unwrap();
    assert_eq!(position, LONG);
}
