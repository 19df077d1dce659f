//! What every device has that runs on the device thread: its event sources, and its queues while it is active.
//!
//! A device is activated and reset on a vCPU's thread, whose seccomp filter knows no epoll. So the sources of a
//! device are an epoll instance of its own, which the event manager watches from the start, and the kicks of
//! its queues enter and leave it on the device thread, at [`Base::events`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::DeviceQueue;
use super::{Activation, Interrupt};
use crate::memory::GuestMemory;
use crate::sync::lock;

/// Tokens from here on are those of [`Sources`]; a device uses smaller ones.
pub const FIRST_RESERVED_TOKEN: u64 = 0xffff_ffff_0000_0000;
const WAKE: u64 = u64::MAX;

/// A source that is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Somebody called [`Sources::wake`].
    Wake,
    /// The driver kicked this queue.
    Queue(usize),
    /// One of the device's own sources.
    Other {
        /// What the device called it.
        token: u64,
        /// What it is ready for.
        ready: EventSet,
    },
}

/// The event sources of one device. All are edge-triggered: an eventfd need not be read, and a socket or tap that
/// is not served at once does not spin.
pub struct Sources {
    epoll: Epoll,
    wake: EventFd,
    /// The kicks that are watched; kept open until they are watched no longer.
    kicks: Mutex<Vec<Arc<EventFd>>>,
}

impl Sources {
    /// No source yet but the one for [`Self::wake`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let sources =
            Self { epoll: Epoll::new()?, wake: EventFd::new(EFD_NONBLOCK)?, kicks: Mutex::default() };
        sources.control(ControlOperation::Add, &sources.wake, EventSet::IN, WAKE)?;
        Ok(sources)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        set: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(set | EventSet::EDGE_TRIGGERED, token))
    }

    /// Adds a source; closing its descriptor takes it away.
    ///
    /// # Errors
    /// When it is there already or cannot be watched.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, set: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, &fd, set, token)
    }

    /// Changes token and interest of a source, and reports anew what it is ready for.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, set: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, &fd, set, token)
    }

    /// Causes [`Event::Wake`]. From any thread.
    pub fn wake(&self) {
        // Only a full counter could fail it, and that one wakes as well.
        let _ = self.wake.write(1);
    }

    /// Watches the kicks of these queues from now on, and no others.
    pub fn follow(&self, queues: &[DeviceQueue]) {
        let mut kicks = lock(&self.kicks);
        for kick in kicks.drain(..) {
            // It is watched, or adding it failed.
            let _ = self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default());
        }
        for (token, queue) in (FIRST_RESERVED_TOKEN..).zip(queues) {
            match self.control(ControlOperation::Add, queue.kick().as_ref(), EventSet::IN, token) {
                Ok(()) => kicks.push(queue.kick().clone()),
                Err(error) => log::error!("a queue's kick cannot be watched: {error}"),
            }
        }
    }

    /// The descriptor that is readable when a source is ready.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }
}

/// What an event of a [`Sources`]' epoll says.
pub fn decode(event: &EpollEvent) -> Event {
    match event.data() {
        WAKE => Event::Wake,
        token @ FIRST_RESERVED_TOKEN.. => Event::Queue((token - FIRST_RESERVED_TOKEN) as usize),
        token => Event::Other { token, ready: event.event_set() },
    }
}

/// What a device knows while its driver uses it.
pub struct Active {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The features in use.
    pub features: u64,
    /// The queues; the driver may have left out some at the end.
    pub queues: Vec<DeviceQueue>,
    config_interrupt: Interrupt,
}

/// The part that devices have in common.
pub struct Base {
    name: &'static str,
    sources: Sources,
    active: Option<Active>,
    /// Whether `active` changed since the sources were updated.
    changed: bool,
}

impl Base {
    /// A device that nobody uses yet; its name is for the log.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(name: &'static str) -> io::Result<Self> {
        Ok(Self { name, sources: Sources::new()?, active: None, changed: false })
    }

    /// The device's own event sources.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Has the event manager watch this device.
    pub fn init(&self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.sources.epoll, EventSet::IN)) {
            log::error!("{}: its events cannot be watched: {error}", self.name);
        }
    }

    /// The driver is ready.
    pub fn activate(&mut self, activation: Activation) {
        let Activation { memory, features, queues, config_interrupt } = activation;
        let queues = queues.into_iter().map(|queue| DeviceQueue::new(queue, self.name)).collect();
        self.active = Some(Active { memory, features, queues, config_interrupt });
        self.changed = true;
        self.sources.wake();
    }

    /// The driver is gone.
    pub fn reset(&mut self) {
        self.active = None;
        self.changed = true;
        self.sources.wake();
    }

    /// What a device has while it is used.
    pub fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    /// The event sources, and what a device has while it is used.
    pub fn split(&mut self) -> (&Sources, Option<&mut Active>) {
        (&self.sources, self.active.as_mut())
    }

    /// Queue number `index` with the memory it works on, if the driver uses it.
    pub fn queue(&mut self, index: usize) -> Option<(&GuestMemory, &mut DeviceQueue)> {
        let active = self.active.as_mut()?;
        Some((&active.memory, active.queues.get_mut(index)?))
    }

    /// Notifies the driver that the configuration changed.
    pub fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.config_interrupt.trigger();
        }
    }

    /// The sources that are ready; more than fit here make the event manager call again.
    pub fn events(&mut self) -> impl Iterator<Item = Event> + use<> {
        if std::mem::take(&mut self.changed) {
            self.sources.follow(self.active.as_ref().map_or(&[], |active| &active.queues));
        }
        let mut events = [EpollEvent::default(); 32];
        // It cannot fail in a way that waiting again would mend.
        let count = self.sources.epoll.wait(0, &mut events).unwrap_or(0);
        events.into_iter().take(count).map(|event| decode(&event))
    }
}

/// Answers a read of the configuration space; beyond its end there are zeros.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let config = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = config.get(index).copied().unwrap_or(0);
    }
}
