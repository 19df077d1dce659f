//! What containerd learns of a runtime before it runs anything. containerd 1.7 does not ask.

use katana_tests::turn::shared;
use katana_tests::{Bundle, Instance, cri, environment};
use serde_json::json;

const RUNTIMES: [&str; 2] = ["io.containerd.kata.v2", "io.containerd.runc.v2"];

#[test]
fn runtimes_tell_what_they_can_do() {
    let _turn = shared();
    let instance = Instance::of_version_2();
    for runtime in RUNTIMES {
        let features = cri::features(instance.containerd(), runtime);
        let has = |list: &str, name: &str| {
            let list =
                features.pointer(list).and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
            list.iter().any(|one| one == name)
        };
        // kubelet looks for the first of these.
        for option in ["rro", "rrw", "rnosuid", "rnoexec", "rbind", "rslave", "nosymfollow"] {
            assert!(has("/mountOptions", option), "{option}: {features:#}");
        }
        assert!(has("/hooks", "createRuntime") && has("/linux/namespaces", "user"), "{features:#}");
        assert!(
            has("/linux/capabilities", "CAP_BPF") && has("/linux/seccomp/actions", "SCMP_ACT_ERRNO"),
            "{features:#}"
        );
        assert_eq!(features["linux"]["cgroup"]["v2"], true, "{features:#}");
    }
    if environment::is_vm() {
        let features = cri::features(instance.containerd(), RUNTIMES[0]);
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false, "{features:#}");
        assert_eq!(features["linux"]["apparmor"]["enabled"], false, "{features:#}");
    }
}

/// containerd itself refuses what a runtime says that it cannot do.
#[test]
fn id_mapped_mounts_are_refused_before_anything_is_started() {
    let _turn = shared();
    if !environment::is_vm_or_say("runc can do it") {
        return;
    }
    let instance = Instance::of_version_2();
    let _here = instance.containerd().enter();
    let mut bundle = Bundle::new("true");
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let source = bundle.scratch().directory("source");
    bundle.spec["mounts"].as_array_mut().expect("mounts").push(json!({
        "type": "bind", "source": source, "destination": "/mnt", "options": ["rbind"], "uidMappings": map, "gidMappings": map,
    }));
    let output = bundle.run().output();
    assert_ne!(output.code, 0, "{output}");
    output.expect_error_line(&["idmap"]);
}
