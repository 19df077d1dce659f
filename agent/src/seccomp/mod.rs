//! OCI seccomp profiles as BPF programs (runtime-spec, config-linux.md, "Seccomp"; seccomp(2)).
//!
//! A program of its own rather than one of the `seccompiler` crate: a profile has an action for each rule, where
//! that crate has one for all, and it covers 32-bit programs as well.

mod bpf;
mod syscalls;

use std::collections::BTreeMap;

use nix::errno::Errno;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

use bpf::{Block, Instruction};

/// A profile that cannot be enforced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Needs a supervisor.
    #[error("seccomp: action SCMP_ACT_NOTIFY is not supported")]
    Notify,
    /// System calls have six arguments.
    #[error("seccomp: {0}: there is no argument {1}")]
    Argument(String, usize),
    /// SCMP_ACT_ERRNO and SCMP_ACT_TRACE carry 16 bits.
    #[error("seccomp: errnoRet {0} does not fit")]
    Errno(u32),
    /// The kernel takes 4096 instructions.
    #[error("seccomp: the profile becomes {0} instructions, more than the kernel takes")]
    TooLong(usize),
}

/// A compiled profile.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Filter {
    program: Vec<u64>,
    flags: u32,
}

/// Linux, include/uapi/linux/bpf_common.h: BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;
/// Bit of a system call's number that says x32.
const X32: u32 = 0x4000_0000;

/// What happens to one system call.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Call {
    /// Tried in order.
    conditional: Vec<(Vec<LinuxSeccompArg>, u32)>,
    /// When none of these matches.
    otherwise: Option<u32>,
}

/// System calls of one architecture by number.
type Calls = BTreeMap<u32, Call>;

/// Compiles a profile.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, Error> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let architectures = profile.architectures().as_deref().unwrap_or_default();
    let section = |number: fn(&Names) -> i32| {
        let calls = calls(profile.syscalls().as_deref().unwrap_or_default(), default, number)?;
        Ok(section(&calls, default))
    };
    let native = section(|names| names.1)?;
    let x86 = if architectures.contains(&Arch::ScmpArchX86) { Some(section(|names| names.2)?) } else { None };
    let program = bpf::program(&native, architectures.contains(&Arch::ScmpArchX32), x86.as_deref());
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Error::TooLong(program.len()));
    }
    let flags = profile.flags().iter().flatten().fold(0, |flags, flag| flags | flag_bit(*flag));
    Ok(Filter { program: program.iter().map(Instruction::pack).collect(), flags })
}

type Names = (&'static str, i32, i32);

fn calls(rules: &[LinuxSyscall], default: u32, number: fn(&Names) -> i32) -> Result<Calls, Error> {
    let mut calls = Calls::new();
    for rule in rules {
        let action = action(rule.action(), rule.errno_ret())?;
        for name in rule.names() {
            let known = syscalls::TABLE.binary_search_by_key(&name.as_str(), |names| names.0).ok();
            let names = known.and_then(|index| syscalls::TABLE.get(index));
            // Profiles name calls of other architectures and of kernels to come.
            let Some(number) = names.and_then(|names| u32::try_from(number(names)).ok()) else { continue };
            let call: &mut Call = calls.entry(number).or_default();
            // What the default says needs no rule; the call is known all the same (see `section`).
            if action != default {
                add_rule(call, name, rule.args().as_deref().unwrap_or_default(), action)?;
            }
        }
    }
    Ok(calls)
}

fn add_rule(call: &mut Call, name: &str, arguments: &[LinuxSeccompArg], action: u32) -> Result<(), Error> {
    if let Some(bad) = arguments.iter().find(|argument| argument.index() > 5) {
        return Err(Error::Argument(name.to_owned(), bad.index()));
    }
    let twice = arguments.iter().any(|a| arguments.iter().filter(|b| a.index() == b.index()).count() > 1);
    if arguments.is_empty() {
        call.otherwise.get_or_insert(action);
    } else if twice {
        // libseccomp cannot have two conditions on one argument; runtimes agreed to make alternatives of them.
        call.conditional.extend(arguments.iter().map(|argument| (vec![*argument], action)));
    } else {
        call.conditional.push((arguments.to_vec(), action));
    }
    Ok(())
}

/// The instructions for the calls of one architecture, the call's number being loaded.
///
/// A call newer than all that the profile names answers ENOSYS rather than the default: programs then fall back to
/// the older call, where EPERM would make them give up.
fn section(calls: &Calls, default: u32) -> Vec<Instruction> {
    let mut blocks: Vec<Block> = Vec::new();
    for (number, call) in calls {
        let fallback = call.otherwise.unwrap_or(default);
        if call.conditional.is_empty() {
            match blocks.last_mut() {
                Some(Block::Range { last, action, .. }) if *last + 1 == *number && *action == fallback => {
                    *last += 1;
                }
                _ => blocks.push(Block::Range { first: *number, last: *number, action: fallback }),
            }
        } else {
            blocks.push(Block::Call { number: *number, rules: call.conditional.clone(), action: fallback });
        }
    }
    if let Some(newest) = calls.keys().next_back()
        && ![bpf::ALLOW, bpf::LOG].contains(&default)
    {
        let enosys = bpf::ERRNO | Errno::ENOSYS as u32;
        blocks.push(Block::Range { first: newest + 1, last: X32 - 1, action: enosys });
    }
    blocks.retain(|block| !matches!(block, Block::Range { action, .. } if *action == default));
    bpf::section(&blocks, default)
}

fn action(action: LinuxSeccompAction, value: Option<u32>) -> Result<u32, Error> {
    let with_value = |base: u32| {
        let value = value.unwrap_or(Errno::EPERM as u32);
        if value > 0xffff { Err(Error::Errno(value)) } else { Ok(base | value) }
    };
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => Ok(bpf::KILL_THREAD),
        LinuxSeccompAction::ScmpActKillProcess => Ok(bpf::KILL_PROCESS),
        LinuxSeccompAction::ScmpActTrap => Ok(bpf::TRAP),
        LinuxSeccompAction::ScmpActErrno => with_value(bpf::ERRNO),
        LinuxSeccompAction::ScmpActTrace => with_value(bpf::TRACE),
        LinuxSeccompAction::ScmpActLog => Ok(bpf::LOG),
        LinuxSeccompAction::ScmpActAllow => Ok(bpf::ALLOW),
        LinuxSeccompAction::ScmpActNotify => Err(Error::Notify),
    }
}

fn flag_bit(flag: LinuxSeccompFilterFlag) -> u32 {
    let bit = match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // Speaks of notifications only.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    u32::try_from(bit).unwrap_or(0)
}

impl Filter {
    /// Puts the calling thread under the filter.
    pub fn load(&self) -> nix::Result<()> {
        let mut instructions: Vec<libc::sock_filter> =
            self.program.iter().map(|packed| Instruction::unpack(*packed).into()).collect();
        let length = u16::try_from(instructions.len()).map_err(|_| Errno::EINVAL)?;
        let program = libc::sock_fprog { len: length, filter: instructions.as_mut_ptr() };
        // SAFETY: the program points to `length` instructions that live through the call.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program)
        };
        Errno::result(result).map(drop)
    }
}

#[cfg(test)]
mod tests;
