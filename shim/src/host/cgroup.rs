//! The VMM's place in the host's cgroup v2 tree: where the pod's limits and accounting are.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::mark::{is_marked, mark};
use crate::error::{Error, Result, reason};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Marks the directories that a shim has made, so that no others are removed.
const MARK: &std::ffi::CStr = c"trusted.katana";

/// The directory for a pod's VMM, from `linux.cgroupsPath`; nothing on a host without cgroup v2.
pub fn path(cgroups_path: Option<&str>, id: &str) -> Option<PathBuf> {
    let unified = statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if !unified {
        log::info!("{ROOT} is not a cgroup v2 tree: the VMM stays in the shim's cgroup");
        return None;
    }
    Some(Path::new(ROOT).join(relative(cgroups_path.unwrap_or(""), id)))
}

/// A plain path, or systemd's "slice:prefix:name", as a path below the root that never leads out of it.
fn relative(cgroups_path: &str, id: &str) -> PathBuf {
    let path = match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] if !name.is_empty() => {
            let unit = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}") };
            let unit = if unit.ends_with(".slice") { unit } else { format!("{unit}.scope") };
            slice_path(if slice.is_empty() { "system.slice" } else { slice }).join(unit)
        }
        _ => PathBuf::from(cgroups_path),
    };
    let normal: PathBuf =
        path.components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    if normal.as_os_str().is_empty() { Path::new("kata").join(id) } else { normal }
}

/// "a-b.slice" is a.slice/a-b.slice: systemd.slice(5).
fn slice_path(slice: &str) -> PathBuf {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    ends.filter(|end| *end > 0)
        .filter_map(|end| stem.get(..end))
        .map(|name| format!("{name}.slice"))
        .collect()
}

/// Makes the directory, and opens it for a process to be born in.
pub fn make(path: &Path) -> Result<OwnedFd> {
    let failed = |e: &io::Error| Error::io(format_args!("cgroup {}", path.display()), e);
    // Another pod's end may take an empty parent away between the steps.
    for _ in 0..10 {
        match create(path).and_then(|()| File::open(path)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            outcome => return outcome.map(Into::into).map_err(|e| failed(&e)),
        }
    }
    Err(failed(&io::ErrorKind::NotFound.into()))
}

fn create(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create(parent)?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        Err(_) => return Ok(()),
        Ok(()) => {}
    }
    if let Err(e) = mark(path, MARK) {
        log::debug!("mark cgroup {}: {e}", path.display());
    }
    Ok(())
}

/// Sees to it that the directory has these controllers, which each directory above it has to hand down.
pub fn enable(path: &Path, controllers: &[&str]) -> io::Result<()> {
    let has_all = || {
        let all = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
        controllers.iter().all(|wanted| all.split_whitespace().any(|one| one == *wanted))
    };
    if has_all() {
        return Ok(());
    }
    let mut above: Vec<_> = path.ancestors().skip(1).take_while(|above| above.starts_with(ROOT)).collect();
    above.reverse();
    for directory in above {
        let file = directory.join("cgroup.subtree_control");
        let words: Vec<_> = controllers.iter().map(|controller| format!("+{controller}")).collect();
        fs::write(&file, words.join(" "))
            .map_err(|e| io::Error::other(format!("{}: {}", file.display(), reason(&e))))?;
    }
    if has_all() { Ok(()) } else { Err(io::Error::other(format!("no {}", controllers.join(", ")))) }
}

/// Removes the pod's directory, and those above it that a shim made and nobody is in any more.
///
/// # Errors
/// When somebody is in the pod's own. One that is gone or was made by others is none to remove.
pub fn remove(path: &Path) -> io::Result<()> {
    let ours = |path: &&Path| path.starts_with(ROOT) && *path != Path::new(ROOT) && is_ours(path);
    let mut directories = path.ancestors().take_while(ours);
    match directories.next().map_or(Ok(()), fs::remove_dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    while directories.next().is_some_and(|above| fs::remove_dir(above).is_ok()) {}
    Ok(())
}

/// Whether a shim has made the directory.
pub fn is_ours(path: &Path) -> bool {
    is_marked(path, MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        let cases = [
            ("/default/c1", "default/c1"),
            ("kubepods/pod1/abc", "kubepods/pod1/abc"),
            ("", "kata/id"),
            ("/", "kata/id"),
            ("../../etc/../x", "etc/x"),
            ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
            (":cri:abc", "system.slice/cri-abc.scope"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
        ];
        for (given, expected) in cases {
            assert_eq!(relative(given, "id"), Path::new(expected), "{given}");
        }
        for hostile in
            ["../..", "a/../..:..:../../b", "..:..:..", "x:/:..", "-:-:-", "..-..-.slice:a/..:b/../../c"]
        {
            let found = relative(hostile, "id");
            let normal = |part| matches!(part, std::path::Component::Normal(_));
            assert!(found.components().all(normal) && found.components().count() > 0, "{hostile}: {found:?}");
        }
    }
}
