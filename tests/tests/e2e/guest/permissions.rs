//! Who may do what: path_resolution(7), chmod(2), chown(2), unlink(2), inode(7).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use libc::{EACCES, EPERM};

use super::{Findings, MEMBER, OWNER, Place, ROOT, STRANGER, User, c_path, checked, mode_of, set_mode};

/// What somebody tries on a path.
type Act = fn(&Path) -> io::Result<()>;

fn read(path: &Path) -> io::Result<()> {
    File::open(path).map(drop)
}

fn write(path: &Path) -> io::Result<()> {
    OpenOptions::new().append(true).open(path).map(drop)
}

fn execute(path: &Path) -> io::Result<()> {
    // SAFETY: the string lives through the call.
    checked(unsafe { libc::faccessat(libc::AT_FDCWD, c_path(path).as_ptr(), libc::X_OK, libc::AT_EACCESS) })
        .map(drop)
}

fn chmod(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
}

fn touch(path: &Path) -> io::Result<()> {
    use nix::fcntl::AT_FDCWD;
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    let then = TimeSpec::new(1_000_000_000, 0);
    utimensat(AT_FDCWD, path, &then, &then, UtimensatFlags::FollowSymlink).map_err(io::Error::from)
}

fn create_in(path: &Path) -> io::Result<()> {
    File::create_new(path.join("new")).map(drop)
}

fn list(path: &Path) -> io::Result<()> {
    fs::read_dir(path).map(drop)
}

fn look_up(path: &Path) -> io::Result<()> {
    path.join("entry").metadata().map(drop)
}

fn remove_entry(path: &Path) -> io::Result<()> {
    fs::remove_file(path.join("entry"))
}

fn rename_entry(path: &Path) -> io::Result<()> {
    fs::rename(path.join("entry"), path.join("renamed"))
}

