//! The effective configuration: one TOML file with the section and key names of Kata Containers, plus the
//! drop-ins beside it.
//!
//! The sections and keys of Kata Containers' own files are accepted: they work, or have no meaning here, or are refused
//! because to ignore them would weaken what the file asks for (`kata`). An unknown section or key, a wrong type and a
//! value out of range are errors. All that is wrong in the files is said at once, with file, line and column.

mod annotations;
mod classes;
mod error;
mod file;
mod kata;
mod keys;
#[cfg(test)]
mod tests;
pub mod trusted;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

pub use annotations::CONFIG_PATH;
pub use classes::{Class, Use};
pub use error::{Error, Place, Problem};
pub use keys::{MOST_VCPUS, Sets};
use trusted::Links;

/// Environment variable that names the configuration file, as in Kata Containers.
pub const ENVIRONMENT: &str = "KATA_CONF_FILE";
/// The administrator's file.
pub const ADMINISTRATOR: &str = "/etc/kata-containers/configuration.toml";
/// Where the programs and the guest's files are installed by default.
pub const PREFIX: &str = "/opt/kata";
/// The file that an installation brings with it, below its prefix.
const SHIPPED: &str = "share/defaults/kata-containers/configuration.toml";
/// Folder of drop-ins, beside the configuration file.
const DROP_INS: &str = "config.d";

/// What a pod's machine and its programs are set up from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// `[hypervisor.katana]`
    pub hypervisor: Hypervisor,
    /// `[agent.kata]`
    pub agent: Agent,
    /// `[factory]`
    pub factory: Factory,
    /// `[runtime]`
    pub runtime: Runtime,
    /// The keys of its files that were accepted and have no meaning here.
    pub without_meaning: Vec<Use>,
}

/// The keys of a file and what is wrong with it.
#[derive(Debug)]
pub struct Report {
    /// Its keys, in their order.
    pub uses: Vec<Use>,
    /// What is wrong, in its order; a file with nothing wrong is accepted.
    pub problems: Vec<Problem>,
}

/// The pod's machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// The VMM's program.
    pub path: PathBuf,
    /// The guest's kernel, an uncompressed ELF file.
    pub kernel: PathBuf,
    /// The guest's root file system, an erofs image.
    pub image: PathBuf,
    /// Further kernel parameters, last on the command line.
    pub kernel_params: String,
    /// vCPUs of a pod without a CPU limit; at least 1, at most `default_maxvcpus`.
    pub default_vcpus: u32,
    /// The most vCPUs a pod can have, at most the host's CPUs.
    pub default_maxvcpus: u32,
    /// MiB of memory of a pod, to which the memory limits of its containers are added.
    pub default_memory: u32,
    /// The most MiB of memory a pod can have, at least `default_memory`.
    pub default_maxmemory: u32,
    /// Do not have the host's kernel move network packets (vhost-net).
    pub disable_vhost_net: bool,
    /// Disks that containers of a pod can have at a time.
    pub disk_slots: u32,
    /// Where containers' writes to their roots go; `None`: those of pods to a disk, others to the shared directory.
    pub writable_layer: Option<WritableLayer>,
    /// MiB that a container can write to its root, where that is a disk.
    pub writable_layer_size: u32,
    /// Log the guest's console and boot its kernel verbosely.
    pub enable_debug: bool,
    /// The keys that pods may set by annotations, as regular expressions.
    pub enable_annotations: Vec<String>,
}

/// What takes the writes of a container to its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritableLayer {
    /// A disk of the guest, whose image is in the snapshot's upper directory.
    Disk,
    /// The snapshot's upper directory itself, by virtio-fs.
    Shared,
}

/// The guest's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Let `kata-runtime exec` run programs in the guest itself, outside of containers.
    pub debug_console_enabled: bool,
    /// Debug messages of the agent.
    pub enable_debug: bool,
    /// Seconds until an agent that has not connected counts as failed.
    pub dial_timeout: u32,
}

/// Templates of machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Factory {
    /// Start machines from a template, and make one when there is none.
    pub enable_template: bool,
    /// The directory of templates.
    pub template_path: PathBuf,
    /// Who shares one.
    pub template_scope: TemplateScope,
}

/// Which pods of the same configuration share a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateScope {
    /// All of the host.
    Host,
    /// Those of one namespace: Kubernetes', or where there is none, containerd's.
    Namespace,
}

/// The shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Debug messages of the shim.
    pub enable_debug: bool,
    /// The pod's machine runs in the cgroup that the caller made for the pod; always true.
    pub sandbox_cgroup_only: bool,
    /// What becomes of containers that ask for namespaces of the host.
    pub host_namespaces: HostNamespaces,
    /// Whether directories that a pod has alone (emptyDir) are shared; otherwise they are disks of its machine.
    pub disable_guest_empty_dir: bool,
    /// MiB of such a disk, at most.
    pub empty_dir_size: u32,
    /// Directories from which a pod may choose its configuration by [`CONFIG_PATH`].
    pub config_path_directories: Vec<PathBuf>,
}

/// What becomes of containers that ask for a namespace of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostNamespaces {
    /// They are refused.
    Refuse,
    /// They get the machine's own.
    Guest,
}

