//! The host's files as the guest is to see them: the library's file system, and what it does differently from a process
//! of the host or not at all.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, OpenOptions, SetattrValid,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::soft_idmap::Id;

use super::cache::{Cache, Version};
use super::transfer::Look;
use super::unnamed::{Unnamed, checked};
use super::{Handle, Inode, acl, inode_flags};

mod calls;

/// When a file was made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Birth {
    pub seconds: i64,
    pub nanoseconds: u32,
}

impl Birth {
    /// If its file system knows.
    fn of(file: &File) -> io::Result<Option<Self>> {
        let mut status = MaybeUninit::uninit();
        let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_BTIME);
        // SAFETY: the string is a constant, and the kernel fills in the structure or fails.
        checked(unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, status.as_mut_ptr()) })?;
        // SAFETY: it did not fail.
        let status: libc::statx = unsafe { status.assume_init() };
        let libc::statx_timestamp { tv_sec: seconds, tv_nsec: nanoseconds, .. } = status.stx_btime;
        Ok((status.stx_mask & libc::STATX_BTIME != 0).then_some(Self { seconds, nanoseconds }))
    }
}

/// The file server below what is answered to replays.
pub struct Host {
    inner: PassthroughFs,
    unnamed: Unnamed,
    cache: Cache,
}

fn is(error: &io::Error, number: i32) -> bool {
    error.raw_os_error() == Some(number)
}

fn error<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

impl Host {
    /// `proc_self_fd` is a copy of what the library has.
    pub fn new(inner: PassthroughFs, proc_self_fd: File) -> Self {
        Self { inner, unnamed: Unnamed::new(proc_self_fd), cache: Cache::default() }
    }

