//! What a machine may cost the host at most: limits of its cgroup there.
//!
//! The container's own limits hold in the guest. On the host they would be the wrong ones: the machine has a kernel and
//! an agent besides the container, and the VMM is killed, with all that is in it, by what a container would survive. So
//! these are the limits of a machine that does what it should not. A hostile guest has more than its own memory to
//! spend: the host's page cache of shared files, its tmpfs, and what its kernel keeps for each file that the guest's
//! kernel says it remembers.
//!
//! Where the caller has set no limit, the machine has that of its own size with headroom, and a number of threads: who
//! breaks out of the guest into the VMM takes neither all of the host's memory nor its pids. Not in a cgroup that
//! somebody else has made, who may have put more into it than the VMM; and not for memory once a container has a volume
//! in a tmpfs of the host, whose pages count here and whose size is limited where it was mounted.
//!
//! Pods have no limits of CPUs from here, nor those of their containers: kubelet makes a cgroup for each, with the sum
//! of the limits and the RuntimeClass' overhead.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tokio::sync::watch;

use super::size::{Limits, Size};
use crate::host::cgroup;

const MIB: u64 = 1 << 20;
/// The VMM, its page tables and descriptors, the template if this start makes it (it is in a tmpfs), and page cache to
/// work with.
const VMM: u64 = 256 * MIB;
/// The host's kernel needs about one and a half times the memory for a file that is known to the guest's (inode,
/// directory entry, open file) that the guest's needs, which counts as the container's there. The file server stops at
/// a million files.
const FILES: (u64, u64) = (3, 2);
const MOST_FILES: u64 = 1536 * MIB;
/// More than is in use when a limit sinks, so that no write to it is the VMM's end.
const ROOM: u64 = 64 * MIB;
/// Threads of a VMM: one for each vCPU (254 at most) and queue, and one for each container of the pod.
const MOST_THREADS: u64 = 1024;
/// Microseconds in which so many times as many are a CPU's.
const PERIOD: u64 = 100_000;

/// The limits of a machine's cgroup.
#[derive(Debug)]
pub struct HostLimits {
    cgroup: PathBuf,
    machine: Machine,
    /// Whether a container has a volume in memory of the host.
    has_tmpfs: AtomicBool,
    wanted: Mutex<Wanted>,
}

/// What does not change of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Memory that it has without limits.
    pub base_mib: u64,
    /// Whether its limits are another's business.
    pub is_pod: bool,
    /// Whether the cgroup is the VMM's alone.
    pub alone: bool,
}

/// What the cgroup is to have; nothing of it is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Wanted {
    memory: Option<u64>,
    cpus: Option<u64>,
    threads: Option<u64>,
}

impl HostLimits {
    /// For a machine of this size that is not there yet.
    pub fn new(cgroup: PathBuf, machine: Machine, limits: &Limits, size: Size) -> Arc<Self> {
        let wanted = Wanted::of(machine, false, limits, size);
        let has_tmpfs = AtomicBool::new(false);
        let host_limits = Arc::new(Self { cgroup, machine, has_tmpfs, wanted: Wanted::default().into() });
        host_limits.set(wanted);
        host_limits
    }

