//! The hooks of a specification that run on the host (runtime-spec, "POSIX-platform Hooks").

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::json;

use crate::error::{Error, Result, one_line};
use crate::host::fds;
use crate::host::pidfd::PidFd;
use crate::spec::{Hook, Spec};

/// A hook without a limit of its own must not hold a container for ever.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);
/// The most that is shown of what a hook says, bytes.
const MOST_SAID: usize = 4096;

/// A container's state as hooks read it from their standard input.
pub struct State<'a> {
    /// The container.
    pub id: &'a str,
    /// "creating", "created", "running" or "stopped".
    pub status: &'a str,
    /// A process of the host.
    pub pid: i32,
    /// The bundle.
    pub bundle: &'a Path,
    /// For its annotations.
    pub spec: &'a Spec,
}

/// Runs hooks in order up to the first that fails. Blocks.
pub fn run(hooks: &[Hook], state: &State<'_>) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = json!({
        "ociVersion": state.spec.rest.get("ociVersion"), "id": state.id, "status": state.status, "pid": state.pid,
        "bundle": state.bundle, "annotations": state.spec.annotations,
    });
    let state = state.to_string();
    hooks.iter().enumerate().try_for_each(|(number, hook)| {
        run_one(hook, &state).map_err(|why| {
            Error::Host(format!("error running hook #{number}: {} {why}", hook.path.display()))
        })
    })
}

fn run_one(hook: &Hook, state: &str) -> std::result::Result<(), String> {
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = hook.args.split_first() {
        command.arg0(name).args(arguments);
    }
    let environment = hook.env.iter().filter_map(|variable| variable.split_once('='));
    command.env_clear().envs(environment).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    fds::usual_limit(&mut command);
    let why = |e: std::io::Error| crate::error::reason(&e);
    let mut child = command.spawn().map_err(why)?;
    let process = PidFd::of_child(&mut child).map_err(why)?;
    // More seconds than a clock can count are as good as none.
    let limit = hook.timeout.map_or(DEFAULT_LIMIT, |limit| Duration::from_secs(limit.min(u32::MAX.into())));
    let end = Instant::now() + limit;
    let ended = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&ended);
    let listen = |stderr| std::thread::Builder::new().spawn(move || tail(stderr, &ends));
    let stderr = match child.stderr.take().map(listen).transpose() {
        Ok(stderr) => stderr,
        Err(e) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(why(e));
        }
    };
    if let Some(stdin) = child.stdin.take() {
        feed(stdin, state.as_bytes(), &process, end);
    }
    let in_time = process.wait(end.saturating_duration_since(Instant::now()));
    if !in_time {
        process.kill();
    }
    let status = child.wait().map_err(why);
    ended.store(true, Ordering::Relaxed);
    let status = status?;
    if !in_time {
        return Err(format!("did not end within {} s", limit.as_secs()));
    }
    if status.success() {
        return Ok(());
    }
    let said = stderr.and_then(|thread| thread.join().ok()).unwrap_or_default();
    Err(format!("{status}, stderr: {}", one_line(&said)))
}

/// Gives a hook its input, which it need not read, until the hook or its time has ended.
fn feed(mut stdin: ChildStdin, mut state: &[u8], process: &PidFd, end: Instant) {
    if fcntl(&stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_err() {
        return;
    }
    while !state.is_empty() {
        match stdin.write(state) {
            Ok(length) => state = state.get(length..).unwrap_or_default(),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() || !may_be_written(&stdin, process, left) {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Waits until there is room for more of a hook's input; false once the hook has ended, whoever else holds its input.
fn may_be_written(stdin: &ChildStdin, process: &PidFd, limit: Duration) -> bool {
    let wanted = |fd: BorrowedFd<'_>, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let mut fds = [wanted(stdin.as_fd(), libc::POLLOUT), wanted(process.as_fd(), libc::POLLIN)];
    let timeout = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: two pollfds that outlive the call.
    let _ = unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) };
    let [_, ended] = fds;
    ended.revents == 0
}

/// What a hook says, the first 4 KiB of it. A hook that goes on must not find its standard error closed: SIGPIPE would
/// end it. After its end, a process that it left behind may hold the pipe, so reading ends after a while.
fn tail(mut stderr: impl Read + AsFd, ended: &AtomicBool) -> String {
    let mut said = Vec::new();
    let mut piece = [0; MOST_SAID];
    loop {
        let fd = stderr.as_fd().as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that outlives the call.
        let silent = unsafe { libc::poll(&raw mut poll, 1, 1000) } <= 0;
        if ended.load(Ordering::Relaxed) && (silent || said.len() == MOST_SAID) {
            break;
        }
        if silent {
            continue;
        }
        match stderr.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                let room = MOST_SAID - said.len();
                said.extend(piece.iter().take(count.min(room)));
            }
        }
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Option<u64>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["A=b".into()], timeout }
    }

    fn try_run(hook: Hook) -> Result<()> {
        try_run_for(&Spec::default(), hook)
    }

    fn try_run_for(spec: &Spec, hook: Hook) -> Result<()> {
        let state = State { id: "c1", status: "creating", pid: 7, bundle: Path::new("/b"), spec };
        run(&[hook], &state)
    }

    #[test]
    fn hooks_get_the_state_and_their_failures_are_reported() {
        let check = "read s; case $s in *'\"id\":\"c1\"'*'\"pid\":7'*) [ $A = b ];; *) exit 9;; esac";
        try_run(shell(check, None)).unwrap();
        let error = try_run(shell("echo bad thing >&2; exit 3", None)).unwrap_err().to_string();
        assert_eq!(error, "error running hook #0: /bin/sh exit status: 3, stderr: bad thing");
        let error = try_run(shell("exec sleep 100", Some(0))).unwrap_err().to_string();
        assert_eq!(error, "error running hook #0: /bin/sh did not end within 0 s");
        let error = try_run(Hook { path: "/nowhere".into(), ..Hook::default() }).unwrap_err().to_string();
        assert_eq!(error, "error running hook #0: /nowhere No such file or directory");
    }

    #[test]
    fn more_state_than_a_pipe_holds_counts_in_the_limit() {
        let annotations = [("a".into(), "x".repeat(200 << 10))].into();
        let spec = Spec { annotations, ..Spec::default() };
        try_run_for(&spec, shell("s=$(cat); [ ${#s} -gt 204800 ]", None)).unwrap();
        // Read in part, or not at all.
        try_run_for(&spec, shell("head -c 100000 >/dev/null", None)).unwrap();
        try_run_for(&spec, shell("exit 0", None)).unwrap();
        let error = try_run_for(&spec, shell("exec sleep 100", Some(1))).unwrap_err().to_string();
        assert_eq!(error, "error running hook #0: /bin/sh did not end within 1 s");
    }

    #[test]
    fn a_hook_that_cannot_be_watched_does_not_run_on() {
        use without::without;
        mod without {
            include!("../../../protocol/src/kernel/without.rs");
        }
        without("pidfd_open", || {
            let error = try_run(shell("exec sleep 100", None)).unwrap_err().to_string();
            assert!(error.contains("pidfd_open"), "{error}");
            assert_eq!(std::fs::read_to_string("/proc/thread-self/children").unwrap(), "");
        });
    }

    #[test]
    fn a_hook_may_say_much_and_late() {
        try_run(shell("seq 20000 >&2 && sleep 2 && echo late >&2", None)).unwrap();
        let error = try_run(shell("sleep 2; echo late >&2; exit 3", None)).unwrap_err().to_string();
        assert_eq!(error, "error running hook #0: /bin/sh exit status: 3, stderr: late");
    }
}
