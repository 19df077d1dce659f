//! `delete`: the shim is gone, or containerd has lost it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use super::args::Args;
use super::socket::{is_served, remove_socket, socket_of};
use super::start::sandbox_of;
use crate::error::{Error, Result};
use crate::host::events::timestamp;
use crate::machine::cleanup;
use crate::machine::layout::{Identity, RUN, check_name};
use crate::pod::process::KILLED;
use crate::storage::share;

/// containerd's `delete`: the shim is gone, or containerd has lost it.
pub fn delete(args: &Args) -> Result<()> {
    check_name("id", &args.id)?;
    let bundle = if args.bundle.is_empty() { PathBuf::from(".") } else { PathBuf::from(&args.bundle) };
    let sandbox = sandbox_of(&bundle, &args.id);
    let identity = Identity::new(&args.address, &args.namespace, &sandbox)?;
    let layout = identity.layout(Path::new(RUN));
    let state = layout.read();
    let pid = state.as_ref().map_or(0, |state| state.pid(&args.id));
    let socket = socket_of(&bundle).unwrap_or_else(|| identity.socket(None));
    if sandbox != args.id && is_served(&socket) {
        // Its pod lives on; only this container goes.
        share::unmount_container(&layout.share, &args.id).map_err(|e| Error::io("clean up", &e))?;
    } else {
        let removed = cleanup::remove_with_shim(&layout).map_err(|e| Error::io("clean up", &e));
        remove_socket(&socket);
        removed?;
    }
    answer(pid)
}

fn answer(pid: u32) -> Result<()> {
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(|e| Error::Host(e.to_string()))?;
    io::stdout().write_all(&bytes).map_err(|e| Error::io("standard output", &e))
}
