//! The mounts of a container's root and volumes below the shared directory, kept in the agent's own mount namespace.
//!
//! Each file system below the share is a mount that the kernel makes when somebody first walks into it, in that one's mount
//! namespace. If that were the container's alone, its file system would be shut down in the moment in which the last
//! process ends, while the kernel still waits for the host's answer to the close of that process's files: FUSE holds
//! the inode for so long, does not wait for it in a submount, and ends in "VFS: Busy inodes after unmount".

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katana_protocol::GUEST_SHARE;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

/// How many containers use each directory of the share.
#[derive(Debug, Default)]
pub struct Users(Mutex<HashMap<PathBuf, usize>>);

impl Users {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The directories that a container uses of the share. Dropped, they are unmounted, but for those that others use.
#[derive(Debug)]
pub struct Submounts {
    paths: Vec<PathBuf>,
    users: Arc<Users>,
}

impl Submounts {
    /// Walks into each of them before the container does.
    pub fn of(spec: &Spec, users: &Arc<Users>) -> Self {
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone());
        let paths: Vec<_> =
            root.into_iter().chain(sources).filter(|path| path.starts_with(GUEST_SHARE)).collect();
        let submounts = Self { paths, users: Arc::clone(users) };
        for path in &submounts.paths {
            // Counted first, so that it is not unmounted between.
            *users.lock().entry(path.clone()).or_default() += 1;
            enter(path);
        }
        submounts
    }
}

/// A file is no mount of its own; of what is not there, the container will tell.
fn enter(path: &Path) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let _ = open(&path.join("."), flags, Mode::empty());
}

impl Drop for Submounts {
    fn drop(&mut self) {
        let mut users = self.users.lock();
        for path in &self.paths {
            let Some(count) = users.get_mut(path) else { continue };
            *count -= 1;
            if *count > 0 {
                continue;
            }
            users.remove(path);
            match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // A file, or a directory of the share's own file system, is no mount.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => log::warn!("unmount {}: {error}", path.display()),
            }
        }
    }
}
