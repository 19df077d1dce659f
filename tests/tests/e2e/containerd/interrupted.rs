//! containerd is killed while it creates something. Whoever has asked for it removes what containerd knows of it
//! afterwards, and then nothing is left (kata-containers#5246).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use katana_tests::container::new_id;
use katana_tests::containerd::Version;
use katana_tests::cri::Pod;
use katana_tests::host::Host;
use katana_tests::scratch::noise;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Container, Instance, Run, environment};
use nix::sys::signal::Signal::SIGKILL;
use serde_json::json;

/// Creates something, which may fail at any point.
type Create = fn(handler: &str, id: &str);

fn container(_: &str, id: &str) {
    let run = Run::new(BUSYBOX).id(id).command(&["sleep", "10000"]).spawn();
    // Its client waits for the container's end.
    while !katana_tests::ctr(&["tasks", "ls"]).output().text().contains("RUNNING") && lives(id) {
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(run);
}

/// Whether its client is there, which ends with containerd.
fn lives(id: &str) -> bool {
    use katana_tests::process::Process;
    Process::all()
        .iter()
        .any(|process| process.name == "ctr" && process.arguments.iter().any(|word| word == id))
}

fn pod(handler: &str, _: &str) {
    if let Ok(pod) = Pod::try_run(handler, json!({})) {
        if let Ok(container) = pod.create(json!({})) {
            let _ = container.start();
        }
        // Its removal is what follows.
        std::mem::forget(pod);
    }
}

fn remove(id: &str) {
    drop(Container::adopt(id));
    // If there was no container yet that it belongs to.
    let _ = katana_tests::ctr(&["snapshots", "rm", id]).output();
    Pod::remove_all();
}

fn interrupt(version: Version, kinds: &[(&str, Create)], rounds: usize) {
    let _turn = alone();
    if !environment::is_vm_or_say("runc's shim does not clean up when killed during a start") {
        return;
    }
    let instance = Instance::start(version);
    let _here = instance.containerd().enter();
    let usual: Vec<Duration> = kinds.iter().map(|(handler, create)| usual_time(handler, *create)).collect();
    let before = Host::before();
    let seed = u64::from(std::process::id());
    for round in 0..rounds {
        let (handler, create) = kinds[round % kinds.len()];
        let byte = noise(1, seed + 2 * u64::try_from(round).expect("a small number"))[0];
        let moment = usual[round % kinds.len()].mul_f32(f32::from(byte) / 256.0);
        eprintln!("round {round} with {handler:?}: containerd is killed after {moment:.1?}");
        let id = new_id();
        std::thread::scope(|scope| {
            let creating = scope.spawn(|| {
                let _here = instance.containerd().enter();
                create(handler, &id);
            });
            std::thread::sleep(moment);
            instance.end(SIGKILL);
            creating.join().expect("a client");
        });
        instance.restart(version);
        remove(&id);
        before.expect_unchanged_but(is_containerds_own);
    }
}

fn usual_time(handler: &str, create: Create) -> Duration {
    let id = new_id();
    create(handler, &id);
    remove(&id);
    let start = Instant::now();
    create(handler, &id);
    let usual = start.elapsed();
    remove(&id);
    usual
}

/// The address that a network plugin has given to a pod of which containerd has not yet written anything down is
/// forgotten with containerd, with any runtime: with runc it was left in one of 20 rounds.
fn is_containerds_own(change: &str) -> bool {
    change.strip_prefix("left behind: file ").is_some_and(|name| name.parse::<IpAddr>().is_ok())
}

#[test]
fn a_create_that_was_interrupted_leaves_nothing_behind() {
    interrupt(Version::One, &[("", container), ("kata", pod)], if environment::is_soak() { 30 } else { 6 });
}

#[test]
fn a_create_of_a_sandbox_that_was_interrupted_leaves_nothing_behind() {
    interrupt(Version::Two, &[("kata-shim", pod)], if environment::is_soak() { 20 } else { 4 });
}
