//! What a directory held when it was last reported to the guest: names and their inodes, with a reference to each.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::Mutex;

use crate::sync::lock;

/// Names that are remembered, in all directories together. Each may hold a descriptor.
const MOST_NAMES: usize = 8192;
/// Directories that are remembered.
const MOST_DIRECTORIES: usize = 2048;

/// An inode's number and how many references to it there are to drop.
pub type References = (u64, u64);

/// The directories whose contents are remembered.
///
/// It counts references, and leaves it to the caller to drop them: what is remembered has one, and the guest has as
/// many as it got answers.
#[derive(Default)]
pub struct InodeTable(Mutex<State>);

#[derive(Default)]
struct State {
    directories: HashMap<u64, HashMap<CString, u64>>,
    names: usize,
    /// References that the guest believes to have, from answers for which none was taken.
    owed: HashMap<u64, u64>,
}

/// What is known of a name.
#[derive(Debug, PartialEq, Eq)]
pub enum Name {
    /// Nothing: its directory is not remembered.
    Unknown,
    /// It was not there.
    Absent,
    /// It was this inode.
    Inode(u64),
}

impl InodeTable {
    /// Whether so many names more can be remembered.
    pub fn has_room(&self, more: usize) -> bool {
        let state = lock(&self.0);
        state.names + more <= MOST_NAMES && state.directories.len() < MOST_DIRECTORIES
    }

    /// Remembers a whole directory. Takes over the references in `names`; answers those to be dropped.
    #[must_use]
    pub fn learn(&self, directory: u64, names: HashMap<CString, u64>) -> Vec<References> {
        let mut state = lock(&self.0);
        let old = state.take(directory);
        let room = state.names + names.len() <= MOST_NAMES && state.directories.len() < MOST_DIRECTORIES;
        if !room {
            return old
                .into_iter()
                .chain(names.into_values())
                .filter_map(|inode| state.release(inode))
                .collect();
        }
        state.names += names.len();
        state.directories.insert(directory, names);
        old.into_iter().filter_map(|inode| state.release(inode)).collect()
    }

    /// What a name was.
    pub fn find(&self, directory: u64, name: &CStr) -> Name {
        match lock(&self.0).directories.get(&directory) {
            None => Name::Unknown,
            Some(names) => names.get(name).map_or(Name::Absent, |inode| Name::Inode(*inode)),
        }
    }

    /// Remembers what a name is now, `None` if it is gone. Takes over the reference in `inode`; answers those to be
    /// dropped.
    #[must_use]
    pub fn set(&self, directory: u64, name: &CStr, inode: Option<u64>) -> Vec<References> {
        let mut state = lock(&self.0);
        let State { directories, names: count, .. } = &mut *state;
        let Some(names) = directories.get_mut(&directory) else {
            return inode.into_iter().map(|inode| (inode, 1)).collect();
        };
        let old = names.remove(name);
        *count -= usize::from(old.is_some());
        let refused = if *count < MOST_NAMES {
            *count += usize::from(inode.is_some());
            names.extend(inode.map(|inode| (name.to_owned(), inode)));
            None
        } else {
            inode
        };
        [old, refused].into_iter().flatten().filter_map(|inode| state.release(inode)).collect()
    }

    /// The guest is answered an inode without a reference being taken for it.
    pub fn owe(&self, inode: u64) {
        *lock(&self.0).owed.entry(inode).or_default() += 1;
    }

    /// The guest gives references back. Answers how many were taken for it.
    #[must_use]
    pub fn forget(&self, inode: u64, count: u64) -> References {
        (inode, count - lock(&self.0).pay(inode, count))
    }

    /// Whether a directory's contents are remembered.
    pub fn has(&self, directory: u64) -> bool {
        lock(&self.0).directories.contains_key(&directory)
    }

