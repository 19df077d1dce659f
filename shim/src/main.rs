//! `containerd-shim-kata-v2`: what containerd talks to. One per pod; it starts the pod's virtual machine and
//! passes containerd's requests on to the agent in it.
//!
//! Start reading at [`service`]: each request is one function there.

mod agent;
mod args;
mod bootstrap;
mod ceiling;
mod cgroup;
mod cleanup;
mod clients;
mod container;
mod disks;
mod error;
mod events;
mod fds;
mod features;
mod file_system;
mod follow;
mod handed;
mod hooks;
mod layout;
mod logger;
mod logger_binary;
mod machine;
mod members;
mod mount_table;
mod mounts;
mod namespaces;
mod network;
mod options;
mod pidfd;
mod pod;
mod pod_config;
mod pod_sandbox;
mod ports;
mod process;
mod rate;
mod rootfs;
mod sandbox;
mod sandbox_service;
mod server;
mod service;
mod share;
mod size;
mod sockets;
mod spec;
mod stats;
mod stdio;
mod template;
mod vmm;
mod volumes;
mod watch;

use std::process::ExitCode;

use args::Args;
use error::{Error, Result, one_line};

/// The name under which containerd knows this runtime.
pub const RUNTIME: &str = "io.containerd.kata.v2";

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("{RUNTIME}: {why}");
            return ExitCode::from(2);
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows this as the reason, so it is one line.
            eprintln!("{RUNTIME}: {}", one_line(&e.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.version {
        println!(
            "containerd-shim-kata-v2:\n  Version:  {}\n  Runtime:  {RUNTIME}",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(());
    }
    if args.info {
        return bootstrap::info();
    }
    match args.action.as_str() {
        "start" => bootstrap::start(args),
        "delete" => cleanup::delete(args),
        "serve" => server::serve(args),
        "" => Err(Error::InvalidArgument("an action is missing: start or delete".into())),
        other => Err(Error::InvalidArgument(format!("unknown action {other:?}: want start or delete"))),
    }
}

/// Runs what blocks on a thread beside the one that serves.
async fn blocking<T, F>(work: F) -> Result<T>
where
    F: FnOnce() -> Result<T> + Send + 'static,
    T: Send + 'static,
{
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Host(e.to_string()))?
}

/// Random bytes of the host's kernel.
fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: a buffer of the given length.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if usize::try_from(count) == Ok(N) {
        return Ok(bytes);
    }
    Err(Error::os("getrandom", nix::errno::Errno::last()))
}
