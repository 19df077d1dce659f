use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::testing::{MEMORY, READ, Ring, WRITE};

fn setup(size: u16) -> (GuestMemory, Ring, DeviceQueue) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let (ring, queue) = Ring::new(&memory, 0, size);
    (memory, ring, DeviceQueue::new(queue, "test"))
}

#[test]
fn bytes_go_through_any_split_in_order() {
    let (memory, mut ring, mut queue) = setup(16);
    memory.write_slice(b"abcdefghij", GuestAddress(0x10_0000)).unwrap();
    ring.chain(0, &[(0x10_0000, 3, READ), (0x10_0003, 0, READ), (0x10_0003, 7, READ), (0x20_0000, 2, WRITE)]);
    ring.publish(0);
    let Chain { head, mut readable, mut writable } = queue.pop(&memory).unwrap();
    assert_eq!((head, readable.len(), readable.pieces(), writable.len()), (0, 10, 2, 2));

    let mut front = readable.split_front(4);
    assert_eq!((front.len(), readable.len()), (4, 6));
    let mut bytes = [0; 8];
    assert_eq!(front.read_bytes(&mut bytes), 4);
    assert_eq!(&bytes[..4], b"abcd");
    readable.advance(1);
    readable.truncate(4);
    assert_eq!(readable.read::<u16>().unwrap().to_le_bytes(), *b"fg");
    assert_eq!(readable.read::<u32>(), None);
    assert!(readable.is_empty());
    assert_eq!(writable.write_bytes(b"xyz"), 2);
    assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x20_0000)).unwrap(), *b"xy\0");
}

#[test]
fn descriptors_of_files_see_the_memory() {
    let (memory, mut ring, mut queue) = setup(16);
    let (mut near, far) = UnixStream::pair().unwrap();
    memory.write_slice(b"out", GuestAddress(0x10_0000)).unwrap();
    ring.chain(
        0,
        &[(0x10_0000, 1, READ), (0x10_0001, 2, READ), (0x20_0000, 1, WRITE), (0x20_0001, 9, WRITE)],
    );
    ring.publish(0);
    let chain = queue.pop(&memory).unwrap();
    assert_eq!(chain.readable.write_to(far.as_fd()).unwrap(), 3);
    let mut bytes = [0; 3];
    near.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"out");
    near.write_all(b"input").unwrap();
    assert_eq!(chain.writable.read_from(far.as_fd()).unwrap(), 5);
    assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(0x20_0000)).unwrap(), *b"input");
}

#[test]
fn what_is_wrong_is_named() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let (mut ring, queue) = Ring::new(&memory, 0, 16);
    let mut rings = queue.queue;
    let end = MEMORY as u64;
    let mut check = |first, second, expected| {
        ring.describe(0, first, 1);
        ring.describe(1, second, 0);
        ring.publish(0);
        let raw = rings.iter(&memory).unwrap().next().unwrap();
        assert_eq!(Chain::new(&memory, raw.clone()).err(), expected);
        raw
    };
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    let fine = (0x10_0000, 16, READ);
    check((0x10_0000, 16, WRITE | NEXT), fine, Some(ChainError::Order));
    check((0x10_0000, 16, READ | NEXT), (0x10_0000, 16, READ | NEXT), Some(ChainError::Unterminated));
    check((end, 16, READ), fine, Some(ChainError::Address { address: end, length: 16 }));
    check((end - 15, 16, READ), fine, Some(ChainError::Address { address: end - 15, length: 16 }));
    check((0x10_0000, 15, INDIRECT), fine, Some(ChainError::Empty));
    let raw = check((end - 16, 16, READ), fine, None);
    assert_eq!(super::check(raw), Ok(()));
}

#[test]
fn a_chain_of_zero_lengths_is_empty_but_fine() {
    let (memory, mut ring, mut queue) = setup(16);
    ring.chain(0, &[(0, 0, READ), (u64::MAX, 0, WRITE)]);
    ring.publish(0);
    let chain = queue.pop(&memory).unwrap();
    assert!(chain.readable.is_empty() && chain.writable.is_empty());
}

#[test]
fn chains_put_back_come_again() {
    let (memory, mut ring, mut queue) = setup(16);
    for head in 0..3 {
        ring.chain(head, &[(0x10_0000, 1, READ)]);
        ring.publish(head);
    }
    let heads: Vec<_> = (0..3).map(|_| queue.pop(&memory).unwrap().head()).collect();
    assert_eq!((heads, queue.pop(&memory).is_none()), (vec![0, 1, 2], true));
    queue.unpop(2);
    assert_eq!(queue.pop(&memory).unwrap().head(), 1);
}

#[test]
fn a_ring_that_lies_gets_no_service() {
    let (memory, mut ring, mut queue) = setup(16);
    // A head beyond the table.
    ring.publish(16);
    assert!(queue.pop(&memory).is_none() && !queue.sleep(&memory));
    ring.chain(0, &[(0x10_0000, 1, READ)]);
    ring.publish(0);
    assert!(queue.pop(&memory).is_none());
    assert_eq!(ring.used(), None);
}
