//! Extended attributes: xattr(7).

use std::io;
use std::path::Path;

use libc::{EACCES, EEXIST, ENODATA, EOPNOTSUPP, ERANGE};

use super::{Findings, OWNER, Place, STRANGER, c_path, checked};

pub fn set(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<i64> {
    let (path, name) = (c_path(path), c_path(Path::new(name)));
    // SAFETY: strings and value live through the call, with the length given.
    checked(unsafe {
        libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags)
    })
}

pub fn get(path: &Path, name: &str, room: usize) -> io::Result<Vec<u8>> {
    let (path, name) = (c_path(path), c_path(Path::new(name)));
    let mut value = vec![0_u8; room];
    // SAFETY: as above; the buffer has the length given.
    let result = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    let length = checked(i64::try_from(result).expect("a length"))?;
    value.truncate(usize::try_from(length).expect("a length"));
    Ok(value)
}

fn list(path: &Path) -> Vec<String> {
    let path = c_path(path);
    let mut names = vec![0_u8; 4096];
    // SAFETY: as above.
    let result = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(result).expect("listxattr"));
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    // A host with a security module adds its own.
    let mut names: Vec<String> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.retain(|name| name.starts_with("user."));
    names.sort();
    names
}

pub fn remove(path: &Path, name: &str) -> io::Result<i64> {
    let (path, name) = (c_path(path), c_path(Path::new(name)));
    // SAFETY: as above.
    checked(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

#[test]
#[ignore = "runs inside a container"]
fn a_users_attributes() {
    let place = Place::new("user-attributes");
    let mut findings = Findings::default();
    for path in [place.file("file", 0o644), place.directory("directory", 0o755)] {
        findings.expect_errno("get of nothing", get(&path, "user.a", 10), ENODATA);
        findings.expect_errno("set", set(&path, "user.a", b"value\0with zero", 0), 0);
        findings.expect("its value", get(&path, "user.a", 100).ok(), Some(b"value\0with zero".to_vec()));
        findings.expect_errno("get with too little room", get(&path, "user.a", 3), ERANGE);
        findings.expect_errno("XATTR_CREATE again", set(&path, "user.a", b"", libc::XATTR_CREATE), EEXIST);
        findings.expect_errno(
            "XATTR_REPLACE of nothing",
            set(&path, "user.b", b"", libc::XATTR_REPLACE),
            ENODATA,
        );
        findings.expect_errno("XATTR_REPLACE", set(&path, "user.a", b"", libc::XATTR_REPLACE), 0);
        findings.expect("an empty value", get(&path, "user.a", 100).ok(), Some(Vec::new()));
        findings.expect_errno("a longer one", set(&path, "user.big", &[7; 2000], 0), 0);
        findings.expect("the list", list(&path), vec!["user.a".to_owned(), "user.big".to_owned()]);
        findings.expect_errno("removal", remove(&path, "user.a"), 0);
        findings.expect_errno("removal again", remove(&path, "user.a"), ENODATA);
        findings.expect("the list", list(&path), vec!["user.big".to_owned()]);
        findings.expect_errno("an unknown kind", set(&path, "unknown.a", b"", 0), EOPNOTSUPP);
    }
    findings.none();
}

/// They follow the file's permissions.
#[test]
#[ignore = "runs inside a container"]
fn who_may_use_them() {
    let place = Place::new("use-attributes");
    let mut findings = Findings::default();
    let file = place.file("file", 0o604);
    findings.expect_errno("set by the owner", OWNER.does(|| set(&file, "user.a", b"1", 0)), 0);
    findings.expect_errno("get by a stranger", STRANGER.does(|| get(&file, "user.a", 10)), 0);
    findings.expect_errno("set by a stranger", STRANGER.does(|| set(&file, "user.a", b"2", 0)), EACCES);
    super::set_mode(&file, 0o600);
    findings.expect_errno("get without read permission", STRANGER.does(|| get(&file, "user.a", 10)), EACCES);
    findings.none();
}

/// As setcap(8) sets them, for a package's programs such as ping.
#[test]
#[ignore = "runs inside a container"]
fn file_capabilities() {
    let place = Place::new("capabilities");
    let file = place.file("file", 0o755);
    // struct vfs_cap_data, revision 2, effective: CAP_NET_BIND_SERVICE permitted
    let value = [0x0200_0001_u32, 1 << 10, 0, 0, 0].map(u32::to_le_bytes).concat();
    set(&file, "security.capability", &value, 0).expect("setxattr");
    assert_eq!(get(&file, "security.capability", 100).expect("getxattr"), value);
    // A change of the content takes them away, as it does with the set-user-id bit.
    std::fs::write(&file, "changed").expect("write");
    assert_eq!(super::errno(get(&file, "security.capability", 100)), ENODATA);
}
