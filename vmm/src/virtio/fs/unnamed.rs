//! Files without a name: `O_TMPFILE` of open(2), which the library does not know.
//!
//! It knows an inode by a name that it has looked up, so these are kept here until the guest has forgotten them. One
//! that is given a name is then the library's as well, as another inode; to the guest, what it writes into the one is
//! to the other what the host has written.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex};

use virtiofsd::filesystem::{Context, Entry, GetxattrReply, ListxattrReply, SetattrValid};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::ScopedUmask;
use virtiofsd::soft_idmap::Id;

use super::CACHE_TIME;
use super::{Handle, Inode};
use crate::sync::lock;

/// Numbers of inodes and handles from here on are of such files; the library's count up from 0, and those of
/// `replay.rs` are at the top.
const FIRST: u64 = 1 << 62;
const BEHIND: u64 = FIRST + (1 << 61);
/// Descriptors for them, out of those that the guest's files leave to the rest of the process.
const MOST: usize = 1024;
/// What the guest may choose about an open file; O_APPEND comes with each write.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_EXCL
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_TRUNC;

/// The files without a name.
pub struct Unnamed {
    proc_self_fd: File,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: u64,
    files: HashMap<Inode, (Arc<File>, u64)>,
    handles: HashMap<Handle, (Inode, Arc<File>)>,
}

/// Whether a number is of such a file.
pub fn is_one(number: u64) -> bool {
    (FIRST..BEHIND).contains(&number)
}

fn error<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

/// The result of a C function that answers -1 and errno.
pub fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl State {
    fn next(&mut self) -> io::Result<u64> {
        if self.files.len() + self.handles.len() >= MOST {
            return error(libc::ENFILE);
        }
        self.last += 1;
        Ok(FIRST + self.last)
    }

    fn open(&mut self, inode: Inode, file: Arc<File>) -> io::Result<Handle> {
        let handle = self.next()?;
        self.handles.insert(handle, (inode, file));
        Ok(handle)
    }
}

impl Unnamed {
    /// `proc_self_fd` is /proc/self/fd, through which files are opened again and get names.
    pub fn new(proc_self_fd: File) -> Self {
        Self { proc_self_fd, state: Mutex::default() }
    }

    /// The guest is gone.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        state.files.clear();
        state.handles.clear();
    }

    /// The file that an inode is, if it is one of these.
    pub fn file(&self, inode: Inode) -> Option<Arc<File>> {
        let files = &lock(&self.state).files;
        files.get(&inode).map(|(file, _)| Arc::clone(file))
    }

    /// The file behind a handle, if it is of one of these.
    pub fn opened(&self, inode: Inode, handle: Handle) -> io::Result<Option<Arc<File>>> {
        if !is_one(handle) {
            return Ok(None);
        }
        match lock(&self.state).handles.get(&handle) {
            Some((of, file)) if *of == inode => Ok(Some(Arc::clone(file))),
            _ => error(libc::EBADF),
        }
    }

    /// Makes one. The guest's kernel has seen to it that its user may.
    pub fn make(
        &self,
        ctx: &Context,
        directory: &File,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle)> {
        let flags = flags & OPEN_FLAGS | libc::O_TMPFILE | libc::O_CLOEXEC;
        let mode = mode & 0o7777;
        let file = {
            // A default ACL of the directory takes its place.
            let _mask = ScopedUmask::new(umask);
            // SAFETY: the string is a constant.
            checked(unsafe { libc::openat(directory.as_raw_fd(), c".".as_ptr(), flags, mode & 0o777) })?
        };
        // SAFETY: a descriptor that nobody else knows.
        let file = unsafe { File::from_raw_fd(file) };
        let in_group = status(directory)?.st_mode & libc::S_ISGID != 0;
        let group = if in_group { u32::MAX } else { ctx.gid.into_inner() };
        give(&file, ctx.uid.into_inner(), group)?;
        if mode & 0o7000 != 0 {
            // The change of the owner takes them away.
            change_mode(&file, status(&file)?.st_mode & 0o777 | mode & 0o7000)?;
        }
        let (attr, file) = (attributes(&file)?, Arc::new(file));
        let mut state = lock(&self.state);
        let inode = state.next()?;
        let handle = state.open(inode, Arc::clone(&file))?;
        state.files.insert(inode, (file, 1));
        let entry = Entry { inode, generation: 0, attr, attr_timeout: CACHE_TIME, entry_timeout: CACHE_TIME };
        Ok((entry, handle))
    }

    /// Opens one again, as through /proc/self/fd of a process in the guest.
    pub fn open(&self, inode: Inode, flags: i32) -> io::Result<Handle> {
        let Some(file) = self.file(inode) else { return error(libc::EBADF) };
        let name = CString::new(file.as_raw_fd().to_string())?;
        let flags = flags & OPEN_FLAGS & !libc::O_EXCL | libc::O_CLOEXEC;
        // SAFETY: the string lives through the call.
        let file = checked(unsafe { libc::openat(self.proc_self_fd.as_raw_fd(), name.as_ptr(), flags) })?;
        // SAFETY: a descriptor that nobody else knows.
        let file = unsafe { File::from_raw_fd(file) };
        lock(&self.state).open(inode, Arc::new(file))
    }

    /// Gives one a name.
    pub fn link(&self, file: &File, directory: &File, name: &CStr) -> io::Result<()> {
        let number = CString::new(file.as_raw_fd().to_string())?;
        let (proc, directory) = (self.proc_self_fd.as_raw_fd(), directory.as_raw_fd());
        let flags = libc::AT_SYMLINK_FOLLOW;
        // SAFETY: the strings live through the call.
        checked(unsafe { libc::linkat(proc, number.as_ptr(), directory, name.as_ptr(), flags) }).map(drop)
    }

    /// The guest has closed it.
    pub fn release(&self, handle: Handle) {
        lock(&self.state).handles.remove(&handle);
    }

    /// The guest gives back references to an inode; whether it was one of these.
    pub fn forget(&self, inode: Inode, count: u64) -> bool {
        if let Some((_, references)) = lock(&self.state).files.get_mut(&inode) {
            *references = references.saturating_sub(count);
            if *references > 0 {
                return true;
            }
        }
        // Dropped without the lock: the last close of a file may take long.
        let gone = lock(&self.state).files.remove(&inode);
        gone.is_some() || is_one(inode)
    }
}

