//! What a VMM that runs a guest holds of the host.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use katana_tests::bundle::Bundle;
use katana_tests::network::{Bridge, Namespace};
use katana_tests::process::Process;
use katana_tests::scratch::LoopDevice;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, DEBIAN, Run, Scratch, environment};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, mknod};

/// What has no place in a file system. Nobody finds it but whoever is given it, and it cannot be opened once more.
const NOWHERE: [&str; 6] = [
    "socket:[",
    "pipe:[",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:kvm-vm",
    "anon_inode:kvm-vcpu:",
];

/// A descriptor of a process.
struct Descriptor {
    /// The magic link: what is done by this path is done to what the descriptor stands for, by the mount that it was
    /// opened by.
    path: PathBuf,
    target: String,
    mount: String,
}

impl Descriptor {
    fn all(process: &Process) -> Vec<Self> {
        let directory = PathBuf::from(format!("/proc/{}", process.pid));
        let entries = fs::read_dir(directory.join("fd")).expect("descriptors");
        let names = entries.map(|entry| entry.expect("descriptor").file_name());
        let descriptor = |name: std::ffi::OsString| {
            let path = directory.join("fd").join(&name);
            let target = fs::read_link(&path).ok()?.to_string_lossy().into_owned();
            let info = fs::read_to_string(directory.join("fdinfo").join(&name)).ok()?;
            let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().to_owned();
            Some(Self { path, target, mount })
        };
        names.filter_map(descriptor).collect()
    }

    /// Where `..` ends, followed for ever; nothing if the guest has forgotten it meanwhile.
    fn top(&self) -> Option<(u64, u64)> {
        let mut path = self.path.clone();
        (0..64).for_each(|_| path.push(".."));
        fs::metadata(&path).ok().map(|status| (status.dev(), status.ino()))
    }

    /// Asserts that what a file of the host was opened for is all that it is good for.
    fn expect_sealed(&self) {
        let text = format!("{} -> {}", self.path.display(), self.target);
        let status = fs::metadata(&self.path).expect("stat");
        let same = Permissions::from_mode(status.mode() & 0o7777);
        let changed = fs::set_permissions(&self.path, same).map_err(|error| error.raw_os_error());
        assert_eq!(changed, Err(Some(libc::EROFS)), "{text}");
        let opened = File::options().read(true).write(true).open(&self.path).err();
        let opened = opened.and_then(|error| error.raw_os_error());
        let kind = status.file_type();
        let expected =
            if kind.is_block_device() || kind.is_char_device() { libc::EACCES } else { libc::EROFS };
        assert_eq!(opened, Some(expected), "{text}");
    }
}

fn identity(path: &Path) -> (u64, u64) {
    let status = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (status.dev(), status.ino())
}

/// Whether a path still leads to what had this status.
fn is_still(path: &Path, status: &fs::Metadata) -> bool {
    fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (status.dev(), status.ino()))
}

