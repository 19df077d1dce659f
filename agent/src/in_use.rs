//! Whether processes use files of a file system.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The number of a device: a major and a minor one.
pub type Device = (u32, u32);

/// The device of what a descriptor stands for; nobody is asked, not even the host.
pub fn device(fd: BorrowedFd<'_>) -> Option<Device> {
    statx(fd.as_raw_fd(), Path::new(""), libc::AT_EMPTY_PATH)
}

/// Whether a process other than this one has a file of the file system open or mapped, or is in a directory of it.
pub fn is_in_use(device: Device) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return true };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| *pid != std::process::id()).any(|pid| uses(pid, device))
}

/// Processes end meanwhile: those use nothing.
fn uses(pid: u32, device: Device) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let leads_there = |path: &Path| statx(libc::AT_FDCWD, path, 0) == Some(device);
    let mapping = |line: &str| {
        let (major, minor) = line.split_ascii_whitespace().nth(3)?.split_once(':')?;
        Some((u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?))
    };
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    ["cwd", "root"].iter().any(|link| leads_there(&process.join(link)))
        || descriptors.into_iter().any(|entry| leads_there(&entry.path()))
        || maps.lines().any(|line| mapping(line) == Some(device))
}

fn statx(directory: i32, path: &Path, flags: i32) -> Option<Device> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: struct statx holds integers only, for all of which zero is a value.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = flags | libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: a string and a structure that outlive the call, and integers.
    let result = unsafe { libc::statx(directory, path.as_ptr(), flags, 0, &raw mut status) };
    (result == 0).then_some((status.stx_dev_major, status.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    #[test]
    fn who_has_a_file_open_or_is_in_a_directory_uses_its_file_system() {
        let shm = fs::File::open("/dev/shm").unwrap();
        let device = device(shm.as_fd()).unwrap();
        assert_eq!(super::device(fs::File::open("/dev/shm/.").unwrap().as_fd()), Some(device));
        let path = format!("/dev/shm/katana-in-use-{}", std::process::id());
        let file = fs::File::create(&path).unwrap();
        fs::remove_file(path).unwrap();
        let run = |command: &mut Command| command.arg("100").spawn().unwrap();
        let children = [
            run(Command::new("sleep").stdin(Stdio::null())),
            run(Command::new("sleep").stdin(Stdio::from(file))),
            run(Command::new("sleep").current_dir("/dev/shm")),
        ];
        let used = children.each_ref().map(|child| uses(child.id(), device));
        for mut child in children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(used, [false, true, true]);
    }
}
