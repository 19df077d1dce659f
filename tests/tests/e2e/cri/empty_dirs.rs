//! Directories that a pod has alone, as kubelet and containerd prepare them on the host.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use katana_tests::container::{ctr, new_id};
use katana_tests::cri::{Container, Pod};
use katana_tests::host::eventually;
use katana_tests::{BUSYBOX, Command, Scratch};
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
    /// More emptyDirs than there are slots for them
    many_empty_dirs_are_there,
    /// mountPropagation: Bidirectional
    mounts_in_it_do_not_keep_it,
    /// VOLUME in an image
    a_volume_of_an_image_is_the_containers,
}

/// A pod's directory as kubelet has it, with an emptyDir that everybody may write to.
struct Kubelet {
    scratch: Scratch,
    uid: String,
}

impl Kubelet {
    fn of(pod: &Pod) -> Self {
        let kubelet = Self { scratch: Scratch::new(), uid: pod.config().metadata.uid.clone() };
        kubelet.scratch.directory(&format!("pods/{}/volume-subpaths/data/c", kubelet.uid));
        let directory = kubelet.scratch.directory(&kubelet.relative());
        // fsGroup.
        chown(&directory, None, Some(2000)).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o2777)).unwrap();
        kubelet
    }

    fn relative(&self) -> String {
        format!("pods/{}/volumes/kubernetes.io~empty-dir/data", self.uid)
    }

    fn empty_dir(&self) -> PathBuf {
        self.scratch.path().join(self.relative())
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

    /// A pod that replaces one whose machine has ended.
    fn next_pod(&self, handler: &str) -> Pod {
        Pod::run_with(handler, json!({"metadata": {"uid": self.uid}}))
    }

    /// kubelet makes what a subPath names, and binds it to a place where no link can change what it is.
    fn sub_path(&self, name: &str, number: u32) -> Mounted {
        let made = self.empty_dir().join(name);
        fs::create_dir_all(&made).unwrap();
        let opened = fs::File::open(&made).unwrap();
        let source = format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd());
        let at = self.scratch.directory(&format!("pods/{}/volume-subpaths/data/c/{number}", self.uid));
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
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
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
    let bind = |host: &Path, at: &str| json!({"host_path": host, "container_path": at});
    // The first container has a part, and nothing is there yet but what kubelet has made for it.
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
    let part = kubelet.sub_path("part", 0);
    let first = pod.start(json!({"mounts": [bind(&part.0, "/data")]}));
    first.sh("echo text > /data/file").ok();
    assert_eq!(kubelet.start(&pod).sh("cat /data/part/file").ok(), "text");
    if handler != "runc" {
        assert_eq!(kind(&first), "ext4");
    }
    pod.remove().unwrap();
    drop(part);

    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
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
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
    let container = kubelet.start(&pod);
    container.sh("echo kept > /data/kept && sync /data/kept").ok();
    container.sh("while :; do echo x >> /data/more; done > /dev/null 2>&1 &").ok();
    kill(Pid::from_raw(container.pid()), Signal::SIGKILL).unwrap();
    container.ended();
    pod.remove().unwrap();
    let pod = kubelet.next_pod(handler);
    let container = kubelet.start(&pod);
    assert_eq!(kind(&container), "ext4");
    assert_eq!(container.sh("cat /data/kept && echo more >> /data/more").ok(), "kept");
    // Two machines would destroy it.
    let other = kubelet.next_pod(handler);
    let refused = other.create(json!({"mounts": [kubelet.mount(json!({}))]})).unwrap().start().unwrap_err();
    assert!(refused.message.contains("another pod uses it"), "{refused}");
    other.remove().unwrap();
    pod.remove().unwrap();
}

fn an_empty_dir_is_shared_where_it_has_to_be(handler: &str) {
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
    fs::write(kubelet.empty_dir().join("file"), "of the host").unwrap();
    assert_eq!(kubelet.start(&pod).sh("cat /data/file").ok(), "of the host");
    // Of another pod, by a hostPath.
    let other = Pod::run(handler);
    assert_eq!(kubelet.start(&other).sh("cat /data/file").ok(), "of the host");
    other.remove().unwrap();
    pod.remove().unwrap();

    // PROPAGATION_HOST_TO_CONTAINER, in the same container and in one before.
    let shown = json!({"propagation": 1, "container_path": "/shown"});
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
    let both = pod.start(json!({"mounts": [kubelet.mount(json!({})), kubelet.mount(shown)]}));
    let later = kubelet.start(&pod);
    later.sh("echo text > /data/file").ok();
    assert_eq!(both.sh("cat /data/file /shown/file").ok(), "text\ntext");
    assert_eq!(names(&kubelet.empty_dir()), ["file"]);
    pod.remove().unwrap();
}

