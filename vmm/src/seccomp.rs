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
    /// The event loop: all devices but the file server, and the control socket.
    Main,
    /// Serves files.
    Fs,
    /// Does nothing: stands for a container.
    Parked,
    /// Makes and starts vCPUs while the guest runs. They inherit its filter, and add their own.
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
            Self::Parked => include_bytes!(concat!(env!("OUT_DIR"), "/parked.bpf")),
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
        for kind in [Kind::Vcpu, Kind::Main, Kind::Fs, Kind::Starter] {
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
            let fate = fate(Kind::Parked, call);
            assert!(matches!(fate, WaitStatus::Signaled(_, SIGSYS, _)), "{call:?}: {fate:?}");
        }
        let end = fate(Kind::Parked, [libc::SYS_exit, 0, 0, 0]);
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
}
