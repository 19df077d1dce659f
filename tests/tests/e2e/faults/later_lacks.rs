//! What the host has of something runs out while a container runs, for its shim and VMM or for all. What is done to the
//! container then works or says what ran out; the container can be deleted afterwards, and nothing stays behind.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use katana_tests::command::{Command, Output};
use katana_tests::host::{Host, eventually};
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Container, Containerd, Run, environment};

use super::SmallPlace;

/// What is done to the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Exec,
    Pause,
    Delete,
}

const OPERATIONS: [Operation; 3] = [Operation::Exec, Operation::Pause, Operation::Delete];

impl Operation {
    fn done(self, container: &Container) -> Output {
        match self {
            Self::Exec => container.exec(&["echo", "it runs"]),
            Self::Pause => container.task("pause", &[]),
            Self::Delete => container.task("delete", &["--force"]),
        }
    }
}

/// Has too little of something for everything that is done to a container, several times with different amounts. Where
/// the shim dies of it, what was not tried yet is done to another container.
///
/// `texts` are those of which an error has one. `limited` makes the lack, does what it is given, and ends the lack.
/// Answers how many errors there were.
#[track_caller]
fn expect_named(
    what: &str,
    texts: &[&str],
    amounts: &[u64],
    limited: impl Fn(&Process, u64, &dyn Fn() -> Output) -> Output,
) -> usize {
    let before = Host::before();
    let mut named = 0;
    for &amount in amounts {
        let mut to_do = OPERATIONS.into_iter().peekable();
        while to_do.peek().is_some() {
            let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
            let shim = Process::shim_of(container.id());
            for operation in to_do.by_ref() {
                let output = limited(&shim, amount, &|| operation.done(&container));
                // A container that is deleted by force is reported as killed.
                let killed = operation == Operation::Delete && output.code == 137;
                if output.code != 0 && !killed {
                    println!("{operation:?} with {amount} {what}: {}", output.errors().trim());
                    let said = texts.iter().any(|text| output.errors().contains(text));
                    assert!(said, "{operation:?} with {amount} {what}, which is not said:\n{output}");
                    named += 1;
                }
                if !shim.lives() {
                    break;
                }
            }
            drop(container);
            before.expect_unchanged();
        }
    }
    named
}

/// Gives a process that may have ended a soft limit.
fn limit(process: &Process, resource: &str, amount: &str) -> Output {
    Command::new(&["prlimit", "--pid", &process.pid.to_string(), &format!("--{resource}={amount}:")]).output()
}

/// The shim has a lower limit meanwhile.
fn with_limit(shim: &Process, resource: &str, amount: u64, operation: &dyn Fn() -> Output) -> Output {
    let shown = ["--raw", "--noheadings", "--output=SOFT"];
    let (pid, option) = (shim.pid.to_string(), format!("--{resource}"));
    let show = [&["prlimit", "--pid", &pid, &option][..], &shown].concat();
    let before = Command::new(&show).output().ok().text();
    limit(shim, resource, &amount.to_string()).ok();
    let output = operation();
    limit(shim, resource, before.trim());
    output
}

#[test]
fn a_lack_of_descriptors_while_it_runs_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let texts = ["Too many open files", "No file descriptors available"];
    let amounts: &[u64] = if environment::is_soak() { &[0, 1, 2, 3, 4, 5, 6, 8, 12] } else { &[0, 3] };
    let named = expect_named("more descriptors", &texts, amounts, |shim, more, operation| {
        let open = format!("/proc/{}/fd", shim.pid);
        let open = std::fs::read_dir(open).expect("the shim's descriptors").count() as u64;
        with_limit(shim, "nofile", open + more, operation)
    });
    assert!(named > 0, "{amounts:?} more descriptors were enough");
}

