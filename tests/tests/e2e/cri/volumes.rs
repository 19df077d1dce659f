//! Volumes, as kubelet prepares them on the host.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use katana_tests::Scratch;
use katana_tests::cri::{Pod, Session, shared_pod};
use katana_tests::host::eventually;
use katana_tests::scratch::LoopDevice;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::cases;

cases! {
    /// hostPath, emptyDir on disk: directories and files, read-only and not
    2: directories_and_files_are_bound,
    /// emptyDir of a program and its sidecar
    containers_see_each_others_changes_at_once,
    /// mountPropagation: None and HostToContainer
    mounts_of_the_host_appear_if_asked,
    /// emptyDir with medium Memory and a sizeLimit
    memory_volumes_keep_their_size,
    /// hostPath of type Socket, in two containers of a pod
    sockets_of_the_host_are_connected,
    /// emptyDir with a server's socket, for a sidecar
    sockets_in_a_volume_connect_containers,
    /// emptyDir with medium HugePages, as many as the limit says
    huge_pages_are_there_up_to_the_limit,
    /// terminationMessagePath
    a_termination_message_reaches_the_host,
    /// ConfigMap, Secret, projected: the host swaps a symbolic link.
    a_config_map_is_updated_at_once,
    /// subPath of an emptyDir on disk, of one in memory with its sizeLimit, and of a projected volume
    parts_of_volumes_of_all_kinds_are_bound,
    /// volumeDevices, and devices of the host
    a_block_device_is_read_and_written,
    /// The container's own root, of which nothing is asked twice
    2: the_root_is_what_the_container_makes_of_it,
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
    assert_eq!(container.sh("cat /read-only/file /read-only/new").ok(), "from the guest\nnew");
    let alone = || container.sh("cat /etc/one-file").ok().to_owned();
    if handler != "runc" {
        // docs/limitations.md: a file that is mounted by itself may take a second to show what changed in its
        // directory.
        eventually(|| alone() == "from the guest");
    }
    assert_eq!(alone(), "from the guest");
    let refused = container.sh("echo x > /read-only/file");
    assert!(refused.stderr.contains("Read-only file system"), "{refused:?}");
    scratch.file("later", "x");
    container.sh("test -e /volume/later").ok();
}

/// What a shell that reads commands has to say to this one, and with which code that ends.
#[track_caller]
fn answer(shell: &mut Session, script: &str) -> String {
    shell.stdout.clear();
    shell.write(&format!("{script}; echo \"code $?;\"\n"));
    shell.wait_for(";\n");
    shell.stdout.clone()
}

fn containers_see_each_others_changes_at_once(handler: &str) {
    let scratch = Scratch::new();
    let pod = shared_pod(handler);
    let start = |more| {
        let mut config = volume(&scratch, more);
        let check = json!({"host_path": std::env::current_exe().unwrap(), "container_path": "/check"});
        config["mounts"].as_array_mut().unwrap().push(check);
        pod.start(config)
    };
    let (writer, reader) = (start(json!({})), start(json!({"readonly": true})));
    let [mut writes, mut reads] =
        [&writer, &reader].map(|container| container.exec_streaming(&["sh"], false).unwrap());
    for round in 0..20 {
        let text = format!("round {round}");
        // The name is known to be missing, the contents are known to be the old ones.
        let before = answer(&mut reads, &format!("cat /volume/file; test -e /volume/{round}"));
        assert!(before.ends_with("code 1;\n"), "{before}");
        let written = answer(&mut writes, &format!("echo {text} > /volume/file && echo > /volume/{round}"));
        assert_eq!(written, "code 0;\n");
        let seen = answer(&mut reads, &format!("cat /volume/file && test -e /volume/{round}"));
        assert_eq!(seen, format!("{text}\ncode 0;\n"));
    }
    for shell in [&mut writes, &mut reads] {
        shell.write("exit\n");
        assert_eq!(shell.exit_code(), 0);
    }
    // A lock of the one is one for the other.
    let check = |test| {
        format!(
            "KATANA_CHECK_DIRECTORY=/volume /check --ignored --exact guest::locks::{test} > /dev/null 2>&1"
        )
    };
    writer.sh(&format!("{} &", check("it_is_locked_for_long"))).ok();
    let is_locked = || reader.sh(&check("it_can_be_locked")).code != 0;
    assert!(eventually(is_locked), "nothing is locked");
    // What one has of it stays when the other goes.
    writer.remove().unwrap();
    assert!(!is_locked(), "it is still locked");
    assert_eq!(reader.sh("cat /volume/file").ok(), "round 19");
    reader.remove().unwrap();
}

