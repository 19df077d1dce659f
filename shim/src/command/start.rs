//! containerd's `start`: one shim per pod. The shim runs as a process of its own, and `start` answers with its
//! address once it serves.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, socket};
use nix::sys::stat::{Mode, fchmod};
use protobuf::well_known_types::any::Any;
use serde::Deserialize;

use super::args::Args;
use super::features;
use super::serve::{CLIENT_FD, LISTENER_FD, READY, READY_FD, TTRPC_ADDRESS};
use super::socket::{is_served, remove_socket};
use crate::error::{Error, Result};
use crate::host::fds;
use crate::host::pidfd::PidFd;
use crate::machine::layout::Identity;
use crate::pod::options::config_path;
use crate::pod::stdio::read_limited;

/// Longest input of `start`, as containerd has it.
const INPUT_MAX: u64 = 10 << 20;

/// How containerd reads the answer of `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// containerd 1.6 to 2.2: the bare address, which means task v2 over ttrpc.
    Address,
    /// A containerd that announces task v3 in the environment, or that starts a sandbox, which none does without task
    /// v3: JSON. (2.0 to 2.2 have task v3, yet announce v2.)
    Json,
    /// containerd 2.3 and later: protobuf.
    Protobuf,
}

/// What `start` was given, by whichever protocol.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    protocol: Protocol,
    address: String,
    ttrpc_address: String,
    socket_dir: Option<String>,
    /// The configuration that the runtime's options name. CreateSandbox does not repeat them, as Create does.
    config: Option<PathBuf>,
    debug: bool,
}

/// containerd's `start`.
pub fn start(args: &Args) -> Result<()> {
    let bundle = std::env::current_dir().map_err(|e| Error::io("working directory", &e))?;
    let mut request = Request::parse(args, &input()?, &|name| std::env::var(name).ok())?;
    if request.protocol == Protocol::Address && is_sandbox(&bundle) {
        request.protocol = Protocol::Json;
    }
    let sandbox = sandbox_of(&bundle, &args.id);
    let identity = Identity::new(&request.address, &args.namespace, &sandbox)?;
    // The check of the container's own id; a sandbox's comes from its annotation.
    crate::machine::layout::check_name("id", &args.id)?;
    let socket = identity.socket(request.socket_dir.as_deref());
    let address = format!("unix://{}", socket.display());
    if !is_served(&socket) {
        remove_socket(&socket);
        // Before the shim exists, so that `delete` always finds its socket.
        write_address(&bundle, &address)?;
        if let Err(e) = spawn(&request, &identity, &socket, &bundle) {
            remove_socket(&socket);
            return Err(e);
        }
    } else {
        write_address(&bundle, &address)?;
    }
    let answer = answer(&address, request.protocol)?;
    io::stdout()
        .write_all(&answer)
        .and_then(|()| io::stdout().flush())
        .map_err(|e| Error::io("standard output", &e))
}

/// containerd's input; nothing for a shim that is started by hand.
fn input() -> Result<Vec<u8>> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    read_limited(stdin.lock(), INPUT_MAX).map_err(|e| Error::io("standard input", &e))
}

impl Request {
    fn parse(args: &Args, input: &[u8], environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        if let Some(params) = bootstrap_params(args, input)? {
            return Ok(Self {
                protocol: Protocol::Protobuf,
                config: config_of(params.extensions.iter().filter_map(|extension| extension.value.as_ref()))?,
                debug: args.debug || params.log_level.value() < 0,
                address: params.containerd_grpc_address,
                ttrpc_address: params.containerd_ttrpc_address,
                socket_dir: params.socket_dir.filter(|directory| !directory.is_empty()),
            });
        }
        let version = environment("MAX_SHIM_VERSION").and_then(|version| version.parse::<u32>().ok());
        let address = Some(args.address.clone()).filter(|address| !address.is_empty());
        Ok(Self {
            protocol: if version.is_some_and(|version| version >= 3) {
                Protocol::Json
            } else {
                Protocol::Address
            },
            address: address.or_else(|| environment("GRPC_ADDRESS")).unwrap_or_default(),
            ttrpc_address: environment(TTRPC_ADDRESS).ok_or_else(|| {
                Error::InvalidArgument(format!("{TTRPC_ADDRESS} is not set in the environment"))
            })?,
            socket_dir: None,
            // Whatever else is on standard input is not for us.
            config: config_of(Any::parse_from_bytes(input).ok().as_ref())?,
            debug: args.debug,
        })
    }
}

/// The parameters of containerd 2.3 and later. Older ones send runtime options or nothing: an Any, which
/// parses as parameters as well, but then they are not for this container.
fn bootstrap_params(args: &Args, input: &[u8]) -> Result<Option<BootstrapParams>> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.containerd_ttrpc_address.is_empty() {
        return Ok(None);
    }
    if params.instance_id == args.id && params.namespace == args.namespace {
        return Ok(Some(params));
    }
    let text = format!("bootstrap parameters are for {}/{}", params.namespace, params.instance_id);
    Err(Error::InvalidArgument(text))
}

