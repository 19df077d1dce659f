//! `kata-runtime exec`: a program in a pod's guest, or in one of its containers.

use std::io;
use std::process::ExitCode;

use clap::Args;
use katana_protocol::manage::exec::{Exec, Program, Run};

use crate::session::{self, Session};
use crate::streams::Attached;
use crate::terminal;

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
    let reads = terminal || options.interactive || options.command.is_empty();
    let streams = Attached::open(session.directory(), reads, terminal).map_err(session::Error::from)?;
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
        stdin: streams.stdin.as_ref().map(|input| input.path.clone()),
        stdout: Some(streams.stdout.path.clone()),
        stderr: streams.stderr.as_ref().map(|errors| errors.path.clone()),
    };
    let followed = streams.follow(session.run(&exec), async |size| session.resize(size).await).await;
    Ok(followed.map_err(Error::Output)??)
}