    /// A container comes that mounts these directories and files of the host. To be called before [`HostLimits::follow`].
    /// Blocks.
    pub fn see<'a>(&self, mut sources: impl Iterator<Item = &'a Path>) {
        let is_tmpfs = |path: &Path| statfs(path).is_ok_and(|status| status.filesystem_type() == TMPFS_MAGIC);
        if !self.has_tmpfs.load(Ordering::Relaxed) && sources.any(is_tmpfs) {
            self.has_tmpfs.store(true, Ordering::Relaxed);
        }
    }

    /// Follows the machine to another size. `plugged`: what it has, in MiB. It gives memory back when its guest can;
    /// the limit sinks with it.
    pub fn follow(self: &Arc<Self>, limits: &Limits, size: Size, mut plugged: watch::Receiver<u64>) {
        let wanted = Wanted::of(self.machine, self.has_tmpfs.load(Ordering::Relaxed), limits, size);
        if !self.set(wanted) || *plugged.borrow() <= size.plugged_mib {
            return;
        }
        let host_limits = Arc::clone(self);
        tokio::spawn(async move {
            let is_small = plugged.wait_for(|mib| *mib <= size.plugged_mib).await.is_ok();
            // Somebody may have wanted something else meanwhile.
            if is_small && *host_limits.wanted() == wanted {
                host_limits.write(wanted);
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
        let texts = [
            ("memory", "memory.max", wanted.memory.is_some(), wanted.memory_max(in_use(&self.cgroup))),
            ("pids", "pids.max", wanted.threads.is_some(), max(wanted.threads)),
            ("cpu", "cpu.max", wanted.cpus.is_some(), wanted.cpu_max()),
        ];
        for (controller, file, is_limit, text) in texts {
            // A controller costs the kernel something at both ends of the machine's life.
            if !is_limit && !self.cgroup.join(file).exists() {
                continue;
            }
            let written =
                cgroup::enable(&self.cgroup, &[controller]).and_then(|()| write(&self.cgroup, file, &text));
            if let Err(e) = written {
                // The container's own limits hold all the same.
                log::warn!("cgroup {} has no limit of its {controller}: {e}", self.cgroup.display());
            }
        }
    }
}

impl Wanted {
    fn of(machine: Machine, has_tmpfs: bool, limits: &Limits, size: Size) -> Self {
        let Machine { base_mib, is_pod, alone } = machine;
        let own = base_mib.saturating_add(size.plugged_mib).saturating_mul(MIB);
        let is_limited = limits.has_memory() && !is_pod;
        let (times, of) = FILES;
        let files = if is_limited { limits.memory.saturating_mul(times) / of } else { MOST_FILES };
        let memory = own.saturating_add(VMM).saturating_add(files.min(MOST_FILES));
        Self {
            memory: (is_limited || alone && !has_tmpfs).then_some(memory),
            cpus: (limits.milli_cpus > 0 && !is_pod).then_some(size.vcpus.into()),
            threads: alone.then_some(MOST_THREADS),
        }
    }

    /// Whole CPUs: a machine that has to wait for the rest of a period in the middle of something is slow at all it
    /// does, and the guest holds its container to the fraction.
    fn cpu_max(self) -> String {
        let quota = self.cpus.map_or_else(|| "max".to_owned(), |cpus| (cpus * PERIOD).to_string());
        format!("{quota} {PERIOD}")
    }

    fn memory_max(self, in_use: u64) -> String {
        max(self.memory.map(|memory| memory.max(in_use.saturating_add(ROOM))))
    }
}

fn max(limit: Option<u64>) -> String {
    limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string())
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

    const MACHINE: Machine = Machine { base_mib: 512, is_pod: false, alone: false };
    const ALONE: Machine = Machine { alone: true, ..MACHINE };

    fn wanted(limits: Limits, vcpus: u8, plugged_mib: u64) -> Wanted {
        Wanted::of(MACHINE, false, &limits, Size { vcpus, plugged_mib })
    }

    #[test]
    fn without_limits_the_machine_has_its_size_with_headroom() {
        let size = Size { vcpus: 1, plugged_mib: 64 };
        let most = Some((512 + 64 + 256 + 1536) * MIB);
        let of = |machine, has_tmpfs, limits: Limits| {
            let wanted = Wanted::of(machine, has_tmpfs, &limits, size);
            (wanted.memory, wanted.cpus, wanted.threads)
        };
        assert_eq!(of(ALONE, false, limits(0, 0)), (most, None, Some(MOST_THREADS)));
        // The size of a tmpfs is somebody else's limit.
        assert_eq!(of(ALONE, true, limits(0, 0)), (None, None, Some(MOST_THREADS)));
        let own = Some((512 + 64 + 256 + 96) * MIB);
        assert_eq!(of(ALONE, true, limits(500, 64)), (own, Some(1), Some(MOST_THREADS)));
        // kubelet has set the pod's.
        let pod = Machine { is_pod: true, ..ALONE };
        assert_eq!(of(pod, false, limits(500, 64)), (most, None, Some(MOST_THREADS)));
        assert_eq!(of(pod, true, limits(500, 64)), (None, None, Some(MOST_THREADS)));
        assert_eq!(of(Machine { alone: false, ..pod }, false, limits(500, 64)), (None, None, None));
    }

    #[test]
    fn volumes_in_memory_are_seen() {
        let host_limits = HostLimits::new(
            PathBuf::from("/nowhere"),
            MACHINE,
            &limits(0, 0),
            Size { vcpus: 1, plugged_mib: 0 },
        );
        let see = |paths: &[&str]| {
            host_limits.see(paths.iter().map(Path::new));
            host_limits.has_tmpfs.load(Ordering::Relaxed)
        };
        assert!(!see(&["/proc", "/nowhere"]));
        assert!(see(&["/proc", "/dev/shm", "/nowhere"]));
    }

    #[test]
    fn the_machine_fits_and_not_much_more() {
        let small = wanted(limits(500, 64), 1, 64);
        assert_eq!(small, Wanted { memory: Some((576 + 256 + 96) * MIB), cpus: Some(1), threads: None });
        assert_eq!(
            (small.cpu_max().as_str(), small.memory_max(0)),
            ("100000 100000", (928 * MIB).to_string())
        );
        let large = wanted(limits(2500, 16 << 10), 3, 16 << 10);
        assert_eq!(
            large,
            Wanted { memory: Some((512 + (16 << 10) + 256 + 1536) * MIB), cpus: Some(3), threads: None }
        );
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
        let directory = std::env::temp_dir().join(format!("katana-host-limits-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let set = |name: &str, text: &str| fs::write(directory.join(name), text).unwrap();
        let memory = || fs::read_to_string(directory.join("memory.max")).unwrap_or_default();
        set("cgroup.controllers", "cpuset cpu io memory pids\n");
        set("memory.current", "1000\n");
        let host_limits =
            HostLimits::new(directory.clone(), ALONE, &limits(0, 64), Size { vcpus: 1, plugged_mib: 64 });
        assert_eq!(memory(), (928 * MIB).to_string());
        assert_eq!(fs::read_to_string(directory.join("pids.max")).unwrap(), MOST_THREADS.to_string());
        // Of what was never limited there is no file.
        assert!(!directory.join("cpu.max").exists());
        let (plugs, plugged) = watch::channel(64);
        host_limits.follow(&limits(0, 1024), Size { vcpus: 1, plugged_mib: 1024 }, plugged.clone());
        let most = (512 + 1024 + 256 + 1536) * MIB;
        assert_eq!(memory(), most.to_string());
        // The guest uses it, and is then to have less.
        plugs.send_replace(1024);
        set("memory.current", &(1200 * MIB).to_string());
        host_limits.follow(&limits(0, 64), Size { vcpus: 1, plugged_mib: 64 }, plugged.clone());
        assert_eq!(memory(), (1264 * MIB).to_string());
        set("memory.current", &(100 * MIB).to_string());
        plugs.send_replace(64);
        while memory() != (928 * MIB).to_string() {
            tokio::task::yield_now().await;
        }
        // Nothing is written when nothing has changed.
        set("memory.max", "mine");
        host_limits.follow(&limits(0, 64), Size { vcpus: 1, plugged_mib: 64 }, plugged);
        assert_eq!(memory(), "mine");
        fs::remove_dir_all(directory).unwrap();
    }
}
