//! What the end-to-end tests and the benchmark share: they drive containerd's own `ctr` as a user would, and look at
//! the host from outside.

pub mod bundle;
pub mod command;
pub mod configuration;
pub mod container;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod environment;
pub mod events;
pub mod grpc;
pub mod host;
pub mod network;
pub mod out_of_sight;
pub mod pages;
pub mod process;
#[cfg(test)]
mod rooms;
pub mod scratch;
pub mod services;
pub mod terminal;
pub mod turn;

pub use bundle::Bundle;
pub use command::{Command, Output, Running};
pub use configuration::Configuration;
pub use container::{Container, Run, ctr};
pub use containerd::{Containerd, Instance};
pub use events::Events;
pub use scratch::Scratch;
pub use terminal::Terminal;

/// A busybox whose applets are all in /bin; users root and app (1000, also in the group extra, 2000).
pub const BUSYBOX: &str = "localhost/busybox:1";
/// Debian with python3, sqlite3 and a package repository of its own.
pub const DEBIAN: &str = "localhost/debian:1";
/// An nginx that serves one page on port 80, and a busybox.
pub const NGINX: &str = "localhost/nginx:1";
/// fio, iperf3, wrk, git and busybox.
pub const BENCH: &str = "localhost/bench:1";
/// PostgreSQL, run as its user postgres.
pub const POSTGRES: &str = "localhost/postgres:1";

/// Options of `ctr run` that show a container its cgroup, as container engines do and `ctr` does not by itself. It is
/// read-only unless the container is privileged.
pub const CGROUP_MOUNT: &str = "--mount type=cgroup,src=cgroup,dst=/sys/fs/cgroup";

/// A shell command that goes to the process's cgroup below that mount. Without a cgroup namespace, the mount shows
/// either the whole tree or a part: the mount's root and the process's path show which, as programs find it.
pub const ENTER_CGROUP: &str = "root=$(awk '$5 == \"/sys/fs/cgroup\" {print $4}' /proc/self/mountinfo)
    path=$(sed s/0::// /proc/self/cgroup); cd /sys/fs/cgroup/${path#\"${root%/}\"}";
