//! What the host has of something runs out before a container starts.

use std::path::{Path, PathBuf};

use katana_tests::command::Output;
use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::{alone, shared};
use katana_tests::{BUSYBOX, Container, Run, Scratch, environment};

use super::SmallPlace;

/// A shim that has less of something than others: a program for `--runtime`.
struct Limited {
    scratch: Scratch,
    program: PathBuf,
}

impl Limited {
    /// `limits`: what a shell has to do for it before it becomes the shim.
    fn new(limits: &str) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        let shim = environment::bin().join("containerd-shim-kata-v2");
        let script = format!("#!/bin/bash\n{limits}\nexec {} \"$@\"\n", shim.display());
        let program = scratch.file("containerd-shim-limited-v2", script);
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("chmod");
        Self { scratch, program }
    }

    fn run(&self) -> Output {
        let _kept = &self.scratch;
        output_of(Run::new(BUSYBOX).runtime(&self.program.display().to_string()))
    }
}

/// `ctr run --rm` does not remove a container that could be created and not started.
fn output_of(run: Run) -> Output {
    let id = katana_tests::container::new_id();
    let _container = Container::adopt(&id);
    run.id(&id).command(&["echo", "it runs"]).output()
}

/// Starts a container with less and less of something: it runs, or the error has one of these texts. At least once it
/// must be the error, and once not. Afterwards nothing is left.
#[track_caller]
fn expect_named(what: &str, texts: &[&str], amounts: &[u64], run: impl Fn(u64) -> Output) {
    let before = Host::before();
    let (mut worked, mut failed) = (0, 0);
    for amount in amounts {
        let output = run(*amount);
        if output.code == 0 && output.text().contains("it runs") {
            worked += 1;
        } else {
            failed += 1;
            let errors = output.errors();
            println!("with {amount} {what}: {}", errors.trim());
            assert!(
                texts.iter().any(|text| errors.contains(text)),
                "with {amount} {what}, which is not said:\n{output}"
            );
        }
        before.expect_unchanged();
    }
    assert!(worked > 0 && failed > 0, "{worked} of {amounts:?} {what} were enough, {failed} were not");
}

/// Of so many amounts, those that a short run of the tests takes.
fn some(all: impl IntoIterator<Item = u64>, short: &[u64]) -> Vec<u64> {
    if environment::is_soak() { all.into_iter().collect() } else { short.to_vec() }
}

#[test]
fn a_lack_of_descriptors_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let amounts = some((8..=48).chain([256]), &[12, 18, 24, 30, 256]);
    expect_named(
        "descriptors",
        &["Too many open files", "No file descriptors available"],
        &amounts,
        |amount| Limited::new(&format!("ulimit -n {amount}")).run(),
    );
}

/// Services of systemd have a soft limit of 1024, which a pod of many containers exceeds.
#[test]
fn a_shim_opens_as_many_descriptors_as_it_may() {
    let _turn = shared();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let limited = Limited::new("ulimit -Sn 100; ulimit -Hn 3000");
    let runtime = limited.program.display().to_string();
    let container = Run::new(BUSYBOX).runtime(&runtime).command(&["sleep", "10000"]).start();
    let limits = format!("/proc/{}/limits", Process::shim_of(container.id()).pid);
    let limits = std::fs::read_to_string(limits).expect("the shim's limits");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let soft_and_hard: Vec<_> = files.split_whitespace().skip(3).take(2).collect();
    assert_eq!(soft_and_hard, ["3000", "3000"], "{limits}");
}

#[test]
fn a_lack_of_memory_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    // In MiB. The machine's own memory is the most of it.
    let amounts = some((16..=512).step_by(16).chain([16 << 10]), &[64, 160, 256, 16 << 10]);
    expect_named("MiB of memory", &["Cannot allocate memory", "memory allocation of"], &amounts, |amount| {
        Limited::new(&format!("ulimit -v {}", amount << 10)).run()
    });
}

/// The host's places for a pod are full, from the first byte or file on or from one after it.
#[test]
fn a_lack_of_space_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let with = |options: &str| {
        let place = SmallPlace::new(options);
        let output = output_of(Run::new(BUSYBOX));
        place.expect_nothing_left();
        output
    };
    let texts = ["No space left on device"];
    let amounts = some((1..=40).chain([1000]), &[1, 3, 5, 8, 1000]);
    expect_named("inodes", &texts, &amounts, |amount| with(&format!("size=64m,nr_inodes={amount}")));
    let amounts = some((1..=8).chain([1000]), &[1, 2, 1000]);
    expect_named("pages of disk", &texts, &amounts, |amount| {
        with(&format!("nr_blocks={amount},nr_inodes=1000"))
    });
}

/// A cgroup with a limit, until this is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(path: &Path, file: &str, text: &str) -> Self {
        std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").expect("the controller of pids");
        std::fs::create_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        std::fs::write(path.join(file), text).unwrap_or_else(|e| panic!("{file} of {}: {e}", path.display()));
        Self(path.to_owned())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let gone =
            katana_tests::host::eventually(|| std::fs::remove_dir(&self.0).is_ok() || !self.0.exists());
        assert!(gone || std::thread::panicking(), "{} is still in use", self.0.display());
    }
}

#[test]
fn a_lack_of_pids_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    let path = Path::new("/sys/fs/cgroup/katana-faults");
    let amounts = some((1..=24).chain([200]), &[2, 4, 6, 8, 200]);
    let texts = ["Resource temporarily unavailable", "fork"];
    expect_named("pids", &texts, &amounts, |amount| {
        let cgroup = Cgroup::new(path, "pids.max", &amount.to_string());
        let enter = format!("echo $$ > {}", cgroup.0.join("cgroup.procs").display());
        Limited::new(&enter).run()
    });
    // The VMM has one of its own.
    let amounts = some((1..=24).chain([200]), &[1, 3, 6, 200]);
    expect_named("pids of the VMM", &["Resource temporarily unavailable"], &amounts, |amount| {
        let name = "/sys/fs/cgroup/katana-faults-vmm";
        let _cgroup = Cgroup::new(Path::new(name), "pids.max", &amount.to_string());
        output_of(Run::new(BUSYBOX).options("--cgroup katana-faults-vmm"))
    });
}
