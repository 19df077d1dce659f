//! `containerd-shim-kata-v2`: what containerd talks to. One per pod; it starts the pod's virtual machine and
//! passes containerd's requests on to the agent in it.
//!
//! Start reading at [`containerd::task`]: each request is one function there. ARCHITECTURE.md says which room may use
//! which.

mod command;
mod containerd;
mod error;
mod guest;
mod host;
mod machine;
mod manage;
mod network;
mod pod;
mod spec;
mod storage;

use std::process::ExitCode;

use command::args::Args;
use error::one_line;

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
    match command::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows this as the reason, so it is one line.
            eprintln!("{RUNTIME}: {}", one_line(&e.to_string()));
            ExitCode::FAILURE
        }
    }
}
