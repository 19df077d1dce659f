//! What the guest may keep of files without asking the host. In FUSE the server decides: each answer with a name or
//! attributes says for how long they hold, and each open whether the pages stay that the guest has of the file.
//!
//! Two kinds of files are told apart. An *own* file is in a root that nobody but this guest changes ([`OWN_ROOT`]):
//! what the guest knows of it stays right, and so does its knowledge that there is nothing by a name. A *shared* one may
//! be changed by the host at any time: names and attributes hold for [`CACHE_TIME`], and pages stay from one open to
//! the next if the file did not change in between.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use katana_protocol::OWN_ROOT;
use virtiofsd::filesystem::{Entry, ROOT_ID};
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr};

use super::{CACHE_TIME, Inode};
use crate::sync::lock;

/// How long what is known of own files holds.
const OWN_TIME: Duration = Duration::from_secs(24 * 3600);
/// File systems count time in ticks, coarse ones in seconds: only if the last change is longer ago than that, the next
/// one has another time.
const TICK: Duration = Duration::from_secs(2);

/// Inodes of which something is known. It is more than there can be, but a guest that opens what it forgets at the same
/// time leaves some behind.
const MOST: usize = 1 << 20;

/// What is known of the guest's inodes.
#[derive(Default)]
pub struct Cache(Mutex<State>);

#[derive(Default)]
struct State {
    /// The directories of the share's root, in which the roots of containers are.
    tops: HashSet<Inode>,
    inodes: HashMap<Inode, Known>,
    /// Files that were made without a name and have got one, by the inode without: their numbers on the host. By their
    /// names the guest has them as other inodes, which change as if the host changed them.
    twice: HashMap<Inode, u64>,
}

enum Known {
    Own,
    /// As it was when the guest last opened it and let go of older pages.
    Shared(Version),
}

/// What tells two contents of a file apart.
#[derive(PartialEq, Eq)]
pub struct Version {
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Version {
    /// That of a regular file, unless it has changed so recently that the next change could look the same.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let status = file.metadata()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_secs(status.ctime().try_into().unwrap_or(u64::MAX));
        let settled = now.checked_sub(changed).is_some_and(|age| age > TICK);
        Ok((status.is_file() && settled).then(|| Self {
            size: status.size(),
            changed: (status.ctime(), status.ctime_nsec()),
            modified: (status.mtime(), status.mtime_nsec()),
        }))
    }
}

impl State {
    fn is_own(&self, inode: Inode) -> bool {
        matches!(self.inodes.get(&inode), Some(Known::Own))
    }

    /// Whether that is known from now on.
    fn learn(&mut self, inode: Inode, known: Known) -> bool {
        let has_room = self.inodes.len() < MOST || self.inodes.contains_key(&inode);
        if has_room {
            self.inodes.insert(inode, known);
        }
        has_room
    }
}

impl Cache {
    /// The guest is gone.
    pub fn clear(&self) {
        *lock(&self.0) = State::default();
    }

    /// The guest gives references to an inode back, almost always all. If it keeps some, it only asks more often.
    pub fn forget(&self, inode: Inode) {
        let mut state = lock(&self.0);
        state.tops.remove(&inode);
        state.inodes.remove(&inode);
        state.twice.remove(&inode);
    }

    /// Completes the answer with what was found or made in a directory.
    pub fn answer(&self, parent: Inode, name: &[u8], mut entry: Entry) -> Entry {
        let mut state = lock(&self.0);
        if parent == ROOT_ID {
            state.tops.insert(entry.inode);
            return entry;
        }
        let is_root = state.tops.contains(&parent) && name == OWN_ROOT.as_bytes();
        let is_within = state.is_own(parent) && entry.attr.flags & ATTR_SUBMOUNT == 0;
        let is_own = (is_root || is_within) && state.twice.values().all(|number| *number != entry.attr.ino);
        if is_own && state.learn(entry.inode, Known::Own) {
            (entry.attr_timeout, entry.entry_timeout) = (OWN_TIME, OWN_TIME);
        }
        entry
    }

    /// The answer that there is nothing by a name, if that will stay so.
    pub fn nothing(&self, parent: Inode) -> Option<Entry> {
        let attr = Attr::default();
        let entry =
            Entry { inode: 0, generation: 0, attr, attr_timeout: Duration::ZERO, entry_timeout: OWN_TIME };
        lock(&self.0).is_own(parent).then_some(entry)
    }

    /// How long an inode's attributes hold.
    pub fn attributes(&self, inode: Inode) -> Duration {
        if lock(&self.0).is_own(inode) { OWN_TIME } else { CACHE_TIME }
    }

    /// A file without a name gets one; `number` is its inode's on the host.
    pub fn name(&self, unnamed: Inode, number: u64) {
        lock(&self.0).twice.insert(unnamed, number);
    }

    /// Whether the guest's pages of a file stay when it opens the file; `look` finds out its version.
    pub fn keeps_pages(&self, inode: Inode, look: impl FnOnce() -> Option<Version>) -> bool {
        match lock(&self.0).inodes.get(&inode) {
            Some(Known::Own) => return true,
            Some(Known::Shared(_)) | None => {}
        }
        let version = look();
        let mut state = lock(&self.0);
        let Some(version) = version else {
            state.inodes.remove(&inode);
            return false;
        };
        let same = matches!(state.inodes.get(&inode), Some(Known::Shared(before)) if *before == version);
        if !same {
            state.learn(inode, Known::Shared(version));
        }
        same
    }

    /// Whether it is one of the guest's own. Then the guest may also keep what it has read of a directory, and a close
    /// need not write back what was stored to a mapping: nobody waits for it on the host.
    pub fn is_own(&self, inode: Inode) -> bool {
        lock(&self.0).is_own(inode)
    }
}
