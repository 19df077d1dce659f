//! What a pod's author can set by annotations, who is not root on the node.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use katana_tests::cri::Pod;
use katana_tests::host::Host;
use katana_tests::{Configuration, Containerd, Instance, Scratch, environment, turn};
use serde_json::{Value, json};

const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// Gives the handler `kata-configured` this configuration. For a test that has its turn alone.
pub fn configure(configuration: &Configuration) {
    let path = Containerd::current().directory().join("kata.toml");
    fs::write(&path, configuration.to_toml()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

fn annotated(name: &str, value: &str) -> Value {
    json!({"annotations": {name: value}})
}

/// What the pod's author has written: a program in the place of the VMM, which leaves a trace.
struct Trap(Scratch);

impl Trap {
    fn new() -> Self {
        let scratch = Scratch::new();
        let program = scratch.file("program", format!("#!/bin/sh\nid >{}/ran\n", scratch.path().display()));
        fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("chmod");
        let configuration =
            Configuration::installed().set("hypervisor.katana.path", program.display().to_string());
        scratch.file("configuration.toml", configuration.to_toml());
        Self(scratch)
    }

    fn path(&self) -> String {
        self.0.path().join("configuration.toml").display().to_string()
    }

    #[track_caller]
    fn expect_unused(&self) {
        assert!(!self.0.path().join("ran").exists(), "the program of the pod's author has run on the node");
    }
}

#[track_caller]
fn expect_refused(handler: &str, config: Value, parts: &[&str]) {
    let Err(error) = Pod::try_run(handler, config) else { panic!("{parts:?}: it is not refused") };
    assert!(parts.iter().all(|part| error.message.contains(part)), "{parts:?}: {error}");
    assert_eq!(error.message.lines().count(), 1, "{error}");
}

/// The node's files for containerd keep the annotation from the shim; where they do not, the shim takes it for what it
/// is.
#[test]
fn a_pods_author_runs_no_program_on_the_node() {
    let _turn = turn::alone();
    if !environment::is_vm_or_say("runc has no such annotation") {
        return;
    }
    let trap = Trap::new();
    drop(Pod::run_with("kata", annotated(CONFIG_PATH, &trap.path())));
    trap.expect_unused();
    let before = Host::before();
    configure(&Configuration::installed());
    let refused = |path: &str, parts: &[&str]| {
        expect_refused(
            "kata-configured",
            annotated(CONFIG_PATH, path),
            &[&[CONFIG_PATH][..], parts].concat(),
        );
        trap.expect_unused();
    };
    refused(&trap.path(), &["config_path_directories", "names no directory"]);

    // With directories that the node's administrator has made for this, only what is in them.
    let allowed = Scratch::new();
    let directory = allowed.path().display().to_string();
    configure(&Configuration::installed().set("runtime.config_path_directories", vec![directory.clone()]));
    refused(&trap.path(), &["is not below one of config_path_directories"]);
    refused(&format!("{directory}/../{}", trap.path()), &["is not below one of config_path_directories"]);
    let link = allowed.path().join("link.toml");
    std::os::unix::fs::symlink(trap.path(), &link).expect("symlink");
    let error = ["link.toml", "is a symbolic link"];
    expect_refused("kata-configured", annotated(CONFIG_PATH, &link.display().to_string()), &error);
    trap.expect_unused();
    before.expect_unchanged();

    let small = Configuration::installed().set("hypervisor.katana.default_memory", 200);
    let small = allowed.file("small.toml", small.to_toml());
    let config = || annotated(CONFIG_PATH, &small.display().to_string());
    let pod = Pod::run_with("kata-configured", config());
    let container = pod.start(json!({}));
    let kib =
        container.sh("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo").ok().parse().unwrap_or(0);
    assert!((150 << 10..200 << 10).contains(&kib), "{kib} KiB");
    drop(pod);
    for (path, mode) in [(&*small, 0o646), (allowed.path(), 0o777)] {
        let before = fs::metadata(path).expect("metadata").permissions();
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
        expect_refused("kata-configured", config(), &["can be written to by others than root"]);
        fs::set_permissions(path, before).expect("chmod");
    }
    drop(Pod::run_with("kata-configured", config()));
}

/// There, containerd gives all annotations to the shim.
#[test]
fn nor_where_the_shim_is_the_sandbox() {
    let _turn = turn::shared();
    if environment::is_vm_or_say("runc's shim is no sandbox") {
        let instance = Instance::of_version_2();
        let _here = instance.containerd().enter();
        let trap = Trap::new();
        expect_refused(
            "kata-shim",
            annotated(CONFIG_PATH, &trap.path()),
            &[CONFIG_PATH, "names no directory"],
        );
        trap.expect_unused();
    }
}

/// They can open the guest's agent and kernel to others.
#[test]
fn kernel_parameters_are_not_a_pods_to_set() {
    let _turn = turn::shared();
    if environment::is_vm_or_say("runc has no kernel of a pod's own") {
        let key = "io.katacontainers.config.hypervisor.kernel_params";
        expect_refused("kata", annotated(key, "agent.log=debug"), &[key, "is not in enable_annotations"]);
        let key = "io.katacontainers.config.hypervisor.default_memory";
        expect_refused("kata", annotated(key, "1048576"), &[key, "is more than default_maxmemory"]);
    }
}