#[test]
fn a_lack_of_memory_while_it_runs_leaves_nothing_behind() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    // A program of Rust ends where it gets no memory, which is what containerd can say.
    let texts = ["Cannot allocate memory", "ttrpc: closed", "not found"];
    let amounts: &[u64] = if environment::is_soak() { &[0, 1, 2, 4, 8, 16, 64] } else { &[0, 1] };
    expect_named("more pages", &texts, amounts, |shim, more, operation| {
        let size = std::fs::read_to_string(format!("/proc/{}/statm", shim.pid)).expect("the shim's size");
        let pages: u64 = size.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
        with_limit(shim, "as", (pages + more) << 12, operation)
    });
}

/// Waits until a shim has no thread left that idles: it would serve the next request without another. They do so for
/// a second (`shim/src/host/threads.rs`).
#[track_caller]
fn wait_for_idle_threads(shim: &Process) {
    const STEADY: Duration = Duration::from_millis(1500);
    let (mut count, mut since) = (shim.threads().len(), Instant::now());
    let steady = eventually(|| {
        let now = shim.threads().len();
        if now != count {
            (count, since) = (now, Instant::now());
        }
        since.elapsed() > STEADY
    });
    assert!(steady, "the shim's threads do not come to rest");
}

#[test]
fn a_lack_of_pids_while_it_runs_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    const GROUP: &str = "/sys/fs/cgroup/katana-faults";
    let log = || std::fs::read_to_string(Containerd::current().log()).expect("containerd's log");
    let lines = log().lines().count();
    let texts = ["Resource temporarily unavailable"];
    // Not all that is done needs a thread, and what removes things waits for one: an error need not come of it.
    let refused = Cell::new(0_u64);
    expect_named("more pids", &texts, &[0], |shim, more, operation| {
        wait_for_idle_threads(shim);
        let group = Path::new(GROUP);
        std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").expect("the controller of pids");
        std::fs::create_dir(group).expect("a cgroup");
        std::fs::write(group.join("cgroup.procs"), shim.pid.to_string()).expect("the shim in its cgroup");
        let inside = std::fs::read_to_string(group.join("pids.current")).expect("how many there are");
        let most = inside.trim().parse::<u64>().expect("a number") + more;
        std::fs::write(group.join("pids.max"), most.to_string()).expect("the limit");
        let output = operation();
        let events = std::fs::read_to_string(group.join("pids.events")).expect("what was refused");
        let times = events.lines().find_map(|line| line.strip_prefix("max ")?.parse::<u64>().ok());
        refused.set(refused.get() + times.expect("a number"));
        std::fs::write(group.join("pids.max"), "max").expect("no limit");
        // It may be the shim's own to end, or already have ended.
        let _ = std::fs::write("/sys/fs/cgroup/cgroup.procs", shim.pid.to_string());
        let gone = eventually(|| std::fs::remove_dir(group).is_ok());
        assert!(gone, "{GROUP} is still in use");
        output
    });
    assert!(refused.get() > 0, "it needed no more threads than it had");
    // The shim itself removes what is left, also then: containerd's `delete` would hide that it did not.
    let log = log();
    let dropped = |line: &&str| line.contains("/run/kata-containers/sandboxes/") && line.contains("thread: ");
    let dropped: Vec<_> = log.lines().skip(lines).filter(dropped).collect();
    assert!(dropped.is_empty(), "{dropped:#?}");
}

/// The file system of the pods' own files is full.
#[test]
fn a_lack_of_space_while_it_runs_leaves_nothing_behind() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let before = Host::before();
    let place = SmallPlace::new("size=1m,nr_inodes=1000");
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    place.fill();
    for operation in OPERATIONS {
        let output = operation.done(&container);
        let works = output.code == 0 || operation == Operation::Delete && output.code == 137;
        let said = output.errors().contains("No space left on device");
        assert!(works || said, "{operation:?}: {output}");
    }
    drop(container);
    place.expect_nothing_left();
    drop(place);
    before.expect_unchanged();
}
