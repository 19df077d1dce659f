//! Pods, as kubelet makes them through containerd's CRI plugin.
//!
//! Every case runs with the runtime handlers `kata` and `runc` of containerd 1.7, and with containerd 2: a case that runc fails is a wrong case, and what
//! a virtual machine cannot do as runc does is no case here but a line in docs/limitations.md.

#![allow(
    clippy::unwrap_used,
    reason = "cases are tests, though it is the macro's functions that are marked so"
)]

use katana_tests::{Instance, environment, turn};

mod exec;
mod life;
mod resources;
mod security;
mod sharing;
mod streaming;
mod volumes;

/// Makes tests of each case: `kata::CASE` and `runc::CASE` with containerd 1.7, `kata_2::CASE` with containerd 2 where the shim is
/// the sandbox; and one for all cases with containerd 2's own sandboxer, which has the first case only unless there is time.
/// A case is a function of the runtime handler.
macro_rules! cases {
    ($($(#[$what:meta])* $case:ident,)+) => {
        mod kata {
            $(#[test] fn $case() { $crate::cri::run("kata", super::$case); })+
        }
        mod runc {
            $(#[test] fn $case() { $crate::cri::run("runc", super::$case); })+
        }
        mod kata_2 {
            $(#[test] fn $case() { $crate::cri::run_2("kata-shim", &[super::$case]); })+

            #[test]
            fn with_a_sandbox_container() {
                $crate::cri::run_2("kata", &[$(super::$case),+]);
            }
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

/// With containerd 2: some cases, one after the other, unless the tests are to be long.
fn run_2(handler: &str, cases: &[fn(&str)]) {
    let _turn = turn::shared();
    if !environment::is_vm_or_say("containerd's own runtime is no matter of ours") {
        return;
    }
    let instance = Instance::of_version_2();
    let _here = instance.containerd().enter();
    let count = if environment::is_soak() { cases.len() } else { 1 };
    for case in &cases[..count] {
        case(handler);
    }
}
