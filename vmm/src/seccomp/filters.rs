//! The lists of system calls. They are compiled when the VMM is built (`build.rs`), since that takes longer than all
//! else at the start of a VM.

use std::collections::BTreeMap;
use std::num::TryFromIntError;

use libc::c_long;

/// Requests of ioctl(2), in several lists.
type Ioctls = &'static [&'static [u64]];

/// The kinds of threads, with the names of their compiled filters.
pub const KINDS: [(&str, &[c_long], Ioctls); 8] = [
    ("vcpu", &[], &[VCPU_IOCTLS]),
    ("template_vcpu", TEMPLATE, &[VCPU_IOCTLS, TEMPLATE_IOCTLS]),
    ("main", MAIN, &[MAIN_IOCTLS]),
    ("fs", FS, &[&[INTERRUPT], INODE_FLAGS]),
    ("fs_starter", FS, &[&[INTERRUPT], INODE_FLAGS]),
    ("disk", DISK, &[&[INTERRUPT]]),
    ("starter", STARTER, &[VCPU_IOCTLS, STARTER_IOCTLS]),
    (PLACEHOLDER, WAIT_AND_END, &[]),
];

/// The kind that gets none of what the others have in common.
const PLACEHOLDER: &str = "placeholder";
/// See `placeholder.rs`.
const WAIT_AND_END: &[c_long] = &[libc::SYS_futex, libc::SYS_exit];

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

/// KVM_SIGNAL_MSI.
const INTERRUPT: u64 = 0x4020_aea5;
/// KVM_SET_GSI_ROUTING, when the driver moves the interrupt of a queue that vhost-net serves.
const ROUTE: u64 = 0x4008_ae6a;
/// KVM's calls of a running VM: KVM_RUN and KVM_GET_REGS of a vCPU, KVM_SIGNAL_MSI and the like of the VM. And
/// VHOST_NET_SET_BACKEND, since a NIC that is reset is at rest when the driver continues.
const VCPU_IOCTLS: &[u64] = &[0xae80, 0x8090_ae81, INTERRUPT, ROUTE, 0x4008_af30];

/// The state of a vCPU: KVM_GET_REGS, SREGS, MSRS, LAPIC, XSAVE, MP_STATE, VCPU_EVENTS, DEBUGREGS, XCRS, TSC_KHZ, and
/// KVM_SET_MSRS, KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR; of the VM: KVM_GET_CLOCK and KVM_SET_CLOCK.
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
    0x4018_aee1,
    0x4018_aee2,
    0x8030_ae7c,
    0x4030_ae7b,
];
/// KVM_CREATE_VCPU of the VM; of the vCPU: KVM_SET_CPUID2, MSRS, FPU, KVM_GET_LAPIC, KVM_SET_LAPIC.
const STARTER_IOCTLS: &[u64] = &[0xae41, 0x4008_ae90, 0x4008_ae89, 0x41a0_ae8d, 0x8400_ae8e, 0x4400_ae8f];
/// Calls that write the template's file, find the pages that are there, report the result, and install the filter that
/// follows.
const TEMPLATE: &[c_long] =
    &[libc::SYS_pwrite64, libc::SYS_mincore, libc::SYS_sendmsg, libc::SYS_prctl, libc::SYS_seccomp];

/// Sockets of vsock and control, taps, the event loop; the size and kind of what is to be a disk.
const MAIN: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    // For an irqfd.
    libc::SYS_eventfd2,
];
/// A disk's requests, and the answer when it is detached. Its thread waits for its queue in read(2).
const DISK: &[c_long] =
    &[libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_fdatasync, libc::SYS_fallocate, libc::SYS_sendmsg];
/// An answer, what the C library does before a thread begins, and what disks need, whose threads begin with this.
const STARTER: &[c_long] = &[
    libc::SYS_sched_getaffinity,
    libc::SYS_sendmsg,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];
