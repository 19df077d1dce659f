//! `kata-runtime do`: a command of the host in a fresh machine, over the host's root, read-only.

mod bundle;
mod shim;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use katana_protocol::manage::exec::Size;
use nix::libc::SIGKILL;

use self::bundle::Bundle;
use self::shim::{Paths, Shim};
use crate::signals;
use crate::streams::{self, Attached};
use crate::terminal;

/// How long a killed command may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What to run, and with what.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Environment variable, NAME=VALUE
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Memory of the command, MiB
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Processors
    #[arg(long)]
    cpus: Option<u8>,
    /// Directory or file of the host that the command can change: SOURCE:TARGET, or SOURCE:TARGET:ro to only see it there
    #[arg(long = "volume", value_name = "SOURCE:TARGET", value_parser = Volume::parse)]
    volumes: Vec<Volume>,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Volume {
    source: PathBuf,
    target: PathBuf,
    writable: bool,
}

impl Volume {
    fn parse(text: &str) -> Result<Self, String> {
        let (paths, writable) = match text.strip_suffix(":ro") {
            Some(paths) => (paths, false),
            None => (text.strip_suffix(":rw").unwrap_or(text), true),
        };
        let (source, target) = paths.split_once(':').ok_or("must be SOURCE:TARGET")?;
        let (source, target) = (PathBuf::from(source), PathBuf::from(target));
        if !source.is_absolute() || !target.is_absolute() {
            return Err("must be two absolute paths".into());
        }
        Ok(Self { source, target, writable })
    }
}

/// Exit code when the command does not come about, as Docker's.
const FAILED: u8 = 125;

/// Why the command does not come about, or is not followed to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime do: {0}")]
    Shim(#[from] shim::Error),
    #[error("kata-runtime do: {0}")]
    Stream(#[from] streams::Error),
    #[error("kata-runtime do: {0}: {1}")]
    Host(&'static str, io::Error),
    /// The user does not want it any more.
    #[error("kata-runtime do: ended by {0}")]
    Signal(&'static str, u8),
}

impl Error {
    /// The exit code that says so.
    pub fn code(&self) -> u8 {
        match self {
            Self::Signal(_, number) => 128 + number,
            _ => FAILED,
        }
    }
}

/// Runs it; the exit code is the command's.
pub fn run(options: &Options, config: Option<&Path>) -> Result<ExitCode, Error> {
    let directory = std::env::current_dir().map_err(|e| Error::Host("the working directory", e))?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| Error::Host("mountinfo", e))?;
    let terminal = terminal::is_interactive();
    let specification = bundle::specification(options, &directory, &mounts, terminal);
    let bundle = Bundle::create(&specification).map_err(|e| Error::Host("the bundle", e))?;
    let streams = Attached::open(&bundle.path, true, terminal)?;
    let status = crate::block_on(follow(&bundle, config, streams, terminal));
    Ok(ExitCode::from(status.map_err(|e| Error::Host("the runtime", e))??))
}

async fn follow(
    bundle: &Bundle,
    config: Option<&Path>,
    streams: Attached,
    terminal: bool,
) -> Result<u8, Error> {
    let shim = Shim::start(&bundle.path)?;
    let path = |output: &streams::Output| output.path.clone();
    let paths = Paths {
        stdin: streams.stdin.as_ref().map(|input| input.path.clone()).unwrap_or_default(),
        stdout: path(&streams.stdout),
        stderr: streams.stderr.as_ref().map(path).unwrap_or_default(),
        terminal,
    };
    let work = async {
        tokio::select! {
            status = work(&shim, bundle, config, &paths, terminal) => status,
            (name, number) = signals::ending() => Err(Error::Signal(name, number)),
        }
    };
    let resized = async |size: Size| {
        // A command that has not started or has ended needs it not.
        let _ = shim.resize(size.columns, size.rows).await;
    };
    let status = match streams.follow(work, resized).await {
        Ok(status) => status,
        Err(e) => Err(Error::Host("cannot write the output", e)),
    };
    if status.is_err() {
        // It may not have been created, or have ended.
        let _ = shim.kill(SIGKILL.unsigned_abs()).await;
        let _ = tokio::time::timeout(END_LIMIT, shim.wait()).await;
    }
    let ended = shim.end().await;
    let status = status?;
    ended?;
    Ok(status)
}

async fn work(
    shim: &Shim,
    bundle: &Bundle,
    config: Option<&Path>,
    paths: &Paths,
    terminal: bool,
) -> Result<u8, Error> {
    shim.create(&bundle.path, config, paths).await?;
    if terminal {
        let size = terminal::size();
        shim.resize(size.columns, size.rows).await?;
    }
    shim.run().await?;
    // Its end is this program's to say: the shim has the FIFO open for writing as well until then.
    shim.close_stdin().await?;
    Ok(u8::try_from(shim.wait().await?).unwrap_or(u8::MAX))
}
