//! These mount for real, in a mount namespace of their own, and need root.

use super::*;
use crate::spec::Pod;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use std::os::unix::fs::MetadataExt;

/// Runs `test` in a directory and a mount namespace that end with it.
pub fn in_namespace(name: &str, test: impl FnOnce(&Path) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "these tests mount: they have to run as root");
    let directory = std::env::temp_dir().join(format!("katana-share-{name}-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            mount::<str, _, str, str>(None, "/", None, MsFlags::MS_REC | MsFlags::MS_SLAVE, None).unwrap();
            mount(Some("none"), &directory, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            test(&directory);
            umount2(&directory, MntFlags::MNT_DETACH).unwrap();
        });
        thread.join().unwrap();
    });
    fs::remove_dir(&directory).unwrap();
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn spec(mounts: &serde_json::Value) -> Spec {
    serde_json::from_value(json!({"root": {"path": "rootfs"}, "mounts": mounts})).unwrap()
}

#[test]
fn a_container_comes_and_goes_and_leaves_the_users_files() {
    in_namespace("life", |top| {
        let bundle = top.join("bundle");
        for directory in ["bundle/rootfs", "data", "locked"] {
            fs::create_dir_all(top.join(directory)).unwrap();
        }
        for file in ["bundle/rootfs/init", "data/file", "locked/file", "single"] {
            fs::write(top.join(file), file).unwrap();
        }
        let spec = spec(&json!([
            {"destination": "/proc", "type": "proc"},
            {"destination": "/data", "type": "bind", "source": top.join("data"), "options": ["rbind", "rw"]},
            {"destination": "/locked", "type": "bind", "source": top.join("locked"), "options": ["rbind", "ro"]},
            {"destination": "/single", "type": "bind", "source": top.join("single"), "options": ["bind"]}]));
        let path = top.join("run/share");
        let share = Share::create(&path).unwrap();
        let mut sources = spec.sources(&bundle, &Pod::default());
        let watched = share.add("c1", &bundle, &spec, Some(&[]), &mut sources).unwrap();

        let read = |relative: &str| fs::read_to_string(path.join(relative)).unwrap();
        assert_eq!(read("c1/rootfs/init"), "bundle/rootfs/init");
        // Those that can be written come first.
        let [data, single, locked] = [0, 1, 2].map(Source::Volume);
        assert_eq!(sources, [Source::Guest, data, locked, single]);
        assert_eq!(read(".volumes/0/file"), "data/file");
        assert_eq!(read(".volumes/1"), "single");
        assert_eq!(watched, [Path::new(".volumes/2")]);
        fs::write(path.join(".volumes/0/new"), "x").unwrap();
        let refused = |what: io::Result<()>| assert_eq!(what.unwrap_err().raw_os_error(), Some(libc::EROFS));
        refused(fs::write(path.join(".volumes/2/new"), "x"));
        // The guest cannot change what the shim mounts on.
        refused(fs::create_dir(path.join("c2")));
        refused(fs::rename(path.join("c1"), path.join("c2")));
        refused(std::os::unix::fs::symlink("/etc", path.join("c1/link")));
        refused(std::os::unix::fs::symlink("/etc", path.join(".volumes/3")));

        let gone = [0, 1, 2].map(|number| Path::new(".volumes").join(number.to_string()));
        assert_eq!(share.remove("c1"), gone);
        assert_eq!(names(&path), [".volumes"]);
        assert_eq!(names(&path.join(".volumes")), [""; 0]);
        assert_eq!(fs::read_to_string(top.join("data/file")).unwrap(), "data/file");
        assert_eq!(fs::read_to_string(top.join("bundle/rootfs/init")).unwrap(), "bundle/rootfs/init");
        destroy(&path).unwrap();
        assert!(!path.exists());
        destroy(&path).unwrap();
    });
}

#[test]
fn a_share_is_destroyed_with_all_in_it_and_nothing_behind_it() {
    in_namespace("destroy", |top| {
        fs::create_dir_all(top.join("bundle/rootfs/deep")).unwrap();
        let path = top.join("run/share");
        let share = Share::create(&path).unwrap();
        for id in ["a", "b"] {
            share.add(id, &top.join("bundle"), &spec(&json!([])), Some(&[]), &mut []).unwrap();
        }
        unmount_container(&path, "a").unwrap();
        assert_eq!(mounts::below(&path).unwrap().len(), 2);
        drop(share);
        destroy(&path).unwrap();
        assert!(!path.exists() && top.join("bundle/rootfs/deep").exists());
    });
}

#[test]
fn failures_leave_nothing_and_read_like_runcs() {
    in_namespace("fail", |top| {
        fs::create_dir_all(top.join("bundle/rootfs")).unwrap();
        let path = top.join("run/share");
        let share = Share::create(&path).unwrap();
        let missing = spec(&json!([{"destination": "/mnt", "type": "bind", "source": "/nowhere"}]));
        let bundle = top.join("bundle");
        let mut sources = missing.sources(&bundle, &Pod::default());
        let error = share.add("c1", &bundle, &missing, Some(&[]), &mut sources).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error mounting \"/nowhere\" to rootfs at \"/mnt\": stat /nowhere: no such file or directory"
        );
        assert_eq!(names(&path), [".volumes"]);
        assert_eq!(mounts::below(&path).unwrap(), std::slice::from_ref(&path));
        destroy(&path).unwrap();
    });
}

#[test]
fn an_overlay_of_very_many_layers() {
    in_namespace("layers", |top| {
        let long =
            "directory-with-a-long-name-as-snapshotters-have-them/io.containerd.snapshotter.v1.overlayfs";
        let root = top.join(long);
        let layers: Vec<_> = (100..160).map(|n| root.join(n.to_string()).join("fs")).collect();
        for (number, layer) in layers.iter().enumerate() {
            fs::create_dir_all(layer).unwrap();
            fs::write(layer.join(format!("file-{number}")), "x").unwrap();
        }
        for directory in ["1/fs", "1/work", "bundle"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
        let options = vec![
            format!("workdir={}/1/work", root.display()),
            format!("upperdir={}/1/fs", root.display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        assert!(options.join(",").len() > 4096);
        let layer = rootfs::Layer {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options,
        };
        let path = top.join("run/share");
        let share = Share::create(&path).unwrap();
        share.add("c1", &root.join("bundle"), &spec(&json!([])), Some(&[layer]), &mut []).unwrap();
        let names = fs::read_dir(path.join("c1/rootfs")).unwrap().count();
        assert_eq!(names, layers.len());
        fs::write(path.join("c1/rootfs/new"), "y").unwrap();
        assert_eq!(fs::metadata(root.join("1/fs/new")).unwrap().size(), 1);
        share.remove("c1");
        destroy(&path).unwrap();
    });
}
