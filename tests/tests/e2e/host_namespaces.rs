//! Containers of `ctr` and of Docker that ask for namespaces of the host, or of something else on it.

use std::path::Path;

use katana_tests::container::new_id;
use katana_tests::docker::Docker;
use katana_tests::host::Host;
use katana_tests::turn::{alone, shared};
use katana_tests::{BUSYBOX, Bundle, Command, Configuration, Run, Scratch, environment};
use serde_json::json;

#[test]
fn namespaces_by_a_path_of_the_host_are_refused() {
    let _turn = alone();
    if !environment::is_vm_or_say("runc's containers can be in them") {
        return;
    }
    let before = Host::before();
    for kind in ["pid", "ipc", "uts"] {
        let run =
            Run::new(BUSYBOX).options(&format!("--with-ns {kind}:/proc/1/ns/{kind}")).command(&["true"]);
        let output = run.output();
        assert_ne!(output.code, 0, "{output}");
        let host = format!("the host's {kind} namespace");
        output.expect_error_line(&[&host, "runtime", "host_namespaces"]);
    }
    // That of a process which has nothing to do with containers.
    let other = Command::new(&["unshare", "--ipc", "--uts", "sh", "-c", "echo $$; exec sleep 10000"]).spawn();
    other.wait_for("\n");
    let pid = other.stdout().trim().to_owned();
    for kind in ["ipc", "uts"] {
        let path = format!("/proc/{pid}/ns/{kind}");
        let output =
            Run::new(BUSYBOX).options(&format!("--with-ns {kind}:{path}")).command(&["true"]).output();
        assert_ne!(output.code, 0, "{output}");
        output.expect_error_line(&[&path, "not of this pod"]);
    }
    drop(other);
    before.expect_unchanged();
}

#[test]
fn the_machines_namespaces_take_the_place_of_the_hosts() {
    let _turn = shared();
    if !environment::is_vm_or_say("runc's containers can be in the host's") {
        return;
    }
    let scratch = Scratch::new();
    let configuration = Configuration::installed().set("runtime.host_namespaces", "guest");
    let path = scratch.file("configuration.toml", configuration.to_toml());
    let run = || Run::new(BUSYBOX).configuration(Path::new(&path));
    let options = "--with-ns pid:/proc/1/ns/pid --with-ns uts:/proc/1/ns/uts";
    let output = run().options(options).sh("[ $$ = 1 ] || cat /proc/sys/kernel/random/boot_id").output().ok();
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot_id");
    assert!(output.text().len() == host.len() && output.text() != host, "it is the machine's: {output}");
}

/// One that is listed in no client's ordinary specification, and one that is missing in many.
#[test]
fn cgroups_are_the_containers_own_wherever_it_asks_for_the_hosts() {
    let _turn = shared();
    let mut bundle = Bundle::new("cat /proc/self/cgroup");
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let output = bundle.run().output().ok();
    if environment::is_vm() {
        output.expect_text("0::/");
    }
}

#[test]
fn new_user_namespaces_are_made() {
    let _turn = shared();
    let mut bundle =
        Bundle::new("cat /proc/self/uid_map | tr -s ' '; id -u; echo made > /tmp/file && cat /tmp/file");
    let map = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.push(json!({"type": "user"}));
    (bundle.spec["linux"]["uidMappings"], bundle.spec["linux"]["gidMappings"]) = (map.clone(), map);
    bundle.run().output().ok().expect_text("0 0 65536\n0\nmade");
}

#[test]
fn docker_is_refused_what_a_machine_cannot_share() {
    let _turn = shared();
    let Some(docker) = Docker::get() else { return };
    let run = |options: &str| {
        let options = format!("run --rm --runtime kata --name {} {options} {BUSYBOX}", new_id());
        docker.command(&options, &["cat", "/proc/self/cgroup"]).output()
    };
    for (kind, option) in [("pid", "--pid host"), ("ipc", "--ipc host"), ("uts", "--uts host")] {
        let output = run(option);
        assert_ne!(output.code, 0, "{option}: {output}");
        output.expect_error_line(&[&format!("the host's {kind} namespace"), option, "host_namespaces"]);
    }
    // Docker's own defaults for daemons and kernels of some kinds, and what privileged containers have: they mean the
    // machine's.
    for option in [
        "--cgroupns host",
        "--cgroupns private",
        "--userns host",
        "--privileged",
        "--ipc none",
        "--ipc shareable",
    ] {
        run(option).ok().expect_text("0::/");
    }
    let (other, name) = (new_id(), new_id());
    let _containers = [docker.container(&other), docker.container(&name)];
    docker.run(
        &format!("run --detach --runtime runc --ipc shareable --name {other} {BUSYBOX} sleep 10000"),
        &[],
    );
    let output = run(&format!("--ipc container:{other}"));
    assert_ne!(output.code, 0, "{output}");
    output.expect_error_line(&["ipc namespace", "not of this pod"]);
}
