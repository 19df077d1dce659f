//! `kata-runtime exec` and `kata-runtime cp`: programs that the host's operator runs in a guest, and files that come and
//! go.

use std::path::{Path, PathBuf};
use std::time::Duration;

use katana_tests::cri::Pod;
use katana_tests::host::eventually;
use katana_tests::scratch::noise;
use katana_tests::turn::{Turn, shared};
use katana_tests::{BUSYBOX, Command, Configuration, Container, Output, Run, Scratch, Terminal, environment};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tool::program;

fn is_ours() -> Option<Turn> {
    let turn = shared();
    environment::is_vm_or_say("this is Katana's own tool").then_some(turn)
}

fn runtime(arguments: &[&str]) -> Command {
    program("kata-runtime", arguments)
}

/// A container into whose guest the configuration lets the operator.
fn open_container(scratch: &Scratch) -> Container {
    let text = Configuration::installed().set("agent.kata.debug_console_enabled", true).to_toml();
    let path = scratch.file("configuration.toml", text);
    Run::new(BUSYBOX).configuration(&path).env("FROM=container").command(&["sleep", "10000"]).start()
}

fn plain_container() -> Container {
    Run::new(BUSYBOX).env("FROM=container").command(&["sleep", "10000"]).start()
}

fn md5(path: &Path) -> String {
    let sum = Command::new(&["md5sum", &path.display().to_string()]).output().ok().text();
    sum.split_whitespace().next().expect("a sum").to_owned()
}

#[test]
fn a_command_runs_in_the_guest_itself() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let container = open_container(&scratch);
    let exec = |arguments: &[&str]| runtime(&[&["exec"], arguments].concat());
    let script = "echo $0 $FROM $(readlink /proc/1/exe) $PWD; echo err >&2; exit 7";
    let output = exec(&["-e", "FROM=host", "-w", "/tmp", container.id(), "sh", "-c", script]).output();
    output.expect_code(7).expect_text("sh host /sbin/init /tmp").expect_error_line(&["err"]);
    // What the kernel says on its console, at its most urgent.
    exec(&[container.id(), "sh", "-c", "echo '<0>said by the guest' > /dev/kmsg"]).output().ok();
    let shown = || runtime(&["logs", "--console", container.id()]).output().ok().text();
    assert!(eventually(|| shown().contains("said by the guest")), "{}", shown());

    // Standard input, of more than all buffers on the way hold.
    let input = noise(3 << 20, 7);
    let sum = md5(&scratch.file("noise", &input));
    let output = exec(&["-i", container.id(), "md5sum"]).input(input).output().ok();
    assert!(output.text().starts_with(&sum), "{output}");
    let output = exec(&[container.id(), "head", "-c", "3000000", "/dev/zero"]).output().ok();
    assert!(output.stdout == vec![0; 3_000_000], "{}", output.stdout.len());
    // A shell reads its commands.
    exec(&[container.id()]).input("echo I am $$ >/tmp/me; cat /tmp/me; exit 5\n").output().expect_code(5);

    let output = exec(&[container.id(), "nonexistent"]).output().expect_code(125);
    output
        .expect_error_line(&["kata-runtime exec: exec: \"nonexistent\": executable file not found in $PATH"]);
    exec(&["nosuchpod", "true"]).output().expect_code(125).expect_error_line(&["no pod has an id"]);
}

#[test]
fn without_the_key_only_containers_take_commands() {
    let Some(_turn) = is_ours() else { return };
    let container = plain_container();
    let output = runtime(&["exec", container.id(), "true"]).output().expect_code(125);
    output.expect_error_line(&["kata-runtime exec: pod", "debug_console_enabled = true in [agent.kata]"]);
    // As its first process: root, environment.
    let script = "echo $FROM $(cat /proc/1/cmdline | tr '\\0' ' '); exit 3";
    let output = runtime(&["exec", "-c", container.id(), container.id(), "sh", "-c", script]).output();
    output.expect_code(3).expect_text("container sleep 10000");
    let output = runtime(&["exec", "-c", "other", container.id(), "true"]).output().expect_code(125);
    output.expect_error_line(&["has no container \"other\""]);
    container.task("pause", &[]).ok();
    let output = runtime(&["exec", "-c", container.id(), container.id(), "true"]).output().expect_code(125);
    output.expect_error_line(&["is paused"]);
    container.task("resume", &[]).ok();
}

