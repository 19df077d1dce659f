//! Volumes, as kubelet prepares them on the host.

use std::fs;

use katana_tests::Scratch;
use katana_tests::cri::shared_pod;
use katana_tests::host::eventually;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::cases;

cases! {
    /// hostPath, emptyDir on disk: directories and files, read-only and not
    2: directories_and_files_are_bound,
    /// mountPropagation: None and HostToContainer
    mounts_of_the_host_appear_if_asked,
    /// emptyDir with medium Memory and a sizeLimit
    memory_volumes_keep_their_size,
    /// terminationMessagePath
    a_termination_message_reaches_the_host,
    /// ConfigMap, Secret, projected: the host swaps a symbolic link.
    a_config_map_is_updated_at_once,
    /// subPath: a directory of another volume
    a_part_of_a_volume_is_bound,
}

fn volume(scratch: &Scratch, more: Value) -> Value {
    let mut mount = json!({"host_path": scratch.path(), "container_path": "/volume"});
    if let (Some(mount), Value::Object(more)) = (mount.as_object_mut(), more) {
        mount.extend(more);
    }
    json!({"mounts": [mount]})
}

fn directories_and_files_are_bound(handler: &str) {
    let scratch = Scratch::new();
    let file = scratch.file("file", "from the host");
    let config = json!({"mounts": [
        {"host_path": scratch.path(), "container_path": "/volume"},
        {"host_path": scratch.path(), "container_path": "/read-only", "readonly": true},
        {"host_path": file, "container_path": "/etc/one-file"},
    ]});
    let container = shared_pod(handler).start(config);
    assert_eq!(
        container.sh("cat /volume/file /read-only/file /etc/one-file").ok(),
        "from the host".repeat(3)
    );
    container.sh("echo from the guest > /volume/file && echo new > /volume/new").ok();
    assert_eq!(fs::read_to_string(&file).unwrap(), "from the guest\n");
    assert_eq!(container.sh("cat /etc/one-file /read-only/new").ok(), "from the guest\nnew");
    let refused = container.sh("echo x > /read-only/file");
    assert!(refused.stderr.contains("Read-only file system"), "{refused:?}");
    scratch.file("later", "x");
    container.sh("test -e /volume/later").ok();
}

/// A tmpfs on a directory of the host; gone when this is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(place: std::path::PathBuf, options: &str) -> Self {
        mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
        Self(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn mounts_of_the_host_appear_if_asked(handler: &str) {
    let scratch = Scratch::new();
    // A volume is a mount of its own that is shared, as kubelet's directory is.
    let outer = Mounted::tmpfs(scratch.directory("outer"), "size=1m");
    mount(None::<&str>, &outer.0, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    fs::create_dir(outer.0.join("later")).unwrap();
    let pod = shared_pod(handler);
    let with = |propagation: &str| {
        pod.start(json!({"mounts": [
            {"host_path": outer.0, "container_path": "/volume", "propagation": propagation}
        ]}))
    };
    let (follows, apart) = (with("PROPAGATION_HOST_TO_CONTAINER"), with("PROPAGATION_PRIVATE"));
    let inner = Mounted::tmpfs(outer.0.join("later"), "size=1m");
    fs::write(inner.0.join("file"), "x").unwrap();
    assert!(eventually(|| follows.sh("test -e /volume/later/file").code == 0), "the mount does not appear");
    assert_ne!(apart.sh("test -e /volume/later/file").code, 0, "the mount appears where nobody asked");
    drop(inner);
    assert!(eventually(|| follows.sh("test -e /volume/later/file").code != 0), "the mount does not go");
    follows.remove().unwrap();
    apart.remove().unwrap();
}

fn memory_volumes_keep_their_size(handler: &str) {
    let scratch = Scratch::new();
    let memory = Mounted::tmpfs(scratch.directory("memory"), "size=1m");
    let pod = shared_pod(handler);
    let config = json!({"mounts": [{"host_path": memory.0, "container_path": "/memory"}]});
    let (one, two) = (pod.start(config.clone()), pod.start(config));
    assert_eq!(one.sh("df -k /memory | tail -n 1 | awk '{print $2}'").ok(), "1024");
    let refused = one.sh("dd if=/dev/zero of=/memory/much bs=1M count=2");
    assert!(refused.stderr.contains("No space left on device"), "{refused:?}");
    one.sh("rm /memory/much; echo shared > /memory/file").ok();
    assert_eq!(two.sh("cat /memory/file").ok(), "shared");
    one.remove().unwrap();
    two.remove().unwrap();
}

fn a_termination_message_reaches_the_host(handler: &str) {
    let scratch = Scratch::new();
    let file = scratch.file("message", "");
    let container = shared_pod(handler).start(json!({
        "mounts": [{"host_path": file, "container_path": "/dev/termination-log"}],
        "command": ["sh", "-c", "echo all is lost > /dev/termination-log; exit 1"],
    }));
    assert_eq!(container.ended().exit_code, 1);
    assert_eq!(fs::read_to_string(&file).unwrap(), "all is lost\n");
}

fn a_config_map_is_updated_at_once(handler: &str) {
    let scratch = Scratch::new();
    // As kubelet's AtomicWriter: key -> ..data/key, ..data -> a directory with the time in its name.
    let publish = |version: &str| {
        scratch.directory(version);
        scratch.file(&format!("{version}/key"), version);
        std::os::unix::fs::symlink(version, scratch.path().join("..data_tmp")).unwrap();
        fs::rename(scratch.path().join("..data_tmp"), scratch.path().join("..data")).unwrap();
    };
    publish("..one");
    std::os::unix::fs::symlink("..data/key", scratch.path().join("key")).unwrap();
    let container = shared_pod(handler).start(volume(&scratch, json!({"readonly": true})));
    assert_eq!(container.sh("cat /volume/key").ok(), "..one");
    publish("..two");
    fs::remove_dir_all(scratch.path().join("..one")).unwrap();
    assert!(eventually(|| container.sh("cat /volume/key").stdout == "..two"), "the old value stays");
}

fn a_part_of_a_volume_is_bound(handler: &str) {
    let scratch = Scratch::new();
    let part = scratch.directory("part");
    fs::write(part.join("file"), "x").unwrap();
    let config = json!({"mounts": [
        {"host_path": scratch.path(), "container_path": "/all"}, {"host_path": part, "container_path": "/part"},
    ]});
    let container = shared_pod(handler).start(config);
    container.sh("echo written > /part/file").ok();
    assert_eq!(container.sh("cat /all/part/file").ok(), "written");
}
