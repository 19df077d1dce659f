//! The namespaces of a container (runtime-spec, config-linux.md, "Namespaces").
//!
//! Network namespaces are passed over: the pod's network is that of the guest.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, Gid, Uid, fork, pipe2, setgroups, sethostname, setresgid, setresuid};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::control::{Control, Failure, Order, Report, Result};
use crate::syscalls::open_process;

/// CLONE_NEWTIME, which shares its bit with a mask of clone(2) and is missing in the list of flags.
pub const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
/// Namespaces that a process enters only by its children.
const FOR_CHILDREN: CloneFlags = CloneFlags::CLONE_NEWPID.union(CLONE_NEWTIME);

/// Which namespaces a container wants.
#[derive(Debug)]
pub struct Wanted {
    new: CloneFlags,
    existing: Vec<(CloneFlags, PathBuf, File)>,
}

impl Wanted {
    /// Reads the list and opens the ones that exist.
    pub fn of(spec: &Spec) -> Result<Self> {
        let mut wanted = Self { new: CloneFlags::CLONE_NEWNS, existing: Vec::new() };
        let linux = spec.linux().as_ref();
        for namespace in linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten() {
            let kind = flag(namespace.typ());
            match namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
                _ if kind == CloneFlags::CLONE_NEWNET => (),
                None => wanted.new |= kind,
                Some(path) if kind == CloneFlags::CLONE_NEWNS => {
                    return Err(Failure::invalid(format!(
                        "a container in an existing mount namespace ({}) is not supported",
                        path.display()
                    )));
                }
                Some(path) => {
                    let file = File::open(path)
                        .map_err(Failure::during(format!("open namespace {}", path.display())))?;
                    wanted.existing.push((kind, path.clone(), file));
                }
            }
        }
        // The namespaces that follow the user namespace then belong to it.
        wanted.existing.sort_by_key(|(kind, ..)| *kind != CloneFlags::CLONE_NEWUSER);
        Ok(wanted)
    }

    /// Whether the container has a user namespace.
    pub fn user(&self) -> bool {
        self.private(CloneFlags::CLONE_NEWUSER)
    }

    /// Whether the container has another namespace of this kind than the guest itself.
    pub fn private(&self, kind: CloneFlags) -> bool {
        self.new.contains(kind) || self.existing.iter().any(|(existing, ..)| *existing == kind)
    }

    /// Enters them all. Comes back in the process that the container's program will be.
    pub fn enter(&self, control: &Control, spec: &Spec) -> Result<()> {
        if self.new.contains(CLONE_NEWTIME) {
            // Before the user namespace: its process must not write the offsets.
            unshare(CLONE_NEWTIME).map_err(Failure::during("create a time namespace"))?;
            time_offsets(spec)?;
        }
        for (kind, path, file) in &self.existing {
            setns(file, *kind).map_err(Failure::during(format!("join namespace {}", path.display())))?;
            if *kind == CloneFlags::CLONE_NEWUSER {
                become_root()?;
            }
        }
        if self.new.contains(CloneFlags::CLONE_NEWUSER) {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(Failure::during("create a user namespace"))?;
            control.report(&Report::Unmapped, &[]);
            control.expect(Order::Mapped)?;
            become_root()?;
        }
        let rest = self.new - CloneFlags::CLONE_NEWUSER - CLONE_NEWTIME;
        unshare(rest).map_err(Failure::during(format!("create namespaces ({rest:?})")))?;
        if FOR_CHILDREN.iter().chain([CLONE_NEWTIME]).any(|kind| self.private(kind)) {
            continue_as_child(control)?;
        }
        Ok(())
    }
}

/// Joins the namespaces of a container through a pidfd of its first process.
pub fn join(control: &Control, container: &BorrowedFd<'_>, namespaces: i32) -> Result<()> {
    let namespaces = CloneFlags::from_bits_retain(namespaces);
    setns(container, namespaces).map_err(Failure::during("join the container's namespaces"))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        become_root()?;
    }
    if namespaces.intersects(FOR_CHILDREN) { continue_as_child(control) } else { Ok(()) }
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

