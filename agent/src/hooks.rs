//! Hooks of the stages that happen in the guest (runtime-spec, config.md, "POSIX-platform Hooks"): programs that get
//! the container's state as JSON on standard input.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{ContainerState, Hook, Hooks, Spec, StateBuilder};
use std::os::fd::AsFd;

use crate::syscalls::open_process;

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In the container's namespaces, before its root is entered.
    CreateContainer,
    /// In the container, before its program starts.
    StartContainer,
    /// In the guest, after that.
    Poststart,
    /// In the guest, after the container is removed.
    Poststop,
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be run.
    #[error("error running {stage} hook #{number}: {path}: {source}")]
    Run {
        /// When.
        stage: &'static str,
        /// Which, from 0.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    fn status(self) -> ContainerState {
        match self {
            Self::CreateContainer => ContainerState::Creating,
            Self::StartContainer => ContainerState::Created,
            Self::Poststart => ContainerState::Running,
            Self::Poststop => ContainerState::Stopped,
        }
    }

    /// The hooks of this stage.
    pub fn of(self, hooks: Option<&Hooks>) -> &[Hook] {
        let list = hooks.and_then(|hooks| match self {
            Self::CreateContainer => hooks.create_container().as_deref(),
            Self::StartContainer => hooks.start_container().as_deref(),
            Self::Poststart => hooks.poststart().as_deref(),
            Self::Poststop => hooks.poststop().as_deref(),
        });
        list.unwrap_or_default()
    }

    /// An error of the hook with this number.
    pub fn error(self, number: usize, hook: &Hook, source: io::Error) -> Error {
        Error::Run { stage: self.name(), number, path: hook.path().clone(), source }
    }
}

/// The container's state as JSON (runtime-spec, runtime.md, "State").
pub fn state(stage: Stage, id: &str, spec: &Spec, pid: Option<i32>) -> Vec<u8> {
    let root = spec.root().as_ref().map(|root| root.path().as_path());
    let bundle = root.and_then(Path::parent).unwrap_or(Path::new("/"));
    let mut state =
        StateBuilder::default().version(spec.version().as_str()).id(id).status(stage.status()).bundle(bundle);
    if let Some(pid) = pid {
        state = state.pid(pid);
    }
    if let Some(annotations) = spec.annotations() {
        state = state.annotations(annotations.clone());
    }
    state.build().ok().and_then(|state| serde_json::to_vec(&state).ok()).unwrap_or_default()
}

/// Starts a hook and gives it the state.
pub fn start(hook: &Hook, state: &[u8]) -> io::Result<Child> {
    let mut command = Command::new(hook.path());
    let arguments = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    let variables = hook.env().iter().flatten().filter_map(|variable| variable.split_once('='));
    command.env_clear().envs(variables).stdin(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state);
    }
    Ok(child)
}

/// How long a hook may take.
pub fn timeout(hook: &Hook) -> Option<Duration> {
    hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|s| *s > 0).map(Duration::from_secs)
}

/// Runs the hooks of a stage one after the other, in a process that has nothing else to do.
pub fn run(stage: Stage, id: &str, spec: &Spec, pid: Option<i32>) -> Result<(), Error> {
    for (number, hook) in stage.of(spec.hooks().as_ref()).iter().enumerate() {
        let ended = start(hook, &state(stage, id, spec, pid)).and_then(|mut child| {
            wait_at_most(&mut child, timeout(hook))?;
            child.wait()
        });
        match ended {
            Ok(status) if status.success() => (),
            Ok(status) => return Err(stage.error(number, hook, io::Error::other(status.to_string()))),
            Err(error) => return Err(stage.error(number, hook, error)),
        }
    }
    Ok(())
}

fn wait_at_most(child: &mut Child, timeout: Option<Duration>) -> io::Result<()> {
    let Some(timeout) = timeout else { return Ok(()) };
    let process = open_process(child.id().cast_signed())?;
    let timeout_ms = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout_ms)? == 0 {
        child.kill()?;
        child.wait()?;
        return Err(io::Error::other(format!("did not end within {} s", timeout.as_secs())));
    }
    Ok(())
}
