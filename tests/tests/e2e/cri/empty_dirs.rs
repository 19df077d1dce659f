//! Directories that a pod has alone, as kubelet and containerd prepare them on the host.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use katana_tests::Scratch;
use katana_tests::cri::{Container, Pod, shared_pod};
use katana_tests::host::eventually;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::cases;

cases! {
    /// A program, its sidecar, and what comes after them
    2: containers_have_the_same_empty_dir,
    /// Made by kubelet on the host, and by containers in the guest
    a_sub_path_is_part_of_it,
    /// A pod whose machine has crashed gets a new one
    what_was_synced_is_there_after_a_crash,
    /// mountPropagation, files that are there already, and the annotation
    an_empty_dir_is_shared_where_it_has_to_be,
    /// VOLUME in an image
    a_volume_of_an_image_is_the_containers,
}

/// A pod's directory as kubelet has it, with an emptyDir that everybody may write to.
struct Kubelet(Scratch);

impl Kubelet {
    fn new() -> Self {
        let kubelet = Self(Scratch::new());
        kubelet.0.directory("pods/u-1/volume-subpaths/data/c");
        let directory = kubelet.0.directory("pods/u-1/volumes/kubernetes.io~empty-dir/data");
        // fsGroup.
        chown(&directory, None, Some(2000)).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o2777)).unwrap();
        kubelet
    }

    fn empty_dir(&self) -> PathBuf {
        self.0.path().join("pods/u-1/volumes/kubernetes.io~empty-dir/data")
    }

    fn mount(&self, more: Value) -> Value {
        let mut mount = json!({"host_path": self.empty_dir(), "container_path": "/data"});
        if let (Some(mount), Value::Object(more)) = (mount.as_object_mut(), more) {
            mount.extend(more);
        }
        mount
    }

    fn start(&self, pod: &Pod) -> Container {
        pod.start(json!({"mounts": [self.mount(json!({}))]}))
    }

    /// kubelet makes what a subPath names, and binds it to a place where no link can change what it is.
    fn sub_path(&self, name: &str, number: u32) -> Mounted {
        let made = self.empty_dir().join(name);
        fs::create_dir_all(&made).unwrap();
        let opened = fs::File::open(&made).unwrap();
        let source = format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd());
        let at = self.0.directory(&format!("pods/u-1/volume-subpaths/data/c/{number}"));
        mount(Some(source.as_str()), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Mounted(at)
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The file system that a container has at /data.
fn kind(container: &Container) -> String {
    container.sh("awk '$2 == \"/data\" { print $3 }' /proc/mounts").ok().to_owned()
}

fn containers_have_the_same_empty_dir(handler: &str) {
    let kubelet = Kubelet::new();
    let pod = Pod::run(handler);
    let (first, second) = (kubelet.start(&pod), kubelet.start(&pod));
    assert_eq!(first.sh("stat -c '%a %u %g' /data").ok(), "2777 0 2000");
    first.sh("echo one > /data/file && chown 1000 /data/file && mknod /data/null c 1 3").ok();
    assert_eq!(second.sh("cat /data/file && stat -c '%u %g' /data/file").ok(), "one\n1000 2000");
    second.sh("exec 9>/data/lock && flock -n 9 && sleep 1000 > /dev/null 2>&1 &").ok();
    assert!(eventually(|| first.sh("exec 9>/data/lock; flock -n 9").code != 0), "a lock is not seen");
    if handler != "runc" {
        assert_eq!(kind(&first), "ext4");
        assert_eq!(names(&kubelet.empty_dir()), [".katana-disk.ext4"]);
    }
    first.sh("dd if=/dev/urandom of=/data/large bs=1M count=20 2>/dev/null && sync").ok();
    let counted = || -> u64 {
        let entries = fs::read_dir(kubelet.empty_dir()).unwrap().flatten();
        entries.map(|entry| entry.metadata().unwrap().blocks() * 512).sum()
    };
    assert!(eventually(|| counted() > 20 << 20), "kubelet counts {} bytes", counted());
    for container in [first, second] {
        container.stop(0).unwrap();
        container.remove().unwrap();
    }
    let later = kubelet.start(&pod);
    assert_eq!(later.sh("cat /data/file && stat -c %s /data/large").ok(), "one\n20971520");
    pod.remove().unwrap();
}

fn a_sub_path_is_part_of_it(handler: &str) {
    let kubelet = Kubelet::new();
    let pod = Pod::run(handler);
    let (made, given) = (kubelet.sub_path("made/by/kubelet", 0), kubelet.sub_path("given", 1));
    let bind = |host: &Path, at: &str| json!({"host_path": host, "container_path": at});
    if handler == "runc" {
        fs::write(kubelet.empty_dir().join("given/file"), "given").unwrap();
    } else {
        // The first of an emptyDir that is empty but for what kubelet makes has it shared: that is seen by the host.
        let whole = kubelet.start(&pod);
        whole.sh("echo given > /data/given/file").ok();
        assert_eq!(kind(&whole), "virtiofs");
    }
    let container = pod.start(json!({"mounts": [
        bind(&made.0, "/made"), bind(&given.0, "/given"), kubelet.mount(json!({})),
    ]}));
    container.sh("echo text > /made/file").ok();
    assert_eq!(container.sh("cat /data/made/by/kubelet/file /given/file").ok(), "text\ngiven");
    pod.remove().unwrap();
    drop((made, given));

    let kubelet = Kubelet::new();
    let pod = Pod::run(handler);
    let whole = kubelet.start(&pod);
    whole.sh("umask 0; mkdir /data/given && echo given > /data/given/file && ln -s /etc /data/link").ok();
    let (made, given) = (kubelet.sub_path("made/by/kubelet", 0), kubelet.sub_path("given", 1));
    let container = pod.start(json!({"mounts": [
        bind(&made.0, "/made"), bind(&given.0, "/given"), kubelet.mount(json!({"readonly": true})),
    ]}));
    container.sh("echo text > /made/file").ok();
    assert_eq!(container.sh("cat /data/made/by/kubelet/file /given/file").ok(), "text\ngiven");
    assert!(container.sh("echo text > /data/other").stderr.contains("Read-only"));
    if handler != "runc" {
        assert_eq!(kind(&container), "ext4");
        assert_eq!(container.sh("stat -c %a /data/made /made").ok(), "2777\n2777");
        // kubelet has looked for it on the host, where there is no link of that name.
        let linked = kubelet.sub_path("link/out", 2);
        let container = pod.start(json!({"mounts": [bind(&linked.0, "/out"), kubelet.mount(json!({}))]}));
        container.sh("echo text > /out/file").ok();
        assert_eq!(container.sh("cat /data/etc/out/file").ok(), "text");
    }
    pod.remove().unwrap();
}

fn what_was_synced_is_there_after_a_crash(handler: &str) {
    if handler == "runc" {
        return;
    }
    let kubelet = Kubelet::new();
    let pod = Pod::run(handler);
    let container = kubelet.start(&pod);
    container.sh("echo kept > /data/kept && sync /data/kept").ok();
    container.sh("while :; do echo x >> /data/more; done > /dev/null 2>&1 &").ok();
    kill(Pid::from_raw(container.pid()), Signal::SIGKILL).unwrap();
    container.ended();
    pod.remove().unwrap();
    let pod = Pod::run(handler);
    let container = kubelet.start(&pod);
    assert_eq!(kind(&container), "ext4");
    assert_eq!(container.sh("cat /data/kept && echo more >> /data/more").ok(), "kept");
    // Two machines would destroy it.
    let other = Pod::run(handler);
    let refused = other.create(json!({"mounts": [kubelet.mount(json!({}))]})).unwrap().start().unwrap_err();
    assert!(refused.message.contains("another pod uses it"), "{refused}");
    other.remove().unwrap();
    pod.remove().unwrap();
}

fn an_empty_dir_is_shared_where_it_has_to_be(handler: &str) {
    let (filled, shown) = (Kubelet::new(), Kubelet::new());
    fs::write(filled.empty_dir().join("file"), "of the host").unwrap();
    let pod = shared_pod(handler);
    let container = filled.start(&pod);
    assert_eq!(container.sh("cat /data/file").ok(), "of the host");
    container.remove().unwrap();
    // PROPAGATION_HOST_TO_CONTAINER
    let first = pod.start(json!({"mounts": [shown.mount(json!({"propagation": 1}))]}));
    let second = shown.start(&pod);
    second.sh("echo text > /data/file").ok();
    assert_eq!(first.sh("cat /data/file").ok(), "text");
    assert_eq!(names(&shown.empty_dir()), ["file"]);
    first.remove().unwrap();
    second.remove().unwrap();
}

fn a_volume_of_an_image_is_the_containers(handler: &str) {
    let scratch = Scratch::new();
    let volume = scratch.directory("io.containerd.grpc.v1.cri/containers/c/volumes/v");
    let pod = Pod::run(handler);
    let container = pod.start(json!({"mounts": [{"host_path": volume, "container_path": "/data"}]}));
    container.sh("echo text > /data/file").ok();
    if handler != "runc" {
        assert_eq!(kind(&container), "ext4");
    }
    pod.remove().unwrap();
    // containerd does so with the container.
    fs::remove_dir_all(&volume).unwrap();
}
