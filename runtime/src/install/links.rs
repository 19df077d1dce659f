//! Links to the programs, where daemons and people look for programs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::change::{Change, Content};

/// Those that others call; kata-vmm is the shim's alone.
const PROGRAMS: [&str; 3] = ["containerd-shim-kata-v2", "kata-runtime", "kata-monitor"];
const PLACE: &str = "usr/local/bin";
/// Where a package of a distribution has its own.
const PACKAGED: &str = "usr/bin";

/// Why a link is not made.
#[derive(Debug, thiserror::Error)]
#[error("{} is there already, and does not lead to {}", path.display(), to.display())]
pub(crate) struct Error {
    path: PathBuf,
    to: PathBuf,
}

/// Links to what is in `programs`, for a host whose root directory is `root`.
pub(crate) fn install(root: &Path, programs: &Path) -> Result<Vec<Change>, Error> {
    let mut changes = Vec::new();
    for name in PROGRAMS {
        let to = programs.join(name);
        let place = |directory: &str| root.join(directory).join(name);
        let (path, packaged) = (place(PLACE), place(PACKAGED));
        let leads_there = |path: &Path| fs::read_link(path).is_ok_and(|found| found == to);
        if path == to || packaged == to || !below(root, &to).exists() || leads_there(&packaged) {
            continue;
        }
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => changes.push(change(path, to, true)),
            _ if leads_there(&path) => {}
            _ => return Err(Error { path, to }),
        }
    }
    Ok(changes)
}

/// Takes them away; what leads elsewhere is somebody else's.
pub(crate) fn uninstall(root: &Path, programs: &Path) -> Vec<Change> {
    let links = PROGRAMS.map(|name| (root.join(PLACE).join(name), programs.join(name)));
    let ours = links.into_iter().filter(|(path, to)| fs::read_link(path).is_ok_and(|found| found == *to));
    ours.map(|(path, to)| change(path, to, false)).collect()
}

/// A path of the host, seen from here.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn change(path: PathBuf, to: PathBuf, wanted: bool) -> Change {
    let link = Some(Content::Link(to));
    let (before, after) = if wanted { (None, link) } else { (link, None) };
    Change { path, before, after, like: None }
}
