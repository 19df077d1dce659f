//! The way into the virtual machine: the VMM's process, the agent in the guest, and the vsock ports between guest and
//! host.
//!
//! May use [`crate::storage`] and what is below it.

pub mod agent;
pub mod ports;
pub mod vmm;
