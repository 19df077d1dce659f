//! Containers for which `ctr run` has no options: those of a specification, with a root that is a plain directory.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::container::{Run, ctr, new_id};
use crate::scratch::LoopDevice;
use crate::{BUSYBOX, Command, Scratch};

/// A specification that a test changes, and busybox as its root. Both are gone when this is dropped.
pub struct Bundle {
    scratch: Scratch,
    root: PathBuf,
    /// The specification.
    pub spec: Value,
}

impl Bundle {
    /// `ctr`'s own specification for a shell script.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn new(script: &str) -> Self {
        let scratch = Scratch::new();
        let root = scratch.directory("root");
        ctr(&["images", "mount", "--rw", BUSYBOX, &root.display().to_string()]).output().ok();
        let mut spec: Value =
            serde_json::from_slice(&ctr(&["oci", "spec"]).output().ok().stdout).expect("JSON");
        spec["root"]["path"] = root.display().to_string().into();
        spec["root"]["readonly"] = false.into();
        // The one of `ctr` is the whole namespace's.
        spec["linux"]["cgroupsPath"] = format!("/{}", new_id()).into();
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        Self { scratch, root, spec }
    }

    /// Binds the node of a disk, with a device rule for what may be done to it: `r`, `rw`, or nothing.
    ///
    /// # Panics
    /// When the disk is not there.
    #[track_caller]
    pub fn add_disk(&mut self, disk: &LoopDevice, destination: &str, access: &str) {
        let number = std::fs::metadata(disk.path()).expect("a node").rdev();
        let mounts = self.spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(
            json!({"type": "bind", "source": disk.path(), "destination": destination, "options": ["bind"]}),
        );
        let rules = self.spec["linux"]["resources"]["devices"].as_array_mut().expect("device rules");
        if !access.is_empty() {
            let (major, minor) = (major(number), minor(number));
            rules.push(json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access}));
        }
    }

    /// A directory for more files.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The container.
    ///
    /// # Panics
    /// When the specification cannot be written.
    pub fn run(&self) -> Run {
        let path = self.scratch.file("spec.json", self.spec.to_string());
        Run::new(BUSYBOX).options(&format!("--config {}", path.display()))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // The next run of the tests relies on this, also after a failure.
        let root = self.root.display().to_string();
        drop(Command::new(&["umount", "--lazy", &root]).output());
        drop(ctr(&["snapshots", "rm", &root]).output());
    }
}
