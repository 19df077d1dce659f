//! POSIX ACLs: acl(5). By the attributes that carry them, as libacl does it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use libc::{EACCES, EINVAL, ENODATA, EPERM};

use super::attributes::{get, remove, set};
use super::{Findings, MEMBER, OWNER, Place, ROOT, STRANGER, User, mode_of, set_mode};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An entry: its tag, permissions and id (linux/posix_acl_xattr.h).
type Entry = (u16, u16, u32);
/// What somebody tries on a path.
type Act = fn(&Path) -> io::Result<()>;

const NO_ID: u32 = u32::MAX;
const fn owner(permissions: u16) -> Entry {
    (1, permissions, NO_ID)
}
const fn user(id: u32, permissions: u16) -> Entry {
    (2, permissions, id)
}
const fn group_of_file(permissions: u16) -> Entry {
    (4, permissions, NO_ID)
}
const fn group(id: u32, permissions: u16) -> Entry {
    (8, permissions, id)
}
const fn mask(permissions: u16) -> Entry {
    (16, permissions, NO_ID)
}
const fn others(permissions: u16) -> Entry {
    (32, permissions, NO_ID)
}

/// The value of the attribute.
pub fn acl(entries: &[Entry]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|(tag, permissions, id)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    });
    2_u32.to_le_bytes().into_iter().chain(entries).collect()
}

fn set_acl(path: &Path, name: &str, entries: &[Entry]) -> io::Result<i64> {
    set(path, name, &acl(entries), 0)
}

fn give(path: &Path, name: &str, entries: &[Entry]) {
    set_acl(path, name, entries).expect("set the ACL");
}

fn read_and_write(path: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(drop)
}

fn read(path: &Path) -> io::Result<()> {
    File::open(path).map(drop)
}

