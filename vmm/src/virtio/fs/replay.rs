//! Changes that the host made, made known to the guest's own inotify.
//!
//! FUSE has no message that says "this has changed", so watchers in a guest never hear of what the host does. But they
//! hear what a process of the guest does: the agent does again what the host has done, as far as the guest's kernel can
//! see, and this layer above the host's files sees to it that nothing happens on the host. All requests of the group
//! [`REPLAY_GID`] are such replays. A container that takes on this group deceives nobody but its own machine: it can
//! look up what it could look up anyway, and all else it asks for is answered and not done.
//!
//! For the guest's kernel to do its part, a replay must find things as they were before: a name that was removed must
//! be there to be removed, with the inode that somebody may watch, and one that came must not be there yet. So what
//! watched directories hold is remembered ([`InodeTable`]) from one replay to the next.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::{REPLAY_GID, REPLAY_LEARN, REPLAY_SOURCE};
use virtiofsd::filesystem::{
    Context, DirectoryIterator, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, SetattrIn};

use super::host::Host;
use super::inode_table::{InodeTable, Name, References};
use super::shown::{MOVED, SOURCE, before, entry, made_up};
use super::{Handle, Inode};

/// What a replay opens to write, and never writes to.
const UNWRITTEN: Handle = u64::MAX;
/// Directories with more names are not remembered.
const MOST_NAMES: usize = 1024;
/// For the entries of a directory, read at once.
const DIRECTORY_BUFFER: u32 = 32 << 10;

/// The file server with this layer above it.
#[derive(Clone)]
pub struct Replaying {
    inner: Arc<Host>,
    inodes: Arc<InodeTable>,
}

/// Whether a request is a replay.
pub fn is_one(ctx: &Context) -> bool {
    ctx.gid == REPLAY_GID.into()
}

/// The attributes that are reported of an inode if they are not simply those on the host, and for how long.
pub fn attributes(host: &Host, ctx: Context, inode: Inode) -> Option<io::Result<(Attr, Duration)>> {
    if let Some(attr) = made_up(inode) {
        return Some(Ok((attr, Duration::ZERO)));
    }
    is_one(&ctx).then(|| host.getattr(ctx, inode, None).map(|(attr, _)| (before(attr), Duration::ZERO)))
}

fn refused<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EPERM))
}

fn error<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

impl Replaying {
    pub fn new(inner: Arc<Host>) -> Self {
        Self { inner, inodes: Arc::default() }
    }

    fn drop_references(&self, ctx: Context, references: Vec<References>) {
        self.inner.batch_forget(ctx, references);
    }

    /// Looks up what a replay looks for: what was there before it.
    fn look_back(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        let made = match parent {
            SOURCE.. => Some(MOVED),
            _ if name.to_bytes() == REPLAY_SOURCE.as_bytes() => Some(SOURCE | parent),
            _ => None,
        };
        if let Some((inode, attr)) = made.and_then(|inode| Some((inode, made_up(inode)?))) {
            return Ok(entry(inode, attr));
        }
        match self.inodes.find(parent, name) {
            Name::Unknown => self.inner.lookup(ctx, parent, name),
            Name::Absent => error(libc::ENOENT),
            Name::Inode(inode) => {
                let (attr, _) = self.inner.getattr(ctx, inode, None)?;
                self.inodes.owe(inode);
                Ok(entry(inode, before(attr)))
            }
        }
    }

    /// Remembers what a name is now; an error if it is nothing.
    fn update(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        let now = self.inner.lookup(ctx, parent, name)?.inode;
        self.drop_references(ctx, self.inodes.set(parent, name, Some(now)));
        Ok(())
    }

    /// Answers the making of a file or directory with the one that the host has made.
    fn appear(&self, ctx: Context, parent: Inode, name: &CStr, kind: u32) -> io::Result<Entry> {
        let found = self.inner.lookup(ctx, parent, name)?;
        if found.attr.mode & libc::S_IFMT != kind {
            self.inner.forget(ctx, found.inode, 1);
            return error(libc::EEXIST);
        }
        self.update(ctx, parent, name)?;
        Ok(found)
    }

    fn vanish(&self, ctx: Context, parent: Inode, name: &CStr) {
        let references = self.inodes.set(parent, name, None);
        self.drop_references(ctx, references);
    }

    /// Remembers what a directory holds.
    fn learn(&self, ctx: Context, directory: Inode) -> io::Result<()> {
        let mut found = HashMap::new();
        for name in self.names(ctx, directory)? {
            // What is gone meanwhile will be reported.
            if let Ok(entry) = self.inner.lookup(ctx, directory, &name) {
                found.insert(name, entry.inode);
            }
        }
        let references = self.inodes.learn(directory, found);
        self.drop_references(ctx, references);
        Ok(())
    }

