//! The mounts of the host below the shared directory, kept in the agent's own mount namespace.
//!
//! Each file system below the share is a mount that the kernel makes when somebody first walks into it, in that one's
//! mount namespace. The agent walks into all of them before a container has its copy of them, for two reasons.
//!
//! To stat(2) a mount that nobody has walked into is a directory of the file system around it: `find` sees a loop,
//! `mountpoint` sees none. And what the container walked into would have the flags of the mount around it, so that one
//! that is read-only would make all below it so.
//!
//! If a mount were in the container's namespace alone, its file system would be shut down in the moment in which the
//! last process ends, while the kernel still waits for the host's answer to the close of that process's files: FUSE
//! holds the inode for so long, does not wait for it in a submount, and ends in "VFS: Busy inodes after unmount".
//!
//! For the same reason the agent holds a descriptor of each mount in a volume. If the host unmounts it, the kernel
//! takes it away from everybody as soon as somebody looks for it, whoever has files open in it. The descriptor goes
//! when nobody has.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use katana_protocol::GUEST_SHARE;
use katana_protocol::agent::SharedMount;
use katana_protocol::mount::set_mount;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

use crate::in_use::{Device, device, is_in_use};
use crate::init::mount_options;

/// How long a container waits for the mounts in its volumes. A network file system of the host may not answer, and
/// whoever does not look at it needs no answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest may believe what it knows of a name, and a little more: the VMM's file server allows a second.
const STALE: Duration = Duration::from_millis(1200);
/// How often it is looked whether files are still used on a mount that is gone: first, and at last.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(64));

/// Who uses what of the share.
#[derive(Debug, Default)]
pub struct Users {
    /// How many containers use each directory.
    counts: Mutex<HashMap<PathBuf, usize>>,
    /// The mounts in volumes, by their paths relative to the share.
    held: Mutex<BTreeMap<PathBuf, Vec<OwnedFd>>>,
}

impl Users {
    fn counts(&self) -> MutexGuard<'_, HashMap<PathBuf, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Vec<OwnedFd>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a mount until the volume is gone, or [`Users::let_go`].
    fn hold(&self, path: PathBuf, mount: OwnedFd) {
        let mut held = self.held();
        let mounts = held.entry(path).or_default();
        let same = |other: &OwnedFd| device(other.as_fd()) == device(mount.as_fd());
        if !mounts.iter().any(same) {
            mounts.push(mount);
        }
    }

    /// Releases a mount; false if it is not held any more.
    fn release(&self, path: &Path, of: Device) -> bool {
        let mut held = self.held();
        let Some(mounts) = held.get_mut(path) else { return false };
        let count = mounts.len();
        mounts.retain(|mount| device(mount.as_fd()) != Some(of));
        count != mounts.len()
    }
}

/// The directories that a container uses of the share. Dropped, they are unmounted with all below, but for those that
/// others use.
#[derive(Debug)]
pub struct Submounts {
    paths: Vec<PathBuf>,
    users: Arc<Users>,
}

impl Submounts {
    /// Walks into each of them, and into the mounts in them, before the container does.
    pub async fn of(
        spec: &Spec,
        lower: Option<PathBuf>,
        mounts: Vec<SharedMount>,
        users: &Arc<Users>,
    ) -> Self {
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone());
        let used = root.into_iter().chain(lower).chain(sources);
        let paths: Vec<_> = used.filter(|path| path.starts_with(GUEST_SHARE)).collect();
        let submounts = Self { paths, users: Arc::clone(users) };
        for path in &submounts.paths {
            // Counted first, so that it is not unmounted between.
            *users.counts().entry(path.clone()).or_default() += 1;
            // A file is no mount of its own; the container's creation reports what is missing.
            let _ = path.strip_prefix(GUEST_SHARE).map(enter);
        }
        if !mounts.is_empty() {
            let users = Arc::clone(users);
            let entering = tokio::task::spawn_blocking(move || enter_all(&users, mounts));
            if tokio::time::timeout(PATIENCE, entering).await.is_err() {
                log::warn!("a mount in a volume does not answer");
            }
        }
        submounts
    }
}

/// Makes the mounts in volumes be those that the host has.
pub async fn follow(users: &Arc<Users>, come: Vec<SharedMount>, gone: Vec<Vec<u8>>) {
    for path in gone {
        let path = PathBuf::from(OsString::from_vec(path));
        let devices: Vec<_> =
            users.held().get(&path).into_iter().flatten().filter_map(|mount| device(mount.as_fd())).collect();
        for device in devices {
            tokio::spawn(forget(Arc::clone(users), path.clone(), device));
        }
    }
    if !come.is_empty() {
        // Where they are, the guest may know plain directories.
        tokio::time::sleep(STALE).await;
        let users = Arc::clone(users);
        let entering = tokio::task::spawn_blocking(move || enter_all(&users, come));
        if tokio::time::timeout(PATIENCE, entering).await.is_err() {
            log::warn!("a mount of the host does not answer");
        }
    }
}

/// Releases a mount that is gone on the host, when nobody uses files of it.
async fn forget(users: Arc<Users>, path: PathBuf, device: Device) {
    let (mut pause, longest) = LOOK_AGAIN;
    loop {
        // After this, the host has also been notified of what has been closed.
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
        match tokio::task::spawn_blocking(move || is_in_use(device)).await {
            Ok(false) => break,
            Ok(true) => {}
            Err(_) => return,
        }
    }
    tokio::time::sleep(LOOK_AGAIN.0).await;
    if !users.release(&path, device) {
        return;
    }
    // If nobody has looked for it since, it is still there.
    let looked = tokio::task::spawn_blocking(move || enter(&path).map(drop)).await;
    if let Ok(Err(error)) = looked {
        log::debug!("a mount that is gone: {error}");
    }
}

/// Walks into mounts in their order.
fn enter_all(users: &Users, mounts: Vec<SharedMount>) {
    for mount in mounts {
        let path = PathBuf::from(OsString::from_vec(mount.path));
        // It may be a file, or gone again.
        let Ok(entered) = enter(&path) else { continue };
        let options = mount_options::parse(&mount.options).unwrap_or_default();
        if options.attributes.set != 0
            && let Err(error) = set_mount(&entered, &options.attributes, false)
        {
            log::warn!("{}: {error}", path.display());
        }
        users.hold(path, entered);
    }
}

/// Opens a directory of the share as a place. What is in volumes is the containers' to change: no link is followed.
fn enter(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let share = open(GUEST_SHARE, flags, Mode::empty())?;
    let how =
        OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(share, &path.join("."), how)?)
}

impl Drop for Submounts {
    fn drop(&mut self) {
        let mut users = self.users.counts();
        for path in &self.paths {
            let Some(count) = users.get_mut(path) else { continue };
            *count -= 1;
            if *count > 0 {
                continue;
            }
            users.remove(path);
            if let Ok(volume) = path.strip_prefix(GUEST_SHARE) {
                self.users.held().retain(|path, _| !path.starts_with(volume));
            }
            match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // A file, or a directory of the share's own file system, is no mount.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => log::warn!("unmount {}: {error}", path.display()),
            }
        }
    }
}
