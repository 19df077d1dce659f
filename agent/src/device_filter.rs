//! The device rules of `linux.resources.devices` as an eBPF program on the container's cgroup.
//!
//! cgroup v2 has no device controller; a `BPF_PROG_TYPE_CGROUP_DEVICE` program answers each open and mknod
//! (Linux, cgroup-v2.rst, "Device controller"). The rules keep the meaning that they had in cgroup v1: for every
//! kind of access the last rule that speaks of it and of the device decides.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use katana_protocol::bpf::code::*;
use katana_protocol::bpf::{self, Instruction, op};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// What went wrong with the filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A rule names what cannot be.
    #[error("device rule {0:?}: {1}")]
    Rule(String, &'static str),
    /// The kernel refuses the program.
    #[error("load the device filter: {0}")]
    Load(io::Error),
    /// The cgroup does not take it.
    #[error("attach the device filter to {0}: {1}")]
    Attach(String, io::Error),
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Device types of the program's context, linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// One rule; `None` is "any".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u32,
}

const fn allow(kind: Kind, major: Option<i32>, minor: Option<i32>, access: u32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// What every container may use, whatever its rules: the devices that the OCI runtime specification supplies
/// (config-linux.md, "Default Devices"), terminals, and making any node.
const DEFAULT: &[Rule] = &[
    allow(Kind::Char, None, None, MKNOD),
    allow(Kind::Block, None, None, MKNOD),
    allow(Kind::Char, Some(1), Some(3), ALL),
    allow(Kind::Char, Some(1), Some(5), ALL),
    allow(Kind::Char, Some(1), Some(7), ALL),
    allow(Kind::Char, Some(1), Some(8), ALL),
    allow(Kind::Char, Some(1), Some(9), ALL),
    allow(Kind::Char, Some(5), Some(0), ALL),
    allow(Kind::Char, Some(5), Some(2), ALL),
    allow(Kind::Char, Some(136), None, ALL),
];

/// A filter in force. The cgroup keeps it when this is dropped.
#[derive(Debug)]
pub struct DeviceFilter {
    program: OwnedFd,
}

impl DeviceFilter {
    /// Attaches the filter to a cgroup, in the place of `old`.
    pub fn attach(rules: &[LinuxDeviceCgroup], cgroup: &Path, old: Option<&Self>) -> Result<Self, Error> {
        let program =
            bpf::load(&compile(&effective(rules)?), BPF_PROG_TYPE_CGROUP_DEVICE, 0).map_err(Error::Load)?;
        let failed = |e| Error::Attach(cgroup.display().to_string(), e);
        let directory = File::open(cgroup).map_err(failed)?;
        attach(&directory, &program, old.map(|old| &old.program)).map_err(failed)?;
        Ok(Self { program })
    }
}

fn effective(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, Error> {
    let mut effective = rules.iter().map(rule).collect::<Result<Vec<Rule>, Error>>()?;
    effective.extend_from_slice(DEFAULT);
    Ok(effective)
}

fn rule(given: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let wrong = |why| Error::Rule(given.to_string(), why);
    let kind = match given.typ().unwrap_or(LinuxDeviceType::A) {
        // cgroup v1: "a" stands for every device and every access, whatever else the rule says.
        LinuxDeviceType::A => {
            return Ok(Rule { allow: given.allow(), kind: None, major: None, minor: None, access: ALL });
        }
        LinuxDeviceType::B => Kind::Block,
        LinuxDeviceType::C | LinuxDeviceType::U => Kind::Char,
        LinuxDeviceType::P => return Err(wrong("a pipe is no device")),
    };
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => {
            i32::try_from(number).ok().filter(|n| *n >= 0).map(Some).ok_or(wrong("number out of range"))
        }
    };
    let mut access = 0;
    for letter in given.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err(wrong("access is made of r, w and m")),
        };
    }
    let (major, minor) = (number(given.major())?, number(given.minor())?);
    Ok(Rule { allow: given.allow(), kind: Some(kind), major, minor, access })
}

/// Registers: the answer, the context, and what the program keeps in the others.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
/// What of the asked access no rule has allowed yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
/// What of the asked access a rule has refused before another allowed it.
const REFUSED: u8 = 6;
const DIFFERENCE: u8 = 7;
const SCRATCH: u8 = 8;

