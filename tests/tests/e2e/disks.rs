//! Roots on block devices, which the guest mounts itself, and block devices that are mounted.

use katana_tests::bundle::Bundle;
use katana_tests::scratch::LoopDevice;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Run, Scratch, ctr, environment};

/// What is mounted as a container's root.
const ROOT: &str = "awk '$2 == \"/\" { kind = $3 } END { print kind }' /proc/mounts";

#[test]
fn a_root_on_a_block_device_is_mounted_in_the_guest() {
    let _turn = shared();
    let container = Run::new(BUSYBOX).options("--snapshotter blockfile").command(&["sleep", "10000"]).start();
    container.sh(ROOT).ok().expect_text("ext4");
    if environment::is_vm() {
        container.sh("! grep virtiofs /proc/mounts").ok();
    }
    container.sh("echo written > /kept; chown 5:6 /kept; mknod /device c 1 3; ls -ln /kept /device").ok();
    // What was written is on the disk when the machine is gone.
    container.task("kill", &["--signal", "SIGKILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
    ctr(&["tasks", "start", "--detach", "--null-io", container.id()]).output().ok();
    container.sh("cat /kept; stat -c %u:%g /kept; test -c /device").ok().expect_text("written\n5:6");
}

#[test]
fn a_read_only_root_on_a_block_device_stays_as_it_is() {
    let _turn = shared();
    let run = Run::new(BUSYBOX).options("--snapshotter blockfile --read-only");
    run.sh("! echo x > /file").output().ok().expect_error_line(&["Read-only file system"]);
}

/// Whoever can name a node in a mount has not been given the disk.
#[test]
fn a_mounted_disk_is_for_whom_the_device_rules_give_it() {
    let _turn = shared();
    let scratch = Scratch::new();
    let disk = LoopDevice::of(&scratch.file("image", "x".repeat(1 << 20)));
    let script = "head -c 3 /dev/seen 2>&1 && echo; (echo yyy > /dev/seen) 2>/dev/null || echo refused";
    let said = |access| {
        let mut bundle = Bundle::new(script);
        bundle.add_disk(&disk, "/dev/seen", access);
        bundle.run().output()
    };
    said("r").ok().expect_text("xxx\nrefused");
    said("rw").ok().expect_text("xxx");
    said("rw").ok().expect_text("yyy");
    if environment::is_vm() {
        let output = said("");
        assert_ne!(output.code, 0, "{output}");
        output.expect_error_line(&["/dev/loop", "device rules do not allow"]);
    } else {
        said("").ok().expect_text("head: /dev/seen: Operation not permitted\nrefused");
    }
}
