//! cgroup v2 of a container: its directory, its members, freezing, killing, statistics.
//!
//! Linux, Documentation/admin-guide/cgroup-v2.rst.

mod events;
mod resources;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;

pub use events::{EventFile, parse as parse_events};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// How long a killed cgroup may take to become empty: a process in uninterruptible sleep delays it.
const EMPTYING: Duration = Duration::from_secs(10);

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made.
    #[error("create cgroup {0}: {1}")]
    Create(PathBuf, io::Error),
    /// A container with the same cgroup runs already.
    #[error("cgroup {0} is in use by another container")]
    InUse(PathBuf),
    /// One of the cgroup's files cannot be read.
    #[error("read {0}: {1}")]
    Read(PathBuf, io::Error),
    /// One of the cgroup's files does not take a value.
    #[error("write {value:?} to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// The resources make no sense.
    #[error("resources: {0}")]
    Invalid(String),
    /// The members do not die.
    #[error("cgroup {0} still has members {1} s after they were killed")]
    Populated(PathBuf, u64),
    /// The directory cannot be removed.
    #[error("remove cgroup {0}: {1}")]
    Remove(PathBuf, io::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// The cgroup of one container. It stays until [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// `cgroup.kill`, held open: it stays with this cgroup when another one has taken over the path.
    kill: File,
}

impl Cgroup {
    /// Creates the cgroup that `linux.cgroupsPath` names, or one after the container's id, with every controller.
    pub fn create(cgroups_path: Option<&Path>, id: &str) -> Result<Self> {
        let relative = relative_path(cgroups_path, id);
        let mut path = PathBuf::from(ROOT);
        for part in relative.components() {
            enable_controllers(&path).map_err(|e| Error::Create(path.clone(), e))?;
            path.push(part);
            match fs::create_dir(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::Create(path, e)),
                _ => (),
            }
        }
        let kill = path.join("cgroup.kill");
        let kill = File::options().write(true).open(&kill).map_err(|e| Error::Create(kill, e))?;
        let cgroup = Self { path, kill };
        if cgroup.events()?.get("populated").is_some_and(|populated| *populated != 0) {
            return Err(Error::InUse(cgroup.path));
        }
        Ok(cgroup)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Applies limits.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        let current = self.read("memory.current").ok().and_then(|text| text.trim().parse().ok());
        for setting in resources::settings(resources, current).map_err(Error::Invalid)? {
            match self.write(&setting.file, &setting.value) {
                Err(error) if setting.best_effort => log::warn!("{error}"),
                other => other?,
            }
        }
        Ok(())
    }

    /// Freezes or thaws every member; returns when that is so.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let wanted = u64::from(frozen);
        let events = self.watch("cgroup.events")?;
        self.write("cgroup.freeze", &wanted.to_string())?;
        self.until(&events, "frozen", wanted).await
    }

    /// Kills every member. They may still be dying on return.
    pub fn kill(&self) -> Result<()> {
        self.kill.write_all_at(b"1", 0).map_err(|source| {
            let path = self.path.join("cgroup.kill");
            Error::Write { path, value: "1".to_owned(), source }
        })
    }

    /// Kills every member and removes the cgroup with those below it.
    pub async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        let events = self.watch("cgroup.events")?;
        self.kill()?;
        let emptied = tokio::time::timeout(EMPTYING, self.until(&events, "populated", 0)).await;
        emptied.map_err(|_| Error::Populated(self.path.clone(), EMPTYING.as_secs()))??;
        remove_tree(&self.path).map_err(|e| Error::Remove(self.path.clone(), e))
    }

    /// The process ids of all members, those of cgroups below included.
    pub fn members(&self) -> Result<Vec<Pid>> {
        let mut members = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let path = directory.join("cgroup.procs");
            match fs::read_to_string(&path) {
                Ok(text) => {
                    members.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
                }
                // A cgroup below that its container has just removed, or a threaded one, whose members count above.
                Err(e) if directory != self.path && is_gone_or_threaded(&e) => (),
                Err(e) => return Err(Error::Read(path, e)),
            }
            directories.extend(subdirectories(&directory));
        }
        Ok(members)
    }

    /// The text of every file that says how much is used and allowed.
    pub fn statistics(&self) -> HashMap<String, String> {
        let names = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let names = names.filter(|name| is_statistic(name));
        names
            .filter_map(|name| fs::read_to_string(self.path.join(&name)).ok().map(|text| (name, text)))
            .collect()
    }

    /// CPU time in microseconds, and bytes of memory, as far as the kernel says.
    pub fn used(&self) -> (u64, u64) {
        let cpu = self.read("cpu.stat").unwrap_or_default();
        let cpu = events::parse(&cpu).get("usage_usec").copied().unwrap_or(0);
        let memory = self.read("memory.current").unwrap_or_default();
        (cpu, memory.trim().parse().unwrap_or(0))
    }

    /// Opens a file that announces its changes: `cgroup.events`, `memory.events`.
    pub fn watch(&self, name: &str) -> Result<EventFile> {
        let path = self.path.join(name);
        EventFile::open(&path).map_err(|e| Error::Read(path, e))
    }

    async fn until(&self, events: &EventFile, key: &str, value: u64) -> Result<()> {
        let read = |e| Error::Read(self.path.join("cgroup.events"), e);
        while events.read(key).map_err(read)? != Some(value) {
            events.changed().await.map_err(read)?;
        }
        Ok(())
    }

    fn events(&self) -> Result<HashMap<String, u64>> {
        Ok(events::parse(&self.read("cgroup.events")?))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.path.join(name);
        fs::read_to_string(&path).map_err(|e| Error::Read(path, e))
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, value).map_err(|source| Error::Write { path, value: value.to_owned(), source })
    }
}

