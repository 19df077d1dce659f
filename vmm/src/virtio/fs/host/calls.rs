//! Each call of the guest: for files without a name, those that the library does differently, and the library's own.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, SetattrIn};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::credentials::drop_effective_cap;

use super::super::unnamed::{self, checked};
use super::super::{CACHE_TIME, acl, checks};
use super::{Handle, Host, Inode, error, is};

/// How often it is tried to make or open a file that comes and goes.
const CREATE_ATTEMPTS: usize = 10;

impl FileSystem for Host {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Without it, inode numbers collide. The library continues, and says so on standard error each time, past the
        // log and its limits.
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return error(libc::EPROTO);
        }
        self.inner.init(capable)
    }

    fn destroy(&self) {
        self.unnamed.clear();
        self.cache.clear();
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        checks::name(name)?;
        match self.inner.lookup(ctx, parent, name) {
            Err(failed) if is(&failed, libc::ENOENT) => self.cache.nothing(parent).ok_or(failed),
            found => Ok(self.cache.answer(parent, name.to_bytes(), found?)),
        }
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        if !self.forgot_unnamed(inode, count) {
            self.inner.forget(ctx, inode, count);
        }
    }

    fn batch_forget(&self, ctx: Context, mut requests: Vec<(Inode, u64)>) {
        requests.retain(|(inode, count)| !self.forgot_unnamed(*inode, *count));
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)> {
        match self.unnamed.file(inode) {
            Some(file) => Ok((unnamed::attributes(&file)?, CACHE_TIME)),
            None => {
                let (attr, _) = self.inner.getattr(ctx, inode, handle)?;
                Ok((attr, self.cache.attributes(inode)))
            }
        }
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if valid.contains(SetattrValid::SIZE) {
            checks::range(attr.size, 0)?;
        }
        let Some(file) = self.unnamed.file(inode) else {
            let (attr, _) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
            return Ok((attr, self.cache.attributes(inode)));
        };
        let opened = handle.map_or(Ok(None), |handle| self.unnamed.opened(inode, handle))?;
        let drop = valid.contains(SetattrValid::KILL_SUIDGID);
        let _dropped = drop.then(|| drop_effective_cap("FSETID")).transpose()?;
        unnamed::set_attributes(opened.as_ref().unwrap_or(&file), &attr, valid)?;
        Ok((unnamed::attributes(&file)?, CACHE_TIME))
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
        checks::name(name)?;
        let made = self.make_in(ctx, parent, extensions, |extensions| {
            self.inner.symlink(ctx, linkname, parent, name, extensions)
        });
        Ok(self.cache.answer(parent, name.to_bytes(), made?))
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
        checks::name(name)?;
        let made = self.make_in(ctx, parent, extensions, |extensions| {
            self.inner.mknod(ctx, parent, name, mode, rdev, umask, extensions)
        });
        Ok(self.cache.answer(parent, name.to_bytes(), made?))
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
        checks::name(name)?;
        let made = self.make_in(ctx, parent, extensions, |extensions| {
            self.inner.mkdir(ctx, parent, name, mode, umask, extensions)
        });
        Ok(self.cache.answer(parent, name.to_bytes(), made?))
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        checks::name(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        checks::name(name)?;
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
        checks::name(oldname)?;
        checks::name(newname)?;
        self.inner.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: Context, inode: Inode, newparent: Inode, newname: &CStr) -> io::Result<Entry> {
        checks::name(newname)?;
        let Some(file) = self.unnamed.file(inode) else {
            let linked = self.inner.link(ctx, inode, newparent, newname)?;
            return Ok(self.cache.answer(newparent, newname.to_bytes(), linked));
        };
        self.cache.name(inode, unnamed::attributes(&file)?.ino);
        self.with_opened(ctx, newparent, libc::O_RDONLY | libc::O_DIRECTORY, |directory| {
            self.unnamed.link(&file, directory, newname)
        })?;
        self.inner.lookup(ctx, newparent, newname)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let flags = checks::open_flags(flags);
        if unnamed::is_one(inode) {
            let handle = self.unnamed.open(inode, flags.cast_signed())?;
            return Ok((Some(handle), OpenOptions::empty()));
        }
        let quiet = libc::O_NOATIME.cast_unsigned();
        let (handle, mut options) = match self.inner.open(ctx, inode, kill_priv, flags) {
            // The guest's kernel has seen to it that its user may. Here, the owner may be nobody on the host.
            Err(error) if flags & quiet != 0 && is(&error, libc::EPERM) => {
                self.inner.open(ctx, inode, kill_priv, flags & !quiet)?
            }
            opened => opened?,
        };
        if let Some(handle) = handle {
            options |= self.open_options(ctx, inode, handle, flags);
        }
        Ok((handle, options))
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
        checks::name(name)?;
        let flags = checks::create_flags(flags);
        let exclusive = libc::O_EXCL.cast_unsigned();
        let mut result = error(libc::ESTALE);
        for _ in 0..CREATE_ATTEMPTS {
            result = self.make_in(ctx, parent, extensions.clone(), |extensions| {
                self.inner.create(ctx, parent, name, mode, kill_priv, flags | exclusive, umask, extensions)
            });
            if flags & exclusive == 0 && result.as_ref().is_err_and(|error| is(error, libc::EEXIST)) {
                result = self.open_made_meanwhile(ctx, parent, name, kill_priv, flags);
            }
            // Gone again, before the library could look it up: whoever uses a file as a lock does that all the time.
            if !result.as_ref().is_err_and(|error| is(error, libc::ENOENT)) {
                break;
            }
        }
        let (entry, handle, mut options) = result?;
        let entry = self.cache.answer(parent, name.to_bytes(), entry);
        options.set(OpenOptions::NOFLUSH, self.cache.is_own(entry.inode));
        Ok((entry, handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        checks::transfer(offset, size)?;
        match self.unnamed.opened(inode, handle)? {
            Some(file) => w.read_from_file_at(&file, size as usize, offset, None),
            None => self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags),
        }
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        checks::transfer(offset, size)?;
        let Some(file) = self.unnamed.opened(inode, handle)? else {
            let inner = &self.inner;
            return inner.write(
                ctx,
                inode,
                handle,
                r,
                size,
                offset,
                lock_owner,
                delayed_write,
                kill_priv,
                flags,
            );
        };
        let _dropped = kill_priv.then(|| drop_effective_cap("FSETID")).transpose()?;
        let append = !delayed_write && flags.cast_signed() & libc::O_APPEND != 0;
        r.write_to_file_at(&file, size as usize, offset, append.then_some(WritevFlags::RWF_APPEND))
    }

    fn flush(&self, ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        match self.unnamed.opened(inode, handle)? {
            // A close that is not the last one: there is no call that reports it to the host.
            Some(_) => Ok(()),
            None => self.inner.flush(ctx, inode, handle, lock_owner),
        }
    }

    fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        match self.unnamed.opened(inode, handle)? {
            Some(file) if datasync => file.sync_data(),
            Some(file) => file.sync_all(),
            None => self.inner.fsync(ctx, inode, datasync, handle),
        }
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
        checks::allocation(mode, offset, length)?;
        let Some(file) = self.unnamed.opened(inode, handle)? else {
            return self.inner.fallocate(ctx, inode, handle, mode, offset, length);
        };
        let (fd, mode) = (file.as_raw_fd(), mode.cast_signed());
        // SAFETY: the call takes integers.
        checked(unsafe { libc::fallocate64(fd, mode, offset.cast_signed(), length.cast_signed()) }).map(drop)
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
        if self.unnamed.opened(inode, handle)?.is_some() {
            self.unnamed.release(handle);
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
        mut extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        checks::attribute(value, flags)?;
        if let Some(file) = self.unnamed.file(inode) {
            return unnamed::set_attribute(&file, name, value, flags.cast_signed());
        }
        // The library would do it before, and also if there is no ACL to set.
        let kill = extra_flags.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) && name == acl::ACCESS;
        extra_flags.remove(SetxattrFlags::SETXATTR_ACL_KILL_SGID);
        self.inner.setxattr(ctx, inode, name, value, flags, extra_flags)?;
        if kill { self.clear_set_group_id(ctx, inode) } else { Ok(()) }
    }

    fn getxattr(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let size = checks::attribute_room(size);
        let found = match self.unnamed.file(inode) {
            Some(file) => unnamed::attribute(&file, name, size),
            None if acl::is_one(name) => return self.get_acl(ctx, inode, name, size),
            None => return self.inner.getxattr(ctx, inode, name, size),
        };
        if acl::is_one(name) { acl::answer(found) } else { found }
    }

    fn listxattr(&self, ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        let size = checks::attribute_room(size);
        match self.unnamed.file(inode) {
            Some(file) => unnamed::list_attributes(&file, size),
            None => self.inner.listxattr(ctx, inode, size),
        }
    }

    fn removexattr(&self, ctx: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        match self.unnamed.file(inode) {
            Some(file) => unnamed::remove_attribute(&file, name),
            None => self.inner.removexattr(ctx, inode, name),
        }
    }

    fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        let flags = checks::open_flags(flags);
        let (handle, mut options) = self.inner.opendir(ctx, inode, flags)?;
        options.set(OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE, self.cache.is_own(inode));
        Ok((handle, options))
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
        checks::seek(offset, whence)?;
        let Some(file) = self.unnamed.opened(inode, handle)? else {
            return self.inner.lseek(ctx, inode, handle, offset, whence);
        };
        // SAFETY: the call takes integers.
        let result = unsafe { libc::lseek64(file.as_raw_fd(), offset.cast_signed(), whence.cast_signed()) };
        u64::try_from(result).map_err(|_| io::Error::last_os_error())
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
        let len = checks::copy(offset_in, offset_out, len, flags)?;
        if unnamed::is_one(handle_in) || unnamed::is_one(handle_out) {
            // The guest's kernel then reads and writes.
            return error(libc::EXDEV);
        }
        let inner = &self.inner;
        inner
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        self.inner.syncfs(ctx, inode)
    }
}
