//! Many pods at once.

use katana_tests::cri::Pod;
use katana_tests::host::Host;
use katana_tests::turn::alone;
use katana_tests::{Instance, environment};

const ROUNDS: usize = 3;

fn come_and_go(handler: &str) {
    let before = Host::before();
    let here = katana_tests::Containerd::current();
    let count = if environment::is_soak() { 30 } else { 10 };
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            let one = |number: usize| {
                let _here = here.enter();
                let pod = Pod::run(handler);
                let container = pod.sh(&format!("echo {number}; exec sleep 10000"));
                container.wait_for_output(&format!("{number}\n"));
                assert_eq!(container.sh("echo $((6 * 7))").ok(), "42");
                pod.stop().unwrap_or_else(|e| panic!("round {round}, pod {number}: stop: {e}"));
                pod.remove().unwrap_or_else(|e| panic!("round {round}, pod {number}: remove: {e}"));
            };
            for number in 0..count {
                scope.spawn(move || one(number));
            }
        });
    }
    before.expect_unchanged();
}

#[test]
fn many_pods_come_and_go_at_once() {
    let _turn = alone();
    drop(Pod::run("kata"));
    come_and_go("kata");
    if environment::is_soak() {
        let instance = Instance::of_version_2();
        let _here = instance.containerd().enter();
        drop(Pod::run("kata-shim"));
        come_and_go("kata-shim");
    }
}
