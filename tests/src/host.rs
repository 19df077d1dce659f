//! What a container could leave behind on the host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::container::Run;
use crate::containerd::Containerd;
use crate::process::Process;
use crate::{environment, services};

/// Directories that belong to Katana, or did to programs of its kind.
const RUNTIME_DIRECTORIES: [&str; 4] = ["/run/kata-containers", "/run/kata", "/run/katana", "/run/vc"];
/// What containerd keeps of tasks and pods is in directories of these plugins.
const PLUGINS: [&str; 3] = [
    "io.containerd.runtime.v2.task",
    "io.containerd.sandbox.controller.v1.shim",
    "io.containerd.grpc.v1.cri",
];
/// Everything that a container needs on the host runs under one of these names.
const PROGRAMS: [&str; 5] = ["containerd-shim", "kata", "runc", "ctr", "virtiofsd"];

/// Looks again and again, until it is true or the limit for hangs is over.
pub fn eventually(mut is_so: impl FnMut() -> bool) -> bool {
    const PAUSE: Duration = Duration::from_millis(100);
    let end = Instant::now() + environment::hang_limit();
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
}

/// On a machine where others work as well, only what has to do with containers counts. The test machine is ours alone,
/// and everything counts.
fn concerns_us(name: &str) -> bool {
    static OURS_ALONE: OnceLock<bool> = OnceLock::new();
    *OURS_ALONE.get_or_init(|| Path::new("/etc/katana-test-machine").exists())
        || [environment::namespace().as_str(), "kata", "containerd", "e2e-"]
            .iter()
            .any(|part| name.contains(part))
}

/// Kinds of things, and those that there are.
type Things = BTreeMap<&'static str, BTreeSet<String>>;

/// The host at one moment.
#[derive(Debug)]
pub struct Host {
    /// What the kernel and the file system show.
    seen: Things,
    /// What containerd lists. `ctr` takes longer than a container that does nothing, so it is asked when all else has
    /// been seen.
    listed: Things,
}

impl Host {
    /// Looks at the host before a test: one container has run, so that directories that containerd keeps are there.
    ///
    /// # Panics
    /// When that container does not run.
    #[track_caller]
    pub fn before() -> Self {
        static USED: Mutex<Vec<Containerd>> = Mutex::new(Vec::new());
        let containerd = Containerd::current();
        let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
        if !used.contains(&containerd) {
            Run::new(crate::BUSYBOX).command(&["true"]).output().ok();
            used.push(containerd);
        }
        drop(used);
        Self::at_rest()
    }

    /// Waits for what earlier tests have left going: `ctr` and containerd answer before a shim's process is gone, and
    /// containerd has shims that died cleaned up after when nobody waits any more. What goes only later would be
    /// missed.
    #[track_caller]
    fn at_rest() -> Self {
        let end = Instant::now() + environment::hang_limit();
        let mut before = seen();
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = seen();
            let mut going_on = [changes(&before, &now), passing_processes()].concat();
            if going_on.is_empty() {
                let first = listed();
                let (seen, listed) = (seen(), listed());
                going_on = [changes(&now, &seen), changes(&first, &listed)].concat();
                if going_on.is_empty() {
                    return Self { seen, listed };
                }
            }
            let going_on = going_on.join("\n");
            assert!(Instant::now() < end, "the host does not come to rest before the test:\n{going_on}");
            before = now;
        }
    }

    /// Fails the test unless the host comes back to this state. Cgroups and sockets may go a moment after the
    /// command that removes them has returned.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn expect_unchanged(&self) {
        self.expect_unchanged_but(|_| false);
    }

    /// The same but for changes of some kinds, which read as in this function's message.
    ///
    /// # Panics
    /// When there are others.
    #[track_caller]
    pub fn expect_unchanged_but(&self, ignored: impl Fn(&str) -> bool) {
        let end = Instant::now() + environment::hang_limit();
        loop {
            let mut left = changes(&self.seen, &seen());
            left.retain(|change| !ignored(change));
            if left.is_empty() {
                left = changes(&self.listed, &listed());
                left.retain(|change| !ignored(change));
            }
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "the host is not as it was before:\n{}", left.join("\n"));
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

fn seen() -> Things {
    BTreeMap::from([
        ("process", processes()),
        ("mount", mounts()),
        ("cgroup", cgroups()),
        ("network interface", names_in(Path::new("/sys/class/net"))),
        ("network namespace", names_in(Path::new("/run/netns"))),
        ("listening socket", sockets()),
        ("file", files()),
    ])
}

fn listed() -> Things {
    let containerd = Containerd::current();
    let tasks = services::expect(|| services::tasks(&containerd));
    BTreeMap::from([
        ("container", services::expect(|| services::containers(&containerd))),
        ("task", tasks.into_iter().map(|task| task.container).collect()),
        ("snapshot", services::expect(|| services::snapshots(&containerd))),
    ])
}

fn changes(before: &Things, now: &Things) -> Vec<String> {
    let mut changes = Vec::new();
    for (kind, before) in before {
        let after = &now[kind];
        changes.extend(after.difference(before).map(|name| format!("left behind: {kind} {name}")));
        changes.extend(before.difference(after).map(|name| format!("gone: {kind} {name}")));
    }
    changes
}

fn processes() -> BTreeSet<String> {
    let ours = |process: &Process| PROGRAMS.iter().any(|name| process.name.starts_with(name));
    let all = Process::all().into_iter().filter(ours);
    all.map(|process| format!("{} {} {}", process.pid, process.name, process.arguments.join(" "))).collect()
}

/// Processes that live for a moment only: clients, and shims that start or delete something.
fn passing_processes() -> Vec<String> {
    let passes = |process: &Process| {
        let action = process.arguments.last().map(String::as_str);
        process.name == "ctr" && !process.arguments.iter().any(|word| word == "events")
            || process.name.starts_with("containerd-shim")
                && matches!(action, Some("start" | "delete") | None)
    };
    let all = Process::all().into_iter().filter(passes);
    all.map(|process| format!("still there: {process:?}")).collect()
}

/// proc(5): the fifth field is the mount point, and the file system's type follows the lone hyphen.
fn mounts() -> BTreeSet<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let table = table.lines().filter(|line| concerns_us(line));
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        Some(format!("{} ({})", left.split(' ').nth(4)?, right.split(' ').next()?))
    };
    table.filter_map(line).collect()
}

