//! Keys that a pod sets for itself: `io.katacontainers.config.hypervisor.KEY`, as far as `enable_annotations` allows.

use std::collections::BTreeMap;

use regex_lite::Regex;
use toml::de::DeValue;

use crate::keys::{HYPERVISOR, KEYS, Key};
use crate::{Config, Error};

/// What all of them begin with.
const PREFIX: &str = "io.katacontainers.config.";
/// The section of the keys that can be set, as Kata Containers names it.
const SECTION: &str = "hypervisor.";
/// Kata Containers has another name for one key than its configuration file.
const ALIAS: (&str, &str) = ("default_max_vcpus", "default_maxvcpus");
/// They name files of the host, or are the very list of what is allowed.
const NEVER: [&str; 4] = ["path", "kernel", "image", "enable_annotations"];

impl Config {
    /// This configuration with what a pod's annotations set. Annotations of other kinds are none of its business.
    ///
    /// # Errors
    /// [`Error::Annotation`] for a key that does not exist or may not be set, and for a bad value.
    pub fn annotated(mut self, annotations: &BTreeMap<String, String>) -> Result<Self, Error> {
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            let set = find(&self, key).and_then(|key| (key.set)(&mut self, &typed(value)));
            set.map_err(|why| Error::Annotation { name: name.clone(), why })?;
        }
        self.checked()
            .map_err(|why| Error::Annotation { name: format!("{PREFIX}{SECTION}default_vcpus"), why })
    }
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

/// A regular expression that matches whole names.
pub(crate) fn expression(text: &str) -> Result<Regex, String> {
    Regex::new(&format!("^(?:{text})$")).map_err(|e| format!("{text:?} is not a regular expression: {e}"))
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