/// All rules from the last to the first, without a single jump: the kernel follows each way through a program before it
/// takes it, and with a jump for each condition, that was a good part of a container's start.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor.
    let mut program = vec![
        op(LOAD_WORD, KIND, CONTEXT, 0, 0),
        op(MOVE_REGISTER, WANTED, KIND, 0, 0),
        op(AND, KIND, 0, 0, 0xffff),
        op(SHIFT_RIGHT, WANTED, 0, 0, 16),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
        op(MOVE, REFUSED, 0, 0, 0),
    ];
    for rule in rules.iter().rev() {
        let Some(kind) = rule.kind else {
            // It speaks of everything: those before it have nothing left to say.
            if rule.allow {
                program.push(op(MOVE, WANTED, 0, 0, 0));
            }
            break;
        };
        compile_rule(rule, kind, &mut program);
    }
    // Allowed if nothing is wanted any more, and nothing was refused.
    program.push(op(OR_REGISTER, WANTED, REFUSED, 0, 0));
    program.push(op(MOVE_REGISTER, ANSWER, WANTED, 0, 0));
    is_not_zero(ANSWER, &mut program);
    program.push(op(XOR, ANSWER, 0, 0, 1));
    program.push(op(EXIT, 0, 0, 0, 0));
    program
}

fn compile_rule(rule: &Rule, kind: Kind, program: &mut Vec<Instruction>) {
    program.push(op(MOVE_REGISTER, DIFFERENCE, KIND, 0, 0));
    program.push(op(XOR, DIFFERENCE, 0, 0, kind as i32));
    for (register, value) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        let Some(value) = value else { continue };
        program.push(op(MOVE_REGISTER, SCRATCH, register, 0, 0));
        program.push(op(XOR, SCRATCH, 0, 0, value));
        program.push(op(OR_REGISTER, DIFFERENCE, SCRATCH, 0, 0));
    }
    is_not_zero(DIFFERENCE, program);
    // One if the rule speaks of this device, then the access that it speaks of. (With all ones and AND, newer kernels
    // follow both cases.)
    program.push(op(XOR, DIFFERENCE, 0, 0, 1));
    program.push(op(MULTIPLY, DIFFERENCE, 0, 0, rule.access.cast_signed()));
    if rule.allow {
        program.push(op(XOR, DIFFERENCE, 0, 0, -1));
        program.push(op(AND_REGISTER, WANTED, DIFFERENCE, 0, 0));
    } else {
        program.push(op(AND_REGISTER, DIFFERENCE, WANTED, 0, 0));
        program.push(op(OR_REGISTER, REFUSED, DIFFERENCE, 0, 0));
    }
}

/// Makes any number but zero a one: of a number and its opposite, one has the highest bit.
fn is_not_zero(register: u8, program: &mut Vec<Instruction>) {
    program.push(op(MOVE_REGISTER, SCRATCH, register, 0, 0));
    program.push(op(NEGATE, SCRATCH, 0, 0, 0));
    program.push(op(OR_REGISTER, register, SCRATCH, 0, 0));
    program.push(op(SHIFT_RIGHT, register, 0, 0, 63));
}

const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// The start of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
    replaced: i32,
}

