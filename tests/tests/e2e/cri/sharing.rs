//! What the containers of a pod share, and what they do not.

use katana_tests::cri::{Container, Pod, shared_pod};
use katana_tests::host::eventually;
use serde_json::{Value, json};

use super::cases;

cases! {
    /// The safe ones
    2: sysctls_are_set_for_the_pod,
    /// shareProcessNamespace: the pod's first process reaps for all.
    2: a_pid_namespace_is_shared_by_the_pod,
    /// An ephemeral container looks at another container's processes.
    a_pid_namespace_of_another_container_is_joined,
    /// The request names which, also after one was restarted.
    2: the_pid_namespace_of_one_of_several_containers_is_joined,
    /// Network, ipc and uts are the pod's; mounts, pids and cgroups the container's.
    2: namespaces_are_the_pods_or_the_containers,
    /// POSIX shared memory
    2: shared_memory_is_the_pods,
    /// As the pod says
    2: hostname_and_dns_are_the_pods,
    /// Working directory, environment, arguments
    a_container_gets_what_it_asks_for,
}

fn sysctls_are_set_for_the_pod(handler: &str) {
    let sysctls = json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"});
    let pod = Pod::run_with(handler, json!({"linux": {"sysctls": sysctls}}));
    let container = pod.start(json!({}));
    assert_eq!(container.sh("cat /proc/sys/kernel/shm_rmid_forced").ok(), "1");
    assert_eq!(container.sh("cat /proc/sys/net/ipv4/ip_local_port_range").ok(), "2000\t3000");
}

fn pid(mode: &str) -> Value {
    json!({"linux": {"security_context": {"namespace_options": {"pid": mode}}}})
}

fn a_pid_namespace_is_shared_by_the_pod(handler: &str) {
    let pod = Pod::run_with(handler, pid("POD"));
    let one = pod.start(pid("POD"));
    let mut script = pid("POD");
    // The sleep's parent is gone at once: it is for the pod's first process to reap it.
    script["command"] = json!(["sh", "-c", "(sleep 1.5 &); exec sleep 10005"]);
    let two = pod.start(script);
    // It may not have become that yet.
    let seen = || one.exec(&["ps", "-o", "pid,args"]).ok().contains("sleep 10005");
    assert!(eventually(seen), "{:?}", one.exec(&["ps", "-o", "pid,args"]));
    assert_ne!(one.sh("readlink /proc/self/exe; pidof sleep | grep -w 1").code, 0, "pid 1 is the pod's own");
    let gone = || {
        !one.exec(&["ps", "-o", "stat,args"])
            .ok()
            .lines()
            .any(|line| line.contains("sleep 1.5") || line.starts_with('Z') || line.contains("[sleep]"))
    };
    assert!(eventually(gone), "{:?}", one.exec(&["ps", "-o", "pid,stat,args"]));
    // One container's end is not the others'.
    two.stop(0).unwrap();
    assert_eq!(two.status().exit_code, 137);
    assert!(!one.exec(&["ps"]).ok().contains("sleep 10005"), "all of a container ends with it");
    let third = pod.start(pid("POD"));
    third.exec(&["true"]).ok();
}

fn a_pid_namespace_of_another_container_is_joined(handler: &str) {
    let pod = Pod::run(handler);
    let target = pod.sh("exec sleep 10006");
    let debugger = debugger_of(&pod, &target);
    assert_eq!(namespace_of(&debugger, "pid"), namespace_of(&target, "pid"));
    let first = debugger.sh("tr '\\0' ' ' < /proc/1/cmdline");
    assert_eq!(first.ok(), "sleep 10006 ");
    debugger.stop(0).unwrap();
    target.exec(&["true"]).ok();
}

fn debugger_of(pod: &Pod, target: &Container) -> Container {
    let namespace = json!({"pid": "TARGET", "target_id": target.id()});
    pod.start(json!({"linux": {"security_context": {"namespace_options": namespace}}}))
}

