//! What runs goes on without containerd.

use katana_tests::containerd::Version;
use katana_tests::cri::messages::container_status::State;
use katana_tests::cri::messages::pod_sandbox_status::State as PodState;
use katana_tests::cri::{self, Pod};
use katana_tests::host::{Host, eventually};
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Container, Instance, Run, Scratch, environment};
use nix::sys::signal::Signal::{self, SIGKILL, SIGTERM};
use serde_json::json;

/// What a container of each kind runs through the test.
struct Long {
    container: Container,
    pod: Pod,
    /// Counts in its log.
    counter: cri::Container,
    processes: Vec<Process>,
}

impl Long {
    fn start(handler: &str) -> Self {
        let container = Run::new(BUSYBOX).sh("echo here > /mark; sleep 10000 & wait").start();
        let pod = Pod::run(handler);
        let counter = pod.sh("i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done");
        counter.wait_for_output("3\n");
        container.sh("until [ -e /mark ]; do sleep 0.1; done").ok();
        Self { container, pod, counter, processes: processes() }
    }

    fn count(&self) -> usize {
        self.counter.output().lines().count()
    }

    /// Everything is as it was before, and goes on.
    #[track_caller]
    fn check(&self, ends: usize) {
        let same = || processes() == self.processes;
        assert!(eventually(same), "{:?} are now {:?}", self.processes, processes());
        assert_eq!(self.container.status().as_deref(), Some("RUNNING"));
        self.container.exec(&["cat", "/mark"]).ok().expect_text("here");
        assert_eq!(self.pod.status().state.enum_value_or_default(), PodState::SANDBOX_READY);
        assert_eq!(self.counter.state(), State::CONTAINER_RUNNING);
        assert_eq!(self.counter.sh("echo exec").ok(), "exec");
        let before = self.count();
        assert!(eventually(|| self.count() > before + 3), "the log stands still");
        let numbers: Vec<usize> =
            self.counter.output().lines().map(|line| line.parse().expect("a number")).collect();
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
        // A line that containerd had read and not yet written is lost with containerd, whatever the runtime.
        let missing = numbers.last().map_or(0, |last| last + 1 - numbers.len());
        assert!(missing <= ends, "{missing} lines are missing: {numbers:?}");
    }
}

/// The shims and VMMs of this test.
fn processes() -> Vec<Process> {
    let ours = |name: &str| name.starts_with("containerd-shim") || name.starts_with("kata-vmm");
    let mut all: Vec<_> = Process::all().into_iter().filter(|process| ours(&process.name)).collect();
    all.sort_by_key(|process| process.pid);
    all
}

/// Ends while containerd is away.
struct Short {
    scratch: Scratch,
    container: Container,
    of_pod: cri::Container,
}

impl Short {
    fn start(pod: &Pod) -> Self {
        let scratch = Scratch::new();
        let script = |name: &str| {
            format!("until [ -e /volume/go ]; do sleep 0.1; done; echo > /volume/{name}; exit 42")
        };
        let container = Run::new(BUSYBOX).bind(scratch.path(), "/volume", "rw").sh(&script("one")).start();
        let of_pod = pod.start(json!({
            "command": ["sh", "-c", script("two")],
            "mounts": [{"host_path": scratch.path(), "container_path": "/volume"}],
        }));
        Self { scratch, container, of_pod }
    }

    fn end(&self) {
        self.scratch.file("go", "");
        let ended = || ["one", "two"].iter().all(|name| self.scratch.path().join(name).exists());
        assert!(eventually(ended), "they do not end without containerd");
    }

    /// A containerd that comes back deletes tasks without processes, with any runtime, so their exit codes may be lost.
    /// Answers the one of the pod's container.
    #[track_caller]
    fn check(self) -> i32 {
        let ended = || self.container.status().is_none_or(|status| status == "STOPPED");
        assert!(eventually(ended), "{} is {:?}", self.container.id(), self.container.status());
        let status = self.of_pod.ended();
        self.of_pod.remove().expect("remove");
        status.exit_code
    }
}

/// What a client reads of a container that ended while containerd was away is the same with runc.
fn compare_with_runc(instance: &Instance) {
    let ends = ["kata", "runc"].map(|handler| {
        let pod = Pod::run(handler);
        let short = Short::start(&pod);
        (pod, short)
    });
    instance.end(SIGKILL);
    ends.iter().for_each(|(_, short)| short.end());
    instance.restart(Version::Two);
    let codes = ends.map(|(_pod, short)| short.check());
    assert_eq!(codes[0], codes[1], "kata's and runc's exit code");
}

fn survive(instance: &Instance, long: &Long, ends: usize, signal: Signal, next: Version) {
    eprintln!("containerd ends by {signal}, {next:?} follows");
    // Its containers have processes of their own.
    let short = Short::start(&long.pod);
    instance.end(signal);
    short.end();
    instance.restart(next);
    short.check();
    long.check(ends);
}

#[test]
fn containers_and_pods_outlive_containerd_and_its_upgrade() {
    let _turn = alone();
    if !environment::is_vm_or_say("containerd's own runtime is no matter of ours") {
        return;
    }
    let instance = Instance::start(Version::One);
    let _here = instance.containerd().enter();
    drop(Pod::run("kata"));
    let before = Host::before();
    let long = Long::start("kata");
    survive(&instance, &long, 1, SIGTERM, Version::One);
    survive(&instance, &long, 2, SIGKILL, Version::Two);
    drop(long);
    before.expect_unchanged();

    // Pods that only the new one can have.
    let long = Long::start("kata-shim");
    survive(&instance, &long, 1, SIGKILL, Version::Two);
    if environment::is_soak() {
        for ends in 2..6 {
            survive(&instance, &long, ends, if ends % 2 == 0 { SIGTERM } else { SIGKILL }, Version::Two);
        }
    }
    drop(long);
    before.expect_unchanged();
    if environment::is_soak() {
        // runc leaves its directories and the parent of its cgroups.
        drop(Pod::run("runc"));
        let before = Host::before();
        compare_with_runc(&instance);
        before.expect_unchanged();
    }
}
