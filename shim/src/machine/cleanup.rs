//! Removes what a machine has on the host: processes, network, mounts, cgroup, directories. The end of a pod and
//! containerd's `delete` share it. It may run any number of times, and starts from what was written down, so it works
//! after any crash.

use std::fs;
use std::io;
use std::time::Duration;

use super::layout::Layout;
use crate::error::Error;
use crate::host::cgroup;
use crate::host::pidfd::{PidFd, ProcessId};
use crate::host::threads;
use crate::network;
use crate::storage::share;

/// How long a killed process may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Ends the VMM, disconnects the network and removes mounts, directories and the cgroup. What fails is logged, the rest
/// is done, and what was written down stays, so that it can be tried again. Blocks.
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
    let removed = threads::cleanup(move || remove(&places).map_err(|e| Error::io("clean up", &e))).await;
    if let Err(e) = removed {
        log::error!("{}: {e}", layout.state.display());
    }
}

/// Kills a process that was written down, if it is still that one, and waits for its end.
pub fn end(id: &ProcessId) {
    let Some(process) = PidFd::find(id) else { return };
    process.kill();
    if !process.wait(END_LIMIT) {
        log::error!("process {} does not end", id.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::{Identity, State};
    use std::collections::BTreeMap;
    use std::process::Command;

    #[test]
    fn what_was_recorded_is_removed_and_nothing_else() {
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
