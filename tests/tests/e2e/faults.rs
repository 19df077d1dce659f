//! What fails anywhere, at any moment: processes are killed, and what the host has of something runs out. Nothing stays behind, and an
//! error names what ran out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use katana_tests::command::{Output, Running};
use katana_tests::containerd::{Instance, Version};
use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Container, Run, Scratch, environment};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Numbers that look random and are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth, The Art of Computer Programming 2, 3.3.4.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn part_of(&mut self, time: Duration) -> Duration {
        time.mul_f64(self.below(1000) as f64 / 1000.0)
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Shim,
    Vmm,
    /// Its end is a panic of the guest's kernel, which a privileged container can have without it.
    Agent,
    Containerd,
}

const VICTIMS: [Victim; 4] = [Victim::Shim, Victim::Vmm, Victim::Agent, Victim::Containerd];

/// What goes on meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Start,
    Exec,
    Pause,
    Delete,
}

const DEEDS: [Deed; 4] = [Deed::Start, Deed::Exec, Deed::Pause, Deed::Delete];

/// A container that does nothing, or has its guest's kernel panic after a while.
fn run(id: &str, panics_after: Option<Duration>) -> Run {
    let run = Run::new(BUSYBOX).id(id);
    match panics_after {
        None => run.command(&["sleep", "10000"]),
        Some(pause) => {
            let pause = pause.as_micros();
            run.options("--privileged")
                .sh(&format!("usleep {pause}; echo c > /proc/sysrq-trigger; sleep 10000"))
        }
    }
}

/// The processes of a container that is a pod of its own: those of its shim, or of its VMM. None, if they are not there (yet).
fn processes_of(id: &str, victim: Victim) -> Vec<Process> {
    let all = Process::all();
    let named = |process: &Process| {
        process.name.starts_with("containerd-shim") && process.arguments.iter().any(|word| word == id)
    };
    let of_shim = |process: &Process| {
        process.name.starts_with("kata-vmm")
            && all.iter().any(|parent| parent.pid == process.parent && named(parent))
    };
    let is_victim =
        |process: &&Process| if victim == Victim::Shim { named(process) } else { of_shim(process) };
    all.iter().filter(is_victim).cloned().collect()
}

fn begin(deed: Deed, id: &str, panics_after: Option<Duration>) -> Running {
    let container = || Container::adopt(id);
    match deed {
        Deed::Start => run(id, panics_after).spawn(),
        Deed::Exec => container().exec_command(&[], &["sleep", "10000"]).spawn(),
        Deed::Pause => container().task_command("pause", &[]).spawn(),
        Deed::Delete => container().task_command("delete", &["--force"]).spawn(),
    }
}

/// How long a deed takes when nobody is killed.
fn usual_time(deed: Deed) -> Duration {
    let id = katana_tests::container::new_id();
    let container = Container::adopt(&id);
    if deed != Deed::Start {
        run(&id, None).detached().ok();
    }
    let start = Instant::now();
    match deed {
        Deed::Start => drop(Run::new(BUSYBOX).id(&id).command(&["true"]).output().ok()),
        Deed::Exec => drop(container.exec(&["true"]).ok()),
        Deed::Pause | Deed::Delete => drop(begin(deed, &id, None).finish()),
    }
    start.elapsed()
}

struct Round<'a> {
    instance: &'a Instance,
    deed: Deed,
    victim: Victim,
    /// From the beginning of the deed to the death.
    pause: Duration,
}

impl Round<'_> {
    fn play(&self) {
        let id = katana_tests::container::new_id();
        let container = Container::adopt(&id);
        let panics_after = (self.victim == Victim::Agent).then_some(self.pause);
        if self.deed != Deed::Start {
            // The guest may have panicked before that is answered.
            let started = run(&id, panics_after).detached();
            assert!(panics_after.is_some() || started.code == 0, "{started}");
        }
        let running = begin(self.deed, &id, panics_after);
        std::thread::sleep(self.pause);
        match self.victim {
            Victim::Containerd => {
                self.instance.end(Signal::SIGKILL);
                running.finish();
                self.instance.restart(Version::One);
            }
            victim => self.kill(victim, &container, running),
        }
        drop(container);
    }

    fn kill(&self, victim: Victim, container: &Container, running: Running) {
        let victims = match victim {
            Victim::Agent => Vec::new(),
            victim => processes_of(container.id(), victim),
        };
        for process in &victims {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        if victim == Victim::Agent || !victims.is_empty() || matches!(self.deed, Deed::Pause | Deed::Delete) {
            // Whatever it was, it is answered.
            running.finish();
            return;
        }
        if self.deed == Deed::Start {
            // A container that is deleted before containerd has answered can leave a task without it, with every runtime.
            container.wait_for_task();
        }
        drop(running);
    }
}

