//! A machine without devices on the real KVM: a template of it, and those that are restored from it.

use super::*;
use crate::boot;
use crate::bus::Bus;
use crate::console_ring::ConsoleRing;
use crate::cpu::{self, Topology};
use crate::end::{End, Ended};
use crate::i8042::{self, I8042};
use crate::kvm::Vm;
use crate::pci::{self, PciBus, TemplateRegister};
use crate::serial::{self, Serial};
use crate::vcpu::Vcpu;
use katana_protocol::bridge;
use katana_protocol::vmm::Template;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

const CODE: u64 = 0x10_0000;
/// Counts in the first byte of this page.
const COUNTER: u64 = 0x20_0000;

fn shape() -> Shape {
    Shape {
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 32,
        pluggable_mib: 0,
        kernel_params: String::new(),
        net_slots: 0,
        disk_slots: 0,
        invariant_tsc: true,
        guest_cid: 3,
        template: Template::Make,
        debug: false,
    }
}

struct Bench {
    vm: Vm,
    memory: GuestMemory,
    vcpu: Vcpu,
    console: ConsoleRing,
    end: Arc<End>,
    register: Arc<TemplateRegister>,
}

/// A machine whose vCPU has yet to be given its entry point; nothing where there is no KVM.
fn bench() -> Option<Bench> {
    let Ok(dev_kvm) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        let thread = std::thread::current();
        let _ =
            writeln!(io::stderr(), "skipped: {}: cannot open /dev/kvm", thread.name().unwrap_or("a test"));
        return None;
    };
    let mut vm = Vm::new(dev_kvm.into(), 1).unwrap();
    let memory = crate::memory::create(32, None).unwrap();
    vm.add_memory(&memory).unwrap();
    let (console, end) = (ConsoleRing::new(false), Arc::new(End::new().unwrap()));
    let register = Arc::new(TemplateRegister::default());
    let mut ports = Bus::default();
    ports.insert(serial::PORTS, Arc::new(Serial::new(console.clone()))).unwrap();
    ports.insert(i8042::PORTS, Arc::new(I8042::new(end.clone()))).unwrap();
    ports.insert(pci::PORTS, Arc::new(PciBus::new(register.clone()))).unwrap();
    let fd = crate::kvm::create_vcpu(&vm.fd(), 0).unwrap();
    let topology = Topology { vcpus: 1, invariant_tsc: true };
    cpu::identify(&fd, 0, &vm.cpuid, &topology).unwrap();
    let (ports, addresses) = (ports.into(), Bus::default().into());
    let vcpu = Vcpu { fd, number: 0, ports, addresses, end: end.clone(), maker: None };
    Some(Bench { vm, memory, vcpu, console, end, register })
}

/// Has a template made in the file when the guest asks for it; returns where the result is sent.
fn employ_maker(bench: &mut Bench, file: File, check: Option<File>) -> mpsc::Receiver<Result<(), Error>> {
    let (sender, made) = mpsc::channel();
    bench.vcpu.maker = Some(Maker {
        register: bench.register.clone(),
        vm: bench.vm.fd(),
        msr_indices: bench.vm.msr_indices().unwrap(),
        memory: bench.memory.clone(),
        functions: Vec::new(),
        shape: shape(),
        code: (0, 4 << 20),
        file,
        made: Box::new(move |made| {
            check.iter().for_each(expect_unwritten);
            sender.send(made).unwrap();
        }),
    });
    made
}

