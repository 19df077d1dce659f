//! What the machine of a container with limits may cost the host at most: limits of its cgroup there.
//!
//! The container's own limits hold in the guest. On the host they would be the wrong ones: the machine has a kernel and an agent
//! besides the container, and the VMM is killed, with all that is in it, by what a container would survive. So these are the limits
//! of a machine that does what it should not. A hostile guest has more than its own memory to spend: the host's page cache of
//! shared files, its tmpfs, and what its kernel keeps for each file that the guest's kernel says it remembers.
//!
//! Pods have no limits from here: kubelet makes a cgroup for each, with the sum of the limits and the RuntimeClass' overhead. Nor
//! is the number of processes limited: those of the container are the guest's, and the VMM has a thread for each CPU and a few more.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::cgroup;
use crate::size::{Limits, Size};

const MIB: u64 = 1 << 20;
/// The VMM, its page tables and descriptors, the template if this start makes it (it is in a tmpfs), and page cache to work with.
const VMM: u64 = 256 * MIB;
/// The host's kernel needs about one and a half times the memory for a file that is known to the guest's (inode, directory entry,
/// open file) that the guest's needs, which counts as the container's there. The file server stops at a million files.
const FILES: (u64, u64) = (3, 2);
const MOST_FILES: u64 = 1536 * MIB;
/// More than is in use when a limit sinks, so that no write to it is the VMM's end.
const ROOM: u64 = 64 * MIB;
/// Microseconds in which so many times as many are a CPU's.
const PERIOD: u64 = 100_000;

/// The limits of a machine's cgroup.
#[derive(Debug)]
pub struct Ceiling {
    cgroup: PathBuf,
    /// Memory that the machine has without limits.
    base_mib: u64,
    wanted: Mutex<Wanted>,
}

/// What the cgroup is to have; nothing of it is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Wanted {
    memory: Option<u64>,
    cpus: Option<u64>,
}

impl Ceiling {
    /// For a machine of this size that is not there yet.
    pub fn new(cgroup: PathBuf, base_mib: u64, limits: &Limits, size: Size) -> Arc<Self> {
        let wanted = Wanted::of(base_mib, limits, size);
        let ceiling = Arc::new(Self { cgroup, base_mib, wanted: Wanted::default().into() });
        ceiling.set(wanted);
        ceiling
    }

    /// Follows the machine to another size. `plugged`: what it has, in MiB. It gives memory back when its guest can; the limit
    /// sinks with it.
    pub fn follow(self: &Arc<Self>, limits: &Limits, size: Size, mut plugged: watch::Receiver<u64>) {
        let wanted = Wanted::of(self.base_mib, limits, size);
        if !self.set(wanted) || *plugged.borrow() <= size.plugged_mib {
            return;
        }
        let ceiling = Arc::clone(self);
        tokio::spawn(async move {
            let is_small = plugged.wait_for(|mib| *mib <= size.plugged_mib).await.is_ok();
            // Somebody may have wanted something else meanwhile.
            if is_small && *ceiling.wanted() == wanted {
                ceiling.write(wanted);
            }
        });
    }

    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if that is a change.
    fn set(&self, wanted: Wanted) -> bool {
        if std::mem::replace(&mut *self.wanted(), wanted) == wanted {
            return false;
        }
        self.write(wanted);
        true
    }

    fn write(&self, wanted: Wanted) {
        let written = cgroup::enable(&self.cgroup, &["cpu", "memory"]).and_then(|()| {
            write(&self.cgroup, "cpu.max", &wanted.cpu_max())?;
            write(&self.cgroup, "memory.max", &wanted.memory_max(in_use(&self.cgroup)))
        });
        if let Err(e) = written {
            // The container's own limits hold all the same.
            log::warn!("cgroup {} has no limits: {e}", self.cgroup.display());
        }
    }
}

impl Wanted {
    fn of(base_mib: u64, limits: &Limits, size: Size) -> Self {
        let machine = base_mib.saturating_add(size.plugged_mib).saturating_mul(MIB);
        let (times, of) = FILES;
        let files = limits.memory.saturating_mul(times) / of;
        let memory = machine.saturating_add(VMM).saturating_add(files.min(MOST_FILES));
        Self {
            memory: limits.has_memory().then_some(memory),
            cpus: (limits.milli_cpus > 0).then_some(size.vcpus.into()),
        }
    }