/// Root's file, of OWNER's group, whose mode says that the group may read and write.
#[test]
#[ignore = "runs inside a container"]
fn the_mask_is_not_the_groups_right() {
    let place = Place::new("acl-mask");
    let mut findings = Findings::default();
    let file = place.file("file", 0o600);
    super::give(&file, 0, OWNER.group, 0o600);
    give(&file, ACCESS, &[owner(6), user(STRANGER.id, 6), group_of_file(0), mask(6), others(0)]);
    findings.expect("the mode", mode_of(&file), 0o660);
    let both: Act = read_and_write;
    for (who, act, expected) in [
        (STRANGER, both, 0),
        (OWNER, both, EACCES),
        (OWNER, read, EACCES),
        (MEMBER, both, EACCES),
        (MEMBER, read, EACCES),
        (ROOT, both, 0),
    ] {
        findings.expect_errno(&format!("by {}", who.id), who.does(|| act(&file)), expected);
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn each_entry_decides_about_whom_it_names() {
    let place = Place::new("acl-entries");
    let mut findings = Findings::default();
    let both: Act = read_and_write;
    // Of OWNER. MEMBER's own group, which is STRANGER's as well, is 2003, and MEMBER is also in 2001.
    let cases: [(&[Entry], User, Act, i32); 10] = [
        (&[owner(6), user(1003, 0), group_of_file(6), mask(6), others(6)], STRANGER, read, EACCES),
        (&[owner(6), user(1003, 4), group_of_file(0), mask(6), others(0)], STRANGER, both, EACCES),
        (&[owner(6), user(1003, 6), group_of_file(0), mask(4), others(0)], STRANGER, both, EACCES),
        (&[owner(6), user(1003, 6), group_of_file(0), mask(4), others(0)], STRANGER, read, 0),
        (&[owner(6), group_of_file(0), group(2003, 6), mask(6), others(0)], STRANGER, both, 0),
        (&[owner(6), group_of_file(0), group(2003, 6), mask(6), others(0)], MEMBER, both, 0),
        (&[owner(6), group_of_file(6), group(2003, 0), mask(6), others(6)], MEMBER, both, 0),
        (&[owner(6), group_of_file(0), group(2003, 0), mask(6), others(6)], MEMBER, read, EACCES),
        (&[owner(0), user(1001, 6), group_of_file(6), mask(6), others(6)], OWNER, read, EACCES),
        (&[owner(6), user(1002, 0), group_of_file(0), mask(6), others(4)], STRANGER, read, 0),
    ];
    for (number, (entries, who, act, expected)) in cases.into_iter().enumerate() {
        let file = place.file(&number.to_string(), 0o600);
        give(&file, ACCESS, entries);
        findings.expect_errno(&format!("{entries:?} for {}", who.id), who.does(|| act(&file)), expected);
    }
    findings.none();
}

/// Everything that can be made in a directory, by one who may because of an ACL, of a group that is not its own as
/// well.
#[test]
#[ignore = "runs inside a container"]
fn who_may_make_files_in_a_directory() {
    let place = Place::new("acl-making");
    let mut findings = Findings::default();
    let by_user = [owner(7), user(1003, 7), group_of_file(0), mask(7), others(0)];
    let by_group = [owner(7), group_of_file(0), group(2001, 7), mask(7), others(0)];
    let too_little = [owner(7), group_of_file(0), group(2001, 5), mask(7), others(0)];
    let masked = [owner(7), group_of_file(0), group(2001, 7), mask(5), others(0)];
    for (name, entries, who, expected) in [
        ("user", by_user, STRANGER, 0),
        ("user-other", by_user, MEMBER, EACCES),
        ("group", by_group, MEMBER, 0),
        ("group-other", by_group, STRANGER, EACCES),
        ("too-little", too_little, MEMBER, EACCES),
        ("masked", masked, MEMBER, EACCES),
    ] {
        let directory = place.at(name);
        fs::create_dir(&directory).expect("mkdir");
        set_mode(&directory, 0o700);
        give(&directory, ACCESS, &entries);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        let made = who.does(|| {
            [
                ("file", File::create_new(directory.join("file")).map(drop)),
                ("directory", fs::create_dir(directory.join("directory"))),
                ("link", std::os::unix::fs::symlink("nowhere", directory.join("link"))),
                ("fifo", nix::unistd::mkfifo(&directory.join("fifo"), mode).map_err(io::Error::from)),
                ("no name", super::unnamed::make(&directory, libc::O_RDWR, 0o600).map(drop)),
            ]
        });
        for (what, result) in made {
            findings.expect_errno(&format!("{name}: {what} by {}", who.id), result, expected);
        }
        if expected == 0 {
            let file = directory.join("file").metadata().expect("stat");
            findings.expect("its owner", (file.uid(), file.gid()), (who.id, who.group));
        }
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn default_acls_are_inherited_and_replace_the_umask() {
    let place = Place::new("acl-default");
    let mut findings = Findings::default();
    let directory = place.directory("directory", 0o777);
    let default = [owner(7), user(1003, 7), group_of_file(5), mask(7), others(0)];
    give(&directory, DEFAULT, &default);
    // SAFETY: umask cannot fail.
    unsafe { libc::umask(0o077) };
    let (file, inner, fifo) = (directory.join("file"), directory.join("inner"), directory.join("fifo"));
    OpenOptions::new().write(true).create_new(true).mode(0o666).open(&file).expect("create");
    fs::create_dir(&inner).expect("mkdir");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o640)).expect("mkfifo");
    let unnamed = super::unnamed::make(&directory, libc::O_RDWR, 0o666).expect("O_TMPFILE");
    super::unnamed::link(&unnamed, &directory.join("named")).expect("link");
    let elsewhere = place.at("elsewhere");
    fs::create_dir(&elsewhere).expect("mkdir");
    // SAFETY: as above.
    unsafe { libc::umask(0) };
    findings.expect("the mode of what has the umask", mode_of(&elsewhere), 0o700);
    let inherited = acl(&[owner(6), user(1003, 7), group_of_file(5), mask(6), others(0)]);
    for path in [&file, &directory.join("named")] {
        findings.expect(&format!("mode of {path:?}"), mode_of(path), 0o660);
        findings.expect(&format!("ACL of {path:?}"), get(path, ACCESS, 200).ok(), Some(inherited.clone()));
    }
    findings.expect("mode of a directory", mode_of(&inner), 0o770);
    findings.expect("its ACL", get(&inner, ACCESS, 200).ok(), Some(acl(&default)));
    findings.expect("what it passes on", get(&inner, DEFAULT, 200).ok(), Some(acl(&default)));
    findings.expect("mode of a fifo", mode_of(&fifo), 0o640);
    findings.expect_errno("read and write by whom it names", STRANGER.does(|| read_and_write(&file)), 0);
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn chmod_changes_the_mask_and_acls_the_mode() {
    let place = Place::new("acl-chmod");
    let mut findings = Findings::default();
    let file = place.file("file", 0o644);
    let with_mask = |bits| [owner(6), user(1003, 6), group_of_file(4), mask(bits), others(0)];
    give(&file, ACCESS, &with_mask(6));
    findings.expect("mode", mode_of(&file), 0o660);
    findings.expect_errno("before", STRANGER.does(|| read_and_write(&file)), 0);
    set_mode(&file, 0o640);
    findings.expect("the ACL after chmod", get(&file, ACCESS, 200).ok(), Some(acl(&with_mask(4))));
    findings.expect_errno("write after chmod", STRANGER.does(|| read_and_write(&file)), EACCES);
    findings.expect_errno("read after chmod", STRANGER.does(|| read(&file)), 0);
    set_mode(&file, 0o660);
    findings.expect_errno("and back", STRANGER.does(|| read_and_write(&file)), 0);
    findings.expect_errno("removal", remove(&file, ACCESS), 0);
    findings.expect_errno("none", get(&file, ACCESS, 200), ENODATA);
    findings.expect_errno("without", STRANGER.does(|| read(&file)), EACCES);
    // One that says no more than a mode is one.
    give(&file, ACCESS, &[owner(6), group_of_file(0), others(4)]);
    findings.expect("mode", mode_of(&file), 0o604);
    findings.expect_errno("none", get(&file, ACCESS, 200), ENODATA);
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn who_may_change_acls() {
    let place = Place::new("acl-change");
    let mut findings = Findings::default();
    let entries = [owner(6), user(1003, 6), group_of_file(4), mask(6), others(6)];
    for (who, expected) in [(OWNER, 0), (ROOT, 0), (MEMBER, EPERM), (STRANGER, EPERM)] {
        let file = place.file(&who.id.to_string(), 0o666);
        let set = who.does(|| set_acl(&file, ACCESS, &entries));
        findings.expect_errno(&format!("set by {}", who.id), set, expected);
        give(&file, ACCESS, &entries);
        findings.expect_errno(&format!("remove by {}", who.id), who.does(|| remove(&file, ACCESS)), expected);
    }
    let file = place.file("file", 0o644);
    findings.expect_errno("default ACL of a file", set_acl(&file, DEFAULT, &entries), EACCES);
    findings.expect_errno("without others", set_acl(&file, ACCESS, &entries[..4]), EINVAL);
    // Set-group-ID is for members of the group.
    for (who, expected) in [
        (User { group: 2003, others: &[2001], ..OWNER }, 0o2664),
        (User { group: 2003, others: &[], ..OWNER }, 0o664),
    ] {
        let file = place.file(&format!("bits-{expected:o}"), 0o2644);
        who.does(|| give(&file, ACCESS, &[owner(6), user(1003, 6), group_of_file(4), mask(6), others(4)]));
        findings.expect("mode afterwards", mode_of(&file), expected);
    }
    findings.none();
}