#[test]
fn deaths_at_random_moments_leave_nothing_behind() {
    let _turn = alone();
    if !environment::is_vm_or_say("runc's shim does not clean up when killed during a start") {
        return;
    }
    let instance = Instance::start(Version::One);
    let _entered = instance.containerd().enter();
    let before = Host::before();
    let usual = DEEDS.map(usual_time);
    let (mut random, rounds) = (Random(11), environment::rounds(20));
    let mut played = Vec::new();
    for number in 0..rounds {
        // Each with each, over and over.
        let deed = number % DEEDS.len();
        let victim = VICTIMS[(number / DEEDS.len() + number) % VICTIMS.len()];
        let pause = random.part_of(usual[deed]);
        played.push(format!("{:?} of {victim:?} after {pause:?}", DEEDS[deed]));
        println!("{number}: {}", played[number]);
        Round { instance: &instance, deed: DEEDS[deed], victim, pause }.play();
        // So that it is known which of them left something.
        if number % 5 == 4 || number + 1 == rounds {
            before.expect_unchanged();
        }
    }
}

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
        let program = self.program.display().to_string();
        output_of(Run::new(BUSYBOX).runtime(&program))
    }
}

/// `ctr run --rm` does not remove a container that could be created and not started.
fn output_of(run: Run) -> Output {
    let id = katana_tests::container::new_id();
    let _container = Container::adopt(&id);
    run.id(&id).command(&["echo", "it runs"]).output()
}

/// Starts a container with less and less of something: it runs, or the error has one of these texts. At least once it must be the
/// error, and once not. Afterwards nothing is left.
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

#[test]
fn a_lack_of_memory_is_named() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is about the shim") {
        return;
    }
    // In MiB. The machine's own memory is the most of it.
    let amounts = some((16..=512).step_by(16).chain([16 << 10]), &[64, 160, 256, 16 << 10]);
    expect_named("MiB of memory", &["Cannot allocate memory", "memory"], &amounts, |amount| {
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
    const PLACE: &str = "/run/kata-containers";
    let with = |options: &str| {
        let before = Host::before();
        // Whatever is there stays below.
        mount(Some("tmpfs"), PLACE, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("tmpfs");
        let output = output_of(Run::new(BUSYBOX));
        umount2(PLACE, MntFlags::MNT_DETACH).expect("unmount");
        before.expect_unchanged();
        output
    };
    let texts = ["No space left on device"];
    std::fs::create_dir_all(PLACE).expect("the directory");
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

/// What of the host grows with something that is not given back, however small.
#[derive(Debug, Clone, Copy)]
struct Growth {
    /// Of the kernel, KiB.
    unreclaimable: u64,
    /// Cgroups that are gone for everybody but the kernel.
    dying: u64,
    /// Of containerd.
    descriptors: u64,
    /// Entries in the table of mounts.
    mounts: u64,
    processes: u64,
}

impl Growth {
    fn now(containerd: &Process) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let number = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let entries = |path: &str| std::fs::read_dir(path).map_or(0, |entries| entries.count() as u64);
        Self {
            unreclaimable: number(&text("/proc/meminfo"), "SUnreclaim:"),
            dying: number(&text("/sys/fs/cgroup/cgroup.stat"), "nr_dying_descendants"),
            descriptors: entries(&format!("/proc/{}/fd", containerd.pid)),
            mounts: text("/proc/self/mountinfo").lines().count() as u64,
            processes: Process::all().len() as u64,
        }
    }
}

/// Ten thousand of them in the long version of the tests, or as many as `$KATANA_CYCLES` says.
#[test]
fn thousands_of_cycles_grow_nothing() {
    let _turn = alone();
    let asked = std::env::var("KATANA_CYCLES").ok().and_then(|text| text.parse().ok());
    let cycles: usize = asked.unwrap_or(if environment::is_soak() { 10_000 } else { 20 });
    let before = Host::before();
    let containerd = || {
        let is_it = |process: &Process| {
            let address =
                katana_tests::containerd::Containerd::current().configuration().display().to_string();
            process.name == "containerd" && process.arguments.contains(&address)
        };
        Process::all().into_iter().find(is_it).expect("containerd's process")
    };
    let cycle = || drop(Run::new(BUSYBOX).command(&["true"]).output().ok());
    // What is made once is not growth.
    (0..cycles / 10 + 5).for_each(|_| cycle());
    before.expect_unchanged();
    let containerd = containerd();
    let first = Growth::now(&containerd);
    for number in 0..cycles {
        cycle();
        if number % 500 == 499 {
            println!("{}: {:?}", number + 1, Growth::now(&containerd));
        }
    }
    before.expect_unchanged();
    let small = |more: u64, first: u64, share: u64| more <= first + 16 + cycles as u64 / share;
    let all_small = || {
        let last = Growth::now(&containerd);
        let holds = small(last.descriptors, first.descriptors, 1000)
            && small(last.mounts, first.mounts, 1000)
            && small(last.processes, first.processes, 1000)
            && small(last.dying, first.dying, 100)
            // 16 MiB, and less than a KiB of each cycle.
            && last.unreclaimable <= first.unreclaimable + (16 << 10) + cycles as u64 / 2;
        println!("{cycles} cycles: from {first:?} to {last:?}");
        holds
    };
    assert!(katana_tests::host::eventually(all_small), "something grows");
}
