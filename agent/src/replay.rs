//! Makes changes of shared files, which the host made, known to those who watch them in the guest: does them again, as
//! the group whose requests the file server answers and does not carry out (`vmm/src/virtio/fs/replay.rs`).

use std::ffi::{CString, OsStr};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use katana_protocol::agent::{Change, change::Kind};
use katana_protocol::{GUEST_SHARE, REPLAY_GID, REPLAY_LEARN, REPLAY_SOURCE};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat, openat2, renameat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};
use tokio::sync::{mpsc, oneshot};

type Batch = (Vec<Change>, oneshot::Sender<()>);

/// The thread that replays. Started for the first changes.
///
/// It has a group of its own; and if the host's file system does not answer, the agent continues.
#[derive(Debug, Default)]
pub struct Replayer(Mutex<Option<mpsc::UnboundedSender<Batch>>>);

impl Replayer {
    /// Replays changes in their order. What cannot be replayed is passed over: it has been changed again, and that is a
    /// change, too.
    pub async fn replay(&self, changes: Vec<Change>) -> io::Result<()> {
        let (done, replayed) = oneshot::channel();
        let sender = self.sender()?;
        sender.send((changes, done)).map_err(io::Error::other)?;
        replayed.await.map_err(io::Error::other)
    }

    fn sender(&self) -> io::Result<mpsc::UnboundedSender<Batch>> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = running.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        thread::Builder::new().name("replay".to_owned()).spawn(move || {
            if let Err(error) = run(receiver) {
                log::error!("replay of changed files: {error}");
            }
        })?;
        *running = Some(sender.clone());
        Ok(sender)
    }
}

fn run(mut batches: mpsc::UnboundedReceiver<Batch>) -> io::Result<()> {
    let share = open(GUEST_SHARE, DIRECTORY, Mode::empty())?;
    // SAFETY: changes this thread's credentials only; the C library does not pass it on to the other threads.
    let set = || unsafe { libc::setfsgid(REPLAY_GID) };
    set();
    // setfsgid(2): it answers the group before, so the second call shows whether the first one worked.
    if set().cast_unsigned() != REPLAY_GID {
        return Err(io::Error::other("the group cannot be taken on"));
    }
    while let Some((changes, done)) = batches.blocking_recv() {
        // Changes come in runs.
        let mut last = None;
        for change in changes {
            if let Err(error) = replay(&share, &change, &mut last) {
                let (directory, name) =
                    (String::from_utf8_lossy(&change.directory), String::from_utf8_lossy(&change.name));
                log::debug!("replay {:?} of {directory:?} {name:?}: {error}", change.kind);
            }
        }
        // If nobody waits any more, the connection to the host has ended.
        let _ = done.send(());
    }
    Ok(())
}

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

fn replay(share: &OwnedFd, change: &Change, last: &mut Option<(Vec<u8>, Directory)>) -> io::Result<()> {
    let kind = change.kind.enum_value().map_err(|_| Errno::EINVAL)?;
    let (_, directory) = match last.take() {
        Some(open) if open.0 == change.directory => last.insert(open),
        _ => {
            let path = Path::new(OsStr::from_bytes(&change.directory));
            last.insert((change.directory.clone(), Directory::open(share, path)?))
        }
    };
    let name = Path::new(OsStr::from_bytes(&change.name));
    if kind == Kind::WATCHED {
        return directory.learn(Path::new(""));
    }
    if Path::new(name.file_name().ok_or(Errno::EINVAL)?) != name {
        return Err(Errno::EINVAL.into());
    }
    match kind {
        Kind::CREATED | Kind::MOVED_HERE if change.is_directory => directory.make_directory(name),
        Kind::CREATED => directory.create(name),
        Kind::MOVED_HERE => directory.move_here(name),
        Kind::REMOVED => directory.remove(name, change.is_directory),
        Kind::MODIFIED => directory.set_times(name, TimeSpec::UTIME_OMIT),
        Kind::ATTRIBUTES => directory.set_times(name, TimeSpec::new(0, 0)),
        Kind::WRITTEN => directory.write(name),
        Kind::WATCHED => Ok(()),
    }
}

