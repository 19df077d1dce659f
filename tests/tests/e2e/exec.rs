//! `ctr tasks exec`.

use std::sync::OnceLock;
use std::time::Duration;

use katana_tests::turn::{alone, shared};
use katana_tests::{
    BUSYBOX, CGROUP_MOUNT, Container, ENTER_CGROUP, Run, Running, Terminal, ctr, environment,
};

const AT_ONCE: usize = 50;

/// One container for all tests here.
fn container() -> &'static Container {
    static CONTAINER: OnceLock<Container> = OnceLock::new();
    CONTAINER.get_or_init(|| {
        Run::new(BUSYBOX)
            .env("FROM=container")
            .options("--memory-limit 268435456")
            .options(CGROUP_MOUNT)
            .command(&["sleep", "100000"])
            .start_for_all()
    })
}

/// What each of them does: it is ready, waits until all are, and ends with a code of its own. Whoever opens a FIFO
/// waits for somebody at its other end.
fn wait_with_others(number: usize) -> [String; 3] {
    let script = format!("echo out {number}; echo err {number} >&2; read word < /tmp/all; exit {number}");
    ["sh".to_owned(), "-c".to_owned(), script]
}

/// One of them, and every other one has a terminal.
enum Exec {
    Plain(Running),
    OnTerminal(Terminal),
}

impl Exec {
    fn start(number: usize) -> Self {
        let words = wait_with_others(number);
        if number.is_multiple_of(2) {
            Self::Plain(container().exec_command(&[], &words).spawn())
        } else {
            Self::OnTerminal(Terminal::spawn(&container().exec_command(&["--tty"], &words), 24, 80))
        }
    }

    fn running(&self) -> &Running {
        match self {
            Self::Plain(running) => running,
            Self::OnTerminal(terminal) => terminal.running(),
        }
    }

    #[track_caller]
    fn expect_end(self, number: usize) {
        let code = i32::try_from(number).expect("a small number");
        let error = format!("err {number}");
        match self {
            Self::Plain(running) => {
                let output = running.finish().expect_code(code).expect_text(&format!("out {number}"));
                output.expect_error_line(&[&error]);
            }
            Self::OnTerminal(terminal) => {
                let output = terminal.finish().expect_code(code);
                assert!(output.text().contains(&error), "{output}");
            }
        }
    }
}

/// They are started in groups, because a slow machine would refuse to serve that many clients at once. They live at the
/// same time all the same, and end at the same time.
#[test]
fn fifty_at_once_half_of_them_with_a_terminal() {
    const GROUP: usize = 10;
    let _turn = alone();
    for _ in 0..environment::rounds(1) {
        container().sh("rm -f /tmp/all; mkfifo /tmp/all").ok();
        let mut started = Vec::new();
        while started.len() < AT_ONCE {
            let first = started.len();
            started.extend((first..first + GROUP).map(Exec::start));
            for (number, exec) in started.iter().enumerate().skip(first) {
                exec.running().wait_for(&format!("out {number}"));
            }
        }
        let processes = container().task("ps", &[]).ok();
        let count = processes.text().lines().count();
        assert!(count > AT_ONCE, "{count} lines\n{processes}");
        container().sh("exec 3> /tmp/all").ok();
        for (number, exec) in started.into_iter().enumerate() {
            exec.expect_end(number);
        }
    }
}

