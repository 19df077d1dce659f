//! The jail: an empty root for a process that runs hostile guests.
//!
//! The process that the shim spawned stays outside. It makes a second one, in namespaces of its own, as the
//! shim's direct child; that one makes the pod's shared directory the root of all it can see. What the guest is to see
//! in there, the shim mounts in this mount namespace later, and nowhere else.

mod landlock;

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use katana_protocol::kernel;
use katana_protocol::mount::{MountAttributes, attach_mount_at, copy_mount, set_mount};
use libc::{c_int, c_ulong};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{chdir, dup2_stdin, dup2_stdout, fchdir, pipe2, pivot_root, read, setgroups, write};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// Every namespace but those of cgroups, time and the network. CLONE_PARENT: the shim reaps the VMM itself.
///
/// The network namespace is the pod's, in which the shim has started this process: clients look up the pod's network
/// by this process's id. To the jailed process it is as good as none. It belongs to another user namespace, in
/// which no capability of the jail counts, and seccomp knows no socket(2); all there is in it is what the guest
/// reaches through its NIC as well.
const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWPID
    | libc::CLONE_PARENT;
/// Every id is itself: capabilities mean nothing outside, yet files keep their owners.
const IDENTITY: &str = "0 0 4294967295";
/// Without file handles, the file server holds one descriptor for each file that the guest knows.
const DESCRIPTORS: u64 = 1 << 20;
/// Room in the table of descriptors from the start: the kernel lets a process with several threads wait for a grace
/// period of RCU, milliseconds, whenever it has the table grow (expand_fdtable, fs/file.c). A table of so many is a
/// page.
const ROOM_FOR_DESCRIPTORS: c_int = 512;
/// What the file server needs in the jail's user namespace to give files their owners and modes; by number, from
/// linux/capability.h: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const CAPABILITIES: &[u32] = &[0, 1, 2, 3, 4, 6, 7, 27, 31];
const LAST_POSSIBLE_CAPABILITY: u32 = 63;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {error}")]
pub struct Error {
    step: &'static str,
    error: io::Error,
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error { step, error: error.into() }
}

/// On which side of the door a process is after [`enter`].
pub enum Side {
    /// The process that the shim spawned: it has nothing left to do.
    Outside,
    /// The jailed one.
    Inside(Jail),
}

/// The inside of the jail. Its root is the shared directory.
pub struct Jail {
    /// /proc/self/fd of the jailed process, which has no /proc: virtiofsd opens files anew through it. A mount of this
    /// directory alone: `..` does not lead out of it.
    pub proc_self_fd: OwnedFd,
}

/// Makes the jailed process, in a cgroup if there is one. `announce` gets its pid, as the shim sees it, once it is sure
/// to live. Must be called while the process has one thread.
///
/// # Errors
/// Outside and inside, with the step that failed; when it failed outside, nobody is inside.
pub fn enter<E>(
    share: &OwnedFd,
    cgroup: Option<&OwnedFd>,
    announce: impl FnOnce(i32) -> Result<(), E>,
) -> Result<Side, Error>
where
    E: Into<io::Error>,
{
    set_limits()?;
    let (listen, wake) = pipe2(OFlag::O_CLOEXEC).map_err(step("pipe"))?;
    match clone(cgroup)? {
        0 => {
            drop(wake);
            // The outer process closes the pipe without a word when it could not do its part.
            let mut word = [0];
            if read(&listen, &mut word).map_err(step("wait for the id maps"))? != 1 {
                std::process::exit(1);
            }
            lock_up(share).map(Side::Inside)
        }
        pid => {
            map_ids(pid)?;
            announce(pid).map_err(step("announce the process"))?;
            write(&wake, &[1]).map_err(step("wake the process"))?;
            Ok(Side::Outside)
        }
    }
}

/// fork into new namespaces and a cgroup; like fork, it answers 0 to the new process. A process that is born in its
/// cgroup need not be moved there, for which the kernel stops all forking on the host for a grace period of RCU.
fn clone(cgroup: Option<&OwnedFd>) -> Result<i32, Error> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let into = if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
    // With CLONE_PARENT the exit signal is that of the caller, and none may be given (clone(2)).
    let arguments = libc::clone_args {
        flags: NAMESPACES as u64 | into,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
    };
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of all memory. The process has one thread,
    // so no lock is held by a thread that does not exist in the copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match pid {
        // namespaces(7): this is what a limit says.
        -1 if Errno::last() == Errno::ENOSPC => {
            Err(step("new namespaces (user.max_*_namespaces)")(Errno::last()))
        }
        -1 if cgroup.is_some() => {
            Err(step("new namespaces in the pod's cgroup")(kernel::CLONE3.explain(Errno::last())))
        }
        -1 => Err(step("new namespaces")(kernel::CLONE3.explain(Errno::last()))),
        pid => Ok(pid as i32),
    }
}

fn map_ids(pid: i32) -> Result<(), Error> {
    fs::write(format!("/proc/{pid}/uid_map"), IDENTITY).map_err(step("map user ids"))?;
    fs::write(format!("/proc/{pid}/gid_map"), IDENTITY).map_err(step("map group ids"))
}

