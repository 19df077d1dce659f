//! File systems of the host in a container: what the host decides about them, and what it changes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use katana_tests::host::eventually;
use katana_tests::scratch::LoopDevice;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Command, DEBIAN, Run, Scratch, environment};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::guest;

/// A file system on a directory of the host; gone when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(kind: &str, place: PathBuf, options: &str) -> Self {
        mount(Some(kind), &place, Some(kind), MsFlags::empty(), Some(options)).expect("mount");
        Self(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn give(path: &Path, user: u32, group: u32, mode: u32) {
    chown(path, Some(user), Some(group)).expect("chown");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// An ACL that gives user 1000 these permissions, and root's group none.
fn for_user(permissions: u16) -> Vec<u8> {
    guest::acls::acl(&[
        (1, 6, u32::MAX),
        (2, permissions, 1000),
        (4, 0, u32::MAX),
        (16, 6, u32::MAX),
        (32, 0, u32::MAX),
    ])
}

/// The same as in `guest::acls`, but set by the host, of a file by two names: rights end no later than attributes, also
/// for the name that was not opened.
#[test]
fn rights_that_the_host_takes_away_are_gone() {
    let _turn = shared();
    let scratch = Scratch::new();
    let one = scratch.file("one", "contents\n");
    fs::hard_link(&one, scratch.path().join("two")).unwrap();
    give(&one, 0, 2000, 0o660);
    let set = |permissions| {
        guest::attributes::set(&one, "system.posix_acl_access", &for_user(permissions), 0).unwrap();
    };
    set(6);
    let script = "exec 3< /volume/one || exit 1
        cat /volume/two > /dev/null && echo x >> /volume/two && echo ready
        until test -e /volume/changed; do sleep 0.2; done
        while cat /volume/two > /dev/null 2>&1; do sleep 1.3; done
        cat /volume/one; echo one=$?
        until test -e /volume/given; do sleep 0.2; done
        until cat /volume/two > /dev/null 2>&1; do sleep 0.2; done; echo back=$?";
    let run = Run::new(DEBIAN).bind(scratch.path(), "/volume", "rw").options("--user 1000:3000");
    let running = run.sh(script).spawn();
    running.wait_for("ready");
    set(0);
    scratch.file("changed", "");
    running.wait_for("one=1");
    set(4);
    scratch.file("given", "");
    running.finish().ok().expect_values(&[("back", "0")]);
}

/// Group 2000 is not let in by the mode's group bits, which are the mask; and whom the ACL names is.
#[test]
fn acls_of_the_host_decide() {
    let _turn = shared();
    let scratch = Scratch::new();
    let file = scratch.file("file", "contents\n");
    give(&file, 0, 2000, 0o600);
    guest::attributes::set(&file, "system.posix_acl_access", &for_user(6), 0).unwrap();
    for (user, readable) in [("1001:2000", "1"), ("1000:1000", "0")] {
        let run = Run::new(DEBIAN).bind(scratch.path(), "/volume", "rw").options(&format!("--user {user}"));
        let script = "cat /volume/file > /dev/null; echo read=$?; { echo x >> /volume/file; } 2> /dev/null; echo write=$?";
        let output = run.sh(script).output();
        let write = if readable == "0" { "0" } else { "2" };
        output.ok().expect_values(&[("read", readable), ("write", write)]);
    }
}

/// One connection serves file systems with ACLs and without.
#[test]
fn a_file_system_without_acls_has_its_modes() {
    let _turn = shared();
    let scratch = Scratch::new();
    let plain = Mounted::new("ramfs", scratch.directory("plain"), "mode=777");
    for (name, mode) in [("group", 0o640), ("others", 0o604), ("nobody", 0o600)] {
        fs::write(plain.0.join(name), "x").unwrap();
        give(&plain.0.join(name), 0, 2000, mode);
    }
    let script = "cd /volume/plain; umask 027
        for name in group others nobody; do cat $name > /dev/null 2>&1; echo $name=$?; done
        echo x > made && mkdir directory && ln -s made link && echo x > directory/file; echo made=$?
        stat -c 'modes=%a' made; stat -c 'directory=%a' directory
        python3 -c 'if 1:
            import os
            try: os.setxattr(\"made\", \"system.posix_acl_access\", bytes([2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255,
                4, 0, 0, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255]))
            except OSError as error: print(\"set=%d\" % error.errno)'";
    let run = Run::new(DEBIAN).bind(scratch.path(), "/volume", "rw").options("--user 1001:2000");
    run.sh(script).output().ok().expect_values(&[
        ("group", "0"),
        ("others", "1"),
        ("nobody", "1"),
        ("made", "0"),
        ("modes", "640"),
        ("directory", "750"),
        ("set", "95"),
    ]);
}

/// What memory volumes are.
#[test]
fn a_tmpfs_has_acls_too() {
    let _turn = shared();
    let scratch = Scratch::new();
    let memory = Mounted::new("tmpfs", scratch.directory("memory"), "size=8m");
    let run = guest::mounted(Run::new(DEBIAN)).bind(&memory.0, "/volume", "rw");
    let words = guest::command("guest::acls guest::unnamed", "/volume");
    guest::expect_passed(run.command(&words).patiently().output());
}

/// Whoever opens a file or makes it gets one or the other, however often it comes and goes on the host meanwhile.
#[test]
fn a_file_that_comes_and_goes_can_always_be_opened() {
    let _turn = shared();
    let scratch = Scratch::new();
    let lock = scratch.path().join("lock");
    let script = "
import os
for round in range(500):
    os.close(os.open('/volume/lock', os.O_RDWR | os.O_CREAT, 0o600))
print('done')
";
    let run = Run::new(DEBIAN).bind(scratch.path(), "/volume", "rw").command(&["python3", "-c", script]);
    let running = run.spawn();
    let ended = std::sync::atomic::AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::write(&lock, "");
                let _ = fs::remove_file(&lock);
            }
        });
        let output = running.finish();
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        output
    });
    output.ok().expect_text("done");
}

