//! Pods, as kubelet makes them through containerd's CRI plugin.
//!
//! Every case runs twice, with the runtime handlers `kata` and `runc`: a case that runc fails is a wrong case, and what
//! a virtual machine cannot do as runc does is no case here but a line in docs/limitations.md.

#![allow(
    clippy::unwrap_used,
    reason = "cases are tests, though it is the macro's functions that are marked so"
)]

use katana_tests::environment;

mod exec;
mod life;
mod resources;
mod security;
mod sharing;
mod streaming;
mod volumes;
mod watching;

/// Makes two tests of each case, `kata::CASE` and `runc::CASE`. A case is a function of the runtime handler.
macro_rules! cases {
    ($($(#[$what:meta])* $case:ident,)+) => {
        mod kata {
            $(#[test] fn $case() { $crate::cri::run("kata", super::$case); })+
        }
        mod runc {
            $(#[test] fn $case() { $crate::cri::run("runc", super::$case); })+
        }
    };
}
use cases;

fn run(handler: &str, case: fn(&str)) {
    let _turn = katana_tests::turn::shared();
    if handler == "runc" || environment::is_vm_or_say("the case is run with runc under another name") {
        case(handler);
    }
}