    fn names(&self, ctx: Context, directory: Inode) -> io::Result<Vec<CString>> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let (handle, _) = self.inner.opendir(ctx, directory, flags.cast_unsigned())?;
        let Some(handle) = handle else { return error(libc::EBADF) };
        let names = self.names_of(ctx, directory, handle);
        self.inner.releasedir(ctx, directory, 0, handle)?;
        names
    }

    fn names_of(&self, ctx: Context, directory: Inode, handle: Handle) -> io::Result<Vec<CString>> {
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let before = offset;
            let mut entries = self.inner.readdir(ctx, directory, handle, DIRECTORY_BUFFER, offset)?;
            while let Some(entry) = entries.next() {
                offset = entry.offset;
                if entry.name != c"." && entry.name != c".." {
                    names.push(entry.name.to_owned());
                }
            }
            if names.len() > MOST_NAMES || !self.inodes.has_room(names.len()) {
                return error(libc::E2BIG);
            }
            if offset == before {
                return Ok(names);
            }
        }
    }
}

/// What replays ask for is answered here; all else is the host's.
impl FileSystem for Replaying {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <Host as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.inner.init(capable)
    }

    fn destroy(&self) {
        self.inodes.clear();
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        if is_one(&ctx) { self.look_back(ctx, parent, name) } else { self.inner.lookup(ctx, parent, name) }
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        let (inode, count) = self.inodes.forget(inode, count);
        self.inner.forget(ctx, inode, count);
        // What is in a directory is remembered for as long as the guest knows the directory.
        if self.inodes.has(inode) && self.inner.getattr(ctx, inode, None).is_err() {
            self.drop_references(ctx, self.inodes.forsake(inode));
        }
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Inode, u64)>) {
        requests.into_iter().for_each(|(inode, count)| self.forget(ctx, inode, count));
    }

    fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)> {
        attributes(&self.inner, ctx, inode).unwrap_or_else(|| self.inner.getattr(ctx, inode, handle))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if is_one(&ctx) {
            return self.inner.getattr(ctx, inode, None);
        }
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        if is_one(&ctx) { refused() } else { self.inner.symlink(ctx, linkname, parent, name, extensions) }
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        if is_one(&ctx) {
            return self.appear(ctx, parent, name, libc::S_IFREG);
        }
        self.inner.mknod(ctx, parent, name, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        if is_one(&ctx) {
            return self.appear(ctx, parent, name, libc::S_IFDIR);
        }
        self.inner.mkdir(ctx, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        if is_one(&ctx) {
            self.vanish(ctx, parent, name);
            return Ok(());
        }
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        if is_one(&ctx) {
            self.vanish(ctx, parent, name);
            return Ok(());
        }
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: Inode,
        oldname: &CStr,
        newdir: Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        if !is_one(&ctx) {
            return self.inner.rename(ctx, olddir, oldname, newdir, newname, flags);
        }
        if olddir & SOURCE == 0 || flags != 0 {
            return refused();
        }
        // What is gone again did not come.
        self.update(ctx, newdir, newname)
    }

    fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        if is_one(&ctx) { refused() } else { self.inner.link(ctx, inode, newparent, newname) }
    }

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        if is_one(&ctx) {
            // Without FOPEN_KEEP_CACHE: the guest drops the old contents.
            return Ok((Some(UNWRITTEN), OpenOptions::empty()));
        }
        self.inner.open(ctx, inode, kill_priv, flags)
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        if is_one(&ctx) {
            return refused();
        }
        self.inner.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        if is_one(&ctx) {
            return refused();
        }
        let inner = &self.inner;
        inner.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        if handle == UNWRITTEN { Ok(()) } else { self.inner.flush(ctx, inode, handle, lock_owner) }
    }

    fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if is_one(&ctx) {
            return refused();
        }
        self.inner.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        if handle == UNWRITTEN {
            return Ok(());
        }
        self.inner.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Inode) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        if is_one(&ctx) {
            return refused();
        }
        self.inner.setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let learn = name.to_bytes().strip_prefix(REPLAY_LEARN.as_bytes()).filter(|_| is_one(&ctx));
        if let Some(which) = learn {
            match CString::new(which)? {
                all if all.is_empty() => self.learn(ctx, inode)?,
                one => self.update(ctx, inode, &one)?,
            }
            return Ok(GetxattrReply::Count(0));
        }
        self.inner.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        if is_one(&ctx) { refused() } else { self.inner.removexattr(ctx, inode, name) }
    }

    fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.inner.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.inner.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Inode,
        handle_in: Handle,
        offset_in: u64,
        inode_out: Inode,
        handle_out: Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        if is_one(&ctx) {
            return refused();
        }
        let inner = &self.inner;
        inner
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        self.inner.syncfs(ctx, inode)
    }
}
