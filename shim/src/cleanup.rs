//! Undoing a pod. The end of a sandbox and containerd's `delete` share it; it may run any number of times, and
//! it starts from what was written down, so that it works after any crash.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::args::Args;
use crate::bootstrap::sandbox_of;
use crate::cgroup;
use crate::error::{Error, Result, reason};
use crate::events::timestamp;
use crate::layout::{Identity, Layout, RUN, check_name};
use crate::network;
use crate::pidfd::{PidFd, ProcessId};
use crate::process::KILLED;
use crate::share;

/// How long a killed process may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Ends the VMM, disconnects the network and removes mounts, directories and the cgroup. What fails is logged, the rest is done, and
/// what was written down stays, so that it can be tried again. Blocks.
pub fn remove(layout: &Layout) -> io::Result<()> {
    let state = layout.read();
    for process in state.iter().flat_map(|state| &state.vmm) {
        end(process);
    }
    if let Some(record) = state.as_ref().and_then(|state| state.network.as_ref()) {
        network::remove(record);
    }
    share::destroy(&layout.share)?;
    if let Some(cgroup) = state.and_then(|state| state.cgroup) {
        cgroup::remove(&cgroup);
    }
    match fs::remove_dir_all(&layout.state) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// [`remove`] from async code.
pub async fn remove_blocking(layout: &Layout) {
    let places = layout.clone();
    let removed = crate::blocking(move || remove(&places).map_err(|e| Error::io("clean up", &e))).await;
    if let Err(e) = removed {
        log::error!("{}: {e}", layout.state.display());
    }
}

fn end(id: &ProcessId) {
    let Some(process) = PidFd::find(id) else { return };
    process.kill();
    if !process.wait(END_LIMIT) {
        log::error!("process {} does not end", id.pid);
    }
}

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
        if let Some(state) = &state {
            end(&state.shim);
        }
        remove(&layout).map_err(|e| Error::io("clean up", &e))?;
        remove_socket(&socket);
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

/// The socket as `start` wrote it into the bundle; for a container of a sandbox that is a shim, as containerd wrote it.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::State;
    use std::collections::BTreeMap;
    use std::process::Command;

    #[test]
    fn what_was_written_down_is_undone_and_nothing_else() {
        let run = std::env::temp_dir().join(format!("katana-cleanup-{}", std::process::id()));
        let layout = Identity::new("/a", "n", "i").unwrap().layout(&run);
        remove(&layout).unwrap();
        let mut vmm = Command::new("sleep").arg("100").spawn().unwrap();
        let mut other = Command::new("sleep").arg("100").spawn().unwrap();
        let id = |child: &std::process::Child| ProcessId::of(child.id() as i32).unwrap();
        let state = State {
            namespace: "n".into(),
            sandbox: "i".into(),
            shim: id(&other),
            // The second one's pid was written down with another start time: it has been reused.
            vmm: vec![id(&vmm), ProcessId { start: 1, ..id(&other) }],
            pids: BTreeMap::new(),
            cgroup: Some("/sys/fs/cgroup/nowhere".into()),
            network: None,
        };
        let reaper = std::thread::spawn(move || vmm.wait().unwrap());
        layout.write(&state).unwrap();
        fs::create_dir_all(layout.share.join("c1/rootfs")).unwrap();
        remove(&layout).unwrap();
        reaper.join().unwrap();
        assert!(other.try_wait().unwrap().is_none());
        assert!(!layout.state.exists() && !layout.share.exists());
        remove(&layout).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        fs::remove_dir_all(run).unwrap();
    }
}
