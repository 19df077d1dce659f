//! Pods that tests share live until all tests have ended. Tests of what is done on a host without pods do not see them.

use std::fs;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

const RUN: &str = "/run/kata-containers";

/// The runtime's directory is empty, as after the host's boot, until this is dropped. Pods that are there go on. For tests
/// that run alone.
pub struct OutOfSight(());

impl OutOfSight {
    /// From now on.
    ///
    /// # Panics
    /// When the mount fails.
    #[expect(clippy::new_without_default, reason = "it does something")]
    pub fn new() -> Self {
        fs::create_dir_all(RUN).expect(RUN);
        mount(Some("tmpfs"), RUN, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).expect(RUN);
        Self(())
    }
}

impl Drop for OutOfSight {
    fn drop(&mut self) {
        let _ = umount2(RUN, MntFlags::MNT_DETACH);
    }
}
