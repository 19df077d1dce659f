//! `kata-runtime install` with real daemons: what it writes is what they read, and is gone afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use katana_tests::containerd::Version;
use katana_tests::cri::{self, Pod};
use katana_tests::host::eventually;
use katana_tests::turn::shared;
use katana_tests::{Command, Instance, environment};
use nix::sys::signal::Signal::SIGTERM;
use serde_json::json;

fn tool(arguments: &[&str]) -> Command {
    let path = environment::bin().join("kata-runtime").display().to_string();
    Command::new(&[&[path.as_str()], arguments].concat())
}

/// A containerd whose configuration does not know the runtime.
pub struct Plain {
    pub instance: Instance,
    pub program: PathBuf,
}

impl Plain {
    pub fn start(version: Version) -> Self {
        let instance = Instance::start(version);
        let pid =
            fs::read_to_string(instance.containerd().directory().join("containerd.pid")).expect("its pid");
        let program = fs::read_link(format!("/proc/{}/exe", pid.trim())).expect("its program");
        let file = instance.containerd().configuration();
        let text = fs::read_to_string(&file).expect("its configuration");
        let start = text.find("[plugins.").and_then(|_| {
            let header = text.lines().find(|line| line.ends_with("containerd.runtimes.kata]"))?;
            text.find(header)
        });
        let start = start.expect("a table of the runtime");
        let end = start + text[start..].find("\n\n").expect("its end");
        fs::write(&file, format!("{}{}", &text[..start], &text[end + 1..])).expect("configuration written");
        Self { instance, program }
    }

    pub fn file(&self) -> PathBuf {
        self.instance.containerd().configuration()
    }

    /// What containerd makes of it.
    fn dump(&self) -> String {
        let words = [
            &self.program.display().to_string(),
            "--config",
            &self.file().display().to_string(),
            "config",
            "dump",
        ];
        Command::new(&words).output().ok().text()
    }

    /// As systemd would.
    fn restart(&self) {
        self.instance.end(SIGTERM);
        let directory = self.instance.containerd().directory();
        let script =
            r#"echo $$ >"$1/containerd.pid"; exec "$2" --config "$1/config.toml" >>"$1/containerd.log" 2>&1"#;
        let (directory, program) = (directory.display().to_string(), self.program.display().to_string());
        // Not a child of this process, which would not notice its end.
        Command::new(&["setsid", "--fork", "sh", "-c", script, "sh", &directory, &program]).output().ok();
        assert!(eventually(|| cri::is_ready(self.instance.containerd())), "containerd does not come up");
    }
}

fn a_pod_runs_after_install_and_none_after_uninstall(version: Version) {
    let _turn = shared();
    if !environment::is_vm_or_say("this is Katana's own tool") {
        return;
    }
    let containerd = Plain::start(version);
    let _entered = containerd.instance.containerd().enter();
    let file = containerd.file().display().to_string();
    let before = fs::read(&file).expect("configuration");
    let files = || {
        let names = fs::read_dir(Path::new(&file).parent().expect("a directory")).expect("directory");
        let mut names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
        names.retain(|name| name.to_string_lossy().contains("conf"));
        names.sort();
        names
    };
    let there = files();

    tool(&["install", "--containerd-config", &file]).output().ok();
    let again = tool(&["install", "--containerd-config", &file]).output().ok().text();
    assert!(again.contains("nothing to change"), "{again}");
    let dump = containerd.dump();
    // Ours, beside what was configured of the same plugin before.
    for part in ["io.containerd.kata.v2", "kata-configured", "netns_mounts_under_state_dir = true"] {
        assert!(dump.contains(part), "{part} is missing\n{dump}");
    }
    containerd.restart();
    let pod = Pod::run("kata");
    pod.sh("echo here").wait_for_output("here");
    drop(pod);

    tool(&["uninstall", "--containerd-config", &file]).output().ok();
    assert_eq!(fs::read(&file).expect("configuration"), before);
    assert_eq!(files(), there);
    containerd.restart();
    let refused = Pod::try_run("kata", json!({})).err().expect("no such runtime");
    assert!(refused.message.contains("no runtime for \"kata\" is configured"), "{}", refused.message);
}

#[test]
fn containerd_1_reads_it() {
    a_pod_runs_after_install_and_none_after_uninstall(Version::One);
}

#[test]
fn containerd_2_reads_it() {
    a_pod_runs_after_install_and_none_after_uninstall(Version::Two);
}
