//! Fuzzing of queues: a driver that does anything, for any device.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use katana_fuzz::{Input, fuzz};
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::balloon::Balloon;
use super::console::Console;
use super::mem::Mem;
use super::pmem::Pmem;
use super::rng::Rng;
use super::testing::{Bench, MEMORY, Piece};
use crate::memory::{self, Pluggable};

/// Where most descriptors point to: at some multiple of 64 bytes, of which there are 256.
pub const DATA: u64 = 8 << 20;
/// Wake-ups of the device thread in which any input is dealt with.
const MOST_WAKE_UPS: usize = 2000;

/// An address: where data is, more rarely one where it ends, or any.
fn address(input: &mut Input<'_>) -> u64 {
    match input.below(8) {
        0 => input.edge(),
        1 => (MEMORY as u64).wrapping_sub(input.below(64) as u64),
        // The rings themselves.
        2 => u64::from(input.u16()) * 8,
        _ => DATA + 64 * input.below(256) as u64,
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.below(4) {
        0 => input.edge() as u32,
        1 => 4096,
        _ => input.below(256) as u32,
    }
}

fn piece(input: &mut Input<'_>) -> Piece {
    // Read, write, next, indirect, and once in a while what does not exist.
    let flags = if input.once_in(16) { input.u16() } else { input.below(4) as u16 };
    (address(input), length(input), flags)
}

/// Does what `input` says with all queues of a device that is new to its driver.
pub fn drive<D: VirtioDevice + MutEventSubscriber>(
    bench: &mut Bench<D>,
    features: u64,
    input: &mut Input<'_>,
) {
    bench.reset();
    bench.activate(features);
    let queues = bench.rings.len();
    while !input.is_empty() {
        let ring = &mut bench.rings[input.below(queues)];
        match input.below(8) {
            0 => {
                let (index, next) = (input.below(300) as u16, input.below(300) as u16);
                ring.describe(index, piece(input), next);
            }
            1 => ring.publish(input.below(300) as u16),
            2 => ring.claim(input.edge() as u16),
            3 | 4 => {
                let (first, count) = (input.below(200) as u16, 1 + input.below(6));
                let pieces: Vec<_> =
                    (0..count).map(|_| piece(input)).map(|(a, l, f)| (a, l, f & 2)).collect();
                ring.chain(first, &pieces);
                ring.publish(first);
            }
            5 => {
                let at = DATA + 64 * input.below(256) as u64;
                let count = input.below(64);
                bench.memory.write_slice(input.bytes(count), GuestAddress(at)).unwrap();
            }
            6 => {
                // An indirect table, and a chain that is one.
                let (at, count) = (DATA + 4096 * input.below(16) as u64, input.below(8));
                for index in 0..count as u64 {
                    let (address, length, flags) = piece(input);
                    let flags = u64::from(flags) | (index + 1) << 16;
                    for (offset, word) in [(0, address), (8, u64::from(length) | flags << 32)] {
                        bench.memory.write_obj(word, GuestAddress(at + 16 * index + offset)).unwrap();
                    }
                }
                ring.describe(0, (at, 16 * count as u32, 4), 0);
                ring.publish(0);
            }
            _ => ring.kick.write(1).unwrap(),
        }
        if input.once_in(4) {
            assert!(bench.wake_ups(MOST_WAKE_UPS) < MOST_WAKE_UPS, "it never rests");
        }
    }
    bench.rings.iter().for_each(|ring| ring.kick.write(1).unwrap());
    assert!(bench.wake_ups(MOST_WAKE_UPS) < MOST_WAKE_UPS, "it never rests");
}

#[test]
fn fuzz_console() {
    let mut bench = Bench::new(Console::new(Arc::new(|_: &[u8]| ())).unwrap());
    fuzz("console", |input| drive(&mut bench, 0, input));
}

#[test]
fn fuzz_rng() {
    let mut bench = Bench::new(Rng::new().unwrap());
    fuzz("rng", |input| drive(&mut bench, 0, input));
}

#[test]
fn fuzz_balloon() {
    let mut bench = Bench::new(Balloon::new().unwrap());
    fuzz("balloon", |input| drive(&mut bench, 1 << 5, input));
}

#[test]
fn fuzz_pmem() {
    let mut bench = Bench::new(Pmem::new(1 << 32, 1 << 20).unwrap());
    fuzz("pmem", |input| drive(&mut bench, 0, input));
}

#[test]
fn fuzz_mem() {
    let range = memory::pluggable_range(32, 1 << 20, 128).unwrap();
    let region = Pluggable::new(memory::create(32, Some(range)).unwrap(), range).unwrap();
    let mut bench = Bench::new(Mem::new(region, Box::new(|_| ())).unwrap());
    fuzz("mem", |input| {
        let requested = input.edge();
        bench.device().request(requested);
        drive(&mut bench, 1, input);
    });
}
