//! `kata-runtime`, and what the shim says about itself.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Command, Configuration, Run, Scratch, environment};

pub fn program(name: &str, arguments: &[&str]) -> Command {
    let path = environment::bin().join(name).display().to_string();
    Command::new(&[&[path.as_str()], arguments].concat())
}

#[test]
fn check_says_that_this_system_can() {
    let _turn = shared();
    if environment::is_vm_or_say("this is Katana's own tool") {
        let output = program("kata-runtime", &["check"]).output().ok();
        let text = output.text();
        let lines: Vec<&str> = text.lines().collect();
        for line in
            ["System is capable of running Kata Containers", "System can currently create Kata Containers"]
        {
            assert!(lines.contains(&line), "no line {line:?}\n{output}");
        }
    }
}

/// Both say the same, and the start leaves nothing behind.
#[test]
#[ignore = "runs where the kernel is too old, see tests/all"]
fn check_and_a_start_name_what_an_old_kernel_lacks() {
    let _turn = shared();
    let lacks = ["this host's kernel lacks mount_setattr(2)", "Linux 5.15 or newer is needed"];
    program("kata-runtime", &["check"]).output().expect_code(1).expect_error_line(&lacks);
    let lacks = [
        "this host's kernel has no mount_setattr(2)",
        "Linux 5.15 or newer is needed, see kata-runtime check",
    ];
    let output = Run::new(BUSYBOX).command(&["true"]).output();
    assert_ne!(output.code, 0, "{output}");
    output.expect_error_line(&lacks);
    for directory in ["shared/sandboxes", "sandboxes"] {
        let path = Path::new("/run/kata-containers").join(directory);
        let left: Vec<_> =
            std::fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn the_factory_makes_and_removes_the_template() {
    let _turn = shared();
    if !environment::is_vm_or_say("this is Katana's own tool") {
        return;
    }
    let scratch = Scratch::new();
    let directory = scratch.path().join("templates");
    let configuration = Configuration::installed()
        .set("factory.enable_template", true)
        .set("factory.template_path", directory.display().to_string());
    let file = scratch.file("configuration.toml", configuration.to_toml()).display().to_string();
    let factory = |command: &str| {
        let arguments = ["--config", &file, "factory", command];
        program("kata-runtime", &arguments).output().ok().text().trim().to_owned()
    };
    let files = || std::fs::read_dir(&directory).map_or(0, Iterator::count);
    assert_eq!(factory("status"), "vm factory is off");
    assert_eq!((factory("init").as_str(), files()), ("vm factory initialized", 1));
    assert_eq!(factory("status"), "vm factory is on");
    let path = || std::fs::read_dir(&directory).expect("templates").flatten().next().expect("one").path();
    let made = (path(), std::fs::metadata(path()).expect("template").ino());
    // It is the one that pods look for.
    Run::new(BUSYBOX).configuration(Path::new(&file)).command(&["true"]).output().ok();
    assert_eq!((path(), std::fs::metadata(path()).expect("template").ino(), files()), (made.0, made.1, 1));
    assert_eq!((factory("destroy").as_str(), files()), ("vm factory destroyed", 0));
    assert_eq!(factory("status"), "vm factory is off");
}

#[test]
fn namespaces_have_templates_of_their_own() {
    let _turn = shared();
    if !environment::is_vm_or_say("this is Katana's own tool") {
        return;
    }
    let scratch = Scratch::new();
    let directory = scratch.path().join("templates");
    let configuration = Configuration::installed()
        .set("factory.enable_template", true)
        .set("factory.template_scope", "namespace")
        .set("factory.template_path", directory.display().to_string());
    let file = scratch.file("configuration.toml", configuration.to_toml()).display().to_string();
    let factory = |arguments: &[&str]| {
        program("kata-runtime", &[&["--config", &file, "factory"], arguments].concat()).output()
    };
    let files = || std::fs::read_dir(&directory).map_or(0, Iterator::count);
    factory(&["init"]).expect_code(1).expect_error_line(&["template_scope", "say --namespace"]);
    factory(&["init", "--namespace", "k8s.io/a"]).ok();
    assert_eq!(files(), 1);
    let run = || Run::new(BUSYBOX).configuration(Path::new(&file)).command(&["true"]).output().ok();
    // Not a pod of that namespace: it makes its own template, from which the next one is restored.
    for _ in 0..2 {
        run();
        assert_eq!(files(), 2);
    }
    let ours = environment::namespace();
    let state = |namespace| factory(&["status", "--namespace", namespace]).ok().text().trim().to_owned();
    assert_eq!(
        [ours.as_str(), "k8s.io/a", "k8s.io/b"].map(state),
        ["on", "on", "off"].map(|state| format!("vm factory is {state}"))
    );
    factory(&["destroy"]).ok();
    assert_eq!(files(), 0);
}

#[test]
fn check_says_what_it_looked_at() {
    let _turn = shared();
    if environment::is_vm_or_say("this is Katana's own tool") {
        let list: serde_json::Value =
            serde_json::from_str(&program("kata-runtime", &["check", "--json"]).output().ok().text())
                .expect("JSON");
        assert_eq!((&list["capable"], &list["can_create"]), (&true.into(), &true.into()), "{list}");
        let checks = list["checks"].as_array().expect("a list");
        assert!(checks.len() >= 11 && checks.iter().all(|check| check["result"] != "failed"), "{list}");
    }
}

#[test]
fn versions_are_printed() {
    let _turn = shared();
    if environment::is_vm_or_say("these are Katana's own programs") {
        let tool = program("kata-runtime", &["--version"]).output().ok();
        assert!(tool.text().starts_with("kata-runtime"), "{tool}");
        let shim = program("containerd-shim-kata-v2", &["-v"]).output().ok();
        assert!(shim.text().to_lowercase().contains("version"), "{shim}");
    }
}

#[test]
fn env_prints_the_effective_configuration() {
    let _turn = shared();
    if environment::is_vm_or_say("this is Katana's own tool") {
        let output = program("kata-runtime", &["env"]).output().ok();
        for part in ["configuration.toml", "vmlinux.container", "kata-containers.img"] {
            assert!(output.text().contains(part), "{part} is not mentioned\n{output}");
        }
    }
}

/// As a node of Kata Containers has them: their values.
const STOCK: [(&str, &str); 7] = [
    ("clh", include_str!("../../../config/src/tests/stock/clh.toml")),
    ("cloud-hypervisor", include_str!("../../../config/src/tests/stock/cloud-hypervisor.toml")),
    ("dragonball", include_str!("../../../config/src/tests/stock/dragonball.toml")),
    ("fc", include_str!("../../../config/src/tests/stock/fc.toml")),
    ("qemu", include_str!("../../../config/src/tests/stock/qemu.toml")),
    ("qemu-runtime-rs", include_str!("../../../config/src/tests/stock/qemu-runtime-rs.toml")),
    ("stratovirt", include_str!("../../../config/src/tests/stock/stratovirt.toml")),
];

#[test]
fn files_of_kata_containers_start_containers() {
    let _turn = shared();
    if !environment::is_vm_or_say("these are files for virtual machines") {
        return;
    }
    let scratch = Scratch::new();
    for (name, text) in STOCK {
        let file = scratch.file(&format!("{name}.toml"), text);
        let listed = program("kata-runtime", &["config", "check", &file.display().to_string()]).output().ok();
        assert!(listed.text().contains("no meaning") && !listed.text().contains("  refused "), "{listed}");
        let ran = Run::new(BUSYBOX).configuration(&file).command(&["echo", name]).output().ok();
        ran.expect_text(name);
    }
}

#[test]
fn annotations_of_kata_containers_without_a_meaning_stop_no_pod() {
    let _turn = shared();
    if !environment::is_vm_or_say("this is about virtual machines") {
        return;
    }
    let annotated = |annotation: &str| {
        let options = format!("--annotation io.katacontainers.config.{annotation}");
        Run::new(BUSYBOX).options(&options).command(&["true"]).output()
    };
    annotated("hypervisor.machine_type=q35").ok();
    annotated("runtime.disable_guest_seccomp=false").ok();
    // To ignore this one would be to run unencrypted what is to be encrypted.
    let refused = annotated("hypervisor.confidential_guest=true");
    assert_ne!(refused.code, 0, "{refused}");
    refused.expect_error_line(&["annotation", "confidential_guest", "neither encrypted nor measured"]);
}
