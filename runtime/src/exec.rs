//! `kata-runtime exec`: a program in a pod's guest, or in one of its containers.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::thread::{self, JoinHandle};

use clap::Args;
use katana_protocol::manage::exec::{Exec, Program, Run};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::session::{self, Session};
use crate::terminal::{self, Raw};

/// Exit code when the process does not come about, as Docker's.
const FAILED: u8 = 125;

/// Why the process does not come about, or is not followed to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime exec: {0}")]
    Session(#[from] session::Error),
    #[error("kata-runtime exec: {0}")]
    Host(#[from] io::Error),
    #[error("kata-runtime exec: cannot write the output: {0}")]
    Output(io::Error),
}

impl Error {
    /// The exit code that says so.
    pub fn code(&self) -> u8 {
        match self {
            Self::Session(error) => error.code().unwrap_or(FAILED),
            Self::Host(_) | Self::Output(_) => FAILED,
        }
    }
}

/// The options of `exec`.
#[derive(Args)]
pub struct Options {
    /// Run it in this container of the pod, named as Kubernetes names it or by the beginning of its id, instead of in the
    /// guest itself
    #[arg(short, long)]
    container: Option<String>,
    /// Pass on standard input; not needed for a shell and on a terminal
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal; not needed on one
    #[arg(short, long)]
    tty: bool,
    /// Its working directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// A variable for it
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The pod, by its id or the beginning of it
    pod: String,
    /// The command; a shell without
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs it; the exit code is the command's.
pub fn run(options: Options) -> Result<ExitCode, Error> {
    let status = crate::block_on(follow(options))??;
    Ok(ExitCode::from(status))
}

async fn follow(options: Options) -> Result<u8, Error> {
    let (pod, containers) = session::find(&options.pod).await?;
    let name = options.container.as_deref();
    let container = name.map(|name| session::choose(&pod.id, &containers, Some(name))).transpose()?;
    let session = Session::open(pod)?;
    let terminal = options.tty || terminal::is_interactive();
    let input = (terminal || options.interactive || options.command.is_empty()).then(|| session.input());
    let input = input.transpose()?;
    let output = session.output("stdout")?;
    let errors = (!terminal).then(|| session.output("stderr")).transpose()?;
    let mut env = options.env;
    if let Some(kind) = std::env::var("TERM").ok().filter(|_| terminal) {
        env.insert(0, format!("TERM={kind}"));
    }
    let program =
        Program { args: options.command, cwd: options.workdir, env, terminal: terminal.then(terminal::size) };
    let exec = Exec {
        id: session.id.clone(),
        container,
        run: Run::Program(program),
        stdin: input.as_ref().map(|input| input.path.clone()),
        stdout: Some(output.path.clone()),
        stderr: errors.as_ref().map(|errors| errors.path.clone()),
    };
    let raw = terminal.then(Raw::begin).transpose()?;
    let _keep = input.map(|input| {
        // What the process does not read is nobody's.
        copy(io::stdin(), input.writer, |_| ());
        input.keep
    });
    let (broken, mut is_broken) = mpsc::unbounded_channel();
    let say = |broken: &UnboundedSender<_>| {
        let broken = broken.clone();
        move |e| drop(broken.send(e))
    };
    let mut kept = vec![output.keep];
    let mut copies = vec![copy(output.reader, io::stdout(), say(&broken))];
    if let Some(errors) = errors {
        kept.push(errors.keep);
        copies.push(copy(errors.reader, io::stderr(), say(&broken)));
    }
    let status = tokio::select! {
        status = session.run(&exec) => status.map_err(Error::from),
        Some(e) = is_broken.recv() => Err(Error::Output(e)),
        never = resize(&session), if terminal => never,
    };
    drop(kept);
    if status.is_ok() {
        // The shim has handed over all of it.
        copies.into_iter().for_each(|copy| drop(copy.join()));
    }
    drop(raw);
    status
}

/// Copies on a thread of its own, which ends with the program if it does not end before. What cannot be written is
/// passed on.
fn copy(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    failed: impl FnOnce(io::Error) + Send + 'static,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 32 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Err(e) = to.write_all(bytes).and_then(|()| to.flush()) {
                return failed(e);
            }
        }
    })
}

/// Follows the size of the terminal.
async fn resize<T>(session: &Session) -> T {
    if let Ok(mut changed) = signal(SignalKind::window_change()) {
        while changed.recv().await.is_some() {
            session.resize(terminal::size()).await;
        }
    }
    std::future::pending().await
}