/// The flags of clone(2) in `placeholder.rs`: a thread, and neither a process nor a namespace.
const THREAD: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;
/// The flags of a thread of the C library.
const C_THREAD: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;
/// Only a pair of sockets, whose other end goes to the shim: never one that could reach further.
const AF_UNIX: u32 = libc::AF_UNIX as u32;
/// FIONBIO for a stream; TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE and TUNGETIFF for a tap that is there already;
/// KVM_IOEVENTFD for the doorbells of slots; KVM_IRQFD and those of `virtio/vhost.rs`, in its order.
const MAIN_IOCTLS: &[u64] = &[
    0x5421,
    0x4004_54d0,
    0x4004_54d8,
    0x4004_54d9,
    0x8004_54d2,
    0x4040_ae79,
    INTERRUPT,
    ROUTE,
    0x4020_ae76,
    0xaf01,
    0x8008_af00,
    0x4008_af00,
    0x4008_af03,
    0x4008_af10,
    0x4028_af11,
    0x4008_af12,
    0x4008_af20,
    0x4008_af21,
    0x4008_af30,
];

/// Those of `virtio/fs/inode_flags.rs`: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR and
/// FS_IOC_GETVERSION of a file.
const INODE_FLAGS: &[u64] = &[0x8008_6601, 0x4008_6602, 0x801c_581f, 0x401c_5820, 0x8008_7601];

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

/// What a call's arguments must be.
enum Rule {
    Any,
    /// The lower half of an argument is one of these values.
    OneOf(u32, Vec<u32>),
    /// An argument has none of these bits.
    Without(u32, u32),
    /// There is no such call, which the C library is prepared for.
    Missing,
}

