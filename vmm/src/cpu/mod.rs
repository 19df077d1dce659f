//! The state in which a vCPU starts.

mod cpuid;
mod state;

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::boot::Entry;

pub use cpuid::Topology;
pub use state::CpuState;

/// Model specific registers: Intel SDM volume 4.
mod msr {
    pub const IA32_TSC: u32 = 0x10;
    pub const IA32_TSC_ADJUST: u32 = 0x3b;
    pub const IA32_MISC_ENABLE: u32 = 0x1a0;
    pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
}
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Memory is write-back unless the page tables say otherwise. Linux turns PAT off when it finds MTRRs disabled.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Protected mode.
const CR0_PE: u64 = 1;
/// The one bit of EFLAGS that is always set.
const EFLAGS_RESERVED: u64 = 2;

/// Why a vCPU cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error("{call} of vCPU {vcpu}: {error}")]
    Call {
        /// Its name in the KVM API.
        call: &'static str,
        /// The vCPU's number.
        vcpu: u8,
        /// What the kernel said.
        error: errno::Error,
    },
    /// KVM knows a register not.
    #[error("KVM_SET_MSRS of vCPU {vcpu}: MSR {msr:#x} is not accepted")]
    Msr {
        /// The vCPU's number.
        vcpu: u8,
        /// The register.
        msr: u32,
    },
    /// Too many CPUID leaves.
    #[error("CPUID: more leaves than KVM takes")]
    CpuId,
}

/// Tells vCPU `vcpu` what it is. To be done first.
///
/// # Errors
/// When KVM does not take it.
pub fn identify(fd: &VcpuFd, vcpu: u8, cpuid: &CpuId, topology: &Topology) -> Result<(), Error> {
    let leaves = CpuId::from_entries(&topology.apply(cpuid.as_slice(), vcpu)).map_err(|_| Error::CpuId)?;
    fd.set_cpuid2(&leaves).map_err(|error| Error::Call { call: "KVM_SET_CPUID2", vcpu, error })
}

/// Sets up vCPU `vcpu` as after power-on. One with an `entry` starts there; the others wait for the kernel to start
/// them (INIT and SIPI), which the interrupt controller in the kernel does.
///
/// # Errors
/// When KVM does not take a register.
pub fn set_up(fd: &VcpuFd, vcpu: u8, entry: Option<&Entry>) -> Result<(), Error> {
    let call = |call| move |error| Error::Call { call, vcpu, error };
    set_msrs(fd, vcpu)?;
    fd.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).map_err(call("KVM_SET_FPU"))?;

    let mut lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    connect_local_interrupts(&mut lapic);
    fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))?;

    if let Some(entry) = entry {
        let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        flat_protected_mode(&mut sregs);
        fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rflags: EFLAGS_RESERVED,
            rip: entry.address,
            rbx: entry.start_info,
            ..Default::default()
        };
        fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    }
    Ok(())
}

fn set_msrs(fd: &VcpuFd, vcpu: u8) -> Result<(), Error> {
    let entries = [
        (msr::IA32_TSC, 0),
        (msr::IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (msr::IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Msr { vcpu, msr: 0 })?;
    let set = fd.set_msrs(&msrs).map_err(|error| Error::Call { call: "KVM_SET_MSRS", vcpu, error })?;
    match entries.get(set) {
        Some(refused) => Err(Error::Msr { vcpu, msr: refused.index }),
        None => Ok(()),
    }
}

/// The local interrupt pins as a PC's BIOS leaves them, and as the MP table says: the 8259s on LINT0, NMI on
/// LINT1.
fn connect_local_interrupts(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY_MODE: u32 = 7 << 8;
    for (offset, mode) in [(LVT_LINT0, 7 << 8), (LVT_LINT1, 4 << 8)] {
        let register = &mut lapic.regs[offset..offset + 4];
        let old = register.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte as u8));
        let new = old & !DELIVERY_MODE | mode;
        for (byte, value) in register.iter_mut().zip(new.to_le_bytes()) {
            *byte = value as std::os::raw::c_char;
        }
    }
}

/// The state that a PVH kernel is entered in: xen/include/public/arch-x86/hvm/start_info.h.
fn flat_protected_mode(sregs: &mut kvm_sregs) {
    let segment = |selector, type_, s, base, limit, db, g| kvm_segment {
        base,
        limit,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s,
        l: 0,
        g,
        ..Default::default()
    };
    let data = segment(0x10, 3, 1, 0, 0xffff_ffff, 1, 1);
    sregs.cs = segment(0x08, 11, 1, 0, 0xffff_ffff, 1, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(0x18, 11, 0, 0, 0x67, 0, 0);
    sregs.cr0 = CR0_PE;
    sregs.cr4 = 0;
    sregs.efer = 0;
}
