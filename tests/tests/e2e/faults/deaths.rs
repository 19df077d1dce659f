//! Processes are killed.

use std::time::{Duration, Instant};

use katana_tests::command::Running;
use katana_tests::containerd::{Instance, Version};
use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Container, Run, environment};
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
enum Operation {
    Start,
    Exec,
    Pause,
    Delete,
}

const OPERATIONS: [Operation; 4] = [Operation::Start, Operation::Exec, Operation::Pause, Operation::Delete];

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

/// The processes of a container that is a pod of its own: those of its shim, or of its VMM. None, if they are not there
/// (yet).
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

fn begin(operation: Operation, container: &Container, panics_after: Option<Duration>) -> Running {
    match operation {
        Operation::Start => run(container.id(), panics_after).spawn(),
        Operation::Exec => container.exec_command(&[], &["sleep", "10000"]).spawn(),
        Operation::Pause => container.task_command("pause", &[]).spawn(),
        Operation::Delete => container.task_command("delete", &["--force"]).spawn(),
    }
}

/// How long an operation takes when nobody is killed.
fn usual_time(operation: Operation) -> Duration {
    let id = katana_tests::container::new_id();
    let container = Container::adopt(&id);
    if operation != Operation::Start {
        run(&id, None).detached().ok();
    }
    let start = Instant::now();
    match operation {
        Operation::Start => drop(Run::new(BUSYBOX).id(&id).command(&["true"]).output().ok()),
        Operation::Exec => drop(container.exec(&["true"]).ok()),
        Operation::Pause | Operation::Delete => drop(begin(operation, &container, None).finish()),
    }
    start.elapsed()
}

struct Round<'a> {
    instance: &'a Instance,
    operation: Operation,
    victim: Victim,
    /// From the beginning of the operation to the death.
    pause: Duration,
}

impl Round<'_> {
    fn play(&self) {
        let id = katana_tests::container::new_id();
        let container = Container::adopt(&id);
        let panics_after = (self.victim == Victim::Agent).then_some(self.pause);
        if self.operation != Operation::Start {
            // The guest may have panicked before that is answered.
            let started = run(&id, panics_after).detached();
            assert!(panics_after.is_some() || started.code == 0, "{started}");
        }
        let running = begin(self.operation, &container, panics_after);
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
        if victim == Victim::Agent
            || !victims.is_empty()
            || matches!(self.operation, Operation::Pause | Operation::Delete)
        {
            // Whatever it was, it is answered.
            running.finish();
            return;
        }
        if self.operation == Operation::Start {
            // A container that is deleted before containerd has answered can leave a task without it, with every
            // runtime.
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
    let usual = OPERATIONS.map(usual_time);
    let (mut random, rounds) = (Random(11), environment::rounds(20));
    let mut played = Vec::new();
    for number in 0..rounds {
        // Each with each, over and over.
        let operation = number % OPERATIONS.len();
        let victim = VICTIMS[(number / OPERATIONS.len() + number) % VICTIMS.len()];
        let pause = random.part_of(usual[operation]);
        played.push(format!("{:?} of {victim:?} after {pause:?}", OPERATIONS[operation]));
        println!("{number}: {}", played[number]);
        Round { instance: &instance, operation: OPERATIONS[operation], victim, pause }.play();
        // So that it is known which of them left something.
        if number % 5 == 4 || number + 1 == rounds {
            before.expect_unchanged();
        }
    }
}

/// `ctr` dies at any moment; what it had begun, `delete` ends.
#[test]
fn an_abandoned_container_is_deleted_without_a_trace() {
    let _turn = alone();
    let before = Host::before();
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    let exec = container.exec_command(&[], &["sh", "-c", "echo started; sleep 10000"]).spawn();
    exec.wait_for("started");
    drop(exec);
    drop(container);
    before.expect_unchanged();
}
