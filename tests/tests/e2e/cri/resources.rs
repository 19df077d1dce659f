//! Limits, statistics, cgroups.

use std::fs;
use std::path::Path;

use katana_tests::container::new_id;
use katana_tests::cri::{Pod, shared_pod};
use katana_tests::host::eventually;
use serde_json::json;

use super::cases;

cases! {
    /// Memory, CPU, shares, OOM score
    limits_are_set,
    /// Of a running container
    limits_are_changed,
    /// CPU, memory, processes, writable layer
    2: statistics_are_not_zero,
    /// reason: OOMKilled
    too_much_memory_is_reported,
    /// The pod's cgroup is kubelet's: it makes it before the pod and removes it after it.
    2: kubelets_cgroups_are_used_and_left_empty,
}

fn limits_are_set(handler: &str) {
    let resources = json!({
        "memory_limit_in_bytes": 64 << 20, "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 512,
        "oom_score_adj": 500,
    });
    let container = shared_pod(handler).start(json!({"linux": {"resources": resources}}));
    let read = |file: &str| container.sh(&format!("cat /sys/fs/cgroup/{file}")).ok().to_owned();
    assert_eq!(read("memory.max"), (64 << 20).to_string());
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cpu.weight"), "20");
    assert_eq!(container.sh("cat /proc/1/oom_score_adj").ok(), "500");
}

fn limits_are_changed(handler: &str) {
    let resources = json!({"memory_limit_in_bytes": 64 << 20, "cpu_period": 100_000, "cpu_quota": 50_000});
    let container = shared_pod(handler).start(json!({"linux": {"resources": resources}}));
    container
        .update(&json!({"memory_limit_in_bytes": 96 << 20, "cpu_quota": 70_000, "cpu_shares": 2048}))
        .unwrap();
    let read = |file: &str| container.sh(&format!("cat /sys/fs/cgroup/{file}")).ok().to_owned();
    assert_eq!(read("memory.max"), (96 << 20).to_string());
    assert_eq!(read("cpu.max"), "70000 100000");
    assert_eq!(read("cpu.weight"), "79");
}

fn statistics_are_not_zero(handler: &str) {
    let pod = Pod::run(handler);
    let work =
        "dd if=/dev/zero of=/dev/shm/file bs=1M count=8 2>/dev/null; head -c 3000000 /dev/zero > /file;
        i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ready; exec sleep 10000";
    let container = pod.sh(work);
    container.wait_for_output("ready");
    let stats = container.stats();
    let (cpu, memory) = (&stats.cpu.usage_core_nano_seconds, &stats.memory);
    assert!(cpu.value > 1_000_000 && cpu.value < 1_000_000_000_000, "{stats}");
    assert!((100_000..1 << 30).contains(&memory.working_set_bytes.value), "{stats}");
    assert!((100_000..1 << 30).contains(&memory.usage_bytes.value), "{stats}");
    // containerd measures writable layers every ten seconds.
    let written = || container.stats().writable_layer.used_bytes.value >= 3_000_000;
    assert!(eventually(written), "{}", container.stats());

    let stats = pod.stats();
    let linux = &stats.linux;
    assert!(linux.cpu.usage_core_nano_seconds.value > 1_000_000, "{stats}");
    assert!(linux.memory.working_set_bytes.value > 100_000, "{stats}");
    assert!((1..100).contains(&linux.process.process_count.value), "{stats}");
    assert_eq!(linux.containers.len(), 1, "{stats}");
}

fn too_much_memory_is_reported(handler: &str) {
    let container = shared_pod(handler).start(json!({
        "command": ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"],
        "linux": {"resources": {"memory_limit_in_bytes": 32 << 20, "memory_swap_limit_in_bytes": 32 << 20}},
    }));
    let status = container.ended();
    assert_eq!((status.reason.as_str(), status.exit_code), ("OOMKilled", 137), "{status:?}");
}

fn kubelets_cgroups_are_used_and_left_empty(handler: &str) {
    let parent = format!("/kubepods-test/burstable/pod{}", new_id());
    let directory = format!("/sys/fs/cgroup{parent}");
    let directory = Path::new(&directory);
    fs::create_dir_all(directory).unwrap();
    for above in ["/sys/fs/cgroup/kubepods-test", "/sys/fs/cgroup/kubepods-test/burstable"] {
        fs::write(Path::new(above).join("cgroup.subtree_control"), "+memory +cpu +pids").unwrap();
    }
    fs::write(directory.join("memory.max"), (512 << 20).to_string()).unwrap();
    let pod = Pod::run_with(handler, json!({"linux": {"cgroup_parent": parent}}));
    let container = pod.sh("exec sleep 10000");
    container.exec(&["true"]).ok();
    let populated = fs::read_to_string(directory.join("cgroup.events")).unwrap();
    assert!(populated.contains("populated 1"), "the pod is not in its cgroup");
    let stats = pod.stats();
    assert!(stats.linux.memory.usage_bytes.value > 100_000, "{stats}");
    pod.stop().unwrap();
    pod.remove().unwrap();
    // Whoever made a cgroup removes it.
    assert!(eventually(|| fs::remove_dir(directory).is_ok()), "kubelet could not remove the pod's cgroup");
    for above in ["/sys/fs/cgroup/kubepods-test/burstable", "/sys/fs/cgroup/kubepods-test"] {
        fs::remove_dir(above).unwrap();
    }
}
