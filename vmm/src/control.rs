//! The control socket: what the shim asks while the VM runs, and what is reported to it.

use std::collections::HashMap;
use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use katana_protocol::vmm::{CONTROL_FD, Error, Event, Request, receive, send};
use nix::sys::socket::{setsockopt, sockopt::SendTimeout};
use nix::sys::time::TimeVal;

use crate::console_ring::ConsoleRing;
use crate::counters;
use crate::end::{End, Ended};
use crate::error;
use crate::machine::Slots;
use crate::placeholder::{self, Placeholder};
use crate::sync::lock;
use crate::vcpus::{self, Wanted};
use crate::virtio::{blk, net};

/// How long a shim may leave its messages unread before they are lost: the guest's devices wait meanwhile.
const PATIENCE: TimeVal = TimeVal::new(5, 0);

/// The VMM's end of the socket.
#[derive(Clone)]
pub struct Control(Arc<OwnedFd>);

impl Control {
    /// Takes the inherited descriptor. To be called once.
    ///
    /// # Errors
    /// When there is none.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: fcntl only looks whether the descriptor is open.
        if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open, and by contract with the shim it is ours alone.
        let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
        setsockopt(&socket, SendTimeout, &PATIENCE)?;
        Ok(Self(Arc::new(socket)))
    }

    /// Reports an event to the shim.
    ///
    /// # Errors
    /// When it is gone.
    pub fn report(&self, event: &Event) -> Result<(), Error> {
        send(&*self.0, event, &[])
    }

    /// Reports to the shim that the vCPUs run, and gives it a descriptor of the machine in the kernel.
    ///
    /// # Errors
    /// When it is gone.
    pub fn report_running(&self, vm: BorrowedFd<'_>) -> Result<(), Error> {
        send(&*self.0, &Event::Running, &[vm])
    }

    /// Hands the shim a stream that the guest opened.
    ///
    /// # Errors
    /// When it is gone.
    pub fn hand_over(&self, port: u32, stream: BorrowedFd<'_>) -> Result<(), Error> {
        send(&*self.0, &Event::Connection { port }, &[stream])
    }

    /// Answers a request that has nothing else to say.
    ///
    /// # Errors
    /// When the shim is gone.
    pub fn answer(&self, result: Result<(), impl Display>) -> Result<(), Error> {
        self.report(&Event::Done(result.err().map(|error| error.to_string())))
    }

    /// The next request. Waits for it.
    ///
    /// # Errors
    /// When the shim is gone, or sends nonsense.
    pub fn next(&self) -> Result<(Request, Vec<OwnedFd>), Error> {
        receive(&*self.0)
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the VM runs already")]
    Running,
    #[error("request without its descriptor")]
    Descriptor,
    #[error("disk slot {0}: there is no such slot")]
    NoDisk(u8),
    #[error("network slot {0}: there is no such slot")]
    NoNet(u8),
    #[error("disk slot {slot}: {error}")]
    Disk { slot: u8, error: blk::AttachError },
    #[error("network slot {slot}: {error}")]
    Net { slot: u8, error: net::AttachError },
    #[error(transparent)]
    Show(#[from] error::Error),
    #[error(transparent)]
    Placeholder(#[from] placeholder::Error),
    #[error("thread {0}: does not stand for a container")]
    NoThread(i32),
    #[error("there can be no more vCPUs")]
    NoVcpus,
}

/// Serves requests on the event loop.
pub struct ControlService {
    control: Control,
    slots: Slots,
    console: ConsoleRing,
    end: Arc<End>,
    /// By their ids.
    placeholders: HashMap<i32, Placeholder>,
}

impl ControlService {
    /// A service for these slots, which ends the VM when the shim is gone.
    pub fn new(control: Control, slots: Slots, console: ConsoleRing, end: Arc<End>) -> Self {
        Self { control, slots, console, end, placeholders: HashMap::new() }
    }

    fn serve(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Result<(), Error> {
        let mut fds = fds.into_iter();
        let fd = fds.next().ok_or(Refused::Descriptor);
        let result = match *request {
            Request::Boot(_) => Err(Refused::Running),
            Request::AttachDisk { slot, read_only } => {
                fd.and_then(|fd| self.attach_disk(slot, read_only, fd))
            }
            Request::DetachDisk { slot } => match self.detach_disk(slot) {
                Ok(()) => return Ok(()),
                Err(error) => Err(error),
            },
            Request::AttachNet { slot, mac, pairs } => {
                let mut taps: Vec<_> = fd.into_iter().chain(fds).collect();
                let vhosts = taps.split_off(usize::from(pairs).min(taps.len()));
                self.attach_net(slot, mac, taps, vhosts)
            }
            Request::AddPlaceholder => match self.add_placeholder() {
                Ok(thread) => return self.control.report(&Event::PlaceholderAdded { thread }),
                Err(error) => Err(error),
            },
            Request::Console => return self.control.report(&Event::Console(self.console.tail())),
            Request::Counts => return self.control.report(&Event::Counts(counters::all())),
            Request::RemovePlaceholder { thread } => {
                self.placeholders.remove(&thread).map(Placeholder::end).ok_or(Refused::NoThread(thread))
            }
            Request::AddVcpus { count } => {
                let control = self.control.clone();
                // The answer comes from the thread that makes them.
                let answer = move |made: Result<(), vcpus::Error>| {
                    if let Err(error) = control.answer(made) {
                        log::warn!("control socket: {error}");
                    }
                };
                match self.slots.starter.send(Wanted::Vcpus(count, Box::new(answer))) {
                    Ok(()) => return Ok(()),
                    Err(_) => Err(Refused::NoVcpus),
                }
            }
            Request::PlugMemory { mib } => {
                // The answer comes from the device, once the guest has followed.
                match &self.slots.memory {
                    Some(memory) => lock(memory).request(mib.saturating_mul(1 << 20)),
                    None => log::warn!("{mib} MiB are to be plugged, and no memory can be"),
                }
                return Ok(());
            }
            Request::Connect { port } => {
                // The answer is the connection itself: it opens, or it is closed.
                let Ok(fd) = fd else { return Ok(()) };
                if let Err(error) = lock(&self.slots.vsock).connect(port, fd) {
                    log::warn!("connection to port {port} of the guest: {error}");
                }
                return Ok(());
            }
        };
        self.control.answer(result)
    }

    fn attach_disk(&self, slot: u8, read_only: bool, fd: OwnedFd) -> Result<(), Refused> {
        let disk = self.slots.disks.get(usize::from(slot)).ok_or(Refused::NoDisk(slot))?;
        lock(&disk.device).attach(fd.into(), read_only).map_err(|error| Refused::Disk { slot, error })?;
        Ok(disk.show().inspect_err(|_| lock(&disk.device).detach(Box::new(|| ())))?)
    }

    /// The answer comes from the disk's thread, when it has closed the disk: until then, what is under way may still
    /// change it.
    fn detach_disk(&self, slot: u8) -> Result<(), Refused> {
        let disk = self.slots.disks.get(usize::from(slot)).ok_or(Refused::NoDisk(slot))?;
        disk.hide();
        let control = self.control.clone();
        lock(&disk.device).detach(Box::new(move || {
            if let Err(error) = control.answer(Ok::<_, Refused>(())) {
                log::warn!("control socket: {error}");
            }
        }));
        Ok(())
    }

    fn attach_net(
        &self,
        slot: u8,
        mac: [u8; 6],
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
    ) -> Result<(), Refused> {
        let net = self.slots.nets.get(usize::from(slot)).ok_or(Refused::NoNet(slot))?;
        lock(&net.device).attach(taps, mac, vhosts).map_err(|error| Refused::Net { slot, error })?;
        Ok(net.show()?)
    }

    fn add_placeholder(&mut self) -> Result<i32, Refused> {
        let placeholder = Placeholder::start()?;
        let id = placeholder.id();
        self.placeholders.insert(id, placeholder);
        Ok(id)
    }
}

impl MutEventSubscriber for ControlService {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.control, EventSet::IN)) {
            log::error!("control socket: {error}");
            std::process::exit(1);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let served = self.control.next().and_then(|(request, fds)| self.serve(&request, fds));
        match served {
            Ok(()) => {}
            // The shim is gone, or it has closed its half and waits for the last lines of the console.
            Err(Error::Closed | Error::Socket(_)) => self.end.reach(Ended::Stopped),
            Err(error) => log::error!("control request: {error}"),
        }
    }
}
