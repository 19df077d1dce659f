//! Commands of Kata Containers' tool for which there is nothing here: each says why, and what to do instead.

/// Why a command does nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "kata-runtime iptables: the guest has no iptables program, its image has the agent and a busybox. Its kernel has packet \
         filters: a container of the pod that has the program and CAP_NET_ADMIN, such as the init container of a service \
         mesh or one of kubectl debug --profile=netadmin, reads and sets them"
    )]
    Iptables,
    #[error(
        "kata-runtime direct-volume: no volume is mounted by the guest past the host. A volume with volumeMode: Block is a \
         disk of the pod's machine, and a file system that kubelet has mounted is shared with it; neither needs this command"
    )]
    DirectVolume,
}
