//! The pod's management socket: HTTP for the host's tools (`kata-runtime`, `kata-monitor`), which are root. It is there
//! as long as the machine. What is asked and answered: `protocol/src/manage.rs`.
//!
//! May use [`crate::pod`] and what is below it.

mod answer;
mod describe;
mod events;
mod exec;
mod logs;
mod metrics;

use std::convert::Infallible;
use std::fs;
use std::future::pending;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use katana_metrics::text::CONTENT_TYPE;
use katana_protocol::manage::{FOLLOW, SOCKET};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use self::answer::{Answer, failure, json, text};
use crate::error::{Error, Result};
use crate::pod::Pod;

/// Connections at once; others wait.
const MOST_CONNECTIONS: usize = 32;
/// How long a client may take over the head of a request.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Longest head of a request, bytes.
const LONGEST_HEAD: usize = 16 * 1024;
/// Pause after a connection that could not be taken, for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves for as long as the shim runs.
pub async fn serve(pod: Arc<Pod>) {
    let mut launched = pod.launched();
    let socket = pod.layout().state.join(SOCKET);
    while launched.wait_for(Option::is_some).await.is_ok() {
        tokio::select! {
            () = listen(&socket, &pod) => {}
            _ = launched.wait_for(Option::is_none) => {}
        }
    }
}

async fn listen(socket: &Path, pod: &Arc<Pod>) {
    let listener = match bind(socket) {
        Ok(listener) => listener,
        Err(e) => {
            // The pod itself does not need it.
            log::warn!("{}: {e}", socket.display());
            return pending().await;
        }
    };
    let turns = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pod = Arc::clone(pod);
                tokio::spawn(async move {
                    serve_connection(stream, pod).await;
                    drop(turn);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The directory is root's alone.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn serve_connection(stream: UnixStream, pod: Arc<Pod>) {
    let service = service_fn(move |request| {
        let pod = Arc::clone(&pod);
        async move { Ok::<_, Infallible>(route(&pod, request).await.unwrap_or_else(|e| failure(&e))) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(LONGEST_HEAD);
    if let Err(e) = http.serve_connection(TokioIo::new(stream), service).await {
        log::debug!("management socket: {e}");
    }
}

async fn route(pod: &Arc<Pod>, request: Request<Incoming>) -> Result<Answer> {
    if request.method() == Method::POST
        && let Some(id) = exec::resized(request.uri().path()).map(str::to_owned)
    {
        return exec::resize(&id, request).await;
    }
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/exec") => exec::run(pod, request).await,
        (&Method::GET, "/pod") => json(&describe::pod(pod)),
        (&Method::GET, "/metrics") => Ok(text(CONTENT_TYPE, metrics::text(pod).await)),
        (&Method::GET, "/stats") => json(&describe::stats(pod).await),
        (&Method::GET, "/logs") => Ok(logs::answer(follows(&request))),
        (&Method::GET, "/console") => logs::console(pod).await,
        (&Method::GET, "/events") => Ok(events::answer(pod, follows(&request))),
        (method, path) => Err(Error::NotFound(format!("{method} {path}"))),
    }
}

/// Whether the client wants what is to come as well.
fn follows(request: &Request<Incoming>) -> bool {
    request.uri().query().is_some_and(|query| query.split('&').any(|word| word == FOLLOW))
}
