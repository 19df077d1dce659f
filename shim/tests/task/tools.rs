//! What `kata-runtime exec` and `kata-runtime cp` ask of a shim, by the program itself.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::PauseRequest;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::containerd::{Containerd, can_run, ctx, eventually, say_skipped};
use crate::stand_in;

/// The program that cargo has built beside this test.
fn tool() -> Option<PathBuf> {
    let tool = stand_in::agent().with_file_name("kata-runtime");
    let can = can_run() && tool.exists();
    if !can {
        say_skipped("there is no kata-runtime: cargo build -p kata-runtime");
    }
    can.then_some(tool)
}

/// Runs it beside the shims of this test.
async fn run(tool: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let input = input.to_vec();
    let ended = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    });
    ended.await.unwrap()
}

/// Its exit code, standard output and standard error.
fn parts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| ((n as u32).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The agent that a stand-in has started.
fn agent_of(vmm: u32) -> Pid {
    let parent = format!("PPid:\t{vmm}\n");
    let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let mut agents = all.filter(|path| {
        let text = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
        text("status").contains(&parent) && text("cmdline").contains("serve")
    });
    let name = agents.next().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    Pid::from_raw(name.parse().unwrap())
}

/// In place of the guest is this host, seen from the agent's mount namespace.
#[tokio::test]
async fn exec_runs_in_the_guest_where_the_configuration_says_so() {
    let Some(tool) = tool() else { return };
    let containerd = Containerd::start("tools-exec").await;
    let id = containerd.id();
    containerd.run("exec sleep 1000").await;
    let refused = parts(&run(&tool, &["exec", &id, "true"], b"").await);
    assert_eq!(refused.0, 125);
    assert!(refused.2.contains("without debug_console_enabled = true in [agent.kata]"), "{}", refused.2);
    // As `ctr task exec`, without a word to containerd.
    let script = "echo out; echo err >&2; exit 3";
    let output = parts(&run(&tool, &["exec", "-c", &id, &id, "sh", "-c", script], b"").await);
    assert_eq!(output, (3, "out\n".to_owned(), "err\n".to_owned()));
    // Who holds its output open does not hold it up.
    let script = "sleep 1000 & echo hi";
    let output = parts(&run(&tool, &["exec", "-c", &id, &id, "sh", "-c", script], b"").await);
    assert_eq!(output, (0, "hi\n".to_owned(), String::new()));
    let pause = PauseRequest { id: id.clone(), ..Default::default() };
    containerd.client.pause(ctx(), &pause).await.unwrap();
    let paused = parts(&run(&tool, &["exec", "-c", &id, &id, "true"], b"").await);
    assert_eq!(paused.2, format!("kata-runtime exec: container {id} is paused\n"));
    containerd.end().await;
    assert_eq!(containerd.topics(), ["create", "start", "paused", "exit", "delete"]);

    let containerd = Containerd::start_with("tools-console", "console=on").await;
    let id = containerd.id();
    containerd.run("exec sleep 1000").await;
    let input = noise(3 << 20);
    let output = run(&tool, &["exec", "-i", &id, "cat"], &input).await;
    assert_eq!(parts(&output).2, "");
    assert!(output.status.success() && output.stdout == input, "{}", output.stdout.len());
    let script = "echo $A $0 $PWD; exit 4";
    let words = ["exec", "-e", "A=1", "-w", "/tmp", &id[..id.len() - 1], "sh", "-c", script];
    assert_eq!(parts(&run(&tool, &words, b"").await), (4, "1 sh /tmp\n".to_owned(), String::new()));
    let shell = parts(&run(&tool, &["exec", &id], b"echo $((40 + 2)); exit 5\n").await);
    assert_eq!(shell, (5, "42\n".to_owned(), String::new()));
    let missing = parts(&run(&tool, &["exec", &id, "nonexistent"], b"").await);
    let text = "kata-runtime exec: exec: \"nonexistent\": executable file not found in $PATH\n";
    assert_eq!(missing, (125, String::new(), text.to_owned()));
    let terminal = parts(&run(&tool, &["exec", "-t", &id, "stty", "size"], b"").await);
    assert_eq!(terminal, (0, "24 80\r\n".to_owned(), String::new()));
    let state = fs::read_dir("/run/kata-containers/sandboxes").unwrap().flatten();
    let state: Vec<_> =
        state.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(&id)).collect();
    let left: Vec<_> = fs::read_dir(&state[0]).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("exec-")), "{left:?}");
    containerd.end().await;
}

/// The tool on a terminal of its own, which the test holds.
struct Terminal {
    master: fs::File,
    child: Child,
    seen: Arc<Mutex<String>>,
}

impl Terminal {
    fn spawn(tool: &Path, arguments: &[&str], size: Winsize) -> Self {
        let pair = openpty(&size, None).unwrap();
        let master = fs::File::from(pair.master);
        fcntl(&master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        let mut command = Command::new(tool);
        let slave = || pair.slave.try_clone().unwrap();
        command.args(arguments).stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: setsid and ioctl may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0)).map(drop).map_err(Into::into)
            });
        }
        let child = command.spawn().unwrap();
        let (seen, mut reader) = (Arc::new(Mutex::new(String::new())), master.try_clone().unwrap());
        let shown = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Self { master, child, seen }
    }

    async fn type_until(&self, keys: &str, text: &str) {
        (&self.master).write_all(keys.as_bytes()).unwrap();
        eventually(|| self.seen.lock().unwrap().contains(text)).await;
    }
}