fn attach(cgroup: &File, program: &OwnedFd, replaced: Option<&OwnedFd>) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: if replaced.is_some() { BPF_F_ALLOW_MULTI | BPF_F_REPLACE } else { BPF_F_ALLOW_MULTI },
        replaced: replaced.map_or(0, AsRawFd::as_raw_fd),
    };
    // SAFETY: the attributes are plain numbers.
    unsafe { bpf::call(BPF_PROG_ATTACH, &attributes) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for one access to one device.
    fn run(program: &[Instruction], kind: Kind, major: u64, minor: u64, access: u32) -> bool {
        let context = [u64::from(access << 16) | kind as u64, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let Instruction { code, registers: names, offset, immediate } = program[at];
            let (destination, source) = (usize::from(names & 15), usize::from(names >> 4));
            let value = i64::from(immediate).cast_unsigned();
            at += 1;
            let to = &mut registers[destination];
            match code {
                LOAD_WORD => *to = context[offset as usize / 4],
                MULTIPLY => *to = to.wrapping_mul(value),
                AND => *to &= value,
                XOR => *to ^= value,
                SHIFT_RIGHT => *to >>= value,
                MOVE => *to = value,
                NEGATE => *to = to.wrapping_neg(),
                MOVE_REGISTER => registers[destination] = registers[source],
                AND_REGISTER => registers[destination] &= registers[source],
                OR_REGISTER => registers[destination] |= registers[source],
                EXIT => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn program(json: &str) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        compile(&effective(&rules).unwrap())
    }

    #[test]
    fn the_last_rule_for_an_access_decides() {
        let deny_all = r#"[{"allow":false,"access":"rwm"}]"#;
        let fuse = r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#;
        let no_write = r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#;
        let privileged = r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#;
        let again = r#"[{"allow":true,"type":"c","major":9,"access":"rw"},{"allow":false,"type":"c","major":9,"access":"r"}]"#;
        let table: &[(&str, Kind, u64, u64, u32, bool)] = &[
            (deny_all, Kind::Char, 1, 3, READ | WRITE, true),
            (deny_all, Kind::Char, 1, 1, READ, false),
            (deny_all, Kind::Block, 8, 0, READ, false),
            (deny_all, Kind::Block, 8, 0, MKNOD, true),
            (deny_all, Kind::Block, 8, 0, MKNOD | READ, false),
            (deny_all, Kind::Char, 136, 77, READ | WRITE, true),
            ("[]", Kind::Char, 10, 229, READ, false),
            (fuse, Kind::Char, 10, 229, READ | WRITE, true),
            (fuse, Kind::Char, 10, 229, READ | WRITE | MKNOD, true),
            (fuse, Kind::Char, 10, 228, READ, false),
            (fuse, Kind::Block, 10, 229, READ, false),
            (no_write, Kind::Block, 8, 1, READ, true),
            (no_write, Kind::Block, 8, 1, WRITE, false),
            (no_write, Kind::Block, 8, 1, READ | WRITE, false),
            (no_write, Kind::Block, 9, 1, WRITE, true),
            (privileged, Kind::Block, 259, 5, ALL, true),
            (again, Kind::Char, 9, 0, WRITE, true),
            (again, Kind::Char, 9, 0, READ | WRITE, false),
        ];
        for (rules, kind, major, minor, access, expected) in table {
            let answer = run(&program(rules), *kind, *major, *minor, *access);
            assert_eq!(answer, *expected, "{rules} {kind:?} {major}:{minor} {access}");
        }
    }

    #[test]
    fn rules_that_cannot_be_are_refused() {
        for json in [
            r#"{"allow":true,"type":"c","major":99999999999,"access":"r"}"#,
            r#"{"allow":true,"type":"c","major":-7,"access":"r"}"#,
            r#"{"allow":true,"type":"c","access":"rx"}"#,
            r#"{"allow":true,"type":"p","access":"r"}"#,
        ] {
            assert!(rule(&serde_json::from_str(json).unwrap()).is_err(), "{json}");
        }
    }

    #[test]
    fn the_kernel_takes_the_programs() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        for rules in ["[]", r#"[{"allow":false,"access":"rwm"}]"#, r#"[{"allow":true}]"#] {
            bpf::load(&program(rules), BPF_PROG_TYPE_CGROUP_DEVICE, 0).unwrap();
        }
        let many: Vec<Rule> = (0..300).map(|n| allow(Kind::Char, Some(n), Some(n), READ)).collect();
        bpf::load(&compile(&many), BPF_PROG_TYPE_CGROUP_DEVICE, 0).unwrap();
    }

    /// Any rules: the last one for an access decides.
    #[test]
    fn fuzz_device_filter() {
        katana_fuzz::fuzz("device-filter", |input| {
            let (major, minor, access) =
                (input.u8().into(), input.u8().into(), 1 + u32::from(input.u8() % 7));
            let Ok(rules) = serde_json::from_slice::<Vec<LinuxDeviceCgroup>>(input.rest()) else { return };
            let Ok(effective) = effective(&rules) else { return };
            let program = compile(&effective);
            let decides = |bit: u32| {
                let covers = |rule: &&Rule| {
                    rule.kind.is_none_or(|kind| kind == Kind::Char)
                        && rule.major.is_none_or(|number| number as u64 == major)
                        && rule.minor.is_none_or(|number| number as u64 == minor)
                        && rule.access & bit != 0
                };
                effective.iter().rev().find(covers).is_some_and(|rule| rule.allow)
            };
            let expected = [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(decides);
            assert_eq!(run(&program, Kind::Char, major, minor, access), expected, "{effective:?}");
        });
    }
}
