//! The sections and keys of Kata Containers 2.x to 4.x, of its runtime in Go and of that in Rust, and what becomes of
//! them here. Plain data: documents, errors and `kata-runtime config check` are made of it.
//!
//! A section of a VMM, such as `[hypervisor.qemu]`, is `hypervisor.*`, whichever VMM it is of.

use crate::value::Value::{self, Is, Set, Text};

/// What becomes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It sets the key of the same name, or one that it is translated to.
    Works,
    /// It works, and with such a value it is accepted without a meaning.
    WorksBut(Value),
    /// It is accepted, and nothing here depends on it.
    Nothing,
    /// As `Nothing`, but such a value is refused: to ignore it would weaken what the file asks for.
    Refused(Value),
}

use Fate::{Nothing, Refused, Works, WorksBut};

/// Keys of a section that have the same fate, for the same reason.
pub(crate) struct Group {
    pub(crate) section: &'static str,
    pub(crate) fate: Fate,
    /// What a user should know of it; of what is refused, what to do instead.
    pub(crate) remark: &'static str,
    pub(crate) names: &'static [&'static str],
}

/// The VMMs whose sections are taken for ours.
pub(crate) const VMMS: &[&str] = &[
    "acrn",
    "clh",
    "cloud-hypervisor",
    "dragonball",
    "firecracker",
    "openvmm",
    "qemu",
    "remote",
    "stratovirt",
];

/// The section of all VMMs.
pub(crate) const VMM: &str = "hypervisor.*";
/// The templates of one VMM.
pub(crate) const VMM_FACTORY: &str = "hypervisor.*.factory";
const OURS: &str = "hypervisor.katana";
const AGENT: &str = "agent.kata";
const MEM_AGENT: &str = "agent.kata.mem_agent";
const FACTORY: &str = "factory";
const RUNTIME: &str = "runtime";
/// Names that only annotations have, without what all of these begin with.
pub(crate) const ANNOTATIONS: &str = "annotations";

const fn group(
    section: &'static str,
    fate: Fate,
    remark: &'static str,
    names: &'static [&'static str],
) -> Group {
    Group { section, fate, remark, names }
}

const CONFIDENTIAL: &str =
    "guests are neither encrypted nor measured here: run such pods with Kata Containers' own runtime class";
const RATE: &str = "there are no limits of rates here: set 0, and limit the pod's network by CNI (bandwidth \
                    plugin) and its disks by cgroups";
const HASH: &str = "files are not compared with hashes here; they have to be root's alone";

