//! Removes what a machine has on the host: processes, network, mounts, cgroup, directories. The end of a pod and
//! containerd's `delete` share it. It may run any number of times, and starts from what was written down, so it works
//! after any crash.

use std::fs;
use std::io;
use std::time::Duration;

use super::layout::Layout;
use crate::error::{Error, Result};
use crate::host::cgroup;
use crate::host::pidfd::{PidFd, ProcessId};
use crate::host::threads;
use crate::network;
use crate::storage::share;

/// How long a killed process may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Ends the VMM, disconnects the network and removes mounts, directories and the cgroup. What fails keeps nothing else
/// from being done; the error names it, and what was written down stays, so that it can be tried again. Blocks.
pub fn remove(layout: &Layout) -> io::Result<()> {
    remove_all(layout, false)
}

/// The same for a pod whose shim is another process: it ends first. Blocks.
pub fn remove_with_shim(layout: &Layout) -> io::Result<()> {
    remove_all(layout, true)
}

fn remove_all(layout: &Layout, ends_shim: bool) -> io::Result<()> {
    let state = layout.try_read()?;
    let shim = state.iter().filter(|_| ends_shim).map(|state| &state.shim);
    let mut steps: Vec<_> = shim.chain(state.iter().flat_map(|state| &state.vmm)).map(end).collect();
    steps.extend(state.iter().filter_map(|state| state.network.as_ref()).map(network::remove));
    let share = &layout.share;
    steps.push(share::destroy(share).map_err(|e| Error::io(share.display(), &e)));
    steps.extend(state.iter().filter_map(|state| state.cgroup.as_ref()).map(|cgroup| {
        cgroup::remove(cgroup).map_err(|e| Error::io(format_args!("cgroup {}", cgroup.display()), &e))
    }));
    let failed: Vec<_> = steps.into_iter().filter_map(Result::err).map(|e| e.to_string()).collect();
    if !failed.is_empty() {
        return Err(io::Error::other(failed.join("; ")));
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
fn end(id: &ProcessId) -> Result<()> {
    let found = PidFd::look_up(id).map_err(|e| Error::io(format_args!("process {}", id.pid), &e))?;
    let Some(process) = found else { return Ok(()) };
    process.kill();
    if process.wait(END_LIMIT) {
        Ok(())
    } else {
        Err(Error::Host(format!("process {} does not end", id.pid)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::{Identity, State};
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::process::{Child, Command};
    use without::without;

    mod without {
        include!("../../../protocol/src/kernel/without.rs");
    }

    fn nothing() -> State {
        State {
            namespace: "n".into(),
            sandbox: "i".into(),
            shim: ProcessId { pid: 1, start: 1 },
            vmm: Vec::new(),
            pids: BTreeMap::new(),
            cgroup: None,
            network: None,
        }
    }

    /// The tree of cgroup v2 at its place, for this thread only.
    fn own_cgroups() -> io::Result<()> {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none)?;
        Ok(())
    }

    #[test]
    fn what_cannot_be_removed_yet_is_not_forgotten() {
        let tested = std::thread::spawn(|| match own_cgroups() {
            Ok(()) => what_is_in_use_is_not_forgotten(),
            Err(e) => crate::host::say_skipped(&format!("only root can mount the cgroups: {e}")),
        });
        tested.join().unwrap();
    }

    fn what_is_in_use_is_not_forgotten() {
        let name = format!("katana-busy-{}", std::process::id());
        let run = std::env::temp_dir().join(&name);
        let layout = Identity::new("/a", "n", "i").unwrap().layout(&run);
        let cgroup = Path::new("/sys/fs/cgroup").join(name).join("pod");
        drop(cgroup::make(&cgroup).unwrap());
        let mut busy = Command::new("sleep").arg("100").spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), busy.id().to_string()).unwrap();
        let state = State { cgroup: Some(cgroup.clone()), ..nothing() };
        layout.write(&state).unwrap();
        fs::create_dir_all(&layout.share).unwrap();
        let removed = remove(&layout);
        let left = (layout.read(), layout.share.exists());
        busy.kill().unwrap();
        busy.wait().unwrap();
        let text = removed.unwrap_err().to_string();
        assert_eq!(text, format!("cgroup {}: Device or resource busy", cgroup.display()));
        assert_eq!(left, (Some(state), false));
        remove(&layout).unwrap();
        assert!(!layout.state.exists() && !cgroup.exists() && !cgroup.parent().unwrap().exists());
        remove(&layout).unwrap();
        fs::remove_dir_all(run).unwrap();
    }

    #[test]
    fn a_step_that_fails_keeps_the_record_and_nothing_else() {
        let run = std::env::temp_dir().join(format!("katana-failing-{}", std::process::id()));
        let layout = Identity::new("/a", "n", "i").unwrap().layout(&run);
        let mut vmm = Command::new("sleep").arg("100").spawn().unwrap();
        let Some(mut network) = OtherNetwork::new() else {
            vmm.kill().unwrap();
            vmm.wait().unwrap();
            return crate::host::say_skipped("only root can make a network namespace");
        };
        let id = ProcessId::of(vmm.id() as i32).unwrap();
        let state = State { vmm: vec![id], network: Some(network.record()), ..nothing() };
        layout.write(&state).unwrap();
        for (call, expected) in [
            ("setns", "enter the pod's network namespace: Function not implemented".to_owned()),
            ("pidfd_open", format!("process {}: this host's kernel has no pidfd_open(2)", id.pid)),
        ] {
            fs::create_dir_all(&layout.share).unwrap();
            let text = without(call, || remove(&layout)).unwrap_err().to_string();
            assert!(text.starts_with(&expected), "{text}");
            assert!(layout.read().as_ref() == Some(&state) && !layout.share.exists(), "{call}");
        }
        vmm.wait().unwrap();
        drop(network.0.kill());
        network.0.wait().unwrap();
        remove(&layout).unwrap();
        assert!(!layout.state.exists());
        fs::remove_dir_all(run).unwrap();
    }

    /// A process in a network namespace of its own.
    struct OtherNetwork(Child);

    impl OtherNetwork {
        fn new() -> Option<Self> {
            let mut process = Command::new("unshare").args(["--net", "sleep", "100"]).spawn().ok()?;
            let network = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
            while network(&process.id().to_string()) == network("self") {
                if process.try_wait().unwrap().is_some() {
                    return None;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Some(Self(process))
        }

        fn record(&self) -> network::Record {
            let path = format!("/proc/{}/ns/net", self.0.id());
            let found = fs::metadata(&path).unwrap();
            let record = json!({"path": path, "device": found.dev(), "inode": found.ino()});
            serde_json::from_value(record).unwrap()
        }
    }

    #[test]
    fn what_was_recorded_is_removed_and_nothing_else() {
        let run = std::env::temp_dir().join(format!("katana-cleanup-{}", std::process::id()));
        let layout = Identity::new("/a", "n", "i").unwrap().layout(&run);
        remove(&layout).unwrap();
        let mut vmm = Command::new("sleep").arg("100").spawn().unwrap();
        let mut other = Command::new("sleep").arg("100").spawn().unwrap();
        let id = |child: &Child| ProcessId::of(child.id() as i32).unwrap();
        let state = State {
            shim: id(&other),
            // The second one's pid was written down with another start time: it has been reused.
            vmm: vec![id(&vmm), ProcessId { start: 1, ..id(&other) }],
            cgroup: Some("/sys/fs/cgroup/nowhere".into()),
            ..nothing()
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
