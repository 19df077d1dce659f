use super::*;
use serde_json::json;

fn spec(value: Value) -> Spec {
    serde_json::from_value(value).unwrap()
}

fn guest(spec: &Spec, pod: &Pod) -> Value {
    let sources =
        spec.sources(Path::new("/bundle"), pod).into_iter().enumerate().map(
            |(number, source)| match source {
                Source::Host(_) => Source::Volume(number as u32),
                other => other,
            },
        );
    let sources: Vec<_> = sources.collect();
    serde_json::from_slice(&spec.for_guest("c1", false, &sources, pod, &OnDisks::default()).unwrap()).unwrap()
}

#[test]
fn what_the_shim_does_not_know_passes_through() {
    let before = json!({
        "ociVersion": "1.2.0", "root": {"path": "rootfs", "readonly": true}, "futureMember": {"a": [1]},
        "process": {"args": ["sh"], "cwd": "/", "terminal": false, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}], "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                  "maskedPaths": ["/proc/kcore"], "cgroupsPath": "/c1", "future": 1}
    });
    let mut expected = before.clone();
    expected["root"]["path"] = json!("/run/kata-containers/shared/c1/rootfs");
    expected["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
    assert_eq!(guest(&spec(before), &Pod::default()), expected);
}

#[test]
fn what_belongs_to_the_host_is_removed() {
    let after = guest(
        &spec(json!({
            "root": {"path": "/x"}, "hostname": "pod",
            "process": {"apparmorProfile": "cri", "selinuxLabel": "l"},
            "hooks": {"prestart": [{"path": "/p"}], "poststop": [{"path": "/q"}], "startContainer": [{"path": "/s"}]},
            "linux": {
                "mountLabel": "l", "intelRdt": {"closID": "x"}, "cgroupsPath": "../../../evil",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "uts", "path": "/proc/9/ns/uts"},
                               {"type": "user", "path": "/proc/9/ns/user"}, {"type": "mount"}],
                "devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438}],
                "resources": {"cpu": {"quota": 5, "cpus": "7"}, "blockIO": {"weight": 10}, "memory": {"limit": 1}}
            }
        })),
        &Pod::default(),
    );
    assert_eq!(after["process"], json!({"terminal": false}));
    assert_eq!(after["hooks"], json!({"startContainer": [{"path": "/s"}]}));
    assert_eq!(after.get("hostname"), None);
    assert_eq!(
        after["linux"],
        json!({
            "cgroupsPath": "/c1", "namespaces": [{"type": "mount"}, {"type": "cgroup"}],
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438}],
            "resources": {"cpu": {"quota": 5}, "memory": {"limit": 1}}
        })
    );
}

#[test]
fn containers_join_the_namespaces_of_their_sandbox() {
    let spec = spec(json!({"hostname": "h", "linux": {"namespaces": [
        {"type": "pid"}, {"type": "ipc", "path": "/proc/77/ns/ipc"}, {"type": "uts", "path": "/proc/77/ns/uts"}]}}));
    assert_eq!((spec.joined_pid(), spec.owns_pid_namespace()), (None, true));
    let after = guest(&spec, &Pod { sandbox_pid: Some(5), ..Pod::default() });
    assert_eq!(
        after["linux"]["namespaces"],
        json!([{"type": "pid"}, {"type": "ipc", "path": "/proc/5/ns/ipc"}, {"type": "uts", "path": "/proc/5/ns/uts"},
               {"type": "cgroup"}])
    );
    assert_eq!(after["hostname"], json!("h"));
}

