//! The machine: what is in it, in which order it is put together, and its life until the end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use katana_protocol::SHARE_TAG;
use katana_protocol::vmm::{ExitReason, Machine as Shape};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot;
use crate::bus::{Bus, Overlap};
use crate::console_ring::ConsoleRing;
use crate::cpu::{self, Topology};
use crate::end::{End, Ended};
use crate::i8042::{self, I8042};
use crate::jail::Room;
use crate::kvm::{self, Vm};
use crate::memory::{self, BARS, GuestMemory, Pluggable};
use crate::mptable::MAX_VCPUS;
use crate::pci::{self, BAR_SIZE, PciBus, VirtioPci};
use crate::seccomp::{self, Kind};
use crate::serial::{self, Serial};
use crate::vcpu::Vcpu;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::Console;
use crate::virtio::fs::Fs;
use crate::virtio::mem::{Mem, Told};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Incoming, Vsock};

/// What every guest kernel is told: the image is its root (which appears a moment after its driver), the console is
/// virtio's once it is there, a reset ends the VM, and the hardware need not be searched for what this machine does
/// not have.
const KERNEL_PARAMETERS: &str = "console=hvc0 earlyprintk=ttyS0 root=/dev/pmem0 rootfstype=erofs rootflags=dax=always \
    rootwait=5 ro init=/sbin/init reboot=k panic=-1 pci=conf1 no_timer_check tsc=reliable cryptomgr.notests \
    dummy.numdummies=0 memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The files that the machine works with.
pub struct Files {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The guest's kernel.
    pub kernel: File,
    /// The guest's image.
    pub image: File,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No vCPU, more than there are, or more than the MP table can hold.
    #[error("{0} of {1} vCPUs: not between 1 and {MAX_VCPUS}")]
    Vcpus(u8, u8),
    /// More devices than slots.
    #[error("too many devices: the PCI bus has {} slots", pci::SLOTS)]
    Slots,
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// vCPU.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// A device.
    #[error("{device}: {error}")]
    Device {
        /// Its name.
        device: &'static str,
        /// Why.
        error: io::Error,
    },
    /// No descriptors or threads left.
    #[error("{what}: {error}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The event loop.
    #[error("event loop: {0}")]
    Events(event_manager::Error),
    /// Seccomp.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
}

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
}

/// A place for a disk or a network card, which the guest sees once something is attached. An empty one costs no driver's
/// start; a card's driver asks for address and link then, a disk's for whether it can be written to, and a card without a
/// network would be one more interface in every container.
pub struct Slot<D> {
    /// The device.
    pub device: Arc<Mutex<D>>,
    /// Its function on the bus.
    pub function: Arc<VirtioPci>,
}

/// A machine that is put together but does not run yet.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    events: Loop,
    console: ConsoleRing,
    end: Arc<End>,
}

impl Machine {
    /// Puts the machine together; answers it and what can be attached to. `incoming` is told of every stream that the guest
    /// opens, `plugged` of the memory that it has plugged.
    ///
    /// # Errors
    /// When something is missing or wrong; the text names it.
    pub fn build(
        shape: &Shape,
        mut files: Files,
        room: Room,
        incoming: Incoming,
        plugged: Told,
    ) -> Result<(Self, Slots), Error> {
        if !(1..=shape.max_vcpus).contains(&shape.vcpus) || shape.max_vcpus > MAX_VCPUS {
            return Err(Error::Vcpus(shape.vcpus, shape.max_vcpus));
        }
        let mut vm = Vm::new(files.kvm, shape.max_vcpus)?;
        let image = memory::map_image(&files.image)?;
        let pluggable = memory::pluggable_range(shape.memory_mib, image.size(), shape.pluggable_mib);
        let memory = memory::create(shape.memory_mib, pluggable)?;
        vm.add_memory(&memory)?;
        let image_address = memory::image_address(shape.memory_mib);
        vm.add_read_only(image_address, &image)?;

        let parameters = kernel_parameters(shape);
        let entry = boot::load(&memory, &mut files.kernel, &parameters, shape.memory_mib, shape.max_vcpus)?;

        let console = ConsoleRing::new(shape.debug);
        let pluggable = pluggable.map(|range| Pluggable::new(memory.clone(), range)).transpose();
        let pluggable = pluggable.map_err(|error| Error::Host { what: "memory to be plugged", error })?;
        let mut devices = Devices::new(vm, memory)?;
        let output = console.clone();
        devices.add("virtio-console", Console::new(Arc::new(move |bytes| output.push(bytes))))?;
        devices.add("virtio-pmem", Pmem::new(image_address, image.size()))?;
        devices.add("virtio-fs", Fs::new(SHARE_TAG, room.proc_self_fd))?;
        let vsock = devices.add("virtio-vsock", Vsock::new(incoming))?;
        devices.add("virtio-rng", Rng::new())?;
        devices.add("virtio-balloon", Balloon::new())?;
        let memory =
            pluggable.map(|range| devices.add("virtio-mem", Mem::new(range, plugged))).transpose()?;
        let disk = |slot| devices.add_slot("virtio-blk", Blk::new(&format!("disk{slot}")));
        let disks = (0..shape.disk_slots).map(disk).collect::<Result<_, _>>()?;
        let card = |_| devices.add_slot("virtio-net", Net::new());
        let nets = (0..shape.net_slots).map(card).collect::<Result<_, _>>()?;

        let end = Arc::new(End::new().map_err(|error| Error::Host { what: "eventfd", error })?);
        let Devices { vm, pci, addresses, mut events, .. } = devices;
        events.add_subscriber(Box::new(EndWatch(end.clone())));
        let ports = ports(pci, &console, &end)?;
        let vcpus = vcpus(&vm, shape, &entry, &Arc::new(ports), &Arc::new(addresses), &end)?;
        Ok((Self { vcpus, events, console, end }, Slots { vsock, disks, nets, memory }))
    }

