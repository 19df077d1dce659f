//! `kata-runtime`, and what the shim says about itself.

use katana_tests::turn::shared;
use katana_tests::{Command, environment};

fn program(name: &str, arguments: &[&str]) -> Command {
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

#[test]
fn versions_are_told() {
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
