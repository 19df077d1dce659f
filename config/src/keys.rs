//! The keys: which there are, what values they take, where they go.

use std::path::{Path, PathBuf};
use std::thread;

use regex_lite::Regex;
use toml::de::DeValue;

use crate::kata::VMM;
use crate::{Config, HostNamespaces, TemplateScope, WritableLayer};

/// MiB of memory. The guest's kernel keeps some 20 for itself; with less than this no room is left for containers.
const LEAST_MEMORY: i64 = 64;
/// MiB of memory of the largest machine, also on a host that has more: 1 TiB (`vmm/src/memory.rs`).
const MOST_MEMORY: u32 = 1 << 20;
/// More memory than any host has, MiB.
const ANY_MEMORY: i64 = 16 << 20;
/// An hour.
const LONGEST_TIMEOUT: i64 = 3600;
/// An x86 kernel takes 2047 characters in all (COMMAND_LINE_SIZE); those of shim and VMM need some of them.
const LONGEST_PARAMETERS: usize = 1408;
/// The machine's bus has 31 places, some of which are for other devices.
const MOST_DISKS: i64 = 16;
/// MiB of a writable layer: those of `shim/src/storage/ext4.rs`.
const LEAST_LAYER: i64 = 16;
/// Likewise.
const MOST_LAYER: i64 = 8 << 20;
/// The most CPUs of a machine, also on a host that has more: what the VMM can make and the guest's kernel is built for.
pub const MOST_VCPUS: u32 = 254;

/// Words of a kernel's command line that are about where another guest has its console and its root.
const OTHER_GUEST: [&str; 6] = ["console", "earlyprintk", "init", "root", "rootflags", "rootfstype"];

/// A key and what setting it does.
pub(crate) struct Key {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    /// Sets it, or returns what is wrong with the value.
    pub(crate) set: fn(&mut Config, &DeValue<'_>) -> Result<(), String>,
}

pub(crate) const HYPERVISOR: &str = "hypervisor.katana";
const AGENT: &str = "agent.kata";
const FACTORY: &str = "factory";
const RUNTIME: &str = "runtime";

/// Every key there is.
pub(crate) const KEYS: &[Key] = &[
    Key { section: HYPERVISOR, name: "path", set: |c, v| path(v, &mut c.hypervisor.path) },
    Key { section: HYPERVISOR, name: "kernel", set: |c, v| path(v, &mut c.hypervisor.kernel) },
    Key { section: HYPERVISOR, name: "image", set: |c, v| path(v, &mut c.hypervisor.image) },
    Key {
        section: HYPERVISOR,
        name: "kernel_params",
        set: |c, v| parameters(v, &mut c.hypervisor.kernel_params),
    },
    Key { section: HYPERVISOR, name: "default_vcpus", set: |c, v| vcpus(v, &mut c.hypervisor.default_vcpus) },
    Key {
        section: HYPERVISOR,
        name: "default_maxvcpus",
        set: |c, v| most_vcpus(v, &mut c.hypervisor.default_maxvcpus),
    },
    Key {
        section: HYPERVISOR,
        name: "default_memory",
        set: |c, v| number(v, LEAST_MEMORY, MOST_MEMORY.into(), &mut c.hypervisor.default_memory),
    },
    Key {
        section: HYPERVISOR,
        name: "default_maxmemory",
        set: |c, v| most_memory(v, &mut c.hypervisor.default_maxmemory),
    },
    Key {
        section: HYPERVISOR,
        name: "disable_vhost_net",
        set: |c, v| boolean(v, &mut c.hypervisor.disable_vhost_net),
    },
    Key {
        section: HYPERVISOR,
        name: "disk_slots",
        set: |c, v| number(v, 0, MOST_DISKS, &mut c.hypervisor.disk_slots),
    },
    Key {
        section: HYPERVISOR,
        name: "writable_layer",
        set: |c, v| writable_layer(v, &mut c.hypervisor.writable_layer),
    },
    Key {
        section: HYPERVISOR,
        name: "writable_layer_size",
        set: |c, v| number(v, LEAST_LAYER, MOST_LAYER, &mut c.hypervisor.writable_layer_size),
    },
    Key { section: HYPERVISOR, name: "enable_debug", set: |c, v| boolean(v, &mut c.hypervisor.enable_debug) },
    Key {
        section: HYPERVISOR,
        name: "enable_annotations",
        set: |c, v| expressions(v, &mut c.hypervisor.enable_annotations),
    },
    Key {
        section: AGENT,
        name: "debug_console_enabled",
        set: |c, v| boolean(v, &mut c.agent.debug_console_enabled),
    },
    Key { section: AGENT, name: "enable_debug", set: |c, v| boolean(v, &mut c.agent.enable_debug) },
    Key {
        section: AGENT,
        name: "dial_timeout",
        set: |c, v| number(v, 1, LONGEST_TIMEOUT, &mut c.agent.dial_timeout),
    },
    Key { section: FACTORY, name: "enable_template", set: |c, v| boolean(v, &mut c.factory.enable_template) },
    Key { section: FACTORY, name: "template_path", set: |c, v| path(v, &mut c.factory.template_path) },
    Key {
        section: FACTORY,
        name: "template_scope",
        set: |c, v| template_scope(v, &mut c.factory.template_scope),
    },
    Key { section: RUNTIME, name: "enable_debug", set: |c, v| boolean(v, &mut c.runtime.enable_debug) },
    Key { section: RUNTIME, name: "sandbox_cgroup_only", set: |_, v| fixed(v) },
    Key {
        section: RUNTIME,
        name: "host_namespaces",
        set: |c, v| host_namespaces(v, &mut c.runtime.host_namespaces),
    },
    Key {
        section: RUNTIME,
        name: "disable_guest_empty_dir",
        set: |c, v| boolean(v, &mut c.runtime.disable_guest_empty_dir),
    },
    Key {
        section: RUNTIME,
        name: "empty_dir_size",
        set: |c, v| number(v, LEAST_LAYER, MOST_LAYER, &mut c.runtime.empty_dir_size),
    },
    Key {
        section: RUNTIME,
        name: "config_path_directories",
        set: |c, v| directories(v, &mut c.runtime.config_path_directories),
    },
];

/// Keys of Kata Containers that set one of ours in another way than by its own value.
pub(crate) static TRANSLATED: &[(Key, Sets)] = &[
    (
        Key {
            section: VMM,
            name: "kernel_params",
            set: |c, v| other_parameters(v, &mut c.hypervisor.kernel_params),
        },
        Sets { section: HYPERVISOR, key: "kernel_params", translated: true },
    ),
    (
        Key { section: AGENT, name: "dial_timeout_ms", set: |c, v| longer(v, &mut c.agent.dial_timeout) },
        Sets { section: AGENT, key: "dial_timeout", translated: true },
    ),
    (
        Key {
            section: AGENT,
            name: "reconnect_timeout_ms",
            set: |c, v| longer(v, &mut c.agent.dial_timeout),
        },
        Sets { section: AGENT, key: "dial_timeout", translated: true },
    ),
];

/// A key of ours that is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sets {
    /// Its section.
    pub section: &'static str,
    /// Its name.
    pub key: &'static str,
    /// Whether its value is another one than that in the file.
    pub translated: bool,
}

