//! A disk's thread. It alone uses the disk's file and the slot's queue, so that a disk that is slow, or a driver that
//! kicks all the time, holds up nobody else.
//!
//! What it is to do stands in [`Orders`], which others only lock for a moment; they never wait for the disk. With a
//! queue to serve, the thread waits for that queue's kick, by which it is woken for orders as well; without one, or
//! while a request waits for room on the host ([`super::patience`]), for a change of the orders. It ends when it has
//! neither disk nor queue, and there is none until a disk is attached. A driver that keeps its queue when the disk has
//! gone gets an error for each request.

use std::io;
use std::mem::take;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::disk::{Disk, request};
use super::slot::{Serial, Slot, name};
use crate::memory::GuestMemory;
use crate::seccomp::{self, Kind};
use crate::sync::lock;
use crate::virtio::queue::DeviceQueue;

/// Bytes of its stack. Small ones lie next to each other, which saves page tables.
const STACK: usize = 256 * 1024;

/// Does something on a thread that may start others. It may also drop it, undone.
pub type Starter = Arc<dyn Fn(Box<dyn FnOnce() + Send>) + Send + Sync>;
/// Called when nobody uses a disk's file any more.
pub type Detached = Box<dyn FnOnce() + Send>;

/// Why a disk has no thread.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One disk for each slot.
    #[error("it is in use")]
    InUse,
    /// The host.
    #[error("thread for a disk: {0}")]
    Thread(#[source] io::Error),
}

/// A queue with the memory it works on.
pub struct Served {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queue.
    pub queue: DeviceQueue,
}

/// A slot's thread, while there is one, and what it is to do.
pub struct Worker {
    serial: Serial,
    orders: Mutex<Orders>,
    /// Signalled when they change.
    changed: Condvar,
}

#[derive(Default)]
struct Orders {
    /// Whether there is a thread.
    runs: bool,
    /// Whether a disk was attached that is not closed yet.
    occupied: bool,
    /// The disk that is to be used from now on.
    disk: Option<Disk>,
    /// The queue that is to be served from now on.
    queue: Option<Served>,
    /// The kick of the queue that is served.
    serves: Option<Arc<EventFd>>,
    /// Whether that queue is to be left.
    leave: bool,
    /// Whether the queue and its memory are in use just now, and not only waited for.
    busy: bool,
    /// Whose disk is to be closed.
    detached: Vec<Detached>,
}

impl Orders {
    /// Whether disk and queue are to be used further.
    fn go_on(&self) -> bool {
        !self.leave && self.detached.is_empty()
    }
}

impl Worker {
    /// Of a slot without a disk.
    pub fn new(serial: Serial) -> Self {
        Self { serial, orders: Mutex::default(), changed: Condvar::new() }
    }

    /// Takes a disk, and serves it when this returns.
    ///
    /// # Errors
    /// When there is one, or the host has no thread for it.
    pub fn attach(self: &Arc<Self>, disk: Disk, starter: &Starter) -> Result<(), Error> {
        let mut orders = lock(&self.orders);
        if orders.occupied {
            return Err(Error::InUse);
        }
        (orders.occupied, orders.disk) = (true, Some(disk));
        if orders.runs {
            self.wake(orders);
            return Ok(());
        }
        orders.runs = true;
        drop(orders);
        self.start(starter).map_err(|error| {
            let mut orders = lock(&self.orders);
            (orders.occupied, orders.runs, orders.disk) = (false, false, None);
            Error::Thread(error)
        })
    }

    fn start(self: &Arc<Self>, starter: &Starter) -> io::Result<()> {
        let (sender, started) = channel();
        let (worker, failed) = (self.clone(), sender.clone());
        let body = move || {
            let confined = seccomp::install(Kind::Disk).map_err(io::Error::other);
            let is_confined = confined.is_ok();
            let _ = sender.send(confined);
            if is_confined {
                worker.run();
            }
        };
        let name = name(&self.serial).into_owned();
        starter(Box::new(move || {
            let thread = thread::Builder::new().name(name).stack_size(STACK);
            if let Err(error) = thread.spawn(body) {
                let _ = failed.send(Err(error));
            }
        }));
        started.recv().unwrap_or_else(|_| Err(io::Error::other("none can be started any more")))
    }

