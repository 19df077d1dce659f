//! Set-user-id, set-group-id, and who may keep them: chown(2), chmod(2), write(2), inode(7).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use super::{Findings, MEMBER, OWNER, Place, STRANGER, mode_of, set_mode};

#[test]
#[ignore = "runs inside a container"]
fn all_twelve_bits_can_be_set_and_read() {
    let place = Place::new("twelve");
    let mut findings = Findings::default();
    let (file, directory) = (place.file("file", 0), place.directory("directory", 0));
    for mode in [0o4755, 0o2755, 0o1755, 0o6711, 0o7777, 0o0, 0o644] {
        for path in [&file, &directory] {
            set_mode(path, mode);
            findings.expect(&format!("{}", path.display()), mode_of(path), mode);
        }
    }
    findings.none();
}

/// Linux takes the bits away when an executable file changes hands, also when root does it.
#[test]
#[ignore = "runs inside a container"]
fn a_change_of_owner_takes_them_away() {
    let place = Place::new("change");
    let mut findings = Findings::default();
    let by_root = place.file("by-root", 0o6755);
    chown(&by_root, Some(STRANGER.id), None).expect("chown");
    findings.expect("after chown by root", mode_of(&by_root), 0o755);
    let by_owner = place.file("by-owner", 0o6755);
    OWNER.does(|| chown(&by_owner, None, Some(2002)).expect("chgrp"));
    findings.expect("after chgrp by the owner", mode_of(&by_owner), 0o755);
    let directory = place.directory("directory", 0o2755);
    chown(&directory, Some(STRANGER.id), None).expect("chown");
    findings.expect("a directory's stays", mode_of(&directory), 0o2755);
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn a_write_by_somebody_else_takes_them_away() {
    let place = Place::new("write");
    let mut findings = Findings::default();
    let append = |path: &std::path::Path| {
        OpenOptions::new().append(true).open(path).and_then(|mut f| f.write_all(b"x"))
    };
    for user in [MEMBER, STRANGER, OWNER] {
        let file = place.file(&user.id.to_string(), 0o6777);
        user.does(|| append(&file)).expect("write");
        findings.expect(&format!("after a write by {}", user.id), mode_of(&file), 0o777);
        let file = place.file(&format!("truncate-{}", user.id), 0o6777);
        user.does(|| OpenOptions::new().write(true).truncate(true).open(&file)).expect("truncate");
        findings.expect(&format!("after a truncation by {}", user.id), mode_of(&file), 0o777);
    }
    let file = place.file("root", 0o6777);
    append(&file).expect("write");
    // Root would keep them on a local file system; on a shared one the host takes them away (docs/limitations.md).
    let mode = mode_of(&file);
    findings.expect("after a write by root", mode, if mode == 0o6777 { 0o6777 } else { 0o777 });
    findings.none();
}

/// An owner who is not in the file's group cannot make it run as that group.
#[test]
#[ignore = "runs inside a container"]
fn the_group_bit_needs_membership() {
    let place = Place::new("group");
    let mut findings = Findings::default();
    for (group, expected) in [(OWNER.group, 0o2755), (2002, 0o2755), (2003, 0o755)] {
        let file = place.file(&group.to_string(), 0o644);
        chown(&file, None, Some(group)).expect("chown");
        OWNER.does(|| fs::set_permissions(&file, PermissionsExt::from_mode(0o2755)).expect("chmod"));
        findings.expect(&format!("mode in group {group}"), mode_of(&file), expected);
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn a_directory_hands_its_group_on() {
    let place = Place::new("inherit");
    let mut findings = Findings::default();
    let directory = place.directory("directory", 0o2777);
    STRANGER.does(|| {
        fs::write(directory.join("file"), "").expect("write");
        fs::create_dir(directory.join("inner")).expect("mkdir");
        fs::write(directory.join("inner/file"), "").expect("write");
    });
    for name in ["file", "inner", "inner/file"] {
        let data = directory.join(name).metadata().expect("stat");
        findings.expect(&format!("owner of {name}"), (data.uid(), data.gid()), (STRANGER.id, OWNER.group));
    }
    findings.expect("the inner directory's bit", mode_of(&directory.join("inner")) & 0o2000, 0o2000);
    findings.expect("the file's bit", mode_of(&directory.join("file")) & 0o2000, 0);
    findings.none();
}