/// What a key sets.
pub(crate) fn ours(key: &'static Key) -> Sets {
    let translated = TRANSLATED.iter().find(|(other, _)| std::ptr::eq(other, key));
    let same = Sets { section: key.section, key: key.name, translated: false };
    translated.map_or(same, |(_, sets)| *sets)
}

/// The CPUs that a machine on this host can have.
pub(crate) fn host_cpus() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cpus).unwrap_or(MOST_VCPUS).min(MOST_VCPUS)
}

/// The MiB of memory that a machine on this host can have.
pub(crate) fn host_memory() -> u32 {
    // SAFETY: sysconf takes an integer.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let bytes = u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(4096));
    u32::try_from(bytes >> 20).unwrap_or(MOST_MEMORY).min(MOST_MEMORY)
}

fn mistyped(wanted: &str, value: &DeValue<'_>) -> String {
    format!("must be {wanted}, not {} {}", article(value.type_str()), value.type_str())
}

fn article(noun: &str) -> &'static str {
    if noun.starts_with(['a', 'i']) { "an" } else { "a" }
}

fn boolean(value: &DeValue<'_>, to: &mut bool) -> Result<(), String> {
    *to = value.as_bool().ok_or_else(|| mistyped("true or false", value))?;
    Ok(())
}

/// What can be said, because files for Kata Containers say it, and not be changed: the other value has no meaning here
/// (see `kata`).
fn fixed(value: &DeValue<'_>) -> Result<(), String> {
    boolean(value, &mut false)
}

fn integer(value: &DeValue<'_>) -> Result<i64, String> {
    let digits = value.as_integer().ok_or_else(|| mistyped("an integer", value))?;
    i64::from_str_radix(digits.as_str(), digits.radix()).map_err(|_| "is too large".to_owned())
}

fn number(value: &DeValue<'_>, least: i64, most: i64, to: &mut u32) -> Result<(), String> {
    let number = integer(value)?;
    let refusal = || format!("must be from {least} to {most}, not {number}");
    if !(least..=most).contains(&number) {
        return Err(refusal());
    }
    *to = u32::try_from(number).map_err(|_| refusal())?;
    Ok(())
}

/// As in Kata Containers: 0 is the default of 1, less than 0 and more than the host has are all of the host's. A
/// fraction is rounded up.
fn vcpus(value: &DeValue<'_>, to: &mut u32) -> Result<(), String> {
    let number = match value.as_float().map(|digits| digits.as_str().parse::<f64>()) {
        Some(Ok(number)) if number < 0.0 => -1,
        Some(Ok(number)) if number.is_finite() => number.ceil() as i64,
        Some(_) => return Err("must be a number".to_owned()),
        None => integer(value)?,
    };
    *to = match number {
        0 => 1,
        number => u32::try_from(number).map_or(host_cpus(), |number| number.min(host_cpus())),
    };
    Ok(())
}

