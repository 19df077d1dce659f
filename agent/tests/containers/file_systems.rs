//! Mounts, devices, hidden paths, hostile images.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use super::harness::{Guest, status};

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[tokio::test]
async fn devices_are_there() {
    let guest = Guest::new("devices").await;
    let script = "cd /dev; stat -c '%n %F %t %T %a' null zero full random urandom tty; for l in fd stdin ptmx; do readlink $l; done; \
        cat /dev/fd/0 < /dev/null; stat -c '%t %T %a %u' fuse";
    let output = guest
        .shell_with(script, |spec| {
            spec["linux"]["devices"] =
                json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 416, "uid": 7}]);
        })
        .await;
    let special = "character special file";
    assert_eq!(
        output,
        format!(
            "null {special} 1 3 666\nzero {special} 1 5 666\nfull {special} 1 7 666\nrandom {special} 1 8 666\n\
             urandom {special} 1 9 666\ntty {special} 5 0 666\n/proc/self/fd\n/proc/self/fd/0\npts/ptmx\na e5 640 7\n"
        )
    );
}

#[tokio::test]
async fn a_dev_of_the_image_gets_devices_too() {
    let guest = Guest::new("plaindev").await;
    fs::write(guest.rootfs().join("dev/null"), "in the way").unwrap();
    let output = guest
        .shell_with(
            "echo x > /dev/null; cat /dev/null; ls /dev/pts | wc -l; head -c 2 /dev/zero | wc -c",
            |spec| {
                spec["mounts"]
                    .as_array_mut()
                    .unwrap()
                    .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
            },
        )
        .await;
    assert_eq!(output.split_whitespace().collect::<Vec<_>>(), ["0", "2"]);
}

#[tokio::test]
async fn kernel_files_are_hidden() {
    let guest = Guest::new("hidden").await;
    let output = guest
        .shell("cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic; echo h > /proc/sysrq-trigger; touch /sys/x; echo end")
        .await;
    assert_eq!(output.split_whitespace().collect::<Vec<_>>(), ["0", "0", "end"]);
    let output = guest.run(&guest.spec(&["sh", "-c", "echo 1 > /proc/sys/kernel/panic"])).await.unwrap();
    assert!(output.stderr.contains("Read-only file system"), "{output:?}");
}

/// A name of one inode: whoever changes owner or mode of one file changes all of them.
#[tokio::test]
async fn what_hides_a_file_is_no_node_of_the_guests() {
    let guest = Guest::new("nulls").await;
    let node = fs::metadata("/dev/null").unwrap();
    let guests = {
        use std::os::unix::fs::MetadataExt;
        format!("{} {}", node.dev(), node.ino())
    };
    fn masked(spec: &mut Value) {
        spec["linux"]["maskedPaths"] = json!(["/proc/uptime"]);
    }
    fn without_dev(spec: &mut Value) {
        masked(spec);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    }
    // Nodes of a tmpfs, and nodes that are bound over files of the image; each container has its own.
    let mut seen = vec![guests.clone()];
    for case in [masked as fn(&mut Value), without_dev, without_dev] {
        fs::write(guest.rootfs().join("dev/null"), "in the way").unwrap();
        let output = guest.shell_with("stat -c '%d %i' /dev/null /proc/uptime", case).await;
        let lines: Vec<_> = output.lines().map(str::to_owned).collect();
        assert!(lines.len() == 2 && lines[0] == lines[1], "{output}");
        assert!(!seen.contains(&lines[0]), "{output}: {seen:?}");
        seen.push(lines[0].clone());
    }
    let devices = guest.run_directory().join("kata-containers/devices");
    assert_eq!(fs::read_dir(devices).unwrap().count(), 0, "nodes of containers that are gone");
    // Where there is no /dev/null of the container's, the guest's is there and cannot be changed. The mode is what it
    // is already.
    let output = guest
        .shell_with("rm /dev/null; stat -c '%d %i' /proc/uptime; chmod 666 /proc/uptime; echo x > /proc/uptime; echo end", |spec| {
            without_dev(spec);
            add_mount(spec, json!({"destination": "/dev", "type": "bind", "source": "/var/empty-dev", "options": ["rbind"]}));
            fs::create_dir_all("/var/empty-dev").unwrap();
        })
        .await;
    fs::remove_dir_all("/var/empty-dev").unwrap();
    assert_eq!(output, format!("{guests}\nend\n"));
}