    /// Starts the vCPUs, and confines this thread.
    ///
    /// # Errors
    /// When there are no threads left or no seccomp.
    pub fn start(&mut self) -> Result<(), Error> {
        for vcpu in self.vcpus.drain(..) {
            vcpu.start().map_err(|error| Error::Host { what: "thread for a vCPU", error })?;
        }
        Ok(seccomp::install(Kind::Main)?)
    }

    /// Adds a subscriber to the machine's event loop.
    pub fn subscribe(&mut self, subscriber: impl MutEventSubscriber + 'static) {
        self.events.add_subscriber(Box::new(subscriber));
    }

    /// Where the end of the VM is told.
    pub fn end(&self) -> Arc<End> {
        self.end.clone()
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

fn kernel_parameters(shape: &Shape) -> String {
    // Parameters take effect in their order: `quiet` after `earlyprintk` would come too late for the first lines.
    let volume = if shape.debug { "" } else { "quiet " };
    let vcpus = shape.vcpus;
    format!("{volume}{KERNEL_PARAMETERS} maxcpus={vcpus} {}", shape.kernel_params).trim_end().to_owned()
}

/// The devices as they come: each takes the next slot of the bus, and the addresses that belong to it.
struct Devices {
    vm: Vm,
    memory: GuestMemory,
    pci: PciBus,
    addresses: Bus,
    events: Loop,
}

impl Devices {
    fn new(vm: Vm, memory: GuestMemory) -> Result<Self, Error> {
        let events = EventManager::new().map_err(Error::Events)?;
        Ok(Self { vm, memory, pci: PciBus::new(), addresses: Bus::default(), events })
    }

    fn add<D>(&mut self, name: &'static str, device: io::Result<D>) -> Result<Arc<Mutex<D>>, Error>
    where
        D: VirtioDevice + 'static,
    {
        Ok(self.place(name, device)?.0)
    }

    fn add_slot<D>(&mut self, name: &'static str, device: io::Result<D>) -> Result<Slot<D>, Error>
    where
        D: VirtioDevice + 'static,
    {
        let (device, function) = self.place(name, device)?;
        function.show(false);
        Ok(Slot { device, function })
    }

    fn place<D>(
        &mut self,
        name: &'static str,
        device: io::Result<D>,
    ) -> Result<(Arc<Mutex<D>>, Arc<VirtioPci>), Error>
    where
        D: VirtioDevice + 'static,
    {
        let device = device.map_err(|error| Error::Device { device: name, error })?;
        let slot = self.pci.next_slot().ok_or(Error::Slots)?;
        let bar = BARS as u32 + slot as u32 * BAR_SIZE;
        let queues = device.queue_sizes().len();
        let lines = (0..pci::vectors(queues)).map(|_| self.vm.message_line()).collect::<Result<_, _>>()?;
        let kick = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = (0..queues).map(|_| kick()).collect::<io::Result<_>>();
        let kicks = kicks.map_err(|error| Error::Host { what: "eventfd", error })?;

        let device = Arc::new(Mutex::new(device));
        let shared: Arc<Mutex<dyn VirtioDevice>> = device.clone();
        let function = Arc::new(VirtioPci::new(shared.clone(), self.memory.clone(), bar, lines, kicks));
        for doorbell in function.doorbells(bar) {
            self.vm.add_doorbell(&doorbell)?;
        }
        self.addresses.insert(u64::from(bar)..u64::from(bar) + u64::from(BAR_SIZE), function.clone())?;
        self.pci.push(function.clone());
        self.events.add_subscriber(Box::new(shared));
        Ok((device, function))
    }
}

fn ports(pci: PciBus, console: &ConsoleRing, end: &Arc<End>) -> Result<Bus, Overlap> {
    let mut ports = Bus::default();
    ports.insert(pci::PORTS, Arc::new(pci))?;
    ports.insert(serial::PORTS, Arc::new(Serial::new(console.clone())))?;
    ports.insert(i8042::PORTS, Arc::new(I8042::new(end.clone())))?;
    Ok(ports)
}

fn vcpus(
    vm: &Vm,
    shape: &Shape,
    entry: &boot::Entry,
    ports: &Arc<Bus>,
    addresses: &Arc<Bus>,
    end: &Arc<End>,
) -> Result<Vec<Vcpu>, Error> {
    let topology = Topology { vcpus: shape.max_vcpus, tsc_deadline: vm.tsc_deadline };
    let vcpu = |number| {
        let fd = vm.create_vcpu(number)?;
        cpu::set_up(&fd, number, &vm.cpuid, &topology, entry)?;
        Ok(Vcpu { fd, number, ports: ports.clone(), addresses: addresses.clone(), end: end.clone() })
    };
    (0..shape.max_vcpus).map(vcpu).collect()
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
