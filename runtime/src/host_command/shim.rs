//! A shim that this process starts in containerd's place, and the one container that it runs.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, KillRequest, ResizePtyRequest, ShutdownRequest,
    StartRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::mount::Mount;
use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

/// The name of the shim's program, in the directory of this one.
const PROGRAM: &str = "containerd-shim-kata-v2";
/// In place of a containerd's: it is part of what the pod is known by.
pub const NAMESPACE: &str = "kata-runtime";
/// How long a start may take, and an end.
const LIMIT: Duration = Duration::from_secs(120);

/// Why a command could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: {1}")]
    Io(String, io::Error),
    #[error("the shim: {0}")]
    Start(String),
    /// In the shim's words.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// What failed.
    pub fn io(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |e| Self::Io(what.to_string(), e)
    }
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        Self::Refused(match error {
            ttrpc::Error::RpcStatus(status) => status.message,
            other => other.to_string(),
        })
    }
}

/// The paths of the command's streams; empty for none.
#[derive(Debug, Default)]
pub struct Paths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// The shim. It ends with this process, whatever happens.
#[derive(Clone)]
pub struct Shim {
    id: String,
    client: TaskClient,
}

fn limit() -> Context {
    with_duration(LIMIT)
}

impl Shim {
    /// Starts it. Blocks.
    pub fn start(bundle: &Path) -> Result<Self, Error> {
        let id = format!("do-{}", std::process::id());
        let program = program().map_err(Error::io("this program's path"))?;
        let started = Command::new(&program)
            .args(["-namespace", NAMESPACE, "-id", &id, "-address", &bundle.display().to_string()])
            .args(["-publish-binary", "", "start"])
            .env("TTRPC_ADDRESS", "")
            .current_dir(bundle)
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io(program.display()))?;
        if !started.status.success() {
            return Err(Error::Start(String::from_utf8_lossy(&started.stderr).trim().to_owned()));
        }
        let address = String::from_utf8_lossy(&started.stdout).trim().to_owned();
        let path = address.strip_prefix("unix://").unwrap_or(&address);
        let connected = std::os::unix::net::UnixStream::connect(path).and_then(Socket::try_from);
        let client = Client::new(connected.map_err(Error::io(path))?);
        Ok(Self { id, client: TaskClient::new(client) })
    }

    /// Makes the machine and the container in it, over the host's root.
    pub async fn create(&self, bundle: &Path, config: Option<&Path>, paths: &Paths) -> Result<(), Error> {
        let root = Mount {
            type_: "bind".into(),
            source: "/".into(),
            options: vec!["bind".into(), "ro".into()],
            ..Default::default()
        };
        let options = config.map(configuration).transpose();
        let options = options.map_err(|e| Error::Refused(e.to_string()))?;
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.display().to_string(),
            rootfs: vec![root],
            options: options.into(),
            terminal: paths.terminal,
            stdin: paths.stdin.clone(),
            stdout: paths.stdout.clone(),
            stderr: paths.stderr.clone(),
            ..Default::default()
        };
        self.client.create(limit(), &request).await?;
        Ok(())
    }

    /// Runs the command.
    pub async fn run(&self) -> Result<(), Error> {
        self.client.start(limit(), &StartRequest { id: self.id.clone(), ..Default::default() }).await?;
        Ok(())
    }

    /// Waits for its end; the answer is its exit code.
    pub async fn wait(&self) -> Result<u32, Error> {
        let request = WaitRequest { id: self.id.clone(), ..Default::default() };
        Ok(self.client.wait(Context::default(), &request).await?.exit_status)
    }

    /// Sends it a signal.
    pub async fn kill(&self, signal: u32) -> Result<(), Error> {
        let request = KillRequest { id: self.id.clone(), signal, ..Default::default() };
        self.client.kill(limit(), &request).await?;
        Ok(())
    }

    /// Its standard input has ended.
    pub async fn close_stdin(&self) -> Result<(), Error> {
        let request = CloseIORequest { id: self.id.clone(), stdin: true, ..Default::default() };
        self.client.close_io(limit(), &request).await?;
        Ok(())
    }

    /// Its terminal has another size.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), Error> {
        let (width, height) = (columns.into(), rows.into());
        let request = ResizePtyRequest { id: self.id.clone(), width, height, ..Default::default() };
        self.client.resize_pty(limit(), &request).await?;
        Ok(())
    }

    /// Ends the machine and the shim.
    pub async fn end(&self) -> Result<(), Error> {
        let id = self.id.clone();
        self.client.delete(limit(), &DeleteRequest { id: id.clone(), ..Default::default() }).await?;
        self.client.shutdown(limit(), &ShutdownRequest { id, ..Default::default() }).await?;
        Ok(())
    }
}

/// `runtimeoptions.v1.Options` with a ConfigPath, its field 2.
fn configuration(path: &Path) -> protobuf::Result<Any> {
    let mut value = Vec::new();
    let mut message = CodedOutputStream::vec(&mut value);
    message.write_string(2, &path.display().to_string())?;
    message.flush()?;
    drop(message);
    Ok(Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() })
}

/// The shim of this installation.
fn program() -> io::Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name(PROGRAM);
    Ok(if beside.exists() { beside } else { PathBuf::from(PROGRAM) })
}