impl Default for Hypervisor {
    fn default() -> Self {
        let prefix = Path::new(PREFIX);
        Self {
            path: prefix.join("bin/kata-vmm"),
            kernel: prefix.join("share/kata-containers/vmlinux.container"),
            image: prefix.join("share/kata-containers/kata-containers.img"),
            kernel_params: String::new(),
            default_vcpus: 1,
            default_maxvcpus: keys::host_cpus(),
            default_memory: 512,
            default_maxmemory: keys::host_memory(),
            disable_vhost_net: false,
            disk_slots: 12,
            writable_layer: None,
            writable_layer_size: 32 << 10,
            enable_debug: false,
            enable_annotations: ["default_vcpus", "default_memory", "writable_layer", "writable_layer_size"]
                .map(String::from)
                .to_vec(),
        }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self { debug_console_enabled: false, enable_debug: false, dial_timeout: 60 }
    }
}

impl Default for Factory {
    fn default() -> Self {
        Self {
            enable_template: true,
            template_path: "/run/kata-containers/template".into(),
            template_scope: TemplateScope::Host,
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            enable_debug: false,
            sandbox_cgroup_only: true,
            disable_guest_empty_dir: false,
            empty_dir_size: 64 << 10,
            host_namespaces: HostNamespaces::Refuse,
            config_path_directories: Vec::new(),
        }
    }
}

impl Config {
    /// Checks the keys against each other: the base of a machine's memory is there in any case, its processors are not.
    fn check(&mut self) -> Result<(), String> {
        let Hypervisor { default_vcpus, default_maxvcpus, default_memory, default_maxmemory, .. } =
            &mut self.hypervisor;
        *default_maxmemory = (*default_memory).max(*default_maxmemory);
        if default_vcpus > default_maxvcpus {
            return Err(format!(
                "{default_vcpus} is more than default_maxvcpus, which is {default_maxvcpus}"
            ));
        }
        Ok(())
    }

    /// The keys without a meaning here in one line, each section with its keys; nothing if there are none.
    #[must_use]
    pub fn without_meaning_line(&self) -> Option<String> {
        let mut sections: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for used in &self.without_meaning {
            let keys = sections.entry(&used.section).or_default();
            if !keys.contains(&&*used.key) {
                keys.push(&used.key);
            }
        }
        let list = sections.iter().map(|(section, keys)| format!("[{section}] {}", keys.join(", ")));
        let list = list.collect::<Vec<_>>().join("; ");
        (!list.is_empty()).then(|| format!("keys of the configuration without a meaning here: {list}"))
    }
}

/// Loads the configuration. The file is the explicit one if there is one, else that of [`ENVIRONMENT`], else
/// the first of [`search_path`] that exists; then its drop-ins override it.
///
/// # Errors
/// See [`Error`]; a file that was asked for by name must exist.
pub fn load(explicit: Option<&Path>) -> Result<Config, Error> {
    let named = explicit.map(Path::to_owned).or_else(|| {
        let value = env::var_os(ENVIRONMENT)?;
        (!value.is_empty()).then(|| PathBuf::from(value))
    });
    match named {
        Some(path) => load_file(&path, Links::Follow),
        None => load_first(&search_path()),
    }
}

/// What becomes of each key of one file, without its drop-ins, and what it makes of the defaults.
///
/// # Errors
/// [`Error::Read`]; what is wrong in the file is in the report.
pub fn examine(path: &Path) -> Result<(Report, Config), Error> {
    let mut loader = file::Loader::new(path, Links::Follow);
    loader.apply(path)?;
    Ok(loader.report())
}

/// The files that are tried when none was asked for: the administrator's, then the one that was installed
/// with the running program, then the one of the default prefix.
#[must_use]
pub fn search_path() -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::from(ADMINISTRATOR)];
    let program = env::current_exe().ok();
    let prefix = program.as_deref().and_then(Path::parent).and_then(Path::parent);
    paths.extend(prefix.map(|prefix| prefix.join(SHIPPED)));
    let default = Path::new(PREFIX).join(SHIPPED);
    if !paths.contains(&default) {
        paths.push(default);
    }
    paths
}

fn load_first(paths: &[PathBuf]) -> Result<Config, Error> {
    for path in paths {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Whatever else is wrong with it is said when it is read: a file that is there is never skipped.
            _ => return load_file(path, Links::Follow),
        }
    }
    Err(Error::None(paths.to_vec()))
}

fn load_file(path: &Path, links: Links) -> Result<Config, Error> {
    let mut loader = file::Loader::new(path, links);
    loader.apply(path)?;
    for drop_in in drop_ins(path)? {
        loader.apply(&drop_in)?;
    }
    loader.finish()
}

/// The drop-ins beside a configuration file, in the order of their names.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, Error> {
    // Beside the name that was asked for: a link in /etc has its drop-ins in /etc, wherever it leads.
    let folder = path.parent().unwrap_or(Path::new("")).join(DROP_INS);
    let failed = |source| Error::Read { path: folder.clone(), source };
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?.path();
        if entry.extension().is_some_and(|extension| extension == "toml") {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}
