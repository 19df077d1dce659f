//! The host's processes.

use std::path::PathBuf;

/// A process, as /proc shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// The parent of the kernel's threads.
const KTHREADD: i32 = 2;

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let status = std::fs::read_to_string(directory.join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        let arguments = std::fs::read(directory.join("cmdline")).ok()?;
        let words = arguments.split(|&byte| byte == 0).filter(|word| !word.is_empty());
        Some(Self {
            pid,
            parent: field("PPid")?.parse().ok()?,
            name: field("Name")?.to_owned(),
            arguments: words.map(|word| String::from_utf8_lossy(word).into_owned()).collect(),
        })
    }

    /// Every process.
    pub fn all() -> Vec<Self> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Self::read).collect()
    }

    /// The names of its threads. On newer kernels, those of the kernel that work for it are among them.
    pub fn threads(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    }

    /// Whether the host's kernel moves packets for it: in a thread of the process, or before Linux 6.4 in one of the kernel's,
    /// whose name has the number of the thread that asked for it.
    pub fn has_vhost_worker(&self) -> bool {
        let entries = std::fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let names: Vec<_> = entries.map(|entry| format!("vhost-{}", entry.file_name().display())).collect();
        self.threads().iter().any(|name| name.starts_with("vhost-"))
            || Self::all().iter().any(|process| process.parent == KTHREADD && names.contains(&process.name))
    }

    /// The shim of a container that is a pod of its own.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn shim_of(id: &str) -> Self {
        let is_it = |process: &Self| {
            process.name.starts_with("containerd-shim") && process.arguments.iter().any(|word| word == id)
        };
        Self::all().into_iter().find(is_it).unwrap_or_else(|| panic!("there is no shim of {id}"))
    }

    /// The VMM of a container that is a pod of its own.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn vmm_of(id: &str) -> Self {
        let shim = Self::shim_of(id).pid;
        let is_it = |process: &Self| process.parent == shim && process.name.starts_with("kata-vmm");
        Self::all().into_iter().find(is_it).unwrap_or_else(|| panic!("the shim {shim} of {id} has no VMM"))
    }

    /// Kills it.
    ///
    /// # Panics
    /// When it does not exist.
    #[track_caller]
    pub fn kill(&self) {
        use nix::sys::signal::{Signal, kill};
        kill(nix::unistd::Pid::from_raw(self.pid), Signal::SIGKILL)
            .unwrap_or_else(|e| panic!("kill {self:?}: {e}"));
    }

    /// Whether it is still there.
    pub fn lives(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.name == self.name)
    }
}
