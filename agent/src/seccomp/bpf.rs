//! Classic BPF as seccomp runs it: `struct seccomp_data` in, an action out (seccomp(2)).

use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator};

use super::X32;

pub const KILL_PROCESS: u32 = 0x8000_0000;
pub const KILL_THREAD: u32 = 0;
pub const TRAP: u32 = 0x0003_0000;
pub const ERRNO: u32 = 0x0005_0000;
pub const TRACE: u32 = 0x7ff0_0000;
pub const LOG: u32 = 0x7ffc_0000;
pub const ALLOW: u32 = 0x7fff_0000;

pub const ARCH_X86_64: u32 = 0xc000_003e;
pub const ARCH_I386: u32 = 0x4000_0003;

/// One instruction, linux/filter.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub if_true: u8,
    pub if_false: u8,
    pub k: u32,
}

pub const LOAD: u16 = 0x20;
pub const AND: u16 = 0x54;
pub const JUMP: u16 = 0x05;
pub const JUMP_EQUAL: u16 = 0x15;
pub const JUMP_GREATER: u16 = 0x25;
pub const JUMP_GREATER_EQUAL: u16 = 0x35;
pub const RETURN: u16 = 0x06;

impl Instruction {
    /// As one number, the way it passes to the container's first process.
    pub fn pack(&self) -> u64 {
        u64::from(self.code) << 48
            | u64::from(self.if_true) << 40
            | u64::from(self.if_false) << 32
            | u64::from(self.k)
    }

    /// The inverse of [`Self::pack`].
    pub fn unpack(packed: u64) -> Self {
        let [c0, c1, if_true, if_false, k @ ..] = packed.to_be_bytes();
        Self { code: u16::from_be_bytes([c0, c1]), if_true, if_false, k: u32::from_be_bytes(k) }
    }
}

impl From<Instruction> for libc::sock_filter {
    fn from(i: Instruction) -> Self {
        Self { code: i.code, jt: i.if_true, jf: i.if_false, k: i.k }
    }
}

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, if_true: 0, if_false: 0, k }
}

fn jump(code: u16, k: u32, if_true: u8, if_false: u8) -> Instruction {
    Instruction { code, if_true, if_false, k }
}

/// Continues behind `body` if the test fails. Conditional jumps reach 255 instructions, a plain one any distance.
fn unless_skip(test: u16, k: u32, body: &[Instruction]) -> Vec<Instruction> {
    match u8::try_from(body.len()) {
        Ok(length) => vec![jump(test, k, 0, length)],
        Err(_) => vec![jump(test, k, 1, 0), op(JUMP, distance(body))],
    }
}

fn distance(body: &[Instruction]) -> u32 {
    u32::try_from(body.len()).unwrap_or(u32::MAX)
}

/// What to do with some calls.
#[derive(Debug, PartialEq, Eq)]
pub enum Block {
    /// All calls from `first` to `last`.
    Range { first: u32, last: u32, action: u32 },
    /// One call: the first rule whose conditions all hold, else `action`.
    Call { number: u32, rules: Vec<(Vec<LinuxSeccompArg>, u32)>, action: u32 },
}

/// Blocks in a row, the call's number being loaded, and the action for all others.
pub fn section(blocks: &[Block], default: u32) -> Vec<Instruction> {
    let mut section = Vec::new();
    for block in blocks {
        match block {
            Block::Range { first, last, action } if first == last => {
                section.push(jump(JUMP_EQUAL, *first, 0, 1));
                section.push(op(RETURN, *action));
            }
            Block::Range { first, last, action } => {
                section.push(jump(JUMP_GREATER_EQUAL, *first, 0, 2));
                section.push(jump(JUMP_GREATER, *last, 1, 0));
                section.push(op(RETURN, *action));
            }
            Block::Call { number, rules, action } => {
                let mut body: Vec<Instruction> =
                    rules.iter().flat_map(|(arguments, then)| rule(arguments, *then)).collect();
                body.push(op(RETURN, *action));
                section.extend(unless_skip(JUMP_EQUAL, *number, &body));
                section.append(&mut body);
            }
        }
    }
    section.push(op(RETURN, default));
    section
}

