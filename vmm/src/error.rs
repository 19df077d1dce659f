//! What can go wrong while a machine is built and runs.

use std::io;

use katana_protocol::vmm::MOST_VCPUS;

use crate::bus::Overlap;
use crate::pci::{self, RestoreError};
use crate::{boot, cpu, kvm, memory, seccomp, vcpus};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No vCPU, more than there are, or more than the MP table can hold.
    #[error("{0} of {1} vCPUs: not between 1 and {MOST_VCPUS}")]
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
    /// vCPUs.
    #[error(transparent)]
    MakeVcpus(#[from] vcpus::Error),
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
    /// A template with other devices.
    #[error("template: {0}")]
    Restore(#[from] RestoreError),
    /// Seccomp.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
}
