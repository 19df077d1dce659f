//! virtio-fs (virtio 1.2, 5.11): the pod's shared directory, served by virtiofsd's passthrough file system inside this
//! process.
//!
//! Wiring: `Fs::new(tag, proc_self_fd)`, in the jail, whose root is what is shared. `proc_self_fd` is a mount of
//! /proc/self/fd alone, made by the process that then stays before it entered the jail's root (`own_descriptors` in
//! `jail.rs`): virtiofsd opens inodes through it. RLIMIT_NOFILE must have its final value, since each inode that the
//! guest knows costs a descriptor. The threads start here and confine themselves by the seccomp filter for
//! [`Kind::Fs`].
//!
//! Several threads serve the queues, because a request can block for long: an fsync, a network file system. Each
//! takes one chain at a time and first sees to it that another thread wakes up for the next one. When all of them have
//! been blocked for a while, another thread comes ([`threads`]): who waits for a server that is gone must not hold up
//! the rest of the pod, the agent first of all.

mod acl;
mod cache;
mod checks;
mod host;
mod inode_flags;
mod inode_table;
mod messages;
mod replay;
mod shown;
mod threads;
mod transfer;
mod unnamed;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::resource::{Resource, getrlimit};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::passthrough::{self, CachePolicy, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use vmm_sys_util::epoll::EpollEvent;

use self::host::Host;
use self::messages::Messages;
use super::base::{self, Event, Sources};
use super::queue::DeviceQueue;
use super::{Activation, VirtioDevice};
use crate::memory::GuestMemory;
use crate::seccomp;
use crate::sync::lock;

/// High priority requests (FORGET and INTERRUPT), and all others. Linux limits requests by the size of the
/// queue: this one has room for 256 pages and headers.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUESTS: usize = 1;
const TAG_LENGTH: usize = 36;
/// Descriptors that the guest's files leave to the rest of the process: vsock connections, disks, taps.
const RESERVED_DESCRIPTORS: u64 = 8192;
/// How long the guest may use what it knows about names and attributes. The host changes files as well: mounts of
/// later containers, ConfigMaps, `cp`.
const CACHE_TIME: Duration = Duration::from_secs(1);
/// How long a reset waits for requests that are under way.
const RESET_PATIENCE: Duration = Duration::from_secs(5);

type Inode = u64;
type Handle = u64;

/// The file server.
pub struct Fs {
    shared: Arc<Shared>,
    config: [u8; TAG_LENGTH + 4],
}

struct Shared {
    messages: Messages,
    sources: Sources,
    state: Mutex<State>,
    /// Signalled when no request is under way.
    idle: Condvar,
    /// Signalled when each thread has a request.
    busy: Condvar,
}

#[derive(Default)]
struct State {
    session: Option<Session>,
    /// Counts activations and resets: a request of an earlier session has nobody to answer to.
    number: u64,
    /// Requests under way.
    in_flight: usize,
    /// Counts requests that have come to their end.
    finished: u64,
    /// Threads that serve.
    threads: usize,
    stopped: bool,
}

struct Session {
    memory: Arc<GuestMemory>,
    queues: Vec<DeviceQueue>,
}

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a request in memory that is not there: {0}")]
    Memory(#[from] virtiofsd::descriptor_utils::Error),
    #[error("a request that makes no sense: {0}")]
    Request(#[from] virtiofsd::Error),
}

impl Fs {
    /// A server of the root directory, known to the guest as `tag`.
    ///
    /// # Errors
    /// When the tag is too long or a thread cannot be started and confined.
    pub fn new(tag: &str, proc_self_fd: OwnedFd) -> io::Result<Self> {
        let (descriptors, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let descriptors = descriptors - RESERVED_DESCRIPTORS.min(descriptors / 2);
        let confine = |kind| seccomp::install(kind).map_err(io::Error::other);
        Self::serve(tag, "/", proc_self_fd, descriptors, confine)
    }

    fn serve(
        tag: &str,
        root: &str,
        proc_self_fd: OwnedFd,
        descriptors: u64,
        confine: threads::Confine,
    ) -> io::Result<Self> {
        let mut config = [0; TAG_LENGTH + 4];
        if tag.is_empty() || tag.len() > TAG_LENGTH {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("file system tag {tag:?}")));
        }
        // num_request_queues
        let numbers = [(0, tag.as_bytes()), (TAG_LENGTH, &[1, 0, 0, 0])];
        for (offset, bytes) in numbers {
            config.iter_mut().skip(offset).zip(bytes).for_each(|(to, from)| *to = *from);
        }
        let again = File::from(proc_self_fd.try_clone()?);
        // It clears the umask, which the threads then inherit.
        let host = Host::new(PassthroughFs::new(configuration(root, proc_self_fd, descriptors))?, again);
        let shared = Arc::new(Shared {
            messages: Messages::new(host),
            sources: Sources::new()?,
            state: Mutex::default(),
            idle: Condvar::new(),
            busy: Condvar::new(),
        });
        let fs = Self { shared, config };
        threads::start(&fs.shared, confine)?;
        Ok(fs)
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        lock(&self.shared.state).stopped = true;
        self.shared.busy.notify_all();
        self.shared.sources.wake();
    }
}

/// `descriptors` is the most that the guest's files may take; beyond, they fail with ENFILE.
fn configuration(root: &str, proc_self_fd: OwnedFd, descriptors: u64) -> passthrough::Config {
    passthrough::Config {
        entry_timeout: CACHE_TIME,
        attr_timeout: CACHE_TIME,
        // Close-to-open: what the host writes is seen by the next open in the guest.
        cache_policy: CachePolicy::Auto,
        // The guest would not see what the host appends, nor the host what the guest keeps.
        writeback: false,
        root_dir: root.to_owned(),
        xattr: true,
        proc_sfd_rawfd: Some(File::from(proc_self_fd)),
        // Each container's root file system and each volume is a mount of its own: without this, their inode
        // numbers collide.
        announce_submounts: true,
        // A file handle cannot be opened without capabilities in the host's user namespace.
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        allow_direct_io: true,
        // Otherwise the guest asks for security.capability before each write.
        killpriv_v2: true,
        // A guest that does not know ACLs would let in whom they keep out.
        posix_acl: NegotiationMode::Always,
        // The guest's kernel has looked whether its user may, and the jail's root may as well.
        clean_noatime: false,
        guest_fd_limit: descriptors,
        ..passthrough::Config::default()
    }
}

impl Shared {
    fn wait_and_serve(&self) {
        let mut events = [EpollEvent::default()];
        loop {
            // All threads wait here. The sources are edge-triggered, so each event wakes one of them.
            match self.sources.epoll().wait(-1, &mut events) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return log::error!("fs: epoll: {error}"),
            }
            match base::decode(&events[0]) {
                Event::Queue(index) => self.serve(index),
                Event::Wake => {
                    let state = lock(&self.state);
                    if state.stopped {
                        return self.sources.wake();
                    }
                    self.sources.follow(state.session.as_ref().map_or(&[], |session| &session.queues));
                }
                Event::Other { .. } => {}
            }
        }
    }

