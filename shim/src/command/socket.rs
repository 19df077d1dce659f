//! The shim's socket, where it is written down and whether somebody listens.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::error::reason;

/// The socket as `start` wrote it into the bundle; for a container of a sandbox that is a shim, as containerd wrote it.
pub fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let written = fs::read_to_string(bundle.join("address")).ok();
    let address = written.or_else(|| {
        let bootstrap: serde_json::Value =
            serde_json::from_slice(&fs::read(bundle.join("bootstrap.json")).ok()?).ok()?;
        Some(bootstrap.get("address")?.as_str()?.to_owned())
    })?;
    Some(PathBuf::from(address.trim().strip_prefix("unix://")?))
}

/// Whether a shim listens.
pub fn is_served(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Removes a socket that nobody serves any more.
pub fn remove_socket(socket: &Path) {
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => log::warn!("{}: {}", socket.display(), reason(&e)),
        _ => {}
    }
}
