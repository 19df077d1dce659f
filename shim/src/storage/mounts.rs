//! Mounts: the few system calls.
//!
//! What the guest sees is mounted in the VMM's mount namespace only. In the host's it would keep directories busy that
//! others want to remove, and a copy of what is mounted there would be one more for everybody. So each mount is made
//! detached, in the host's namespace, where its source is; then a thread that enters the VMM's namespace attaches it.
//!
//! Whatever the source is like, nothing can be executed there with somebody else's rights, and no device can be opened:
//! it is the guest's kernel that does so, when a container opens a device node or executes a set-user-ID file that it
//! finds there. To it these are flags of the host's mount all the same, so it is sent those that the source has itself
//! ([`AddedFlags`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use katana_protocol::kernel;
use katana_protocol::mount::{MountAttributes, attach_mount, copy_mount, set_mount};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::fchdir;

use super::mount_table::{self, Mounted};
use crate::host::threads::on_own_thread;

/// What a bind mount's options say about writing (runtime-spec, config.md, "Linux mount options").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// As the source is.
    Inherited,
    /// The mount itself is read-only ("ro").
    ReadOnly,
    /// The mount and all mounts below it are read-only ("rro").
    RecursivelyReadOnly,
    /// Neither the mount nor those below it are read-only, whatever the source is ("rrw").
    RecursivelyWritable,
}

impl Access {
    /// Whether the mount can be written to where its source can.
    pub fn lets_write(self) -> bool {
        matches!(self, Self::Inherited | Self::RecursivelyWritable)
    }
}

/// Takes the descriptor that a system call has answered with.
pub fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A mount that is attached nowhere yet. It is gone with its last descriptor unless it is attached. Its flags are set
/// before anybody can see it.
#[derive(Debug)]
pub struct Detached(OwnedFd);

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Detached {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Detached> for OwnedFd {
    fn from(mount: Detached) -> Self {
        mount.0
    }
}

impl Detached {
    /// A copy of the mount at `source`.
    pub fn copy(source: &Path, recursive: bool) -> io::Result<Self> {
        copy_mount(source, recursive).map(Self)
    }

    /// A copy of `source` for a container. Mounts that the host makes below it later appear if it `follows`; none goes
    /// back.
    pub fn bound(source: &Path, recursive: bool, follows: bool, access: Access) -> io::Result<Self> {
        let tree = Self::copy(source, recursive)?;
        tree.set(0, 0, if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE }, recursive)?;
        match access {
            Access::Inherited => {}
            Access::ReadOnly => tree.set(libc::MOUNT_ATTR_RDONLY, 0, 0, false)?,
            Access::RecursivelyReadOnly => tree.set(libc::MOUNT_ATTR_RDONLY, 0, 0, true)?,
            Access::RecursivelyWritable => tree.set(0, libc::MOUNT_ATTR_RDONLY, 0, true)?,
        }
        Ok(tree)
    }

    /// Sets and clears attributes, and sets the propagation type.
    pub fn set(&self, set: u64, clear: u64, propagation: u64, recursive: bool) -> io::Result<()> {
        let attributes = MountAttributes { set, clear, propagation, user_namespace: 0 };
        set_mount(self, &attributes, recursive)
    }
}

/// What every mount for a VMM is.
const ADDED: [(&str, FsFlags); 2] = [("nosuid", FsFlags::ST_NOSUID), ("nodev", FsFlags::ST_NODEV)];