/// A directory in which something has changed.
struct Directory(OwnedFd);

impl Directory {
    /// No link leads out of the share, nor from one volume into another.
    fn open(share: &OwnedFd, path: &Path) -> io::Result<Self> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        Ok(Self(openat2(share, path, OpenHow::new().flags(DIRECTORY).resolve(resolve))?))
    }

    /// Has the file server remember what a name is, or with an empty one, all of them.
    fn learn(&self, name: &Path) -> io::Result<()> {
        let path = CString::new(path_of(&self.0).into_os_string().into_encoded_bytes())?;
        let name = CString::new([REPLAY_LEARN.as_bytes(), name.as_os_str().as_bytes()].concat())?;
        // SAFETY: two strings that outlive the call, and no room for a value.
        Errno::result(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) })?;
        Ok(())
    }

    /// Has the kernel ask anew how many links a name's file has: the file server counts, for replays, the one that is
    /// now to be taken away.
    fn refresh(&self, name: &Path) {
        let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_FORCE_SYNC;
        let Ok(name) = CString::new(name.as_os_str().as_bytes()) else { return };
        // SAFETY: statx is plain data, for which all zeroes is a valid value.
        let mut status: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: a string and a structure that outlive the call. Nothing depends on whether it succeeds.
        unsafe { libc::statx(self.0.as_raw_fd(), name.as_ptr(), flags, libc::STATX_NLINK, &raw mut status) };
    }

    fn make_directory(&self, name: &Path) -> io::Result<()> {
        self.or_learn(mkdirat(&self.0, name, Mode::S_IRWXU), name)
    }

    fn create(&self, name: &Path) -> io::Result<()> {
        match mknodat(&self.0, name, SFlag::S_IFREG, Mode::S_IRUSR, 0) {
            // Somebody in the guest has seen it already, or it is no regular file: it can still be moved here.
            Err(Errno::EEXIST) => self.move_here(name),
            outcome => Ok(outcome?),
        }
    }

    /// Watchers of the directory hear that the name came; those of the file in whose place it came, that it is gone.
    fn move_here(&self, name: &Path) -> io::Result<()> {
        self.refresh(name);
        let flags = DIRECTORY | OFlag::O_NOFOLLOW;
        let moved = openat(&self.0, REPLAY_SOURCE, flags, Mode::empty())
            .and_then(|source| renameat(source, "moved", &self.0, name));
        self.or_learn(moved, name)
    }

    fn remove(&self, name: &Path, is_directory: bool) -> io::Result<()> {
        self.refresh(name);
        let flag = if is_directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
        Ok(unlinkat(&self.0, name, flag)?)
    }

    /// What somebody in the guest has seen already raises no event by coming; but it must be known for when it goes.
    fn or_learn(&self, result: nix::Result<()>, name: &Path) -> io::Result<()> {
        if result.is_err_and(|error| error != Errno::ENOENT) {
            self.learn(name)?;
        }
        Ok(result?)
    }

    /// The regular file or directory of a name.
    fn find(&self, name: &Path) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&self.0, name, flags, Mode::empty())?;
        let kind = SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFREG || kind == SFlag::S_IFDIR {
            Ok(file)
        } else {
            Err(Errno::EOPNOTSUPP.into())
        }
    }

    /// With one time the kernel reports changed contents, with two changed attributes.
    fn set_times(&self, name: &Path, access: TimeSpec) -> io::Result<()> {
        let file = self.find(name)?;
        let modification = TimeSpec::new(0, 0);
        Ok(utimensat(AT_FDCWD, &path_of(&file), &access, &modification, UtimensatFlags::FollowSymlink)?)
    }

    /// Also has the kernel drop the old contents that it has cached.
    fn write(&self, name: &Path) -> io::Result<()> {
        let file = self.find(name)?;
        if SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG {
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path_of(&file))?;
        }
        Ok(())
    }
}

fn path_of(fd: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}
