//! What the host's kernel has to have: system calls that came with later versions of Linux, and the error that names a
//! missing one.
//!
//! The newest of them, mount_setattr(2), has no substitute: what a guest may see is made read-only, private or slave
//! before it gets its place in the VMM's mount namespace, and no other call changes a mount that has none.

use std::io;

use libc::c_long;

/// The oldest version that is supported: the first with long-term support that has all of [`CALLS`].
pub const OLDEST: &str = "5.15";

/// A system call that is not in all kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// The version of Linux that it came with.
    pub since: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    number: c_long,
}

/// A call that the kernel does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's kernel has no {name}(2), which came with Linux {since}, or something forbids it: Linux {OLDEST} or newer is needed, \
     see kata-runtime check",
    name = .0.name, since = .0.since
)]
pub struct Missing(pub Call);

const fn call(name: &'static str, number: c_long, since: &'static str, purpose: &'static str) -> Call {
    Call { name, since, purpose, number }
}

/// open_tree(2)
pub const OPEN_TREE: Call = call("open_tree", libc::SYS_open_tree, "5.2", "volumes");
/// move_mount(2)
pub const MOVE_MOUNT: Call = call("move_mount", libc::SYS_move_mount, "5.2", "volumes");
/// fsopen(2)
pub const FSOPEN: Call = call("fsopen", libc::SYS_fsopen, "5.2", "roots of containers");
/// fsconfig(2)
pub const FSCONFIG: Call = call("fsconfig", libc::SYS_fsconfig, "5.2", "roots of containers");
/// fsmount(2)
pub const FSMOUNT: Call = call("fsmount", libc::SYS_fsmount, "5.2", "roots of containers");
/// mount_setattr(2)
pub const MOUNT_SETATTR: Call = call("mount_setattr", libc::SYS_mount_setattr, "5.12", "read-only volumes");
/// openat2(2)
pub const OPENAT2: Call = call("openat2", libc::SYS_openat2, "5.6", "paths in what a guest can change");
/// pidfd_send_signal(2)
pub const PIDFD_SEND_SIGNAL: Call =
    call("pidfd_send_signal", libc::SYS_pidfd_send_signal, "5.1", "the VMM's process");
/// pidfd_open(2)
pub const PIDFD_OPEN: Call = call("pidfd_open", libc::SYS_pidfd_open, "5.3", "the VMM's process");
/// clone3(2), with CLONE_INTO_CGROUP, which came later than the call.
pub const CLONE3: Call = call("clone3", libc::SYS_clone3, "5.7", "the VMM's jail");
/// close_range(2)
pub const CLOSE_RANGE: Call = call("close_range", libc::SYS_close_range, "5.9", "the VMM's jail");

/// Everything without which no container starts.
pub const CALLS: [Call; 11] = [
    OPEN_TREE,
    MOVE_MOUNT,
    FSOPEN,
    FSCONFIG,
    FSMOUNT,
    MOUNT_SETATTR,
    OPENAT2,
    PIDFD_SEND_SIGNAL,
    PIDFD_OPEN,
    CLONE3,
    CLOSE_RANGE,
];

impl Call {
    /// Whether this process can make the call.
    pub fn is_there(&self) -> bool {
        // All bits of all arguments: to each of these calls that means flags, commands or sizes that do not exist.
        let refused: c_long = -1;
        // SAFETY: the kernel refuses what is asked before it looks at any memory, and makes nothing.
        let result =
            unsafe { libc::syscall(self.number, refused, refused, refused, refused, refused, refused) };
        result != -1 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
    }

    /// An error of this call, in words that help when it is that there is no such call.
    pub fn explain(&self, error: impl Into<io::Error>) -> io::Error {
        let error = error.into();
        if error.raw_os_error() == Some(libc::ENOSYS) {
            return io::Error::new(io::ErrorKind::Unsupported, Missing(*self));
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod without {
        include!("kernel/without.rs");
    }

    #[test]
    fn this_kernel_has_all_and_what_is_taken_away_is_missed() {
        for call in CALLS {
            assert!(call.is_there(), "{}", call.name);
            assert!(!without::without(call.name, || call.is_there()), "{}", call.name);
            let others = |other: &&Call| other.name != call.name;
            let there = || CALLS.iter().filter(others).all(Call::is_there);
            assert!(without::without(call.name, there), "{}", call.name);
        }
    }

    #[test]
    fn only_what_is_missing_is_explained() {
        let error = CLONE3.explain(io::Error::from_raw_os_error(libc::ENOSYS)).to_string();
        assert!(
            error.starts_with("this host's kernel has no clone3(2), which came with Linux 5.7, or"),
            "{error}"
        );
        assert!(error.contains("Linux 5.15 or newer is needed"), "{error}");
        let error = CLONE3.explain(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