/// A write that fills the disk says how much it wrote, and only the next one fails.
#[test]
fn writes_to_a_full_disk_lose_no_count() {
    let _turn = shared();
    let scratch = Scratch::new();
    let full = Mounted::new("tmpfs", scratch.directory("full"), "size=8m");
    let script = "
import os
file = os.open('/volume/file', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
written = os.write(file, b'x' * 1000)
try:
    while True:
        written += os.write(file, b'x' * 100000)
except OSError as error:
    print('error=%d' % error.errno)
print('written=%d' % written)
print('size=%d' % os.stat('/volume/file').st_size)
";
    let run = Run::new(DEBIAN).bind(&full.0, "/volume", "rw").command(&["python3", "-c", script]);
    let output = run.output().ok();
    let size = full.0.join("file").metadata().unwrap().len().to_string();
    output.expect_values(&[("error", "28"), ("written", &size), ("size", &size)]);
}

/// Whatever the guest has in memory of a file: an open sees what the host wrote before it, even of the same length and
/// with the old time of modification.
#[test]
fn an_open_sees_what_the_host_has_written() {
    let _turn = shared();
    let scratch = Scratch::new();
    let path = scratch.file("file", "0000");
    let modified = fs::metadata(&path).and_then(|metadata| metadata.modified()).expect("time");
    let container =
        Run::new(BUSYBOX).bind(scratch.path(), "/volume", "rw").command(&["sleep", "10000"]).start();
    let read = || container.sh("cat /volume/file /volume/file").ok().text();
    let mut before = "0000".to_owned();
    for round in 1..30 {
        // Young and old files: of the latter, the guest keeps what it has read.
        if round % 10 == 0 {
            std::thread::sleep(Duration::from_secs(4));
            assert_eq!(read(), before.repeat(2));
        }
        assert_eq!(read(), before.repeat(2));
        before = format!("{round:04}");
        fs::write(&path, &before).expect("write");
        fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(modified))
            .expect("time");
        assert_eq!(read(), before.repeat(2), "round {round}");
    }
    // And what the container itself writes.
    container.sh("echo mine > /volume/file; cat /volume/file; sleep 4; cat /volume/file /volume/file").ok();
    assert_eq!(fs::read_to_string(&path).expect("read"), "mine\n");
    assert_eq!(container.sh("echo more >> /volume/file; cat /volume/file").ok().text(), "mine\nmore\n");
}

