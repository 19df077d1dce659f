//! Patience with a host that is full. A guest's file system takes a write that fails for the end: it is read-only from
//! then on. The host may have room again a moment later, when pods were evicted or images removed. So a request that
//! finds no room waits for it, and its disk with it, but not for ever.

use std::io;
use std::time::{Duration, Instant};

use super::slot::{Slot, name};

/// From one try to the next.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one request waits in all.
const LONGEST: Duration = Duration::from_secs(5 * 60);

/// Of one disk.
pub struct Patience {
    longest: Duration,
    /// When the request that is under way first found no room.
    since: Option<Instant>,
    /// When a request last gave up. For as long as it waited, those behind it do not: the queue may be full of them.
    gave_up: Option<Instant>,
    /// How many requests have waited. So that no guest floods the log, it has the first, second, fourth, eighth ... of
    /// them.
    waits: u64,
}

impl Patience {
    /// That nothing has tried yet.
    pub fn new() -> Self {
        Self { longest: LONGEST, since: None, gave_up: None, waits: 0 }
    }

    /// A part of a request, which is tried until the host has room for it.
    ///
    /// # Errors
    /// What it says itself; that there is no room only if that lasts, or if the disk is not wanted any more.
    pub fn write<T>(&mut self, slot: &Slot<'_>, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match attempt() {
                Err(error) if no_room(&error) && self.wait(slot, &error) => {}
                done => return done,
            }
        }
    }

    /// The request has ended, well or not.
    pub fn end(&mut self, slot: &Slot<'_>, well: bool) {
        if let (Some(since), true) = (self.since.take(), well && self.is_logged()) {
            log::info!("blk: {}: goes on after {} s", name(slot.serial), since.elapsed().as_secs());
        }
    }

    /// Waits a little; whether to try again.
    fn wait(&mut self, slot: &Slot<'_>, why: &io::Error) -> bool {
        let now = Instant::now();
        if self.gave_up.is_some_and(|then| now.duration_since(then) < self.longest) {
            return false;
        }
        let waited = now.duration_since(self.since.unwrap_or_else(|| self.begin(now, slot, why)));
        let left = self.longest.saturating_sub(waited);
        if left.is_zero() {
            self.gave_up = Some(now);
            // Not often, since others do not wait then.
            log::warn!("blk: {}: no room after {} s: writes fail", name(slot.serial), waited.as_secs());
            return false;
        }
        (slot.pause)(PAUSE.min(left))
    }

    fn begin(&mut self, now: Instant, slot: &Slot<'_>, why: &io::Error) -> Instant {
        self.since = Some(now);
        self.waits = self.waits.saturating_add(1);
        if self.is_logged() {
            log::warn!("blk: {}: wait {} for room on the host: {why}", name(slot.serial), self.waits);
        }
        now
    }

    fn is_logged(&self) -> bool {
        self.waits.is_power_of_two()
    }
}

fn no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests;
