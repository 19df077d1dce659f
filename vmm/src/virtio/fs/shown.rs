//! What a replay is shown of inodes: see [`super::replay`].

use std::time::Duration;

use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::Attr;

use super::Inode;

/// With this bit, a directory's number is that of the [`katana_protocol::REPLAY_SOURCE`] in it, which is nowhere on the
/// host. virtiofsd counts its own numbers up from 1.
pub const SOURCE: Inode = 1 << 63;
/// Whatever is looked up in there: an empty file.
pub const MOVED: Inode = SOURCE - 1;

/// An entry that is looked up again at its next use.
pub fn entry(inode: Inode, attr: Attr) -> Entry {
    Entry { inode, generation: 0, attr, attr_timeout: Duration::ZERO, entry_timeout: Duration::ZERO }
}

pub fn made_up(inode: Inode) -> Option<Attr> {
    let mode = match inode {
        SOURCE.. => libc::S_IFDIR | 0o700,
        MOVED => libc::S_IFREG | 0o600,
        _ => return None,
    };
    Some(Attr { ino: inode, mode, nlink: 2, blksize: 4096, ..Attr::default() })
}

/// Each replay that takes a link away takes it from what the guest's kernel believes: one more than there is on the
/// host, where it is gone already. At 0 the kernel notifies those who watch the file itself.
pub fn before(mut attr: Attr) -> Attr {
    attr.nlink = attr.nlink.saturating_add(1);
    attr
}
