//! Containers made by the agent on this machine, without a virtual machine.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod confinement;
mod copies;
mod file_systems;
mod guest;
mod harness;
mod lifecycle;
mod resources;
mod sockets;
mod streams;