    /// A directory is remembered no more. Answers the references to be dropped.
    #[must_use]
    pub fn forsake(&self, directory: u64) -> Vec<References> {
        let mut state = lock(&self.0);
        let names = state.take(directory);
        names.into_iter().filter_map(|inode| state.release(inode)).collect()
    }

    /// The guest is gone.
    pub fn clear(&self) {
        *lock(&self.0) = State::default();
    }
}

impl State {
    fn take(&mut self, directory: u64) -> Vec<u64> {
        let names = self.directories.remove(&directory).unwrap_or_default();
        self.names -= names.len();
        names.into_values().collect()
    }

    /// A reference is not needed any more. It becomes the guest's if one is owed to it.
    fn release(&mut self, inode: u64) -> Option<References> {
        if self.pay(inode, 1) == 1 { None } else { Some((inode, 1)) }
    }

    /// So many references, or fewer if not so many are owed, are owed no longer. Answers how many.
    fn pay(&mut self, inode: u64, most: u64) -> u64 {
        let Some(owed) = self.owed.get_mut(&inode) else { return 0 };
        let paid = most.min(*owed);
        *owed -= paid;
        if *owed == 0 {
            self.owed.remove(&inode);
        }
        paid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[(&CStr, u64)]) -> HashMap<CString, u64> {
        all.iter().map(|(name, inode)| ((*name).to_owned(), *inode)).collect()
    }

    #[test]
    fn every_reference_is_dropped_once() {
        let table = InodeTable::default();
        assert_eq!(table.find(1, c"a"), Name::Unknown);
        assert_eq!(table.set(1, c"a", Some(5)), [(5, 1)], "the directory is not remembered");
        assert_eq!(table.learn(1, names(&[(c"a", 2), (c"b", 3)])), []);
        assert_eq!(table.find(1, c"a"), Name::Inode(2));
        assert_eq!(table.set(1, c"a", Some(4)), [(2, 1)]);
        assert_eq!(table.set(1, c"a", None), [(4, 1)]);
        assert_eq!(table.find(1, c"a"), Name::Absent);
        assert_eq!(table.learn(1, names(&[])), [(3, 1)]);
        assert_eq!(table.learn(1, names(&[(c"c", 6)])), []);
        assert_eq!(table.forget(1, 7), (1, 7));
        assert!(table.has(1));
        assert_eq!(table.forsake(1), [(6, 1)]);
        assert_eq!(table.find(1, c"c"), Name::Unknown);
        assert_eq!(lock(&table.0).names, 0);
    }

    #[test]
    fn a_reference_that_is_owed_becomes_the_guests() {
        let table = InodeTable::default();
        assert_eq!(table.learn(1, names(&[(c"a", 2)])), []);
        table.owe(2);
        table.owe(2);
        // The one that was remembered is one of the three that the guest will give back.
        assert_eq!(table.set(1, c"a", None), []);
        assert_eq!(table.forget(2, 3), (2, 2));
        assert_eq!(table.learn(1, names(&[(c"a", 2)])), []);
        table.owe(2);
        table.owe(2);
        // Of an answer that it could not use it gives back one at once.
        assert_eq!(table.forget(2, 1), (2, 0));
        // It gives back its own and what was owed, and the remembered one stays.
        assert_eq!(table.forget(2, 2), (2, 1));
        assert_eq!(table.set(1, c"a", None), [(2, 1)]);
    }

    #[test]
    fn there_is_a_limit() {
        let table = InodeTable::default();
        let many =
            |count: usize| (0..count).map(|n| (CString::new(n.to_string()).unwrap(), n as u64)).collect();
        assert!(table.learn(1, many(MOST_NAMES)).is_empty());
        assert_eq!(table.set(1, c"more", Some(9)), [(9, 1)]);
        assert_eq!(table.learn(2, many(1)).len(), 1);
        assert_eq!(table.find(2, c"0"), Name::Unknown);
        assert!(!table.has_room(1) && table.has_room(0));
    }
}
