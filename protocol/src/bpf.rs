//! eBPF programs: instructions, and how they get into the kernel (Linux, bpf/standardization/instruction-set.rst;
//! linux/bpf.h). The shim has one on the pod's network, the agent one for each container's devices.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u8,
    /// The destination in the low half.
    pub registers: u8,
    /// Of memory, or of a jump.
    pub offset: i16,
    /// A number.
    pub immediate: i32,
}

/// Codes of instructions, by what they do with the destination.
#[expect(missing_docs, reason = "the names say it")]
pub mod code {
    pub const LOAD_WORD: u8 = 0x61;
    pub const STORE_WORD: u8 = 0x62;
    pub const LOAD_IMMEDIATE: u8 = 0x18;
    pub const ADD: u8 = 0x07;
    pub const MULTIPLY: u8 = 0x27;
    pub const AND: u8 = 0x57;
    pub const AND_REGISTER: u8 = 0x5f;
    pub const OR_REGISTER: u8 = 0x4f;
    pub const XOR: u8 = 0xa7;
    pub const NEGATE: u8 = 0x87;
    pub const SHIFT_RIGHT: u8 = 0x77;
    pub const MOVE: u8 = 0xb7;
    pub const MOVE_REGISTER: u8 = 0xbf;
    pub const JUMP: u8 = 0x05;
    pub const JUMP_EQUAL: u8 = 0x15;
    pub const JUMP_NOT_EQUAL: u8 = 0x55;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
}

/// An instruction.
#[must_use]
pub const fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

const BPF_PROG_LOAD: libc::c_long = 5;

/// The start of `union bpf_attr` for BPF_PROG_LOAD, as far as the attach type.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// bpf(2).
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// The attributes must be those of the command, and what they point to must live.
pub unsafe fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are of the size given; the rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    i32::try_from(Errno::result(result)?).map_err(|_| io::ErrorKind::Other.into())
}

/// Loads a program. `attach_type` is 0 for types of programs that have one only.
///
/// # Errors
/// When the kernel refuses it.
pub fn load(program: &[Instruction], program_type: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type,
        instruction_count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 4],
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach_type,
    };
    // SAFETY: program and licence live through the call; the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(call(BPF_PROG_LOAD, &attributes)?) })
}