    /// Whole CPUs: a machine that has to wait for the rest of a period in the middle of something is slow at all it does, and the
    /// guest holds its container to the fraction.
    fn cpu_max(self) -> String {
        let quota = self.cpus.map_or_else(|| "max".to_owned(), |cpus| (cpus * PERIOD).to_string());
        format!("{quota} {PERIOD}")
    }

    fn memory_max(self, in_use: u64) -> String {
        self.memory
            .map_or_else(|| "max".to_owned(), |memory| memory.max(in_use.saturating_add(ROOM)).to_string())
    }
}

fn in_use(cgroup: &Path) -> u64 {
    let text = fs::read_to_string(cgroup.join("memory.current")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn write(cgroup: &Path, name: &str, text: &str) -> io::Result<()> {
    fs::write(cgroup.join(name), text)
        .map_err(|e| io::Error::other(format!("{name}: {}", crate::error::reason(&e))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(milli_cpus: u64, mib: u64) -> Limits {
        Limits { milli_cpus, memory: mib * MIB, ..Limits::default() }
    }

    fn wanted(limits: Limits, vcpus: u8, plugged_mib: u64) -> Wanted {
        Wanted::of(512, &limits, Size { vcpus, plugged_mib })
    }

    #[test]
    fn the_machine_fits_and_not_much_more() {
        let small = wanted(limits(500, 64), 1, 64);
        assert_eq!(small, Wanted { memory: Some((576 + 256 + 96) * MIB), cpus: Some(1) });
        assert_eq!(
            (small.cpu_max().as_str(), small.memory_max(0)),
            ("100000 100000", (928 * MIB).to_string())
        );
        let large = wanted(limits(2500, 16 << 10), 3, 16 << 10);
        assert_eq!(large, Wanted { memory: Some((512 + (16 << 10) + 256 + 1536) * MIB), cpus: Some(3) });
    }

    #[test]
    fn what_is_not_limited_is_not_limited_here() {
        assert_eq!(wanted(limits(0, 64), 1, 64).cpus, None);
        assert_eq!(wanted(limits(500, 0), 1, 0).memory, None);
        let huge = Limits { memory: u64::MAX >> 1, ..Limits::default() };
        assert_eq!(wanted(huge, 1, 0), Wanted::default());
        assert_eq!(
            (Wanted::default().cpu_max().as_str(), Wanted::default().memory_max(5).as_str()),
            ("max 100000", "max")
        );
    }

    #[test]
    fn a_limit_is_never_below_what_is_in_use() {
        let small = wanted(limits(500, 64), 1, 64);
        assert_eq!(small.memory_max(2048 * MIB), ((2048 + 64) * MIB).to_string());
        assert_eq!(small.memory_max(u64::MAX), u64::MAX.to_string());
    }

    /// What no cgroup file system does for a test: files by these names, in a directory that has the controllers.
    #[tokio::test]
    async fn the_files_follow_the_machine() {
        let directory = std::env::temp_dir().join(format!("katana-ceiling-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let set = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
        let memory = || fs::read_to_string(directory.join("memory.max")).unwrap_or_default();
        set("cgroup.controllers", "cpuset cpu io memory pids\n");
        set("memory.current", "1000\n");
        let ceiling =
            Ceiling::new(directory.clone(), 512, &limits(0, 64), Size { vcpus: 1, plugged_mib: 64 });
        assert_eq!(memory(), (928 * MIB).to_string());
        let (plugs, plugged) = watch::channel(64);
        ceiling.follow(&limits(0, 1024), Size { vcpus: 1, plugged_mib: 1024 }, plugged.clone());
        let most = (512 + 1024 + 256 + 1536) * MIB;
        assert_eq!(memory(), most.to_string());
        // The guest uses it, and is told to have less.
        plugs.send_replace(1024);
        set("memory.current", &(1200 * MIB).to_string());
        ceiling.follow(&limits(0, 64), Size { vcpus: 1, plugged_mib: 64 }, plugged.clone());
        assert_eq!(memory(), (1264 * MIB).to_string());
        set("memory.current", &(100 * MIB).to_string());
        plugs.send_replace(64);
        while memory() != (928 * MIB).to_string() {
            tokio::task::yield_now().await;
        }
        // Nothing is written when nothing has changed.
        set("memory.max", "mine");
        ceiling.follow(&limits(0, 64), Size { vcpus: 1, plugged_mib: 64 }, plugged);
        assert_eq!(memory(), "mine");
        fs::remove_dir_all(directory).unwrap();
    }
}
