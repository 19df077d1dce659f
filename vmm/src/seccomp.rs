//! What the kernel does for this process once the VM runs: one list of system calls for each kind of thread.
//! Anything else kills the process (SIGSYS; the host's kernel log names the call).

use seccompiler::{apply_filter, sock_filter};

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs the guest; reaches the devices' registers.
    Vcpu,
    /// The same as long as it has a template to make, which is before the guest has met a container.
    TemplateVcpu,
    /// The event loop: all devices but the file server and disks, and the control socket.
    Main,
    /// Serves files.
    Fs,
    /// Starts further threads that do. They inherit its filter, and add their own.
    FsStarter,
    /// Does nothing: stands for a container.
    Placeholder,
    /// Serves a disk.
    Disk,
    /// Makes and starts vCPUs and the threads of disks while the guest runs. They inherit its filter, and add their own.
    Starter,
}

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
#[error("seccomp filter: {0}")]
pub struct Error(String);

impl Kind {
    /// The filter, as `build.rs` has left it: `struct sock_filter` after `struct sock_filter`.
    fn compiled(self) -> &'static [u8] {
        match self {
            Self::Vcpu => include_bytes!(concat!(env!("OUT_DIR"), "/vcpu.bpf")),
            Self::TemplateVcpu => include_bytes!(concat!(env!("OUT_DIR"), "/template_vcpu.bpf")),
            Self::Main => include_bytes!(concat!(env!("OUT_DIR"), "/main.bpf")),
            Self::Fs => include_bytes!(concat!(env!("OUT_DIR"), "/fs.bpf")),
            Self::FsStarter => include_bytes!(concat!(env!("OUT_DIR"), "/fs_starter.bpf")),
            Self::Placeholder => include_bytes!(concat!(env!("OUT_DIR"), "/placeholder.bpf")),
            Self::Disk => include_bytes!(concat!(env!("OUT_DIR"), "/disk.bpf")),
            Self::Starter => include_bytes!(concat!(env!("OUT_DIR"), "/starter.bpf")),
        }
    }

    /// The filter.
    pub fn program(self) -> Vec<sock_filter> {
        let instruction = |bytes: &[u8; 8]| {
            let [a, b, jt, jf, k @ ..] = *bytes;
            sock_filter { code: u16::from_le_bytes([a, b]), jt, jf, k: u32::from_le_bytes(k) }
        };
        self.compiled().as_chunks().0.iter().map(instruction).collect()
    }
}

