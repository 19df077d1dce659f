//! The machine without its devices: memory and vCPUs, which begin where a kernel is entered, or where a template
//! stopped.

use std::fs::File;
use std::os::fd::OwnedFd;

use katana_protocol::vmm::Machine as Shape;
use kvm_ioctls::VcpuFd;

use crate::boot;
use crate::cpu::{self, Topology};
use crate::error::Error;
use crate::kvm::{self, Vm};
use crate::memory::{self, GuestMemory, Range};
use crate::template::{self, State};
use crate::vcpus::Maker;

/// Parameters of every guest kernel: the image is its root (which appears a moment after its driver), the console is
/// virtio's once it is there, a reset ends the VM, and the hardware need not be searched for what this machine does not
/// have. Those who wait for a grace period of RCU, which is most of the time that mounts and cgroups take, have it
/// expedited: that costs an interrupt of the other vCPUs at work. Each entry of the large hash tables lies on a page of
/// its own at first, so the tables have few pages. Drivers make no interfaces by themselves, which all containers would
/// see.
const KERNEL_PARAMETERS: &str = "console=hvc0 earlyprintk=ttyS0 root=/dev/pmem0 rootfstype=erofs rootflags=dax=always \
    rootwait=5 ro init=/sbin/init reboot=k panic=-1 pci=conf1 tsc=reliable cryptomgr.notests \
    dummy.numdummies=0 bonding.max_bonds=0 ifb.numifbs=0 fb_tunnels=none \
    rcupdate.rcu_expedited=1 dhash_entries=16384 ihash_entries=8192 \
    memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The files that the machine works with.
pub struct Files {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The guest's kernel.
    pub kernel: File,
    /// The guest's image.
    pub image: File,
    /// The template to be made or used.
    pub template: Option<File>,
}

/// Memory and vCPUs.
pub struct Board {
    /// The kernel's machine.
    pub vm: Vm,
    /// All memory, with what can be plugged.
    pub memory: GuestMemory,
    /// What can be plugged.
    pub pluggable: Option<Range>,
    /// Address and size of the guest's image.
    pub image: Range,
    /// The first vCPUs, by their numbers.
    pub vcpus: Vec<VcpuFd>,
    /// What makes the others.
    pub maker: Maker,
}

impl Board {
    /// A board on which nothing has happened yet.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn new(shape: &Shape, files: &Files) -> Result<Self, Error> {
        let dev_kvm: OwnedFd =
            files.kvm.try_clone().map_err(|error| Error::Host { what: "descriptor", error })?;
        let mut vm = Vm::new(dev_kvm, shape.max_vcpus)?;
        let image = memory::map_image(&files.image)?;
        let pluggable = memory::pluggable_range(shape.memory_mib, image.size(), shape.pluggable_mib);
        let memory = memory::create(shape.memory_mib, pluggable)?;
        vm.add_memory(&memory)?;
        let image_address = memory::image_address(shape.memory_mib);
        vm.add_read_only(image_address, &image)?;

        let topology = Topology { vcpus: shape.max_vcpus, invariant_tsc: shape.invariant_tsc };
        let maker = Maker { vm: vm.fd(), cpuid: vm.cpuid.clone(), topology };
        let vcpus = (0..shape.vcpus).map(|number| maker.make(number)).collect::<Result<_, _>>()?;
        Ok(Self { vm, memory, pluggable, image: (image_address, image.size()), vcpus, maker })
    }

    /// Puts a kernel into it and the first vCPU before its entry; answers where the kernel's code is.
    ///
    /// # Errors
    /// When the kernel is none, or KVM refuses.
    pub fn boot(&self, shape: &Shape, kernel: &mut File) -> Result<Range, Error> {
        let parameters = kernel_parameters(shape);
        let (entry, code) = boot::load(&self.memory, kernel, &parameters, shape.memory_mib, shape.max_vcpus)?;
        for (number, fd) in (0..).zip(&self.vcpus) {
            cpu::set_up(fd, number, Some(&entry).filter(|_| number == 0))?;
        }
        Ok(code)
    }

    /// Restores a template; answers what the devices need of it.
    ///
    /// # Errors
    /// When there is any doubt about the template. The board is then unusable.
    pub fn restore(&self, shape: &Shape, file: &File) -> Result<State, template::Error> {
        let state = State::read(file, shape)?;
        state.map_memory(file, &self.memory)?;
        kvm::set_clock(&self.vm.fd(), state.clock)?;
        for (number, fd) in (0..).zip(&self.vcpus) {
            // The others follow the clock of the first one, which therefore comes first.
            if number == 0 { state.cpu.give(fd)? } else { cpu::set_up(fd, number, None)? }
        }
        Ok(state)
    }
}

fn kernel_parameters(shape: &Shape) -> String {
    // Parameters take effect in their order: `quiet` after `earlyprintk` would come too late for the first lines.
    let volume = if shape.debug { "" } else { "quiet " };
    let vcpus = shape.vcpus;
    format!("{volume}{KERNEL_PARAMETERS} maxcpus={vcpus} {}", shape.kernel_params).trim_end().to_owned()
}
