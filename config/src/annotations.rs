//! What a pod sets for itself. Its author writes annotations and is not root on the host: the file that one of them
//! names has to be among those that the administrator has put there for this (`config_path_directories`), and single
//! keys (`io.katacontainers.config.hypervisor.KEY`) are for those that `enable_annotations` lists.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use toml::Spanned;
use toml::de::DeValue;

use crate::classes::{self, Meaning};
use crate::keys::{HYPERVISOR, Key, expression};
use crate::trusted::Links;
use crate::{Config, Error, Hypervisor, load_file};

/// The annotation that names another configuration file, as in Kata Containers.
pub const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// What all of them begin with.
const PREFIX: &str = "io.katacontainers.config.";
/// Kata Containers has another name for one key than its configuration file.
const ALIAS: (&str, &str) = ("default_max_vcpus", "default_maxvcpus");
/// They name files of the host, or are the very list of what is allowed.
const NEVER: [&str; 4] = ["path", "kernel", "image", "enable_annotations"];
/// Without these a pod is neither less isolated nor has less, so that one that may not set them runs all the same.
const HARMLESS: [&str; 3] = ["enable_debug", "disable_vhost_net", "disk_slots"];

impl Config {
    /// The configuration that a pod's annotation names, or this one if there is no such annotation.
    ///
    /// # Errors
    /// [`Error::Annotation`] when this configuration does not allow it, otherwise as for any file. The file must not be
    /// reached by a link, so that it is where its path says.
    pub fn chosen(self, annotations: &BTreeMap<String, String>) -> Result<Self, Error> {
        let Some(text) = annotations.get(CONFIG_PATH) else { return Ok(self) };
        let (path, allowed) = (Path::new(text), &self.runtime.config_path_directories);
        let refused = |why| Error::Annotation { name: CONFIG_PATH.to_owned(), why };
        if allowed.is_empty() {
            return Err(refused(format!(
                "pods may not choose their configuration: config_path_directories in [runtime] of {} names no directory \
                 (a runtime of its own with ConfigPath is the other way)",
                self.path.display()
            )));
        }
        if !allowed.iter().any(|directory| is_below(path, directory)) {
            let file = self.path.display();
            return Err(refused(format!(
                "{text:?} is not below one of config_path_directories in [runtime] of {file}"
            )));
        }
        load_file(path, Links::Refuse)
    }

    /// This configuration with what a pod's annotations set, and a line for each annotation of Kata Containers that is
    /// ignored. Annotations of other kinds are none of its business.
    ///
    /// # Errors
    /// [`Error::Annotation`] for a key that does not exist, for a bad value, and for what must not be ignored.
    pub fn annotated(mut self, annotations: &BTreeMap<String, String>) -> Result<(Self, Vec<String>), Error> {
        let mut ignored = Vec::new();
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            let failed = |why| Error::Annotation { name: name.clone(), why };
            if let Some(why) = self.annotate(key, &typed(value)).map_err(failed)? {
                ignored.push(format!("annotation {name} {why}"));
            }
        }
        let failed = |why| Error::Annotation { name: format!("{PREFIX}hypervisor.default_vcpus"), why };
        self.check().map_err(failed)?;
        Ok((self, ignored))
    }

    /// Follows an annotation, or says why it is ignored.
    fn annotate(&mut self, name: &str, value: &DeValue<'_>) -> Result<Option<String>, String> {
        let (section, key) = split(name);
        let without_meaning = |remark: &str| Ok(Some(format!("has no meaning here: {remark}")));
        match classes::annotation(name, value).or_else(|| classes::meaning(section, key, value)) {
            Some(Meaning::Sets(_, _)) if section != HYPERVISOR => {
                without_meaning("it is the administrator's to set")
            }
            Some(Meaning::Sets(key, _)) => {
                match self.permit(name, key) {
                    Err(why) if HARMLESS.contains(&key.name) => {
                        return Ok(Some(format!("is ignored: {why}")));
                    }
                    permitted => permitted?,
                }
                let layer = self.hypervisor.writable_layer_size;
                (key.set)(self, value)?;
                self.hypervisor.within_most_memory(key.name)?;
                let asked = self.hypervisor.writable_layer_size;
                if asked > layer {
                    return Err(format!("{asked} is more than writable_layer_size, which is {layer}"));
                }
                Ok(None)
            }
            Some(Meaning::Nothing(remark)) => without_meaning(remark),
            Some(Meaning::Refused(why)) => Err(format!("it cannot be followed: {why}")),
            None => Err(unknown(section, key)),
        }
    }

    /// Whether a pod may set a key.
    fn permit(&self, name: &str, key: &Key) -> Result<(), String> {
        if NEVER.contains(&key.name) {
            return Err("this key cannot be set by annotations".to_owned());
        }
        let base = name.strip_prefix("hypervisor.").unwrap_or(name);
        let mut allowed = self.hypervisor.enable_annotations.iter().filter_map(|text| expression(text).ok());
        if !allowed.any(|expression| expression.is_match(key.name) || expression.is_match(base)) {
            return Err(format!("\"{}\" is not in enable_annotations of {}", key.name, self.path.display()));
        }
        Ok(())
    }
}

impl Hypervisor {
    /// In a file, `default_memory` raises `default_maxmemory`. What a pod asks for does not.
    fn within_most_memory(&self, key: &str) -> Result<(), String> {
        let (asked, most) = (self.default_memory, self.default_maxmemory);
        if key == "default_memory" && asked > most {
            return Err(format!("{asked} is more than default_maxmemory, which is {most}"));
        }
        Ok(())
    }
}

/// Whether a path says without detours that something is in a directory.
fn is_below(path: &Path, directory: &Path) -> bool {
    let plain = |part| matches!(part, Component::Normal(_) | Component::RootDir);
    let rest = path.strip_prefix(directory).is_ok_and(|rest| rest.components().next().is_some());
    rest && path.is_absolute() && path.components().all(plain)
}

/// The section of a configuration file and the key there that an annotation speaks of.
fn split(name: &str) -> (&str, &str) {
    match name.split_once('.') {
        Some(("hypervisor", key)) => (HYPERVISOR, if key == ALIAS.0 { ALIAS.1 } else { key }),
        Some(("agent", key)) => ("agent.kata", key),
        Some(("runtime", key)) => ("runtime", key),
        // No section has such a name.
        _ => (".", name),
    }
}

fn unknown(section: &str, key: &str) -> String {
    let nearest = classes::nearest_key(section, key);
    let meant = nearest.map(|nearest| format!("; did you mean {nearest}?"));
    format!("there is no such key{}", meant.unwrap_or_default())
}

/// Annotations are strings; what looks like a number or a truth value is one.
fn typed(value: &str) -> DeValue<'_> {
    let plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'));
    match DeValue::parse(value).map(Spanned::into_inner) {
        Ok(parsed @ (DeValue::Integer(_) | DeValue::Boolean(_))) if plain => parsed,
        Ok(parsed @ DeValue::Float(_)) if plain && value.bytes().any(|byte| byte == b'.') => parsed,
        _ => DeValue::String(value.into()),
    }
}
