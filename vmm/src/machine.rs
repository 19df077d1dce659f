//! The machine: what is in it, in which order it is built, and its life until the end.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use katana_protocol::SHARE_TAG;
use katana_protocol::vmm::{ExitReason, MOST_VCPUS, Machine as Shape, Template};
use kvm_ioctls::VmFd;

use crate::board::{Board, Files};
use crate::bus::{Bus, Overlap};
use crate::console_ring::ConsoleRing;
use crate::end::{End, Ended};
use crate::error::Error;
use crate::i8042::{self, I8042};
use crate::jail::Jail;
use crate::kvm::{self, Vm};
use crate::memory::{self, BARS, GuestMemory, Pluggable};
use crate::pci::{self, BAR_SIZE, PciBus, RestoreError, TemplateRegister, VirtioPci};
use crate::seccomp::{self, Kind};
use crate::serial::{self, Serial};
use crate::sync::lock;
use crate::template::{self, Maker, State};
use crate::vcpu::Vcpu;
use crate::vcpus::{Starter, Wanted};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{self, Blk};
use crate::virtio::console::Console;
use crate::virtio::fs::Fs;
use crate::virtio::mem::{Mem, OnPlugged};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Incoming, Vsock};

/// Called with the result of making a template.
pub type Made = Box<dyn FnOnce(Result<(), template::Error>) + Send>;

type Loop = EventManager<Box<dyn MutEventSubscriber>>;

/// The devices that the shim can reach while the VM runs.
pub struct Slots {
    /// The stream sockets.
    pub vsock: Arc<Mutex<Vsock>>,
    /// Disk slots.
    pub disks: Vec<Slot<Blk>>,
    /// Network slots.
    pub nets: Vec<Slot<Net>>,
    /// Memory that can be plugged, if there is any.
    pub memory: Option<Arc<Mutex<Mem>>>,
    /// Takes requests for more vCPUs and threads, if there can be more.
    pub starter: Sender<Wanted>,
}

/// A slot for a disk or a NIC, which the guest sees once something is attached. An empty one costs no driver's
/// start; a NIC's driver asks for address and link then, a disk's for whether it can be written to, and a NIC without a
/// network would be one more interface in every container.
pub struct Slot<D> {
    /// The device.
    pub device: Arc<Mutex<D>>,
    function: Arc<VirtioPci>,
    vm: Arc<VmFd>,
    bar: u32,
}

impl<D> Slot<D> {
    /// Has the guest find the device when it looks.
    ///
    /// # Errors
    /// When KVM has no room for its doorbells, or the process is out of descriptors.
    pub fn show(&self) -> Result<(), Error> {
        self.function.show().map_err(|error| Error::Host { what: "eventfd", error })?;
        kvm::add_doorbells(&self.vm, &self.function.doorbells(self.bar))
            .inspect_err(|_| self.function.hide())?;
        Ok(())
    }

    /// Has the guest find nothing any more.
    pub fn hide(&self) {
        self.function.hide();
        kvm::remove_doorbells(&self.vm, &self.function.doorbells(self.bar));
    }
}

/// A machine that is built but does not run yet.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vec<Vcpu>,
    starter: Option<(Starter, Receiver<Wanted>)>,
    events: Loop,
    console: ConsoleRing,
    end: Arc<End>,
}