const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const IF_NOT_BELOW: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const ALLOW: Instruction = step(RETURN, libc::SECCOMP_RET_ALLOW);
const KILL: Instruction = step(RETURN, libc::SECCOMP_RET_KILL_PROCESS);
const NO_SUCH_CALL: Instruction = step(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`: the number of the call, the architecture, and six arguments of eight bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `struct sock_filter`.
#[derive(Clone, Copy)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip if a condition holds.
    pub jt: u8,
    /// And if it does not.
    pub jf: u8,
    /// Its operand.
    pub k: u32,
}

const fn step(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: usize, jf: usize) -> Result<Instruction, TryFromIntError> {
    Ok(Instruction { code, jt: jt.try_into()?, jf: jf.try_into()?, k })
}

/// The filter of a kind of thread. It finds a call by halving the list: the kernel goes through a filter for every call
/// there is when it is installed, and a list from top to bottom would take it longer than anything else at a VM's
/// start.
///
/// # Errors
/// When the lists are too long.
pub fn compile(name: &str, calls: &[c_long], ioctls: &[&[u64]]) -> Result<Vec<Instruction>, TryFromIntError> {
    let rules: Vec<_> =
        if name == PLACEHOLDER { rules_of(calls)? } else { usual_rules(name, calls, ioctls)? }
            .into_iter()
            .collect();
    let start =
        [step(LOAD, ARCHITECTURE), jump(IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0)?, KILL, step(LOAD, NUMBER)];
    Ok([&start[..], &find(&rules)?].concat())
}

fn rules_of(calls: &[c_long]) -> Result<BTreeMap<u32, Rule>, TryFromIntError> {
    calls.iter().map(|call| Ok((u32::try_from(*call)?, Rule::Any))).collect()
}

/// What all kinds of threads have in common that do anything, and the calls of this one.
fn usual_rules(
    name: &str,
    calls: &[c_long],
    ioctls: &[&[u64]],
) -> Result<BTreeMap<u32, Rule>, TryFromIntError> {
    let mut rules = rules_of(EVERY)?;
    rules.extend(rules_of(calls)?);
    let mut add = |call: c_long, rule| Ok::<_, TryFromIntError>(rules.insert(call.try_into()?, rule));
    // Memory for data only: nothing that was not code at the start ever becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        add(call, Rule::Without(2, libc::PROT_EXEC as u32))?;
    }
    let ioctls = ioctls.iter().copied().flatten().map(|request| u32::try_from(*request));
    add(libc::SYS_ioctl, Rule::OneOf(1, ioctls.collect::<Result<_, _>>()?))?;
    if name == "main" {
        add(libc::SYS_socketpair, Rule::OneOf(0, vec![AF_UNIX]))?;
        // Threads that do nothing, and their filter: a further one only ever takes rights away, and without flags no
        // other process is notified of calls.
        add(libc::SYS_clone, Rule::OneOf(0, vec![THREAD as u32]))?;
        add(libc::SYS_seccomp, Rule::Without(1, u32::MAX))?;
    }
    if name == "fs_starter" {
        // To let some time pass, and what its threads do before they confine themselves further.
        add(libc::SYS_clock_nanosleep, Rule::Any)?;
        add(libc::SYS_sched_getaffinity, Rule::Any)?;
        add(libc::SYS_unshare, Rule::OneOf(0, vec![libc::CLONE_FS as u32]))?;
    }
    if name == "starter" || name == "fs_starter" {
        // A thread, its name, and the filter that follows for it. clone3(2) has its flags where no filter can look.
        add(libc::SYS_clone3, Rule::Missing)?;
        add(libc::SYS_clone, Rule::OneOf(0, vec![C_THREAD as u32]))?;
        add(
            libc::SYS_prctl,
            Rule::OneOf(0, vec![libc::PR_SET_NAME as u32, libc::PR_SET_NO_NEW_PRIVS as u32]),
        )?;
        add(libc::SYS_seccomp, Rule::Without(1, u32::MAX))?;
    }
    // A debug build looks whether a descriptor that it closes is open. None of the others has a signal sent, takes a
    // lock or a lease, or changes how large a pipe is.
    let commands: &[_] = match name {
        // A tap must not block.
        "main" => &[libc::F_GETFD, libc::F_GETFL, libc::F_SETFL],
        // What is open once more.
        "fs" => &[libc::F_GETFD, libc::F_DUPFD_CLOEXEC],
        _ => &[libc::F_GETFD],
    };
    add(libc::SYS_fcntl, Rule::OneOf(1, commands.iter().map(|command| command.cast_unsigned()).collect()))?;
    Ok(rules)
}

/// Finds the number that is loaded among the calls, which are in order.
fn find(rules: &[(u32, Rule)]) -> Result<Vec<Instruction>, TryFromIntError> {
    let [(call, rule)] = rules else {
        let (low, high) = rules.split_at(rules.len() / 2);
        let (below, first) = (find(low)?, high.first().map_or(0, |(call, _)| *call));
        return Ok([vec![jump(IF_NOT_BELOW, first, below.len(), 0)?], below, find(high)?].concat());
    };
    let allowed = check(rule)?;
    Ok([vec![jump(IF_EQUAL, *call, 0, allowed.len())?], allowed, vec![KILL]].concat())
}

/// Allows a call, or ends behind itself.
fn check(rule: &Rule) -> Result<Vec<Instruction>, TryFromIntError> {
    let argument = |number: u32| step(LOAD, ARGUMENTS + 8 * number);
    Ok(match rule {
        Rule::Any => vec![ALLOW],
        Rule::Missing => vec![NO_SUCH_CALL],
        Rule::Without(number, bits) => vec![argument(*number), jump(IF_ANY_BIT, *bits, 1, 0)?, ALLOW],
        Rule::OneOf(number, values) => {
            let mut steps = vec![argument(*number)];
            for (index, value) in values.iter().enumerate() {
                let left = values.len() - 1 - index;
                steps.push(jump(IF_EQUAL, *value, left, usize::from(left == 0))?);
            }
            steps.push(ALLOW);
            steps
        }
    })
}