/// Lets the children of a cgroup use every controller that it has.
pub fn enable_controllers(cgroup: &Path) -> io::Result<()> {
    let read = |name| fs::read_to_string(cgroup.join(name));
    let enabled = read("cgroup.subtree_control")?;
    let enabled: Vec<&str> = enabled.split_ascii_whitespace().collect();
    for controller in
        read("cgroup.controllers")?.split_ascii_whitespace().filter(|name| !enabled.contains(name))
    {
        fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"))?;
    }
    Ok(())
}

/// The path below the root of the hierarchy: `linux.cgroupsPath` without tricks, also in systemd's form
/// `slice:prefix:name`.
fn relative_path(cgroups_path: Option<&Path>, id: &str) -> PathBuf {
    let given = cgroups_path.unwrap_or(Path::new("")).to_string_lossy();
    let path = match given.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] => format!("{slice}/{prefix}-{name}.scope"),
        _ => given.into_owned(),
    };
    let clean: PathBuf =
        Path::new(&path).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    if clean.as_os_str().is_empty() { Path::new("containers").join(id) } else { clean }
}

fn is_statistic(name: &str) -> bool {
    const CONTROLLERS: &[&str] =
        &["cpu.", "cpuset.cpus.effective", "hugetlb.", "io.", "memory.", "pids.", "rdma."];
    // The first can only be written; the second is long and nobody's metric.
    const OTHERS: &[&str] = &["memory.reclaim", "memory.numa_stat"];
    CONTROLLERS.iter().any(|prefix| name.starts_with(prefix)) && !OTHERS.contains(&name)
}

fn is_gone_or_threaded(error: &io::Error) -> bool {
    [Errno::ENOENT, Errno::ENODEV, Errno::EOPNOTSUPP]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect()
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for below in subdirectories(directory) {
        remove_tree(&below)?;
    }
    fs::remove_dir(directory)
}

/// The cgroup that a process is in now.
pub fn of(pid: Pid) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("0::/")).map(|path| Path::new(ROOT).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_cgroups_path_stays_below_the_root() {
        let path = |given: &str| relative_path(Some(Path::new(given)), "id").display().to_string();
        assert_eq!(path("/default/c1"), "default/c1");
        assert_eq!(path("../../../etc/x"), "etc/x");
        assert_eq!(path("/.."), "containers/id");
        assert_eq!(
            path("kubepods-pod1.slice:cri-containerd:c1"),
            "kubepods-pod1.slice/cri-containerd-c1.scope"
        );
        assert_eq!(relative_path(None, "id").display().to_string(), "containers/id");
    }

    #[test]
    fn statistics_are_those_of_the_controllers() {
        assert!(
            is_statistic("memory.stat")
                && is_statistic("hugetlb.2MB.current")
                && is_statistic("cpu.pressure")
        );
        assert!(!is_statistic("cgroup.procs") && !is_statistic("memory.reclaim"));
    }
}
