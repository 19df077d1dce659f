//! Where a pod's things are on the host, and what is written down so that a later process can remove them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use katana_protocol::manage::RUN;
use katana_protocol::manage::{SANDBOXES, STATE};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::host::create_private;
use crate::host::pidfd::ProcessId;
use crate::network::Record;

/// Where containerd's own shims have their sockets.
const SOCKETS: &str = "/run/containerd/s";

/// Who asks for what: a pod is known by containerd's address, its namespace and the sandbox's id, because
/// ids are unique within one namespace of one containerd only.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's main socket.
    pub address: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id; for a container without a sandbox its own.
    pub sandbox: String,
}

/// The places of one pod.
#[derive(Debug, Clone)]
pub struct Layout {
    /// `state.json` is here.
    pub state: PathBuf,
    /// The directory that the guest sees.
    pub share: PathBuf,
}

/// What is needed to remove a pod without its shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub sandbox: String,
    /// The shim.
    pub shim: ProcessId,
    /// The VMM: first the process that the shim spawned, then the jailed one.
    pub vmm: Vec<ProcessId>,
    /// The pids of the containers that have one other than the VMM's, by the containers' ids.
    #[serde(default)]
    pub pids: BTreeMap<String, u32>,
    /// The VMM's cgroup on the host.
    pub cgroup: Option<PathBuf>,
    /// The network namespace, if it lives longer than the pod.
    pub network: Option<Record>,
}

impl State {
    /// The pid that clients have got for a container; 0 if there is no VMM yet.
    pub fn pid(&self, container: &str) -> u32 {
        let vmm = self.vmm.last().and_then(|vmm| u32::try_from(vmm.pid).ok());
        self.pids.get(container).copied().or(vmm).unwrap_or(0)
    }
}

impl Identity {
    /// Checks the names, of which paths are made.
    pub fn new(address: &str, namespace: &str, sandbox: &str) -> Result<Self> {
        check_name("namespace", namespace)?;
        check_name("id", sandbox)?;
        Ok(Self { address: address.into(), namespace: namespace.into(), sandbox: sandbox.into() })
    }

    fn hash(&self) -> String {
        let path = Path::new(&self.address).join(&self.namespace).join(&self.sandbox);
        let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The shim's socket, in the directory that containerd asked for or where its own shims have theirs.
    pub fn socket(&self, directory: Option<&str>) -> PathBuf {
        Path::new(directory.unwrap_or(SOCKETS)).join(self.hash())
    }

    /// The pod's places below `run`. The name starts with the id for people and ends with a hash, since the
    /// same id may exist in several namespaces and under several containerds. It is as long as lets the path of a socket
    /// fit into sockaddr_un.
    pub fn layout(&self, run: &Path) -> Layout {
        let hash = self.hash();
        let name = format!("{}-{}", head(&self.sandbox, 40), head(&hash, 12));
        Layout { state: run.join(SANDBOXES).join(&name), share: run.join("shared/sandboxes").join(&name) }
    }
}

fn head(text: &str, length: usize) -> &str {
    text.get(..length).unwrap_or(text)
}

/// Accepts what containerd accepts as an identifier, and nothing that means something in a path.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let starts_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if starts_well && name.len() <= 128 && name.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{what} {name:?} must match [A-Za-z0-9][A-Za-z0-9._-]* of at most 128 bytes"
    )))
}

impl Layout {
    fn file(&self) -> PathBuf {
        self.state.join(STATE)
    }

    /// Writes the state down, at once or not at all.
    pub fn write(&self, state: &State) -> io::Result<()> {
        create_private(&self.state)?;
        let temporary = self.state.join(".state.json");
        fs::write(&temporary, serde_json::to_vec_pretty(state)?)?;
        fs::rename(&temporary, self.file())
    }

    /// What was written down, if anything.
    pub fn read(&self) -> Option<State> {
        self.try_read().ok().flatten()
    }

    /// The same, where it matters that there may be something that cannot be read at the moment. What does not parse
    /// will never be of use to anybody.
    pub fn try_read(&self) -> io::Result<Option<State>> {
        match fs::read(self.file()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            text => Ok(serde_json::from_slice(&text?).ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use katana_protocol::manage::SOCKET;

    #[test]
    fn names_that_mean_something_in_a_path_are_refused() {
        let long = "a".repeat(129);
        for bad in ["", ".", "..", "../x", "a/b", "/", "-x", ".x", "a b", "a\0", "ä", "a:b", long.as_str()] {
            assert!(check_name("id", bad).is_err(), "{bad:?}");
            assert!(
                Identity::new("/a", "ns", bad).is_err() && Identity::new("/a", bad, "id").is_err(),
                "{bad:?}"
            );
        }
        for good in ["a", "A.b_c-d", "0123", "k8s.io"] {
            assert!(check_name("id", good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn the_same_id_elsewhere_has_other_places() {
        let at = |address, namespace, id| Identity::new(address, namespace, id).unwrap();
        let all = [at("/a", "x", "b-c"), at("/b", "x", "b-c"), at("/a", "x-b", "c"), at("/a", "y", "b-c")];
        let mut shares: Vec<_> = all.iter().map(|one| one.layout(Path::new("/run/k")).share).collect();
        shares.sort();
        shares.dedup();
        assert_eq!(shares.len(), all.len());
        assert!(shares.iter().all(|share| share.parent() == Some(Path::new("/run/k/shared/sandboxes"))));
        let long = at("/run/containerd/containerd.sock", &"n".repeat(76), &"i".repeat(128));
        let managed = long.layout(Path::new(RUN)).state.join(SOCKET);
        for socket in [long.socket(None), managed] {
            assert!(socket.as_os_str().len() < 108, "must fit sockaddr_un: {}", socket.display());
        }
    }

    #[test]
    fn the_state_survives() {
        let run = std::env::temp_dir().join(format!("katana-layout-{}", std::process::id()));
        let layout = Identity::new("/a", "n", "i").unwrap().layout(&run);
        assert_eq!(layout.read(), None);
        let me = ProcessId::of(std::process::id() as i32).unwrap();
        let state = State {
            namespace: "n".into(),
            sandbox: "i".into(),
            shim: me,
            vmm: vec![me],
            pids: BTreeMap::from([("c".into(), 7)]),
            cgroup: Some("/x".into()),
            network: None,
        };
        layout.write(&state).unwrap();
        assert_eq!(layout.read(), Some(state.clone()));
        assert_eq!((state.pid("c"), state.pid("i")), (7, me.pid as u32));
        fs::write(layout.file(), "{").unwrap();
        assert_eq!(layout.read(), None);
        fs::remove_dir_all(run).unwrap();
    }
}
