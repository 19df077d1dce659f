//! These mount for real, in a mount namespace of their own, and need root.

use super::*;
use crate::spec::Pod;
use crate::storage::mount_table::{Mounted, below};
use crate::storage::mounts::AddedFlags;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, fchdir, pivot_root};
use serde_json::json;
use std::os::unix::fs::MetadataExt;

/// Runs `test` in a directory and a mount namespace that end with it.
pub fn in_namespace(name: &str, test: impl FnOnce(&Path) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "these tests mount: they have to run as root");
    let directory = std::env::temp_dir().join(format!("katana-share-{name}-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            stay_on_one_processor();
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

/// Linux numbers mount namespaces by processor, and only one with a higher number can be mounted in another
/// (`mnt_ns_loop` in fs/namespace.c): threads that stay on one processor make them in order. Threads inherit this.
fn stay_on_one_processor() {
    let mut here = CpuSet::new();
    here.set(nix::sched::sched_getcpu().unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &here).unwrap();
}

/// A mount namespace of which a share is the root, as it is the VMM's.
pub fn namespace_in(root: &OwnedFd) -> OwnedFd {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            mount::<str, _, str, str>(None, "/", None, MsFlags::MS_REC | MsFlags::MS_SLAVE, None).unwrap();
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let namespace = open("/proc/thread-self/ns/mnt", flags, Mode::empty()).unwrap();
            katana_protocol::mount::attach_mount_at(root, Path::new("/")).unwrap();
            fchdir(root).unwrap();
            pivot_root(".", ".").unwrap();
            umount2(".", MntFlags::MNT_DETACH).unwrap();
            namespace
        });
        thread.join().unwrap()
    })
}

/// A share in a directory, with a namespace in it.
struct Machine {
    path: PathBuf,
    share: Share,
    namespace: OwnedFd,
}

impl Machine {
    fn new(top: &Path) -> Self {
        let path = top.join("run/share");
        let share = Share::create(&path).unwrap();
        let namespace = namespace_in(&share.root());
        Self { path, share, namespace }
    }

    fn add(&self, id: &str, bundle: &Path, spec: &Spec, sources: &mut [Source]) -> Result<Added> {
        self.share.add(id, bundle, spec, Some(&[]), sources, self.namespace.as_fd())
    }

    /// A place as the guest sees it.
    fn at(&self, relative: &str) -> PathBuf {
        mounts::path_of_fd(self.share.root.as_fd()).join(relative)
    }

    /// The VMM ends, and all is removed.
    fn end(self) {
        drop(self.namespace);
        assert!(below(&self.path).unwrap().is_empty());
        destroy(&self.path).unwrap();
        assert!(!self.path.exists());
        destroy(&self.path).unwrap();
    }
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
        let pod = Machine::new(top);
        let mut sources = spec.sources(&bundle, &Pod::default());
        let added = pod.add("c1", &bundle, &spec, &mut sources).unwrap();

        let read = |relative: &str| fs::read_to_string(pod.at(relative)).unwrap();
        assert_eq!(read("c1/rootfs/init"), "bundle/rootfs/init");
        // Those that can be written come first.
        let [data, single, locked] = [0, 1, 2].map(Source::Volume);
        assert_eq!(sources, [Source::Guest, data, locked, single]);
        assert_eq!(read(".volumes/0/file"), "data/file");
        assert_eq!(read(".volumes/1"), "single");
        assert_eq!(added, Added { watched: vec![".volumes/2".into()], mounts: vec![], follows: true });
        fs::write(pod.at(".volumes/0/new"), "x").unwrap();
        let refused = |what: io::Result<()>| assert_eq!(what.unwrap_err().raw_os_error(), Some(libc::EROFS));
        refused(fs::write(pod.at(".volumes/2/new"), "x"));
        // The guest cannot change what the shim mounts on.
        refused(fs::create_dir(pod.at("c2")));
        refused(fs::rename(pod.at("c1"), pod.at("c2")));
        refused(std::os::unix::fs::symlink("/etc", pod.at("c1/link")));
        refused(std::os::unix::fs::symlink("/etc", pod.at(".volumes/3")));
        // The host has nothing of it.
        assert!(below(&pod.path).unwrap().is_empty());
        assert_eq!(names(&pod.path.join("c1/rootfs")), [""; 0]);

