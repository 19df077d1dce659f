//! What fails anywhere, at any moment: processes are killed, and what the host has of something runs out. Nothing stays
//! behind, and an error names what ran out.

mod cycles;
mod deaths;
mod lacks;
mod later_lacks;

use std::path::{Path, PathBuf};

use katana_tests::host::eventually;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The directory of the pods' own files.
const PLACE: &str = "/run/kata-containers";

/// A small file system over the directory of the pods' own files, until this is dropped. Whatever is there stays below.
struct SmallPlace;

impl SmallPlace {
    fn new(options: &str) -> Self {
        std::fs::create_dir_all(PLACE).expect("the directory");
        mount(Some("tmpfs"), PLACE, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("tmpfs");
        Self
    }

    /// Makes a file after the other until the file system takes neither bytes nor files any more.
    fn fill(&self) {
        let script =
            "mkdir filler && cd filler; cat /dev/zero > zeros; i=0; while : > $i; do i=$((i+1)); done";
        let script = format!("cd {PLACE} && {script}");
        katana_tests::Command::new(&["sh", "-c", &script]).output();
        assert!(Path::new(PLACE).join("filler/zeros").exists(), "nothing fills {PLACE}");
    }

    /// Asserts that no pod leaves anything there: with the file system goes what a look at the host would show.
    #[track_caller]
    fn expect_nothing_left(&self) {
        let mut left = Vec::new();
        let gone = eventually(|| {
            left = left_in(Path::new(PLACE));
            left.is_empty()
        });
        assert!(gone, "left behind: {left:?}");
    }
}

impl Drop for SmallPlace {
    fn drop(&mut self) {
        // A test that fails is not to take all others with it by a second panic.
        if let Err(e) = umount2(PLACE, MntFlags::MNT_DETACH) {
            println!("unmount {PLACE}: {e}");
        }
    }
}

/// What is below a directory, but for the directories that all pods share, whole templates and what fills the place.
fn left_in(directory: &Path) -> Vec<PathBuf> {
    const SHARED: [&str; 4] = ["sandboxes", "shared", "shared/sandboxes", "template"];
    let mut left = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.strip_prefix(PLACE).expect("a place below");
        if SHARED.iter().any(|shared| name == Path::new(shared)) {
            left.extend(left_in(&path));
        } else if name.starts_with("template") && path.extension().is_none_or(|end| end != "part") {
            // The next machine comes from it.
        } else if !name.starts_with("filler") {
            left.push(path);
        }
    }
    left
}