/// CVE-2019-16884, CVE-2019-19921: an image or a volume that puts its own files in the place of the kernel's.
#[tokio::test]
async fn nothing_is_mounted_over_the_files_of_the_kernel() {
    let guest = Guest::new("overproc").await;
    let volume = guest.directory.join("volume");
    fs::create_dir_all(volume.join("fd")).unwrap();
    fs::write(volume.join("file"), "mine\n").unwrap();
    symlink("/proc/self", guest.rootfs().join("link")).unwrap();
    symlink("proc", guest.rootfs().join("other")).unwrap();
    let (directory, file) = (volume.display().to_string(), volume.join("file").display().to_string());
    let bind = |to: &str, source: &str| json!({"destination": to, "type": "bind", "source": source, "options": ["rbind"]});
    let of_type = |to: &str, kind: &str| json!({"destination": to, "type": kind, "source": kind});
    for (mount, why) in [
        (bind("/proc", &directory), "not of type proc"),
        (bind("/other", &directory), "not of type proc"),
        (of_type("/proc", "tmpfs"), "not of type proc"),
        (of_type("/proc", "sysfs"), "not of type proc"),
        (bind("/proc/self/attr", &directory), "inside /proc"),
        (bind("/link/attr", &directory), "inside /proc"),
        (bind("/proc/sys/kernel/core_pattern", &file), "inside /proc"),
        (of_type("/proc/self/attr", "tmpfs"), "inside /proc"),
        (of_type("/proc/acpi/../self/attr", "tmpfs"), "inside /proc"),
        (of_type("/proc/sys", "proc"), "inside /proc"),
        (of_type("/proc/self/task", "cgroup2"), "inside /proc"),
        (of_type("/proc/self/task", "ramfs"), "inside /proc"),
    ] {
        // Before the container's proc is there, and after that.
        for first in [false, true] {
            let mut spec = guest.spec(&["true"]);
            let mounts = spec["mounts"].as_array_mut().unwrap();
            if first && mount["destination"] != "/proc" && mount["destination"] != "/other" {
                continue;
            }
            let at = if first { 0 } else { mounts.len() };
            mounts.insert(at, mount.clone());
            let error = status(guest.run(&spec).await.unwrap_err()).1;
            assert!(error.starts_with("error mounting ") && error.ends_with(why), "{mount}: {error}");
        }
    }
    // What containers and their managers do have.
    let output = guest
        .shell_with("cat /proc/uptime; stat -f -c %T /proc /copy; ls /copy/1/status", |spec| {
            add_mount(spec, bind("/proc/uptime", &file));
            add_mount(spec, bind("/proc", "/proc"));
            add_mount(spec, bind("/copy", "/proc"));
            add_mount(spec, bind("/proc/uptime", &file));
        })
        .await;
    assert_eq!(output, "mine\nproc\nproc\n/copy/1/status\n");
}

#[tokio::test]
async fn a_read_only_root_and_binds() {
    let guest = Guest::new("binds").await;
    let data = guest.directory.join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("file"), "content").unwrap();
    let script = "touch /x; touch /rw/new; touch /ro/new; cat /one; echo changed > /one; grep -c ' /ro ro,nosuid,nodev,noexec' /proc/self/mounts; \
        awk '$2 == \"/ro\" {print $4}' /proc/self/mounts | cut -d, -f1-4";
    let mut spec = guest.spec(&["sh", "-c", script]);
    spec["root"]["readonly"] = json!(true);
    for directory in ["rw", "ro"] {
        fs::create_dir(guest.rootfs().join(directory)).unwrap();
    }
    add_mount(
        &mut spec,
        json!({"destination": "/rw", "type": "bind", "source": data, "options": ["rbind", "rw"]}),
    );
    let ro = ["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
    add_mount(&mut spec, json!({"destination": "/ro", "type": "bind", "source": data, "options": ro}));
    add_mount(&mut spec, json!({"destination": "/one", "source": data.join("file"), "options": ["bind"]}));
    let output = guest.run(&spec).await.unwrap();
    assert!(output.stderr.contains("touch: /x: Read-only file system"), "{output:?}");
    assert!(output.stderr.contains("touch: /ro/new: Read-only file system"), "{output:?}");
    assert!(data.join("new").exists());
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "changed\n");
    assert!(output.stdout.starts_with("content"), "{output:?}");
    assert!(output.stdout.contains("ro,nosuid,nodev,noexec"), "{output:?}");
}