        let gone = [0, 1, 2].map(|number| Path::new(".volumes").join(number.to_string()));
        assert_eq!(pod.share.remove("c1"), gone);
        assert_eq!(names(&pod.at("")), [".volumes"]);
        assert_eq!(names(&pod.at(".volumes")), [""; 0]);
        let added_flags = AddedFlags::default();
        let left = Attachments::new(pod.namespace.as_fd(), pod.share.root.as_fd(), &added_flags)
            .attach_all()
            .unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(fs::read_to_string(top.join("data/file")).unwrap(), "data/file");
        assert_eq!(fs::read_to_string(top.join("bundle/rootfs/init")).unwrap(), "bundle/rootfs/init");
        pod.end();
    });
}

fn tmpfs(place: &Path) {
    fs::create_dir_all(place).unwrap();
    mount(Some("none"), place, Some("tmpfs"), MsFlags::MS_NOEXEC, None::<&str>).unwrap();
}

fn volume(source: &Path, options: &[&str]) -> Spec {
    spec(&json!([{"destination": "/mnt", "type": "bind", "source": source, "options": options}]))
}

#[test]
fn what_a_volume_has_mounted_is_not_busy_on_the_host() {
    in_namespace("busy", |top| {
        let (bundle, data) = (top.join("bundle"), top.join("data"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        for place in ["data", "data/sub", "data/sub/deep"] {
            tmpfs(&top.join(place));
        }
        fs::write(data.join("sub/deep/file"), "x").unwrap();
        let pod = Machine::new(top);
        let spec = volume(&data, &["rbind", "rprivate"]);
        let added = pod.add("c1", &bundle, &spec, &mut spec.sources(&bundle, &Pod::default())).unwrap();
        let mounts: Vec<_> = added.mounts.iter().map(|mount| (&mount.point, mount.restrictions())).collect();
        let noexec = vec!["noexec".to_owned()];
        let points = [".volumes/0", ".volumes/0/sub", ".volumes/0/sub/deep"].map(PathBuf::from);
        assert_eq!(mounts, points.iter().map(|point| (point, noexec.clone())).collect::<Vec<_>>());
        // The host's are the host's alone.
        umount2(&data.join("sub"), MntFlags::MNT_DETACH).unwrap();
        assert!(pod.at(".volumes/0/sub/deep/file").exists());
        fs::remove_dir(data.join("sub")).unwrap();
        assert_eq!(names(&pod.at(".volumes/0")), [""; 0]);
        pod.end();
    });
}

/// What is mounted in a pod, with the flags that the VMM's kernel heeds.
fn hardened(pod: &Machine) -> Vec<(PathBuf, bool)> {
    let none = AddedFlags::default();
    let all = Attachments::new(pod.namespace.as_fd(), pod.share.root.as_fd(), &none).attach_all().unwrap();
    let both = |mounted: &Mounted| {
        ["nosuid", "nodev"].iter().all(|flag| mounted.restrictions().iter().any(|had| had == flag))
    };
    let mut all: Vec<_> = all.iter().map(|mounted| (mounted.relative().point, both(mounted))).collect();
    all.sort();
    all
}

/// The guest gets the flags of the host's mounts; in the VMM's namespace no device can be opened in any of them.
#[test]
fn devices_of_the_host_cannot_be_opened_where_a_guest_sees_them() {
    in_namespace("devices", |top| {
        let (bundle, data, node) = (top.join("bundle"), top.join("data"), top.join("node"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::create_dir(&data).unwrap();
        let mounted = |place: &str, flags| {
            fs::create_dir_all(data.join(place)).unwrap();
            mount(Some("none"), &data.join(place), Some("tmpfs"), flags, None::<&str>).unwrap();
        };
        mounted("", MsFlags::empty());
        mount::<str, _, str, str>(None, &data, None, MsFlags::MS_SHARED, None).unwrap();
        mounted("open", MsFlags::MS_NODEV);
        mounted("open/inner", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC);
        // A container may have it, and then it is the guest's device of these numbers.
        let zero = |place: &Path| {
            let mode = Mode::from_bits_truncate(0o666);
            nix::sys::stat::mknod(place, nix::sys::stat::SFlag::S_IFCHR, mode, libc::makedev(1, 5)).unwrap();
        };
        for place in [&bundle.join("rootfs/zero"), &data.join("zero"), &data.join("open/inner/zero"), &node] {
            zero(place);
        }
        let spec = spec(&json!([
            {"destination": "/data", "type": "bind", "source": data, "options": ["rbind"]},
            {"destination": "/dev/node", "type": "bind", "source": node, "options": ["bind", "rprivate"]}]));
        let pod = Machine::new(top);
        let reported = |id: &str| {
            let added = pod.add(id, &bundle, &spec, &mut spec.sources(&bundle, &Pod::default())).unwrap();
            let mounts =
                added.mounts.iter().map(|mount| (mount.point.clone(), mount.restrictions().join(",")));
            mounts.collect::<Vec<_>>()
        };
        let expected = [(".volumes/0/open", "nodev"), (".volumes/0/open/inner", "nosuid,nodev,noexec")];
        let expected = expected.map(|(point, flags)| (PathBuf::from(point), flags.to_owned()));
        assert_eq!(reported("c1"), expected);
        for place in ["c1/rootfs/zero", ".volumes/0/zero", ".volumes/0/open/inner/zero", ".volumes/1"] {
            let opened = fs::File::open(pod.at(place)).unwrap_err();
            assert_eq!(opened.raw_os_error(), Some(libc::EACCES), "{place}");
            assert_eq!(fs::metadata(pod.at(place)).unwrap().rdev(), libc::makedev(1, 5));
        }
        // The same volumes, and the same is reported.
        assert_eq!(reported("c2"), expected);
        // What comes later as well.
        mounted("later", MsFlags::empty());
        zero(&data.join("later/zero"));
        let came = pod.share.follow(pod.namespace.as_fd()).unwrap().come;
        let later = vec![(PathBuf::from(".volumes/0/later"), String::new())];
        assert_eq!(
            came.iter()
                .map(|mount| (mount.point.clone(), mount.restrictions().join(",")))
                .collect::<Vec<_>>(),
            later
        );
        assert!(hardened(&pod).iter().all(|(_, both)| *both), "{:?}", hardened(&pod));
        assert_eq!(reported("c3"), [later, expected.to_vec()].concat());
        pod.end();
    });
}

#[test]
fn later_mounts_come_and_go_and_are_never_busy() {
    in_namespace("follow", |top| {
        let (bundle, data) = (top.join("bundle"), top.join("data"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        tmpfs(&data);
        let propagate = |how| mount::<str, _, str, str>(None, &data, None, how, None).unwrap();
        propagate(MsFlags::MS_SHARED);
        tmpfs(&data.join("first"));
        let machine = Machine::new(top);
        let volumes = [["rbind", "rslave"], ["rbind", "rprivate"]];
        for (id, options) in ["c0", "c1"].iter().zip(&volumes) {
            let spec = volume(&data, options);
            let mut sources = spec.sources(&bundle, &Pod::default());
            assert!(machine.add(id, &bundle, &spec, &mut sources).unwrap().follows);
        }
        let follow = || {
            let Changes { come, gone } = machine.share.follow(machine.namespace.as_fd()).unwrap();
            (come.into_iter().map(|mounted| mounted.point).collect::<Vec<_>>(), gone)
        };
        let paths = |names: &[&str]| -> Vec<PathBuf> {
            names.iter().map(|name| Path::new(".volumes/0").join(name)).collect()
        };
        assert_eq!(follow(), (vec![], vec![]));
        tmpfs(&data.join("later"));
        tmpfs(&data.join("later/deep"));
        fs::write(data.join("later/deep/file"), "x").unwrap();
        assert_eq!(follow(), (paths(&["later", "later/deep"]), vec![]));
        let file = machine.at(".volumes/0/later/deep/file");
        assert!(file.exists() && !machine.at(".volumes/1/later/deep").exists());
        // Though the VMM has it open, the host may unmount it; not as by MNT_DETACH.
        let opened = fs::File::open(&file).unwrap();
        umount2(&data.join("later/deep"), MntFlags::empty()).unwrap();
        umount2(&data.join("first"), MntFlags::empty()).unwrap();
        assert_eq!(follow(), (vec![], paths(&["first", "later/deep"])));
        assert!(!file.exists());
        drop(opened);
        // What is mounted where nothing spreads from stays with the host.
        propagate(MsFlags::MS_PRIVATE);
        tmpfs(&data.join("own"));
        assert_eq!(follow(), (vec![], vec![]));
        machine.share.remove("c0");
        umount2(&data.join("later"), MntFlags::empty()).unwrap();
        assert_eq!(follow(), (vec![], vec![]));
        machine.end();
    });
}

/// As snapd has them in /run.
#[test]
fn files_that_stand_for_mount_namespaces_are_left_out() {
    in_namespace("namespaces", |top| {
        let (bundle, data) = (top.join("bundle"), top.join("data"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        for place in ["data", "data/sub"] {
            tmpfs(&top.join(place));
        }
        fs::write(data.join("sub/file"), "x").unwrap();
        fs::write(data.join("namespace"), "").unwrap();
        let other = namespace_in(&Share::create(&top.join("run/other")).unwrap().root());
        let (source, target) = (mounts::path_of_fd(other.as_fd()), data.join("namespace"));
        mount::<_, _, str, str>(Some(&source), &target, None, MsFlags::MS_BIND, None).unwrap();
        let machine = Machine::new(top);
        for (id, options) in [("c0", ["rbind", "rprivate"]), ("c1", ["rbind", "rslave"])] {
            let spec = volume(&data, &options);
            let mut sources = spec.sources(&bundle, &Pod::default());
            machine.add(id, &bundle, &spec, &mut sources).unwrap();
            let [Source::Volume(number)] = sources[..] else { panic!("{sources:?}") };
            let read = |name: &str| fs::read_to_string(machine.at(&format!(".volumes/{number}/{name}")));
            assert_eq!(read("sub/file").unwrap(), "x");
            assert_eq!(read("namespace").unwrap(), "");
            machine.share.remove(id);
        }
        machine.end();
    });
}

#[test]
fn read_only_is_the_mount_and_recursively_so_all_below() {
    in_namespace("access", |top| {
        let (bundle, data) = (top.join("bundle"), top.join("data"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        for place in ["data", "data/sub"] {
            tmpfs(&top.join(place));
        }
        let pod = Machine::new(top);
        // options, and whether the mount and the one below can be written to
        let cases: [(&[&str], bool, bool); 8] = [
            (&["rbind"], true, true),
            (&["rbind", "ro"], false, true),
            (&["rbind", "rro"], false, false),
            (&["rbind", "rro", "rw"], false, false),
            (&["rbind", "ro", "rrw"], true, true),
            (&["rbind", "ro", "rw"], true, true),
            (&["rbind", "rw", "ro"], false, true),
            (&["rbind", "rrw", "rro"], false, false),
        ];
        for (number, (options, outer, inner)) in cases.into_iter().enumerate() {
            let (id, spec) = (format!("c{number}"), volume(&data, options));
            let mut sources = spec.sources(&bundle, &Pod::default());
            pod.add(&id, &bundle, &spec, &mut sources).unwrap();
            let [Source::Volume(volume)] = sources[..] else { panic!("{sources:?}") };
            let writes = |place: &str| fs::write(pod.at(&format!(".volumes/{volume}/{place}")), "x").is_ok();
            assert_eq!((writes("file"), writes("sub/file")), (outer, inner), "{options:?}");
            pod.share.remove(&id);
        }
        pod.end();
    });
}

#[test]
fn a_share_is_destroyed_with_all_in_it_and_nothing_behind_it() {
    in_namespace("destroy", |top| {
        fs::create_dir_all(top.join("bundle/rootfs/deep")).unwrap();
        let pod = Machine::new(top);
        for id in ["a", "b"] {
            pod.add(id, &top.join("bundle"), &spec(&json!([])), &mut []).unwrap();
        }
        unmount_container(&pod.path, "a").unwrap();
        assert!(!pod.at("a").exists() && pod.at("b/rootfs/deep").exists());
        // What was being made when the shim died.
        tmpfs(&pod.path.join("c/rootfs"));
        fs::write(pod.path.join("c/rootfs/file"), "x").unwrap();
        destroy(&pod.path).unwrap();
        assert!(!pod.path.exists() && top.join("bundle/rootfs/deep").exists());
    });
}

#[test]
fn failures_leave_nothing_and_read_like_runcs() {
    in_namespace("fail", |top| {
        fs::create_dir_all(top.join("bundle/rootfs")).unwrap();
        let pod = Machine::new(top);
        let missing = spec(&json!([{"destination": "/mnt", "type": "bind", "source": "/nowhere"}]));
        let bundle = top.join("bundle");
        let mut sources = missing.sources(&bundle, &Pod::default());
        let error = pod.add("c1", &bundle, &missing, &mut sources).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error mounting \"/nowhere\" to rootfs at \"/mnt\": stat /nowhere: no such file or directory"
        );
        assert_eq!(names(&pod.at("")), [".volumes"]);
        pod.end();
    });
}

#[test]
fn an_overlay_of_very_many_layers() {
    in_namespace("layers", |top| {
        let long =
            "directory-with-a-long-name-as-snapshotters-have-them/io.containerd.snapshotter.v1.overlayfs";
        let root = top.join(long);
        let layers: Vec<_> = (100..180).map(|n| root.join(n.to_string()).join("fs")).collect();
        for (number, layer) in layers.iter().enumerate() {
            fs::create_dir_all(layer).unwrap();
            fs::write(layer.join(format!("file-{number}")), "x").unwrap();
        }
        for directory in ["1/fs", "1/work", "bundle"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
        let upper =
            [format!("workdir={}/1/work", root.display()), format!("upperdir={}/1/fs", root.display())];
        assert!(lower.join(":").len() > 4096 && lower[0].len() < 256);
        let pod = Machine::new(top);
        let add = |id: &str, count: usize| {
            let lower = lower.iter().take(count).copied().collect::<Vec<_>>().join(":");
            let mut options = vec!["index=off".to_owned(), format!("lowerdir={lower}")];
            options.extend(upper.clone());
            let (kind, target) = ("overlay".to_owned(), String::new());
            let layer = rootfs::Layer { source: kind.clone(), kind, target, options };
            let (bundle, namespace) = (root.join("bundle"), pod.namespace.as_fd());
            pod.share.add(id, &bundle, &spec(&json!([])), Some(&[layer]), &mut [], namespace).unwrap();
            assert_eq!(fs::read_dir(pod.at(id).join("rootfs")).unwrap().count(), count);
            assert!(below(&pod.path).unwrap().is_empty());
        };
        // As many as one option of fsconfig(2) takes, as it takes of relative paths, and more.
        for (id, count) in [("c1", 1), ("c2", 20), ("c3", layers.len())] {
            add(id, count);
            fs::write(pod.at(id).join("rootfs/new"), "y").unwrap();
            assert_eq!(fs::metadata(root.join("1/fs/new")).unwrap().size(), 1);
            pod.share.remove(id);
            fs::remove_file(root.join("1/fs/new")).unwrap();
        }
        pod.end();
    });
}
