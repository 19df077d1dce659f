//! The real shim as containerd starts and calls it, with the real agent, on this machine. In place of a VMM is
//! a stand-in that speaks the VMM's protocol and runs the agent as a process instead of booting a guest.
//!
//! Needs root, target/busybox, a built kata-agent (for some tests kata-runtime, too), and /dev/kvm, which the shim opens: without that it says so and does
//! nothing.

// clippy.toml lets tests unwrap, but not the helpers of an integration test.
#![allow(clippy::unwrap_used)]

mod containerd;
mod hung;
mod stand_in;

mod errors;
mod life;
mod metrics;
mod sandbox;
mod silent;
mod sockets;
mod streams;
mod tools;