#[tokio::test]
async fn recursive_attributes_reach_what_is_below() {
    let guest = Guest::new("recursive").await;
    // /sys/fs has a mount below it, that of the cgroups.
    let script = "awk '$2 ~ \"^/deep\" {print $2, $4}' /proc/self/mounts | cut -d, -f1";
    for (option, expected) in [("ro", "/deep ro\n/deep/cgroup rw\n"), ("rro", "/deep ro\n/deep/cgroup ro\n")]
    {
        let output = guest
            .shell_with(script, |spec| {
                add_mount(
                    spec,
                    json!({"destination": "/deep", "source": "/sys/fs", "options": ["rbind", option]}),
                );
            })
            .await;
        let lines: String =
            output.lines().filter(|line| !line.contains("cgroup/")).map(|line| format!("{line}\n")).collect();
        let mut lines: Vec<&str> = lines.lines().collect();
        lines.dedup();
        // The last one mounted on a place is the one in sight.
        assert_eq!(
            (lines.first(), lines.last()),
            (expected.lines().next().as_ref(), expected.lines().last().as_ref())
        );
    }
}

#[tokio::test]
async fn mounts_propagate_as_their_options_say() {
    let guest = Guest::new("propagation").await;
    let volume = guest.directory.join("shared");
    let spread = async |root: &str, option: &str| {
        let script = "awk '$5 == \"/\" || $5 == \"/volume\" {print $7}' /proc/self/mountinfo | cut -d: -f1";
        let spec = |spec: &mut Value| {
            spec["linux"]["rootfsPropagation"] = json!(root);
            add_mount(
                spec,
                json!({"destination": "/volume", "source": volume, "options": ["rbind", option]}),
            );
        };
        guest.shell_with(script, spec).await.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(spread("rprivate", "rprivate").await, ["-", "-"]);
    assert_eq!(spread("rshared", "rshared").await, ["shared", "shared"]);
    assert_eq!(spread("rshared", "rslave").await, ["shared", "master"]);
    assert_eq!(spread("", "shared").await, ["-", "shared"]);
}

#[tokio::test]
async fn a_mount_in_a_shared_volume_shows_in_another_container() {
    let guest = Guest::new("bidirectional").await;
    let spec = |cgroup: &str, root: &str, option: &str| {
        let mut spec = guest.spec(&["sleep", "100"]);
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap().replace("/c", cgroup);
        spec["linux"]["cgroupsPath"] = json!(path);
        spec["linux"]["rootfsPropagation"] = json!(root);
        let volume = guest.directory.join("shared");
        add_mount(
            &mut spec,
            json!({"destination": "/volume", "source": volume, "options": ["rbind", option]}),
        );
        spec
    };
    for (id, root, option) in [("c", "rshared", "rshared"), ("d", "rslave", "rslave")] {
        guest.create(id, &spec(&format!("/{id}"), root, option), &Default::default()).await.unwrap();
        guest.start(id).await.unwrap();
    }
    let mut mounter =
        guest.process(&["sh", "-c", "mkdir /volume/m && mount -t tmpfs x /volume/m && touch /volume/m/seen"]);
    for set in ["bounding", "effective", "permitted"] {
        mounter["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYS_ADMIN"));
    }
    assert_eq!(guest.run_exec("c", "m", &mounter).await.unwrap().status, 0);
    let seen = guest.run_exec("d", "ls", &guest.process(&["ls", "/volume/m"])).await.unwrap();
    assert_eq!(seen.stdout, "seen\n");
    for id in ["c", "d"] {
        guest.remove(id).await;
    }
}