/// As many descriptors as the host allows, and no core files: they would hold the guest's memory. A limit of processes
/// (RLIMIT_NPROC) would be none: the kernel does not hold the host's root to it (`copy_process` in kernel/fork.c), who
/// this still is in its user namespace. What starts is threads only, by seccomp, and their number the pod's cgroup
/// limits.
fn set_limits() -> Result<(), Error> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("descriptor limit"))?;
    let raised = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
    raised.or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard)).map_err(step("descriptor limit"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("core limit"))
}

/// Input and output are the host's /dev/null, and whoever holds a descriptor of a file that root owns can change its
/// mode here. Of the standard streams, this process only uses the one for errors, which is a pipe.
fn drop_standard_streams() -> nix::Result<()> {
    dup2_stdin(io::stderr())?;
    dup2_stdout(io::stderr())
}

/// The table grows with the number, and stays when that is free again.
fn make_room_for_descriptors() -> Result<(), Error> {
    let last = FcntlArg::F_DUPFD_CLOEXEC(ROOM_FOR_DESCRIPTORS - 1);
    let copy = fcntl(io::stderr(), last).map_err(step("room for descriptors"))?;
    // SAFETY: the kernel has just made this descriptor for us.
    drop(unsafe { OwnedFd::from_raw_fd(copy) });
    Ok(())
}

/// The inner process's way in, in this order.
fn lock_up(share: &OwnedFd) -> Result<Jail, Error> {
    let proc_self_fd = own_descriptors().map_err(step("copy the mount of /proc/self/fd"))?;
    setgroups(&[]).map_err(step("drop groups"))?;
    drop_standard_streams().map_err(step("standard streams"))?;
    change_root(share)?;
    make_room_for_descriptors()?;
    drop_capabilities()?;
    prctl("no new privileges", libc::PR_SET_NO_NEW_PRIVS, 1)?;
    prctl("not dumpable", libc::PR_SET_DUMPABLE, 0)?;
    landlock::restrict(share).map_err(step("restrict files to the share (Landlock)"))?;
    // The shim's death closes the control socket as well; this signal also ends a VMM that does not listen any more.
    prctl("parent death signal", libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong)?;
    Ok(Jail { proc_self_fd })
}

/// A mount of /proc/self/fd that is attached nowhere: the directory is all there is of it. Simply opened, it would be a
/// place in the host's procfs, and `../..` the host's settings, processes and memory.
///
/// It cannot be a procfs of the jail's own: the kernel makes one only for those who see one already that nothing is
/// mounted over (`mount_too_revealing` in fs/namespace.c), and it would be a superblock for each pod. And it is needed:
/// to open a file by its descriptor (openat(2) knows no AT_EMPTY_PATH), the library has no other way.
fn own_descriptors() -> io::Result<OwnedFd> {
    let mount = copy_mount(Path::new("/proc/self/fd"), false)?;
    // The directory itself has an owner and times.
    let read_only = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
    set_mount(&mount, &read_only, false)?;
    Ok(mount)
}

/// Makes the share, a mount that is attached nowhere yet, the root.
fn change_root(share: &OwnedFd) -> Result<(), Error> {
    let none: Option<&CStr> = None;
    // Slave: nothing of this goes back.
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(none, "/", none, slave, none).map_err(step("make mounts slaves"))?;
    // On the old root. One that has come along from the host's namespace pivot_root would refuse: such mounts are locked
    // together (mount_namespaces(7)).
    attach_mount_at(share, Path::new("/")).map_err(step("mount the share"))?;
    fchdir(share).map_err(step("enter the share"))?;
    // The old root is stacked on the new one, and then let go (pivot_root(2)). With it goes the copy of the host's
    // mounts, which would keep file systems that the host unmounts from ending.
    pivot_root(".", ".").map_err(step("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("unmount the host's root"))?;
    chdir("/").map_err(step("enter the new root"))
}

fn prctl(what: &'static str, option: c_int, value: c_ulong) -> Result<(), Error> {
    // SAFETY: none of the options used here takes a pointer.
    if unsafe { libc::prctl(option, value, 0, 0, 0) } < 0 {
        return Err(step(what)(io::Error::last_os_error()));
    }
    Ok(())
}

/// Keeps [`CAPABILITIES`] only, in every set.
fn drop_capabilities() -> Result<(), Error> {
    for capability in (0..=LAST_POSSIBLE_CAPABILITY).filter(|number| !CAPABILITIES.contains(number)) {
        match prctl("drop capabilities", libc::PR_CAPBSET_DROP, c_ulong::from(capability)) {
            // The kernel does not know one of this number.
            Err(error) if error.error.raw_os_error() == Some(libc::EINVAL) => {}
            result => result?,
        }
    }
    let kept = CAPABILITIES.iter().fold(0, |set, number| set | 1 << number);
    let kept = CapabilitySet::from_bits_retain(kept);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    set_capabilities(None, sets).map_err(step("drop capabilities"))
}

#[cfg(test)]
mod tests;
