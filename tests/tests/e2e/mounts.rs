//! Directories of the host that have mounts in them.

use std::path::{Path, PathBuf};

use katana_tests::host::eventually;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, DEBIAN, Run, Scratch};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A tmpfs of the host; gone when this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(place: PathBuf) -> Self {
        std::fs::create_dir_all(&place).expect("make the mount point");
        mount(Some("none"), &place, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).expect("mount");
        std::fs::write(place.join("file"), "x").expect("write");
        Self(place)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A mount with a mount in it and another one in that: to be dropped in this order.
struct Nested {
    deep: Tmpfs,
    sub: Tmpfs,
    top: Tmpfs,
    _scratch: Scratch,
}

impl Nested {
    fn new() -> Self {
        let scratch = Scratch::new();
        let top = Tmpfs::new(scratch.path().join("top"));
        let set = |propagation| mount(None::<&str>, &top.0, None::<&str>, propagation, None::<&str>);
        set(MsFlags::MS_PRIVATE).and_then(|()| set(MsFlags::MS_SHARED)).expect("make shared");
        let sub = Tmpfs::new(top.0.join("sub"));
        let deep = Tmpfs::new(sub.0.join("deep"));
        Self { deep, sub, top, _scratch: scratch }
    }
}

trait WithVolume {
    fn volume(self, source: &Path, options: &str) -> Self;
}

impl WithVolume for Run {
    fn volume(self, source: &Path, options: &str) -> Self {
        let source = source.display();
        self.options(&format!("--mount type=bind,src={source},dst=/mnt,options={options}"))
    }
}

/// As kubelet removes the directories of a pod while another one has all of its directory.
#[test]
fn what_a_container_has_of_the_host_can_be_unmounted_and_removed() {
    let _turn = shared();
    for options in ["rbind:rprivate", "rbind:rslave"] {
        let nested = Nested::new();
        let script = "find /mnt > /dev/null; cat /mnt/sub/deep/file; echo; while :; do sleep 1; done";
        let running = Run::new(BUSYBOX).volume(&nested.top.0, options).sh(script).spawn();
        running.wait_for("x");
        // Not lazily: what the container has looked at but does not use keeps nothing busy.
        for place in [&nested.deep.0, &nested.sub.0] {
            umount2(place, MntFlags::empty()).unwrap_or_else(|e| panic!("{options}: umount {place:?}: {e}"));
            std::fs::remove_dir_all(place).unwrap_or_else(|e| panic!("{options}: remove {place:?}: {e}"));
        }
        drop(running);
    }
}

#[test]
fn options_are_for_the_mount_and_recursive_ones_for_all_below() {
    let _turn = shared();
    let nested = Nested::new();
    std::fs::copy("/bin/true", nested.top.0.join("true")).expect("copy a program");
    std::fs::copy("/bin/true", nested.sub.0.join("true")).expect("copy a program");
    let script = "for place in /mnt /mnt/sub /mnt/sub/deep; do touch $place/new 2>/dev/null && echo $place=writable || echo $place=shut; done
        for place in /mnt /mnt/sub; do $place/true 2>/dev/null; echo $place/true=$?; done";
    // options, which of the three can be written to, and of which of the first two programs can be run
    let cases = [
        ("rbind:rprivate:ro", [false, true, true], [true, true]),
        ("rbind:rprivate:rro", [false, false, false], [true, true]),
        ("rbind:rslave:ro:noexec", [false, true, true], [false, true]),
        ("rbind:rprivate:rw:rnoexec", [true, true, true], [false, false]),
    ];
    for (options, writable, runs) in cases {
        let output = Run::new(DEBIAN).volume(&nested.top.0, options).sh(script).output().ok();
        let text = output.text();
        for (place, writable) in ["/mnt", "/mnt/sub", "/mnt/sub/deep"].iter().zip(writable) {
            let expected = format!("{place}={}", if writable { "writable" } else { "shut" });
            assert!(text.lines().any(|line| line == expected), "{options}: not {expected}\n{text}");
        }
        for (place, runs) in ["/mnt", "/mnt/sub"].iter().zip(runs) {
            let expected = format!("{place}/true={}", if runs { 0 } else { 126 });
            assert!(text.lines().any(|line| line == expected), "{options}: not {expected}\n{text}");
        }
    }
}

#[test]
fn mounts_in_a_volume_are_mounts_before_anybody_walks_in() {
    let _turn = shared();
    let nested = Nested::new();
    let script = "for place in /mnt /mnt/sub /mnt/sub/deep; do mountpoint -q $place && echo mountpoint; done
        echo devices=$(stat -c %d /mnt /mnt/sub /mnt/sub/deep | sort -u | wc -l)
        echo here=$(find /mnt -xdev -name file 2>&1 | wc -l); echo all=$(find /mnt -name file 2>&1 | wc -l)
        echo sizes=$(du -a /mnt 2>&1 | grep -c file); echo size=$(du -ax /mnt 2>&1 | grep -c file)
        echo loops=$(find /mnt 2>&1 | grep -c loop)";
    for options in ["rbind:rprivate", "rbind:rslave:ro"] {
        let output = Run::new(DEBIAN).volume(&nested.top.0, options).sh(script).output().ok();
        assert_eq!(output.text().matches("mountpoint").count(), 3, "{options}\n{output}");
        output.expect_values(&[
            ("devices", "3"),
            ("here", "1"),
            ("all", "3"),
            ("sizes", "3"),
            ("size", "1"),
            ("loops", "0"),
        ]);
    }
}

#[test]
fn later_mounts_appear_as_mounts_and_go_while_their_files_are_in_use() {
    let _turn = shared();
    let nested = Nested::new();
    std::fs::create_dir(nested.sub.0.join("later")).expect("make the mount point");
    let container =
        Run::new(DEBIAN).volume(&nested.top.0, "rbind:rslave:ro").command(&["sleep", "10000"]).start();
    let sh = |script: &str| container.exec_command(&[], &["sh", "-c", script]).output();
    sh("! mountpoint -q /mnt/sub/later").ok();
    let later = Tmpfs::new(nested.sub.0.join("later"));
    let inner = Tmpfs::new(later.0.join("inner"));
    for place in ["later", "later/inner"] {
        let is_there = format!("mountpoint -q /mnt/sub/{place} && touch /mnt/sub/{place}/new");
        assert!(eventually(|| sh(&is_there).code == 0), "{place} is no mount");
    }
    // Somebody goes on using what the host takes away.
    let user = container.exec_command(
        &[],
        &[
            "sh",
            "-c",
            "exec 3< /mnt/sub/later/inner/file; echo open; sleep 3; cat <&3; exec 3<&-; echo closed",
        ],
    );
    let user = user.spawn();
    user.wait_for("open");
    drop(inner);
    drop(later);
    assert!(eventually(|| sh("mountpoint -q /mnt/sub/later").code != 0), "the mount does not go");
    user.wait_for("closed");
    sh("ls -R /mnt > /dev/null").ok();
}

/// CVE-2019-16884: an image's volume, or a client's, in the place of the kernel's files. runc refuses the same.
#[test]
fn nothing_is_mounted_over_the_files_of_the_kernel() {
    let _turn = shared();
    let scratch = Scratch::new();
    let source = scratch.path().display();
    for mount in [
        format!("type=bind,src={source},dst=/proc,options=rbind:ro"),
        format!("type=bind,src={source},dst=/proc/self/attr,options=rbind:ro"),
        format!("type=bind,src={source},dst=/proc/sys/kernel,options=rbind:ro"),
    ] {
        let output = Run::new(BUSYBOX).options(&format!("--mount {mount}")).command(&["true"]).output();
        assert_ne!(output.code, 0, "{mount}: {output}");
        output.expect_error_line(&["error mounting", "proc"]);
    }
    // For other kinds, runc does so from 1.2 on.
    if katana_tests::environment::is_vm_or_say("runc 1.1 asks this of bind mounts only") {
        for mount in ["type=tmpfs,src=tmpfs,dst=/proc/self/attr", "type=tmpfs,src=tmpfs,dst=/proc"] {
            let output = Run::new(BUSYBOX).options(&format!("--mount {mount}")).command(&["true"]).output();
            assert_ne!(output.code, 0, "{mount}: {output}");
            output.expect_error_line(&["error mounting", "proc"]);
        }
    }
}
