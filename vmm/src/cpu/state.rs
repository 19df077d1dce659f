//! All of a vCPU that can be read from outside: taken from one that has stopped between two instructions, given to a
//! fresh one. KVM API, 4; the order matters.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_debugregs, kvm_device_attr, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::{Error, msr};

/// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR, for a vCPU (kvm-ioctls knows them on other architectures only).
const SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
/// The deadline of the local APIC's timer: only taken once the local APIC is in that mode.
const TSC_DEADLINE: u32 = 0x6e0;
/// Registers that follow from others, and that would move the clock if they were written once more.
const CLOCKS: [u32; 3] = [msr::IA32_TSC, msr::IA32_TSC_ADJUST, TSC_DEADLINE];

/// A vCPU's state.
#[derive(Serialize, Deserialize)]
pub struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    tsc: u64,
    tsc_deadline: u64,
    /// kHz.
    tsc_frequency: u32,
}

fn call(call: &'static str) -> impl FnOnce(errno::Error) -> Error {
    move |error| Error::Call { call, vcpu: 0, error }
}

impl CpuState {
    /// Takes the state of a vCPU whose last exit has been completed. `indices` are the registers that this KVM knows.
    ///
    /// # Errors
    /// When KVM does not report it.
    pub fn take(fd: &VcpuFd, indices: &[u32]) -> Result<Self, Error> {
        let msrs = indices.iter().filter(|index| !CLOCKS.contains(index));
        let msrs = msrs.filter_map(|index| restorable(fd, *index)).collect();
        Ok(Self {
            // KVM_GET_MP_STATE first: it lets the local APIC take what has arrived.
            mp_state: fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
            regs: fd.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            xsave: Box::new(fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
            xcrs: fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: Box::new(fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?),
            msrs,
            tsc: get(fd, msr::IA32_TSC).ok_or(Error::Msr { vcpu: 0, msr: msr::IA32_TSC })?,
            // Not there without the timer's deadline mode.
            tsc_deadline: get(fd, TSC_DEADLINE).unwrap_or(0),
            tsc_frequency: fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?,
            events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Gives the state to a vCPU that has its CPUID and has never run.
    ///
    /// # Errors
    /// When KVM does not take a part of it.
    pub fn give(&self, fd: &VcpuFd) -> Result<(), Error> {
        self.expect_frequency(fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?)?;
        fd.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: the guest has no features whose state needs more than this structure: nobody asked the kernel to
        // let it (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM).
        unsafe { fd.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        // A CPU without XSAVE has none, and KVM then refuses the call, whatever is in it.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        }
        fd.set_debug_regs(&self.debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        move_clock(fd, self.tsc)?;
        fd.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        set(fd, &self.msrs)?;
        if self.tsc_deadline != 0 {
            set(fd, &[entry(TSC_DEADLINE, self.tsc_deadline)])?;
        }
        fd.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// The guest has measured the TSC once and counts time by it. KVM could scale it on some processors, each vCPU for
    /// itself, and on the others pretend, by jumps (KVM API, KVM_SET_TSC_KHZ); a template of this host's own is right
    /// on all.
    fn expect_frequency(&self, host: u32) -> Result<(), Error> {
        let template = self.tsc_frequency;
        if template == host { Ok(()) } else { Err(Error::TscFrequency { template, host }) }
    }
}

/// Advances the guest's clock by so many seconds at once. A timer that was to expire in them expires.
///
/// # Errors
/// When KVM does not take it.
pub fn skip(fd: &VcpuFd, seconds: u64) -> Result<(), Error> {
    let frequency = u64::from(fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?) * 1000;
    let now = get(fd, msr::IA32_TSC).ok_or(Error::Msr { vcpu: 0, msr: msr::IA32_TSC })?;
    move_clock(fd, now.wrapping_add(seconds * frequency))?;
    // KVM has set its own timer by the clock as it was.
    match get(fd, TSC_DEADLINE) {
        None | Some(0) => Ok(()),
        Some(deadline) => set(fd, &[entry(TSC_DEADLINE, deadline)]),
    }
}

/// Sets the guest's clock to `tsc`. A value that is written to the register may be taken for an attempt to keep vCPUs
/// in step, and is then not applied as it is; an offset always is.
fn move_clock(fd: &VcpuFd, tsc: u64) -> Result<(), Error> {
    let mut offset = 0;
    // Linux before 5.16.
    if !offset_attribute(fd, GET_DEVICE_ATTR, &mut offset) {
        return set(fd, &[entry(msr::IA32_TSC, tsc)]);
    }
    // The guest's clock is the host's, scaled if the guest's is to have another frequency, and the offset. So what the
    // guest would read is asked for: the host's own clock would be right for a guest of the same frequency only.
    let now = get(fd, msr::IA32_TSC).ok_or(Error::Msr { vcpu: 0, msr: msr::IA32_TSC })?;
    offset = moved(offset, now, tsc);
    if offset_attribute(fd, SET_DEVICE_ATTR, &mut offset) {
        return Ok(());
    }
    Err(call("KVM_SET_DEVICE_ATTR")(errno::Error::last()))
}

/// The offset with which a clock that reads `now` would read `wanted`.
fn moved(offset: u64, now: u64, wanted: u64) -> u64 {
    offset.wrapping_add(wanted.wrapping_sub(now))
}

/// Reads or writes KVM_VCPU_TSC_OFFSET (KVM API, vcpu devices, 4.1); whether KVM did it.
fn offset_attribute(fd: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> bool {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: &raw mut *offset as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the attribute, and reads or writes the offset that it points to, which live through the
    // call.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const attribute) == 0 }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// A register that can be read and also be written with what was read; of the others, KVM makes up the values.
fn restorable(fd: &VcpuFd, index: u32) -> Option<kvm_msr_entry> {
    let entry = entry(index, get(fd, index)?);
    set(fd, &[entry]).is_ok().then_some(entry)
}

fn get(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[entry(index, 0)]).ok()?;
    match fd.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

fn set(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let msrs = Msrs::from_entries(entries).map_err(|_| Error::Msr { vcpu: 0, msr: 0 })?;
    let taken = fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
    match entries.get(taken) {
        Some(refused) => Err(Error::Msr { vcpu: 0, msr: refused.index }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{Vm, create_vcpu};
    use std::io::{self, Write};

    /// How far from a wish the clock may be: what passes meanwhile, on a machine that has much else to do.
    const MINUTE: u64 = 60;

    #[test]
    fn the_offset_counts_in_the_guests_time() {
        let host = 41_000_000_000_000u64;
        for (numerator, denominator, before) in
            [(1, 1, 0), (1, 2, 0), (7, 3, 5u64.wrapping_neg()), (1, 1, 1 << 63)]
        {
            let read = |offset: u64| (host / denominator * numerator).wrapping_add(offset);
            for wanted in [0, 1, 864_000_000_000_000, u64::MAX] {
                assert_eq!(read(moved(before, read(before), wanted)), wanted);
            }
        }
    }

    /// Past the test runner, for tests/all to count.
    fn say_skipped(why: &str) {
        let thread = std::thread::current();
        let _ = writeln!(io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
    }

    /// A machine for two vCPUs; nothing where there is no KVM.
    fn vm() -> Option<Vm> {
        let Ok(kvm) = std::fs::File::options().read(true).write(true).open("/dev/kvm") else {
            say_skipped("cannot open /dev/kvm");
            return None;
        };
        Some(Vm::new(kvm.into(), 2).unwrap())
    }

    #[test]
    fn a_guest_that_measured_another_frequency_is_refused() {
        let Some(vm) = vm() else { return };
        let fd = create_vcpu(&vm.fd(), 0).unwrap();
        let mut state = CpuState::take(&fd, &[]).unwrap();
        let host = state.tsc_frequency;
        let other = create_vcpu(&vm.fd(), 1).unwrap();
        // Within the 250 ppm that KVM takes for the same, and far beyond.
        for template in [host - 1, host + 1, host / 2, host * 2, 0] {
            state.tsc_frequency = template;
            assert_eq!(
                state.give(&other).unwrap_err().to_string(),
                format!("the template's TSC runs at {template} kHz, this host's at {host} kHz")
            );
        }
        state.tsc_frequency = host;
        state.give(&other).unwrap();
    }

    #[test]
    fn the_clock_runs_from_the_value_that_was_set_also_at_another_frequency() {
        let Some(vm) = vm() else { return };
        let fd = create_vcpu(&vm.fd(), 0).unwrap();
        let host = fd.get_tsc_khz().unwrap();
        for khz in [host, host / 2, host * 2] {
            if khz != host && fd.set_tsc_khz(khz).is_err() {
                return say_skipped("this CPU does not scale its clock");
            }
            let second = u64::from(khz) * 1000;
            // Ten days of uptime; the host's own clock has nothing to do with it.
            let wanted = 864_000 * second;
            move_clock(&fd, wanted).unwrap();
            let mut offset = 0;
            if khz == host && offset_attribute(&fd, GET_DEVICE_ATTR, &mut offset) && offset == 0 {
                return say_skipped("this KVM has all guests read the host's clock");
            }
            let before = get(&fd, msr::IA32_TSC).unwrap();
            assert!(
                (wanted..wanted + MINUTE * second).contains(&before),
                "{khz} of {host} kHz: {before} for {wanted}"
            );
            skip(&fd, 1000).unwrap();
            let after = get(&fd, msr::IA32_TSC).unwrap();
            assert!(
                (before + 1000 * second..before + (1000 + MINUTE) * second).contains(&after),
                "{khz} kHz: {after}"
            );
        }
    }
}
