//! Nothing stays behind on the host when a start is interrupted. More deaths are in `faults/deaths.rs`, many containers one
//! after another in `faults/cycles.rs`.

use katana_tests::host::Host;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Run, environment};

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
