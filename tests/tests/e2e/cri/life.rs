//! The life of pods and of their containers.

use std::path::Path;
use std::time::{Duration, Instant};

use katana_tests::cri::messages::container_status::State;
use katana_tests::cri::messages::pod_sandbox_status::State as PodState;
use katana_tests::cri::{Pod, shared_pod};
use katana_tests::host::eventually;
use katana_tests::process::Process;
use katana_tests::{Scratch, environment, turn};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;

use super::cases;

cases! {
    /// Run, status, stop, remove; stop and remove as often as one likes.
    2: a_pod_is_run_stopped_and_removed,
    /// Each with a root and processes of its own; one goes, the other stays.
    a_pod_has_several_containers,
    /// Its end does not end the pod, and the next one finds the same pod.
    2: the_only_container_is_restarted,
    /// It ends before the others start, and leaves them what it wrote to a volume.
    an_init_container_runs_first,
    /// SIGTERM, and SIGKILL after the grace period.
    stop_asks_before_it_kills,
    /// Who gives up waiting for the end has asked for it, and no more.
    2: a_stop_that_is_given_up_kills_nothing,
    /// Also by a program that handles it and has not got there yet
    2: a_stop_right_after_the_start_is_heard,
    /// What `crictl inspectp` shows
    2: the_details_of_a_pod_are_reported,
    /// What `kubectl describe` shows.
    errors_are_readable,
}

fn a_pod_is_run_stopped_and_removed(handler: &str) {
    let pod = Pod::run_with(handler, json!({"labels": {"app": "test"}, "annotations": {"note": "a b"}}));
    let status = pod.status();
    assert_eq!(status.state.enum_value_or_default(), PodState::SANDBOX_READY);
    assert_eq!(status.runtime_handler, handler);
    assert_eq!(status.metadata.name, pod.config().metadata.name);
    assert_eq!((status.labels["app"].as_str(), status.annotations["note"].as_str()), ("test", "a b"));

    let container = pod.sh("echo hello; exec sleep 10000");
    assert_eq!(container.state(), State::CONTAINER_RUNNING);
    container.wait_for_output("hello");
    assert_eq!(container.exec(&["echo", "hi"]).ok(), "hi");

    pod.stop().unwrap();
    pod.stop().unwrap();
    assert_eq!(pod.status().state.enum_value_or_default(), PodState::SANDBOX_NOTREADY);
    assert_eq!(container.status().exit_code, 137);
    pod.remove().unwrap();
    pod.remove().unwrap();
    assert_eq!(pod.try_status().map_err(|e| e.code), Err(5), "not found");
}

fn a_pod_has_several_containers(handler: &str) {
    let pod = shared_pod(handler);
    let one = pod.sh("echo one > /mine; exec sleep 10001");
    let two = pod.sh("echo two > /mine; exec sleep 10002");
    assert_eq!((one.sh("cat /mine").ok(), two.sh("cat /mine").ok()), ("one", "two"));
    let processes = one.exec(&["ps"]);
    assert!(processes.ok().contains("sleep 10001") && !processes.ok().contains("10002"), "{processes:?}");
    one.stop(0).unwrap();
    one.remove().unwrap();
    assert_eq!(two.sh("cat /mine").ok(), "two");
    two.remove().unwrap();
}

fn the_only_container_is_restarted(handler: &str) {
    let pod = Pod::run(handler);
    let kernel = "cat /proc/sys/kernel/random/boot_id";
    let script = format!("{kernel}; hostname; readlink /proc/self/ns/ipc; exit 3");
    let start = |attempt: u32| {
        pod.start(json!({"metadata": {"name": "only", "attempt": attempt}, "command": ["sh", "-c", script]}))
    };
    let first = start(0);
    let status = first.ended();
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at, "{status:?}");
    assert_eq!(pod.status().state.enum_value_or_default(), PodState::SANDBOX_READY);
    let second = start(1);
    assert_eq!(second.ended().exit_code, 3);
    assert_eq!(first.output(), second.output());
    first.remove().unwrap();
    assert_eq!(pod.status().state.enum_value_or_default(), PodState::SANDBOX_READY);
}

fn an_init_container_runs_first(handler: &str) {
    let volume = Scratch::new();
    let pod = shared_pod(handler);
    let mounts = json!([{"host_path": volume.path(), "container_path": "/work"}]);
    let run = |script: &str| pod.start(json!({"command": ["sh", "-c", script], "mounts": mounts}));
    let status = run("echo prepared > /work/file").ended();
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    let main = run("cat /work/file");
    assert_eq!(main.ended().exit_code, 0);
    assert_eq!(main.output(), "prepared\n");
}

fn stop_asks_before_it_kills(handler: &str) {
    let pod = shared_pod(handler);
    let polite = pod.sh("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done");
    polite.wait_for_output("ready");
    polite.stop(60).unwrap();
    assert_eq!(polite.status().exit_code, 7);
    assert!(polite.output().contains("bye"));
    polite.stop(60).unwrap();

    let deaf = pod.sh("trap '' TERM; echo ready; while :; do sleep 0.1; done");
    deaf.wait_for_output("ready");
    let start = Instant::now();
    deaf.stop(2).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(2), "it was killed before its time");
    assert_eq!(deaf.status().exit_code, 137);
}