/// More than there are slots for such disks, and all in a later container.
fn many_empty_dirs_are_there(handler: &str) {
    let pod = Pod::run(handler);
    let kubelet = Kubelet::of(&pod);
    let mounts = |numbers: std::ops::Range<u32>| {
        let mount = |number: u32| {
            let directory =
                kubelet.scratch.directory(&kubelet.relative().replace("data", &number.to_string()));
            json!({"host_path": directory, "container_path": format!("/data/{number}")})
        };
        json!({"mounts": numbers.map(mount).collect::<Vec<_>>()})
    };
    for numbers in [0..7, 7..14] {
        let container = pod.start(mounts(numbers));
        container.sh("for one in /data/*; do echo $one > $one/file; done").ok();
        container.stop(0).unwrap();
        container.remove().unwrap();
    }
    let all = pod.start(mounts(0..14));
    let expected: Vec<_> = (0..14).map(|number| format!("/data/{number}")).collect();
    assert_eq!(all.sh("cat $(ls -d /data/*/file | sort -t / -n -k 3)").ok(), expected.join("\n"));
    if handler != "runc" {
        assert_eq!(all.sh("grep -c ' /data/.* ext4 ' /proc/mounts").ok(), "3");
    }
    pod.remove().unwrap();
}

/// Something that is mounted in it by a container for others, and that is still there when all of them have ended.
fn mounts_in_it_do_not_keep_it(handler: &str) {
    let privileged = json!({"linux": {"security_context": {"privileged": true}}});
    let pod = Pod::run_with(handler, privileged.clone());
    let kubelet = Kubelet::of(&pod);
    let first = kubelet.start(&pod);
    first.sh("mkdir /data/mounted").ok();
    // PROPAGATION_BIDIRECTIONAL
    let mut config = privileged;
    config["mounts"] = json!([kubelet.mount(json!({"propagation": 2}))]);
    let mounts = pod.start(config);
    mounts.sh("mount -t tmpfs none /data/mounted && echo inner > /data/mounted/file").ok();
    for container in [first, mounts] {
        container.stop(0).unwrap();
        container.remove().unwrap();
    }
    let later = kubelet.start(&pod);
    let expected = if handler == "runc" { "inner" } else { "" };
    assert_eq!(later.sh("cat /data/mounted/file 2>/dev/null; true").ok(), expected);
    pod.remove().unwrap();
    let _ = umount2(&kubelet.empty_dir().join("mounted"), MntFlags::MNT_DETACH);
}

/// The image of BusyBox with a volume, in the CRI plugin's namespace.
fn image_with_volume(path: &str) -> String {
    let name = format!("localhost/{}:1", new_id());
    let scratch = Scratch::new();
    let (archive, layout) = (scratch.path().join("image.tar"), scratch.directory("layout"));
    let archive = archive.to_str().unwrap();
    let layout_path = layout.to_str().unwrap();
    ctr(&["-n", "k8s.io", "images", "export", archive, BUSYBOX]).output().ok();
    Command::new(&["tar", "xf", archive, "-C", layout_path]).output().ok();
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
        layout.join("blobs").join(digest)
    };
    let read = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let write = |descriptor: &mut Value, content: &Value| {
        let text = content.to_string();
        let sum = Command::new(&["sha256sum"]).input(text.clone()).output().ok().text();
        descriptor["digest"] = format!("sha256:{}", sum.split(' ').next().unwrap()).into();
        descriptor["size"] = text.len().into();
        fs::write(blob(descriptor), text).unwrap();
    };
    let mut index = read(&layout.join("index.json"));
    let mut manifest = read(&blob(&index["manifests"][0]));
    let mut config = read(&blob(&manifest["config"]));
    config["config"]["Volumes"] = json!({path: {}});
    write(&mut manifest["config"], &config);
    write(&mut index["manifests"][0], &manifest);
    index["manifests"][0]["annotations"] = json!({"io.containerd.image.name": name});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let _ = fs::remove_file(layout.join("manifest.json"));
    Command::new(&["tar", "cf", archive, "-C", layout_path, "."]).output().ok();
    ctr(&["-n", "k8s.io", "images", "import", archive]).output().ok();
    name
}

fn a_volume_of_an_image_is_the_containers(handler: &str) {
    let image = image_with_volume("/data");
    let pod = Pod::run(handler);
    let container = pod.start(json!({"image": {"image": image}}));
    container.sh("echo text > /data/file && sync && mkdir /data/more").ok();
    if handler != "runc" {
        assert_eq!(kind(&container), "ext4");
    }
    container.stop(0).unwrap();
    container.remove().unwrap();
    let next = pod.start(json!({"image": {"image": image}}));
    assert_eq!(next.sh("ls -A /data").ok(), "");
    pod.remove().unwrap();
    ctr(&["-n", "k8s.io", "images", "rm", &image]).output().ok();
}
