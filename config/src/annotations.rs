//! What a pod sets for itself. Its author writes annotations and is not root on the host: the file that one of them
//! names has to be among those that the administrator has put there for this (`config_path_directories`), and single
//! keys (`io.katacontainers.config.hypervisor.KEY`) are for those that `enable_annotations` lists.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use toml::de::DeValue;

use crate::keys::{HYPERVISOR, KEYS, Key, expression};
use crate::trusted::Links;
use crate::{Config, Error, Hypervisor, load_file};

/// The annotation that names another configuration file, as in Kata Containers.
pub const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// What all of them begin with.
const PREFIX: &str = "io.katacontainers.config.";
/// The section of the keys that can be set, as Kata Containers names it.
const SECTION: &str = "hypervisor.";
/// Kata Containers has another name for one key than its configuration file.
const ALIAS: (&str, &str) = ("default_max_vcpus", "default_maxvcpus");
/// They name files of the host, or are the very list of what is allowed.
const NEVER: [&str; 4] = ["path", "kernel", "image", "enable_annotations"];

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

    /// This configuration with what a pod's annotations set. Annotations of other kinds are none of its business.
    ///
    /// # Errors
    /// [`Error::Annotation`] for a key that does not exist or may not be set, and for a bad value.
    pub fn annotated(mut self, annotations: &BTreeMap<String, String>) -> Result<Self, Error> {
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            let set = find(&self, key).and_then(|key| {
                (key.set)(&mut self, &typed(value))?;
                self.hypervisor.within_most_memory(key.name)
            });
            set.map_err(|why| Error::Annotation { name: name.clone(), why })?;
        }
        self.checked()
            .map_err(|why| Error::Annotation { name: format!("{PREFIX}{SECTION}default_vcpus"), why })
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

fn find(config: &Config, name: &str) -> Result<&'static Key, String> {
    let known = name.strip_prefix(SECTION).and_then(|name| {
        let name = if name == ALIAS.0 { ALIAS.1 } else { name };
        KEYS.iter().find(|key| key.section == HYPERVISOR && key.name == name)
    });
    let key = known.ok_or("there is no such key")?;
    if NEVER.contains(&key.name) {
        return Err("this key cannot be set by annotations".to_owned());
    }
    let allowed = config.hypervisor.enable_annotations.iter().filter_map(|text| expression(text).ok());
    if !allowed.into_iter().any(|expression| expression.is_match(key.name)) {
        return Err(format!("\"{}\" is not in enable_annotations of {}", key.name, config.path.display()));
    }
    Ok(key)
}

/// Annotations are strings; what looks like a number or a truth value is one.
fn typed(value: &str) -> DeValue<'_> {
    let plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match DeValue::parse(value) {
        Ok(parsed) if plain && matches!(parsed.get_ref(), DeValue::Integer(_) | DeValue::Boolean(_)) => {
            parsed.into_inner()
        }
        _ => DeValue::String(value.into()),
    }
}
