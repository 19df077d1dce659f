//! The mounts of a container's root and volumes below the shared directory, kept in the agent's own mount namespace.
//!
//! Each file system below the share is a mount that the kernel makes when somebody first walks into it, in that one's mount
//! namespace. If that were the container's alone, its file system would be shut down in the moment in which the last
//! process ends, while the kernel still waits for the host's answer to the close of that process's files: FUSE holds
//! the inode for so long, does not wait for it in a submount, and ends in "VFS: Busy inodes after unmount".

use std::path::{Path, PathBuf};

use katana_protocol::GUEST_SHARE;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

/// The directories that a container uses of the share. Dropped, they are unmounted.
#[derive(Debug)]
pub struct Submounts(Vec<PathBuf>);

impl Submounts {
    /// Walks into each of them before the container does.
    pub fn of(spec: &Spec) -> Self {
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone());
        let shared: Vec<_> =
            root.into_iter().chain(sources).filter(|path| path.starts_with(GUEST_SHARE)).collect();
        Self(shared.into_iter().filter(|path| enter(path)).collect())
    }
}

/// False for a file, which is no mount of its own, and for what is not there, of which the container will tell.
fn enter(path: &Path) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(&path.join("."), flags, Mode::empty()).is_ok()
}

impl Drop for Submounts {
    fn drop(&mut self) {
        for path in &self.0 {
            match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // A directory of the share's own file system is no mount.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => log::warn!("unmount {}: {error}", path.display()),
            }
        }
    }
}