/// As in Kata Containers: 0 and more than the host has are all of the host's.
fn most_vcpus(value: &DeValue<'_>, to: &mut u32) -> Result<(), String> {
    *to = match integer(value)? {
        0 => host_cpus(),
        number if number < 0 => return Err(format!("must be 0 or more, not {number}")),
        number => u32::try_from(number).map_or(host_cpus(), |number| number.min(host_cpus())),
    };
    Ok(())
}

/// As in Kata Containers: 0 and more than the host has are all of the host's, as far as a machine can have it.
fn most_memory(value: &DeValue<'_>, to: &mut u32) -> Result<(), String> {
    number(value, 0, ANY_MEMORY, to)?;
    *to = if *to == 0 { host_memory() } else { (*to).min(host_memory()) };
    Ok(())
}

/// Milliseconds of another agent, which is there sooner: they never make the time shorter.
fn longer(value: &DeValue<'_>, to: &mut u32) -> Result<(), String> {
    let mut milliseconds = 0;
    number(value, 0, LONGEST_TIMEOUT * 1000, &mut milliseconds)?;
    *to = (*to).max(milliseconds.div_ceil(1000));
    Ok(())
}

fn string<'v>(value: &'v DeValue<'_>) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| mistyped("a string", value))
}

fn host_namespaces(value: &DeValue<'_>, to: &mut HostNamespaces) -> Result<(), String> {
    *to = match string(value)? {
        "refuse" => HostNamespaces::Refuse,
        "guest" => HostNamespaces::Guest,
        other => return Err(format!("must be \"refuse\" or \"guest\", not {other:?}")),
    };
    Ok(())
}

fn writable_layer(value: &DeValue<'_>, to: &mut Option<WritableLayer>) -> Result<(), String> {
    *to = match string(value)? {
        "disk" => Some(WritableLayer::Disk),
        "shared" => Some(WritableLayer::Shared),
        "" => None,
        other => return Err(format!("must be \"disk\", \"shared\" or \"\", not {other:?}")),
    };
    Ok(())
}

fn template_scope(value: &DeValue<'_>, to: &mut TemplateScope) -> Result<(), String> {
    *to = match string(value)? {
        "host" => TemplateScope::Host,
        "namespace" => TemplateScope::Namespace,
        other => return Err(format!("must be \"host\" or \"namespace\", not {other:?}")),
    };
    Ok(())
}

fn strings<'v>(value: &'v DeValue<'_>) -> Result<Vec<&'v str>, String> {
    let texts = value.as_array().and_then(|texts| texts.iter().map(|text| text.get_ref().as_str()).collect());
    texts.ok_or_else(|| mistyped("an array of strings", value))
}

fn expressions(value: &DeValue<'_>, to: &mut Vec<String>) -> Result<(), String> {
    let texts = strings(value)?;
    texts.iter().try_for_each(|text| expression(text).map(drop))?;
    *to = texts.into_iter().map(String::from).collect();
    Ok(())
}

fn directories(value: &DeValue<'_>, to: &mut Vec<PathBuf>) -> Result<(), String> {
    *to = strings(value)?.into_iter().map(absolute).collect::<Result<_, _>>()?;
    Ok(())
}

fn path(value: &DeValue<'_>, to: &mut PathBuf) -> Result<(), String> {
    *to = absolute(string(value)?)?;
    Ok(())
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    if !Path::new(text).is_absolute() || text.contains('\0') {
        return Err(format!("must be an absolute path, not {text:?}"));
    }
    Ok(PathBuf::from(text))
}

fn parameters(value: &DeValue<'_>, to: &mut String) -> Result<(), String> {
    let text = string(value)?;
    if text.len() > LONGEST_PARAMETERS {
        return Err(format!("must not be longer than {LONGEST_PARAMETERS} characters, not {}", text.len()));
    }
    // The kernel's command line ends at the first NUL; a line break would end a line of the log.
    if let Some(bad) = text.chars().find(|character| !matches!(character, ' '..='~')) {
        return Err(format!("must be printable ASCII characters; {bad:?} is not one"));
    }
    *to = text.to_owned();
    Ok(())
}

/// Parameters for the guest of another VMM.
fn other_parameters(value: &DeValue<'_>, to: &mut String) -> Result<(), String> {
    let name = |word: &str| word.split('=').next().unwrap_or_default().to_owned();
    let words = string(value)?.split(' ').filter(|word| !word.is_empty());
    let kept: Vec<_> = words.filter(|word| !OTHER_GUEST.contains(&&*name(word))).collect();
    if let Some(word) = kept.iter().find(|word| name(word).contains("verity")) {
        return Err(format!(
            "{word:?} cannot be followed: the image is not verified here, it has to be root's alone; remove the word"
        ));
    }
    parameters(&DeValue::String(kept.join(" ").into()), to)
}

/// A regular expression that matches whole names.
pub(crate) fn expression(text: &str) -> Result<Regex, String> {
    Regex::new(&format!("^(?:{text})$")).map_err(|e| format!("{text:?} is not a regular expression: {e}"))
}
