//! What the guest sees of the host's files: the shared directory, and in it roots and volumes; disks.
//!
//! May use [`crate::spec`] and [`crate::host`].

pub mod disks;
pub mod file_system;
pub mod handed;
pub mod mount_table;
pub mod mounts;
pub mod rootfs;
pub mod share;
pub mod volumes;
