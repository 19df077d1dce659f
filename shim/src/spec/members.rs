//! The members of `config.json` that the shim looks at, by the names of the OCI runtime specification. What it does not
//! look at is kept as it is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A container's specification.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Spec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// The root file system.
    pub root: Option<Root>,
    #[serde(default, deserialize_with = "null_is_default")]
    /// Mounts in order.
    pub mounts: Vec<Mount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// Hooks.
    pub hooks: Option<Hooks>,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// The first process.
    pub process: Option<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// Linux.
    pub linux: Option<Linux>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// Host name.
    pub hostname: Option<String>,
    #[serde(flatten)]
    /// All else.
    pub rest: Map<String, Value>,
}

/// `root`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
    #[serde(flatten)]
    /// All else.
    pub rest: Map<String, Value>,
}

/// An element of `mounts`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Where.
    pub destination: PathBuf,
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    /// File system.
    pub kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// What.
    pub source: Option<PathBuf>,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    /// How.
    pub options: Vec<String>,
    #[serde(flatten)]
    /// All else.
    pub rest: Map<String, Value>,
}

/// `hooks`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// On the host, before the container is made. Deprecated in favour of the next.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub prestart: Vec<Hook>,
    /// On the host, before the container is made.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub create_runtime: Vec<Hook>,
    /// On the host, after the start.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub poststart: Vec<Hook>,
    /// On the host, after the end.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
    /// Those of the guest.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A hook
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Hook {
    /// The program.
    pub path: PathBuf,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    /// Its arguments, the first is its name.
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    /// Its environment.
    pub env: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// Seconds.
    pub timeout: Option<u64>,
}

/// `linux`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Namespaces.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Namespace>,
    /// Devices.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Path of the cgroup, as a directory or as "slice:prefix:name".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroups_path: Option<String>,
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Map<String, Value>>,
    /// All else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// An element of `linux.namespaces`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Namespace {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// An existing one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// An element of `linux.devices`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Device {
    /// The node.
    pub path: PathBuf,
    /// c, u, b or p.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Major number.
    #[serde(default)]
    pub major: i64,
    /// Minor number.
    #[serde(default)]
    pub minor: i64,
    /// All else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
