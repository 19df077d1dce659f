//! A pod as containerd describes it when the shim is its sandbox. It becomes the specification that containerd's own
//! sandboxer would write for a sandbox container, so that both kinds of pods go the same way from here on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use katana_protocol::pod::{DNSConfig, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig};
use protobuf::Message;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::host::create_private;
use crate::spec::{Linux, Mount, Namespace, Spec};

/// What containerd puts into `options`.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// What the CRI plugins themselves say in annotations, of which a pod's author has no say: what a container is in its
/// pod, and what its limits are.
const OF_ENGINE: &str = "io.kubernetes.cri";
/// As containerd's own sandboxer has it, for pods that ask for nothing else.
const SHARED_MEMORY_BYTES: u64 = 64 << 20;
/// What containerd 2 allows unprivileged programs of a pod by default.
const DEFAULT_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
/// The user of the pause: nobody in particular, as in Kubernetes' own image.
const PAUSE_USER: u32 = 65535;

/// A pod that is to be started.
#[derive(Debug)]
pub struct PodConfig {
    /// The specification of the container that holds the pod's namespaces.
    pub spec: Spec,
    /// What its containers share.
    pub files: PodFiles,
    contents: [(&'static str, Vec<u8>); 3],
}

/// The files that all containers of a pod see, and the shared memory. containerd's own sandboxer makes them on the
/// host; where the shim is the sandbox, it is the shim's part.
#[derive(Debug, Clone)]
pub struct PodFiles {
    directory: PathBuf,
}

impl PodConfig {
    /// Reads the request. `state` is the directory for what lives as long as the pod.
    pub fn new(request: &CreateSandboxRequest, state: &Path) -> Result<Self> {
        let config = parse(request)?;
        let host_name = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
        let hostname = Some(config.hostname.clone()).filter(|name| !name.is_empty());
        let hostname = hostname.map_or_else(host_name, Ok).map_err(|e| Error::os("host name", e))?;
        let resolv_conf = match config.dns_config.as_ref().map(resolv_conf).unwrap_or_default() {
            text if text.is_empty() => copy("/etc/resolv.conf"),
            text => text.into_bytes(),
        };
        let contents = [
            ("hostname", format!("{hostname}\n").into_bytes()),
            ("hosts", copy("/etc/hosts")),
            ("resolv.conf", resolv_conf),
        ];
        let files = PodFiles { directory: state.join("files") };
        let mut spec = specification(&config, request, hostname);
        files.add_to(&mut spec);
        Ok(Self { spec, files, contents })
    }

    /// Writes the files that the pod's containers share. Blocks.
    pub fn write_files(&self) -> Result<()> {
        let directory = &self.files.directory;
        let write = || -> io::Result<()> {
            create_private(directory)?;
            self.contents.iter().try_for_each(|(name, content)| fs::write(directory.join(name), content))
        };
        write().map_err(|e| Error::io(directory.display(), &e))
    }
}

impl PodFiles {
    /// The shared memory as [`crate::machine::Launch`] wants it. The path is only a name for it: there is nothing on
    /// the host.
    pub fn shared_memory(&self) -> (PathBuf, u64) {
        (self.directory.join("shm"), SHARED_MEMORY_BYTES)
    }

    /// Adds the mounts that containerd leaves to us, where the container has not got its own.
    pub fn add_to(&self, spec: &mut Spec) {
        let read_only =
            spec.root.as_ref().and_then(|root| root.rest.get("readonly")?.as_bool()) == Some(true);
        let places =
            [("/etc/hostname", "hostname"), ("/etc/hosts", "hosts"), ("/etc/resolv.conf", "resolv.conf")];
        for (destination, name) in places {
            if !spec.mounts.iter().any(|mount| mount.destination == Path::new(destination)) {
                spec.mounts.push(self.bind(destination, name, if read_only { "ro" } else { "rw" }));
            }
        }
        let shared = Path::new("/dev/shm");
        let has_own = |mount: &Mount| mount.destination == shared && mount.bind().is_some();
        if !spec.mounts.iter().any(has_own) {
            // The usual tmpfs would be the container's alone.
            let place = spec.mounts.iter().position(|mount| mount.destination == shared);
            spec.mounts.retain(|mount| mount.destination != shared);
            let place = place.unwrap_or(spec.mounts.len()).min(spec.mounts.len());
            spec.mounts.insert(place, self.bind("/dev/shm", "shm", "rw"));
        }
    }

    fn bind(&self, destination: &str, name: &str, access: &str) -> Mount {
        Mount {
            destination: destination.into(),
            kind: Some("bind".into()),
            source: Some(self.directory.join(name)),
            options: ["rbind", "rprivate", access].map(str::to_owned).to_vec(),
            rest: Map::new(),
        }
    }
}

fn parse(request: &CreateSandboxRequest) -> Result<PodSandboxConfig> {
    let Some(options) = request.options.as_ref().filter(|options| !options.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::default());
    };
    if !options.type_url.ends_with(CONFIG_TYPE) {
        return Err(Error::InvalidArgument(format!("options are {}, not a {CONFIG_TYPE}", options.type_url)));
    }
    PodSandboxConfig::parse_from_bytes(&options.value)
        .map_err(|e| Error::InvalidArgument(format!("{CONFIG_TYPE}: {e}")))
}

fn specification(config: &PodSandboxConfig, request: &CreateSandboxRequest, hostname: String) -> Spec {
    let linux = config.linux.clone().unwrap_or_default();
    // Nobody has filtered these.
    let mut annotations = config.annotations.clone();
    annotations.retain(|name, _| !name.starts_with(OF_ENGINE));
    annotations.extend(request.annotations.clone());
    annotations.extend(resource_annotations(&linux));
    // Last: the pod's author has no say in these.
    let namespace = config.metadata.namespace.as_str();
    for (name, value) in
        [("container-type", "sandbox"), ("sandbox-id", &request.sandbox_id), ("sandbox-namespace", namespace)]
    {
        annotations.insert(format!("io.kubernetes.cri.{name}"), value.to_owned());
    }
    let sysctl: Map<String, Value> = DEFAULT_SYSCTLS
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).into()))
        .chain(linux.sysctls.iter().map(|(name, value)| (name.clone(), value.as_str().into())))
        .collect();
    let process = json!({
        "user": {"uid": PAUSE_USER, "gid": PAUSE_USER}, "args": ["/pause"], "cwd": "/", "noNewPrivileges": true,
    });
    Spec {
        hostname: Some(hostname),
        annotations: annotations.into_iter().collect(),
        process: process.as_object().cloned(),
        linux: Some(Linux {
            namespaces: namespaces(&linux, &request.netns_path),
            cgroups_path: cgroups_path(&linux.cgroup_parent, &request.sandbox_id),
            rest: Map::from_iter([("sysctl".to_owned(), Value::Object(sysctl))]),
            ..Linux::default()
        }),
        rest: Map::from_iter([("ociVersion".to_owned(), "1.2.0".into())]),
        ..Spec::default()
    }
}

