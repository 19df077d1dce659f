use super::*;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ACCESS: Access = Access { mode: 0o1777, uid: 70_000, gid: 100_001 };

fn made(name: &str, bytes: u64, journal: bool) -> PathBuf {
    let path = std::env::temp_dir().join(format!("katana-ext4-{name}-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    make(&file, bytes, ACCESS, std::array::from_fn(|index| index as u8 * 7), journal).unwrap();
    path
}

fn run(program: &str, arguments: &[&str], path: &Path) -> Output {
    Command::new(program).args(arguments).arg(path).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// e2fsck is the judge of layouts.
#[test]
fn file_systems_of_any_size_are_in_order() {
    const MIB: u64 = 1 << 20;
    let sizes = [
        LEAST,
        LEAST + 4097,
        100 * MIB,
        128 * MIB,
        129 * MIB,
        133 * MIB,
        300 * MIB,
        10_240 * MIB,
        32_768 * MIB,
    ];
    for (bytes, journal) in sizes.into_iter().flat_map(|bytes| [(bytes, true), (bytes, false)]) {
        let path = made("size", bytes, journal);
        let check = run("/sbin/e2fsck", &["-f", "-n"], &path);
        let length = std::fs::metadata(&path).unwrap().len();
        std::fs::remove_file(&path).unwrap();
        let said = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(check.status.success(), "{bytes}, journal: {journal}: {said}");
        assert!(length <= bytes && length + (4 << 20) > bytes, "{bytes}: {length}");
    }
}

#[test]
fn it_takes_no_more_of_the_host_than_it_holds() {
    let path = made("sparse", 32 << 30, true);
    let kib = std::fs::metadata(&path).unwrap().blocks() / 2;
    let upper = run("/sbin/debugfs", &["-R", "stat /upper"], &path);
    std::fs::remove_file(&path).unwrap();
    assert!(kib <= 64, "{kib} KiB");
    let said = String::from_utf8_lossy(&upper.stdout).into_owned();
    for part in ["Mode:  01777", "User: 70000", "Group: 100001"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn impossible_sizes_are_refused() {
    let file = File::options().write(true).open("/dev/null").unwrap();
    for bytes in [0, LEAST - 1, MOST + 1, u64::MAX] {
        let error = make(&file, bytes, ACCESS, [0; 32], true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
}
