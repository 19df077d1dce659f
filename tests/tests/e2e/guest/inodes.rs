//! What there is to an inode besides mode and contents: statx(2), ioctl_iflags(2), `O_NOATIME`, `security.*`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use libc::{ENODATA, EPERM};

use super::attributes::{get, set};
use super::{Findings, OWNER, Place, STRANGER, checked};

#[test]
#[ignore = "runs inside a container"]
fn files_and_directories_have_a_time_of_birth() {
    let place = Place::new("birth");
    let mut findings = Findings::default();
    let before = SystemTime::now() - Duration::from_secs(10);
    let file = place.file("file", 0o644);
    // A change of times leaves it as it is.
    let born = file.metadata().expect("stat").created();
    File::options()
        .write(true)
        .open(&file)
        .expect("open")
        .set_modified(SystemTime::UNIX_EPOCH)
        .expect("utimens");
    for path in [&file, &place.directory("directory", 0o755)] {
        let data = path.metadata().expect("stat");
        let created = data.created().map_err(|error| error.to_string());
        let now = SystemTime::now() + Duration::from_secs(10);
        findings.expect(
            &format!("{path:?} was made just now"),
            created.map(|at| at > before && at < now),
            Ok(true),
        );
    }
    findings.expect("after utimens", file.metadata().expect("stat").created().ok(), born.ok());
    let opened = File::open(&file).expect("open");
    findings.expect("by descriptor", opened.metadata().expect("fstat").created().is_ok(), true);
    findings.none();
}

const GET_FLAGS: u64 = 0x8008_6601;
const SET_FLAGS: u64 = 0x4008_6602;
const IMMUTABLE: i32 = 0x10;
const NO_DUMP: i32 = 0x40;

fn flags(path: &Path) -> io::Result<i32> {
    let mut flags = 0;
    // SAFETY: the kernel writes an int.
    checked(unsafe { libc::ioctl(File::open(path)?.as_raw_fd(), GET_FLAGS, &raw mut flags) })?;
    Ok(flags)
}

fn set_flags(path: &Path, flags: i32) -> io::Result<()> {
    // SAFETY: the kernel reads an int.
    checked(unsafe { libc::ioctl(File::open(path)?.as_raw_fd(), SET_FLAGS, &raw const flags) }).map(drop)
}

/// `chattr +d` and `lsattr`.
#[test]
#[ignore = "runs inside a container"]
fn inodes_have_flags() {
    let place = Place::new("flags");
    let mut findings = Findings::default();
    for path in [place.file("file", 0o644), place.directory("directory", 0o755)] {
        let before = flags(&path).expect("FS_IOC_GETFLAGS");
        findings.expect_errno("by a stranger", STRANGER.does(|| set_flags(&path, before | NO_DUMP)), EPERM);
        findings.expect_errno("by the owner", OWNER.does(|| set_flags(&path, before | NO_DUMP)), 0);
        findings.expect("flags", flags(&path).ok(), Some(before | NO_DUMP));
        findings.expect_errno("immutable", set_flags(&path, before | IMMUTABLE), EPERM);
        findings.expect_errno("and back", set_flags(&path, before), 0);
        findings.expect("flags", flags(&path).ok(), Some(before));
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn a_read_without_trace() {
    let place = Place::new("atime");
    let mut findings = Findings::default();
    let file = place.file("file", 0o644);
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let times = fs::FileTimes::new().set_accessed(old).set_modified(old + Duration::from_secs(1));
    File::options().write(true).open(&file).expect("open").set_times(times).expect("utimens");
    let quietly = || OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(&file);
    findings.expect_errno("by a stranger", STRANGER.does(quietly), EPERM);
    let mut contents = String::new();
    OWNER.does(quietly).expect("open").read_to_string(&mut contents).expect("read");
    findings.expect("what was read", contents.as_str(), "content\n");
    findings.expect("time of access", file.metadata().expect("stat").atime(), 1_000_000_000);
    findings.none();
}

/// Those that need a capability which containers do not have, and the one that has its own.
#[test]
#[ignore = "runs inside a container"]
fn security_attributes() {
    let place = Place::new("security");
    let mut findings = Findings::default();
    let file = place.file("file", 0o755);
    findings.expect_errno("none", get(&file, "security.check", 10), ENODATA);
    findings.expect_errno("set", set(&file, "security.check", b"x", 0), EPERM);
    findings.expect_errno("set by the owner", OWNER.does(|| set(&file, "security.check", b"x", 0)), EPERM);
    // struct vfs_cap_data, revision 2: CAP_NET_RAW.
    let capability = [0x0200_0001_u32, 1 << 13, 0, 0, 0].map(u32::to_le_bytes).concat();
    findings.expect_errno("capability", set(&file, "security.capability", &capability, 0), 0);
    findings.expect("its value", get(&file, "security.capability", 64).ok(), Some(capability));
    findings.none();
}
