//! What the kernel does for this process once the VM runs: one list of system calls for each kind of thread.
//! Anything else kills the process (SIGSYS; the host's kernel log names the call).

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs the guest; reaches the devices' registers.
    Vcpu,
    /// The same as long as it has a template to make, which is before the guest has met a container.
    TemplateVcpu,
    /// The event loop: all devices but the file server, and the control socket.
    Main,
    /// Serves files.
    Fs,
}

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
#[error("seccomp filter: {0}")]
pub struct Error(String);

/// What any Rust thread needs: locks, memory, a clock, its end, and standard error.
const EVERY: &[c_long] = &[
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
];

/// KVM's calls of a running VM: KVM_RUN and KVM_GET_REGS of a vCPU, KVM_IRQFD and KVM_SET_GSI_ROUTING of the VM.
const VCPU_IOCTLS: &[u64] = &[0xae80, 0x8090_ae81, 0x4020_ae76, 0x4008_ae6a];

/// The state of a vCPU: KVM_GET_REGS, SREGS, MSRS, LAPIC, XSAVE, MP_STATE, VCPU_EVENTS, DEBUGREGS, XCRS, TSC_KHZ, and
/// KVM_SET_MSRS; of the VM: KVM_GET_IRQCHIP, PIT2, CLOCK.
const TEMPLATE_IOCTLS: &[u64] = &[
    0x8090_ae81,
    0x8138_ae83,
    0xc008_ae88,
    0x8400_ae8e,
    0x9000_aea4,
    0x8004_ae98,
    0x8040_ae9f,
    0x8080_aea1,
    0x8188_aea6,
    0xaea3,
    0x4008_ae89,
    0xc208_ae62,
    0x8070_ae9f,
    0x8030_ae7c,
];
/// What is written to the template's file, which pages there are, how it is told, and the filter that follows.
const TEMPLATE: &[c_long] = &[
    libc::SYS_pwrite64,
    libc::SYS_mincore,
    libc::SYS_sendmsg,
    libc::SYS_prctl,
    libc::SYS_seccomp,
];

/// Sockets of vsock and control, disks, taps, the event loop.
const MAIN: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_fcntl,
];
/// Only a pair of sockets, whose other end goes to the shim: never one that could reach further.
const AF_UNIX: u64 = libc::AF_UNIX as u64;
/// FIONBIO for a stream; TUNSETOFFLOAD, TUNSETVNETHDRSZ and TUNGETIFF for a tap that is there already.
const MAIN_IOCTLS: &[u64] = &[0x5421, 0x4004_54d0, 0x4004_54d8, 0x8004_54d2];

/// The file system calls of virtiofsd, all below the jail's root.
const FS: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_fchdir,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_umask,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_dup,
];

/// Confines the calling thread, and those it starts, for good.
///
/// # Errors
/// When the kernel has no seccomp.
pub fn install(kind: Kind) -> Result<(), Error> {
    let program = compile(kind)?;
    apply_filter(&program).map_err(|error| Error(error.to_string()))
}

fn compile(kind: Kind) -> Result<BpfProgram, Error> {
    let (calls, ioctls): (&[c_long], &[u64]) = match kind {
        Kind::Vcpu => (&[], VCPU_IOCTLS),
        Kind::TemplateVcpu => (TEMPLATE, &[VCPU_IOCTLS, TEMPLATE_IOCTLS].concat()),
        Kind::Main => (MAIN, MAIN_IOCTLS),
        Kind::Fs => (FS, &[]),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        EVERY.iter().chain(calls).map(|call| (*call, vec![])).collect();
    let rule = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| Error(error.to_string()))
    };
    let equal = |argument, value| rule(argument, SeccompCmpOp::Eq, value);
    // Memory for data only: nothing that was not code at the start ever becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?]);
    }
    // A debug build looks whether a descriptor that it closes is open.
    rules.entry(libc::SYS_fcntl).or_insert(vec![equal(1, libc::F_GETFD as u64)?]);
    let ioctls: Vec<_> = ioctls.iter().map(|request| equal(1, *request)).collect::<Result<_, _>>()?;
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, ioctls);
    }
    if kind == Kind::Main {
        rules.insert(libc::SYS_socketpair, vec![equal(0, AF_UNIX)?]);
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(|error| Error(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::SIGSYS;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// How a process ends that confines itself and then makes this call.
    fn fate(kind: Kind, [number, a, b, c]: [c_long; 4]) -> WaitStatus {
        // SAFETY: the child uses no lock that another thread of the test could hold: it allocates little, and
        // leaves by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            ForkResult::Child => {
                nix::sys::prctl::set_no_new_privs().unwrap();
                install(kind).unwrap();
                // SAFETY: none of the calls below does anything with the arguments given there.
                unsafe { libc::syscall(number, a, b, c) };
                // SAFETY: _exit does not come back.
                unsafe { libc::_exit(0) }
            }
        }
    }

    #[test]
    fn what_no_thread_needs_kills_the_process() {
        for kind in [Kind::Vcpu, Kind::Main, Kind::Fs] {
            let allowed = fate(kind, [libc::SYS_sched_yield, 0, 0, 0]);
            assert!(matches!(allowed, WaitStatus::Exited(_, 0)), "{kind:?}: {allowed:?}");
            for call in [
                [libc::SYS_socket, c_long::from(libc::AF_INET), c_long::from(libc::SOCK_STREAM), 0],
                [libc::SYS_execve, 0, 0, 0],
                [libc::SYS_mprotect, 0, 0, c_long::from(libc::PROT_EXEC)],
                [libc::SYS_ioctl, 0, libc::TIOCSTI as c_long, 0],
                [libc::SYS_mount, 0, 0, 0],
            ] {
                let fate = fate(kind, call);
                assert!(matches!(fate, WaitStatus::Signaled(_, SIGSYS, _)), "{kind:?}, {call:?}: {fate:?}");
            }
        }
    }
}