    /// Has the disk closed once the request that is under way has ended, which waits for room no longer; `detached` is
    /// called then. All further requests fail.
    pub fn detach(&self, detached: Detached) {
        let mut orders = lock(&self.orders);
        if orders.occupied {
            orders.detached.push(detached);
            self.wake(orders);
        } else {
            drop(orders);
            detached();
        }
    }

    /// Has a queue served, as soon as there is a disk.
    pub fn activate(&self, served: Served) {
        let mut orders = lock(&self.orders);
        orders.queue = Some(served);
        self.wake(orders);
    }

    /// Has no queue served any more.
    pub fn reset(&self) {
        let mut orders = lock(&self.orders);
        orders.queue = None;
        orders.leave = orders.serves.is_some();
        self.wake(orders);
    }

    /// Whether nothing is done any more with queues of before the last reset. A thread that only waits for one leaves it
    /// untouched when it wakes up: a driver that resets an idle disk need not wait for that.
    pub fn at_rest(&self) -> bool {
        let orders = lock(&self.orders);
        !(orders.leave && orders.busy)
    }

    fn wake(&self, orders: MutexGuard<'_, Orders>) {
        let serves = orders.serves.clone();
        // Otherwise it would wake up only to wait for the lock.
        drop(orders);
        if let Some(kick) = serves {
            // Only a full counter could hold it up, and nobody counts that far.
            let _ = kick.write(1);
        }
        self.changed.notify_one();
    }

    /// The thread.
    fn run(&self) {
        let (mut disk, mut served) = (None, None);
        while let Some(Served { memory, queue }) = self.follow_orders(&mut disk, &mut served) {
            let interrupt = queue.interrupt_of_driver().clone();
            let pause = |time| {
                // For what has been answered: it does not wait along.
                interrupt.trigger();
                self.pause(time)
            };
            let slot = Slot { serial: &self.serial, pause: &pause };
            queue.serve(memory, |chain| request(chain, disk.as_mut().filter(|_| self.goes_on()), &slot));
            lock(&self.orders).busy = false;
            while let Err(error) = queue.kick().read() {
                if error.kind() != io::ErrorKind::Interrupted {
                    log::error!("blk: a queue's kick: {error}");
                    break;
                }
            }
        }
    }

    /// Whether the driver and the host want the disk to be used still.
    fn goes_on(&self) -> bool {
        lock(&self.orders).go_on()
    }

    /// Lets time pass while they do; answers whether they still do.
    fn pause(&self, time: Duration) -> bool {
        let orders = lock(&self.orders);
        let paused = self.changed.wait_timeout_while(orders, time, |orders| orders.go_on());
        paused.unwrap_or_else(PoisonError::into_inner).0.go_on()
    }

    /// Does what has been ordered until there is a queue to serve. None at the end.
    fn follow_orders<'s>(
        &self,
        disk: &mut Option<Disk>,
        served: &'s mut Option<Served>,
    ) -> Option<&'s mut Served> {
        let mut orders = lock(&self.orders);
        loop {
            if take(&mut orders.leave) {
                (*served, orders.serves) = (None, None);
            }
            if let Some(queue) = orders.queue.take() {
                orders.serves = Some(queue.queue.kick().clone());
                *served = Some(queue);
            }
            if let Some(attached) = orders.disk.take() {
                *disk = Some(attached);
            }
            if !orders.detached.is_empty() {
                drop(orders);
                *disk = None;
                self.report_closed();
                orders = lock(&self.orders);
            } else if served.is_some() {
                orders.busy = true;
                return served.as_mut();
            } else if disk.is_none() {
                orders.runs = false;
                return None;
            } else {
                orders = self.wait(orders);
            }
        }
    }

    fn wait<'o>(&self, orders: MutexGuard<'o, Orders>) -> MutexGuard<'o, Orders> {
        self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk is closed.
    fn report_closed(&self) {
        let mut orders = lock(&self.orders);
        orders.occupied = false;
        let detached = take(&mut orders.detached);
        drop(orders);
        detached.into_iter().for_each(|detached| detached());
    }
}