#[test]
fn a_shell_on_a_terminal_follows_its_size() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let container = open_container(&scratch);
    let terminal = Terminal::spawn(&runtime(&["exec", container.id()]), 31, 71);
    terminal.type_keys("stty size\n");
    terminal.running().wait_for("31 71");
    terminal.resize(41, 81);
    terminal.type_keys("until [ \"$(stty size)\" = '41 81' ]; do sleep 0.2; done; echo now it $((40 + 2))\n");
    terminal.running().wait_for("now it 42");
    // Ctrl-C is the shell's.
    terminal.type_keys("echo begins $((1 + 1)); sleep 1000\n");
    terminal.running().wait_for("begins 2");
    // A shell that is about to give the terminal to the command takes the signal itself, and the command goes on.
    let answers = || {
        terminal.type_keys("\x03echo still $((40 + 3))\n");
        std::thread::sleep(Duration::from_secs(1));
        terminal.running().stdout().contains("still 43")
    };
    assert!(eventually(answers), "{}", terminal.running().stdout());
    terminal.type_keys("exit 9\n");
    terminal.finish().expect_code(9);
}

#[test]
fn an_agent_that_does_not_answer_is_named() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let container = open_container(&scratch);
    runtime(&["exec", container.id(), "true"]).output().ok();
    kill(Pid::from_raw(container.pid()), Signal::SIGSTOP).expect("SIGSTOP");
    let named = |output: Output| {
        assert!(output.elapsed < Duration::from_secs(5), "{output}");
        output.expect_error_line(&["the agent of pod", "does not answer"]);
    };
    named(runtime(&["exec", container.id(), "true"]).output().expect_code(125));
    named(runtime(&["cp", &format!("{}:/etc", container.id()), "/nowhere"]).output().expect_code(1));
    kill(Pid::from_raw(container.pid()), Signal::SIGCONT).expect("SIGCONT");
    runtime(&["exec", container.id(), "true"]).output().ok();
}

#[test]
fn what_runs_ends_with_who_has_asked_for_it() {
    let Some(_turn) = is_ours() else { return };
    let scratch = Scratch::new();
    let container = open_container(&scratch);
    let id = container.id();
    for (options, seconds) in [(vec![id], "7654"), (vec!["-c", id, id], "7655")] {
        let script = format!("echo started; exec sleep {seconds}");
        let words = [&["exec"], &options[..], &["sh", "-c", &script]].concat();
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            let running = runtime(&words).spawn();
            running.wait_for("started");
            running.signal(signal);
            running.finish().expect_code(128 + signal as i32);
            let gone = || {
                // Both are in sight from the guest itself.
                let ps = runtime(&["exec", id, "ps"]).output().ok();
                !ps.text().contains(&format!("sleep {seconds}"))
            };
            assert!(eventually(gone), "{signal}: sleep {seconds} still runs");
        }
    }
    // What a command of the guest leaves behind as well.
    runtime(&["exec", id, "sh", "-c", "sleep 7656 & echo"]).output().ok();
    let gone = || !runtime(&["exec", id, "ps"]).output().ok().text().contains("sleep 7656");
    assert!(eventually(gone), "sleep 7656 still runs");
    // Nobody reads any more.
    let line = format!("{} exec {id} yes | head -n 1", environment::bin().join("kata-runtime").display());
    Command::new(&["sh", "-c", &line]).output().ok().expect_text("y");
}

fn copy(options: &[&str], from: &str, to: &Path) -> Output {
    runtime(&[&["cp"], options, &[from, &to.display().to_string()]].concat()).output()
}

fn copy_back(options: &[&str], from: &Path, to: &str) -> Output {
    runtime(&[&["cp"], options, &[&from.display().to_string(), to]].concat()).output()
}

fn of(container: &Container, path: &str) -> String {
    format!("{}:{path}", container.id())
}

