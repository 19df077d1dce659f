//! Interrupt controllers, timer and clock of the machine, which are in the kernel: their state.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use crate::kvm::Error;

/// What is in the kernel of a machine, beside its vCPUs.
#[derive(Serialize, Deserialize)]
pub struct Chips {
    controllers: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
    /// Nanoseconds of kvm-clock.
    clock: u64,
}

fn call(call: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |error| Error::Call { call, error }
}

impl Chips {
    /// Takes the state of a machine whose vCPUs do not run.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn take(vm: &VmFd) -> Result<Self, Error> {
        let controller = |chip_id| {
            let mut controller = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut controller).map(|()| controller)
        };
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        Ok(Self {
            controllers: chips
                .map(controller)
                .into_iter()
                .collect::<Result<_, _>>()
                .map_err(call("KVM_GET_IRQCHIP"))?,
            timer: vm.get_pit2().map_err(call("KVM_GET_PIT2"))?,
            clock: vm.get_clock().map_err(call("KVM_GET_CLOCK"))?.clock,
        })
    }

    /// Gives the state to a machine that has never run.
    ///
    /// # Errors
    /// When KVM does not take it.
    pub fn give(&self, vm: &VmFd) -> Result<(), Error> {
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))?;
        for controller in &self.controllers {
            vm.set_irqchip(controller).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.timer).map_err(call("KVM_SET_PIT2"))
    }
}
