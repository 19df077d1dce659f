//! Roots of containers whose writes go to a disk of the guest, and those that say they are to be shared.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use katana_tests::Containerd;
use katana_tests::cri::Pod;
use katana_tests::host::eventually;
use serde_json::json;

use super::cases;

cases! {
    /// Copied up, removed, renamed, with modes and kinds that a directory of the host does not take
    2: a_root_takes_what_a_file_system_takes,
    /// What the node accounts for
    what_is_written_is_counted_and_given_back,
    /// A limit of what a container writes
    a_full_root_is_that_containers_alone,
    /// The annotation that has the root shared
    2: a_root_is_shared_if_the_pod_says_so,
    /// The container's end, with writes that are under way
    nothing_stays_of_a_root_whose_machine_is_killed,
}

/// What an annotation of these tests begins with.
const KEY: &str = "io.katacontainers.config.hypervisor";

/// The files of this name that the snapshots of containers have.
fn in_snapshots(name: &str) -> Vec<PathBuf> {
    let snapshots = Containerd::current().root().join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let entries = fs::read_dir(snapshots).unwrap().flatten();
    entries.map(|entry| entry.path().join("fs").join(name)).filter(|file| file.exists()).collect()
}

/// Images of writable layers that are there.
fn images() -> Vec<PathBuf> {
    in_snapshots(".katana-disk.ext4")
}

fn a_root_takes_what_a_file_system_takes(handler: &str) {
    // In a pod with many containers the slots for disks may be in use.
    let pod = Pod::run(handler);
    let container = pod.start(json!({}));
    let script = r#"
        set -e
        same() { [ "$1" = "$2" ] || { echo "\"$1\", not \"$2\": $3"; exit 1; }; }
        before=$(stat -c "%i %a %u" /etc/group); exec 3</etc/group
        echo "more:x:77:" >>/etc/group
        same "$(stat -c "%i %a %u" /etc/group)" "$before" "a file that was copied up"
        same "$(stat -Lc %i /proc/self/fd/3)" "${before%% *}" "as it was opened before that"
        cd /root
        echo text >program; chmod 4755 program; echo more >>program
        same "$(stat -c %a program)" 4755 "set-user-ID, after a write by root"
        mknod null c 1 3; same "$(stat -c "%F %t:%T" null)" "character special file 1:3" "a device"
        mkfifo pipe; ln -s nowhere link; ln program second
        same "$(stat -c %h program)" 2 "a link"
        mkdir -p /usr/new/deep; mv /usr/new /usr/other; same "$(ls /usr/other)" deep "a directory that was moved"
        rm -rf /usr/other; ! ls /usr/other 2>/dev/null
        rm -rf /etc/network; ! ls -d /etc/network 2>/dev/null; mkdir /etc/network
        same "$(ls -A /etc/network)" "" "a directory of the image, made anew"
        dd if=/dev/zero of=sparse bs=1 seek=100M count=1 2>/dev/null
        same "$(stat -c %s sparse)" 104857601 "a file with a hole"
        same "$(stat -c %a /)" 755 "the root's mode"
        echo done
    "#;
    let output = container.sh(script);
    assert!(output.ok().ends_with("done"), "{output:?}");
    if handler != "runc" {
        let types = container.sh("awk '$2 == \"/\" { print $3 }' /proc/mounts");
        assert_eq!(types.ok(), "overlay");
    }
    pod.remove().unwrap();
}

fn what_is_written_is_counted_and_given_back(handler: &str) {
    let pod = Pod::run(handler);
    let container = pod.start(json!({}));
    let used = || container.stats().writable_layer.used_bytes.value;
    container.sh("dd if=/dev/urandom of=/root/large bs=1M count=40 2>/dev/null && sync").ok();
    // containerd looks from time to time.
    assert!(eventually(|| used() > 40 << 20), "{} bytes are counted", used());
    container.sh("rm /root/large && sync").ok();
    assert!(eventually(|| used() < 20 << 20), "{} bytes are counted", used());
    pod.remove().unwrap();
}

fn a_full_root_is_that_containers_alone(handler: &str) {
    if handler == "runc" {
        return;
    }
    let annotations = |size: &str| json!({"annotations": {format!("{KEY}.writable_layer_size"): size}});
    let refused = Pod::try_run(handler, annotations("99999999")).map(drop).unwrap_err().to_string();
    assert!(refused.contains("writable_layer_size"), "{refused}");
    let pod = Pod::run_with(handler, annotations("64"));
    let (full, other) = (pod.start(json!({})), pod.start(json!({})));
    let written = full.sh("dd if=/dev/zero of=/root/large bs=1M count=200; stat -c %s /root/large");
    assert!(written.stderr.contains("No space left on device"), "{written:?}");
    let bytes: u64 = written.stdout.trim().parse().unwrap();
    assert!((40 << 20..64 << 20).contains(&bytes), "{bytes}");
    other.sh("dd if=/dev/zero of=/root/large bs=1M count=30 2>&1").ok();
    full.sh("rm /root/large && dd if=/dev/zero of=/root/large bs=1M count=30 2>&1").ok();
    // Never more than that of the host.
    for image in images() {
        assert!(fs::metadata(&image).unwrap().blocks() * 512 <= 33 << 30, "{}", image.display());
    }
}

fn a_root_is_shared_if_the_pod_says_so(handler: &str) {
    if handler == "runc" {
        return;
    }
    let pod = Pod::run_with(handler, json!({"annotations": {format!("{KEY}.writable_layer"): "shared"}}));
    let container = pod.start(json!({}));
    assert_eq!(container.sh("awk '$2 == \"/\" { print $3 }' /proc/mounts").ok(), "virtiofs");
    container.sh("echo text > /root/seen-by-the-host").ok();
    assert_eq!(in_snapshots("root/seen-by-the-host").len(), 1);
}

fn nothing_stays_of_a_root_whose_machine_is_killed(handler: &str) {
    if handler == "runc" {
        return;
    }
    let pod = Pod::run(handler);
    let container = pod.start(json!({}));
    let before = images();
    assert!(!before.is_empty());
    let writes = "while :; do echo x >> /root/more; done > /dev/null 2>&1 &";
    container.sh(&format!("echo kept > /root/kept && sync /root/kept\n{writes}")).ok();
    let pid = nix::unistd::Pid::from_raw(container.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    container.ended();
    container.remove().unwrap();
    assert!(eventually(|| images().len() < before.len()), "{:?}", images());
    pod.remove().unwrap();
}
