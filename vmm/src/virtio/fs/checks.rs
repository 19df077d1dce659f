//! What of a request the library passes on to the kernel or computes with, unseen: looked at before.
//!
//! The library has copied all of it out of the guest's memory by now, so it stays what it was found to be. Whatever
//! Linux never sends is refused: only a guest's kernel can make requests (a process in it that opens `/dev/fuse` talks
//! to a server of its own), so this costs no program anything.

use std::ffi::CStr;
use std::io;

/// Most bytes of a request and of its answer: 1 MiB of data, as the library announces it to the guest (`max_write` and
/// `max_pages`), and a page for all that goes before. Descriptors may overlap: without a limit, a chain of the guest's
/// whole memory many times over would be one transfer.
pub const MOST_BYTES: usize = (1 << 20) + 4096;
/// Most bytes that are read or written by one request.
pub const MOST_DATA: u32 = 1 << 20;
/// Most bytes that the host copies between files by one request. The guest asks again for what is left, and can have
/// others served meanwhile.
const MOST_COPIED: u64 = 16 << 20;
/// Bytes of the longest name in a directory.
const LONGEST_NAME: usize = 255;
/// Bytes of the longest extended attribute (linux/limits.h: XATTR_SIZE_MAX and XATTR_LIST_MAX).
const LONGEST_ATTRIBUTE: usize = 65536;
/// What a file is opened with for the guest. The others make files, or a descriptor without access, or are for the
/// process that has it: linux/fuse.h has them taken off by the guest's kernel (`fuse_send_open` in fs/fuse/file.c).
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_TRUNC
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME;
/// `fuse_file_fallocate` in fs/fuse/file.c knows these.
const FALLOCATE_MODES: i32 =
    libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;

fn invalid<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

/// A name in a directory: one component of a path, and neither the directory itself nor the one above it.
///
/// The library hands names to openat(2) and its relatives as they are, where `/` and `..` lead out of the directory.
pub fn name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => invalid(),
        name if name.contains(&b'/') => invalid(),
        name if name.len() > LONGEST_NAME => Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// A part of a file: offsets are signed to the kernel, and the library takes it for granted that they fit.
pub fn range(offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => invalid(),
    }
}

/// A part of a file that is to be read or written.
pub fn transfer(offset: u64, size: u32) -> io::Result<()> {
    if size > MOST_DATA { invalid() } else { range(offset, size.into()) }
}

/// Flags of open(2) and of the opening half of creat(2), without those that are not the guest's to choose.
pub fn open_flags(flags: u32) -> u32 {
    flags & OPEN_FLAGS.cast_unsigned()
}

/// As [`open_flags`], with the one more that has a meaning for what is made.
pub fn create_flags(flags: u32) -> u32 {
    flags & (OPEN_FLAGS | libc::O_CREAT | libc::O_EXCL).cast_unsigned()
}

/// fallocate(2).
pub fn allocation(mode: u32, offset: u64, length: u64) -> io::Result<()> {
    if mode & !FALLOCATE_MODES.cast_unsigned() != 0 {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    range(offset, length)
}

/// lseek(2): the guest's kernel asks for data and holes, and knows its files' positions and ends itself.
pub fn seek(offset: u64, whence: u32) -> io::Result<()> {
    match whence.cast_signed() {
        libc::SEEK_DATA | libc::SEEK_HOLE => range(offset, 0),
        _ => invalid(),
    }
}

/// copy_file_range(2): how much of it is done at once.
pub fn copy(offset_in: u64, offset_out: u64, length: u64, flags: u64) -> io::Result<u64> {
    let length = length.min(MOST_COPIED);
    if flags != 0 {
        return invalid();
    }
    range(offset_in, length).and_then(|()| range(offset_out, length)).map(|()| length)
}

/// The value of an extended attribute, and the flags of setxattr(2).
pub fn attribute(value: &[u8], flags: u32) -> io::Result<()> {
    if value.len() > LONGEST_ATTRIBUTE {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let known = libc::XATTR_CREATE | libc::XATTR_REPLACE;
    if flags & !known.cast_unsigned() == 0 { Ok(()) } else { invalid() }
}

/// Room for an extended attribute or a list of them: there are none that need more.
pub fn attribute_room(size: u32) -> u32 {
    size.min(LONGEST_ATTRIBUTE as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno<T>(result: io::Result<T>) -> i32 {
        result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
    }

    #[test]
    fn a_name_is_one_component() {
        for good in [c"a", c"...", c"..a", c".a", c"\xff\n", c"a b"] {
            assert_eq!(errno(name(good)), 0, "{good:?}");
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/a", c"a/", c"../a", c"./a"] {
            assert_eq!(errno(name(bad)), libc::EINVAL, "{bad:?}");
        }
        let long = |length| std::ffi::CString::new(vec![b'x'; length]).unwrap();
        assert_eq!(errno(name(&long(255))), 0);
        assert_eq!(errno(name(&long(256))), libc::ENAMETOOLONG);
    }

    #[test]
    fn offsets_and_their_ends_are_signed() {
        const MOST: u64 = i64::MAX as u64;
        for (offset, length, error) in [
            (0, 0, 0),
            (MOST, 0, 0),
            (MOST - 5, 5, 0),
            (MOST - 5, 6, libc::EINVAL),
            (MOST + 1, 0, libc::EINVAL),
            (u64::MAX, 0, libc::EINVAL),
            (u64::MAX, 1, libc::EINVAL),
            (0, u64::MAX, libc::EINVAL),
        ] {
            assert_eq!(errno(range(offset, length)), error, "{length} at {offset}");
            assert_eq!(errno(allocation(0, offset, length)), error);
        }
        assert_eq!(errno(transfer(0, MOST_DATA)), 0);
        assert_eq!(errno(transfer(0, MOST_DATA + 1)), libc::EINVAL);
        assert_eq!(errno(transfer(MOST, 1)), libc::EINVAL);
        assert_eq!(copy(0, 0, u64::MAX, 0).unwrap(), MOST_COPIED);
        assert_eq!(errno(copy(MOST, 0, 1, 0)), libc::EINVAL);
        assert_eq!(errno(copy(0, MOST + 1, 1, 0)), libc::EINVAL);
        assert_eq!(errno(copy(0, 0, 1, 1)), libc::EINVAL);
    }

    #[test]
    fn only_what_linux_asks_for_is_done() {
        let flags = |flags: i32| open_flags(flags.cast_unsigned()).cast_signed();
        assert_eq!(flags(libc::O_RDWR | libc::O_CREAT | libc::O_TMPFILE), libc::O_RDWR | libc::O_DIRECTORY);
        assert_eq!(flags(libc::O_PATH | libc::O_ASYNC | libc::O_NOCTTY), 0);
        assert_eq!(create_flags(libc::O_EXCL.cast_unsigned()), libc::O_EXCL.cast_unsigned());
        assert_eq!(errno(allocation(libc::FALLOC_FL_COLLAPSE_RANGE.cast_unsigned(), 0, 1)), libc::EOPNOTSUPP);
        for whence in [0, 1, 2, 5, u32::MAX] {
            assert_eq!(errno(seek(0, whence)), libc::EINVAL);
        }
        assert_eq!(errno(seek(0, 3)), 0);
        assert_eq!(errno(attribute(&[0; 65536], 2)), 0);
        assert_eq!(errno(attribute(&[0; 65537], 0)), libc::E2BIG);
        assert_eq!(errno(attribute(&[], 4)), libc::EINVAL);
    }
}