#[test]
fn files_are_copied_both_ways() {
    let Some(_turn) = is_ours() else { return };
    let (scratch, container) = (Scratch::new(), plain_container());
    let from = scratch.directory("from");
    let large = scratch.file("from/large", noise(5 << 20, 8));
    std::fs::write(from.join("small"), "small").expect("a file");
    copy_back(&[], &from, &of(&container, "/run")).ok();
    let sums = container.sh("md5sum /run/from/large; cat /run/from/small").ok();
    assert!(sums.text().contains(&md5(&large)) && sums.text().ends_with("small"), "{sums}");

    // Of a tmpfs, which is in the guest only; a new name, a directory that is there, its contents.
    container.sh("cd /run/from; chown 7:8 small; chmod 4711 small; ln -s /etc/passwd link; mkfifo fifo").ok();
    let to = scratch.directory("to");
    let output = copy(&[], &of(&container, "/run/from"), &to).ok();
    output.expect_error_line(&["kata-runtime cp: /run/from/fifo: a device or FIFO is not copied"]);
    assert_eq!(md5(&to.join("from/large")), md5(&large));
    assert_eq!(std::fs::read_link(to.join("from/link")).expect("a link"), Path::new("/etc/passwd"));
    let owner_and_mode = |path: PathBuf| {
        use std::os::unix::fs::MetadataExt;
        let status = std::fs::metadata(path).expect("a file");
        (status.uid(), status.gid(), status.mode() & 0o7777)
    };
    assert_eq!(owner_and_mode(to.join("from/small")), (0, 0, 0o711));
    copy(&["-a"], &of(&container, "/run/from/small"), &to.join("kept")).ok();
    assert_eq!(owner_and_mode(to.join("kept")), (7, 8, 0o4711));
    copy(&[], &of(&container, "run/from/."), &to.join("contents")).ok();
    assert_eq!(std::fs::read_to_string(to.join("contents/small")).expect("a file"), "small");

    // Archives; a file that is mounted in the container.
    let archive = runtime(&["cp", &of(&container, "/run/from/large"), "-"]).output().ok();
    let there = of(&container, "/tmp");
    runtime(&["cp", "-", &there]).input(archive.stdout).output().ok();
    let sum = container.sh("md5sum /tmp/large").ok();
    assert!(sum.text().starts_with(&md5(&large)), "{sum}");

    for (from, why) in [("/none", "/none: No such file or directory"), ("/etc/passwd/x", "Not a directory")] {
        copy(&[], &of(&container, from), &to).expect_code(1).expect_error_line(&["kata-runtime cp:", why]);
    }
    let output = copy_back(&[], &from.join("small"), &of(&container, "/none/")).expect_code(1);
    output.expect_error_line(&["kata-runtime cp: /none/: there is no such directory"]);
    let output = copy_back(&[], Path::new("/no/such"), &of(&container, "/run")).expect_code(1);
    output.expect_error_line(&["kata-runtime cp: /no/such: No such file or directory"]);
    container.task("kill", &["--signal", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    let output = copy(&[], &of(&container, "/etc"), &to).expect_code(1);
    output.expect_error_line(&["kata-runtime cp: no container of pod", "runs"]);
}

/// All that is the kernel's is left out, and links lead nowhere but into the container.
#[test]
fn a_container_has_no_say_in_what_is_copied_of_others() {
    let Some(_turn) = is_ours() else { return };
    let (scratch, container) = (Scratch::new(), plain_container());
    container.sh("mv /etc /etc-was; ln -s /../../../../../run/kata-containers /etc").ok();
    let to = scratch.directory("to");
    copy(&[], &of(&container, "/etc/shared"), &to).expect_code(1).expect_error_line(&["No such file"]);
    let hostile = scratch.file("hostile", "hostile");
    copy_back(&[], &hostile, &of(&container, "/etc/x")).expect_code(1).expect_error_line(&["No such file"]);
    let output = copy(&[], &of(&container, "/"), &to).ok();
    output.expect_error_line(&["kata-runtime cp: /proc: a file system of the kernel"]);
    assert!(to.join("etc-was/passwd").exists() || to.join("bin").exists());
    assert!(!to.join("proc/1").exists() && !to.join("sys/kernel").exists());
}

#[test]
fn a_container_of_a_pod_is_named_as_kubernetes_names_it() {
    let Some(_turn) = is_ours() else { return };
    let (pod, scratch) = (Pod::run("kata"), Scratch::new());
    let container = pod.sh("echo mine > /tmp/file; sleep 10000");
    let ready = || container.try_exec(&["test", "-e", "/tmp/file"], 10).is_ok_and(|exec| exec.code == 0);
    assert!(eventually(ready));
    let to = scratch.path().join("file");
    copy(&[], &format!("{}:/tmp/file", pod.id()), &to).ok();
    assert_eq!(std::fs::read_to_string(&to).expect("a file"), "mine\n");
    copy_back(&[], &to, &format!("{}/{}:/tmp/back", pod.id(), &container.id()[..12])).ok();
    let output = runtime(&["exec", "-c", container.id(), pod.id(), "cat", "/tmp/back"]).output();
    output.ok().expect_text("mine");
}
