//! `kata-runtime env`: the effective settings, by the names that Kata Containers' tool gives them. What that
//! tool shows and does not exist here is left out, what it does not show and matters here is added.

use std::fs;
use std::path::{Path, PathBuf};

use katana_config::{Config, HostNamespaces, TemplateScope, WritableLayer};
use serde::Serialize;

use crate::{check, version};

/// The version of this output, as in `Meta`; it counts from the one of Kata Containers that it comes from.
const FORMAT: &str = "1.0.27";

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Configuration(#[from] katana_config::Error),
    #[error("cannot write the settings as TOML: {0}")]
    Toml(#[from] toml::ser::Error),
    #[error("cannot write the settings as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Env {
    kernel: Kernel,
    meta: Meta,
    image: Image,
    hypervisor: Hypervisor,
    factory: Factory,
    runtime: Runtime,
    host: Host,
    agent: Agent,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Kernel {
    path: PathBuf,
    parameters: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    version: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    path: PathBuf,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Hypervisor {
    path: PathBuf,
    #[serde(rename = "SharedFS")]
    shared_fs: &'static str,
    #[serde(rename = "DefaultVCPUs")]
    default_vcpus: u32,
    #[serde(rename = "DefaultMaxVCPUs")]
    default_maxvcpus: u32,
    /// MiB.
    default_memory: u32,
    /// MiB.
    default_max_memory: u32,
    disable_vhost_net: bool,
    disk_slots: u32,
    writable_layer: &'static str,
    /// MiB.
    writable_layer_size: u32,
    debug: bool,
    enable_annotations: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Factory {
    enable_template: bool,
    template_path: PathBuf,
    template_scope: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Runtime {
    path: PathBuf,
    debug: bool,
    sandbox_cgroup_only: bool,
    host_namespaces: &'static str,
    disable_guest_empty_dir: bool,
    /// MiB.
    empty_dir_size: u32,
    config_path_directories: Vec<PathBuf>,
    config: ConfigFile,
    version: RuntimeVersion,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ConfigFile {
    path: PathBuf,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct RuntimeVersion {
    #[serde(rename = "OCI")]
    oci: &'static str,
    version: Semver,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Semver {
    semver: &'static str,
    commit: &'static str,
    major: u64,
    minor: u64,
    patch: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Host {
    kernel: String,
    architecture: &'static str,
    #[serde(rename = "VMContainerCapable")]
    vm_container_capable: bool,
    distro: Distro,
    #[serde(rename = "CPU")]
    cpu: Cpu,
    memory: Memory,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Distro {
    name: String,
    version: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Cpu {
    vendor: String,
    model: String,
    #[serde(rename = "CPUs")]
    cpus: usize,
}

/// KiB.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Memory {
    total: u64,
    free: u64,
    available: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Agent {
    debug: bool,
    debug_console: bool,
    /// Seconds.
    dial_timeout: u32,
}

/// The settings as TOML or JSON, without the last line break.
pub(crate) fn text(config: Option<&Path>, json: bool) -> Result<String, Error> {
    let env = gather(katana_config::load(config)?);
    let text = if json { serde_json::to_string_pretty(&env)? } else { toml::to_string(&env)? };
    Ok(text.trim_end().to_owned())
}

/// Takes the configuration apart without a `..`, so that a key that is not shown does not compile.
fn gather(config: Config) -> Env {
    let Config { path, hypervisor, agent, factory, runtime, without_meaning: _ } = config;
    let (kernel, image, hypervisor) = machine(hypervisor);
    let katana_config::Agent { debug_console_enabled, enable_debug, dial_timeout } = agent;
    let katana_config::Factory { enable_template, template_path, template_scope } = factory;
    Env {
        kernel,
        meta: Meta { version: FORMAT },
        image,
        hypervisor,
        factory: Factory {
            enable_template,
            template_path,
            template_scope: match template_scope {
                TemplateScope::Host => "host",
                TemplateScope::Namespace => "namespace",
            },
        },
        runtime: shim(runtime, path),
        host: host(),
        agent: Agent { debug: enable_debug, debug_console: debug_console_enabled, dial_timeout },
    }
}

fn machine(hypervisor: katana_config::Hypervisor) -> (Kernel, Image, Hypervisor) {
    let katana_config::Hypervisor {
        path,
        kernel,
        image,
        kernel_params,
        default_vcpus,
        default_maxvcpus,
        default_memory,
        default_maxmemory,
        disable_vhost_net,
        disk_slots,
        writable_layer,
        writable_layer_size,
        enable_debug,
        enable_annotations,
    } = hypervisor;
    let hypervisor = Hypervisor {
        path,
        shared_fs: "virtio-fs",
        default_vcpus,
        default_maxvcpus,
        default_memory,
        default_max_memory: default_maxmemory,
        disable_vhost_net,
        disk_slots,
        writable_layer: match writable_layer {
            None => "",
            Some(WritableLayer::Disk) => "disk",
            Some(WritableLayer::Shared) => "shared",
        },
        writable_layer_size,
        debug: enable_debug,
        enable_annotations,
    };
    (Kernel { path: kernel, parameters: kernel_params }, Image { path: image }, hypervisor)
}

fn shim(runtime: katana_config::Runtime, file: PathBuf) -> Runtime {
    let katana_config::Runtime {
        enable_debug,
        sandbox_cgroup_only,
        host_namespaces,
        disable_guest_empty_dir,
        empty_dir_size,
        config_path_directories,
    } = runtime;
    Runtime {
        path: std::env::current_exe().unwrap_or_default(),
        debug: enable_debug,
        sandbox_cgroup_only,
        host_namespaces: match host_namespaces {
            HostNamespaces::Refuse => "refuse",
            HostNamespaces::Guest => "guest",
        },
        disable_guest_empty_dir,
        empty_dir_size,
        config_path_directories,
        config: ConfigFile { path: file },
        version: RuntimeVersion { oci: version::OCI, version: semver() },
    }
}

fn semver() -> Semver {
    let mut numbers = version::VERSION.split(['.', '-', '+']).map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (major, minor, patch) = (next(), next(), next());
    Semver { semver: version::VERSION, commit: version::commit(), major, minor, patch }
}

fn host() -> Host {
    let cpuinfo = read("/proc/cpuinfo");
    let meminfo = read("/proc/meminfo");
    let release = read("/etc/os-release");
    let memory = |name| {
        let value = field(&meminfo, name, ':');
        value.strip_suffix(" kB").and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    Host {
        kernel: read("/proc/sys/kernel/osrelease").trim_end().to_owned(),
        // By the names of Go, which scripts expect here.
        architecture: "amd64",
        vm_container_capable: check::is_capable(),
        distro: Distro { name: field(&release, "NAME", '='), version: field(&release, "VERSION_ID", '=') },
        cpu: Cpu {
            vendor: field(&cpuinfo, "vendor_id", ':'),
            model: field(&cpuinfo, "model name", ':'),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
        },
        memory: Memory {
            total: memory("MemTotal"),
            free: memory("MemFree"),
            available: memory("MemAvailable"),
        },
    }
}

/// A file of the host that describes it; what cannot be read is shown as empty.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The first value of a name in lines of `name SEPARATOR value`.
fn field(text: &str, name: &str, separator: char) -> String {
    let mut values = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim_end() == name).then(|| value.trim().trim_matches('"').to_owned())
    });
    values.next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_show_the_effective_values() {
        let folder = std::env::temp_dir().join(format!("katana-env-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("configuration.toml");
        let configuration = "[hypervisor.katana]\ndefault_memory = 777\nwritable_layer = \"shared\"\n\
            [agent.kata]\nenable_debug = true\n[factory]\ntemplate_scope = \"namespace\"\n\
            [runtime]\nempty_dir_size = 99\n";
        fs::write(&file, configuration).unwrap();
        let (toml, json) = (text(Some(&file), false).unwrap(), text(Some(&file), true).unwrap());
        fs::remove_dir_all(&folder).unwrap();
        let toml: toml::Value = toml::from_str(&toml).unwrap();
        assert_eq!(toml["Hypervisor"]["DefaultMemory"].as_integer(), Some(777));
        assert_eq!(toml["Hypervisor"]["WritableLayer"].as_str(), Some("shared"));
        assert_eq!(toml["Factory"]["TemplateScope"].as_str(), Some("namespace"));
        assert_eq!(toml["Runtime"]["EmptyDirSize"].as_integer(), Some(99));
        assert_eq!(toml["Runtime"]["Config"]["Path"].as_str(), file.to_str());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["Agent"]["Debug"], true);
        assert_eq!(json["Runtime"]["Version"]["OCI"], version::OCI);
    }

    #[test]
    fn fields_of_the_hosts_files_are_found() {
        assert_eq!(field("processor\t: 0\nmodel name\t: A: B\nmodel name : C\n", "model name", ':'), "A: B");
        assert_eq!(field("VERSION=\"1\"\nVERSION_ID=\"12\"\n", "VERSION_ID", '='), "12");
        assert_eq!(field("", "NAME", '='), "");
    }
}
