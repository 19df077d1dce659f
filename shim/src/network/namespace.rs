//! The pod's network namespace: found or made, and entered.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::threads::on_own_thread;
use crate::spec::Spec;

const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    /// What is needed to find it again, if it lives longer than the pod.
    record: Option<Record>,
}

/// A network namespace as it can be written down: a path, and against reuse of the path its identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Namespace {
    /// The one that a specification asks for: an existing one by its path, or a new one.
    ///
    /// The shim makes the new one, and does not leave that to the VMM, so that it is there before the VMM is and no
    /// process of the VMM ever was in the host's.
    pub fn of(spec: &Spec) -> Result<Self> {
        let mut all = spec.linux.iter().flat_map(|linux| &linux.namespaces);
        let wanted = all.find(|namespace| namespace.kind == "network").ok_or_else(host_network)?;
        match wanted.path.as_deref().filter(|path| !path.is_empty()) {
            Some(path) => Self::open(Path::new(path)),
            None => Self::create(),
        }
    }

    fn open(path: &Path) -> Result<Self> {
        let failed = |e: io::Error| Error::io(format_args!("network namespace {}", path.display()), &e);
        // Nobody is waited for at the other end of a FIFO; it will not be taken for a namespace either.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let own = fs::metadata(OWN).map_err(failed)?;
        if (found.dev(), found.ino()) == (own.dev(), own.ino()) {
            return Err(host_network());
        }
        let record = Record { path: path.to_owned(), device: found.dev(), inode: found.ino() };
        Ok(Self { fd: file.into(), record: Some(record) })
    }

    fn create() -> Result<Self> {
        let create = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open(OWN)
        };
        let file = on_own_thread(create).map_err(|e| Error::io("create a network namespace", &e))?;
        Ok(Self { fd: file.into(), record: None })
    }

    /// The one that was written down, if it still exists.
    ///
    /// # Errors
    /// When it does and cannot be opened.
    pub fn find(record: &Record) -> Result<Option<Self>> {
        // Looked at first, for which no descriptor is needed: whatever else there may be is not opened.
        let is_it = |found: &fs::Metadata| (found.dev(), found.ino()) == (record.device, record.inode);
        if !fs::metadata(&record.path).is_ok_and(|found| is_it(&found)) {
            return Ok(None);
        }
        let found = Self::open(&record.path)?;
        Ok((found.record.as_ref() == Some(record)).then_some(found))
    }

    /// To be written down; nothing when it ends with the pod.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Whether it was made for this pod, so that nothing can be in it yet.
    pub fn is_new(&self) -> bool {
        self.record.is_none()
    }

    /// Does something in it. Blocks.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let enter = || setns(&self.fd, CloneFlags::CLONE_NEWNET);
        let failed = |e| Error::io("enter the pod's network namespace", &e);
        on_own_thread(|| Ok(enter().map_err(io::Error::from).map_err(failed).and_then(|()| work())))
            .map_err(failed)?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn host_network() -> Error {
    Error::InvalidArgument(
        "the host's network cannot be used from a virtual machine: run the container without host network \
         (hostNetwork, --network host, --net-host)"
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(namespaces: &serde_json::Value) -> Result<Namespace> {
        Namespace::of(&serde_json::from_value(json!({"linux": {"namespaces": namespaces}})).unwrap())
    }

    #[test]
    fn the_hosts_network_is_refused() {
        for host in [json!([]), json!([{"type": "network", "path": "/proc/self/ns/net"}])] {
            let error = of(&host).unwrap_err().to_string();
            assert!(error.starts_with("the host's network cannot be used"), "{error}");
        }
        let error = of(&json!([{"type": "network", "path": "/nowhere"}])).unwrap_err().to_string();
        assert_eq!(error, "network namespace /nowhere: No such file or directory");
    }

    #[test]
    fn only_the_namespace_that_was_written_down_is_found() {
        let mut owner = std::process::Command::new("unshare");
        let Ok(mut owner) = owner.args(["--net", "sleep", "1000"]).spawn() else {
            return crate::host::say_skipped("there is no unshare");
        };
        let path = PathBuf::from(format!("/proc/{}/ns/net", owner.id()));
        let own = fs::read_link(OWN).unwrap();
        let is_elsewhere = || fs::read_link(&path).is_ok_and(|namespace| namespace != own);
        while !is_elsewhere() {
            if owner.try_wait().unwrap().is_some() {
                return crate::host::say_skipped("only root can make a network namespace");
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let record = Namespace::open(&path).unwrap().record.unwrap();
        let found = Namespace::find(&record).unwrap().unwrap();
        assert_eq!(found.record(), Some(&record));
        let other = Record { inode: record.inode + 1, ..record.clone() };
        assert!(Namespace::find(&other).unwrap().is_none());
        owner.kill().unwrap();
        owner.wait().unwrap();
        assert!(Namespace::find(&record).unwrap().is_none());
    }

    #[test]
    fn a_new_namespace_has_only_lo_and_the_thread_is_left_where_it_was() {
        let Ok(new) = of(&json!([{"type": "network"}])) else {
            return crate::host::say_skipped("only root can make a network namespace");
        };
        let before = fs::read_link(OWN).unwrap();
        let names = || {
            let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
            Ok(text
                .lines()
                .skip(2)
                .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
                .collect())
        };
        assert_eq!(new.inside::<Vec<String>>(names).unwrap(), ["lo"]);
        assert_eq!(fs::read_link(OWN).unwrap(), before);
        assert!(new.is_new() && new.record().is_none());
    }
}