fn status(file: &File) -> io::Result<libc::stat64> {
    let mut status = MaybeUninit::uninit();
    // SAFETY: the kernel fills in the structure or fails.
    checked(unsafe { libc::fstat64(file.as_raw_fd(), status.as_mut_ptr()) })?;
    // SAFETY: it did not fail.
    Ok(unsafe { status.assume_init() })
}

/// Its attributes, as the library reports those of others.
pub fn attributes(file: &File) -> io::Result<Attr> {
    let same_user = |user: virtiofsd::soft_idmap::HostUid| Ok(user.into_inner().into());
    let same_group = |group: virtiofsd::soft_idmap::HostGid| Ok(group.into_inner().into());
    Attr::try_from_stat64(status(file)?, same_user, same_group)
}

fn give(file: &File, user: u32, group: u32) -> io::Result<()> {
    // SAFETY: the string is a constant.
    checked(unsafe { libc::fchownat(file.as_raw_fd(), c"".as_ptr(), user, group, libc::AT_EMPTY_PATH) })
        .map(drop)
}

fn change_mode(file: &File, mode: u32) -> io::Result<()> {
    // SAFETY: the call takes integers.
    checked(unsafe { libc::fchmod(file.as_raw_fd(), mode) }).map(drop)
}

/// Changes attributes, all that are valid or those before the first that fails.
pub fn set_attributes(file: &File, attr: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
    if valid.contains(SetattrValid::MODE) {
        change_mode(file, attr.mode & 0o7777)?;
    }
    if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
        let chosen = |valid, id| if valid { id } else { u32::MAX };
        let user = chosen(valid.contains(SetattrValid::UID), attr.uid.into_inner());
        let group = chosen(valid.contains(SetattrValid::GID), attr.gid.into_inner());
        give(file, user, group)?;
    }
    if valid.contains(SetattrValid::SIZE) {
        file.set_len(attr.size)?;
    }
    let time = |set, now, seconds: u64, nanoseconds: u32| libc::timespec {
        tv_sec: seconds.cast_signed(),
        tv_nsec: match (valid.contains(set), valid.contains(now)) {
            (false, _) => libc::UTIME_OMIT,
            (true, true) => libc::UTIME_NOW,
            (true, false) => nanoseconds.into(),
        },
    };
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let times = [
            time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.atime, attr.atimensec),
            time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.mtime, attr.mtimensec),
        ];
        // SAFETY: two structures, which live through the call.
        checked(unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) })?;
    }
    Ok(())
}

/// setxattr(2).
pub fn set_attribute(file: &File, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let (fd, data) = (file.as_raw_fd(), value.as_ptr().cast());
    // SAFETY: name and value live through the call, and the length is the value's.
    checked(unsafe { libc::fsetxattr(fd, name.as_ptr(), data, value.len(), flags) }).map(drop)
}

/// getxattr(2).
pub fn attribute(file: &File, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
    let found = fill(size, |buffer| {
        // SAFETY: the name lives through the call, and the buffer has the length that is given.
        unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })?;
    Ok(found.map_or_else(GetxattrReply::Count, GetxattrReply::Value))
}

/// listxattr(2).
pub fn list_attributes(file: &File, size: u32) -> io::Result<ListxattrReply> {
    let found = fill(size, |buffer| {
        // SAFETY: the buffer has the length that is given.
        unsafe { libc::flistxattr(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })?;
    Ok(found.map_or_else(ListxattrReply::Count, ListxattrReply::Names))
}

/// removexattr(2).
pub fn remove_attribute(file: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: the name lives through the call.
    checked(unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// What a call writes into a buffer of that size, or, with none, how much that would be.
fn fill(size: u32, call: impl FnOnce(&mut [u8]) -> isize) -> io::Result<Result<Vec<u8>, u32>> {
    let mut buffer = vec![0; size as usize];
    let length = usize::try_from(call(&mut buffer)).map_err(|_| io::Error::last_os_error())?;
    buffer.truncate(length);
    Ok(if size == 0 { Err(u32::try_from(length).unwrap_or(u32::MAX)) } else { Ok(buffer) })
}
