//! The OCI runtime specification of a container: what the shim reads of it, and how it becomes the one that
//! the guest gets.
//!
//! Only the members that the shim looks at have types; all others pass through untouched, also those that
//! are newer than this program.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use katana_protocol::{
    GUEST_ROOTS, GUEST_SHARE, GUEST_SHM, GUEST_SOCKETS, OWN_ROOT, SHARED_ROOT, SHARED_VOLUMES,
};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use serde_json::{Map, Value};

use crate::error::{Error, Result, reason};

mod members;

pub use members::{Device, Hook, Hooks, Linux, Mount, Namespace, Spec};

/// Where a mount of the specification comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file or directory of the host, which is to be bound below the share.
    Host(PathBuf),
    /// It is, under this number.
    Volume(u32),
    /// The guest's own: kernel file systems, and nodes below /dev.
    Guest,
    /// The pod's shared memory, which is the guest's own as well.
    SharedMemory,
    /// A file system of huge pages, of so many bytes each. The guest has one of its own; it belongs to the same user
    /// and group, and has the same mode.
    HugePages {
        /// Of a page, in bytes.
        page: u64,
        /// Options of hugetlbfs for its top directory.
        top: String,
    },
    /// A block device of the host, which is to be a disk of the machine.
    BlockDevice(PathBuf),
    /// On a disk of the machine: the guest's path.
    Disk(PathBuf),
    /// A socket of the host, which gets a stand-in in the guest.
    Socket(PathBuf),
    /// It has, at this port.
    StandIn(u32),
}

/// The disks that a container has in the guest.
#[derive(Debug, Clone, Default)]
pub struct OnDisks {
    /// Whether its root is on one.
    pub root: bool,
    /// The guest's paths of those that are sources of mounts, by the number of the mount.
    pub mounts: BTreeMap<usize, PathBuf>,
    /// The host's numbers of devices.
    pub devices: Vec<(i64, i64)>,
}

/// What is known of the pod when a container is translated.
#[derive(Debug, Clone, Default)]
pub struct Pod {
    /// Pid in the guest of the sandbox container's first process, whose namespaces the others join.
    pub sandbox_pid: Option<u32>,
    /// Pid in the guest of the first process of the container whose pid namespace another one joins.
    pub target_pid: Option<u32>,
    /// The directory of the host for which the guest has a tmpfs of its own.
    pub shared_memory: Option<PathBuf>,
}

/// Who says in an annotation what a container is in its pod: the CRI plugin of containerd, and CRI-O.
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
/// And what Kubernetes namespace the pod is of.
const POD_NAMESPACE: [&str; 2] = ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri-o.Namespace"];