/// All of them.
#[rustfmt::skip]
pub(crate) const TABLE: &[Group] = &[
    // The machine.
    group(VMM, Works, "", &[
        "default_maxvcpus", "default_memory", "default_maxmemory", "disable_vhost_net", "enable_debug",
        "enable_annotations",
    ]),
    group(VMM, Works, "a fraction is rounded up", &["default_vcpus"]),
    group(VMM, Works,
        "without the words console, earlyprintk, init and root..., which are about another guest; words of \
         dm-verity are refused",
        &["kernel_params"],
    ),
    group(VMM, Nothing, "Katana's own VMM, kernel and image are used; [hypervisor.katana] names others", &[
        "path", "kernel", "image", "initrd", "firmware", "firmware_volume", "pflashes", "rootfs_type",
        "vm_rootfs_driver", "disable_image_nvdimm", "memory_offset", "ctlpath", "valid_hypervisor_paths",
        "valid_ctlpaths",
    ]),
    group(OURS, Refused(Set), "there is no initrd here: put the files into the image", &["initrd"]),
    group(VMM, Nothing, "the VMM is always in its jail, behind its filters of system calls", &[
        "jailer_path", "valid_jailer_paths", "seccompsandbox", "seccomp_sandbox", "disable_seccomp",
        "rootless_user",
    ]),
    group(VMM, Refused(Set),
        "the VMM has a jail without capabilities on the host instead of a user of its own: remove the key",
        &["rootless"],
    ),
    group(VMM, Nothing, "there is one kind of machine", &[
        "machine_type", "machine_accelerators", "cpu_features", "default_bridges", "use_legacy_serial",
        "disable_nesting_checks", "entropy_source", "valid_entropy_sources", "hypervisor_loglevel",
        "log_level", "extra_monitor_socket", "dbg_monitor_socket", "guest_memory_dump_path",
        "guest_memory_dump_paging",
    ]),
    group(VMM, Nothing, "memory is added as it is needed, of ordinary pages", &[
        "memory_slots", "enable_virtio_mem", "enable_mem_prealloc", "enable_hugepages", "hugepage_type",
        "enable_swap", "file_mem_backend", "valid_file_mem_backends", "reclaim_guest_freed_memory",
        "overhead_memory", "overhead_vcpus",
    ]),
    group(VMM, Nothing, "guests have no swap", &[
        "enable_guest_swap", "guest_swap_path", "guest_swap_size_percent", "guest_swap_create_threshold_secs",
    ]),
    group(VMM, Refused(Text("none")),
        "files are always shared by virtio-fs: pods that must not have that need Kata Containers' own \
         runtime class",
        &["shared_fs"],
    ),
    group(VMM, Nothing, "the VMM itself serves files", &[
        "virtio_fs_daemon", "valid_virtio_fs_daemon_paths", "virtio_fs_extra_args", "virtio_fs_cache",
        "virtio_fs_cache_size", "virtio_fs_queue_size", "virtio_fs_inode_file_handles", "virtio_fs_is_dax",
        "msize_9p",
    ]),
    group(VMM, Nothing, "disks are virtio-blk, as many as disk_slots says", &[
        "block_device_driver", "block_device_aio", "block_device_cache_set", "block_device_cache_direct",
        "block_device_cache_noflush", "block_device_logical_sector_size", "block_device_physical_sector_size",
        "block_device_num_queues", "block_device_queue_size", "blk_logical_sector_size",
        "blk_physical_sector_size", "num_queues", "queue_size", "disable_block_device_use",
        "enable_iothreads", "indep_iothreads",
    ]),
    group(VMM, Nothing, "there is no vhost-user", &[
        "enable_vhost_user_store", "vhost_user_store_path", "valid_vhost_user_store_paths",
        "vhost_user_reconnect_timeout_sec",
    ]),
    group(VMM, Nothing, "no device of the host is given to a guest", &[
        "enable_iommu", "enable_iommu_platform", "hot_plug_vfio", "cold_plug_vfio",
        "hotplug_vfio_on_root_bus", "pcie_root_port", "pcie_switch_port", "default_gpus", "default_gpu_model",
    ]),
    group(VMM, Nothing, "the VMM decides how many queues a network device has", &["network_queues"]),
    group(VMM, Refused(Set), RATE, &[
        "rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate", "net_rate_limiter_bw_max_rate",
        "net_rate_limiter_ops_max_rate", "disk_rate_limiter_bw_max_rate", "disk_rate_limiter_ops_max_rate",
    ]),
    group(VMM, Nothing, "it is a part of a limit, and those are refused", &[
        "net_rate_limiter_bw_one_time_burst", "net_rate_limiter_ops_one_time_burst",
        "disk_rate_limiter_bw_one_time_burst", "disk_rate_limiter_ops_one_time_burst",
    ]),
    group(VMM, Refused(Set), CONFIDENTIAL, &[
        "confidential_guest", "sev_snp_guest", "snp_id_block", "snp_id_auth", "initdata",
        "kernel_verity_params",
    ]),
    group(VMM, Nothing, "it is a part of a confidential guest, and those are refused", &[
        "snp_guest_policy", "snp_certs_path", "tdx_quote_generation_service_socket_port",
    ]),
    group(VMM, Refused(Set), "the guest has no further images: put the files into the image", &[
        "extra_images",
    ]),
    group(VMM, Refused(Set),
        "the guest runs no hooks of its image: have hooks in the specification, by CDI or NRI",
        &["guest_hook_path"],
    ),
    group(VMM, Refused(Is(false)), "guests have no SELinux: set true", &["disable_guest_selinux"]),
    group(VMM, Nothing, "no label is set here", &["disable_selinux", "selinux_label"]),
    group(VMM, Refused(Set),
        "pods run on this host: those of a remote hypervisor need Kata Containers' own runtime class",
        &["remote_hypervisor_socket", "hypervisor_socket"],
    ),
    group(VMM, Nothing, "it is a part of a remote hypervisor, and that is refused", &[
        "remote_hypervisor_timeout", "hypervisor_timeout",
    ]),
    group(VMM, Nothing, "[factory] decides about templates", &[
        "boot_to_be_template", "boot_from_template", "memory_path", "device_state_path", "prefetch_list_path",
    ]),
    // Templates.
    group(VMM_FACTORY, Works, "as in [factory], which wins", &["enable_template", "template_path"]),
    group(FACTORY, Works, "", &["enable_template", "template_path"]),
    group(FACTORY, Nothing, "there are templates, but no cache of machines", &[
        "vm_cache_number", "vm_cache_endpoint",
    ]),
    // The agent.
    group(AGENT, Works, "", &["debug_console_enabled", "enable_debug", "dial_timeout"]),
    group(AGENT, Works, "milliseconds; raises dial_timeout, if it is longer", &[
        "dial_timeout_ms", "reconnect_timeout_ms",
    ]),
    group(AGENT, Refused(Set),
        "the guest's kernel has no modules: name one that has what pods need built in",
        &["kernel_modules"],
    ),
    group(AGENT, Nothing, "there are no traces", &["enable_tracing", "trace_mode", "trace_type"]),
    group(AGENT, Nothing, "the agent is Katana's own", &[
        "container_pipe_size", "server_port", "log_port", "log_level", "request_timeout_ms",
        "health_check_request_timeout_ms", "create_container_timeout", "cdh_api_timeout",
        "cdh_api_timeout_ms", "launch_process_timeout", "visible_cdi_devices",
    ]),
    group(MEM_AGENT, Nothing, "the guest gives free memory back by itself", &[
        "mem_agent_enable", "memcg_disable", "memcg_swap", "memcg_swappiness_max", "memcg_period_secs",
        "memcg_period_psi_percent_limit", "memcg_eviction_psi_percent_limit",
        "memcg_eviction_run_aging_count_min", "compact_disable", "compact_period_secs",
        "compact_period_psi_percent_limit", "compact_psi_percent_limit", "compact_sec_max", "compact_order",
        "compact_threshold", "compact_force_times",
    ]),
    // The shim.
    group(RUNTIME, Works, "", &["enable_debug"]),
    group(RUNTIME, WorksBut(Is(false)), "a pod's machine always runs in the pod's own cgroup", &[
        "sandbox_cgroup_only",
    ]),
    group(RUNTIME, Nothing, "there is one runtime, one VMM and one agent", &[
        "name", "hypervisor_name", "agent_name",
    ]),
    group(RUNTIME, Nothing, "enable_debug decides what is logged", &["log_level", "log_prefix"]),
    group(RUNTIME, Refused(Text("none")),
        "a machine has what its pod's network namespace has: set tcfilter, and have CNI give pods no \
         interface",
        &["internetworking_model"],
    ),
    group(RUNTIME, Refused(Set), "a machine's network is that of its pod's namespace: set false", &[
        "disable_new_netns",
    ]),
    group(RUNTIME, Nothing, "seccomp profiles always hold in the guest", &["disable_guest_seccomp"]),
    group(RUNTIME, Nothing, "guests have no SELinux", &["guest_selinux_label"]),
    group(RUNTIME, Nothing, "vCPUs are not pinned", &["enable_vcpus_pinning"]),
    group(RUNTIME, Nothing, "a machine grows with the limits of its containers", &[
        "static_sandbox_resource_mgmt",
    ]),
    group(RUNTIME, Nothing, "there are no traces and profiles", &[
        "enable_tracing", "jaeger_endpoint", "jaeger_user", "jaeger_password", "enable_pprof",
    ]),
    group(RUNTIME, Refused(Set),
        "nothing of the host is shared with the guest but what containers mount: put the files into the \
         image",
        &["sandbox_bind_mounts"],
    ),
    group(RUNTIME, Refused(Set), "containers of a pod share volumes only: use an emptyDir", &[
        "shared_mounts",
    ]),
    group(RUNTIME, Refused(Set),
        "there is no way from a guest to a socket of the host but a volume with it",
        &["vsock_uds_forward"],
    ),
    group(RUNTIME, Refused(Set), "there are no experimental features: remove what is listed", &[
        "experimental",
    ]),
    group(RUNTIME, Refused(Set),
        "images are pulled on the host: pods that need it in the guest need Kata Containers' own runtime \
         class",
        &["experimental_force_guest_pull"],
    ),
    group(RUNTIME, Refused(Text("block-encrypted")),
        "an emptyDir is not encrypted: encrypt the host's disk, and set shared-fs",
        &["emptydir_mode"],
    ),
    group(RUNTIME, Nothing, "no device of the host is given to a guest", &[
        "vfio_mode", "pod_resource_api_sock",
    ]),
    group(RUNTIME, Nothing, "the shim is Katana's own", &[
        "create_container_timeout", "dan_conf", "kubelet_root_dir", "keep_abnormal", "use_passfd_io",
        "passfd_listener_port",
    ]),
    // Sections of 2.x.
    group("image", Refused(Set), "images are pulled on the host: set false", &["service_offload"]),
    group("image", Nothing, "images are pulled on the host", &["provision", "provison"]),
    group("netmon", Nothing, "changes of a pod's network are followed by the shim", &[
        "enable_netmon", "enable_debug", "path",
    ]),
    // Annotations that are no keys of files.
    group(ANNOTATIONS, Refused(Set), HASH, &[
        "hypervisor.kernel_hash", "hypervisor.image_hash", "hypervisor.initrd_hash",
        "hypervisor.hypervisor_hash", "hypervisor.path_hash", "hypervisor.hypervisorctl_hash",
        "hypervisor.jailer_hash", "hypervisor.firmware_hash", "hypervisor.firmware_volume_hash",
    ]),
    group(ANNOTATIONS, Nothing, "it is a part of a hash, and those are refused", &[
        "hypervisor.asset_hash_type",
    ]),
    group(ANNOTATIONS, Refused(Set), CONFIDENTIAL, &["hypervisor.cc_init_data"]),
    group(ANNOTATIONS, Refused(Set), "the agent does what the shim asks for, and has no policies", &[
        "agent.policy",
    ]),
    group(ANNOTATIONS, Nothing, "no device of the host is given to a guest", &["hypervisor.gpu_model"]),
    group(ANNOTATIONS, Nothing, "there is one way to the agent", &["hypervisor.use_vsock"]),
    group(ANNOTATIONS, Nothing, "files are not fetched ahead", &["hypervisor.prefetch_files.list"]),
];
