//! The flags of inodes, such as `nodump` and `immutable`: ioctl_iflags(2), `chattr` and `lsattr`.
//!
//! Of all requests of ioctl(2) only these are passed on: they are the host's file systems' and mean the same in all of
//! them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::unnamed::checked;

/// linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR and FS_IOC_GETVERSION, which read.
const READING: [(u32, usize); 3] = [(0x8008_6601, 4), (0x801c_581f, 28), (0x8008_7601, 4)];
/// FS_IOC_SETFLAGS and FS_IOC_FSSETXATTR.
const WRITING: [(u32, usize); 2] = [(0x4008_6602, 4), (0x401c_5820, 28)];
/// `struct fsxattr`, and the `long` that is said to be transferred for the others, of which 4 bytes are.
const MOST_BYTES: usize = 28;

/// One of these requests.
pub struct Request {
    number: u32,
    bytes: usize,
    data: [u8; MOST_BYTES],
    writes: bool,
}

impl Request {
    /// The request with that number, which comes with `input` and has so many bytes of room for what it answers.
    pub fn new(number: u32, input: &[u8], room: usize) -> Option<Self> {
        let find =
            |all: &[(u32, usize)]| all.iter().find(|(known, _)| *known == number).map(|(_, bytes)| *bytes);
        let (bytes, writes) = match (find(&READING), find(&WRITING)) {
            (Some(bytes), _) => (bytes, false),
            (_, Some(bytes)) => (bytes, true),
            _ => return None,
        };
        let mut data = [0; MOST_BYTES];
        let enough = if writes { input.len() >= bytes } else { room >= bytes };
        if !enough {
            return None;
        }
        data.iter_mut().zip(input).take(bytes).for_each(|(to, from)| *to = *from);
        Some(Self { number, bytes, data, writes })
    }

    /// Makes it of a file or directory; what it answers.
    pub fn make(mut self, file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        let data = self.data.as_mut_ptr();
        // SAFETY: the kernel reads or writes `bytes` at most, of MOST_BYTES that are there.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), self.number.into(), data) })?;
        Ok(if self.writes { Vec::new() } else { self.data[..self.bytes].to_vec() })
    }
}