impl Spec {
    /// Reads `config.json` of a bundle.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text = std::fs::read(&path)
            .map_err(|e| Error::InvalidArgument(format!("open {}: {}", path.display(), reason(&e))))?;
        serde_json::from_slice(&text).map_err(|e| Error::InvalidArgument(format!("{}: {e}", path.display())))
    }

    /// The value of the first of these annotations that is there.
    pub fn annotation(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.annotations.get(*name)).map(String::as_str)
    }

    /// Whether the container has a pid namespace of its own, so that the end of its first process is the end
    /// of all.
    pub fn owns_pid_namespace(&self) -> bool {
        let own = |namespace: &Namespace| {
            namespace.kind == "pid" && namespace.path.as_deref().unwrap_or("").is_empty()
        };
        self.linux.as_ref().is_some_and(|linux| linux.namespaces.iter().any(own))
    }

    /// The pid on the host of the process whose pid namespace the container joins, if it is named by one.
    pub fn joined_pid(&self) -> Option<u32> {
        let namespaces = self.linux.iter().flat_map(|linux| &linux.namespaces);
        let path =
            namespaces.filter(|namespace| namespace.kind == "pid").find_map(|one| one.path.as_deref())?;
        path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?.parse().ok()
    }

    /// Whether nobody on the host looks into the container's root or changes it: of a pod's container. Docker's `cp` looks
    /// into others, and a hook may.
    pub fn has_own_root(&self) -> bool {
        let hooks = self.hooks.iter().flat_map(|all| [&all.prestart, &all.create_runtime, &all.poststart]);
        self.is_of_pod() && hooks.flatten().next().is_none()
    }

    /// The UID of its Kubernetes pod.
    pub fn pod_uid(&self) -> Option<String> {
        if let Some(uid) = self.annotation(&["io.kubernetes.cri.sandbox-uid"]) {
            return Some(uid.to_owned());
        }
        let labels = self.annotation(&["io.kubernetes.cri-o.Labels"])?;
        let labels: Map<String, Value> = serde_json::from_str(labels).ok()?;
        Some(labels.get("io.kubernetes.pod.uid")?.as_str()?.to_owned())
    }

    /// Whether it is a container of a Kubernetes pod.
    pub fn is_of_pod(&self) -> bool {
        self.annotation(&CONTAINER_TYPE).is_some()
    }

    /// The name of the container's root in the pod's shared directory.
    pub fn shared_root(&self) -> &'static str {
        if self.has_own_root() { OWN_ROOT } else { SHARED_ROOT }
    }

    /// Whether this is the container that only stands for a pod: it runs the agent's pause, without its image.
    pub fn is_sandbox(&self) -> bool {
        self.annotation(&CONTAINER_TYPE) == Some("sandbox")
    }

    /// Whose container it is in this namespace of containerd's: Kubernetes has all of its own in one of these, whose
    /// names have no slash.
    pub fn owner(&self, namespace: &str) -> String {
        match self.annotation(&POD_NAMESPACE) {
            Some(pods) if self.is_sandbox() && !pods.is_empty() => format!("{namespace}/{pods}"),
            _ => namespace.to_owned(),
        }
    }

    /// What the guest's pause needs of the specification of a sandbox container: namespaces, names, kernel parameters,
    /// user, limits.
    pub fn for_pause(&self) -> Self {
        let mut spec = self.clone();
        spec.root = None;
        spec.mounts.clear();
        spec.hooks = None;
        if let Some(process) = &mut spec.process {
            process.remove("capabilities");
            process.insert("noNewPrivileges".into(), Value::Bool(true));
        }
        if let Some(linux) = &mut spec.linux {
            linux.devices.clear();
            for member in ["seccomp", "maskedPaths", "readonlyPaths"] {
                linux.rest.remove(member);
            }
        }
        spec
    }

    /// The specification for the guest, when the sources that are the host's have become volumes.
    pub fn for_guest(
        &self,
        id: &str,
        terminal: bool,
        sources: &[Source],
        pod: &Pod,
        disks: &OnDisks,
    ) -> Result<Vec<u8>> {
        let mut spec = self.clone();
        let root = spec.root.get_or_insert_default();
        root.path = if disks.root {
            Path::new(GUEST_ROOTS).join(id)
        } else {
            Path::new(GUEST_SHARE).join(id).join(self.shared_root())
        };
        for (mount, source) in spec.mounts.iter_mut().zip(sources) {
            match source {
                Source::Volume(number) => {
                    mount.source = Some(PathBuf::from(format!("{GUEST_SHARE}/{SHARED_VOLUMES}/{number}")));
                }
                Source::SharedMemory => mount.source = Some(PathBuf::from(GUEST_SHM)),
                Source::Disk(path) => mount.source = Some(path.clone()),
                Source::HugePages { page, top } => mount.become_huge_pages(*page, top),
                Source::StandIn(port) => {
                    mount.source = Some(Path::new(GUEST_SOCKETS).join(port.to_string()));
                }
                Source::Host(_) | Source::BlockDevice(_) | Source::Socket(_) | Source::Guest => {}
            }
        }
        if let Some(hooks) = &mut spec.hooks {
            *hooks = Hooks { rest: std::mem::take(&mut hooks.rest), ..Hooks::default() };
        }
        if let Some(process) = &mut spec.process {
            process_for_guest(process, terminal);
        }
        let linux = spec.linux.get_or_insert_default();
        linux.cgroups_path = Some(format!("/{id}"));
        linux.devices.retain(|device| disks.have(device) || exists_in_guest(device));
        for member in ["mountLabel", "intelRdt"] {
            linux.rest.remove(member);
        }
        if let Some(resources) = &mut linux.resources {
            resources_for_guest(resources);
        }
        linux.namespaces = linux.namespaces.drain(..).filter_map(|ns| namespace_for_guest(ns, pod)).collect();
        // The guest's hierarchy of cgroups is not the host's: each container sees its own cgroup as the root, also
        // where the specification would show it all of the host's.
        if !linux.namespaces.iter().any(|namespace| namespace.kind == "cgroup") {
            linux.namespaces.push(Namespace { kind: "cgroup".into(), path: None });
        }
        if !linux.namespaces.iter().any(|namespace| namespace.kind == "uts") {
            // The pod's name, which the guest has already; setting it again needs a namespace.
            spec.hostname = None;
            spec.rest.remove("domainname");
        }
        serde_json::to_vec(&spec).map_err(|e| Error::InvalidArgument(format!("config.json: {e}")))
    }

    /// For each mount, where it comes from. Relative sources are relative to the bundle.
    pub fn sources(&self, bundle: &Path, pod: &Pod) -> Vec<Source> {
        let origin = |mount: &Mount| match mount.origin(bundle) {
            Source::Host(path) if Some(&path) == pod.shared_memory.as_ref() && mount.is_shm() => {
                Source::SharedMemory
            }
            origin => origin,
        };
        self.mounts.iter().map(origin).collect()
    }

    /// The tmpfs that a container engine has made on the host for this container's /dev/shm, with its size in bytes.
    /// The guest has one instead: memory that programs share is no business of a file server.
    pub fn shared_memory(&self, bundle: &Path) -> Option<(PathBuf, u64)> {
        let mount = self.mounts.iter().find(|mount| mount.is_shm())?;
        let Source::Host(path) = mount.origin(bundle) else { return None };
        let status = statfs(&path).ok().filter(|status| status.filesystem_type() == TMPFS_MAGIC)?;
        let block = u64::try_from(status.block_size()).ok()?;
        Some((path, status.blocks().checked_mul(block).filter(|bytes| *bytes > 0)?))
    }
}

