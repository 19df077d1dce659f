//! Links, renames and files that are open meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use super::{Place, checked, errno};

#[test]
#[ignore = "runs inside a container"]
fn hard_links_are_one_file() {
    let place = Place::new("links");
    let (one, two) = (place.file("one", 0o644), place.at("two"));
    fs::hard_link(&one, &two).expect("link");
    let (first, second) = (one.metadata().expect("stat"), two.metadata().expect("stat"));
    assert_eq!((first.ino(), first.dev(), first.nlink()), (second.ino(), second.dev(), 2));
    fs::write(&two, "changed by the other name").expect("write");
    super::set_mode(&two, 0o600);
    assert_eq!(fs::read_to_string(&one).expect("read"), "changed by the other name");
    assert_eq!(super::mode_of(&one), 0o600);
    fs::remove_file(&one).expect("unlink");
    assert_eq!(two.metadata().expect("stat").nlink(), 1);
    assert_eq!(fs::read_to_string(&two).expect("read"), "changed by the other name");
}

/// The way in which careful programs replace a file: readers see the old content or the new.
#[test]
#[ignore = "runs inside a container"]
fn a_rename_over_an_open_file() {
    let place = Place::new("replace");
    let (name, temporary) = (place.at("name"), place.at("temporary"));
    fs::write(&name, "old").expect("write");
    let mut old = OpenOptions::new().read(true).write(true).open(&name).expect("open");
    fs::write(&temporary, "new").expect("write");
    let new_inode = temporary.metadata().expect("stat").ino();
    fs::rename(&temporary, &name).expect("rename");
    assert_eq!(fs::read_to_string(&name).expect("read"), "new");
    assert_eq!(name.metadata().expect("stat").ino(), new_inode);
    let mut text = String::new();
    old.read_to_string(&mut text).expect("read the old file");
    assert_eq!((text.as_str(), old.metadata().expect("fstat").nlink()), ("old", 0));
    old.write_all(b" and still written").expect("write the old file");
    assert_eq!(old.metadata().expect("fstat").len(), 21);
    assert_eq!(fs::read_to_string(&name).expect("read"), "new");
}

#[test]
#[ignore = "runs inside a container"]
fn a_removed_file_lives_while_it_is_open() {
    let place = Place::new("removed");
    let path = place.at("file");
    let mut file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).expect("create");
    fs::remove_file(&path).expect("unlink");
    assert_eq!(errno(path.metadata()), libc::ENOENT);
    file.write_all(&[b'x'; 100_000]).expect("write");
    file.set_len(50_000).expect("ftruncate");
    file.sync_all().expect("fsync");
    file.seek(SeekFrom::Start(0)).expect("seek");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("read");
    assert_eq!((bytes.len(), file.metadata().expect("fstat").nlink()), (50_000, 0));
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o640)).expect("fchmod");
    assert_eq!(file.metadata().expect("fstat").mode() & 0o777, 0o640);
}

/// An open directory goes on working after it was renamed, and after it was removed.
#[test]
#[ignore = "runs inside a container"]
fn an_open_directory_moves() {
    let place = Place::new("directory");
    let directory = place.directory("before", 0o755);
    let handle = File::open(&directory).expect("open");
    fs::rename(&directory, place.at("after")).expect("rename");
    let path = format!("/proc/self/fd/{}/file", handle.as_raw_fd());
    fs::write(&path, "content").expect("write below the open directory");
    assert_eq!(fs::read_to_string(place.at("after/file")).expect("read"), "content");
    fs::remove_dir_all(place.at("after")).expect("remove");
    assert_eq!(errno(fs::write(&path, "content")), libc::ENOENT);
}

/// Locks of different open files exclude each other, and end with the file: flock(2), fcntl_locking(2).
#[test]
#[ignore = "runs inside a container"]
fn locks_exclude() {
    let place = Place::new("locks");
    let path = place.file("file", 0o666);
    let open = || OpenOptions::new().read(true).write(true).open(&path).expect("open");
    let flock = |file: &File, how| {
        // SAFETY: the descriptor is the file's.
        checked(unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) })
    };
    let (one, two) = (open(), open());
    flock(&one, libc::LOCK_EX).expect("the first lock");
    assert_eq!(errno(flock(&two, libc::LOCK_SH)), libc::EWOULDBLOCK);
    drop(one);
    flock(&two, libc::LOCK_EX).expect("a lock after the first is gone");

    let range = |file: &File, start: i64| {
        // SAFETY: all zero is a valid flock structure.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) =
            (libc::F_WRLCK as i16, libc::SEEK_SET as i16, start, 10);
        // SAFETY: the structure lives through the call.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) })
    };
    let (three, four) = (open(), open());
    range(&three, 0).expect("a range");
    assert_eq!(errno(range(&four, 5)), libc::EAGAIN);
    range(&four, 10).expect("another range");
}

/// Several writers append: no line is lost or broken.
#[test]
#[ignore = "runs inside a container"]
fn appends_do_not_overwrite_each_other() {
    let place = Place::new("append");
    let path = place.file("file", 0o666);
    fs::write(&path, "").expect("write");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).open(path).expect("open");
                for line in 0..100 {
                    file.write_all(format!("writer {writer} line {line:03}\n").as_bytes()).expect("append");
                }
            });
        }
    });
    let text = fs::read_to_string(&path).expect("read");
    let lines: std::collections::BTreeSet<&str> = text.lines().collect();
    assert_eq!((lines.len(), text.len()), (400, 400 * 18));
}

#[test]
#[ignore = "runs inside a container"]
fn times_are_kept() {
    const LITTLE: Duration = Duration::from_secs(5);
    use nix::sys::stat::{UtimensatFlags, utimensat};
    use nix::sys::time::TimeSpec;
    let place = Place::new("times");
    let path = place.file("file", 0o644);
    let (accessed, modified) =
        (TimeSpec::new(1_111_111_111, 123_456_789), TimeSpec::new(4_222_222_222, 987_654_321));
    let follow = UtimensatFlags::FollowSymlink;
    utimensat(nix::fcntl::AT_FDCWD, &path, &accessed, &modified, follow).expect("utimensat");
    let data = path.metadata().expect("stat");
    assert_eq!((data.mtime(), data.mtime_nsec()), (4_222_222_222, 987_654_321));
    assert_eq!((data.atime(), data.atime_nsec()), (1_111_111_111, 123_456_789));
    fs::write(&path, "more").expect("write");
    // The host's clock gives the time. A guest's own may differ by a little, not by more.
    let (now, written) = (SystemTime::now(), path.metadata().expect("stat").modified().expect("a time"));
    assert!(
        written < now + LITTLE && written + Duration::from_secs(60) > now,
        "written at {written:?}, now {now:?}"
    );
}