/// Nobody writes to the file. A process that another test forks has a copy of each descriptor until it ends.
fn expect_unwritten(file: &File) {
    let end = Instant::now() + Duration::from_secs(30);
    while is_written_to(file) {
        assert!(Instant::now() < end, "the template is still open for writing");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether anybody has the file open for writing, or mapped: then there is no lease (fcntl(2)).
fn is_written_to(file: &File) -> bool {
    // SAFETY: neither command takes a pointer.
    let lease = |kind: libc::c_int| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    lease(libc::F_RDLCK) != 0 || lease(libc::F_UNLCK) != 0
}

/// Runs a guest that reports that it is ready, counts and prints the count, up to its end; the template and what it
/// printed.
fn make() -> Option<(File, String)> {
    let mut bench = bench()?;
    // mov eax,0x80000040; mov dx,0xcf8; out dx,eax; mov dx,0xcfc; mov al,1; out dx,al;
    // inc byte [COUNTER]; mov al,[COUNTER]; mov dx,0x3f8; out dx,al; mov al,0xfe; out 0x64,al; hlt
    let code = b"\xb8\x40\x00\x00\x80\x66\xba\xf8\x0c\xef\x66\xba\xfc\x0c\xb0\x01\xee\
        \xfe\x04\x25\x00\x00\x20\x00\x8a\x04\x25\x00\x00\x20\x00\x66\xba\xf8\x03\xee\xb0\xfe\xe6\x64\xf4";
    bench.memory.write_slice(code, GuestAddress(CODE)).unwrap();
    bench.memory.write_slice(b"A", GuestAddress(COUNTER)).unwrap();
    let entry = boot::enter_at(&bench.memory, CODE).unwrap();
    cpu::set_up(&bench.vcpu.fd, 0, Some(&entry)).unwrap();
    let file = TempFile::new().unwrap();
    let reader = File::open(file.as_path()).unwrap();
    let made = employ_maker(&mut bench, file.into_file(), Some(reader.try_clone().unwrap()));
    // The thread is confined afterwards.
    let (mut vcpu, end) = (bench.vcpu, bench.end);
    assert_eq!(std::thread::spawn(move || vcpu.run()).join().unwrap(), None);
    assert_eq!(end.reached(), Some(Ended::Reset));
    made.recv().unwrap().unwrap();
    let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let sealed = TimeSpec::new(SEALED, 0);
    futimens(&file, &sealed, &sealed).unwrap();
    Some((file, bench.console.tail()))
}

/// Restores a machine from a template; what its guest printed.
fn restore(file: &File) -> String {
    let mut bench = bench().unwrap();
    let state = State::read(file, &shape()).unwrap();
    state.map_memory(file, &bench.memory).unwrap();
    crate::kvm::set_clock(&bench.vm.fd(), state.clock).unwrap();
    state.cpu.give(&bench.vcpu.fd).unwrap();
    assert_eq!(bench.vcpu.run(), None);
    assert_eq!(bench.end.reached(), Some(Ended::Reset));
    bench.console.tail()
}

#[test]
fn machines_are_restored_from_a_template_and_know_nothing_of_each_other() {
    let Some((file, printed)) = make() else { return };
    assert_eq!(printed, "B");
    for _ in 0..2 {
        assert_eq!(restore(&file), "B");
    }
    // GDT and page tables, code, counter, and what KVM wrote into none of them.
    let state = State::read(&file, &shape()).unwrap();
    assert_eq!(state.extents, [(0x6000, 6 * PAGE), (CODE, PAGE), (COUNTER, PAGE)]);
}

/// What reaches the register then can be anybody in the guest.
#[test]
fn a_guest_that_has_connected_becomes_no_template() {
    let Some(mut bench) = bench() else { return };
    // mov eax,0x80000040; mov dx,0xcf8; out dx,eax; mov dx,0xcfc; mov al,1; out dx,al; mov al,0xfe; out 0x64,al; hlt
    let code = b"\xb8\x40\x00\x00\x80\x66\xba\xf8\x0c\xef\x66\xba\xfc\x0c\xb0\x01\xee\xb0\xfe\xe6\x64\xf4";
    bench.memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let entry = boot::enter_at(&bench.memory, CODE).unwrap();
    cpu::set_up(&bench.vcpu.fd, 0, Some(&entry)).unwrap();
    let file = TempFile::new().unwrap().into_file();
    let made = employ_maker(&mut bench, file.try_clone().unwrap(), None);
    bench.register.close();
    // The thread is confined afterwards.
    let mut vcpu = bench.vcpu;
    assert_eq!(std::thread::spawn(move || vcpu.run()).join().unwrap(), None);
    assert_eq!(bench.end.reached(), Some(Ended::Reset));
    assert!(matches!(made.try_recv(), Ok(Err(Error::TooLate))));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn time_passes_when_the_guest_asks_for_it() {
    let Some(mut bench) = bench() else { return };
    // mov eax,0x80000040; mov dx,0xcf8; out dx,eax; mov dx,0xcfc; mov al,2; out dx,al; mov al,0xfe; out 0x64,al; hlt
    let code = b"\xb8\x40\x00\x00\x80\x66\xba\xf8\x0c\xef\x66\xba\xfc\x0c\xb0\x02\xee\xb0\xfe\xe6\x64\xf4";
    bench.memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let entry = boot::enter_at(&bench.memory, CODE).unwrap();
    cpu::set_up(&bench.vcpu.fd, 0, Some(&entry)).unwrap();
    let _made = employ_maker(&mut bench, TempFile::new().unwrap().into_file(), None);
    let clock = || crate::kvm::clock(&bench.vm.fd()).unwrap();
    let before = clock();
    assert_eq!(bench.vcpu.run(), None);
    assert!(clock() >= before + bridge::SKIPPED * 1_000_000_000);
}

#[test]
fn a_file_that_is_not_whole_is_refused() {
    let Some((file, _)) = make() else { return };
    let seal = |file: &File| futimens(file, &TimeSpec::new(SEALED, 0), &TimeSpec::new(SEALED, 0)).unwrap();
    let why = |shape: &Shape| State::read(&file, shape).err().map(|error| error.to_string());
    assert_eq!(why(&shape()), None);
    assert!(matches!(State::read(&file, &Shape { memory_mib: 31, ..shape() }), Err(Error::Incomplete)));
    assert!(matches!(State::read(&file, &Shape { net_slots: 1, ..shape() }), Err(Error::Other)));

    let length = file.metadata().unwrap().len();
    let mut byte = [0];
    file.read_exact_at(&mut byte, COUNTER).unwrap();
    file.write_all_at(&byte, COUNTER).unwrap();
    assert!(matches!(State::read(&file, &shape()), Err(Error::Changed)));
    file.read_exact_at(&mut byte, length - TRAILER - 1).unwrap();
    file.write_all_at(&[byte[0] ^ 1], length - TRAILER - 1).unwrap();
    seal(&file);
    assert!(matches!(State::read(&file, &shape()), Err(Error::Damaged)));
    for cut in [length - 1, length - TRAILER, 32 << 20, 4096, 0] {
        file.set_len(cut).unwrap();
        seal(&file);
        assert!(matches!(State::read(&file, &shape()), Err(Error::Incomplete)), "{cut}");
    }
}

#[test]
fn the_file_follows_the_memory_across_the_hole() {
    assert_eq!(locate(512, 4096), Some(GuestAddress(4096)));
    assert_eq!(locate(512, 512 << 20), None);
    assert_eq!(locate(4096, (3 << 30) + 4096), Some(GuestAddress((4 << 30) + 4096)));
}

/// A file that claims to be a template, complete and unchanged.
#[test]
fn fuzz_template() {
    let shape = shape();
    let file = TempFile::new().unwrap().into_file();
    let memory = crate::memory::create(shape.memory_mib, None).unwrap();
    katana_fuzz::fuzz("template", |input| {
        let mut state = input.rest().to_vec();
        // The corpus has it of the version that made it.
        let name = postcard::to_allocvec(&program()).unwrap();
        let same = state.len().min(name.len());
        state[..same].copy_from_slice(&name[..same]);
        let length = (state.len() as u64).to_le_bytes();
        let trailer = [&MAGIC[..], &length, &Sha256::digest(&state)].concat();
        file.set_len(0).unwrap();
        file.write_all_at(&[state, trailer].concat(), shape.memory_mib << 20).unwrap();
        futimens(&file, &TimeSpec::UTIME_OMIT, &TimeSpec::new(SEALED, 0)).unwrap();
        let Ok(state) = State::read(&file, &shape) else { return };
        let _ = (state.map_memory(&file, &memory), state.guest_cid());
    });
}