    /// Serves chains of a queue until there is none, or a malformed one.
    fn serve(&self, index: usize) {
        loop {
            let mut state = lock(&self.state);
            let number = state.number;
            let Some(session) = &mut state.session else { return };
            let memory = session.memory.clone();
            let Some(queue) = session.queues.get_mut(index) else { return };
            let Some(chain) = queue.pop_raw(&memory) else {
                // More have come, or lie behind a malformed one: another turn's.
                if queue.sleep(&memory) {
                    queue.kick_again();
                }
                // For the malformed chains that went back.
                return queue.interrupt(&memory);
            };
            // This thread may now be busy for long: somebody has to look after the next chain, be it there or not.
            if queue.sleep(&memory) {
                queue.kick_again();
            }
            state.in_flight += 1;
            if state.in_flight == state.threads {
                self.busy.notify_one();
            }
            drop(state);
            let head = chain.head_index();
            let result = self.handle(&memory, &chain);
            self.finish(number, index, head, result);
        }
    }

    /// Answers a request: the length of the answer, and what is wrong with the request.
    fn handle(&self, memory: &GuestMemory, chain: &DescriptorChain<&GuestMemory>) -> (usize, Option<Error>) {
        let ends = || Ok((Reader::new(memory, chain.clone())?, Writer::new(memory, chain.clone())?));
        let answered = ends().and_then(|(reader, writer)| Ok(self.messages.handle(reader, writer)?));
        let Err(error) = answered else { return (answered.unwrap_or(0), None) };
        let refused = ends().ok().and_then(|(reader, writer)| messages::refuse(reader, writer).ok());
        (refused.unwrap_or(0), Some(error))
    }

    fn finish(&self, number: u64, index: usize, head: u16, (length, error): (usize, Option<Error>)) {
        let mut state = lock(&self.state);
        state.in_flight -= 1;
        state.finished += 1;
        if state.in_flight == 0 {
            self.idle.notify_all();
        }
        if state.number != number {
            return;
        }
        if let Some(session) = &mut state.session
            && let Some(queue) = session.queues.get_mut(index)
        {
            if let Some(error) = error {
                queue.complaints().add(&error);
            }
            queue.push(&session.memory, head, u32::try_from(length).unwrap_or(0));
            queue.interrupt(&session.memory);
        }
    }

    fn set_session(&self, session: Option<Session>) {
        let mut state = lock(&self.state);
        state.session = session;
        state.number += 1;
        drop(state);
        self.sources.wake();
    }

    /// Waits until no request can write to the guest's memory any more.
    fn wait_until_idle(&self) {
        let state = lock(&self.state);
        let waited = self.idle.wait_timeout_while(state, RESET_PATIENCE, |state| state.in_flight > 0);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            log::warn!("fs: {} requests are still under way after a reset", state.in_flight);
        }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn busy_queues(&self) -> &[usize] {
        &[REQUESTS]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        base::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, queues, .. } = activation;
        let queues = queues.into_iter().map(|queue| DeviceQueue::new(queue, "fs")).collect();
        self.shared.set_session(Some(Session { memory: Arc::new(memory), queues }));
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_session(None);
        self.shared.wait_until_idle();
        // Files and inodes of the guest that is gone.
        self.shared.messages.destroy();
    }
}

/// The device's events are served by threads of its own.
impl MutEventSubscriber for Fs {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

#[cfg(test)]
mod tests;