/// Confines the calling thread, and those it starts, for good.
///
/// # Errors
/// When the kernel has no seccomp.
pub fn install(kind: Kind) -> Result<(), Error> {
    apply_filter(&kind.program()).map_err(|error| Error(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::c_long;
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
        for kind in [Kind::Vcpu, Kind::Main, Kind::Fs, Kind::FsStarter, Kind::Disk, Kind::Starter] {
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

    #[test]
    fn a_thread_that_does_nothing_can_do_nothing() {
        let none = c_long::from(-1_i8);
        for call in [
            [libc::SYS_write, none, 0, 0],
            [libc::SYS_openat, none, 0, 0],
            [libc::SYS_ioctl, none, 0, 0],
            [libc::SYS_mmap, 0, 0, 0],
            [libc::SYS_clone, 0, 0, 0],
            [libc::SYS_exit_group, 0, 0, 0],
        ] {
            let fate = fate(Kind::Placeholder, call);
            assert!(matches!(fate, WaitStatus::Signaled(_, SIGSYS, _)), "{call:?}: {fate:?}");
        }
        let end = fate(Kind::Placeholder, [libc::SYS_exit, 0, 0, 0]);
        assert!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
    }

    #[test]
    fn the_main_thread_makes_threads_and_nothing_else() {
        for (call, allowed) in [
            ([libc::SYS_clone3, 0, 0, 0], false),
            ([libc::SYS_seccomp, c_long::from(libc::SECCOMP_SET_MODE_FILTER), 0, 0], true),
            ([libc::SYS_seccomp, c_long::from(libc::SECCOMP_SET_MODE_FILTER), 8, 0], false),
            ([libc::SYS_clone, c_long::from(libc::SIGCHLD), 0, 0], false),
            ([libc::SYS_clone, c_long::from(libc::CLONE_NEWUSER), 0, 0], false),
        ] {
            let fate = fate(Kind::Main, call);
            assert_eq!(matches!(fate, WaitStatus::Exited(_, 0)), allowed, "{call:?}: {fate:?}");
        }
    }

    #[test]
    fn the_starter_of_file_threads_leaves_no_namespace() {
        for (call, allowed) in [
            ([libc::SYS_clone3, 0, 0, 0], true),
            ([libc::SYS_clone, c_long::from(libc::SIGCHLD), 0, 0], false),
            ([libc::SYS_unshare, c_long::from(libc::CLONE_FS), 0, 0], true),
            ([libc::SYS_unshare, c_long::from(libc::CLONE_NEWUSER), 0, 0], false),
            ([libc::SYS_unshare, c_long::from(libc::CLONE_NEWNS | libc::CLONE_FS), 0, 0], false),
            ([libc::SYS_prctl, c_long::from(libc::PR_CAPBSET_READ), 0, 0], false),
        ] {
            let fate = fate(Kind::FsStarter, call);
            assert_eq!(matches!(fate, WaitStatus::Exited(_, 0)), allowed, "{call:?}: {fate:?}");
        }
        // What a file thread must not do, it does not inherit either.
        let fate = fate(Kind::Fs, [libc::SYS_unshare, c_long::from(libc::CLONE_FS), 0, 0]);
        assert!(matches!(fate, WaitStatus::Signaled(_, SIGSYS, _)), "{fate:?}");
    }

    #[test]
    fn the_starter_makes_threads_of_the_c_library() {
        for (call, allowed) in [
            ([libc::SYS_clone3, 0, 0, 0], true),
            ([libc::SYS_clone, c_long::from(libc::SIGCHLD), 0, 0], false),
            ([libc::SYS_prctl, c_long::from(libc::PR_CAPBSET_READ), 0, 0], false),
            ([libc::SYS_openat, c_long::from(-1_i8), 0, 0], false),
        ] {
            let fate = fate(Kind::Starter, call);
            assert_eq!(matches!(fate, WaitStatus::Exited(_, 0)), allowed, "{call:?}: {fate:?}");
        }
    }

    #[test]
    fn arguments_decide_where_they_matter() {
        let none = c_long::from(-1_i8);
        for (kind, call) in [
            (Kind::Main, [libc::SYS_ioctl, none, libc::FIONBIO as c_long, 0]),
            // The last of its list: VHOST_NET_SET_BACKEND.
            (Kind::Main, [libc::SYS_ioctl, none, 0x4008_af30, 0]),
            (Kind::Main, [libc::SYS_socketpair, c_long::from(libc::AF_UNIX), 0, 0]),
            (Kind::Fs, [libc::SYS_mprotect, 0, 0, c_long::from(libc::PROT_READ)]),
        ] {
            let fate = fate(kind, call);
            assert!(matches!(fate, WaitStatus::Exited(_, 0)), "{kind:?}, {call:?}: {fate:?}");
        }
        for (kind, call) in [
            (Kind::Main, [libc::SYS_socketpair, c_long::from(libc::AF_INET), 0, 0]),
            (Kind::Fs, [libc::SYS_ioctl, none, libc::FIONBIO as c_long, 0]),
            (Kind::Vcpu, [libc::SYS_openat, none, 0, 0]),
        ] {
            let fate = fate(kind, call);
            assert!(matches!(fate, WaitStatus::Signaled(_, SIGSYS, _)), "{kind:?}, {call:?}: {fate:?}");
        }
    }

    fn expect(kind: Kind, call: [c_long; 4], allowed: bool) {
        let fate = fate(kind, call);
        let as_expected = match fate {
            WaitStatus::Exited(_, 0) => allowed,
            WaitStatus::Signaled(_, SIGSYS, _) => !allowed,
            _ => false,
        };
        assert!(as_expected, "{kind:?}, {call:?}: {fate:?}");
    }

    const WORKERS: [Kind; 7] =
        [Kind::Vcpu, Kind::TemplateVcpu, Kind::Main, Kind::Fs, Kind::FsStarter, Kind::Disk, Kind::Starter];

    #[test]
    fn a_disk_is_used_by_its_thread_which_does_nothing_else() {
        let none = c_long::from(-1_i8);
        for call in [libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_fdatasync, libc::SYS_fallocate] {
            for (kind, able) in
                [(Kind::Disk, true), (Kind::Starter, true), (Kind::Main, false), (Kind::Vcpu, false)]
            {
                expect(kind, [call, none, 0, 0], able);
            }
        }
        for call in [
            libc::SYS_openat,
            libc::SYS_clone,
            libc::SYS_prctl,
            libc::SYS_seccomp,
            libc::SYS_lseek,
            libc::SYS_ftruncate,
            libc::SYS_epoll_ctl,
            libc::SYS_recvmsg,
            libc::SYS_socketpair,
        ] {
            expect(Kind::Disk, [call, none, 0, 0], false);
        }
    }

    /// What a thread could do with a descriptor of /dev/kvm, of the machine, of a vCPU, a tap, a disk or a terminal
    /// beyond its own work.
    #[test]
    fn descriptors_take_the_requests_that_are_used_and_no_others() {
        let none = c_long::from(-1_i8);
        for request in [
            // KVM_CREATE_VM, CHECK_EXTENSION, GET_SUPPORTED_CPUID.
            0xae01,
            0xae03,
            0xc008_ae05,
            // KVM_SET_USER_MEMORY_REGION and the second of its name, SET_TSS_ADDR, CREATE_IRQCHIP, CREATE_PIT2,
            // ENABLE_CAP, CREATE_DEVICE, MEMORY_ENCRYPT_OP.
            0x4020_ae46,
            0x40a0_ae49,
            0xae47,
            0xae60,
            0x4040_ae77,
            0x4068_aea3,
            0xc00c_aee0,
            0xc008_aeba,
            // KVM_SET_REGS, SET_SREGS, INTERRUPT, SET_GUEST_DEBUG, SET_NESTED_STATE.
            0x4090_ae82,
            0x4138_ae84,
            0x4004_ae86,
            0x4048_ae9b,
            0x4080_aebf,
            // TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNATTACHFILTER; BLKROSET, SG_IO, FITRIM, FICLONE; SIOCSIFFLAGS.
            0x4004_54ca,
            0x4004_54cb,
            0x4004_54cc,
            0x4010_54d5,
            0x125d,
            0x2285,
            0xc018_5879,
            0x4004_9409,
            0x8914,
        ] {
            for kind in WORKERS {
                expect(kind, [libc::SYS_ioctl, none, request, 0], false);
            }
        }
        // KVM_RUN, KVM_SIGNAL_MSI, KVM_CREATE_VCPU, KVM_IOEVENTFD, KVM_GET_MSRS.
        for (request, able) in [
            (0xae80, &[Kind::Vcpu, Kind::TemplateVcpu, Kind::Starter][..]),
            (0x4020_aea5, &WORKERS),
            (0xae41, &[Kind::Starter]),
            (0x4040_ae79, &[Kind::Main]),
            (0xc008_ae88, &[Kind::TemplateVcpu]),
        ] {
            for kind in WORKERS {
                expect(kind, [libc::SYS_ioctl, none, request, 0], able.contains(&kind));
            }
        }
    }

    #[test]
    fn descriptors_take_the_commands_that_are_used_and_no_others() {
        let none = c_long::from(-1_i8);
        for (command, able) in [
            (libc::F_GETFD, &WORKERS[..]),
            (libc::F_GETFL, &[Kind::Main]),
            (libc::F_SETFL, &[Kind::Main]),
            (libc::F_DUPFD_CLOEXEC, &[Kind::Fs]),
            (libc::F_DUPFD, &[]),
            (libc::F_SETFD, &[]),
            (libc::F_SETOWN, &[]),
            (10, &[]),
            (libc::F_SETLK, &[]),
            (libc::F_SETLEASE, &[]),
            (libc::F_NOTIFY, &[]),
            (libc::F_SETPIPE_SZ, &[]),
            (libc::F_ADD_SEALS, &[]),
        ] {
            for kind in WORKERS {
                expect(kind, [libc::SYS_fcntl, none, command.into(), 0], able.contains(&kind));
            }
        }
    }

    /// Threads of the file server may call what `jail/tests/escape.rs` tries, and the others nothing that takes a path.
    #[test]
    fn calls_that_take_paths_are_for_the_file_server() {
        let tried = [
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_readlinkat,
            libc::SYS_mkdirat,
            libc::SYS_mknodat,
            libc::SYS_symlinkat,
            libc::SYS_linkat,
            libc::SYS_unlinkat,
            libc::SYS_renameat,
            libc::SYS_renameat2,
            libc::SYS_fchmodat,
            libc::SYS_fchownat,
            libc::SYS_utimensat,
            libc::SYS_getxattr,
            libc::SYS_setxattr,
            libc::SYS_listxattr,
            libc::SYS_removexattr,
            libc::SYS_fchdir,
        ];
        let others = [
            libc::SYS_open,
            libc::SYS_creat,
            libc::SYS_stat,
            libc::SYS_lstat,
            libc::SYS_access,
            libc::SYS_faccessat,
            libc::SYS_faccessat2,
            libc::SYS_truncate,
            libc::SYS_chdir,
            libc::SYS_chroot,
            libc::SYS_rename,
            libc::SYS_mkdir,
            libc::SYS_rmdir,
            libc::SYS_link,
            libc::SYS_unlink,
            libc::SYS_symlink,
            libc::SYS_readlink,
            libc::SYS_chmod,
            libc::SYS_chown,
            libc::SYS_lchown,
            libc::SYS_utime,
            libc::SYS_utimes,
            libc::SYS_futimesat,
            libc::SYS_mknod,
            libc::SYS_statfs,
            libc::SYS_pivot_root,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_swapon,
            libc::SYS_acct,
            libc::SYS_quotactl,
            libc::SYS_lsetxattr,
            libc::SYS_lgetxattr,
            libc::SYS_llistxattr,
            libc::SYS_lremovexattr,
            libc::SYS_name_to_handle_at,
            libc::SYS_open_by_handle_at,
            libc::SYS_inotify_add_watch,
            libc::SYS_fanotify_mark,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_bind,
            libc::SYS_connect,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_mount_setattr,
            libc::SYS_io_uring_setup,
            libc::SYS_pidfd_getfd,
            libc::SYS_process_vm_writev,
            libc::SYS_ptrace,
            libc::SYS_bpf,
        ];
        let none = c_long::from(-1_i8);
        for call in tried {
            expect(Kind::Fs, [call, none, 0, 0], true);
            expect(Kind::Main, [call, none, 0, 0], matches!(call, libc::SYS_statx));
            expect(Kind::Vcpu, [call, none, 0, 0], false);
        }
        for call in others {
            expect(Kind::Fs, [call, none, 0, 0], false);
            expect(Kind::Main, [call, none, 0, 0], false);
        }
    }
}