/// A tmpfs on a directory of the host; gone when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(place: PathBuf, options: &str) -> Self {
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
        symlink(version, scratch.path().join("..data_tmp")).unwrap();
        fs::rename(scratch.path().join("..data_tmp"), scratch.path().join("..data")).unwrap();
    };
    publish("..one");
    symlink("..data/key", scratch.path().join("key")).unwrap();
    let container = shared_pod(handler).start(volume(&scratch, json!({"readonly": true})));
    assert_eq!(container.sh("cat /volume/key").ok(), "..one");
    publish("..two");
    fs::remove_dir_all(scratch.path().join("..one")).unwrap();
    assert!(eventually(|| container.sh("cat /volume/key").stdout == "..two"), "the old value stays");
}

fn sockets_of_the_host_are_connected(handler: &str) {
    let scratch = Scratch::new();
    let server = crate::sockets::Server::start(scratch.path().join("socket"), 0, 0o666);
    let pod = shared_pod(handler);
    let start = || {
        pod.start(json!({"mounts": [
            {"host_path": server.path, "container_path": "/sockets/open"},
            {"host_path": std::env::current_exe().unwrap(), "container_path": "/check", "readonly": true},
        ]}))
    };
    let check = "KATANA_CHECK_DIRECTORY=/sockets /check --ignored guest::sockets::the_server_sees";
    let connects = |container: &katana_tests::cri::Container| {
        let output = container.sh(check);
        assert!(output.ok().contains("1 passed"), "{output:?}");
    };
    let (one, two) = (start(), start());
    connects(&one);
    connects(&two);
    one.stop(0).unwrap();
    one.remove().unwrap();
    connects(&two);
    two.remove().unwrap();
}

fn sockets_in_a_volume_connect_containers(handler: &str) {
    let scratch = Scratch::new();
    let pod = shared_pod(handler);
    let start = || {
        pod.start(json!({"mounts": [
            {"host_path": scratch.path(), "container_path": "/volume"},
            {"host_path": std::env::current_exe().unwrap(), "container_path": "/check", "readonly": true},
        ]}))
    };
    let (server, client) = (start(), start());
    let check =
        |name: &str| format!("KATANA_CHECK_DIRECTORY=/volume /check --ignored guest::sockets::{name}");
    server.sh(&format!("{} > /dev/null 2>&1 &", check("a_server_in"))).ok();
    let reached = || client.sh(&check("the_volumes_server")).code == 0;
    assert!(eventually(reached), "the server is not reached");
    server.remove().unwrap();
    client.remove().unwrap();
}

/// As kubelet does it: a mount of its own, of what a descriptor stands for, so that no link leads elsewhere meanwhile.
fn part(of: &Path, name: &str, at: PathBuf) -> Mounted {
    let opened = fs::File::open(of.join(name)).unwrap();
    let source = format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd());
    if opened.metadata().unwrap().is_dir() { fs::create_dir(&at) } else { fs::write(&at, "") }.unwrap();
    mount(Some(source.as_str()), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    Mounted(at)
}

