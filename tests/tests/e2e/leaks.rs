//! Nothing stays behind on the host.

use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Run, Scratch, environment};

#[test]
fn containers_one_after_another_leave_nothing_behind() {
    let _turn = alone();
    let scratch = Scratch::new();
    let before = Host::before();
    for round in 0..environment::rounds(30) {
        let code = i32::try_from(round % 3).expect("a small number");
        // Some of everything that must be removed: a volume, a tmpfs, a cgroup with limits, a process left alone.
        let script = format!("sleep 10000 & mkdir -p /a/b; echo > /volume/file; exit {code}");
        let run = Run::new(BUSYBOX).bind(scratch.path(), "/volume", "rw").options("--memory-limit 67108864");
        run.sh(&script).output().expect_code(code);
    }
    before.expect_unchanged();
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

/// Random moments of death: the VMM, or the shim, at any point of a start.
#[test]
fn death_during_the_start_leaves_nothing_behind() {
    let _turn = alone();
    if !environment::is_vm_or_say("runc's shim does not clean up when killed during a start") {
        return;
    }
    let before = Host::before();
    let start = std::time::Instant::now();
    Run::new(BUSYBOX).command(&["true"]).output().ok();
    let usual = start.elapsed();
    let rounds = environment::rounds(3);
    for round in 0..rounds {
        let id = katana_tests::container::new_id();
        let running = Run::new(BUSYBOX).id(&id).command(&["sleep", "10000"]).spawn();
        let share = u32::try_from(round + 1).expect("a small number");
        std::thread::sleep(usual * share / u32::try_from(rounds + 1).expect("a small number"));
        let name = if round % 2 == 0 { "kata-vmm" } else { "containerd-shim" };
        let of_it = |process: &Process| {
            let parent = Process::all().into_iter().find(|other| other.pid == process.parent);
            let named = |process: &Process| process.arguments.contains(&id);
            named(process) || parent.is_some_and(|parent| named(&parent))
        };
        let victims: Vec<Process> =
            Process::all().into_iter().filter(|p| p.name.starts_with(name) && of_it(p)).collect();
        for victim in &victims {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(victim.pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        // Until containerd has answered, a container can be deleted whose task comes a moment later: with every
        // runtime, that task has no container by which `ctr` could find it.
        let container = katana_tests::Container::adopt(&id);
        if victims.is_empty() {
            container.wait_for_task();
            drop(running);
        } else {
            running.finish();
        }
        drop(container);
    }
    before.expect_unchanged();
}
