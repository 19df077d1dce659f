//! Namespaces of the host that a specification asks for. A virtual machine has none of them: what asks for one is
//! refused, or, if the configuration says so (`host_namespaces`), gets the machine's own in its place.
//!
//! A specification asks for the host's namespace of a kind when it does not list the kind (runtime-spec,
//! config-linux.md, "Namespaces"), or by a path. What clients do in the ordinary case, listed or not, has to go on
//! working:
//!
//! | kind | ordinary | the host's |
//! |---|---|---|
//! | pid, ipc, uts | new, or by the path of one of the pod's processes | not listed, as for hostPID or `--pid host`, or
//! by a path |
//! | mount | new | not listed |
//! | cgroup | new, or not listed: privileged pods, `ctr run`, Docker with cgroup v1 | looks the same; see
//! [`crate::spec::Spec::for_guest`] |
//! | user, time | not listed, or new | not listed: it says nothing |
//! | network | by a path, or new | see [`crate::network`] |

use std::fs;
use std::os::unix::fs::MetadataExt;

use katana_config::HostNamespaces;

use crate::error::{Error, Result, reason};
use crate::spec::{Namespace, Spec};

/// A kind of namespace of which every ordinary container has one that is not the host's.
#[derive(Debug, PartialEq, Eq)]
struct Kind {
    name: &'static str,
    /// How users ask for the host's.
    asked: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind { name: "pid", asked: "hostPID, --pid host" },
    Kind { name: "ipc", asked: "hostIPC, --ipc host" },
    Kind { name: "uts", asked: "--uts host" },
    Kind { name: "mount", asked: "no mount namespace in config.json" },
];

/// The pod that a container is to be in, as it is before.
#[derive(Debug, Default)]
pub struct Known<'a> {
    /// Its sandbox container, if that is another one.
    pub sandbox: Option<&'a Spec>,
    /// The pids on the host by which clients know its containers.
    pub pids: &'a [u32],
}

/// The namespaces of the host that a container asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asked(Vec<&'static Kind>);

impl Asked {
    /// Finds them, and takes them out of the specification where they are named: then the guest has its own. A
    /// namespace of somebody else's is an error.
    pub fn take(spec: &mut Spec, known: &Known<'_>) -> Result<Self> {
        let is_sandbox = spec.is_sandbox();
        let linux = spec.linux.get_or_insert_default();
        let mut hosts = Vec::new();
        for namespace in &linux.namespaces {
            if let Some(path) = namespace.path.as_deref().filter(|path| !path.is_empty())
                && is_hosts(namespace, path, is_sandbox, known)?
            {
                hosts.push(namespace.kind.clone());
            }
            if namespace.kind == "user" && is_sandbox {
                return Err(users_of_pod());
            }
        }
        linux.namespaces.retain(|namespace| !hosts.contains(&namespace.kind));
        let listed = |name: &str| linux.namespaces.iter().any(|namespace| namespace.kind == name);
        // Kubernetes' host network comes with the host's name, and it is the network that there is something to say of.
        let goes_with_network = |kind: &Kind| kind.name == "uts" && !listed("network");
        Ok(Self(KINDS.iter().filter(|kind| !listed(kind.name) && !goes_with_network(kind)).collect()))
    }

    /// Whether the container can do with the machine's instead.
    pub fn resolve(&self, how: HostNamespaces) -> Result<()> {
        let Some(Kind { name, asked }) = self.0.first() else { return Ok(()) };
        match how {
            HostNamespaces::Refuse => Err(Error::InvalidArgument(format!(
                "the host's {name} namespace cannot be used from a virtual machine ({asked}): run this with another runtime \
                 (a pod without runtimeClassName, a container without --runtime); if the virtual machine's own namespaces will \
                 do, set host_namespaces = \"guest\" in the section [runtime] of configuration.toml"
            ))),
            HostNamespaces::Guest => {
                let names: Vec<_> = self.0.iter().map(|kind| kind.name).collect();
                log::warn!(
                    "the host's {} asked for, the virtual machine's given (host_namespaces)",
                    names.join(", ")
                );
                Ok(())
            }
        }
    }
}

/// Whether an existing namespace is the host's; if not, it must be the pod's.
fn is_hosts(namespace: &Namespace, path: &str, is_sandbox: bool, known: &Known<'_>) -> Result<bool> {
    let kind = namespace.kind.as_str();
    match kind {
        // By its own rules.
        "network" => return Ok(false),
        "user" => return Err(users_of_pod()),
        "pid" | "ipc" | "uts" => {}
        _ => return Err(strange(kind, path)),
    }
    let process = process_of(path, kind);
    if process.is_some_and(|pid| known.pids.contains(&pid)) {
        return Ok(false);
    }
    let identity = |path: &str| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let wanted = identity(path)
        .map_err(|e| Error::FailedPrecondition(format!("{kind} namespace {path}: {}", reason(&e))))?;
    // The shim's are containerd's. Where that has namespaces of its own, those of process 1 are the host's as well.
    let hosts = [format!("/proc/self/ns/{kind}"), format!("/proc/1/ns/{kind}")];
    if hosts.iter().any(|own| identity(own).is_ok_and(|own| own == wanted)) {
        return Ok(true);
    }
    // CRI-O has files for a pod's namespaces, with which its sandbox container comes, and then the others.
    let of_sandbox = known
        .sandbox
        .and_then(|sandbox| sandbox.linux.as_ref())
        .into_iter()
        .flat_map(|linux| &linux.namespaces);
    let mut pods = of_sandbox.filter(|one| one.kind == kind).filter_map(|one| one.path.as_deref());
    let is_pods = is_sandbox || pods.any(|one| identity(one).is_ok_and(|one| one == wanted));
    // A process that is not of the pod: there are more reasons than one for that, see `Pod::target_pid`.
    let is_looked_at_later = kind == "pid" && process.is_some();
    if is_pods || is_looked_at_later { Ok(false) } else { Err(strange(kind, path)) }
}

/// The process whose namespace a path is.
fn process_of(path: &str, kind: &str) -> Option<u32> {
    path.strip_prefix("/proc/")?.strip_suffix(kind)?.strip_suffix("/ns/")?.parse().ok()
}

fn strange(kind: &str, path: &str) -> Error {
    Error::InvalidArgument(format!(
        "{kind} namespace {path}: it is not of this pod, and no namespace of the host can be entered from a virtual machine"
    ))
}

fn users_of_pod() -> Error {
    Error::InvalidArgument(
        "the user namespace of a pod (hostUsers: false) is not supported: it needs id-mapped mounts".into(),
    )
}

#[cfg(test)]
#[path = "namespaces/tests.rs"]
mod tests;
