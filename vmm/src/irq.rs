//! Interrupt lines: messages to the guest's processors.

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
    kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pci::Line;
use crate::sync::lock;

/// A line that gives the kernel the message itself. An irqfd comes to the same with a descriptor, a route, and the time
/// that the kernel takes for both at the start and at the end of the machine: there is one if somebody asks for it.
pub struct MessageLine {
    vm: Arc<VmFd>,
    message: kvm_msi,
    irqfds: Arc<Irqfds>,
    irqfd: Option<Irqfd>,
}

struct Irqfd {
    gsi: u32,
    event: Arc<EventFd>,
}

impl MessageLine {
    /// A line of a machine.
    pub fn new(vm: Arc<VmFd>, irqfds: Arc<Irqfds>) -> Self {
        Self { vm, message: kvm_msi::default(), irqfds, irqfd: None }
    }
}

impl Line for MessageLine {
    fn set_message(&mut self, address: u64, data: u32) {
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        self.message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        if let Some(irqfd) = &self.irqfd
            && let Err(error) = self.irqfds.route(irqfd.gsi, &self.message)
        {
            log::error!("KVM_SET_GSI_ROUTING: {error}");
        }
    }

    fn send(&self) {
        if let Err(error) = self.vm.signal_msi(self.message) {
            log::warn!("KVM_SIGNAL_MSI: {error}");
        }
    }

    fn event(&mut self) -> Option<Arc<EventFd>> {
        if self.irqfd.is_none() {
            let made = self.irqfds.make(&self.message);
            self.irqfd = made.inspect_err(|error| log::warn!("KVM_IRQFD: {error}")).ok();
        }
        self.irqfd.as_ref().map(|irqfd| irqfd.event.clone())
    }
}

/// Events that the kernel turns into messages, without returning to the VMM, and the routes that say into which. The
/// kernel only takes all routes at once.
pub struct Irqfds {
    vm: Arc<VmFd>,
    routes: Mutex<Vec<kvm_irq_routing_entry>>,
}

impl Irqfds {
    /// None yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }

    fn make(&self, message: &kvm_msi) -> Result<Irqfd, errno::Error> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut routes = lock(&self.routes);
        let gsi = routes.last().map_or(0, |last| last.gsi + 1);
        if gsi as usize >= KVM_MAX_IRQ_ROUTES {
            return Err(errno::Error::new(libc::ENOSPC));
        }
        routes.push(route(gsi, message));
        self.set(&routes)?;
        self.vm.register_irqfd(&event, gsi)?;
        Ok(Irqfd { gsi, event })
    }

    fn route(&self, gsi: u32, message: &kvm_msi) -> Result<(), errno::Error> {
        let mut routes = lock(&self.routes);
        if let Some(entry) = routes.iter_mut().find(|entry| entry.gsi == gsi) {
            *entry = route(gsi, message);
        }
        self.set(&routes)
    }

    fn set(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), errno::Error> {
        let routing = KvmIrqRouting::from_entries(routes).map_err(|_| errno::Error::new(libc::ENOMEM))?;
        self.vm.set_gsi_routing(&routing)
    }
}

fn route(gsi: u32, message: &kvm_msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address_lo,
        address_hi: message.address_hi,
        data: message.data,
        ..Default::default()
    };
    entry
}
