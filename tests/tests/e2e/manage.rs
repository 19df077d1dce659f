//! `kata-runtime` about pods that run: what it shows is what containerd and the host say.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use katana_tests::cri::Pod;
use katana_tests::process::Process;
use katana_tests::turn::{Turn, shared};
use katana_tests::{BUSYBOX, Command, Output, Run, environment};
use serde_json::{Value, json};

use crate::tool::program;

fn is_ours() -> Option<Turn> {
    let turn = shared();
    environment::is_vm_or_say("this is Katana's own tool").then_some(turn)
}

fn runtime(arguments: &[&str]) -> Command {
    program("kata-runtime", arguments)
}

fn listed(id: &str) -> Value {
    let text = runtime(&["list", "--json"]).output().ok().text();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    all.into_iter().find(|pod| pod["id"] == id).unwrap_or_else(|| panic!("{id} is not listed\n{text}"))
}

/// The directory in which a pod's shim has its socket.
fn state_directory(id: &str) -> PathBuf {
    let all = std::fs::read_dir("/run/kata-containers/sandboxes").expect("pods").flatten();
    let mut paths = all.map(|entry| entry.path());
    paths.find(|path| path.to_string_lossy().contains(&id[..id.len().min(40)])).expect("the pod's directory")
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[test]
fn list_shows_a_container_of_ctr() {
    let Some(_turn) = is_ours() else { return };
    let container = Run::new(BUSYBOX).command(&["sleep", "1000"]).start();
    let id = container.id();
    let pod = listed(id);
    assert_eq!(pod["namespace"], environment::namespace());
    let (shim, vmm) = (Process::shim_of(id), Process::vmm_of(id));
    assert_eq!(
        (pod["shim_pid"].as_i64(), pod["vmm_pid"].as_i64()),
        (Some(shim.pid.into()), Some(vmm.pid.into()))
    );
    let containers = pod["containers"].as_array().expect("containers");
    assert_eq!(containers.len(), 1, "{pod}");
    let expected = json!({"id": id, "name": null, "image": null, "sandbox": false, "status": "running",
        "pid": container.pid(), "exit_status": null});
    assert_eq!(containers[0], expected);
    // Memory is the host's own count, in which the part of what others have as well changes while these come and go.
    let rollup = |pid| std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let memory = |name: &str| pod["memory_kib"][name].as_u64().unwrap_or(0);
    let near = |one: u64, other: u64| one.abs_diff(other) * 4 <= other;
    let whole = field(&rollup(vmm.pid), "Pss:");
    assert!(near(memory("vmm") + memory("guest"), whole), "{pod} {whole}");
    assert!(near(memory("shim"), field(&rollup(shim.pid), "Pss:")), "{pod}");
    assert!(memory("guest") > memory("vmm"), "{pod}");

    let table = runtime(&["ps", "--no-trunc"]).output().ok().text();
    let row: Vec<&str> =
        table.lines().find(|line| line.starts_with(id)).expect("a row").split_whitespace().collect();
    assert_eq!(row[2..5], ["-", "1/1", "-"], "{table}");
    let socket = state_directory(id).join("shim-monitor.sock");
    let mode = std::fs::metadata(&socket).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    container.task("kill", &["-s", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    assert_eq!(listed(id)["containers"][0]["exit_status"], 137);
    container.delete_task(137);
    assert!(!socket.exists());
    runtime(&["stats", id]).output().expect_code(1).expect_error_line(&["no pod has an id that begins with"]);
}

#[test]
fn list_shows_a_pod_of_kubernetes() {
    let Some(_turn) = is_ours() else { return };
    let pod = Pod::run("kata");
    let container = pod.sh("sleep 1000");
    let seen = listed(pod.id());
    let metadata = &pod.config().metadata;
    assert_eq!(
        (&seen["pod_namespace"], &seen["pod_name"]),
        (&json!(metadata.namespace), &json!(metadata.name))
    );
    let containers = seen["containers"].as_array().expect("containers");
    let of =
        |id: &str| containers.iter().find(|one| one["id"] == id).unwrap_or_else(|| panic!("{seen}")).clone();
    assert_eq!(of(pod.id())["sandbox"], true);
    let one = of(container.id());
    assert!(one["image"].as_str().is_some_and(|image| image.contains("busybox")), "{one}");
    assert_eq!((&one["status"], one["pid"].as_i64()), (&json!("running"), Some(container.pid().into())));
}

#[test]
fn stats_are_those_of_the_guests_cgroups() {
    let Some(_turn) = is_ours() else { return };
    let script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2>/dev/null; while :; do :; done";
    let container = Run::new(BUSYBOX).options("--memory-limit 209715200").sh(script).start();
    let id = container.id();
    let look = || -> Value {
        let text = runtime(&["stats", id, "--json"]).output().ok().text();
        serde_json::from_str::<Vec<Value>>(&text).unwrap_or_else(|e| panic!("{e}: {text}"))[0].clone()
    };
    let mut seen = look();
    // The file is being written still.
    while seen["memory"].as_u64().unwrap_or(0) < 40 << 20 {
        seen = look();
    }
    assert_eq!((&seen["id"], &seen["pod"]), (&json!(id), &json!(id)));
    assert_eq!(seen["memory_limit"], 209_715_200);
    assert!(seen["memory"].as_u64() < Some(60 << 20), "{seen}");
    assert!(seen["cpu_percent"].as_f64().is_some_and(|percent| percent > 10.0), "{seen}");
    let table = runtime(&["stats"]).output().ok().text();
    assert!(table.lines().any(|line| line.contains("200.0 MiB")), "{table}");
}

#[test]
fn logs_and_events_follow_a_pod_to_its_end() {
    let Some(_turn) = is_ours() else { return };
    let container = Run::new(BUSYBOX).command(&["sleep", "1000"]).start();
    let id = container.id();
    let logs = runtime(&["logs", id]).output().ok().text();
    assert!(logs.contains(&format!("sandbox={id}")) && logs.contains("a VM with"), "{logs}");
    let events = runtime(&["events", "-f", "--json", id]).spawn();
    let following = runtime(&["logs", "--follow", id]).spawn();
    events.wait_for("/tasks/start");
    following.wait_for("a VM with");
    container.exec(&["true"]).ok();
    container.task("kill", &["-s", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
    let text = events.finish().ok().text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let of = |topic: &str| lines.iter().filter(|line| line["topic"] == topic).collect::<Vec<_>>();
    let [exec, own] = of("/tasks/exit")[..] else { panic!("{text}") };
    assert!(exec["exec"].is_string() && exec["exit_status"] == 0, "{text}");
    assert!(own["exec"].is_null() && own["exit_status"] == 137 && own["container"] == id, "{text}");
    following.finish().ok();
}

fn expect_silence(output: Output) {
    output.expect_code(1).expect_error_line(&["does not answer within"]);
}

/// Nobody waits long for it, and others are listed.
#[test]
fn a_shim_that_does_not_answer_is_named() {
    let Some(_turn) = is_ours() else { return };
    let [silent, other] = [(); 2].map(|()| Run::new(BUSYBOX).command(&["sleep", "1000"]).start());
    let shim = Process::shim_of(silent.id()).pid;
    let signal = |signal: &str| Command::new(&["kill", signal, &shim.to_string()]).output().ok();
    signal("-STOP");
    let list = runtime(&["list", "--no-trunc"]).output();
    expect_silence(runtime(&["logs", silent.id()]).output());
    expect_silence(runtime(&["stats", silent.id()]).output());
    signal("-CONT");
    let list = list.ok();
    let text = list.text();
    let row = |id: &str| {
        text.lines().find(|line| line.starts_with(id)).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    assert!(row(silent.id()).contains(" ? "), "{text}");
    assert!(row(other.id()).contains(" 1/1 "), "{text}");
    assert!(list.errors().contains("does not answer within"), "{list}");
    assert!(Path::new(&format!("/proc/{shim}")).exists());
}