impl Machine {
    /// Builds the machine; returns it and what can be attached to. `incoming` is called for every stream that the guest
    /// opens, `plugged` with the bytes that are plugged, `made` when a template is made, cannot be made, or is refused.
    ///
    /// # Errors
    /// When something is missing or wrong; the text names it.
    pub fn build(
        shape: &Shape,
        mut files: Files,
        jail: Jail,
        incoming: Incoming,
        plugged: OnPlugged,
        made: Made,
    ) -> Result<(Self, Slots), Error> {
        if !(1..=shape.max_vcpus).contains(&shape.vcpus) || shape.max_vcpus > MOST_VCPUS {
            return Err(Error::Vcpus(shape.vcpus, shape.max_vcpus));
        }
        let (board, beginning) = board(shape, &mut files)?;
        let Board { vm, memory, pluggable, image, vcpus, maker: vcpu_maker } = board;

        let console = ConsoleRing::new(shape.debug);
        let pluggable = pluggable.map(|range| Pluggable::new(memory.clone(), range)).transpose();
        let pluggable = pluggable.map_err(|error| Error::Host { what: "memory to be plugged", error })?;
        let mut devices = Devices::new(vm, memory)?;
        let output = console.clone();
        devices.add("virtio-console", Console::new(Arc::new(move |bytes| output.push(bytes))))?;
        devices.add("virtio-pmem", Pmem::new(image.0, image.1))?;
        devices.add("virtio-fs", Fs::new(SHARE_TAG, jail.proc_self_fd))?;
        let incoming = after_template(devices.register.clone(), incoming);
        let vsock = devices.add("virtio-vsock", Vsock::new(shape.guest_cid, incoming))?;
        devices.add("virtio-rng", Rng::new())?;
        devices.add("virtio-balloon", Balloon::new())?;
        let memory =
            pluggable.map(|range| devices.add("virtio-mem", Mem::new(range, plugged))).transpose()?;
        let (sender, wanted) = channel();
        let start = starter_of(&sender);
        let disk = |slot| devices.add_slot("virtio-blk", Ok(Blk::new(&format!("disk{slot}"), start.clone())));
        let disks = (0..shape.disk_slots).map(disk).collect::<Result<_, _>>()?;
        let nic = |_| devices.add_slot("virtio-net", Net::new());
        let nets = (0..shape.net_slots).map(nic).collect::<Result<_, _>>()?;
        let maker = match beginning {
            Beginning::Template(state) => {
                devices.restore(&state)?;
                lock(&vsock).moved_from(state.guest_cid());
                None
            }
            Beginning::Boot { refused: Some(error), .. } => {
                made(Err(error));
                None
            }
            Beginning::Boot { code, refused: None } => {
                let file = files.template.filter(|_| shape.template == Template::Make);
                file.map(|file| devices.maker(shape, code, file, made)).transpose()?
            }
        };

        let end = Arc::new(End::new().map_err(|error| Error::Host { what: "eventfd", error })?);
        let Devices { vm, pci, addresses, mut events, .. } = devices;
        events.add_subscriber(Box::new(EndWatch(end.clone())));
        let ports = ports(pci, &console, &end)?;
        let (ports, addresses) = (Arc::new(ports), Arc::new(addresses));
        let starter = Starter {
            maker: vcpu_maker,
            ports,
            addresses,
            end: end.clone(),
            started: shape.vcpus,
            devices: shape.disk_slots > 0,
        };
        let mut vcpus: Vec<Vcpu> = (0..).zip(vcpus).map(|(number, fd)| starter.vcpu(number, fd)).collect();
        if let Some(first) = vcpus.first_mut() {
            first.maker = maker;
        }
        let machine = Self { vm: vm.fd(), vcpus, starter: Some((starter, wanted)), events, console, end };
        Ok((machine, Slots { vsock, disks, nets, memory, starter: sender }))
    }

    /// Starts the vCPUs, and confines this thread.
    ///
    /// # Errors
    /// When there are no threads left or no seccomp.
    pub fn start(&mut self) -> Result<(), Error> {
        let failed = |error| Error::Host { what: "thread for a vCPU", error };
        self.vcpus.drain(..).try_for_each(Vcpu::start).map_err(failed)?;
        self.starter.take().map_or(Ok(()), |(starter, wanted)| starter.start(wanted)).map_err(failed)?;
        Ok(seccomp::install(Kind::Main)?)
    }

    /// The machine in the kernel.
    pub fn vm(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the machine is there, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    /// Adds a subscriber to the machine's event loop.
    pub fn subscribe(&mut self, subscriber: impl MutEventSubscriber + 'static) {
        self.events.add_subscriber(Box::new(subscriber));
    }

    /// Where the end of the VM is reported.
    pub fn end(&self) -> Arc<End> {
        self.end.clone()
    }

    /// What the guest has written to its console.
    pub fn console(&self) -> ConsoleRing {
        self.console.clone()
    }

    /// Serves the devices until the VM ends; answers why, and the last lines of the console.
    pub fn run(mut self) -> (ExitReason, String) {
        let ended = loop {
            if let Err(error) = self.events.run() {
                break Ended::Internal(format!("event loop: {error}"));
            }
            if let Some(ended) = self.end.reached() {
                break ended;
            }
        };
        self.drain_console();
        let reason = match (ended, self.console.panic_line()) {
            (Ended::Internal(why), _) => ExitReason::Internal(why),
            (_, Some(line)) => ExitReason::Panic(line),
            (Ended::Reset, None) => ExitReason::Shutdown,
            (Ended::Stopped, None) => ExitReason::Stopped,
            (Ended::TripleFault, None) => ExitReason::TripleFault,
        };
        (reason, self.console.tail())
    }

    /// What the guest gave to its console before it ended may not have been looked at yet.
    fn drain_console(&mut self) {
        for _ in 0..16 {
            if !matches!(self.events.run_with_timeout(0), Ok(events) if events > 0) {
                break;
            }
        }
    }
}

/// What starts the threads of disks.
fn starter_of(starter: &Sender<Wanted>) -> blk::Starter {
    let starter = starter.clone();
    // Who waits for the thread notices when nobody is there to start it.
    Arc::new(move |start| drop(starter.send(Wanted::Thread(start))))
}

/// Where a machine begins.
enum Beginning {
    /// Where a template stopped; what the devices need of it.
    Template(Box<State>),
    /// At its boot.
    Boot {
        /// Where the guest's code is.
        code: memory::Range,
        /// Why there is no use for the template that there is.
        refused: Option<template::Error>,
    },
}

fn board(shape: &Shape, files: &mut Files) -> Result<(Board, Beginning), Error> {
    let mut refused = None;
    if shape.template == Template::Use {
        let restored = files.template.as_ref().ok_or(template::Error::NoFile);
        let board = Board::new(shape, files)?;
        match restored.and_then(|file| board.restore(shape, file)) {
            Ok(state) => return Ok((board, Beginning::Template(Box::new(state)))),
            Err(error) => refused = Some(error),
        }
    }
    let board = Board::new(shape, files)?;
    let code = board.boot(shape, &mut files.kernel)?;
    Ok((board, Beginning::Boot { code, refused }))
}

/// The agent says that a template can be made before it connects to the host. A guest that has connected is assigned to
/// a pod. A container of that pod that can reach the register must not make other guests start from what it has made of
/// its machine.
fn after_template(register: Arc<TemplateRegister>, incoming: Incoming) -> Incoming {
    Box::new(move |port, stream| {
        register.close();
        incoming(port, stream)
    })
}

/// The devices as they come: each takes the next slot of the bus, and the addresses that belong to it.
struct Devices {
    vm: Vm,
    memory: GuestMemory,
    pci: PciBus,
    addresses: Bus,
    events: Loop,
    functions: Vec<Arc<VirtioPci>>,
    register: Arc<TemplateRegister>,
}

/// A device, its function on the bus, and the address of its BAR.
type Placed<D> = (Arc<Mutex<D>>, Arc<VirtioPci>, u32);

impl Devices {
    fn new(vm: Vm, memory: GuestMemory) -> Result<Self, Error> {
        let events = EventManager::new().map_err(Error::Events)?;
        let register = Arc::new(TemplateRegister::default());
        let (pci, addresses) = (PciBus::new(register.clone()), Bus::default());
        Ok(Self { vm, memory, pci, addresses, events, functions: Vec::new(), register })
    }

