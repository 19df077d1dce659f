//! Data between the guest's memory and files of the host.

use std::fs::File;
use std::io;

use virtiofsd::descriptor_utils::Reader;
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

/// What a guest writes.
///
/// The library's own loses count: when a second round fails, because the first has filled the disk, that error is all
/// that the guest hears. A write that has written something says how much, as write(2) does, and the next one fails.
///
/// There is no such thing for reads: to the guest, a short one is the end of the file (`fuse_short_read` in
/// fs/fuse/file.c), where there was an error after it.
pub struct Written<'a>(pub Reader<'a>);

impl ZeroCopyReader for Written<'_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let mut written = 0;
        while written < count {
            let left = count - written;
            match self.0.write_to_file_at(file, left, offset.saturating_add(written as u64), flags) {
                Ok(0) => break,
                // It takes whole buffers, of which the caller has seen to it that they hold no more.
                Ok(more) => written += more.min(left),
                Err(error) if written == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(written)
    }
}

/// Instead of reading, has a look at the file behind a handle, which the library keeps to itself.
pub struct Look<F, T> {
    look: Option<F>,
    seen: Option<io::Result<T>>,
}

impl<F: FnOnce(&File) -> io::Result<T>, T> Look<F, T> {
    pub fn new(look: F) -> Self {
        Self { look: Some(look), seen: None }
    }

    /// What came of it, if there was a file.
    pub fn seen(self) -> io::Result<T> {
        self.seen.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EBADF)))
    }
}

impl<F: FnOnce(&File) -> io::Result<T>, T> ZeroCopyWriter for Look<F, T> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        self.seen = self.look.take().map(|look| look(file));
        Ok(0)
    }
}
