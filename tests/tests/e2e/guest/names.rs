//! Names, directories and links: what each call refuses, and with which error.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, symlink};
use std::path::Path;

use libc::{EEXIST, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::{Findings, Place};

fn open(path: &Path, flags: i32) -> io::Result<()> {
    let write = flags & libc::O_CREAT != 0;
    OpenOptions::new().read(true).write(write).create(write).custom_flags(flags).open(path).map(drop)
}

#[test]
#[ignore = "runs inside a container"]
fn each_call_refuses_what_it_must() {
    let place = Place::new("errors");
    let at = |name: &str| place.at(name);
    place.file("file", 0o644);
    place.directory("empty", 0o755);
    place.directory("full", 0o755);
    place.file("full/file", 0o644);
    symlink("loop-b", at("loop-a")).expect("symlink");
    symlink("loop-a", at("loop-b")).expect("symlink");
    symlink("nowhere", at("dangling")).expect("symlink");
    symlink("file", at("link")).expect("symlink");
    let (name_255, name_256) = ("n".repeat(255), "n".repeat(256));
    let mut findings = Findings::default();
    let cases: [(&str, io::Result<()>, i32); 27] = [
        ("open of nothing", open(&at("nothing"), 0), ENOENT),
        ("open below a file", open(&at("file/below"), 0), ENOTDIR),
        ("open of a loop", open(&at("loop-a"), 0), ELOOP),
        ("open of a dangling link", open(&at("dangling"), 0), ENOENT),
        ("O_EXCL on a file", File::create_new(at("file")).map(drop), EEXIST),
        ("O_EXCL on a dangling link", File::create_new(at("dangling")).map(drop), EEXIST),
        ("O_NOFOLLOW on a link", open(&at("link"), libc::O_NOFOLLOW), ELOOP),
        ("O_DIRECTORY on a file", open(&at("file"), libc::O_DIRECTORY), ENOTDIR),
        ("write to a directory", OpenOptions::new().write(true).open(at("empty")).map(drop), EISDIR),
        ("the longest name", fs::write(at(&name_255), ""), 0),
        ("a longer name", fs::write(at(&name_256), ""), ENAMETOOLONG),
        ("mkdir of a file", fs::create_dir(at("file")), EEXIST),
        ("mkdir below nothing", fs::create_dir(at("nothing/below")), ENOENT),
        ("rmdir of a full directory", fs::remove_dir(at("full")), ENOTEMPTY),
        ("rmdir of a file", fs::remove_dir(at("file")), ENOTDIR),
        ("unlink of a directory", fs::remove_file(at("empty")), EISDIR),
        ("unlink of nothing", fs::remove_file(at("nothing")), ENOENT),
        ("rename of nothing", fs::rename(at("nothing"), at("x")), ENOENT),
        ("rename of a file over a directory", fs::rename(at("file"), at("empty")), EISDIR),
        ("rename of a directory over a file", fs::rename(at("empty"), at("file")), ENOTDIR),
        ("rename over a full directory", fs::rename(at("empty"), at("full")), ENOTEMPTY),
        ("rename into itself", fs::rename(at("full"), at("full/inner")), EINVAL),
        ("link over a file", fs::hard_link(at("file"), at("link")), EEXIST),
        ("link to nothing", fs::hard_link(at("nothing"), at("x")), ENOENT),
        ("symlink over a file", symlink("x", at("file")), EEXIST),
        ("readlink of a file", fs::read_link(at("file")).map(drop), EINVAL),
        ("rename over an empty directory", fs::rename(at("full"), at("empty")), 0),
    ];
    for (what, result, expected) in cases {
        findings.expect_errno(what, result, expected);
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn rename_can_refuse_and_exchange() {
    let place = Place::new("rename");
    let (one, two) = (place.at("one"), place.at("two"));
    fs::write(&one, "1").expect("write");
    fs::write(&two, "2").expect("write");
    let rename = |flags| renameat2(AT_FDCWD, &one, AT_FDCWD, &two, flags).map_err(io::Error::from);
    let mut findings = Findings::default();
    findings.expect_errno("RENAME_NOREPLACE", rename(RenameFlags::RENAME_NOREPLACE), EEXIST);
    findings.expect_errno("RENAME_EXCHANGE", rename(RenameFlags::RENAME_EXCHANGE), 0);
    findings.expect("content after the exchange", fs::read_to_string(&one).expect("read"), "2".to_owned());
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn every_kind_of_file_keeps_its_kind() {
    let place = Place::new("kinds");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    fs::write(place.at("file"), "").expect("write");
    fs::create_dir(place.at("directory")).expect("mkdir");
    symlink("é/\u{1f980} any text", place.at("link")).expect("symlink");
    nix::unistd::mkfifo(&place.at("fifo"), mode).expect("mkfifo");
    let _socket = std::os::unix::net::UnixListener::bind(place.at("socket")).expect("bind");
    let mut kinds: Vec<(String, bool)> = fs::read_dir(&place.0)
        .expect("list")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| {
            // Twice: as the directory lists it, and as the file itself is.
            let (listed, own) = (
                entry.file_type().expect("kind"),
                entry.path().symlink_metadata().expect("lstat").file_type(),
            );
            let name = entry.file_name().to_string_lossy().into_owned();
            let right = match name.as_str() {
                "file" => own.is_file(),
                "directory" => own.is_dir(),
                "link" => own.is_symlink(),
                "fifo" => own.is_fifo(),
                _ => own.is_socket(),
            };
            (name, right && listed == own)
        })
        .collect();
    kinds.sort();
    let expected = ["directory", "fifo", "file", "link", "socket"].map(|name| (name.to_owned(), true));
    assert_eq!(kinds, expected);
    assert_eq!(fs::read_link(place.at("link")).expect("readlink"), Path::new("é/\u{1f980} any text"));
}

#[test]
#[ignore = "runs inside a container"]
fn names_are_bytes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new("bytes");
    let names: [&[u8]; 5] =
        [b"space and\ttab", b"new\nline", b"\xff\xfe not UTF-8", "größe".as_bytes(), b".hidden"];
    for name in names {
        fs::write(place.0.join(OsStr::from_bytes(name)), name).expect("write");
    }
    for name in names {
        assert_eq!(fs::read(place.0.join(OsStr::from_bytes(name))).expect("read"), name);
    }
    assert_eq!(fs::read_dir(&place.0).expect("list").count(), names.len());
}