#[tokio::test]
async fn a_shell_on_a_terminal_has_its_size_and_its_keys() {
    let Some(tool) = tool() else { return };
    let containerd = Containerd::start_with("tools-tty", "console=on").await;
    containerd.run("exec sleep 1000").await;
    let size = |ws_row, ws_col| Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    let mut terminal = Terminal::spawn(&tool, &["exec", &containerd.id()], size(31, 71));
    terminal.type_until("stty size\n", "31 71").await;
    let changed = size(41, 81);
    // SAFETY: TIOCSWINSZ reads a winsize, which lives through the call.
    let set = unsafe { libc::ioctl(terminal.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const changed) };
    assert_eq!(set, 0);
    let wait = "until [ \"$(stty size)\" = '41 81' ]; do sleep 0.1; done; echo now it $((40 + 2))\n";
    terminal.type_until(wait, "now it 42").await;
    // Ctrl-C is the shell's.
    terminal.type_until("echo begins $((1 + 1)); sleep 1000\n", "begins 2").await;
    terminal.type_until("\x03echo still $((40 + 3))\n", "still 43").await;
    let raw = tcgetattr(&terminal.master).unwrap().local_flags;
    assert!(!raw.contains(LocalFlags::ICANON));
    (&terminal.master).write_all(b"exit 9\n").unwrap();
    let status = terminal.child.wait().unwrap();
    assert_eq!(status.code(), Some(9));
    assert!(tcgetattr(&terminal.master).unwrap().local_flags.contains(LocalFlags::ICANON), "as it was");
    containerd.end().await;
}

#[tokio::test]
async fn a_process_ends_with_the_tool() {
    let Some(tool) = tool() else { return };
    let containerd = Containerd::start_with("tools-end", "console=on").await;
    let id = containerd.id();
    containerd.run("exec sleep 1000").await;
    let seconds = format!("{}", 100_000 + std::process::id());
    let script = format!("sleep {seconds} & echo started; exec sleep {seconds}");
    let count = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| *line == format!("sleep\0{seconds}\0").as_bytes()).count()
    };
    for (options, left) in [(vec![id.as_str()], 0), (vec!["-c", &id, &id], 1)] {
        let words = [&["exec"], &options[..], &["sh", "-c", &script]].concat();
        let mut child = Command::new(&tool).args(words).stdout(Stdio::null()).spawn().unwrap();
        eventually(|| count() == 2).await;
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        // In a container only the process itself, as when containerd ends an exec.
        eventually(|| count() == left).await;
    }
    containerd.end().await;
}

#[tokio::test]
async fn an_agent_that_hangs_is_named_at_once() {
    let Some(tool) = tool() else { return };
    let containerd = Containerd::start_with("tools-hangs", "console=on").await;
    let id = containerd.id();
    containerd.run("exec sleep 1000").await;
    let agent = agent_of(containerd.state("").await.unwrap().pid);
    kill(agent, Signal::SIGSTOP).unwrap();
    for words in [&["exec", &id, "true"][..], &["cp", &format!("{id}:/etc"), "/nowhere"]] {
        let start = Instant::now();
        let output = parts(&run(&tool, words, b"").await);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert!(output.2.ends_with(&format!("the agent of pod {id} does not answer\n")), "{}", output.2);
    }
    kill(agent, Signal::SIGCONT).unwrap();
    assert_eq!(parts(&run(&tool, &["exec", &id, "true"], b"").await).0, 0);
    containerd.end().await;
}

#[tokio::test]
async fn files_come_and_go() {
    let Some(tool) = tool() else { return };
    let containerd = Containerd::start("tools-cp").await;
    let id = containerd.id();
    let script = "mkdir /tmp/in; ln -s /.. /tmp/up; echo mine > /tmp/small; exec sleep 1000";
    containerd.run(script).await;
    let there = |path: &str| format!("{id}:{path}");
    let here = containerd.bundle().with_file_name("here");
    fs::create_dir(&here).unwrap();
    let (large, back) = (here.join("large"), here.join("back"));
    fs::write(&large, noise(5 << 20)).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let nothing = (0, String::new(), String::new());
    eventually(|| {
        let words = ["cp", &there("/tmp/small"), &path(&back)];
        Command::new(&tool).args(words).output().unwrap().status.success()
    })
    .await;
    assert_eq!(fs::read_to_string(&back).unwrap(), "mine\n");
    assert_eq!(parts(&run(&tool, &["cp", &path(&here), &there("/tmp/in")], b"").await), nothing);
    assert_eq!(parts(&run(&tool, &["cp", &there("tmp/in/here/large"), &path(&back)], b"").await), nothing);
    assert!(fs::read(&back).unwrap() == noise(5 << 20));
    let archive = run(&tool, &["cp", &there("/tmp/in/here"), "-"], b"").await;
    assert!(archive.status.success() && archive.stdout.len() > 5 << 20);
    let target = format!("{id}/{id}:/tmp");
    assert_eq!(parts(&run(&tool, &["cp", "-", &target], &archive.stdout).await), nothing);
    let none = parts(&run(&tool, &["cp", &there("/none"), &path(&here)], b"").await);
    assert_eq!(none, (1, String::new(), "kata-runtime cp: /none: No such file or directory\n".to_owned()));
    let text = "kata-runtime cp: /tmp/none/: there is no such directory\n".to_owned();
    let none = parts(&run(&tool, &["cp", &path(&large), &there("/tmp/none/")], b"").await);
    assert_eq!(none, (1, String::new(), text));
    let none = parts(&run(&tool, &["cp", "/no/such", &there("/tmp")], b"").await);
    assert_eq!(none.2, "kata-runtime cp: /no/such: No such file or directory\n");
    containerd.kill("", 9).await.unwrap();
    containerd.wait("").await;
    let ended = parts(&run(&tool, &["cp", &there("/tmp"), &path(&here)], b"").await);
    assert_eq!(ended.2, format!("kata-runtime cp: no container of pod {id} runs\n"));
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
}