/// Of each descriptor: nothing but a tap is of the host; `..` leads to the share's root and no further; and what is of
/// the host cannot be opened anew or changed.
#[test]
fn a_vmm_holds_nothing_that_leads_to_the_host() {
    let _turn = shared();
    if !environment::is_vm_or_say("there is no VMM") {
        return;
    }
    let scratch = Scratch::new();
    scratch.file("file", "contents\n");
    let (bridge, namespace) = (Bridge::new(1500), Namespace::new());
    bridge.connect(namespace.name(), "eth0", 2);
    let run = Run::new(BUSYBOX).bind(scratch.path(), "/volume", "rw").options(&namespace.option());
    let container = run.command(&["sleep", "10000"]).start();
    container.sh("exec 3< /volume/file; cd /volume; ls -R /etc > /dev/null; exec sleep 0").ok();
    let vmm = Process::vmm_of(container.id());
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vmm.pid)).expect("mounts");
    let share: BTreeSet<&str> = mounts.lines().filter_map(|line| line.split(' ').next()).collect();
    // No mount of the share lets anybody open a device or become somebody by executing a file.
    for mount in mounts.lines() {
        let flags: Vec<_> = mount.split(' ').nth(5).expect("flags").split(',').collect();
        assert!(flags.contains(&"nodev") && flags.contains(&"nosuid"), "{mount}");
    }
    let root = identity(Path::new(&format!("/proc/{}/root/.", vmm.pid)));
    let (mut of_the_host, mut compared) = (BTreeSet::new(), 0);
    for descriptor in Descriptor::all(&vmm) {
        let text = format!("{} -> {}", descriptor.path.display(), descriptor.target);
        if NOWHERE.iter().any(|kind| descriptor.target.starts_with(kind)) {
            continue;
        }
        // What the guest knows may go meanwhile.
        let Ok(status) = fs::metadata(&descriptor.path) else { continue };
        if share.contains(descriptor.mount.as_str()) {
            match descriptor.top().filter(|_| status.is_dir()) {
                Some(top) => {
                    assert_eq!(top, root, "{text}");
                    compared += 1;
                }
                None => assert!(!status.is_dir() || !is_still(&descriptor.path, &status), "{text}: no top"),
            }
        } else if status.is_dir() {
            // The directory of the descriptors, which is all there is of its mount.
            let own = identity(Path::new(&format!("/proc/{}/fd", vmm.pid)));
            assert_eq!((identity(&descriptor.path), descriptor.top()), (own, Some(own)), "{text}");
            assert_eq!(
                fs::read_dir(descriptor.path.join("..")).map(Iterator::count).ok(),
                fs::read_dir(&descriptor.path).map(Iterator::count).ok(),
                "{text}"
            );
            assert!(!descriptor.path.join("../mem").exists(), "{text}");
        } else {
            descriptor.expect_sealed();
            let device = status.rdev();
            assert!(status.file_type().is_char_device(), "{text}");
            of_the_host.insert((libc::major(device), libc::minor(device)));
        }
    }
    assert!(compared > 0, "no directory of the share is open");
    // Documentation/admin-guide/devices.txt: /dev/net/tun; /dev/vhost-net, if the host has it.
    of_the_host.remove(&(10, 238));
    assert_eq!(of_the_host, BTreeSet::from([(10, 200)]));
}

#[test]
fn a_disk_that_may_be_read_only_cannot_be_opened_for_writing() {
    let _turn = shared();
    if !environment::is_vm_or_say("there is no VMM") {
        return;
    }
    let scratch = Scratch::new();
    let disk = LoopDevice::of(&scratch.file("image", "x".repeat(1 << 20)));
    let mut bundle = Bundle::new("sleep 10000");
    bundle.add_disk(&disk, "/dev/seen", "r");
    let container = bundle.run().start();
    container.exec(&["/bin/sh", "-c", "test -b /dev/seen"]).ok();
    let vmm = Process::vmm_of(container.id());
    let is_disk = |descriptor: &Descriptor| {
        fs::metadata(&descriptor.path).is_ok_and(|status| status.file_type().is_block_device())
    };
    // The guest may know the node where it is mounted, but that is in the share.
    let share = fs::read_to_string(format!("/proc/{}/mountinfo", vmm.pid)).expect("mounts");
    let outside = |descriptor: &Descriptor| {
        !share.lines().any(|line| line.starts_with(&format!("{} ", descriptor.mount)))
    };
    let disks =
        Descriptor::all(&vmm).into_iter().filter(|descriptor| is_disk(descriptor) && outside(descriptor));
    let disks: Vec<_> = disks.collect();
    assert_eq!(disks.len(), 1, "one disk");
    disks.iter().for_each(Descriptor::expect_sealed);
}

/// Device nodes and set-user-ID files are the guest's to use, whatever the flags of the host's mounts are.
#[test]
fn devices_and_set_user_id_files_of_volumes_and_images_work_inside() {
    let _turn = shared();
    let scratch = Scratch::new();
    let mode = Mode::from_bits_truncate(0o666);
    mknod(&scratch.path().join("zero"), SFlag::S_IFCHR, mode, libc::makedev(1, 5)).expect("mknod");
    let script = "head -c 4 /volume/zero | wc -c
        cp /usr/bin/id /id && cp /usr/bin/id /volume/id && chmod 4755 /id /volume/id
        for id in /id /volume/id; do setpriv --reuid 1000 --regid 1000 --clear-groups $id -u; done
        awk '$2 == \"/\" || $2 == \"/volume\" { print $2, ($4 ~ /nosuid|nodev/) }' /proc/mounts
        stat -f -c %T /volume > /dev/null && echo whole";
    let run = Run::new(DEBIAN).bind(scratch.path(), "/volume", "rw").options("--allow-new-privs");
    run.sh(script).output().ok().expect_text("4\n0\n0\n/ 0\n/volume 0\nwhole");
}
