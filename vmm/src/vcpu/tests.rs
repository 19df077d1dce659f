//! A few instructions on the real KVM, entered as a kernel is.

use super::*;
use crate::boot;
use crate::bus::BusDevice;
use crate::console_ring::ConsoleRing;
use crate::cpu::{self, Topology};
use crate::i8042::{self, I8042};
use crate::kvm::Vm;
use crate::pci::Doorbell;
use crate::serial::{self, Serial};
use crate::sync::lock;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const CODE: u64 = 0x10_0000;
const NOBODY: u64 = 0x3100_0000;
const DOORBELL: u64 = 0x3200_0000;

struct Bench {
    vcpu: Vcpu,
    console: ConsoleRing,
    end: Arc<End>,
    register: Arc<Register>,
    doorbell: Arc<EventFd>,
}

/// Four bytes at an address that is not memory.
#[derive(Default)]
struct Register(Mutex<Vec<u8>>);

impl BusDevice for Register {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x41);
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        lock(&self.0).extend_from_slice(data);
    }
}

/// A vCPU in front of `code`, or nothing where there is no KVM.
fn bench(code: &[u8]) -> Option<Bench> {
    let Ok(dev_kvm) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        let thread = thread::current();
        let _ =
            writeln!(io::stderr(), "skipped: {}: cannot open /dev/kvm", thread.name().unwrap_or("a test"));
        return None;
    };
    let mut vm = Vm::new(dev_kvm.into(), 1).unwrap();
    let memory = crate::memory::create(32, None).unwrap();
    vm.add_memory(&memory).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();

    let (console, end) = (ConsoleRing::new(false), Arc::new(End::new().unwrap()));
    let register = Arc::new(Register::default());
    let mut ports = Bus::default();
    ports.insert(serial::PORTS, Arc::new(Serial::new(console.clone()))).unwrap();
    ports.insert(i8042::PORTS, Arc::new(I8042::new(end.clone()))).unwrap();
    let mut addresses = Bus::default();
    addresses.insert(NOBODY..NOBODY + 4, register.clone()).unwrap();
    let doorbell = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    crate::kvm::add_doorbells(&vm.fd(), &[Doorbell { address: DOORBELL, event: doorbell.clone() }]).unwrap();

    let fd = crate::kvm::create_vcpu(&vm.fd(), 0).unwrap();
    let entry = boot::enter_at(&memory, CODE).unwrap();
    let topology = Topology { vcpus: 1, invariant_tsc: true };
    cpu::identify(&fd, 0, &vm.cpuid, &topology).unwrap();
    cpu::set_up(&fd, 0, Some(&entry)).unwrap();
    // The guest runs on them until the process ends.
    std::mem::forget((vm, memory));
    let vcpu = Vcpu {
        fd,
        number: 0,
        ports: ports.into(),
        addresses: addresses.into(),
        end: end.clone(),
        maker: None,
    };
    Some(Bench { vcpu, console, end, register, doorbell })
}

#[test]
fn a_guest_prints_and_resets() {
    // mov al,'k'; mov dx,0x3f8; out dx,al; mov al,0xfe; out 0x64,al; hlt
    let code = b"\xb0\x6b\x66\xba\xf8\x03\xee\xb0\xfe\xe6\x64\xf4";
    let Some(mut bench) = bench(code) else { return };
    assert_eq!(bench.vcpu.run(), None);
    assert_eq!(bench.end.reached(), Some(Ended::Reset));
    assert_eq!(bench.console.tail(), "k");
}

#[test]
fn a_triple_fault_is_reported_as_one() {
    // lidt [0 limit at 0x500]; ud2
    let code = b"\x0f\x01\x1c\x25\x00\x05\x00\x00\x0f\x0b";
    let Some(mut bench) = bench(code) else { return };
    assert_eq!(bench.vcpu.run(), Some(Ended::TripleFault));
}

#[test]
fn the_entry_is_a_kernels() {
    // mov [NOBODY],esi; mov rax,cr0; mov [NOBODY],eax; mov eax,cs; mov [NOBODY],eax; reset
    let code = b"\x89\x34\x25\x00\x00\x00\x31\x0f\x20\xc0\x89\x04\x25\x00\x00\x00\x31\
        \x8c\xc8\x89\x04\x25\x00\x00\x00\x31\xb0\xfe\xe6\x64";
    let Some(mut bench) = bench(code) else { return };
    assert_eq!(bench.vcpu.run(), None);
    let written = lock(&bench.register.0).clone();
    assert_eq!(written[..4], 0x7000u32.to_le_bytes());
    assert_eq!((written[4] & 1, written[7] & 0x80), (1, 0x80), "protected mode with paging");
    assert_eq!(written[8], 0x10);
}

#[test]
fn a_read_of_an_address_is_answered_and_a_doorbell_rings() {
    // mov eax,[NOBODY]; mov dx,0x3f8; out dx,al; mov [DOORBELL],ax; reset
    let code = b"\x8b\x04\x25\x00\x00\x00\x31\x66\xba\xf8\x03\xee\
        \x66\x89\x04\x25\x00\x00\x00\x32\xb0\xfe\xe6\x64";
    let Some(mut bench) = bench(code) else { return };
    assert_eq!(bench.vcpu.run(), None);
    assert_eq!(bench.console.tail(), "A");
    assert_eq!(bench.doorbell.read().unwrap(), 1);
}
