//! Standard streams through the shim and the agent.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread;

use containerd_shim_protos::api::{CloseIORequest, PidsRequest, ResizePtyRequest, StartRequest, Status};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::containerd::{Containerd, can_run, code_and_text, ctx};
use crate::silent::{starts, stop_agent_of};

fn fifo(containerd: &Containerd, name: &str) -> (PathBuf, String) {
    let path = containerd.directory.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

/// What a client reads from a FIFO up to its end. As containerd does, it opens the FIFO before the shim can: a process
/// that has ended by then would leave a FIFO without a writer, whose opening waits for ever.
fn reader(path: PathBuf) -> thread::JoinHandle<Vec<u8>> {
    let mut fifo = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    thread::spawn(move || {
        // Until there is a writer, or one has come and gone.
        poll(&mut [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        fcntl(&fifo, FcntlArg::F_SETFL(OFlag::O_RDONLY)).unwrap();
        let mut bytes = Vec::new();
        fifo.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

async fn joined<T: Send + 'static>(thread: thread::JoinHandle<T>) -> T {
    tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap()
}

#[tokio::test]
async fn thirty_two_mebibytes_in_and_out() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("cat").await;
    containerd.configure_container(&json!({"process": {"args": ["cat"]}}));
    let ((stdin, stdin_path), (stdout, stdout_path)) = (fifo(&containerd, "in"), fifo(&containerd, "fifo"));
    let mut request = containerd.create_request();
    (request.stdin, request.stdout) = (stdin_path, stdout_path);
    let reader = reader(stdout);
    containerd.client.create(ctx(), &request).await.unwrap();
    containerd
        .client
        .start(ctx(), &StartRequest { id: containerd.id(), ..Default::default() })
        .await
        .unwrap();
    let data: Vec<u8> =
        (0..32_u32 << 20).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let copy = data.clone();
    joined(thread::spawn(move || File::options().write(true).open(stdin).unwrap().write_all(&copy).unwrap()))
        .await;
    let close = CloseIORequest { id: containerd.id(), stdin: true, ..Default::default() };
    containerd.client.close_io(ctx(), &close).await.unwrap();
    assert_eq!(containerd.wait("").await, 0);
    assert!(joined(reader).await == data);
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
}

/// All output is in the FIFO before Wait answers, every time.
#[tokio::test]
async fn the_last_bytes_arrive_before_the_exit() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("last").await;
    containerd.run("exec sleep 1000").await;
    for round in 0..5 {
        let script = "i=0; while [ $i -lt 20000 ]; do echo 0123456789abcdef; i=$((i+1)); done; echo last";
        let exec = format!("f{round}");
        containerd.exec(&exec, script).await.unwrap();
        assert_eq!(containerd.wait(&exec).await, 0);
        let text = containerd.file(&exec);
        assert!(text.len() == 20_000 * 17 + 5 && text.ends_with("\nlast\n"), "{}", text.len());
    }
    containerd.end().await;
}

#[tokio::test]
async fn a_terminal_and_its_size() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("terminal").await;
    containerd.run("exec sleep 1000").await;
    let (stdout, path) = fifo(&containerd, "tty");
    let process = json!({"args": ["sh", "-c", "stty size; [ -t 0 ] && echo terminal"], "cwd": "/", "terminal": true,
        "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let mut request = containerd.exec_request("t", &process);
    (request.terminal, request.stdout) = (true, path);
    let reader = reader(stdout);
    containerd.client.exec(ctx(), &request).await.unwrap();
    let size = ResizePtyRequest {
        id: containerd.id(),
        exec_id: "t".into(),
        width: 101,
        height: 37,
        ..Default::default()
    };
    containerd.client.resize_pty(ctx(), &size).await.unwrap();
    containerd.start_exec("t").await.unwrap();
    assert_eq!(containerd.wait("t").await, 0);
    let text = String::from_utf8(joined(reader).await).unwrap();
    assert_eq!(text, "37 101\r\nterminal\r\n");
    containerd.end().await;
}

/// `echo hello | ctr task exec` asks for CloseIO before it asks for Start.
#[tokio::test]
async fn input_may_be_closed_before_the_start() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("early").await;
    containerd.run("exec sleep 1000").await;
    let (stdin, stdin_path) = fifo(&containerd, "in");
    let process = json!({"args": ["cat"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let mut request = containerd.exec_request("e", &process);
    request.stdin = stdin_path;
    containerd.client.exec(ctx(), &request).await.unwrap();
    // Opened for both, it need not wait for the shim, which must not come first: it would see the end at once.
    let mut writer = File::options().read(true).write(true).open(stdin).unwrap();
    writer.write_all(b"hello").unwrap();
    let close =
        CloseIORequest { id: containerd.id(), exec_id: "e".into(), stdin: true, ..Default::default() };
    containerd.client.close_io(ctx(), &close).await.unwrap();
    containerd.start_exec("e").await.unwrap();
    drop(writer);
    assert_eq!(containerd.wait("e").await, 0);
    assert_eq!(containerd.file("e"), "hello");
    containerd.end().await;
}

/// Its program must not run without its output, and no other of the container ends with it.
#[tokio::test]
async fn an_exec_whose_stream_is_lost_ends_alone() {
    if !can_run() {
        return;
    }
    // The third stream of the pod.
    let containerd = Containerd::start_with("lost", "lose=2").await;
    containerd.run("exec sleep 1000").await;
    let (_, text) = code_and_text(containerd.exec("e", "exec sleep 1001").await.unwrap_err());
    assert_eq!(text, "connection of the guest: Too many open files");
    containerd.exec("f", "exec sleep 1002").await.unwrap();
    assert_eq!(containerd.state("").await.unwrap().status(), Status::RUNNING);
    let request = PidsRequest { id: containerd.id(), ..Default::default() };
    assert_eq!(containerd.client.pids(ctx(), &request).await.unwrap().processes.len(), 2);
    containerd.delete("e").await.unwrap();
    containerd.kill("", 9).await.unwrap();
    assert_eq!((containerd.wait("").await, containerd.wait("f").await), (137, 137));
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
    assert_eq!(containerd.traces(), Vec::<String>::new());
}

/// Nothing is left of one that has ended by then.
#[tokio::test]
async fn an_exec_that_ended_before_its_stream_was_lost_leaves_its_id() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start_with("lost-late", "lose=2,500").await;
    containerd.run("exec sleep 1000").await;
    let (_, text) = code_and_text(containerd.exec("e", "true").await.unwrap_err());
    assert_eq!(text, "connection of the guest: Too many open files");
    containerd.delete("e").await.unwrap();
    containerd.exec("e", "exit 4").await.unwrap();
    assert_eq!(containerd.wait("e").await, 4);
    containerd.end().await;
}

/// The end of its streams is no reason.
#[tokio::test]
async fn an_exec_whose_machine_ends_says_why() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("gone").await;
    containerd.run("exec sleep 1000").await;
    let machine = containerd.state("").await.unwrap().pid;
    stop_agent_of(machine).await;
    let killed = async {
        // The agent does not answer.
        starts(&containerd, "e").await;
        kill(Pid::from_raw(i32::try_from(machine).unwrap()), Signal::SIGKILL).unwrap();
    };
    let (outcome, ()) = tokio::join!(containerd.exec("e", "exec sleep 1001"), killed);
    let (_, text) = code_and_text(outcome.unwrap_err());
    // What this stand-in has printed follows.
    assert!(text.starts_with("kata-vmm was killed by SIGKILL"), "{text}");
    assert_eq!(containerd.wait("").await, 137);
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
}