fn the_pid_namespace_of_one_of_several_containers_is_joined(handler: &str) {
    let pod = Pod::run(handler);
    let (one, two) = (pod.sh("exec sleep 10007"), pod.sh("exec sleep 10008"));
    let debugger = debugger_of(&pod, &two);
    expect_to_see(&debugger, &two, "sleep 10008");
    one.stop(0).unwrap();
    one.remove().unwrap();
    let again = pod.sh("exec sleep 10009");
    expect_to_see(&debugger_of(&pod, &again), &again, "sleep 10009");
    expect_to_see(&debugger_of(&pod, &two), &two, "sleep 10008");
    // It has no namespace of its own, and is in one all the same.
    expect_to_see(&debugger_of(&pod, &debugger), &two, "sleep 10008");
}

/// The processes of the other container, and those of no third one.
#[track_caller]
fn expect_to_see(debugger: &Container, target: &Container, first: &str) {
    assert_eq!(namespace_of(debugger, "pid"), namespace_of(target, "pid"));
    let processes = debugger.exec(&["ps", "-o", "pid,args"]);
    let others = processes.ok().lines().filter(|line| line.contains("sleep 1000") && !line.contains(first));
    let others: Vec<_> = others.filter(|line| !line.ends_with("sleep 10000")).collect();
    assert!(processes.ok().contains(&format!("1 {first}")) && others.is_empty(), "{processes:?}");
}

#[track_caller]
fn namespace_of(container: &Container, kind: &str) -> String {
    container.exec(&["readlink", &format!("/proc/self/ns/{kind}")]).ok().to_owned()
}

fn namespaces_are_the_pods_or_the_containers(handler: &str) {
    let pod = shared_pod(handler);
    let (one, two) = (pod.start(json!({})), pod.start(json!({})));
    for (kind, shared) in
        [("net", true), ("ipc", true), ("uts", true), ("mnt", false), ("pid", false), ("cgroup", false)]
    {
        assert_eq!(namespace_of(&one, kind) == namespace_of(&two, kind), shared, "{kind}");
    }
}

fn shared_memory_is_the_pods(handler: &str) {
    let pod = shared_pod(handler);
    let (one, two) = (pod.start(json!({})), pod.start(json!({})));
    one.sh("echo shared > /dev/shm/message").ok();
    assert_eq!(two.sh("cat /dev/shm/message").ok(), "shared");
    assert_eq!(two.sh("grep -c ' /dev/shm ' /proc/mounts").ok(), "1");
    // Kubernetes gives every pod 64 MiB.
    let size = two.sh("df -k /dev/shm | tail -n 1 | awk '{print $2}'");
    assert_eq!(size.ok(), "65536");
}

fn hostname_and_dns_are_the_pods(handler: &str) {
    let dns = json!({"servers": ["10.0.0.10", "fd00::10"], "searches": ["a.example", "b.example"], "options": ["ndots:5"]});
    let pod = Pod::run_with(handler, json!({"hostname": "web-0", "dns_config": dns}));
    let (one, two) = (pod.start(json!({})), pod.start(json!({})));
    for container in [&one, &two] {
        assert_eq!(container.exec(&["hostname"]).ok(), "web-0");
        assert_eq!(container.exec(&["cat", "/etc/hostname"]).ok(), "web-0");
        let resolv = container.exec(&["cat", "/etc/resolv.conf"]);
        let expected =
            "search a.example b.example\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5";
        assert_eq!(resolv.ok(), expected);
    }
    assert_eq!(one.sh("echo $HOSTNAME").ok(), "web-0");
}

fn a_container_gets_what_it_asks_for(handler: &str) {
    let container = shared_pod(handler).start(json!({
        "command": ["sh", "-c"], "args": ["pwd; echo $A; echo \"$B\"; umask; ulimit -c >/dev/null; cat"],
        "working_dir": "/made/for/it", "envs": [{"key": "A", "value": "1"}, {"key": "B", "value": "two words"}],
    }));
    assert_eq!(container.ended().exit_code, 0);
    assert_eq!(container.output(), "/made/for/it\n1\ntwo words\n0022\n");
}
