//! How the VM ended: reported once, by the thread that saw it, to the main thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sync::lock;

/// What a vCPU can see of an end; whether a reset follows a panic is read from the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest asked for a reset.
    Reset,
    /// The shim closed the control socket.
    Stopped,
    /// The vCPU shut down: a triple fault.
    TripleFault,
    /// KVM or the VMM could not continue.
    Internal(String),
}

/// The end of the VM; the first report wins.
pub struct End {
    reason: Mutex<Option<Ended>>,
    event: EventFd,
}

impl End {
    /// No end yet.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { reason: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// The VM has ended.
    pub fn reach(&self, reason: Ended) {
        lock(&self.reason).get_or_insert(reason);
        // Fails only when the counter is full, and then the reader has been woken already.
        let _ = self.event.write(1);
    }

    /// The reason, once there is one.
    pub fn reached(&self) -> Option<Ended> {
        lock(&self.reason).clone()
    }
}

impl AsRawFd for End {
    /// Readable when the VM has ended.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