/// The annotations in which containerd's own sandboxer announces the sum of the containers' limits.
fn resource_annotations(linux: &LinuxPodSandboxConfig) -> Vec<(String, String)> {
    let Some(resources) = linux.resources.as_ref() else { return Vec::new() };
    let values = [
        ("cpu-period", resources.cpu_period),
        ("cpu-quota", resources.cpu_quota),
        ("memory", resources.memory_limit_in_bytes),
    ];
    values.map(|(name, value)| (format!("io.kubernetes.cri.sandbox-{name}"), value.to_string())).to_vec()
}

/// The pod's own namespaces, but for those in which it is to be the node's.
fn namespaces(linux: &LinuxPodSandboxConfig, network: &str) -> Vec<Namespace> {
    let options = linux.security_context.clone().unwrap_or_default().namespace_options.unwrap_or_default();
    let own = |kind: &str| Namespace { kind: kind.into(), path: None };
    let of_node = |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode.enum_value() == Ok(NamespaceMode::NODE);
    let mut all = vec![own("mount"), own("uts")];
    if !of_node(options.network) {
        let path = Some(network.to_owned()).filter(|path| !path.is_empty());
        all.push(Namespace { kind: "network".into(), path });
    }
    all.extend((!of_node(options.pid)).then(|| own("pid")));
    all.extend((!of_node(options.ipc)).then(|| own("ipc")));
    // Without the member, and with the mode of the node in it, there is none.
    let users = options.userns_options.as_ref().filter(|users| !of_node(users.mode));
    all.extend(users.map(|_| own("user")));
    all
}

/// A place below the pod's cgroup, in the form that the kind of its name asks for.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let name = Path::new(parent).file_name().map(|name| name.to_string_lossy().into_owned());
    match name {
        None => None,
        Some(slice) if slice.ends_with(".slice") => Some(format!("{slice}:cri-containerd:{id}")),
        Some(_) => Some(format!("{}/{id}", parent.trim_end_matches('/'))),
    }
}

fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

/// A file of the host; a host without it has pods with an empty one.
fn copy(path: &str) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| {
        log::warn!("{path}: {e}");
        Vec::new()
    })
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
