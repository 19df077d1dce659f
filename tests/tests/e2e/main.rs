//! Katana from the outside: real containers under a real containerd, driven by `ctr`.
//!
//! Run it as root below `tests/with-containerd`. `KATANA_RUNTIME=io.containerd.runc.v2` runs the same tests against
//! runc: a case that runc fails is a wrong case. `KATANA_SOAK=1` makes the tests longer. The ignored tests are those of
//! [`guest`]: other tests run this same program inside a container for them.

mod coexist;
mod containerd;
mod cri;
mod deploy;
mod disks;
mod docker;
mod exec;
mod failures;
mod faults;
mod first_steps;
mod guest;
mod host_namespaces;
mod install;
mod io;
mod jail;
mod kernel;
mod leaks;
mod manage;
mod manage_do;
mod manage_exec;
mod metrics;
mod mounts;
mod network;
mod package;
mod run;
mod shares;
mod size;
mod sockets;
mod task;
mod template;
mod tool;
mod workload;