#[tokio::test]
async fn a_tmpfs_copies_up_and_keeps_modes() {
    let guest = Guest::new("tmpfs").await;
    let tree = guest.rootfs().join("var/data");
    fs::create_dir_all(tree.join("dir")).unwrap();
    fs::write(tree.join("dir/file"), "kept").unwrap();
    symlink("dir/file", tree.join("link")).unwrap();
    fs::set_permissions(&tree, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let output = guest
        .shell_with("cat /var/data/link; echo; stat -c %a /var/data; echo new > /var/data/dir/file; df /sized | tail -n1 | tr -s ' ' | cut -d' ' -f2", |spec| {
            add_mount(spec, json!({"destination": "/var/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
            add_mount(spec, json!({"destination": "/sized", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}));
        })
        .await;
    assert_eq!(output, "kept\n711\n1024\n");
    assert_eq!(fs::read_to_string(tree.join("dir/file")).unwrap(), "kept");
}

#[tokio::test]
async fn a_cgroup_mount_shows_the_container_alone() {
    let guest = Guest::new("cgroupfs").await;
    let with_mount = |spec: &mut Value| {
        add_mount(
            spec,
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
        );
    };
    assert_eq!(
        guest
            .shell_with(
                "cat /sys/fs/cgroup/cgroup.procs | head -n1; touch /sys/fs/cgroup/x || true",
                with_mount
            )
            .await,
        "1\n"
    );
    let script = "test -e /sys/fs/cgroup/cgroup.freeze && echo own";
    let output = guest
        .shell_with(script, |spec| {
            with_mount(spec);
            spec["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .retain(|namespace| namespace["type"] != "cgroup");
        })
        .await;
    assert_eq!(output, "own\n", "only a cgroup that is not the root has this file");
}

#[tokio::test]
async fn links_of_an_image_do_not_lead_out() {
    let guest = Guest::new("links").await;
    let rootfs = guest.rootfs();
    fs::remove_dir(rootfs.join("tmp")).unwrap();
    let outside = std::path::Path::new("/kata-agent-outside");
    symlink(outside, rootfs.join("tmp")).unwrap();
    symlink("../../../../../../../../escape", rootfs.join("etc/resolv.conf")).unwrap();
    let source = guest.directory.join("resolv.conf");
    fs::write(&source, "nameserver 1.2.3.4\n").unwrap();
    let output = guest
        .shell_with("cat /etc/resolv.conf; cat /escape; ls -d /tmp/mounted", |spec| {
            add_mount(spec, json!({"destination": "/tmp/mounted", "type": "tmpfs", "source": "tmpfs"}));
            add_mount(
                spec,
                json!({"destination": "/etc/resolv.conf", "source": source, "options": ["bind", "ro"]}),
            );
        })
        .await;
    assert_eq!(output, "nameserver 1.2.3.4\nnameserver 1.2.3.4\n/tmp/mounted\n");
    assert!(!outside.exists() && !std::path::Path::new("/escape").exists());

    fs::remove_dir(rootfs.join("proc")).unwrap();
    symlink("/home", rootfs.join("proc")).unwrap();
    let error = guest.run(&guest.spec(&["true"])).await.unwrap_err();
    let text = r#"error mounting "proc" to rootfs at "/proc": too many levels of symbolic links"#;
    assert_eq!(status(error).1, text);
}

#[tokio::test]
async fn the_container_sees_none_of_the_hosts_mounts() {
    let guest = Guest::new("mounts").await;
    let mounts = guest.shell("cat /proc/self/mounts | cut -d' ' -f2").await;
    let mut points: Vec<&str> = mounts.lines().collect();
    points.sort_unstable();
    assert_eq!(points[..4], ["/", "/dev", "/dev/mqueue", "/dev/pts"]);
    assert!(
        points
            .iter()
            .all(|point| ["/", "/dev", "/proc", "/run", "/sys"].iter().any(|top| point.starts_with(top)))
    );
    assert!(!mounts.contains("kata-agent-test"), "{mounts}");
    let error = guest
        .run(&{
            let mut spec = guest.spec(&["true"]);
            add_mount(
                &mut spec,
                json!({"destination": "/m", "type": "tmpfs", "source": "tmpfs", "options": ["size=lots"]}),
            );
            spec
        })
        .await
        .unwrap_err();
    assert!(error.to_string().contains("size"), "the kernel's own words: {error}");
}