    /// Does something with the file behind a handle.
    pub fn with_file<T>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        work: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        if let Some(file) = self.unnamed.opened(inode, handle)? {
            return work(&file);
        }
        let mut look = Look::new(work);
        self.inner.read(ctx, inode, handle, &mut look, 0, 0, None, 0)?;
        look.seen()
    }

    /// Opens a file or directory for something, which fails with what is neither.
    fn with_opened<T>(
        &self,
        ctx: Context,
        inode: Inode,
        flags: i32,
        work: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let (handle, _) = self.inner.open(ctx, inode, false, flags.cast_unsigned())?;
        let Some(handle) = handle else { return error(libc::EBADF) };
        let result = self.with_file(ctx, inode, handle, work);
        self.inner.release(ctx, inode, 0, handle, false, false, None)?;
        result
    }

    /// What statx(2) says, with the time of birth where it can be read through the library's handles: not of links and
    /// special files, which it does not open.
    pub fn statx(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Option<Handle>,
    ) -> io::Result<(Attr, Option<Birth>)> {
        let (attr, _) = self.getattr(ctx, inode, handle)?;
        let kind = attr.mode & libc::S_IFMT;
        let birth = if let Some(handle) = handle {
            self.with_file(ctx, inode, handle, Birth::of)
        } else if let Some(file) = self.unnamed.file(inode) {
            Birth::of(&file)
        } else if kind == libc::S_IFREG || kind == libc::S_IFDIR {
            // A lease on the file is for others to wait for.
            self.with_opened(ctx, inode, libc::O_RDONLY | libc::O_NONBLOCK, Birth::of)
        } else {
            Ok(None)
        };
        Ok((attr, birth.unwrap_or(None)))
    }

    /// How long the guest may keep an inode's attributes.
    pub fn attributes_hold(&self, inode: Inode) -> Duration {
        self.cache.attributes(inode)
    }

    /// The guest gives references back; whether the inode is one without a name.
    fn forgot_unnamed(&self, inode: Inode, count: u64) -> bool {
        let unnamed = self.unnamed.forget(inode, count);
        if self.unnamed.file(inode).is_none() {
            self.cache.forget(inode);
        }
        unnamed
    }

    /// What an open answers besides the handle.
    fn open_options(&self, ctx: Context, inode: Inode, handle: Handle, flags: u32) -> OpenOptions {
        let version = || self.with_file(ctx, inode, handle, Version::of).unwrap_or(None);
        let mut options = OpenOptions::empty();
        options.set(OpenOptions::KEEP_CACHE, self.cache.keeps_pages(inode, version));
        let reads = flags.cast_signed() & libc::O_ACCMODE == libc::O_RDONLY;
        options.set(OpenOptions::NOFLUSH, reads || self.cache.is_own(inode));
        options
    }

    /// Reads or changes an inode's flags: `chattr` and `lsattr`.
    pub fn inode_flags(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        request: inode_flags::Request,
    ) -> io::Result<Vec<u8>> {
        self.with_file(ctx, inode, handle, |file| request.make(file.as_fd()))
    }

    /// Makes a file without a name in a directory.
    pub fn make_unnamed(
        &self,
        ctx: Context,
        directory: Inode,
        flags: u32,
        mode: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle)> {
        let flags = flags.cast_signed();
        self.with_opened(ctx, directory, libc::O_RDONLY | libc::O_DIRECTORY, |directory| {
            self.unnamed.make(&ctx, directory, flags, mode, umask)
        })
    }

    /// Makes something in a directory, as a member of the groups that the directory's ACL names if it takes that.
    fn make_in<T>(
        &self,
        ctx: Context,
        directory: Inode,
        mut extensions: Extensions,
        make: impl Fn(Extensions) -> io::Result<T>,
    ) -> io::Result<T> {
        if ctx.uid.is_root() {
            if ctx.gid.is_root() {
                // It needs none, and the library's thread would keep them for what it does next.
                extensions.sup_gids.clear();
            }
            return make(extensions);
        }
        let made = make(extensions.clone());
        if !made.as_ref().is_err_and(|error| is(error, libc::EACCES)) {
            return made;
        }
        let Ok(GetxattrReply::Value(value)) =
            self.inner.getxattr(ctx, directory, acl::ACCESS, acl::MOST_BYTES)
        else {
            return made;
        };
        let groups = acl::groups_that_make(&value);
        if groups.is_empty() {
            return made;
        }
        extensions.sup_gids.extend(groups);
        make(extensions)
    }

    /// Opens what was not there when the guest looked, but is now that it creates it.
    ///
    /// To the guest's kernel this is a file of its user's making, for which it asks about no rights. So it has to be
    /// the user's. If it is not, the guest looks again (`do_filp_open` in fs/namei.c) and decides.
    fn open_made_meanwhile(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        let found = self.inner.lookup(ctx, parent, name)?;
        let flags = flags.cast_signed() & !libc::O_CREAT;
        let access = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => libc::S_IRUSR,
            libc::O_WRONLY => libc::S_IWUSR,
            _ => libc::S_IRUSR | libc::S_IWUSR,
        };
        let access = if flags & libc::O_TRUNC == 0 { access } else { access | libc::S_IWUSR };
        let Attr { mode, uid, .. } = found.attr;
        let own = mode & libc::S_IFMT == libc::S_IFREG && uid == ctx.uid && mode & access == access;
        let opened = if own {
            self.inner.open(ctx, found.inode, kill_priv, flags.cast_unsigned())
        } else {
            error(libc::ESTALE)
        };
        match opened {
            Ok((handle, options)) => Ok((found, handle, options)),
            Err(error) => {
                self.inner.forget(ctx, found.inode, 1);
                Err(error)
            }
        }
    }

    fn get_acl(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut found = self.inner.getxattr(ctx, inode, name, size);
        if found.as_ref().is_err_and(|error| is(error, libc::EAGAIN)) {
            // Somebody has a lease on the file and is being asked for it.
            found =
                self.with_opened(ctx, inode, libc::O_RDONLY, |_| self.inner.getxattr(ctx, inode, name, size));
        }
        acl::answer(found)
    }

    /// Takes away set-group-ID after a new ACL, from one who is not in the group.
    fn clear_set_group_id(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        let (Attr { mode, .. }, _) = self.inner.getattr(ctx, inode, None)?;
        if mode & libc::S_ISGID != 0 {
            let attr = SetattrIn { mode: mode & 0o7777 & !libc::S_ISGID, ..SetattrIn::default() };
            self.inner.setattr(ctx, inode, attr, None, SetattrValid::MODE)?;
        }
        Ok(())
    }
}