fn cgroups() -> BTreeSet<String> {
    let mut cgroups = tree(Path::new("/sys/fs/cgroup"), 8, |path| path.is_dir() && !path.is_symlink());
    cgroups.retain(|cgroup| concerns_us(cgroup));
    cgroups
}

fn sockets() -> BTreeSet<String> {
    // proc_net_unix(5): the path, if any, is the eighth field. __SO_ACCEPTCON in the flags: it listens.
    const LISTENS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening = rows.filter(|row| row.len() == 8 && row[3] == LISTENS);
    listening.map(|row| row[7].to_owned()).filter(|path| concerns_us(path)).collect()
}

/// Files of Katana, of shims and of containerd's tasks and pods.
fn files() -> BTreeSet<String> {
    // Shims listen below the last directory wherever containerd keeps its state.
    let ours = RUNTIME_DIRECTORIES.iter().chain(&["/run/containerd"]);
    let mut roots: Vec<PathBuf> = ours.map(PathBuf::from).collect();
    let containerd = Containerd::current();
    let configuration = std::fs::read_to_string(containerd.configuration()).ok();
    let configuration = configuration.and_then(|text| text.parse::<toml::Table>().ok()).unwrap_or_default();
    for place in ["root", "state"] {
        let place = configuration.get(place).and_then(toml::Value::as_str).unwrap_or_default();
        for plugin in PLUGINS {
            // The plugin's directory and those of namespaces, or of kinds of things, stay.
            let plugin = Path::new(place).join(plugin);
            roots.extend(names_in(&plugin).into_iter().map(|name| plugin.join(name)));
        }
    }
    let mut files: BTreeSet<String> = roots.iter().flat_map(|root| tree(root, 6, |_| true)).collect();
    // Addresses of pods: files named after them, beside a lock and a memory.
    let addresses = names_in(&containerd.directory().join("cni-addresses/katana-test")).into_iter();
    files.extend(addresses.filter(|name| name.parse::<std::net::IpAddr>().is_ok()));
    files
}

/// Everything below a directory that is of the wanted kind.
fn tree(directory: &Path, depth: usize, wanted: fn(&Path) -> bool) -> BTreeSet<String> {
    // `ctr run --detach` leaves its FIFOs, and a root file system is not ours to walk.
    const SKIPPED: [&str; 2] = ["fifo", "rootfs"];
    let mut found = BTreeSet::new();
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| !SKIPPED.iter().any(|name| entry.file_name() == *name)) {
        let path = entry.path();
        if wanted(&path) {
            found.insert(path.display().to_string());
        }
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(tree(&path, depth - 1, wanted));
        }
    }
    found
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
