//! What the programs of Katana say to each other.

#[allow(missing_docs, unused_imports, unused_qualifications)]
#[allow(clippy::all, clippy::pedantic, clippy::restriction)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/agent/mod.rs"));
}

/// Shim and agent: messages, client and server of the agent's ttrpc service (`proto/agent.proto`).
pub mod agent {
    pub use crate::generated::agent::*;
    pub use crate::generated::agent_ttrpc::*;
}

/// containerd's description of a pod (`proto/pod.proto`).
pub mod pod {
    pub use crate::generated::pod::*;
}

pub mod netlink;
pub mod vmm;

/// The vsock port on the host to which the agent connects as soon as it can serve [`agent::Agent`].
pub const AGENT_PORT: u32 = 1024;
/// The vsock port in the guest on which an agent with the debug console listens for a shell session.
pub const DEBUG_CONSOLE_PORT: u32 = 1026;
/// Ports on the host from here on are handed out by the shim for standard streams.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;
/// Where the agent mounts the pod's shared directory in the guest.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared";
/// Where the agent mounts the pod's shared memory, which containers see as /dev/shm.
pub const GUEST_SHM: &str = "/run/kata-containers/shm";
/// The virtio-fs tag of the shared directory.
pub const SHARE_TAG: &str = "kataShared";