fn parts_of_volumes_of_all_kinds_are_bound(handler: &str) {
    let scratch = Scratch::new();
    let memory = Mounted::tmpfs(scratch.directory("memory"), "size=1m");
    fs::create_dir(memory.0.join("part")).unwrap();
    fs::write(scratch.directory("disk/part").join("file"), "on disk").unwrap();
    // A projected volume: keys are links, and a part of it is what its link led to.
    fs::write(scratch.directory("projected/..one/tokens").join("token"), "secret").unwrap();
    symlink("..one", scratch.path().join("projected/..data")).unwrap();
    symlink("..data/tokens", scratch.path().join("projected/tokens")).unwrap();
    scratch.directory("volume-subpaths");
    let part = |of: &str, name: &str, number: u32| {
        part(&scratch.path().join(of), name, scratch.path().join(format!("volume-subpaths/{number}")))
    };
    let parts = [part("memory", "part", 0), part("disk", "part", 1), part("projected", "tokens/token", 2)];
    let bind = |host: &Path, container: &str, read_only: bool| json!({"host_path": host, "container_path": container, "readonly": read_only});
    let container = shared_pod(handler).start(json!({"mounts": [
        bind(&parts[0].0, "/in-memory", false), bind(&parts[1].0, "/on-disk", false),
        bind(&parts[2].0, "/etc/token", true), bind(&scratch.path().join("projected"), "/projected", true),
        bind(&scratch.path().join("disk"), "/all", false),
    ]}));
    assert_eq!(
        container.sh("cat /on-disk/file /etc/token /projected/tokens/token").ok(),
        "on disksecretsecret"
    );
    container.sh("echo written > /on-disk/file && mkdir /on-disk/new && mv /on-disk/file /on-disk/new").ok();
    assert_eq!(container.sh("cat /all/part/new/file").ok(), "written");
    // The limit is that of the whole volume.
    let refused = container.sh("dd if=/dev/zero of=/in-memory/much bs=1M count=2");
    assert!(refused.stderr.contains("No space left on device"), "{refused:?}");
    assert!(fs::metadata(memory.0.join("part/much")).unwrap().len() <= 1 << 20);
    container.remove().unwrap();
}

/// Huge pages of the host, which runc's containers use.
struct HostPages;

impl HostPages {
    const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve() -> Self {
        fs::write(Self::NUMBER, "8").unwrap();
        Self
    }
}

impl Drop for HostPages {
    fn drop(&mut self) {
        let _ = fs::write(Self::NUMBER, "0");
    }
}