    /// Restores all devices to where those of a template stopped.
    fn restore(&self, saved: &State) -> Result<(), Error> {
        if saved.functions.len() != self.functions.len() {
            return Err(Error::Restore(RestoreError::Other));
        }
        self.functions.iter().zip(&saved.functions).try_for_each(|(f, saved)| Ok(f.restore(saved)?))
    }

    /// What makes a template out of this machine.
    fn maker(&self, shape: &Shape, code: memory::Range, file: File, made: Made) -> Result<Maker, Error> {
        self.register.want();
        Ok(Maker {
            register: self.register.clone(),
            vm: self.vm.fd(),
            msr_indices: self.vm.msr_indices()?,
            memory: self.memory.clone(),
            functions: self.functions.clone(),
            shape: shape.clone(),
            code,
            file,
            made,
        })
    }

    fn add<D>(&mut self, name: &'static str, device: io::Result<D>) -> Result<Arc<Mutex<D>>, Error>
    where
        D: VirtioDevice + 'static,
    {
        let (device, function, bar) = self.place(name, device)?;
        kvm::add_doorbells(&self.vm.fd(), &function.doorbells(bar))?;
        Ok(device)
    }

    fn add_slot<D>(&mut self, name: &'static str, device: io::Result<D>) -> Result<Slot<D>, Error>
    where
        D: VirtioDevice + 'static,
    {
        let (device, function, bar) = self.place(name, device)?;
        function.hide();
        Ok(Slot { device, function, vm: self.vm.fd(), bar })
    }

    fn place<D>(&mut self, name: &'static str, device: io::Result<D>) -> Result<Placed<D>, Error>
    where
        D: VirtioDevice + 'static,
    {
        let device = device.map_err(|error| Error::Device { device: name, error })?;
        let slot = self.pci.next_slot().ok_or(Error::Slots)?;
        let bar = BARS as u32 + slot as u32 * BAR_SIZE;
        let lines = (0..pci::vectors(device.most_queues())).map(|_| self.vm.message_line()).collect();

        let device = Arc::new(Mutex::new(device));
        let shared: Arc<Mutex<dyn VirtioDevice>> = device.clone();
        let function = VirtioPci::new(shared.clone(), self.memory.clone(), bar, lines);
        let function = Arc::new(function.map_err(|error| Error::Host { what: "eventfd", error })?);
        self.addresses.insert(u64::from(bar)..u64::from(bar) + u64::from(BAR_SIZE), function.clone())?;
        self.pci.push(function.clone());
        self.functions.push(function.clone());
        self.events.add_subscriber(Box::new(shared));
        Ok((device, function, bar))
    }
}

fn ports(pci: PciBus, console: &ConsoleRing, end: &Arc<End>) -> Result<Bus, Overlap> {
    let mut ports = Bus::default();
    ports.insert(pci::PORTS, Arc::new(pci))?;
    ports.insert(serial::PORTS, Arc::new(Serial::new(console.clone())))?;
    ports.insert(i8042::PORTS, Arc::new(I8042::new(end.clone())))?;
    Ok(ports)
}

/// Wakes the event loop at the end.
struct EndWatch(Arc<End>);

impl MutEventSubscriber for EndWatch {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.0, EventSet::IN | EventSet::EDGE_TRIGGERED)) {
            self.0.reach(Ended::Internal(format!("event loop: {error}")));
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
}
