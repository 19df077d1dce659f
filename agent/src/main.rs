//! `kata-agent`: PID 1 of the guest. It makes the containers of one pod and serves the shim.
//!
//! Started again as `container-init` it is a container's first process up to the execve ([`init`]), as `pause` the first
//! process of a pod ([`pause`]), and as `copy` it copies files of a container ([`copy`]).

mod acls;
mod boot;
mod cgroup;
mod console;
mod container;
mod copy;
mod cpus;
mod device_filter;
mod disks;
mod dns;
mod early_signals;
mod execs;
mod forward;
mod guest;
mod guest_stats;
mod hooks;
mod huge_pages;
mod in_use;
mod init;
mod launch;
mod network;
mod oom;
mod pause;
mod pci;
mod process;
mod read_ahead;
mod reaper;
mod replay;
mod sandbox;
mod seccomp;
mod service;
mod sockets;
mod start_error;
mod stream;
mod streams;
mod submounts;
mod syscalls;
mod transparent_huge_pages;
mod transport;
mod warm_up;

use std::process::ExitCode;

use nix::unistd::getpid;
use transport::Transport;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["container-init"] => init::main(),
        ["pause"] => pause::main(),
        ["copy", asked] => copy::main(asked),
        // On a host, with Unix sockets `DIRECTORY/<port>.sock` in place of vsock: how the agent is tested without
        // a virtual machine.
        ["serve", directory] => {
            let served = console::start(log::LevelFilter::Info)
                .and_then(|()| service::serve(&Transport::unix(directory.into())));
            served.map_or_else(|error| report(&error), |never| match never {})
        }
        ["--version"] => {
            println!("kata-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ if getpid().as_raw() == 1 => {
            let Err(error) = boot::boot().and_then(|()| service::serve(&Transport::vsock()));
            boot::power_off(&error)
        }
        _ => {
            eprintln!(
                "usage: kata-agent (as PID 1 of a guest) | kata-agent serve DIRECTORY | kata-agent --version"
            );
            ExitCode::from(2)
        }
    }
}

fn report(error: &start_error::StartError) -> ExitCode {
    eprintln!("kata-agent: {error}");
    ExitCode::FAILURE
}
