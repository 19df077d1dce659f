//! How fast KVM runs ring 0: the same counted loop in ring 0 of a tiny guest and right here.
//!
//! Some KVMs, among them those of hosts without nested virtualization, run only ring 3 on the CPU and interpret ring 0
//! one instruction at a time. A ratio decides, not a time: it holds on slow hosts and on emulated ones.

use std::arch::asm;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::kvm::{Error, step};

/// From this slowdown on, ring 0 is interpreted. Interpreters are slower by a thousand and more; a CPU's own
/// virtualization by nothing, plus a world switch that the loop is long enough to hide.
pub(crate) const INTERPRETED: u64 = 50;

/// Turns of the loop, of two instructions each: some 50 µs on a CPU, some 150 ms in an interpreter.
const TURNS: u64 = 100_000;
/// The best of so many runs counts; on a busy host any single one may be interrupted.
const RUNS: usize = 3;

/// Guest memory: one 2 MiB page, as the guest's page tables map it.
const MEMORY: usize = 2 << 20;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const CODE: usize = 0x4000;

/// `loop: dec rcx; jnz loop; hlt`
const PROGRAM: &[u8] = &[0x48, 0xFF, 0xC9, 0x75, 0xFB, 0xF4];

/// Page table entries, Intel SDM 3A, 4.5: present and writable; a page of this level itself.
const TABLE_ENTRY: u64 = 0x3;
const PAGE_ENTRY: u64 = 0x83;

/// Control registers of a 64-bit kernel, Intel SDM 3A, 2.5: PE, ET, PG; PAE. EFER: LME, LMA.
const CR0: u64 = 1 | 1 << 4 | 1 << 31;
const CR4: u64 = 1 << 5;
const EFER: u64 = 1 << 8 | 1 << 10;

/// How many times longer ring 0 in a virtual machine takes than the same on this CPU; at least 1.
pub(crate) fn slowdown(kvm: &Kvm) -> Result<u64, Error> {
    let mut guest = Guest::new(kvm)?;
    // The first run also pays for what is done once: nested page tables, and translation where the CPU is emulated.
    guest.run(1)?;
    let mut virtualized = Duration::MAX;
    let mut native = Duration::MAX;
    for _ in 0..RUNS {
        virtualized = virtualized.min(guest.run(TURNS)?);
        native = native.min(run_native(TURNS));
    }
    let ratio = virtualized.as_nanos() / native.as_nanos().max(1);
    Ok(u64::try_from(ratio).unwrap_or(u64::MAX).max(1))
}

fn run_native(turns: u64) -> Duration {
    let start = Instant::now();
    // SAFETY: counts a register down to zero and touches nothing else.
    unsafe { asm!("2:", "dec {0}", "jnz 2b", inout(reg) turns => _, options(nomem, nostack)) };
    start.elapsed()
}

/// A guest with one vCPU in 64-bit mode, its memory mapped one to one, and the loop.
struct Guest {
    vcpu: VcpuFd,
    // After the vCPU: the memory may go only when nothing runs on it.
    _vm: VmFd,
    _memory: Memory,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, Error> {
        let vm = kvm.create_vm().map_err(|error| match Errno::from_raw(error.errno()) {
            Errno::EBUSY => Error::Busy(error.into()),
            _ => Error::Step { step: "create a virtual machine", source: error.into() },
        })?;
        let mut memory = Memory::new().map_err(|source| Error::Step { step: "get guest memory", source })?;
        memory.write(PML4, &(PDPT as u64 | TABLE_ENTRY).to_le_bytes());
        memory.write(PDPT, &(PD as u64 | TABLE_ENTRY).to_le_bytes());
        memory.write(PD, &PAGE_ENTRY.to_le_bytes());
        memory.write(CODE, PROGRAM);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.start.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, of this size, and lives as long as the guest: both are in `Guest`.
        step("give memory to a virtual machine", unsafe { vm.set_user_memory_region(region) })?;
        let vcpu = step("create a virtual CPU", vm.create_vcpu(0))?;
        let cpuid = step("tell its CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        step("set a virtual CPU's CPUID", vcpu.set_cpuid2(&cpuid))?;
        let sregs = step("read a virtual CPU's registers", vcpu.get_sregs())?;
        step("set a virtual CPU's registers", vcpu.set_sregs(&kernel_mode(sregs)))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs the loop so many times; without an interrupt controller in KVM the halt at its end comes back here.
    fn run(&mut self, turns: u64) -> Result<Duration, Error> {
        // Bit 1 of RFLAGS is always set, Intel SDM 1, 3.4.3.
        let regs = kvm_regs { rip: CODE as u64, rcx: turns, rflags: 2, ..Default::default() };
        step("set a virtual CPU's registers", self.vcpu.set_regs(&regs))?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
                Ok(exit) => return Err(Error::Exit(format!("{exit:?}"))),
                Err(error) if error.errno() == Errno::EINTR as i32 => {}
                Err(error) => return Err(Error::Step { step: "run a virtual CPU", source: error.into() }),
            }
        }
    }
}

/// Ring 0 of a 64-bit kernel with flat segments.
fn kernel_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 0xB,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 0x3, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= CR4;
    sregs.cr0 |= CR0;
    sregs.efer |= EFER;
    sregs
}

/// The guest's memory, zeroed.
struct Memory {
    start: NonNull<u8>,
}

impl Memory {
    fn new() -> io::Result<Self> {
        let size = NonZeroUsize::new(MEMORY).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { start: start.cast() })
    }

    /// Writes at one of the offsets above, while no vCPU runs.
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        // SAFETY: mapped for `MEMORY` bytes until `self` is dropped, borrowed mutably, and not yet known to KVM.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), MEMORY) };
        memory[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing points into the mapping any more: `Guest` drops its vCPU and VM first.
        let _ = unsafe { munmap(self.start.cast(), MEMORY) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::kvm;
    use std::io::{self, Write};
    use std::path::Path;

    #[test]
    fn the_loop_runs_in_ring_0_as_often_as_asked() {
        let kvm = match kvm::open(Path::new("/dev/kvm")) {
            Ok(kvm) => kvm,
            Err(error) => {
                // Past the test runner, for tests/all to count.
                let thread = std::thread::current();
                let name = thread.name().unwrap_or("a test");
                return writeln!(io::stderr(), "skipped: {name}: {error}").unwrap();
            }
        };
        let mut guest = Guest::new(&kvm).unwrap();
        for turns in [1, TURNS] {
            guest.run(turns).unwrap();
            let regs = guest.vcpu.get_regs().unwrap();
            assert_eq!((regs.rcx, regs.rip), (0, (CODE + PROGRAM.len()) as u64));
            assert_eq!(guest.vcpu.get_sregs().unwrap().cs.dpl, 0);
        }
    }

    #[test]
    fn the_native_loop_takes_time_in_proportion() {
        let best = |turns| (0..5).map(|_| run_native(turns)).min().unwrap();
        assert!(best(TURNS * 100) > best(TURNS) * 20);
    }
}