/// Each of the nine bits decides about exactly one class and one kind of access; root passes, except that nobody
/// executes what has no such bit.
#[test]
#[ignore = "runs inside a container"]
fn the_nine_bits_of_a_file() {
    let place = Place::new("bits");
    let mut findings = Findings::default();
    let file = place.file("file", 0);
    let kinds: [(Act, u32, &str); 3] = [(read, 4, "read"), (write, 2, "write"), (execute, 1, "execute")];
    for mode in [0o700, 0o070, 0o007, 0o400, 0o240, 0o124, 0o777, 0o000, 0o604, 0o755] {
        set_mode(&file, mode);
        for (user, shift) in [(OWNER, 6), (MEMBER, 3), (STRANGER, 0)] {
            for (act, bit, name) in kinds {
                let expected = if mode >> shift & bit != 0 { 0 } else { EACCES };
                let what = format!("{name} of a file with {mode:03o} by {}", user.id);
                findings.expect_errno(&what, user.does(|| act(&file)), expected);
            }
        }
        let what = format!("write to a file with {mode:03o} by root");
        findings.expect_errno(&what, ROOT.does(|| write(&file)), 0);
        let what = format!("execution of a file with {mode:03o} by root");
        findings.expect_errno(
            &what,
            ROOT.does(|| execute(&file)),
            if mode & 0o111 != 0 { 0 } else { EACCES },
        );
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn the_bits_of_a_directory() {
    // bits for the stranger, what is tried, what comes of it
    let cases: [(u32, Act, &str, i32); 13] = [
        (0, list, "list", EACCES),
        (4, list, "list", 0),
        (1, list, "list", EACCES),
        (4, look_up, "look up", EACCES),
        (1, look_up, "look up", 0),
        (2, create_in, "create", EACCES),
        (1, create_in, "create", EACCES),
        (3, create_in, "create", 0),
        (5, remove_entry, "remove", EACCES),
        (2, remove_entry, "remove", EACCES),
        (3, remove_entry, "remove", 0),
        (5, rename_entry, "rename", EACCES),
        (3, rename_entry, "rename", 0),
    ];
    let place = Place::new("directory-bits");
    let mut findings = Findings::default();
    for (number, (bits, act, name, expected)) in cases.into_iter().enumerate() {
        let directory = place.directory(&number.to_string(), 0o755);
        place.file(&format!("{number}/entry"), 0o600);
        set_mode(&directory, 0o700 | bits);
        let what = format!("{name} in a directory with {bits:o} for others");
        findings.expect_errno(&what, STRANGER.does(|| act(&directory)), expected);
    }
    findings.none();
}

/// In a directory with the sticky bit, only the owners of the file and of the directory remove or rename: inode(7).
#[test]
#[ignore = "runs inside a container"]
fn a_sticky_directory() {
    let place = Place::new("sticky");
    let mut findings = Findings::default();
    let cases: [(User, User, i32); 5] = [
        // the directory's owner, who tries, what comes of it: the file is OWNER's
        (ROOT, OWNER, 0),
        (ROOT, STRANGER, EPERM),
        (ROOT, MEMBER, EPERM),
        (STRANGER, STRANGER, 0),
        (STRANGER, ROOT, 0),
    ];
    for (number, (owner, user, expected)) in cases.into_iter().enumerate() {
        for (act, name) in [(remove_entry as Act, "remove"), (rename_entry, "rename")] {
            let directory = place.directory(&format!("{number}-{name}"), 0o777);
            place.file(&format!("{number}-{name}/entry"), 0o666);
            super::give(&directory, owner.id, owner.group, 0o1777);
            let what = format!("{name} by {} in a sticky directory of {}", user.id, owner.id);
            findings.expect_errno(&what, user.does(|| act(&directory)), expected);
        }
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn who_may_change_mode_and_times() {
    let place = Place::new("mode");
    let mut findings = Findings::default();
    for (user, expected) in [(OWNER, 0), (ROOT, 0), (MEMBER, EPERM), (STRANGER, EPERM)] {
        let file = place.file(&user.id.to_string(), 0o666);
        findings.expect_errno(&format!("utimensat by {}", user.id), user.does(|| touch(&file)), expected);
        findings.expect_errno(&format!("chmod by {}", user.id), user.does(|| chmod(&file)), expected);
        findings.expect("the mode afterwards", mode_of(&file), if expected == 0 { 0o600 } else { 0o666 });
    }
    findings.none();
}

/// Only root gives files away; an owner may choose among the groups it is in: chown(2).
#[test]
#[ignore = "runs inside a container"]
fn who_may_change_the_owner() {
    let same = |id: Option<u32>, now: u32| id.unwrap_or(now);
    let cases: [(User, Option<u32>, Option<u32>, i32); 10] = [
        (ROOT, Some(1003), Some(2003), 0),
        (ROOT, Some(4_000_000_000), Some(4_000_000_001), 0),
        (ROOT, None, None, 0),
        (OWNER, Some(1003), None, EPERM),
        (OWNER, Some(OWNER.id), None, 0),
        (OWNER, None, Some(2002), 0),
        (OWNER, None, Some(2003), EPERM),
        (MEMBER, None, Some(2003), EPERM),
        (STRANGER, Some(1003), None, EPERM),
        (STRANGER, None, Some(2003), EPERM),
    ];
    let place = Place::new("owner");
    let mut findings = Findings::default();
    for (number, (user, owner, group, expected)) in cases.into_iter().enumerate() {
        let file = place.file(&number.to_string(), 0o644);
        let what = format!("chown to {owner:?}:{group:?} by {}", user.id);
        findings.expect_errno(&what, user.does(|| chown(&file, owner, group)), expected);
        let data = file.metadata().expect("stat");
        let wanted = if expected == 0 {
            (same(owner, OWNER.id), same(group, OWNER.group))
        } else {
            (OWNER.id, OWNER.group)
        };
        findings.expect(&format!("after {what}"), (data.uid(), data.gid()), wanted);
    }
    findings.none();
}

/// What a user makes is the user's, whatever process serves the file system.
#[test]
#[ignore = "runs inside a container"]
fn new_files_belong_to_their_makers() {
    let place = Place::new("makers");
    let mut findings = Findings::default();
    for user in [ROOT, OWNER, STRANGER] {
        let base = place.at(&user.id.to_string());
        user.does(|| {
            fs::create_dir(&base).expect("mkdir");
            fs::write(base.join("file"), "x").expect("write");
            std::os::unix::fs::symlink("nowhere", base.join("link")).expect("symlink");
            nix::unistd::mkfifo(&base.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600))
                .expect("mkfifo");
            std::os::unix::net::UnixListener::bind(base.join("socket")).expect("bind");
        });
        for name in ["", "file", "link", "fifo", "socket"] {
            let data = base.join(name).symlink_metadata().expect("lstat");
            findings.expect(&format!("owner of {name:?}"), (data.uid(), data.gid()), (user.id, user.group));
        }
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn the_umask_counts() {
    let place = Place::new("umask");
    let mut findings = Findings::default();
    for (mask, file, directory) in [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o000, 0o666, 0o777)] {
        let path = place.at(&format!("{mask:o}"));
        // SAFETY: umask cannot fail.
        unsafe { libc::umask(mask) };
        fs::create_dir(&path).expect("mkdir");
        fs::write(path.join("file"), "").expect("write");
        // SAFETY: as above.
        unsafe { libc::umask(0) };
        findings.expect("mode of a directory", mode_of(&path), directory);
        findings.expect("mode of a file", mode_of(&path.join("file")), file);
    }
    findings.none();
}

/// access(2) asks for the real user, open(2) for the effective one; the bits of one class are not added to another's.
#[test]
#[ignore = "runs inside a container"]
fn the_owners_bits_bind_the_owner() {
    let place = Place::new("class");
    let mut findings = Findings::default();
    let file = place.file("file", 0o077);
    findings.expect_errno("read by the owner of 0077", OWNER.does(|| read(&file)), EACCES);
    set_mode(&file, 0o707);
    findings.expect_errno("read by a member of the group of 0707", MEMBER.does(|| read(&file)), EACCES);
    findings.expect_errno("read by a stranger of 0707", STRANGER.does(|| read(&file)), 0);
    findings.none();
}
