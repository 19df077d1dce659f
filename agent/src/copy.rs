//! Copies files out of a container or into it, for the host: this program again, in the container's mount namespace, so
//! that a container needs no tar(1) for it, and its links lead nowhere else.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use katana_archive::{Manner, pack, unpack};
use katana_protocol::manage::exec::Copy;
use nix::sys::prctl;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("what is to be copied: {0}")]
    Asked(#[from] serde_json::Error),
    #[error(transparent)]
    Archive(#[from] katana_archive::Error),
}

/// Does what is asked for, a [`Copy`] as JSON. Errors, and what is left out, are lines of standard error.
pub fn main(asked: &str) -> ExitCode {
    // For ps, as in `pause`.
    let _ = prctl::set_name(c"copy");
    match run(asked) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(asked: &str) -> Result<(), Error> {
    match serde_json::from_str(asked)? {
        Copy::Out { path, follow } => {
            let out = io::BufWriter::with_capacity(64 * 1024, io::stdout().lock());
            pack(Path::new(&path), follow, out, &mut |path, why| {
                say(format_args!("{}: {why}", path.display()));
            })?;
        }
        Copy::In { path, archive, keeps } => {
            unpack(io::stdin().lock(), Path::new(&path), Manner { archive, keeps })?;
        }
    }
    Ok(())
}

/// A line that nobody may read any more.
fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
