//! What containers of this runtime can have, for containerd's introspection (`-info`): the features of the OCI runtime
//! specification (features.md, features-linux.md). kubelet learns from them what it may ask of a handler.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use katana_protocol::mount_options::MOUNT_OPTIONS;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// The name under which containerd has registered the type; what it names is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// The versions of the specification that shim and agent are written to.
const OCI_VERSIONS: [&str; 2] = ["1.0.0", "1.2.0"];
/// Those of the guest's kernel.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The answer to containerd.
pub fn runtime_info() -> RuntimeInfo {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let value = features().to_string().into_bytes();
    RuntimeInfo {
        name: crate::RUNTIME.into(),
        version: Some(version).into(),
        features: Some(Any { type_url: FEATURES_TYPE.into(), value, ..Default::default() }).into(),
        ..Default::default()
    }
}

/// The features. A member that is missing means "unknown" to who reads it, so what does not exist here is a `false`.
fn features() -> Value {
    let [oldest, newest] = OCI_VERSIONS;
    json!({
        "ociVersionMin": oldest,
        "ociVersionMax": newest,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            // A new user namespace works. The user namespaces of pods need id-mapped mounts on top, see below.
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": CAPABILITIES,
            // The guest's cgroups; how those of the host are mounted does not matter to containers.
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
                // The last of these speaks of SCMP_ACT_NOTIFY alone.
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                ],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {
            // The one name that there is for this; others than runc answer by it as well.
            "org.opencontainers.runc.checkpoint.enabled": "false",
        },
        // They name a file with programs that run as root on the host, and sizes of the machine.
        "potentiallyUnsafeConfigAnnotations": ["io.katacontainers.config_path", "io.katacontainers.config."],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    /// Once more through the bytes, as containerd reads it.
    fn announced() -> Value {
        let bytes = runtime_info().write_to_bytes().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(info.name, "io.containerd.kata.v2");
        let features = info.features.unwrap();
        // typeurl: the specification's import path, its major version, the package, the type.
        assert_eq!(features.type_url, "types.containerd.io/opencontainers/runtime-spec/1/features/Features");
        serde_json::from_slice(&features.value).unwrap()
    }

    #[test]
    fn recursive_read_only_mounts_are_announced_and_id_mapped_ones_are_not() {
        let features = announced();
        let options: Vec<_> = features["mountOptions"].as_array().unwrap().iter().collect();
        for option in ["ro", "rro", "rnosuid", "rbind", "rslave"] {
            assert!(options.contains(&&json!(option)), "{option}");
        }
        assert!(!options.iter().any(|option| option.as_str().unwrap().ends_with("idmap")));
        // containerd takes both together for the user namespaces of pods.
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], json!(false));
    }

    #[test]
    fn what_the_guest_has_not_got_is_said() {
        let features = announced();
        for module in ["apparmor", "selinux", "intelRdt"] {
            assert_eq!(features["linux"][module]["enabled"], json!(false), "{module}");
        }
        assert_eq!(features["linux"]["cgroup"]["v2"], json!(true));
        let actions = features["linux"]["seccomp"]["actions"].to_string();
        assert!(actions.contains("SCMP_ACT_ERRNO") && !actions.contains("NOTIFY"), "{actions}");
    }

    #[test]
    fn names_are_sorted_and_once() {
        assert!(MOUNT_OPTIONS.is_sorted_by(|a, b| a < b));
        let mut capabilities = CAPABILITIES.to_vec();
        capabilities.sort_unstable();
        capabilities.dedup();
        assert_eq!(capabilities.len(), CAPABILITIES.len());
    }
}
