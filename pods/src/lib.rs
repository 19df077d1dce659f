//! The pods of this host, as their shims have written them down, and requests to these shims.

pub mod memory;
pub mod request;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use katana_protocol::manage::{RUN, SANDBOXES, STATE};
use serde::Deserialize;

/// Why a pod is not found, or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("no pod has an id that begins with {0:?}")]
    NotFound(String),
    /// There are several.
    #[error("{0:?} is the beginning of the ids of several pods: {1}")]
    Ambiguous(String, String),
    /// The pods cannot be listed.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    /// Its shim is gone, or has no such socket.
    #[error("the shim of pod {0} cannot be reached: {1}")]
    Connect(String, io::Error),
    /// In this time.
    #[error("the shim of pod {0} does not answer within {1} s")]
    Silent(String, u64),
    /// It answered something else, or broke off.
    #[error("the shim of pod {0}: {1}")]
    Answer(String, String),
    /// It refused, in its own words.
    #[error("{text}")]
    Refused {
        /// The status of HTTP.
        status: u16,
        /// One line.
        text: String,
    },
}

/// A process, which another one with the same pid is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// When it began, in clock ticks since the host's boot: field 22 of proc_pid_stat(5).
    pub start: u64,
}

/// A pod of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The shim.
    pub shim: Process,
    /// The VMM, once there is one.
    pub vmm: Option<Process>,
    /// Its cgroup on the host, if the VMM has one of its own.
    pub cgroup: Option<PathBuf>,
    /// What there is of it on the host goes with it: its record, its shim's socket.
    pub directory: PathBuf,
}

/// What is read of a pod's record.
#[derive(Deserialize)]
struct Record {
    namespace: String,
    sandbox: String,
    shim: Process,
    vmm: Vec<Process>,
    cgroup: Option<PathBuf>,
}

/// All pods, in the order of their ids.
///
/// # Errors
/// [`Error::Io`] if the record of a pod that is there cannot be read; only root can.
pub fn all() -> Result<Vec<Pod>, Error> {
    below(&Path::new(RUN).join(SANDBOXES))
}

/// The pod whose id is this one or, if there is none, begins so.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Ambiguous`], or those of [`all`].
pub fn find(id: &str) -> Result<Pod, Error> {
    choose(all()?, id)
}

fn below(directory: &Path) -> Result<Vec<Pod>, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |e| Error::Io(path, e)
    };
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed(directory))?,
    };
    let mut pods = Vec::new();
    for entry in entries {
        let directory = entry.map_err(failed(directory))?.path();
        let path = directory.join(STATE);
        let text = match fs::read(&path) {
            // It goes, or has only just come.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            text => text.map_err(failed(&path))?,
        };
        let Ok(record) = serde_json::from_slice::<Record>(&text) else { continue };
        let Record { namespace, sandbox: id, shim, vmm, cgroup } = record;
        pods.push(Pod { id, namespace, shim, vmm: vmm.last().copied(), cgroup, directory });
    }
    pods.sort_by(|one, other| (&one.id, &one.namespace).cmp(&(&other.id, &other.namespace)));
    Ok(pods)
}

fn choose(mut pods: Vec<Pod>, id: &str) -> Result<Pod, Error> {
    if pods.iter().any(|pod| pod.id == id) {
        pods.retain(|pod| pod.id == id);
    } else {
        pods.retain(|pod| !id.is_empty() && pod.id.starts_with(id));
    }
    match pods.len() {
        0 => Err(Error::NotFound(id.to_owned())),
        1 => Ok(pods.remove(0)),
        _ => {
            let names: Vec<_> = pods.iter().map(|pod| format!("{}/{}", pod.namespace, pod.id)).collect();
            Err(Error::Ambiguous(id.to_owned(), names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, namespace: &str) -> Pod {
        Pod {
            id: id.into(),
            namespace: namespace.into(),
            shim: Process { pid: 1, start: 1 },
            vmm: None,
            cgroup: None,
            directory: PathBuf::new(),
        }
    }

    #[test]
    fn a_pod_is_found_by_the_beginning_of_its_id() {
        let pods = || vec![pod("ab", "k8s.io"), pod("abc", "k8s.io"), pod("b", "k8s.io"), pod("b", "moby")];
        assert_eq!(choose(pods(), "ab").unwrap().id, "ab");
        assert_eq!(choose(pods(), "abc").unwrap().id, "abc");
        let text = |id| choose(pods(), id).unwrap_err().to_string();
        assert_eq!(text("a"), "\"a\" is the beginning of the ids of several pods: k8s.io/ab, k8s.io/abc");
        assert_eq!(text("b"), "\"b\" is the beginning of the ids of several pods: k8s.io/b, moby/b");
        assert_eq!(text("x"), "no pod has an id that begins with \"x\"");
        assert_eq!(text(""), "no pod has an id that begins with \"\"");
    }

    #[test]
    fn records_are_read_and_what_is_none_is_left_out() {
        let root = std::env::temp_dir().join(format!("katana-pods-{}", std::process::id()));
        let record = r#"{"namespace": "n", "sandbox": "i", "shim": {"pid": 7, "start": 8}, "pids": {},
            "vmm": [{"pid": 9, "start": 10}, {"pid": 11, "start": 12}], "cgroup": "/c", "network": null}"#;
        for (name, text) in [("one", record), ("two", "{"), ("three", "")] {
            fs::create_dir_all(root.join(name)).unwrap();
            if !text.is_empty() {
                fs::write(root.join(name).join(STATE), text).unwrap();
            }
        }
        let pods = below(&root).unwrap();
        assert_eq!(pods.len(), 1);
        let vmm = Some(Process { pid: 11, start: 12 });
        assert_eq!((pods[0].id.as_str(), pods[0].vmm, pods[0].shim.pid), ("i", vmm, 7));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(below(&root).unwrap(), []);
    }
}
