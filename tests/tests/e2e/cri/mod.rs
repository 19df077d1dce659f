//! Pods, as kubelet makes them through containerd's CRI plugin.
//!
//! Every case runs with the runtime handlers `kata` and `runc` of containerd 1.7, and with containerd 2: a case that
//! runc fails is a wrong case, and what a virtual machine cannot do as runc does is no case here but a line in
//! docs/limitations.md.

#![allow(
    clippy::unwrap_used,
    reason = "cases are tests, though it is the macro's functions that are marked so"
)]

use katana_tests::{Instance, environment, turn};

mod configuration;
mod docker_inside;
mod empty_dirs;
mod exec;
mod host_namespaces;
mod life;
mod resources;
mod security;
mod sharing;
mod streaming;
mod volumes;
mod watching;
mod writable;

/// A case and its name.
type Case = (&'static str, fn(&str));

/// Makes tests of each case: `kata::CASE` and `runc::CASE` with containerd 1.7, and for those that begin with `2:` also
/// `kata_2::CASE` with containerd 2, where the shim is the sandbox. A case is a function of the runtime handler.
macro_rules! cases {
    ($($(#[$what:meta])* $($two:literal :)? $case:ident,)+) => {
        pub(super) const CASES: &[$crate::cri::Case] = &[$((stringify!($case), $case)),+];
        mod kata {
            $(#[test] fn $case() { $crate::cri::run("kata", super::$case); })+
        }
        mod runc {
            $(#[test] fn $case() { $crate::cri::run("runc", super::$case); })+
        }
        mod kata_2 {
            $($(#[test] fn $case() { $crate::cri::run_2($two, "kata-shim", super::$case); })?)+
        }
    };
}
use cases;

fn run(handler: &str, case: fn(&str)) {
    let _turn = turn::shared();
    if handler == "runc" || environment::is_vm_or_say("the case is run with runc under another name") {
        case(handler);
    }
}

fn run_2(version: u8, handler: &str, case: fn(&str)) {
    assert_eq!(version, 2);
    let _turn = turn::shared();
    if environment::is_vm_or_say("containerd's own runtime is no matter of ours") {
        let instance = Instance::of_version_2();
        let _here = instance.containerd().enter();
        case(handler);
    }
}

/// All cases, also with containerd 2's own sandboxer. Of the latter there are two if the tests are not to be long: what
/// is particular to it is the same with containerd 1.7.
#[test]
fn every_case_with_containerd_2() {
    let all = [
        life::CASES,
        volumes::CASES,
        watching::CASES,
        exec::CASES,
        resources::CASES,
        security::CASES,
        sharing::CASES,
        streaming::CASES,
        writable::CASES,
        empty_dirs::CASES,
    ];
    let runs: Vec<(&str, Case)> = if environment::is_soak() {
        let handlers = ["kata", "kata-shim"].into_iter();
        handlers.flat_map(|handler| all.concat().into_iter().map(move |case| (handler, case))).collect()
    } else {
        vec![("kata", life::CASES[0]), ("kata", volumes::CASES[0])]
    };
    for (handler, (name, case)) in runs {
        eprintln!("{name} with {handler}");
        run_2(2, handler, case);
    }
}