/// The first configuration that is named.
fn config_of<'a>(options: impl IntoIterator<Item = &'a Any>) -> Result<Option<PathBuf>> {
    options.into_iter().find_map(|options| config_path(Some(options)).transpose()).transpose()
}

fn answer(address: &str, protocol: Protocol) -> Result<Vec<u8>> {
    match protocol {
        Protocol::Address => Ok(address.into()),
        Protocol::Json => Ok(serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"})
            .to_string()
            .into_bytes()),
        Protocol::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            result.write_to_bytes().map_err(|e| Error::Host(e.to_string()))
        }
    }
}

/// Whether containerd starts a pod of the Sandbox service: its bundle has no specification.
fn is_sandbox(bundle: &Path) -> bool {
    !bundle.join("config.json").exists()
}

/// The sandbox that the bundle's container belongs to; without one the container is its own.
pub fn sandbox_of(bundle: &Path, id: &str) -> String {
    /// The part of config.json that groups containers.
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        annotations: Option<std::collections::HashMap<String, String>>,
    }
    // The CRI plugin of containerd, and CRI-O.
    let names = [
        ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
        ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ];
    let config =
        fs::read(bundle.join("config.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let annotations = config.and_then(|config: Config| config.annotations).unwrap_or_default();
    let sandbox = names.iter().find_map(|(kind, sandbox)| {
        let member = annotations.get(*kind).is_some_and(|kind| kind == "container");
        annotations.get(*sandbox).filter(|sandbox| member && !sandbox.is_empty())
    });
    sandbox.cloned().unwrap_or_else(|| id.to_owned())
}

/// Writes the address into the bundle, where containerd 1.6 and `delete` look for it, at once or not at all.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let temporary = bundle.join(".address");
    let written =
        fs::write(&temporary, address).and_then(|()| fs::rename(&temporary, bundle.join("address")));
    written.map_err(|e| Error::io("write address", &e))
}

/// Starts the shim with a socket that listens already, and waits until it serves or says why not.
fn spawn(request: &Request, identity: &Identity, socket: &Path, bundle: &Path) -> Result<()> {
    let failed = |what: &str, e: &io::Error| Error::io(format_args!("{what} {}", socket.display()), e);
    if let Some(parent) = socket.parent() {
        fs::create_dir_all(parent).map_err(|e| failed("directory of", &e))?;
    }
    let listener = listen(socket).map_err(|e| failed("socket", &e))?;
    let program = PathBuf::from("/proc/self/exe");
    let program = fs::read_link(&program).unwrap_or(program);
    let (ready, ready_writer) = fds::pipe().map_err(|e| failed("pipe for", &e))?;
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            &identity.namespace,
            "-id",
            &identity.sandbox,
            "-address",
            &identity.address,
            "-socket",
        ])
        .arg(socket)
        .args(request.config.iter().flat_map(|path| ["-config".as_ref(), path.as_os_str()]))
        .args(request.debug.then_some("-debug"))
        .arg("serve")
        .env(TTRPC_ADDRESS, &request.ttrpc_address)
        .current_dir(bundle)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // containerd waits until nobody holds its pipe any more.
        .stderr(Stdio::null());
    let client = PidFd::open(nix::unistd::getppid().as_raw());
    let client = client.map_err(|e| Error::io("process that asks for the shim", &e))?;
    let passed =
        [(listener.as_fd(), LISTENER_FD), (ready_writer.as_fd(), READY_FD), (client.as_fd(), CLIENT_FD)];
    fds::pass(&mut command, &passed).map_err(|e| failed("pass", &e))?;
    let mut child = command.spawn().map_err(|e| failed("start the shim for", &e))?;
    drop((command, ready_writer));
    let said = read_limited(fs::File::from(ready), 64 * 1024).map_err(|e| failed("wait for", &e))?;
    if said == READY {
        return Ok(());
    }
    let _ = child.kill();
    let status = child.wait().map_err(|e| failed("wait for", &e))?;
    let said = String::from_utf8_lossy(&said);
    let why = if said.is_empty() { format!("the shim ended with {status}") } else { said.into_owned() };
    Err(Error::Host(why))
}

/// Makes the socket, for nobody but root: whoever connects can do all that containerd can.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Before there is a file, which gets this mode: unix_bind_bsd() of Linux takes that of the socket's own inode.
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener.into())
}

/// Prints what this runtime is and can do, for containerd's introspection.
pub fn info() -> Result<()> {
    // Options of the runtime, which are of no interest here, must still be taken from the pipe.
    let _ = input()?;
    let bytes = features::runtime_info().write_to_bytes().map_err(|e| Error::Host(e.to_string()))?;
    io::stdout().write_all(&bytes).map_err(|e| Error::io("standard output", &e))
}

#[cfg(test)]
#[path = "start/tests.rs"]
mod tests;
