//! The shim itself, as `start` spawns it: it serves containerd until a Shutdown request or a signal.

use std::fs;
use std::future::pending;
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;

use super::args::Args;
use super::socket::remove_socket;
use crate::containerd::clients::Clients;
use crate::containerd::{sandbox, task};
use crate::error::{Error, Result};
use crate::host::events::Publisher;
use crate::host::fds;
use crate::host::logger;
use crate::host::pidfd::PidFd;
use crate::host::threads;
use crate::machine::layout::Identity;
use crate::manage;
use crate::pod::Pod;

/// Environment: containerd's ttrpc socket, which takes events. Empty without a containerd: the pod is the client's, the
/// process that asked for the shim, and ends with it.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// The listening socket.
pub const LISTENER_FD: RawFd = 3;
/// A pipe: [`READY`] when the shim serves, or the reason why it does not.
pub const READY_FD: RawFd = 4;
/// See [`READY_FD`].
pub const READY: &[u8] = b"ready";

/// Number of a descriptor of the process that asked for this shim.
pub const CLIENT_FD: RawFd = 5;
/// How long a shim that has nothing yet waits for another client when that process has ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the last answers and events may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long the machine's end may take after a signal. A Create may hold it up, by a volume on a silent file server.
const ABANDON_LIMIT: Duration = Duration::from_secs(30);

/// Serves until containerd says Shutdown.
pub fn serve(args: &Args) -> Result<()> {
    let mut ready = fs::File::from(fds::inherited(READY_FD).map_err(|e| Error::io("ready pipe", &e))?);
    let served = prepare(args).and_then(|(listener, identity)| {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::io("runtime", &e))?;
        runtime.block_on(run(args, listener, identity, &mut ready))
    });
    if let Err(e) = &served {
        // Whoever waits for the shim reads it; afterwards nobody does.
        let _ = ready.write_all(e.to_string().as_bytes());
        remove_socket(Path::new(&args.socket));
    }
    served
}

fn prepare(args: &Args) -> Result<(UnixListener, Identity)> {
    // One thread allocates nearly everything, so further arenas would only cost memory.
    // SAFETY: mallopt takes two integers, and no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    // A session of its own, so that no terminal's signals arrive. `start` must not have made this process the
    // leader of a group, which cannot leave its session.
    nix::unistd::setsid().map_err(|e| Error::os("setsid", e))?;
    let identity = Identity::new(&args.address, &args.namespace, &args.id)?;
    logger::init(Path::new("log"), &args.id, args.debug);
    protect_from_oom();
    if let Err(e) = fds::raise_limit() {
        log::warn!("limit on descriptors: {e}");
    }
    let listener: OwnedFd = fds::inherited(LISTENER_FD).map_err(|e| Error::io("listening socket", &e))?;
    Ok((UnixListener::from(listener), identity))
}

/// containerd is protected from the OOM killer, and so is what it starts; a shim should die before containerd.
fn protect_from_oom() {
    let path = "/proc/self/oom_score_adj";
    let adjusted = fs::read_to_string(path).and_then(|score| {
        let score = score.trim().parse::<i32>().map_err(|_| io::ErrorKind::InvalidData)?;
        fs::write(path, score.saturating_add(1).min(1000).to_string())
    });
    if let Err(e) = adjusted {
        log::warn!("{path}: {e}");
    }
}

async fn run(args: &Args, listener: UnixListener, identity: Identity, ready: &mut fs::File) -> Result<()> {
    let address = std::env::var(TTRPC_ADDRESS)
        .map_err(|_| Error::InvalidArgument(format!("{TTRPC_ADDRESS} is not set in the environment")))?;
    let has_containerd = !address.is_empty();
    let events = match has_containerd {
        true => Publisher::start(address, &identity.namespace),
        false => Publisher::silent(&identity.namespace),
    };
    let config_path = Some(PathBuf::from(&args.config)).filter(|path| !path.as_os_str().is_empty());
    let pod = Pod::new(identity, args.debug, config_path, Arc::clone(&events));
    let failed = |e: &io::Error| Error::io("signals", e);
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed(&e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed(&e))?;
    let (listener, clients) = Clients::listen(listener).map_err(|e| Error::io("listening socket", &e))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(task::services(&pod))
        .register_service(sandbox::services(&pod));
    server.start().await.map_err(|e| Error::Host(e.to_string()))?;
    ready.write_all(READY).map_err(|e| Error::io("ready pipe", &e))?;
    close(ready);
    tokio::spawn(manage::serve(Arc::clone(&pod)));

    tokio::select! {
        () = pod.stopped() => log::debug!("containerd says shutdown"),
        _ = terminate.recv() => end_of_pod(&pod, "SIGTERM").await,
        _ = interrupt.recv() => end_of_pod(&pod, "SIGINT").await,
        () = forgotten(&pod, has_containerd) => match pod.is_empty() {
            true => log::warn!("containerd has ended before it asked for anything"),
            false => end_of_pod(&pod, "the client has ended").await,
        },
    }
    events.flush(FAREWELL).await;
    // Nobody may find the socket and wait for a shim that goes.
    remove_socket(Path::new(&args.socket));
    if pod.is_of_sandbox_service() {
        // A client of Go's ttrpc that finds the answer to ShutdownSandbox and the connection's end at once takes
        // either, and containerd takes the end for a failure. It closes the connection when it has read the answer.
        let _ = tokio::time::timeout(FAREWELL, clients.gone()).await;
    }
    let _ = tokio::time::timeout(FAREWELL, server.shutdown()).await;
    // A template that is being put into its place, a namespace that is being cleaned.
    threads::finish(FAREWELL).await;
    Ok(())
}

/// Waits for the end of a containerd that has not yet written down that this shim is there, or of a client without one.
/// Nobody else would end it.
async fn forgotten(pod: &Pod, has_containerd: bool) {
    let Some(client) = fds::inherited(CLIENT_FD).ok().map(PidFd::from) else { return pending().await };
    match client.ended().await {
        Ok(()) if has_containerd => tokio::time::sleep(PATIENCE).await,
        Ok(()) => return,
        Err(e) => log::warn!("watch containerd: {e}"),
    }
    if !pod.is_empty() {
        pending::<()>().await;
    }
}

/// The shim is terminated by a signal or by its client's end, and nobody else can stop the VM. So the containers end as well, and their exit
/// events are published before the shim ends.
async fn end_of_pod(pod: &Pod, why: &str) {
    log::warn!("{why}: the pod ends");
    if tokio::time::timeout(ABANDON_LIMIT, pod.abandon()).await.is_err() {
        log::error!("the machine does not end; containerd's delete removes what is left");
    }
    if tokio::time::timeout(FAREWELL, pod.ended()).await.is_err() {
        log::error!("not all exits of containers are published");
    }
}

/// Closes the pipe under a [`fs::File`] that its owner keeps: /dev/null takes its place.
fn close(file: &mut fs::File) {
    if let Ok(null) = fs::File::options().write(true).open("/dev/null") {
        drop(std::mem::replace(file, null));
    }
}