#[test]
fn an_exec_is_in_the_container() {
    let _turn = shared();
    let script = "echo from=$FROM; echo first=$(tr '\\0' ' ' < /proc/1/cmdline)
        [ \"$(cat /proc/self/cgroup)\" = \"$(cat /proc/1/cgroup)\" ] && echo group=same
        echo caps=$(grep ^CapEff: /proc/self/status | cut -f 2)
        for ns in mnt pid ipc uts net cgroup; do
            [ $(readlink /proc/self/ns/$ns) = $(readlink /proc/1/ns/$ns) ] && echo $ns=same; done";
    container().sh(&format!("{script}; {ENTER_CGROUP}; echo memory=$(cat memory.max)")).ok().expect_values(
        &[
            ("from", "container"),
            ("first", "sleep 100000"),
            ("group", "same"),
            ("memory", "268435456"),
            ("caps", "00000000a80425fb"),
            ("mnt", "same"),
            ("pid", "same"),
            ("ipc", "same"),
            ("uts", "same"),
            ("net", "same"),
            ("cgroup", "same"),
        ],
    );
}

#[test]
fn an_exec_has_its_own_directory_user_and_input() {
    let _turn = shared();
    let options = ["--cwd", "/home/app", "--user", "1000:1000"];
    let script = "echo cwd=$(pwd); echo uid=$(id -u); echo gid=$(id -g); echo input=$(cat | wc -c)";
    let exec = container().exec_command(&options, &["sh", "-c", script]).input(vec![b'x'; 100_000]);
    exec.output().ok().expect_values(&[
        ("cwd", "/home/app"),
        ("uid", "1000"),
        ("gid", "1000"),
        ("input", "100000"),
    ]);
}

/// It once took Kata 60 seconds (kata-containers#8026). How long a second is depends on the machine: an ordinary exec
/// in the same run is the measure.
#[test]
fn a_missing_command_fails_at_once_and_clearly() {
    let _turn = shared();
    let quickest = |word: &str| {
        let outputs = (0..3).map(|_| container().exec(&[word]));
        outputs.min_by_key(|output| output.elapsed).expect("three runs")
    };
    let ordinary = quickest("true").ok().elapsed;
    for word in ["no-such-command", "/no/such/command"] {
        let output = quickest(word);
        assert_ne!(output.code, 0, "{output}");
        // Kata's took a minute (kata-containers#8026).
        let limit = ordinary * 2 + Duration::from_secs(30);
        assert!(output.elapsed < limit, "an ordinary exec took {ordinary:?}\n{output}");
        let why = if word.starts_with('/') {
            "no such file or directory"
        } else {
            "executable file not found in $PATH"
        };
        output.expect_error_line(&[word, why]);
    }
    container().exec(&["/etc/passwd"]).expect_error_line(&["/etc/passwd", "permission denied"]);
    assert_eq!(container().status().as_deref(), Some("RUNNING"));
    container().exec(&["true"]).ok();
}

#[test]
fn a_killed_exec_reports_137() {
    let _turn = shared();
    let id = katana_tests::container::new_id();
    let running =
        container().exec_command(&["--exec-id", &id], &["sh", "-c", "echo started; exec sleep 1000"]).spawn();
    running.wait_for("started");
    ctr(&["tasks", "kill", "--signal", "SIGKILL", "--exec-id", &id, container().id()]).output().ok();
    running.finish().expect_code(137);
    assert_eq!(container().status().as_deref(), Some("RUNNING"));
}

#[test]
fn the_size_of_an_execs_terminal_changes() {
    let _turn = shared();
    let script = "trap 'echo changed to $(stty size)' WINCH; until [ \"$(stty size)\" = '31 71' ]; do sleep 0.2; done
        echo ready; read word; echo word is $word; until [ \"$(stty size)\" = '41 81' ]; do sleep 0.2; done; echo done";
    let terminal = Terminal::spawn(&container().exec_command(&["--tty"], &["sh", "-c", script]), 31, 71);
    terminal.running().wait_for("ready");
    terminal.type_keys("hello\n");
    terminal.running().wait_for("word is hello");
    terminal.resize(41, 81);
    terminal.running().wait_for("done");
    terminal.finish().ok();
}

#[test]
fn the_same_exec_id_twice_is_refused() {
    let _turn = shared();
    let id = katana_tests::container::new_id();
    let options = ["--exec-id", &id];
    let first = container().exec_command(&options, &["sh", "-c", "echo started; sleep 1000"]).spawn();
    first.wait_for("started");
    let second = container().exec_command(&options, &["true"]).output();
    assert_ne!(second.code, 0, "{second}");
    second.expect_error_line(&["already exists"]);
    ctr(&["tasks", "kill", "--signal", "SIGKILL", "--exec-id", &id, container().id()]).output().ok();
    first.finish().expect_code(137);
    // Once it is gone, its name is free.
    container().exec_command(&options, &["true"]).output().ok();
}