/// The root of the user namespace that was just entered.
fn become_root() -> Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).map_err(Failure::during("become group 0 of the user namespace"))?;
    setgroups(&[]).map_err(Failure::during("drop the groups in the user namespace"))?;
    setresuid(uid, uid, uid).map_err(Failure::during("become user 0 of the user namespace"))
}

/// Forks. The parent reports the child to the agent and ends, so that the agent inherits the child, which continues
/// once the agent can know of it.
fn continue_as_child(control: &Control) -> Result<()> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(Failure::during("make a pipe"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(Failure::during("fork"))? {
        ForkResult::Child => {
            drop(writer);
            File::from(reader).read(&mut [0]).map(drop).map_err(Failure::during("wait for the parent"))
        }
        ForkResult::Parent { child } => {
            // The child cannot be gone: nobody but this process could have waited for it.
            let process = open_process(child.as_raw()).map_err(Failure::during("open the child"))?;
            control.report(&Report::Forked { pid: child.as_raw() }, &[process.as_fd()]);
            std::process::exit(0)
        }
    }
}

fn time_offsets(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref();
    for (clock, offset) in linux.and_then(|linux| linux.time_offsets().as_ref()).into_iter().flatten() {
        let line = format!("{clock} {} {}", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        fs::write("/proc/self/timens_offsets", line)
            .map_err(Failure::during(format!("set the offset of {clock}")))?;
    }
    Ok(())
}

/// Sets host and domain name in a UTS namespace of the container's own.
pub fn names(spec: &Spec, namespaces: &Wanted) -> Result<()> {
    if !namespaces.private(CloneFlags::CLONE_NEWUTS) {
        return Ok(());
    }
    if let Some(name) = spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        sethostname(name).map_err(Failure::during(format!("set the host name {name:?}")))?;
    }
    if let Some(name) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        // SAFETY: the name is `len` readable bytes.
        let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
        Errno::result(result).map_err(Failure::during(format!("set the domain name {name:?}")))?;
    }
    Ok(())
}

/// When a kernel parameter is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sysctls {
    /// Those of the network, which is the guest's: a user namespace must not write them.
    Network,
    /// The others, in the container's namespaces.
    Other,
}

/// Writes `linux.sysctl`, through the guest's own /proc: that of the container may be anything.
pub fn sysctls(spec: &Spec, which: Sysctls) -> Result<()> {
    let linux = spec.linux().as_ref();
    for (name, value) in linux.and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten() {
        let path =
            sysctl_path(name).ok_or_else(|| Failure::invalid(format!("sysctl {name:?} is not a name")))?;
        if path.starts_with("/proc/sys/net") == (which == Sysctls::Network) {
            fs::write(&path, value).map_err(Failure::during(format!("write sysctl {name}={value}")))?;
        }
    }
    Ok(())
}

/// `a.b/c` stands for `a/b.c`, `a/b.c` for itself (sysctl.d(5)).
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let dots_first = name.find(['.', '/']).is_some_and(|at| name.get(at..=at) == Some("."));
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = if dots_first { name.chars().map(swap).collect() } else { name.to_owned() };
    let good = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    good.then(|| Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        let path = |name| sysctl_path(name).map(|path| path.display().to_string());
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Some("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        for hostile in ["", "..", "/etc/passwd", "kernel/../../../etc/passwd", "kernel./../x", "a..b"] {
            assert_eq!(path(hostile), None, "{hostile}");
        }
    }

    #[test]
    fn a_mount_namespace_is_always_new_and_the_network_never() {
        let spec = |json: &str| serde_json::from_str::<Spec>(json).unwrap();
        let wanted =
            Wanted::of(&spec(r#"{"linux":{"namespaces":[{"type":"network"},{"type":"pid"}]}}"#)).unwrap();
        assert_eq!(wanted.new, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID);
        assert!(!wanted.user());
        let missing = spec(r#"{"linux":{"namespaces":[{"type":"ipc","path":"/proc/0/ns/ipc"}]}}"#);
        assert_eq!(
            Wanted::of(&missing).unwrap_err().message,
            "open namespace /proc/0/ns/ipc: no such file or directory"
        );
    }
}
