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

pub mod bpf;
pub mod caller;
pub mod counters;
pub mod kernel;
pub mod manage;
pub mod mount;
pub mod mount_options;
pub mod netlink;
pub mod vmm;

/// By which guest and VMM agree on a template: a byte of the host bridge's configuration space.
pub mod bridge {
    /// Where it is: the first byte that is the device's own.
    pub const REGISTER: u64 = 0x40;
    /// Read: a template is to be made of this guest.
    pub const WANTED: u8 = 1;
    /// Written: other guests may be restored from here.
    pub const READY: u8 = 1;
    /// Written: the guest's clocks may advance by [`SKIPPED`] at once.
    pub const LATER: u8 = 2;
    /// Seconds. Longer than what the guest's kernel puts off for a while, the report of its free pages above all
    /// (PAGE_REPORTING_DELAY).
    pub const SKIPPED: u64 = 3;
}

/// The vsock port on the host to which the agent connects as soon as it can serve [`agent::Agent`].
pub const AGENT_PORT: u32 = 1024;
/// Ports on the host from here on are handed out by the shim for standard streams and the like.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;
/// Bytes of what the agent says first on each connection to one of those ports. The shim sends it in
/// [`agent::CreateSandboxRequest`]; no other process of the guest has it.
pub const STREAM_KEY: usize = 16;
/// Parameters of the guest's kernel that say how it is to use transparent huge pages, each with its file below
/// `/sys/kernel/mm/transparent_hugepage`. The kernel itself knows the first one.
pub const TRANSPARENT_HUGE_PAGES: [(&str, &str); 3] = [
    ("transparent_hugepage", "enabled"),
    ("agent.thp_defrag", "defrag"),
    ("agent.thp_shmem", "shmem_enabled"),
];
/// Where the agent mounts the pod's shared directory in the guest.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared";
/// The root of a container in its directory there, and the name of one that nobody but the guest changes, of which the
/// guest may keep what it knows.
pub const SHARED_ROOT: &str = "rootfs";
/// See [`SHARED_ROOT`].
pub const OWN_ROOT: &str = "own";
/// The directory in it with the volumes, which have numbers as names. No id of a container is like that.
pub const SHARED_VOLUMES: &str = ".volumes";
/// Where the agent mounts the pod's shared memory, which containers see as /dev/shm.
pub const GUEST_SHM: &str = "/run/kata-containers/shm";
/// Where the agent makes nodes of disks, with the numbers of their slots as names.
pub const GUEST_DISKS: &str = "/run/kata-containers/disks";
/// Where the agent mounts disks that are volumes, with the numbers of their slots as names. The volume is the directory
/// "upper" in it.
pub const GUEST_VOLUMES: &str = "/run/kata-containers/volumes";
/// Where the agent mounts roots of containers that are on disks, with the containers' ids as names.
pub const GUEST_ROOTS: &str = "/run/kata-containers/roots";
/// Where the agent listens for the host's sockets, with the numbers of their ports as names.
pub const GUEST_SOCKETS: &str = "/run/kata-containers/sockets";
/// The virtio-fs tag of the shared directory.
pub const SHARE_TAG: &str = "kataShared";
/// The group of the agent's thread that replays changes of shared files. Requests of this group to the file server
/// change nothing on the host (`vmm/src/virtio/fs/replay.rs`). A number that no range of ids in use comes near to.
pub const REPLAY_GID: u32 = 0xffff_ff4b;
/// Asking for this attribute of a directory, the replaying thread has the file server remember what is in it; with a
/// name after it, what has this name.
pub const REPLAY_LEARN: &str = "user.katana.learn.";
/// The directory that the replaying thread finds in every directory, and moves files out of.
pub const REPLAY_SOURCE: &str = ".katana-replay";

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::agent::*;

    /// What is read is written and read again as the same.
    fn read<M: Message + PartialEq>(bytes: &[u8]) {
        if let Ok(message) = M::parse_from_bytes(bytes) {
            let again = message.write_to_bytes().expect("a message that was read");
            assert!(M::parse_from_bytes(&again).expect("a message that was written") == message);
        }
    }

    /// Requests of the shim and answers of the agent, each as the other one hears it.
    #[test]
    fn fuzz_agent_messages() {
        katana_fuzz::fuzz("agent-messages", |input| {
            let bytes = input.rest();
            read::<CreateSandboxRequest>(bytes);
            read::<CreateContainerRequest>(bytes);
            read::<ExecProcessRequest>(bytes);
            read::<UpdateContainerRequest>(bytes);
            read::<Network>(bytes);
            read::<Changes>(bytes);
            read::<MountChanges>(bytes);
            read::<SignalProcessRequest>(bytes);
            read::<CreateContainerResponse>(bytes);
            read::<ContainerStatsResponse>(bytes);
            read::<GuestStatsResponse>(bytes);
            read::<ListProcessesResponse>(bytes);
            read::<WaitProcessResponse>(bytes);
            read::<OomResponse>(bytes);
        });
    }
}
