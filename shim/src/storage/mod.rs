//! What the guest sees of the host's files: the shared directory, and in it roots and volumes; disks.
//!
//! May use [`crate::spec`], [`crate::host`] and [`crate::error`].

pub mod disk_slots;
pub mod disks;
pub mod ext4;
pub mod file_system;
pub mod image;
pub mod mount_table;
pub mod mounts;
pub mod pod_volumes;
pub mod rootfs;
pub mod share;
pub mod vmm_files;
pub mod volumes;
pub mod writable;
