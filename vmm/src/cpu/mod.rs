//! The state in which a vCPU starts.

mod cpuid;
mod state;

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::boot::{Entry, GDT_ENTRIES};

pub use cpuid::Topology;
pub use state::{CpuState, skip};

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

/// Protected mode, paging, with physical addresses of more than 32 bits, in long mode.
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
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
    /// Of another host, or of a KVM that was told another frequency.
    #[error("the template's TSC runs at {template} kHz, this host's at {host} kHz")]
    TscFrequency {
        /// Of the guest when it stopped, in kHz.
        template: u32,
        /// Of a new guest, in kHz.
        host: u32,
    },
    /// Too many CPUID leaves.
    #[error("CPUID: more leaves than KVM takes")]
    CpuId,
}

/// Sets the CPUID of vCPU `vcpu`. To be done first.
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

    // KVM finds the addressee of an interrupt in a table, which it makes anew when a local APIC changes, and not for
    // one that has just been made.
    let lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))?;

    if let Some(entry) = entry {
        let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        long_mode(&mut sregs, entry);
        fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rflags: EFLAGS_RESERVED,
            rip: entry.address,
            rsi: entry.parameters,
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

/// The state that a kernel is entered in (Documentation/arch/x86/boot.rst, 64-bit boot protocol): the segments are
/// those of [`GDT_ENTRIES`].
fn long_mode(sregs: &mut kvm_sregs, entry: &Entry) {
    let segment = |selector, type_, db, l| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x18, 3, 1, 0);
    sregs.cs = segment(0x10, 11, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt =
        kvm_dtable { base: entry.gdt, limit: (size_of_val(&GDT_ENTRIES) - 1) as u16, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_PG;
    sregs.cr3 = entry.page_tables;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
