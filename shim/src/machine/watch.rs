//! Changes that the host makes in a pod's volumes, passed on to the guest, where programs watch for them.
//!
//! Watched are volumes that are read-only for the container, and those that kubelet updates (ConfigMaps, Secrets,
//! projected volumes), by the link `..data` in them. In other volumes the containers themselves make most changes, and
//! hear of them without this. The kernel reports each change; nothing is looked at in intervals.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use katana_protocol::agent::{Change, change::Kind};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::Machine;
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::storage::mounts;

/// Directories that are watched for one pod.
const MOST_DIRECTORIES: usize = 1024;
/// Changes in one message to the agent.
const BATCH: usize = 64;
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB);

/// Watches the volumes of a pod.
pub struct Watcher {
    watches: Arc<Watches>,
    agent: Agent,
    task: AbortHandle,
}

impl Watcher {
    /// Watches nothing yet. `share` is the pod's shared directory as the guest sees it.
    pub fn start(share: Arc<OwnedFd>, agent: Agent) -> io::Result<Self> {
        let queue = Queue(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        // SAFETY: the queue always answers the same descriptor, and keeps it open while it lives.
        let queue = unsafe { AsyncFd::register_with_interest(queue, Interest::READABLE) }?;
        let watches = Arc::new(Watches {
            queue,
            share,
            state: Mutex::default(),
            sending: tokio::sync::Mutex::default(),
        });
        let task = tokio::spawn(pass_on(Arc::clone(&watches), agent.clone())).abort_handle();
        Ok(Self { watches, agent, task })
    }

    /// Watches volumes and the directories in them, and has the guest remember what is there.
    pub async fn add(&self, volumes: Vec<PathBuf>) -> Result<()> {
        let _sending = self.watches.sending.lock().await;
        let watches = Arc::clone(&self.watches);
        let added = crate::host::threads::blocking(move || {
            Ok(volumes.iter().flat_map(|volume| watches.add(volume, Path::new("."))).collect())
        });
        send(&self.agent, added.await?).await
    }

    /// Stops watching the volumes below a directory of the share.
    pub fn remove(&self, directory: &Path) {
        self.watches.remove(directory);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Queue(Inotify);

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// From one attempt to the next when there is no thread.
const RETRY: Duration = Duration::from_secs(1);

struct Watches {
    queue: AsyncFd<Queue>,
    share: Arc<OwnedFd>,
    state: Mutex<State>,
    /// Changes are sent to the guest in the order in which they were found.
    sending: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Where in the share a watched directory is. The same one may be in several volumes.
    places: HashMap<WatchDescriptor, Vec<PathBuf>>,
    limit_reported: bool,
}

async fn pass_on(watches: Arc<Watches>, agent: Agent) {
    loop {
        let events = match watches.events().await {
            Ok(events) => events,
            Err(e) => return log::error!("changes of files are not passed on any more: {e}"),
        };
        let _sending = watches.sending.lock().await;
        let changes = digest(&watches, events).await;
        if let Err(e) = send(&agent, changes).await {
            return log::debug!("changes of files are not passed on any more: {e}");
        }
    }
}

/// What the events mean. They are not read again, so a lack of threads is waited out.
async fn digest(watches: &Arc<Watches>, events: Vec<InotifyEvent>) -> Vec<Change> {
    let events = Arc::new(events);
    loop {
        let (watches, events) = (Arc::clone(watches), Arc::clone(&events));
        match crate::host::threads::blocking(move || Ok(watches.digest(&events))).await {
            Ok(changes) => return changes,
            Err(e) => log::warn!("changes of files: {e}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Sends changes to the guest, and waits until they are replayed there.
async fn send(agent: &Agent, changes: Vec<Change>) -> Result<()> {
    for batch in changes.chunks(BATCH) {
        match agent.replay_changes(batch.to_vec()).await {
            // What it cannot do once it may do the next time.
            Err(Error::Agent { text, .. } | Error::DeadlineExceeded(text)) => {
                log::warn!("changes of files: {text}");
            }
            outcome => outcome?,
        }
    }
    Ok(())
}

impl Watches {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn events(&self) -> io::Result<Vec<InotifyEvent>> {
        loop {
            let mut ready = self.queue.readable().await?;
            match self.queue.get_ref().0.read_events() {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Watches a directory of a volume and all below it that is on the same mount.
    fn add(&self, volume: &Path, directory: &Path) -> Vec<Change> {
        let mut changes = Vec::new();
        let Ok(root) = mounts::open_directory(&mounts::path_of_fd(self.share.as_fd()).join(volume)) else {
            return changes;
        };
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            // What is gone again needs no watch, and what is mounted there is another file system.
            let Ok(opened) = enter(&root, &directory) else { continue };
            let place: PathBuf = volume
                .components()
                .chain(directory.components().filter(|part| part.as_os_str() != "."))
                .collect();
            if let Err(e) = self.watch(&opened, &place) {
                self.report_limit(&place, &e);
                break;
            }
            changes.push(change(Kind::WATCHED, &place, b"", true));
            // Only now, so that nothing comes between.
            directories.extend(children(&opened).into_iter().map(|name| directory.join(name)));
        }
        changes
    }

    fn watch(&self, directory: &OwnedFd, place: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.places.len() >= MOST_DIRECTORIES {
            return Err(io::Error::other(format!("{MOST_DIRECTORIES} directories are watched for this pod")));
        }
        let path = mounts::path_of_fd(directory.as_fd());
        let watch = self.queue.get_ref().0.add_watch(&path, EVENTS | AddWatchFlags::IN_ONLYDIR)?;
        let places = state.places.entry(watch).or_default();
        if !places.iter().any(|known| known == place) {
            places.push(place.to_owned());
        }
        Ok(())
    }

    fn report_limit(&self, place: &Path, error: &io::Error) {
        if !std::mem::replace(&mut self.state().limit_reported, true) {
            log::warn!("changes by the host raise no events in {} and others: {error}", place.display());
        }
    }

    fn remove(&self, directory: &Path) {
        self.state().places.retain(|watch, places| {
            places.retain(|place| !place.starts_with(directory));
            if places.is_empty() {
                // It may have ended with its directory.
                let _ = self.queue.get_ref().0.rm_watch(*watch);
            }
            !places.is_empty()
        });
    }

    /// The changes to send to the guest. New directories are watched at once.
    fn digest(&self, events: &[InotifyEvent]) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                log::warn!("more files change on the host than can be followed: some changes raise no event");
            }
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                self.state().places.remove(&event.wd);
            }
            let (Some(name), Some(kind)) = (&event.name, kind(event.mask)) else { continue };
            let is_directory = event.mask.contains(AddWatchFlags::IN_ISDIR);
            let places = self.state().places.get(&event.wd).cloned().unwrap_or_default();
            for place in places {
                let change = change(kind, &place, name.as_bytes(), is_directory);
                if changes.last() != Some(&change) {
                    changes.push(change);
                }
                if is_directory && event.mask.intersects(AddWatchFlags::IN_MOVED_FROM) {
                    self.remove(&place.join(name));
                }
                let came = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
                if is_directory && event.mask.intersects(came) {
                    let (volume, directory) = split(&place.join(name));
                    changes.extend(self.add(&volume, &directory));
                }
            }
        }
        changes
    }
}

/// A place in the share as a volume, two names, and what is below it.
fn split(place: &Path) -> (PathBuf, PathBuf) {
    let mut parts = place.components();
    let volume = parts.by_ref().take(2).collect();
    (volume, parts.as_path().to_owned())
}

fn kind(mask: AddWatchFlags) -> Option<Kind> {
    let kinds = [
        (AddWatchFlags::IN_CREATE, Kind::CREATED),
        (AddWatchFlags::IN_MOVED_TO, Kind::MOVED_HERE),
        (AddWatchFlags::IN_MOVED_FROM, Kind::REMOVED),
        (AddWatchFlags::IN_DELETE, Kind::REMOVED),
        (AddWatchFlags::IN_MODIFY, Kind::MODIFIED),
        (AddWatchFlags::IN_CLOSE_WRITE, Kind::WRITTEN),
        (AddWatchFlags::IN_ATTRIB, Kind::ATTRIBUTES),
    ];
    kinds.into_iter().find(|(flag, _)| mask.contains(*flag)).map(|(_, kind)| kind)
}

fn change(kind: Kind, directory: &Path, name: &[u8], is_directory: bool) -> Change {
    let directory = directory.as_os_str().as_bytes().to_vec();
    Change { kind: kind.into(), directory, name: name.to_vec(), is_directory, ..Default::default() }
}

/// Opens a directory of a volume. What is in there may be somebody else's to change: no link is followed.
fn enter(root: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))
}

fn children(directory: &OwnedFd) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(mounts::path_of_fd(directory.as_fd())) else { return Vec::new() };
    let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| PathBuf::from(entry.file_name())).collect()
}

impl Machine {
    /// From now on the host's changes in these volumes raise events in the guest. On a task: no start waits for this.
    pub fn watch(self: &Arc<Self>, volumes: Vec<PathBuf>) {
        let machine = Arc::clone(self);
        if !volumes.is_empty() {
            tokio::spawn(async move {
                if let Err(e) = machine.try_watch(volumes).await {
                    log::warn!("changes of files by the host raise no events: {e}");
                }
            });
        }
    }

    async fn try_watch(&self, volumes: Vec<PathBuf>) -> Result<()> {
        let agent = self.agent().await?;
        let mut watcher = self.watcher.lock().await;
        if watcher.is_none() {
            let started = Watcher::start(self.share.root(), agent.clone());
            *watcher = Some(started.map_err(|e| Error::io("inotify", &e))?);
        }
        let Some(watcher) = &*watcher else { return Ok(()) };
        watcher.add(volumes).await
    }

    /// A container has no root and no volumes any more.
    pub async fn remove_from_share(&self, id: String) {
        let removed = Arc::clone(&self.share).remove_beside(id).await;
        if let Some(watcher) = &*self.watcher.lock().await {
            removed.iter().for_each(|volume| watcher.remove(volume));
        }
    }
}

#[cfg(test)]
#[path = "watch/tests.rs"]
mod tests;
