//! The virtual machine in the kernel: capabilities, memory slots, interrupt lines, doorbells, clock.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_clock_data, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::errno;

use crate::irq::{Irqfds, MessageLine};
use crate::memory::{GuestMemory, Mapping};
use crate::pci::{Doorbell, Line};

/// The API version since Linux 2.6.22; it will not change (KVM API, 4.1).
const API_VERSION: i32 = 12;
/// What the machine cannot do without, by the kernel's name.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    // The guest has no other timer, and nothing to find out the frequency of one by.
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
];

/// Four pages that Intel CPUs without unrestricted guest mode need, in the hole below the BIOS area.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Why there is no virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor is something else.
    #[error("/dev/kvm: not a KVM device: {0}")]
    NotKvm(io::Error),
    /// Not the only version there is.
    #[error("/dev/kvm: API version {0}, not {API_VERSION}")]
    Version(i32),
    /// The kernel is too old or built without something.
    #[error("/dev/kvm: the host's kernel lacks {0}")]
    Capability(&'static str),
    /// More vCPUs than the host allows.
    #[error("{wanted} vCPUs: this host's KVM allows {most}")]
    TooManyVcpus {
        /// Asked for.
        wanted: u8,
        /// Allowed.
        most: usize,
    },
    /// A call failed.
    #[error("{call}: {error}")]
    Call {
        /// Its name in the KVM API.
        call: &'static str,
        /// What the kernel said.
        error: errno::Error,
    },
}

fn call(call: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |error| Error::Call { call, error }
}

/// A virtual machine without memory, vCPUs and devices. Its vCPUs will have their local APICs in the kernel.
pub struct Vm {
    fd: Arc<VmFd>,
    irqfds: Arc<Irqfds>,
    slots: u32,
    kvm: Kvm,
    /// CPUID as this KVM can offer it.
    pub cpuid: CpuId,
}

impl Vm {
    /// Makes the machine.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn new(dev_kvm: OwnedFd, vcpus: u8) -> Result<Self, Error> {
        let kvm = open(dev_kvm)?;
        let most = kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(Error::TooManyVcpus { wanted: vcpus, most });
        }
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let fd = create_vm(&kvm).map_err(call("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS).map_err(call("KVM_SET_TSS_ADDR"))?;
        // Local APICs alone: interrupts are messages, and they have the timers. Without 8259s, I/O APIC and 8254 there
        // is less of the host's kernel that a guest can reach, and it is quicker to make and to tear down.
        let local = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        fd.enable_cap(&local).map_err(call("KVM_CAP_SPLIT_IRQCHIP"))?;
        let fd = Arc::new(fd);
        let irqfds = Arc::new(Irqfds::new(fd.clone()));
        Ok(Self { fd, irqfds, slots: 0, kvm, cpuid })
    }

    /// The kernel's machine itself.
    pub fn fd(&self) -> Arc<VmFd> {
        self.fd.clone()
    }

    /// The registers of a vCPU that this KVM knows.
    ///
    /// # Errors
    /// When KVM does not list them.
    pub fn msr_indices(&self) -> Result<Vec<u32>, Error> {
        let list = self.kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Puts the guest's memory into the machine.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn add_memory(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};
        for region in memory.iter() {
            // SAFETY: the mapping lives as long as any clone of `memory`, and the machine keeps one until the
            // process ends.
            unsafe { self.add_slot(region.start_addr().raw_value(), region.as_ptr(), region.len(), 0)? };
        }
        Ok(())
    }

    /// Puts a file mapping into the machine, read-only.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn add_read_only(&mut self, address: u64, mapping: &Mapping) -> Result<(), Error> {
        // SAFETY: mappings are never removed.
        unsafe { self.add_slot(address, mapping.as_ptr(), mapping.size(), KVM_MEM_READONLY) }
    }

    /// # Safety
    /// The `size` bytes at `host` must stay mapped until the process ends.
    unsafe fn add_slot(&mut self, address: u64, host: *mut u8, size: u64, flags: u32) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: self.slots,
            flags,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller keeps the memory mapped; slots never overlap because the layout's ranges do not.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        self.slots += 1;
        Ok(())
    }

    /// A new interrupt line for messages.
    pub fn message_line(&self) -> Box<dyn Line> {
        Box::new(MessageLine::new(self.fd.clone(), self.irqfds.clone()))
    }
}

/// Makes a vCPU; the first one has number 0.
///
/// # Errors
/// When the host cannot.
pub fn create_vcpu(vm: &VmFd, number: u8) -> Result<VcpuFd, Error> {
    vm.create_vcpu(u64::from(number)).map_err(call("KVM_CREATE_VCPU"))
}

/// Nanoseconds of kvm-clock.
///
/// # Errors
/// When KVM does not report it.
pub fn clock(vm: &VmFd) -> Result<u64, Error> {
    Ok(vm.get_clock().map_err(call("KVM_GET_CLOCK"))?.clock)
}

/// Sets kvm-clock to `nanoseconds`.
///
/// # Errors
/// When KVM does not take it.
pub fn set_clock(vm: &VmFd, nanoseconds: u64) -> Result<(), Error> {
    let clock = kvm_clock_data { clock: nanoseconds, ..Default::default() };
    vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
}

/// Wires doorbells: from then on the kernel makes their events readable when the guest writes there.
///
/// # Errors
/// When the host cannot.
pub fn add_doorbells(vm: &VmFd, doorbells: &[Doorbell]) -> Result<(), Error> {
    let add = |doorbell: &Doorbell| {
        let address = IoEventAddress::Mmio(doorbell.address);
        vm.register_ioevent(&doorbell.event, &address, NoDatamatch)
    };
    doorbells.iter().try_for_each(add).map_err(call("KVM_IOEVENTFD"))
}

/// Takes them away again, those that are there.
pub fn remove_doorbells(vm: &VmFd, doorbells: &[Doorbell]) {
    for doorbell in doorbells {
        let address = IoEventAddress::Mmio(doorbell.address);
        let _ = vm.unregister_ioevent(&doorbell.event, &address, NoDatamatch);
    }
}

/// Takes the descriptor for what it should be, after a look.
fn open(dev_kvm: OwnedFd) -> Result<Kvm, Error> {
    let file = File::from(dev_kvm);
    let kind = file.metadata().map_err(Error::NotKvm)?.file_type();
    if !kind.is_char_device() {
        return Err(Error::NotKvm(io::Error::from_raw_os_error(libc::ENOTTY)));
    }
    // SAFETY: the descriptor is ours, and Kvm's methods check what the ioctls answer.
    let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        API_VERSION => {}
        -1 => return Err(Error::NotKvm(io::Error::last_os_error())),
        version => return Err(Error::Version(version)),
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Capability(name)),
        None => Ok(kvm),
    }
}

/// KVM_CREATE_VM starts a kernel thread and answers EINTR when a signal comes just then.
fn create_vm(kvm: &Kvm) -> Result<VmFd, errno::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_devices_and_files_are_not_taken_for_kvm() {
        for path in ["/dev/null", "/proc/self/exe"] {
            let error = Vm::new(File::open(path).unwrap().into(), 1).err().unwrap();
            assert!(error.to_string().starts_with("/dev/kvm: not a KVM device: "), "{error}");
        }
    }
}
