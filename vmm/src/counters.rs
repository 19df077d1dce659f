//! What this process counts of its machine, which is the only one. Counting is an addition to memory that is at hand:
//! nobody waits for anybody, and nothing is ordered by it.

use std::sync::atomic::{AtomicU64, Ordering};

use katana_protocol::counters::Counter;
use katana_protocol::vmm::MOST_VCPUS;

static COUNTS: [AtomicU64; Counter::ALL.len()] = [const { AtomicU64::new(0) }; Counter::ALL.len()];
static EXITS: [Exits; MOST_VCPUS as usize] = [const { Exits::new() }; MOST_VCPUS as usize];

/// The exits of one vCPU, in a cache line that no other one writes to.
#[repr(align(64))]
struct Exits([AtomicU64; Counter::EXITS]);

impl Exits {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; Counter::EXITS])
    }
}

/// Counts one.
pub fn count(counter: Counter) {
    add(counter, 1);
}

/// Counts so many.
pub fn add(counter: Counter, number: usize) {
    if let Some(count) = COUNTS.get(counter as usize) {
        count.fetch_add(number as u64, Ordering::Relaxed);
    }
}

/// Counts an exit of the vCPU with this number.
pub fn exit(vcpu: u8, counter: Counter) {
    let exits = EXITS.get(usize::from(vcpu));
    if let Some(count) = exits.and_then(|exits| exits.0.get(counter as usize)) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// All counts, in the order of [`Counter::ALL`].
pub fn all() -> Vec<u64> {
    let count = |(index, count): (usize, &AtomicU64)| {
        let exits = EXITS.iter().filter_map(|exits| exits.0.get(index));
        exits.map(|exits| exits.load(Ordering::Relaxed)).sum::<u64>() + count.load(Ordering::Relaxed)
    };
    COUNTS.iter().enumerate().map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_of_all_vcpus_are_one_number() {
        let (halts, lookups) = (Counter::ExitHalt as usize, Counter::FileLookup as usize);
        let before = all();
        exit(0, Counter::ExitHalt);
        exit(MOST_VCPUS - 1, Counter::ExitHalt);
        add(Counter::FileLookup, 3);
        // Neither a vCPU that cannot be nor what is no exit.
        exit(u8::MAX, Counter::ExitHalt);
        exit(0, Counter::FileLookup);
        let after = all();
        // Other tests count as well.
        assert!(after[halts] >= before[halts] + 2 && after[lookups] >= before[lookups] + 3);
        assert_eq!(after.len(), Counter::ALL.len());
    }
}
