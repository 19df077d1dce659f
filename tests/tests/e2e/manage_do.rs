//! `kata-runtime do`: commands of the host in machines of their own.

use std::fs;
use std::path::Path;

use katana_tests::host::eventually;
use katana_tests::turn::{Turn, shared};
use katana_tests::{Command, Configuration, Scratch, environment};

use crate::tool::program;

fn is_ours() -> Option<Turn> {
    let turn = shared();
    environment::is_vm_or_say("this is Katana's own tool").then_some(turn)
}

fn run(words: &[&str]) -> Command {
    program("kata-runtime", &[&["do"], words].concat())
}

fn is_left(text: &str) -> bool {
    let of = |directory| fs::read_dir(directory).into_iter().flatten().flatten();
    let all = of("/run/kata-containers/sandboxes").chain(of("/run/kata-runtime"));
    all.into_iter().any(|entry: fs::DirEntry| entry.file_name().to_string_lossy().contains(text))
}

#[test]
fn a_command_has_its_streams_and_its_exit_code() {
    let Some(_turn) = is_ours() else { return };
    run(&["cat"]).input("through").output().ok().expect_text("through");
    let output = run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).output().expect_code(7);
    assert_eq!((output.text().trim(), output.errors().trim()), ("out", "err"));
    let much = run(&["seq", "100000"]).output().ok().text();
    assert_eq!(much.lines().count(), 100_000);
    run(&["-e", "A=b c", "sh", "-c", "echo $A $(hostname)"]).output().ok().expect_text("b c kata");
    run(&["/nothing"]).output().expect_code(125).expect_error_line(&["kata-runtime do: ", "/nothing"]);
}

#[test]
fn the_hosts_files_are_there_to_be_read() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let secret = scratch.file("file", "of the host");
    let mine = fs::read_to_string("/etc/os-release").expect("os-release");
    run(&["cat", "/etc/os-release"]).output().ok().expect_text(mine.trim());
    let output = run(&["touch", "/etc/new"]).output();
    assert_ne!(output.code, 0, "{output}");
    assert!(output.errors().contains("Read-only file system"), "{output}");
    // Its own kernel, processes and network.
    let script = "echo > /tmp/x && echo > /run/x && echo $$ $(ls /sys/class/net)";
    run(&["sh", "-c", script]).output().ok().expect_text("1 lo");
    let volume = format!("{}:/mnt", scratch.path().display());
    let script = "cat /mnt/file; echo changed > /mnt/file";
    run(&["--volume", &volume, "sh", "-c", script]).output().ok().expect_text("of the host");
    assert_eq!(fs::read_to_string(&secret).expect("the file"), "changed\n");
    let output = run(&["--volume", &format!("{volume}:ro"), "sh", "-c", script]).output();
    assert!(output.errors().contains("Read-only file system"), "{output}");
    assert!(!Path::new("/tmp/x").exists());
}

#[test]
fn a_configuration_and_limits_are_those_of_the_command_line() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let configuration = Configuration::installed().set("hypervisor.katana.kernel_params", "katana.mark=1");
    let file = scratch.file("configuration.toml", configuration.to_toml()).display().to_string();
    let output = program("kata-runtime", &["--config", &file, "do", "cat", "/proc/cmdline"]).output().ok();
    assert!(output.text().contains("katana.mark=1"), "{output}");
    let script = "nproc; grep MemTotal /proc/meminfo";
    let text = run(&["--cpus", "2", "--memory", "700", "sh", "-c", script]).output().ok().text();
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(numbers[0] == 2 && numbers[1] > 700 << 10, "{text}");
}

#[test]
fn it_ends_with_the_tool() {
    let Some(_turn) = is_ours() else { return };
    for (signal, code) in [("-TERM", Some(143)), ("-KILL", None)] {
        let running = run(&["sh", "-c", "echo here; sleep 1000"]).spawn();
        running.wait_for("here");
        let running_pid = running.pid();
        let name = format!("do-{running_pid}-");
        assert!(is_left(&name));
        Command::new(&["kill", signal, &running_pid.to_string()]).output().ok();
        let output = running.finish();
        assert!(code.is_none_or(|code| output.code == code), "{output}");
        assert!(eventually(|| !is_left(&name)), "the pod is left");
        // What the killed one has left is removed by the next one.
        run(&["true"]).output().ok();
        assert!(!Path::new("/run/kata-runtime").join(running_pid.to_string()).exists());
    }
}
