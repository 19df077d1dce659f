//! The machine's slots for disks.

use std::collections::HashMap;

use super::disks::{Identity, Kind, Opened};

/// The machine's slots, and who uses them.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Option<Use>>,
    limits: Limits,
    /// By container.
    taken: HashMap<String, Vec<u8>>,
}

/// How many slots are for what can be shared as well, so that there are some for what cannot.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For writable layers of roots.
    pub roots: usize,
    /// For emptyDirs. Those that have an image cannot be shared any more.
    pub empty_dirs: usize,
    /// For the volumes of images.
    pub volumes_of_images: usize,
}

#[derive(Debug)]
struct Use {
    identity: Identity,
    read_only: bool,
    kind: Kind,
    volatile: bool,
    users: usize,
    /// Whether the guest could not release it, so that the VMM has it still.
    busy: bool,
}

/// A slot, and whether its disk is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSlot {
    /// Its number.
    pub slot: u8,
    /// Whether another container has brought the disk.
    pub shared: bool,
}

impl Slots {
    /// So many empty slots, for the containers of a pod or for the disks of a single container.
    pub fn new(count: u8, of_pod: bool) -> Self {
        let part = |divisor: usize| if of_pod { usize::from(count) / divisor } else { usize::MAX };
        let limits = Limits { roots: part(3), empty_dirs: part(4), volumes_of_images: part(6) };
        Self { slots: (0..count).map(|_| None).collect(), limits, taken: HashMap::new() }
    }

    /// How many are for what.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether there is a slot for a disk that can be shared as well.
    pub fn have_room(&self, kind: Kind) -> bool {
        let limit = match kind {
            Kind::Device => usize::MAX,
            Kind::Root => self.limits.roots,
            Kind::EmptyDir => self.limits.empty_dirs,
            Kind::VolumeOfImage => self.limits.volumes_of_images,
        };
        let used = self.slots.iter().flatten().filter(|used| used.kind == kind).count();
        used < limit && self.slots.iter().any(Option::is_none)
    }

    /// Takes a slot for a container. A disk that another one has is shared with it, so that both see what either
    /// writes; `None` when all slots are in use.
    pub fn take(&mut self, container: &str, disk: &Opened) -> Option<DiskSlot> {
        let shared = self.find(disk);
        let number = shared.or_else(|| self.slots.iter().position(Option::is_none))?;
        let slot = u8::try_from(number).ok()?;
        let used = self.slots.get_mut(number)?.get_or_insert(Use {
            identity: disk.identity(),
            read_only: disk.read_only(),
            kind: disk.kind(),
            volatile: disk.is_volatile(),
            users: 0,
            busy: false,
        });
        used.users += 1;
        used.busy = false;
        self.taken.entry(container.to_owned()).or_default().push(slot);
        Some(DiskSlot { slot, shared: shared.is_some() })
    }

    /// Whether another container has the disk in a slot.
    pub fn have(&self, disk: &Opened) -> bool {
        self.find(disk).is_some()
    }

    fn find(&self, disk: &Opened) -> Option<usize> {
        // What nobody uses is being taken away, if the guest has not refused to.
        let fits = |used: &Use| {
            (used.users > 0 || used.busy)
                && used.identity == disk.identity()
                && (disk.read_only() || !used.read_only)
        };
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(fits))
    }

    /// The guest has not released a disk.
    pub fn is_busy(&mut self, slot: u8) {
        if let Some(Some(used)) = self.slots.get_mut(usize::from(slot)) {
            used.busy = true;
        }
    }

    /// The slots of disks that nobody uses and that the guest has not released, and whether these are volatile. Nobody gets
    /// one until it is free or busy again.
    pub fn leave_busy(&mut self) -> Vec<(u8, bool)> {
        let all = (0..).zip(&mut self.slots);
        let busy = all.filter_map(|(slot, used)| Some((slot, used.as_mut().filter(|used| used.busy)?)));
        busy.map(|(slot, used)| {
            used.busy = false;
            (slot, used.volatile)
        })
        .collect()
    }

    /// A container does not get a disk after all. Whether nobody has it then.
    pub fn give_back(&mut self, container: &str, slot: u8) -> bool {
        if let Some(slots) = self.taken.get_mut(container)
            && let Some(at) = slots.iter().rposition(|taken| *taken == slot)
        {
            slots.remove(at);
        }
        let Some(Some(used)) = self.slots.get_mut(usize::from(slot)) else { return false };
        used.users = used.users.saturating_sub(1);
        used.users == 0
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

    /// Whether a container has a disk that is of use to others later.
    pub fn any_lasts(&self, container: &str) -> bool {
        let used = |slot: &u8| self.slots.get(usize::from(*slot)).and_then(Option::as_ref);
        let slots = self.taken.get(container).into_iter().flatten();
        slots.filter_map(used).any(|used| !used.volatile)
    }
}
