//! What the host's tools ask of a shim, as HTTP on the pod's management socket: JSON, unless a path says otherwise.

pub mod exec;

use serde::{Deserialize, Serialize};

/// Name of the socket in the pod's state directory.
pub const SOCKET: &str = "shim-monitor.sock";
/// The root of everything that lives as long as pods do.
pub const RUN: &str = "/run/kata-containers";
/// The pods' state directories, below [`RUN`].
pub const SANDBOXES: &str = "sandboxes";
/// What is written down of a pod, in its state directory.
pub const STATE: &str = "state.json";
/// Longest body of a request, bytes.
pub const LONGEST_REQUEST: usize = 64 * 1024;

/// In the query of a path with lines: what is to come as well, until the client closes the connection or the pod ends.
pub const FOLLOW: &str = "follow";

/// The answer to a request that failed, with a status of 400 or more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// One line.
    pub error: String,
}

/// `GET /pod`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Of a Kubernetes pod: its namespace and its name.
    pub kubernetes: Option<(String, String)>,
    /// Its containers, in the order of their ids.
    pub containers: Vec<Container>,
}

/// A container of [`Pod`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its name in the Kubernetes pod.
    pub name: Option<String>,
    /// Its image, where containerd's client says so: that of Kubernetes does, `ctr` and Docker do not.
    pub image: Option<String>,
    /// Whether it only stands for the pod.
    pub sandbox: bool,
    /// Where it is in its life.
    pub status: Status,
    /// The pid on the host by which clients know it.
    pub pid: u32,
    /// How it ended: the exit code, or 128 and the signal's number.
    pub exit_status: Option<u32>,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It waits for Start.
    Created,
    /// It runs.
    Running,
    /// It is frozen.
    Paused,
    /// It has ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// `GET /stats`: what each running container uses, by the guest's own cgroups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// In the order of their ids; without those whose guest does not say.
    pub containers: Vec<ContainerStats>,
}

/// What a container uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStats {
    /// Its id.
    pub id: String,
    /// Processor time, microseconds.
    pub cpu_usec: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes; nothing without a limit.
    pub memory_limit: Option<u64>,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes read from disks of the guest.
    pub read: u64,
    /// Bytes written to them.
    pub written: u64,
}

/// A line of `GET /events`: what containerd was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since 1970.
    pub time: i64,
    /// As containerd has it, such as "/tasks/exit".
    pub topic: String,
    /// The container.
    pub container: String,
    /// The process, if it is not the container's first one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exec: Option<String>,
    /// The pid by which clients know it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pid: Option<u32>,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_status: Option<u32>,
}