fn huge_pages_are_there_up_to_the_limit(handler: &str) {
    const HUGE: u64 = 2 << 20;
    let scratch = Scratch::new();
    let _host = (handler == "runc").then(HostPages::reserve);
    let place = scratch.directory("huge");
    mount(Some("hugetlbfs"), &place, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M")).unwrap();
    let volume = Mounted(place);
    // kubelet names all sizes that the host has.
    let limits = json!([{"page_size": "2MB", "limit": 2 * HUGE}, {"page_size": "1GB", "limit": 0}]);
    let container = shared_pod(handler).start(json!({
        "mounts": [
            {"host_path": volume.0, "container_path": "/huge"},
            {"host_path": std::env::current_exe().unwrap(), "container_path": "/check", "readonly": true},
        ],
        "linux": {"resources": {"hugepage_limits": limits}},
    }));
    let test = "KATANA_CHECK_DIRECTORY=/huge /check --ignored --exact guest::huge_pages::two_can_be_used_and_no_more";
    let output = container.sh(test);
    assert!(output.ok().contains("1 passed"), "{output:?}");
    container.remove().unwrap();
}

fn a_block_device_is_read_and_written(handler: &str) {
    let scratch = Scratch::new();
    let image = scratch.file("image", "x".repeat(1 << 20));
    let (disk, other) = (LoopDevice::of(&image), LoopDevice::of(&scratch.file("other", "y".repeat(1 << 20))));
    let device = |host: &LoopDevice, container: &str, permissions: &str| json!({"host_path": host.path(), "container_path": container, "permissions": permissions});
    let pod = shared_pod(handler);
    let config = json!({"devices": [device(&disk, "/dev/volume", "rwm"), device(&other, "/dev/seen", "r")]});
    let container = pod.start(config.clone());
    container.sh("test -b /dev/volume && head -c 3 /dev/volume && head -c 3 /dev/seen").ok();
    let write = "printf written | dd of=/dev/DISK bs=512 seek=2 conv=notrunc,fsync";
    container.sh(&write.replace("DISK", "volume")).ok();
    assert_ne!(
        container.sh(&write.replace("DISK", "seen")).code,
        0,
        "a device that may be read is written to"
    );
    assert_eq!(&fs::read(&image).unwrap()[1024..1032], b"writtenx");
    // Another container of the pod has the same disk, and sees what was written without waiting for it.
    let second = pod.start(config);
    container.sh(&write.replace("DISK", "volume").replace("written", "changed").replace(",fsync", "")).ok();
    assert_eq!(second.sh("dd if=/dev/volume bs=512 skip=2 count=1 2>/dev/null | head -c 7").ok(), "changed");
    container.stop(0).unwrap();
    container.remove().unwrap();
    assert_eq!(second.sh("head -c 1 /dev/volume; head -c 1 /dev/seen").ok(), "xy");
    second.stop(0).unwrap();
    second.remove().unwrap();
    // What the kernel had not written yet, it has now.
    assert_eq!(&fs::read(&image).unwrap()[1024..1031], b"changed");
    if handler == "kata" {
        // More than a pod's machine has slots for; and nothing is left of the attempt. With all of them taken, the root is
        // shared.
        let pod = Pod::run(handler);
        let many: Vec<_> =
            (0..13).map(|n| LoopDevice::of(&scratch.file(&format!("{n}"), "x".repeat(1 << 20)))).collect();
        let devices =
            |count| many.iter().take(count).map(|one| device(one, one.path(), "rwm")).collect::<Vec<_>>();
        let refused = pod.create(json!({"devices": devices(13)})).unwrap().start().unwrap_err();
        assert!(refused.message.contains("all 12 disk slots"), "{refused}");
        let last = pod.start(json!({"devices": devices(12)}));
        assert_eq!(last.sh(&format!("head -c 1 {}", many[11].path())).ok(), "x");
        last.stop(0).unwrap();
        last.remove().unwrap();
    }
}

fn the_root_is_what_the_container_makes_of_it(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    // Each line prints what it expects; `look` is what is remembered from before.
    let script = r#"
        set -e
        mkdir /root/w && cd /root/w
        same() { [ "$1" = "$2" ] || { echo "\"$1\", not \"$2\": $3"; exit 1; }; }
        ! stat name 2>/dev/null && ! cat name 2>/dev/null
        same "$(ls)" "" "an empty directory"
        echo one >name
        same "$(cat name)" one "a name that was missing"
        same "$(ls)" name "a directory that was listed when it was empty"
        ln name link; echo three >>link
        same "$(stat -c "%s %h" name)" "10 2" "by one name, what was written by another"
        mv name other
        ! stat name 2>/dev/null
        same "$(ls)" "$(printf "link\nother")" "after a rename"
        rm link
        same "$(stat -c "%h" other)" 1 "links after one was removed"
        mkdir -p a/b; ls a a/b; touch a/b/c
        same "$(ls a/b)" c "a directory in a directory"
        mv a/b d
        same "$(ls a)$(ls d)" c "a directory that was moved"
        ! ls a/b 2>/dev/null
        rm -r a d
        same "$(ls)" other "after all that"
        chmod 600 other; same "$(stat -c %a other)" 600 mode
        chown 12:34 other; same "$(stat -c %u:%g other)" 12:34 owner
        touch -d "2001-02-03 04:05:06" other; same "$(stat -c %Y other)" 981173106 time
        truncate -s 3 other; same "$(cat other)" one truncated
        : >other; same "$(stat -c %s other)" 0 emptied
        # A file of the image, which is copied when it is first written to.
        before=$(cat /etc/passwd); stat -c %s /etc/passwd >/dev/null
        echo last >>/etc/passwd
        same "$(cat /etc/passwd)" "$before
last" "a file of the image"
        rm /etc/passwd; ! cat /etc/passwd 2>/dev/null
        echo new >/etc/passwd; same "$(cat /etc/passwd)" new "a file of the image, made anew"
        exec 3<>other; echo through >&3; rm other; same "$(cat <&3)" "" "at the end"; ! stat other 2>/dev/null
        ln -s /etc/passwd s; same "$(cat s)" new "a link"; rm s; ln -s nowhere s; same "$(readlink s)" nowhere "another"
        mkfifo f; same "$(stat -c %F f)" fifo "a pipe"
        echo done
    "#;
    let output = container.sh(script);
    assert!(output.ok().ends_with("done"), "{output:?}");
    // What a process of the guest has written is the host's at once, in the snapshot: another container does not see it.
    let other = shared_pod(handler).start(json!({}));
    assert!(other.sh("ls /root/w").code != 0);
}