/// The flags that mounts of a namespace have beyond those of the host's mounts that they are copies of, by their
/// places.
#[derive(Debug, Default)]
pub struct AddedFlags(Mutex<BTreeMap<PathBuf, Vec<&'static str>>>);

impl AddedFlags {
    /// Sets the flags of a mount for this target, and of all that is mounted in it. Whether it is `nosuid` and `nodev` as
    /// it is, is known from the host's mount that it is a copy of, or from its file system, which may have to answer.
    fn set(&self, target: &Path, mount: &Detached, original: Option<&Mounted>) -> io::Result<()> {
        let had = match original {
            Some(original) => original.restrictions(),
            None => {
                let flags = fstatvfs(mount)?.flags();
                let had = ADDED.iter().filter(|(_, flag)| flags.contains(*flag));
                had.map(|(name, _)| (*name).to_owned()).collect()
            }
        };
        mount.set(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV, 0, 0, true)?;
        self.note(Path::new("/").join(target), &had);
        Ok(())
    }

    fn note(&self, point: PathBuf, had: &[String]) {
        let added = ADDED.map(|(name, _)| name).into_iter().filter(|name| !had.iter().any(|had| had == name));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(point, added.collect());
    }

    /// Notes the mounts in a tree at `target`, which is a copy of the host's directory `source`.
    fn note_tree(&self, all: &[Mounted], target: &Path, source: &Path) -> io::Result<()> {
        let root = Path::new("/").join(target);
        let inner = |mounted: &&Mounted| mounted.point != root;
        let mut seen = mount_table::tree(all, &root).into_iter().filter(inner).peekable();
        if seen.peek().is_none() {
            return Ok(());
        }
        let (source, host) = (std::fs::canonicalize(source)?, mount_table::host()?);
        let originals = mount_table::tree(&host, &source);
        for mounted in seen {
            let Ok(below) = mounted.point.strip_prefix(&root) else { continue };
            let point = source.join(below);
            // One that has gone meanwhile was as strict as could be.
            if let Some(original) = originals.iter().find(|original| original.point == point) {
                self.note(mounted.point.clone(), &original.restrictions());
            }
        }
        Ok(())
    }

    /// The mounts of the namespace as they would be without the added flags.
    fn reverted(&self, all: &[Mounted]) -> Vec<Mounted> {
        let noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reverted = |mounted: &Mounted| {
            let added = noted.get(&mounted.point);
            added.map_or_else(|| mounted.clone(), |added| mounted.without(added))
        };
        all.iter().map(reverted).collect()
    }

    /// What was mounted at a target, or below it, is gone.
    pub fn forget(&self, target: &Path) {
        let root = Path::new("/").join(target);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|point, _| !point.starts_with(&root));
    }
}

/// What is to be done in a mount namespace, at a path relative to its root.
enum Step {
    Mount(PathBuf, Detached),
    /// The same, where the target may be gone.
    Try(PathBuf, Detached),
    /// With all below it; if it is there.
    Unmount(PathBuf),
}

/// Mounts to be attached in the mount namespace of a pod's VMM, and others to be removed from it.
pub struct Attachments<'a> {
    /// The VMM's process (a pidfd), or the namespace itself.
    namespace: BorrowedFd<'a>,
    /// Its root, the share.
    root: BorrowedFd<'a>,
    added_flags: &'a AddedFlags,
    steps: Vec<Step>,
    /// Targets of whole trees, and what they are copies of.
    trees: Vec<(PathBuf, PathBuf)>,
    /// Whether what is recursive is to be copied mount by mount, see [`Attachments::add_tree`].
    piecewise: bool,
}

impl<'a> Attachments<'a> {
    /// Nothing is to be done yet.
    pub fn new(namespace: BorrowedFd<'a>, root: BorrowedFd<'a>, added_flags: &'a AddedFlags) -> Self {
        Self { namespace, root, added_flags, steps: Vec::new(), trees: Vec::new(), piecewise: false }
    }

    /// The same, for a second attempt after the kernel has refused a tree with ELOOP: a mount namespace takes none in
    /// which there is a file that stands for an older mount namespace (`check_for_nsfs_mounts` in fs/namespace.c).
    pub fn piecewise(namespace: BorrowedFd<'a>, root: BorrowedFd<'a>, added_flags: &'a AddedFlags) -> Self {
        Self { piecewise: true, ..Self::new(namespace, root, added_flags) }
    }

