//! The machine's slots for disks.

use std::collections::HashMap;

use super::disks::{Identity, Opened};

/// The machine's slots, and who uses them.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Option<Use>>,
    kept: usize,
    /// By container.
    taken: HashMap<String, Vec<u8>>,
}

#[derive(Debug)]
struct Use {
    identity: Identity,
    read_only: bool,
    volatile: bool,
    users: usize,
}

/// Whether something on a container's disks outlives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lasting(pub bool);

/// A slot, and whether its disk is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSlot {
    /// Its number.
    pub slot: u8,
    /// Whether another container has brought the disk.
    pub shared: bool,
}

impl Slots {
    /// So many empty slots, of which images of shims leave some for disks that cannot be had in another way.
    pub fn new(count: u8, kept: u8) -> Self {
        Self { slots: (0..count).map(|_| None).collect(), kept: kept.into(), taken: HashMap::new() }
    }

    /// Takes a slot for a container. A disk that another one has is shared with it, so that both see what either
    /// writes; `None` when all slots are in use, or all but those that are kept for others if it is not `needed`.
    pub fn take(&mut self, container: &str, disk: &Opened, needed: bool) -> Option<DiskSlot> {
        let shared = self.find(disk);
        let free = self.slots.iter().filter(|slot| slot.is_none()).count();
        if shared.is_none() && disk.is_image() && !needed && free <= self.kept {
            return None;
        }
        let number = shared.or_else(|| self.slots.iter().position(Option::is_none))?;
        let slot = u8::try_from(number).ok()?;
        let used = self.slots.get_mut(number)?.get_or_insert(Use {
            identity: disk.identity(),
            read_only: disk.read_only(),
            volatile: disk.is_volatile(),
            users: 0,
        });
        used.users += 1;
        self.taken.entry(container.to_owned()).or_default().push(slot);
        Some(DiskSlot { slot, shared: shared.is_some() })
    }

    /// Whether another container has the disk in a slot.
    pub fn have(&self, disk: &Opened) -> bool {
        self.find(disk).is_some()
    }

    fn find(&self, disk: &Opened) -> Option<usize> {
        // What nobody uses is being taken away, or could not be.
        let fits = |used: &Use| {
            used.users > 0 && used.identity == disk.identity() && (disk.read_only() || !used.read_only)
        };
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(fits))
    }

    /// A container is gone; the answer is the slots that nobody uses any more, to be passed to [`Slots::free`], and whether
    /// what is on them is of use to nobody.
    pub fn leave(&mut self, container: &str) -> Vec<(u8, bool)> {
        let mut unused = Vec::new();
        for slot in self.taken.remove(container).unwrap_or_default() {
            if let Some(Some(used)) = self.slots.get_mut(usize::from(slot)) {
                used.users -= 1;
                if used.users == 0 {
                    unused.push((slot, used.volatile));
                }
            }
        }
        unused
    }

    /// A slot's disk is gone.
    pub fn free(&mut self, slot: u8) {
        if let Some(used) = self.slots.get_mut(usize::from(slot)) {
            *used = None;
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Whether a container has disks, and if so, whether any is of use to others later.
    pub fn has(&self, container: &str) -> Option<Lasting> {
        let slots = self.taken.get(container)?;
        let lasting = |slot: &u8| {
            self.slots.get(usize::from(*slot)).and_then(Option::as_ref).is_some_and(|used| !used.volatile)
        };
        Some(Lasting(slots.iter().any(lasting)))
    }
}