fn a_stop_that_is_given_up_kills_nothing(handler: &str) {
    const GRACE: i64 = 3;
    let pod = shared_pod(handler);
    let container = pod.sh("trap 'echo ignored' TERM; echo ready; while :; do sleep 0.1; done");
    container.wait_for_output("ready");
    container.stop_and_leave(GRACE, Duration::from_secs(1)).unwrap_err();
    container.wait_for_output("ignored");
    // Nobody is to come back to it when the grace period is over.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(container.state(), State::CONTAINER_RUNNING);
    container.stop(1).unwrap();
    assert_eq!((container.state(), container.status().exit_code), (State::CONTAINER_EXITED, 137));
    assert_eq!(container.output(), "ready\nignored\n", "it is asked once");
}

fn a_stop_right_after_the_start_is_heard(handler: &str) {
    let pod = Pod::run(handler);
    // Of a process that is the first of its namespace, and of one that is not.
    for mode in ["CONTAINER", "POD"] {
        let script = "trap 'echo bye; exit 7' TERM; sleep 10000 & wait";
        let config = json!({
            "command": ["sh", "-c", script],
            "linux": {"security_context": {"namespace_options": {"pid": mode}}},
        });
        let container = pod.start(config);
        container.stop(60).unwrap();
        assert_eq!((container.status().exit_code, container.output().as_str()), (7, "bye\n"), "{mode}");
    }
}

fn the_details_of_a_pod_are_reported(handler: &str) {
    let info = shared_pod(handler).info();
    let pid = info["pid"].as_i64().unwrap_or_default();
    assert!(Process::all().iter().any(|process| i64::from(process.pid) == pid), "{info:#}");
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
    let path = |kind: &str| namespaces.iter().find(|one| one["type"] == kind).map(|one| one["path"].clone());
    let network = path("network").unwrap_or_default();
    assert!(network.as_str().is_some_and(|path| Path::new(path).exists()), "{info:#}");
    assert!(path("pid").is_some() && path("ipc").is_some(), "{info:#}");
    let cgroup = info["runtimeSpec"]["linux"]["cgroupsPath"].as_str().unwrap_or_default();
    assert!(cgroup.starts_with("/kubepods/"), "{info:#}");
    let runtime = if handler == "runc" { "io.containerd.runc.v2" } else { "io.containerd.kata.v2" };
    assert_eq!(info["runtimeType"], runtime, "{info:#}");
}

fn errors_are_readable(handler: &str) {
    let pod = shared_pod(handler);
    let container = pod.create(json!({"command": ["no-such-program"]})).unwrap();
    let error = container.start().unwrap_err();
    let reason = "exec: \"no-such-program\": executable file not found in $PATH";
    assert!(error.message.contains(reason), "{error}");
    let status = container.status();
    assert_eq!((status.reason.as_str(), status.exit_code), ("StartError", 128), "{status:?}");
    assert!(status.message.contains(reason), "{status:?}");
    assert_eq!(status.message.lines().count(), 1, "{status:?}");
    assert_eq!(pod.status().state.enum_value_or_default(), PodState::SANDBOX_READY);
}

/// What only a virtual machine can do: end as a whole.
#[test]
fn the_end_of_the_vm_is_the_end_of_its_containers() {
    let _turn = turn::shared();
    if !environment::is_vm_or_say("there is no VM") {
        return;
    }
    let pod = Pod::run("kata");
    let (one, two) = (pod.sh("exec sleep 10000"), pod.sh("exec sleep 10000"));
    let vmm = vmm_of(&pod);
    nix::sys::signal::kill(Pid::from_raw(vmm.pid), Signal::SIGKILL).unwrap();
    for container in [&one, &two] {
        assert_ne!(container.ended().exit_code, 0);
    }
    let not_ready = || pod.status().state.enum_value_or_default() == PodState::SANDBOX_NOTREADY;
    assert!(eventually(not_ready));
    pod.stop().unwrap();
    pod.remove().unwrap();
}

fn vmm_of(pod: &Pod) -> Process {
    let vmm = Process::all().into_iter().find(|process| {
        let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
        process.name.starts_with("kata-vmm") && cgroup.contains(pod.id())
    });
    vmm.expect("a VMM in the pod's cgroup")
}

/// By which clients name it, look up what it is in, and may end it.
#[test]
fn each_container_of_a_vm_has_a_pid_on_the_host() {
    let _turn = turn::shared();
    if !environment::is_vm_or_say("they are processes") {
        return;
    }
    let pod = Pod::run("kata");
    let vmm = vmm_of(&pod);
    let threads = vmm.threads().len();
    let (one, two) = (pod.start(json!({})), pod.start(json!({})));
    let (first, second) = (one.pid(), two.pid());
    assert!(first != second && first != vmm.pid && second != vmm.pid, "{first}, {second}, {}", vmm.pid);
    for pid in [first, second] {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.lines().any(|line| line == format!("Tgid:\t{}", vmm.pid)), "{status}");
        let link = |pid, kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_eq!(link(pid, "net"), link(vmm.pid, "net"));
        let cgroup = |pid| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(cgroup(pid), cgroup(vmm.pid));
    }
    one.stop(0).unwrap();
    one.remove().unwrap();
    assert!(eventually(|| !Path::new(&format!("/proc/{first}")).exists()));
    // One that stands for it, and one for its disk.
    assert!(eventually(|| vmm.threads().len() == threads + 2), "{:?}, {threads} before", vmm.threads());
    nix::sys::signal::kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    assert_ne!(two.ended().exit_code, 0);
    assert!(eventually(|| !vmm.lives()));
}
