//! kata-vmm: one virtual machine, one process.

mod memory;
mod virtio;

fn main() {}