/// A file system that does not write anything until this is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(path: &'a Path) -> Self {
        let place = path.display().to_string();
        Command::new(&["fsfreeze", "--freeze", &place]).output().ok();
        Self(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // What waits for it could not be ended otherwise.
        let _ = std::process::Command::new("fsfreeze").arg("--unfreeze").arg(self.0).status();
    }
}

/// A network file system whose server is gone, a disk that does not answer: who uses it waits, and nobody else.
#[test]
fn a_volume_that_does_not_answer_holds_up_those_who_use_it_and_nobody_else() {
    let _turn = shared();
    const WAITING: usize = 12;
    let scratch = Scratch::new();
    let image = scratch.file("image", "");
    fs::File::options().write(true).open(&image).and_then(|file| file.set_len(32 << 20)).expect("image");
    Command::new(&["mkfs.ext4", "-q", &image.display().to_string()]).output().ok();
    let device = LoopDevice::of(&image);
    let place = scratch.directory("mounted");
    mount(Some(device.path()), &place, Some("ext4"), MsFlags::empty(), None::<&str>).expect("mount");
    let mounted = Mounted(place);
    let container = Run::new(BUSYBOX).bind(&mounted.0, "/volume", "rw").command(&["sleep", "10000"]).start();
    let each = |command: &str| {
        container.sh(&format!("mkdir -p /tmp; for n in $(seq {WAITING}); do {command} done")).ok()
    };
    // Files of which each is written by one process: to make one in a directory is something that only one can do at a
    // time, in the guest.
    each("echo $n >/volume/$n;");
    let frozen = Frozen::new(&mounted.0);
    each("(echo $n >>/volume/$n; echo $n >/tmp/$n) >/dev/null 2>&1 </dev/null &");
    let ended = "ls /tmp | wc -l";
    for _ in 0..3 {
        assert_eq!(container.sh(&format!("cat /etc/passwd >/root/copy && {ended}")).ok().text(), "0\n");
    }
    drop(frozen);
    let all = eventually(|| container.sh(ended).ok().text() == format!("{WAITING}\n"));
    assert!(all, "{}", container.sh("ls -l /tmp /volume").ok().text());
}

/// 200,000 with KATANA_SOAK: the file server holds a descriptor for each file that the guest knows.
#[test]
fn many_files_are_walked_again_and_again() {
    let _turn = shared();
    let scratch = Scratch::new();
    let volume = Mounted::new("tmpfs", scratch.directory("many"), "mode=755");
    let (directories, each) = (100, environment::rounds(200));
    for directory in 0..directories {
        let path = volume.0.join(directory.to_string());
        fs::create_dir(&path).expect("a directory");
        for file in 0..each {
            fs::File::create(path.join(file.to_string())).expect("a file");
        }
    }
    let container = Run::new(BUSYBOX).bind(&volume.0, "/many", "ro").command(&["sleep", "100000"]).start();
    let count = |what: &str| {
        let words = ["sh", "-c", &format!("find /many -type f {what} | wc -l")];
        container.exec_command(&[], &words).patiently().output().ok().text().trim().to_owned()
    };
    let all = (directories * each).to_string();
    // By name alone, and with each file's attributes.
    for what in ["", "-size 0", "-size 0"] {
        assert_eq!(count(what), all);
    }
    fs::write(volume.0.join("new"), "new").expect("a file");
    container.exec(&["cat", "/many/new"]).ok().expect_text("new");
}
