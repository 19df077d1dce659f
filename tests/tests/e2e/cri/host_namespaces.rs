//! Pods that ask for namespaces of the node, which a virtual machine has not got.

use katana_tests::cri::Pod;
use katana_tests::host::Host;
use katana_tests::{Configuration, Instance, environment, turn};
use serde_json::{Value, json};

use super::configuration::configure;

/// A pod with these options of its namespaces.
fn options(options: Value) -> Value {
    let mut config = json!({"linux": {"security_context": {}}});
    config["linux"]["security_context"]["namespace_options"] = options;
    config
}

#[track_caller]
fn expect_refused(handler: &str, asked: &Value, parts: &[&str]) {
    let Err(error) = Pod::try_run(handler, options(asked.clone())) else { panic!("{asked} is not refused") };
    assert!(parts.iter().all(|part| error.message.contains(part)), "{asked}: {error}");
    assert_eq!(error.message.lines().count(), 1, "{error}");
}

fn refusals(handler: &str) {
    let what_to_do = ["runtimeClassName", "host_namespaces = \"guest\""];
    for (kind, asked) in [("pid", "hostPID"), ("ipc", "hostIPC")] {
        let host = format!("the host's {kind} namespace");
        expect_refused(handler, &json!({kind: "NODE"}), &[&[host.as_str(), asked][..], &what_to_do].concat());
    }
    // containerd 2.1 does not survive this one where the shim is the sandbox; it has not asked the shim by then.
    if handler == "kata" {
        expect_refused(handler, &json!({"network": "NODE"}), &["the host's network", "hostNetwork"]);
    }
    let map = json!([{"host_id": 100_000, "container_id": 0, "length": 65536}]);
    let users = json!({"userns_options": {"mode": "POD", "uids": map, "gids": map}});
    expect_refused(handler, &users, &["user namespace"]);
    // What kubelet says of every pod that has none.
    drop(Pod::run_with(handler, options(json!({"userns_options": {"mode": "NODE"}}))));
}

/// And nothing is left of them.
#[test]
fn the_nodes_namespaces_are_refused() {
    let _turn = turn::alone();
    if environment::is_vm_or_say("runc's containers can be in them") {
        // It leaves the bridge to those that follow.
        drop(Pod::run("kata"));
        let before = Host::before();
        refusals("kata");
        before.expect_unchanged();
    }
}

#[test]
fn the_nodes_namespaces_are_refused_by_a_shim_that_is_the_sandbox() {
    let _turn = turn::shared();
    if environment::is_vm_or_say("runc's shim is no sandbox") {
        let instance = Instance::of_version_2();
        let _here = instance.containerd().enter();
        refusals("kata-shim");
    }
}

/// For agents of a node that ask for more than they need.
#[test]
fn the_machines_namespaces_take_their_place_if_the_configuration_says_so() {
    let _turn = turn::alone();
    if !environment::is_vm_or_say("runc's containers can be in the node's") {
        return;
    }
    configure(&Configuration::installed().set("runtime.host_namespaces", "guest"));
    let pod = Pod::run_with("kata-configured", options(json!({"pid": "NODE", "ipc": "NODE"})));
    let container = pod.start(options(json!({"pid": "NODE", "ipc": "NODE"})));
    let boot = container.sh("[ $$ = 1 ] || cat /proc/sys/kernel/random/boot_id");
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot_id");
    assert!(boot.stdout.len() == host.len() && boot.stdout != host, "it is the machine's: {boot:?}");
    assert_eq!(container.sh("echo shared > /dev/shm/message; cat /dev/shm/message").ok(), "shared");
}
