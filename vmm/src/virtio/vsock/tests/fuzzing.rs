//! A guest and a host that do anything with connections.

use katana_fuzz::{Input, fuzz};

use super::*;

/// The guest's ports, and the host's: those that are asked for, that are refused, of the device's own, and of nobody.
const PORTS: [u32; 8] = [OWN, OWN + 1, PORT, PORT + 1, 13, 0x8000_0000, 0xffff_fffe, u32::MAX];
/// Wake-ups of the device thread in which a step is dealt with.
const MOST_WAKE_UPS: usize = 1000;

fn packet(input: &mut Input<'_>) -> Header {
    let operation = if input.once_in(16) { input.u16() } else { 1 + input.below(7) as u16 };
    let mut header = header(operation);
    header.src_port = input.one_of(&PORTS).into();
    header.dst_port = input.one_of(&PORTS).into();
    header.flags = (if input.once_in(8) { input.u32() } else { input.below(4) as u32 }).into();
    header.buf_alloc = (input.edge() as u32).into();
    header.fwd_cnt = (input.edge() as u32).into();
    if input.once_in(16) {
        header.src_cid = input.edge().into();
        header.kind = input.u16().into();
    }
    header
}

fn step(guest: &mut Guest, hosts: &mut Vec<UnixStream>, input: &mut Input<'_>) {
    match input.below(12) {
        0..5 => {
            let data =
                vec![1; if input.once_in(4) { input.edge() as usize % 70_000 } else { input.below(64) }];
            let (packet, head) = (packet(input), guest.next_transmit);
            guest.next_transmit = (head + 2) % 32;
            let at = TX + u64::from(head / 2) * TX_LENGTH;
            // The length is the truth, or not.
            let length = if input.once_in(8) { input.edge() as u32 } else { data.len() as u32 };
            let packet = Header { len: length.into(), ..packet };
            guest.bench.memory.write_slice(packet.as_slice(), GuestAddress(at)).unwrap();
            guest.bench.memory.write_slice(&data, GuestAddress(at + 64)).unwrap();
            let pieces = [(at, HEADER_LENGTH as u32, READ), (at + 64, data.len() as u32, READ)];
            guest.bench.rings[TRANSMIT].chain(head, &pieces);
            guest.bench.rings[TRANSMIT].publish(head);
            guest.bench.rings[TRANSMIT].kick.write(1).unwrap();
        }
        5 => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            // There may be too many.
            if guest.bench.device().connect(input.one_of(&PORTS), theirs.into()).is_ok() {
                hosts.push(ours);
            }
        }
        6 if !hosts.is_empty() => drop(hosts.swap_remove(input.below(hosts.len()))),
        7 if !hosts.is_empty() => {
            let how = input.one_of(&[Shutdown::Read, Shutdown::Write, Shutdown::Both]);
            // Its other end may be gone.
            let _ = hosts[input.below(hosts.len())].shutdown(how);
        }
        8 | 9 if !hosts.is_empty() => {
            let index = input.below(hosts.len());
            // As much as goes.
            let _ = hosts[index].write(&vec![2; input.edge() as usize % 300_000]);
        }
        10 if !hosts.is_empty() => {
            let index = input.below(hosts.len());
            let _ = hosts[index].read(&mut vec![0; input.edge() as usize % 300_000]);
        }
        _ => guest.give_buffers(input),
    }
    hosts.extend(
        guest.incoming.try_iter().map(|(_, host)| host).inspect(|h| h.set_nonblocking(true).unwrap()),
    );
    while guest.bench.used(TRANSMIT).is_some() {}
}

impl Guest {
    /// Takes what came, and makes receive buffers of any size available.
    fn give_buffers(&mut self, input: &mut Input<'_>) {
        while self.bench.used(RECEIVE).is_some() {}
        for head in 0..input.below(32) as u16 {
            let length = if input.once_in(4) { input.edge() as u32 % 70_000 } else { RX_LENGTH };
            self.bench.rings[RECEIVE].chain(head, &[(RX, length.max(1), WRITE)]);
            self.bench.rings[RECEIVE].publish(head);
        }
        self.bench.rings[RECEIVE].kick.write(1).unwrap();
    }
}

#[test]
fn fuzz_vsock() {
    let mut guest = guest();
    fuzz("vsock", |input| {
        guest.bench.reset();
        guest.bench.activate(0);
        guest.next_transmit = 0;
        let mut hosts = Vec::new();
        while !input.is_empty() {
            step(&mut guest, &mut hosts, input);
            assert!(guest.bench.wake_ups(MOST_WAKE_UPS) < MOST_WAKE_UPS, "it never rests");
        }
        drop(hosts);
        assert!(guest.bench.wake_ups(MOST_WAKE_UPS) < MOST_WAKE_UPS, "it never rests");
    });
}

#[test]
fn fuzz_vsock_queues() {
    let mut guest = guest();
    fuzz("vsock-queues", |input| crate::virtio::fuzzing::drive(&mut guest.bench, 0, input));
}