/// Returns `action` if every condition holds, continues behind itself if not.
fn rule(arguments: &[LinuxSeccompArg], action: u32) -> Vec<Instruction> {
    // Built backwards: each condition has to know how far away the end is.
    let mut rule = vec![op(RETURN, action)];
    for argument in arguments.iter().rev() {
        let behind = u8::try_from(rule.len()).unwrap_or(u8::MAX);
        let mut test = condition(argument, behind);
        test.append(&mut rule);
        rule = test;
    }
    rule
}

/// Continues if the condition holds, else jumps over the `behind` instructions that follow.
fn condition(argument: &LinuxSeccompArg, behind: u8) -> Vec<Instruction> {
    // struct seccomp_data: nr, arch, instruction_pointer, args; little-endian.
    let low = 16 + 8 * u32::try_from(argument.index()).unwrap_or(0);
    let high = low + 4;
    let value = argument.value();
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (value_high, value_low) = halves(value);
    // Each test below ends in one jump; `yes` and `no` count from behind it.
    let (yes, no) = (0, behind);
    let order = |test: u16, negated: bool| {
        let (greater, not_greater) = if negated { (no, yes) } else { (yes, no) };
        vec![
            op(LOAD, high),
            // The high halves decide, unless they are equal.
            jump(JUMP_GREATER, value_high, greater + 3, 0),
            jump(JUMP_EQUAL, value_high, 0, not_greater + 2),
            op(LOAD, low),
            jump(test, value_low, greater, not_greater),
        ]
    };
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            op(LOAD, high),
            jump(JUMP_EQUAL, value_high, 0, no + 2),
            op(LOAD, low),
            jump(JUMP_EQUAL, value_low, yes, no),
        ],
        LinuxSeccompOperator::ScmpCmpNe => vec![
            op(LOAD, high),
            jump(JUMP_EQUAL, value_high, 0, 2),
            op(LOAD, low),
            jump(JUMP_EQUAL, value_low, no, yes),
        ],
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let (wanted_high, wanted_low) = halves(argument.value_two().unwrap_or(0));
            vec![
                op(LOAD, high),
                op(AND, value_high),
                jump(JUMP_EQUAL, wanted_high, 0, no + 3),
                op(LOAD, low),
                op(AND, value_low),
                jump(JUMP_EQUAL, wanted_low, yes, no),
            ]
        }
        LinuxSeccompOperator::ScmpCmpGt => order(JUMP_GREATER, false),
        LinuxSeccompOperator::ScmpCmpGe => order(JUMP_GREATER_EQUAL, false),
        LinuxSeccompOperator::ScmpCmpLe => order(JUMP_GREATER, true),
        LinuxSeccompOperator::ScmpCmpLt => order(JUMP_GREATER_EQUAL, true),
    }
}

/// The whole program: which architecture called, and on to its section.
pub fn program(native: &[Instruction], x32: bool, x86: Option<&[Instruction]>) -> Vec<Instruction> {
    let load_number = op(LOAD, 0);
    let mut native_section = vec![load_number];
    if x32 {
        // The rules of x86-64 hold for x32 too: the numbers are the same but for this bit.
        native_section.push(op(AND, !X32));
    } else {
        native_section.push(jump(JUMP_GREATER_EQUAL, X32, 0, 1));
        native_section.push(op(RETURN, KILL_PROCESS));
    }
    native_section.extend_from_slice(native);

    let mut program = vec![op(LOAD, 4)];
    program.extend(unless_skip(JUMP_EQUAL, ARCH_X86_64, &native_section));
    program.append(&mut native_section);
    if let Some(x86) = x86 {
        let mut section = vec![load_number];
        section.extend_from_slice(x86);
        program.extend(unless_skip(JUMP_EQUAL, ARCH_I386, &section));
        program.append(&mut section);
    }
    program.push(op(RETURN, KILL_PROCESS));
    program
}
