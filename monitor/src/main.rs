//! `kata-monitor`: the metrics of all pods of this host, over HTTP. Its options, paths and metrics are those of Kata
//! Containers' program of this name, as far as what they speak of exists here.

mod gather;
mod logger;
mod merge;
mod own;
mod server;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use log::LevelFilter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use self::gather::Gatherer;

/// Serves the metrics of the pods of this host to Prometheus.
#[derive(Debug, Parser)]
#[command(name = "kata-monitor", version)]
struct Cli {
    /// Address and port to listen on. Whoever reaches it can read; there is no encryption
    #[arg(long, default_value = "127.0.0.1:8090", value_name = "ADDRESS:PORT")]
    listen_address: SocketAddr,
    /// off, error, warn, info, debug or trace
    #[arg(long, default_value = "info", value_name = "LEVEL", value_parser = level)]
    log_level: LevelFilter,
    /// Accepted for compatibility: pods are found without asking containerd
    #[arg(long, hide = true)]
    runtime_endpoint: Option<String>,
}

/// As Go's log package and Rust's call them.
fn level(name: &str) -> Result<LevelFilter, String> {
    match name {
        "warning" => Ok(LevelFilter::Warn),
        "fatal" | "panic" => Ok(LevelFilter::Error),
        name => name.parse().map_err(|_| format!("{name:?} is no level of a log")),
    }
}

/// Why it does not serve.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("kata-monitor: listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    #[error("kata-monitor: {0}: {1}")]
    Host(&'static str, std::io::Error),
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(std::env::args().map(with_two_dashes));
    logger::init(cli.log_level);
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Long options of Go programs, such as Kata Containers' monitor, may have one dash.
fn with_two_dashes(argument: String) -> String {
    match argument.strip_prefix('-') {
        Some(rest) if rest.len() > 1 && !rest.starts_with('-') => format!("-{argument}"),
        _ => argument,
    }
}

fn run(cli: &Cli) -> Result<(), Error> {
    if let Err(error) = raise_limit() {
        log::warn!("limit on descriptors: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Error::Host("start", e))?.block_on(serve(cli.listen_address))
}

/// A connection to each pod at once.
fn raise_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

async fn serve(address: SocketAddr) -> Result<(), Error> {
    let failed = |e| Error::Host("signals", e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let listener = TcpListener::bind(address).await.map_err(|e| Error::Listen(address, e))?;
    // With port 0, the one that it has got.
    log::info!("listening on {}", listener.local_addr().unwrap_or(address));
    tokio::select! {
        () = server::serve(&listener, Arc::new(Gatherer::default())) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_of_kata_are_understood() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ').map(str::to_owned).map(with_two_dashes));
        let cli = parse("kata-monitor").unwrap();
        assert_eq!(cli.listen_address.to_string(), "127.0.0.1:8090");
        assert_eq!(cli.log_level, LevelFilter::Info);
        let cli = parse("kata-monitor -listen-address=0.0.0.0:8090 -log-level warning").unwrap();
        assert_eq!((cli.listen_address.port(), cli.log_level), (8090, LevelFilter::Warn));
        parse("kata-monitor --runtime-endpoint /run/containerd/containerd.sock --log-level debug").unwrap();
        for wrong in ["kata-monitor --log-level loud", "kata-monitor --listen-address here", "kata-monitor x"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
