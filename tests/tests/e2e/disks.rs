//! Roots on block devices, which the guest mounts itself.

use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Run, ctr, environment};

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
