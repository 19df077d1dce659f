//! What the program is run for: `start`, `delete` and `-info` by containerd, `serve` by `start`.
//!
//! May use all other rooms.

pub mod args;
mod delete;
mod features;
mod serve;
mod socket;
mod start;

use args::Args;

use crate::RUNTIME;
use crate::error::{Error, Result};

/// Does what the arguments say.
pub fn run(args: &Args) -> Result<()> {
    if args.version {
        println!(
            "containerd-shim-kata-v2:\n  Version:  {}\n  Runtime:  {RUNTIME}",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(());
    }
    if args.info {
        return start::info();
    }
    match args.action.as_str() {
        "start" => start::start(args),
        "delete" => delete::delete(args),
        "serve" => serve::serve(args),
        "" => Err(Error::InvalidArgument("an action is missing: start or delete".into())),
        other => Err(Error::InvalidArgument(format!("unknown action {other:?}: want start or delete"))),
    }
}