#[test]
fn a_debugger_joins_the_processes_of_its_target_only() {
    let spec = spec(json!({"linux": {"namespaces": [
        {"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "ipc", "path": "/proc/77/ns/ipc"}]}}));
    assert_eq!((spec.joined_pid(), spec.owns_pid_namespace()), (Some(77), false));
    let after = guest(&spec, &Pod { sandbox_pid: Some(5), target_pid: Some(8), ..Pod::default() });
    assert_eq!(
        after["linux"]["namespaces"],
        json!([{"type": "pid", "path": "/proc/8/ns/pid"}, {"type": "ipc", "path": "/proc/5/ns/ipc"},
               {"type": "cgroup"}])
    );
}

#[test]
fn a_pod_is_of_its_namespace() {
    let owner = |annotations| spec(json!({"annotations": annotations})).owner("k8s.io");
    let sandbox = json!({
        "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-namespace": "shop",
    });
    assert_eq!(owner(sandbox), "k8s.io/shop");
    let crio =
        json!({"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.Namespace": "shop"});
    assert_eq!(owner(crio), "k8s.io/shop");
    // Who is in no pod is containerd's client, which may say what it likes.
    assert_eq!(owner(json!({"io.kubernetes.cri.sandbox-namespace": "shop"})), "k8s.io");
    assert_eq!(owner(json!({})), "k8s.io");
}

#[test]
fn a_sandbox_container_keeps_what_the_pods_pause_needs() {
    let spec = spec(json!({
        "ociVersion": "1.2.0", "root": {"path": "rootfs"}, "hostname": "pod",
        "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
        "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/nowhere/shm"}],
        "process": {"args": ["/pause"], "cwd": "/", "user": {"uid": 5}, "capabilities": {"bounding": ["CAP_KILL"]}},
        "linux": {"sysctl": {"kernel.shm_rmid_forced": "1"}, "namespaces": [{"type": "pid"}, {"type": "mount"}],
                  "seccomp": {}, "maskedPaths": ["/x"], "readonlyPaths": ["/y"]}}));
    assert!(spec.is_sandbox());
    let guest: Value = serde_json::from_slice(
        &spec.for_pause().for_guest("p", false, &[], &Pod::default(), &OnDisks::default()).unwrap(),
    )
    .unwrap();
    assert_eq!(guest["mounts"], json!([]));
    assert_eq!(
        guest["process"],
        json!({"args": ["/pause"], "cwd": "/", "user": {"uid": 5}, "noNewPrivileges": true, "terminal": false})
    );
    assert_eq!(
        guest["linux"],
        json!({"sysctl": {"kernel.shm_rmid_forced": "1"}, "cgroupsPath": "/p",
               "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}]})
    );
}

#[test]
fn only_an_engines_own_shared_memory_becomes_the_guests() {
    let spec = spec(json!({"mounts": [
        {"destination": "/dev/shm", "type": "bind", "source": "/pods/1/shm"},
        {"destination": "/volume", "type": "bind", "source": "/pods/1/shm"}]}));
    let pod = Pod { shared_memory: Some("/pods/1/shm".into()), ..Pod::default() };
    let sources = spec.sources(Path::new("/bundle"), &pod);
    assert_eq!(sources, [Source::SharedMemory, Source::Host("/pods/1/shm".into())]);
    assert_eq!(guest(&spec, &pod)["mounts"][0]["source"], json!("/run/kata-containers/shm"));
    // There is no such tmpfs.
    assert_eq!(spec.shared_memory(Path::new("/bundle")), None);
}

#[test]
fn binds_come_from_the_host_but_for_kernel_file_systems() {
    let spec = spec(json!({"mounts": [
        {"destination": "/a", "type": "bind", "source": "/data", "options": ["rbind", "ro"]},
        {"destination": "/b", "source": "relative", "options": ["bind"]},
        {"destination": "/dev/x", "type": "bind", "source": "/dev/null"},
        {"destination": "/d", "type": "bind", "source": "/development"},
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": null}]}));
    let sources = spec.sources(Path::new("/bundle"), &Pod::default());
    let host = |path: &str| Source::Host(path.into());
    assert_eq!(
        sources,
        [host("/data"), host("/bundle/relative"), Source::Guest, host("/development"), Source::Guest]
    );
    assert_eq!(
        spec.mounts.iter().map(Mount::bind).collect::<Vec<_>>(),
        [Some(true), Some(false), Some(false), Some(false), None]
    );
    let after = guest(&spec, &Pod::default());
    assert_eq!(after["mounts"][1]["source"], json!("/run/kata-containers/shared/.volumes/1"));
    assert_eq!(after["mounts"][2]["source"], json!("/dev/null"));
    assert_eq!(after["mounts"][4]["source"], json!("tmpfs"));
}

#[test]
fn a_bundle_that_is_none_is_named() {
    let error = Spec::load(Path::new("/nowhere")).unwrap_err().to_string();
    assert_eq!(error, "open /nowhere/config.json: No such file or directory");
    for hostile in ["[]", "{\"mounts\": 3}", "{\"linux\": {\"devices\": [{}]}}", "{\"root\": {\"path\": 1}}"]
    {
        assert!(serde_json::from_str::<Spec>(hostile).is_err(), "{hostile}");
    }
}

/// A specification of any shape, up to the part that is sent to the guest.
#[test]
fn fuzz_spec() {
    katana_fuzz::fuzz("spec", |input| {
        let Ok(spec) = serde_json::from_slice::<Spec>(input.rest()) else { return };
        let pod = Pod { sandbox_pid: Some(7), ..Pod::default() };
        let sources = spec.sources(Path::new("/nowhere"), &pod);
        let _ = (spec.owns_pid_namespace(), spec.joined_pid(), spec.is_sandbox());
        let _ = (
            crate::machine::size::Limits::of_container(&spec),
            crate::machine::size::Limits::announced(&spec),
        );
        let _ = spec.shared_memory(Path::new("/nowhere"));
        for spec in [spec.for_pause(), spec] {
            let Ok(guest) = spec.for_guest("c1", true, &sources, &pod, &OnDisks::default()) else { return };
            let guest: Spec =
                serde_json::from_slice(&guest).expect("what is sent to the guest is a specification");
            // No name of the host's hierarchy, and no program of the host, gets there.
            assert_eq!(guest.linux.unwrap().cgroups_path.as_deref(), Some("/c1"));
        }
    });
}