impl Mount {
    /// Whether this is a bind mount, and if so whether it is recursive.
    pub fn bind(&self) -> Option<bool> {
        let has = |name: &str| self.options.iter().any(|option| option == name);
        match (has("rbind"), has("bind") || self.kind.as_deref() == Some("bind")) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        }
    }

    /// By the name that engines give to what they make for /dev/shm; a user's own volume there stays what it is.
    fn is_shm(&self) -> bool {
        let source = self.source.as_ref().and_then(|source| source.file_name());
        self.destination == Path::new("/dev/shm") && source.is_some_and(|name| name == "shm")
    }

    fn origin(&self, bundle: &Path) -> Source {
        let Some(source) = self.source.as_ref().filter(|_| self.bind().is_some()) else {
            return Source::Guest;
        };
        let path = bundle.join(source);
        match std::fs::metadata(&path).map(|status| status.file_type()) {
            Ok(kind) if kind.is_block_device() => return Source::BlockDevice(path),
            Ok(kind) if kind.is_socket() => return Source::Socket(path),
            _ => {}
        }
        if let Some(huge_pages) = huge_pages(&path) {
            return huge_pages;
        }
        let own = ["/proc", "/sys", "/dev"].iter().any(|top| source.starts_with(top));
        if own { Source::Guest } else { Source::Host(path) }
    }
}

impl Mount {
    fn become_huge_pages(&mut self, page: u64, top: &str) {
        self.kind = Some("hugetlbfs".into());
        self.source = Some("hugetlbfs".into());
        // How it was bound, and what of the host's is to appear, means nothing here.
        self.options.retain(|option| ["ro", "nosuid", "nodev", "noexec"].contains(&option.as_str()));
        self.options.push(format!("pagesize={page}"));
        self.options.extend(top.split(',').map(str::to_owned));
    }
}

fn huge_pages(path: &Path) -> Option<Source> {
    use std::os::unix::fs::MetadataExt;
    let status = statfs(path).ok().filter(|status| status.filesystem_type() == HUGETLBFS_MAGIC)?;
    let page = u64::try_from(status.block_size()).ok()?;
    let top = std::fs::metadata(path).ok()?;
    let top = format!("uid={},gid={},mode={:o}", top.uid(), top.gid(), top.mode() & 0o1777);
    Some(Source::HugePages { page, top })
}

impl OnDisks {
    fn have(&self, device: &Device) -> bool {
        device.kind == "b" && self.devices.contains(&(device.major, device.minor))
    }
}

/// Prepares `process`, or the process of an exec, for the guest, where no security module of the host is.
pub fn process_for_guest(process: &mut Map<String, Value>, terminal: bool) {
    process.remove("apparmorProfile");
    process.remove("selinuxLabel");
    process.insert("terminal".into(), Value::Bool(terminal));
}

/// Removes limits that name processors, disks and NICs of the host.
pub fn resources_for_guest(resources: &mut Map<String, Value>) {
    for member in ["network", "rdma", "blockIO"] {
        resources.remove(member);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        for member in ["cpus", "mems", "realtimePeriod", "realtimeRuntime"] {
            cpu.remove(member);
        }
    }
}

/// The network namespace is the guest itself. A namespace by path is one of the pod: clients build the path
/// from the pid that they got for the sandbox container, and in the guest that process has another pid.
fn namespace_for_guest(mut namespace: Namespace, pod: &Pod) -> Option<Namespace> {
    let path = namespace.path.take().filter(|path| !path.is_empty());
    match (namespace.kind.as_str(), path) {
        ("network", _) => None,
        (_, None) => Some(namespace),
        ("ipc" | "uts" | "pid", Some(_)) => {
            let target = pod.target_pid.filter(|_| namespace.kind == "pid");
            let pid = target.or(pod.sandbox_pid)?;
            namespace.path = Some(format!("/proc/{pid}/ns/{}", namespace.kind));
            Some(namespace)
        }
        (_, Some(_)) => None,
    }
}

/// Whether the guest's kernel has the device under the same number. Privileged containers ask for every
/// device of the host, most of which no guest has.
fn exists_in_guest(device: &Device) -> bool {
    let exists = matches!(
        (device.kind.as_str(), device.major, device.minor),
        // mem: null, zero, full, random, urandom, kmsg; tty, console, ptmx; tun, fuse, loop-control.
        ("c" | "u", 1, 3 | 5 | 7 | 8 | 9 | 11)
            | ("c" | "u", 5, 0..=2)
            | ("c" | "u", 10, 200 | 229 | 237)
            | ("p", _, _)
    );
    if !exists {
        log::warn!(
            "device {} ({} {}:{}) does not exist in the guest",
            device.path.display(),
            device.kind,
            device.major,
            device.minor
        );
    }
    exists
}

#[cfg(test)]
#[path = "spec/tests.rs"]
mod tests;
