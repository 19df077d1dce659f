//! Files without a name: `O_TMPFILE` of open(2).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use libc::{EBADF, ENOENT};

use super::{Findings, OWNER, Place, c_path, checked, mode_of};

/// Makes one in a directory.
pub fn make(directory: &Path, flags: i32, mode: u32) -> io::Result<File> {
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
    let reads = flags & libc::O_ACCMODE != libc::O_WRONLY;
    let flags = flags & !libc::O_ACCMODE | libc::O_TMPFILE;
    OpenOptions::new().read(reads).write(writes).mode(mode).custom_flags(flags).open(directory)
}

/// Gives one a name.
pub fn link(file: &File, path: &Path) -> io::Result<()> {
    let from = c_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
    let (to, here, follow) = (c_path(path), libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: the strings live through the call.
    checked(unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) }).map(drop)
}

#[test]
#[ignore = "runs inside a container"]
fn one_is_like_any_file_and_can_get_a_name() {
    let place = Place::new("unnamed");
    let mut findings = Findings::default();
    let mut file = OWNER.does(|| make(&place.0, libc::O_RDWR, 0o640)).expect("O_TMPFILE");
    let data = file.metadata().expect("fstat");
    findings.expect("owner", (data.uid(), data.gid()), (OWNER.id, OWNER.group));
    findings.expect("mode and links", (data.mode() & 0o7777, data.nlink()), (0o640, 0));
    findings.expect("names", fs::read_dir(&place.0).expect("list").count(), 0);
    file.write_all(&[b'x'; 100_000]).expect("write");
    file.set_len(50_000).expect("truncate");
    file.sync_all().expect("fsync");
    file.write_all_at(b"end", 60_000).expect("write");
    file.rewind().expect("seek");
    let mut contents = Vec::new();
    file.read_to_end(&mut contents).expect("read");
    findings.expect("length", contents.len(), 60_003);
    findings.expect(
        "its parts",
        (contents[49_999], contents[50_000], &contents[60_000..]),
        (b'x', 0, &b"end"[..]),
    );
    let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("open again");
    findings.expect_errno("write to what is open to be read", again.write_at(b"x", 0), EBADF);
    let mut copy = place.at("copy");
    findings.expect(
        "copied",
        fs::copy(format!("/proc/self/fd/{}", file.as_raw_fd()), &copy).ok(),
        Some(60_003),
    );
    copy = place.at("name");
    link(&file, &copy).expect("link");
    findings.expect("links", copy.metadata().expect("stat").nlink(), 1);
    findings.expect("owner of the name", copy.metadata().expect("stat").uid(), OWNER.id);
    findings.expect("what the name has", fs::read(&copy).ok(), Some(contents));
    file.write_all_at(b"later", 0).expect("write");
    drop(file);
    findings.expect(
        "what was written later",
        fs::read(&copy).expect("read")[..5].to_vec(),
        b"later".to_vec(),
    );
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn an_exclusive_one_gets_no_name() {
    let place = Place::new("unnamed-exclusive");
    let mut findings = Findings::default();
    let file = make(&place.0, libc::O_WRONLY | libc::O_EXCL, 0o600).expect("O_TMPFILE");
    findings.expect_errno("link", link(&file, &place.at("name")), ENOENT);
    let read_only = OpenOptions::new().read(true).custom_flags(libc::O_TMPFILE).open(&place.0);
    findings.expect_errno("to be read only", read_only, libc::EINVAL);
    let set_group = place.directory("directory", 0o2777);
    let file = make(&set_group, libc::O_RDWR, 0o600).expect("O_TMPFILE");
    link(&file, &set_group.join("name")).expect("link");
    findings.expect(
        "the directory's group",
        set_group.join("name").metadata().expect("stat").gid(),
        OWNER.group,
    );
    findings.expect("mode", mode_of(&set_group.join("name")), 0o600);
    findings.none();
}