    /// Adds a private copy of `source`.
    pub fn add_tree(
        &mut self,
        target: PathBuf,
        source: &Path,
        recursive: bool,
        access: Access,
    ) -> io::Result<()> {
        if !(self.piecewise && recursive) {
            return self.add_copy(target, source, Detached::bound(source, recursive, false, access)?);
        }
        // As the kernel does where it copies mounts by itself, without such files.
        let source = std::fs::canonicalize(source)?;
        self.add(target.clone(), Detached::bound(&source, false, false, access)?)?;
        let access = if access == Access::ReadOnly { Access::Inherited } else { access };
        for mounted in mount_table::tree(&mount_table::host()?, &source) {
            let Ok(below) = mounted.point.strip_prefix(&source) else { continue };
            if !below.as_os_str().is_empty() && !mounted.is_mount_namespace() {
                let copy = Detached::bound(&mounted.point, false, false, access)?;
                self.try_to_add(target.join(below), copy, mounted)?;
            }
        }
        Ok(())
    }

    /// Adds a copy of a directory or file of the host, with what is mounted there.
    pub fn add_copy(&mut self, target: PathBuf, source: &Path, mount: Detached) -> io::Result<()> {
        self.trees.push((target.clone(), source.to_owned()));
        self.add(target, mount)
    }

    /// Adds a mount; the target is a path relative to the share.
    pub fn add(&mut self, target: PathBuf, mount: Detached) -> io::Result<()> {
        self.added_flags.set(&target, &mount, None)?;
        self.steps.push(Step::Mount(target, mount));
        Ok(())
    }

    /// The same for a copy of a mount of the host, and a target that is in a volume, where it may be gone.
    pub fn try_to_add(&mut self, target: PathBuf, mount: Detached, original: &Mounted) -> io::Result<()> {
        self.added_flags.set(&target, &mount, Some(original))?;
        self.steps.push(Step::Try(target, mount));
        Ok(())
    }

    /// Has a mount be unmounted, with all below it.
    pub fn remove(&mut self, target: PathBuf) {
        self.steps.push(Step::Unmount(target));
    }

    /// Does all that is to be done. The answer is what is mounted in the namespace then, as the host's mounts are.
    /// Blocks.
    pub fn attach_all(&mut self) -> io::Result<Vec<Mounted>> {
        let steps = std::mem::take(&mut self.steps);
        // Whoever has entered a mount namespace has its root and working directory, which threads otherwise share. This
        // one ends.
        let work = || {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let thread = openat(AT_FDCWD, "/proc/thread-self", flags, Mode::empty())?;
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.namespace, CloneFlags::CLONE_NEWNS)?;
            for step in &steps {
                match step {
                    Step::Mount(target, mount) => attach_mount(mount, self.find(target)?)?,
                    Step::Try(target, mount) => {
                        if let Err(e) = self.find(target).and_then(|found| attach_mount(mount, found)) {
                            log::info!("mount {}: {e}", target.display());
                        }
                    }
                    Step::Unmount(target) => {
                        if let Err(e) = self.unmount(target) {
                            log::debug!("unmount {}: {e}", target.display());
                        }
                    }
                }
            }
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            mount_table::read(File::from(openat(&thread, "mountinfo", flags, Mode::empty())?))
        };
        let all = on_own_thread(work)?;
        for (target, source) in self.trees.drain(..) {
            if let Err(e) = self.added_flags.note_tree(&all, &target, &source) {
                log::warn!("what is mounted in {}: {e}", source.display());
            }
        }
        Ok(self.added_flags.reverted(&all))
    }

    /// What is in volumes is the guest's to change: no link is followed.
    fn find(&self, target: &Path) -> io::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
        openat2(self.root, target, how).map_err(|e| kernel::OPENAT2.explain(e))
    }

    fn unmount(&self, target: &Path) -> io::Result<()> {
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else { return Ok(()) };
        fchdir(self.find(parent)?)?;
        Ok(umount2(name, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
    }
}

/// Unmounts everything at and below `directory`, the last mounted first. Blocks.
///
/// # Errors
/// When mounts are left.
pub fn unmount_all(directory: &Path) -> io::Result<()> {
    for _ in 0..3 {
        let points = mount_table::below(directory)?;
        if points.is_empty() {
            return Ok(());
        }
        for point in points.iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    let left = mount_table::below(directory)?;
    if left.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!("{} mounts are left below {}", left.len(), directory.display())))
}

/// Opens a directory by path alone (O_PATH).
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// The path of what a descriptor stands for.
pub fn path_of_fd(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
