//! A file system whose server does not answer, as NFS without its server.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Mounted until it is dropped; then whoever waits for it gets an error.
pub struct Hung {
    pub path: PathBuf,
    /// The server's end. What is asked stays unread: so whoever waits can be killed.
    server: File,
}

impl Hung {
    /// Makes the directory and mounts it; nothing on a host without FUSE.
    pub fn mount(path: &Path) -> Option<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        fs::create_dir(path).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        mount(Some("hung"), path, Some("fuse"), MsFlags::empty(), Some(options.as_str())).ok()?;
        let mut hung = Self { path: path.to_owned(), server };
        hung.begin();
        Some(hung)
    }

    /// Answers FUSE_INIT, without which nothing is asked at all (linux/fuse.h).
    fn begin(&mut self) {
        let mut request = vec![0; 1 << 17];
        let length = self.server.read(&mut request).unwrap();
        // struct fuse_in_header: length, what, number
        let number = &request[..length][8..16];
        // struct fuse_init_out: the version, and as little as possible of all else
        let mut init = [0; 64];
        init[..4].copy_from_slice(&7_u32.to_ne_bytes());
        init[4..8].copy_from_slice(&31_u32.to_ne_bytes());
        init[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
        init[24..28].copy_from_slice(&1_u32.to_ne_bytes());
        // struct fuse_out_header: length, error, number
        let answer = [&80_u32.to_ne_bytes()[..], &[0; 4], number, &init].concat();
        self.server.write_all(&answer).unwrap();
    }

    /// Whether somebody waits for an answer.
    pub fn is_asked(&self) -> bool {
        let mut fds = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).unwrap();
    }
}
