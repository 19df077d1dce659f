use super::*;
use crate::storage::mounts::AddedFlags;
use crate::storage::share::Share;
use crate::storage::share::tests::{in_namespace, namespace_in};
use nix::mount::{MsFlags, mount};
use serde_json::json;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// A pod's volumes in a directory: `top` with the directory `data` and the file `data/file`.
struct Pod<'a> {
    top: &'a Path,
    root: Arc<OwnedFd>,
    namespace: OwnedFd,
    added_flags: AddedFlags,
    volumes: Volumes,
}

impl<'a> Pod<'a> {
    fn new(top: &'a Path) -> Self {
        fs::create_dir(top.join("data")).unwrap();
        fs::write(top.join("data/file"), "x").unwrap();
        let root = Share::create(&top.join("share")).unwrap().root();
        let namespace = namespace_in(&root);
        Self { top, root, namespace, added_flags: AddedFlags::default(), volumes: Volumes::default() }
    }

    /// The number of the volume that a container's mount gets.
    fn bind(&mut self, id: &str, source: &str, options: &[&str]) -> u32 {
        let mount = json!({"destination": "/mnt", "type": "bind", "source": "", "options": options});
        let mount = serde_json::from_value(mount).unwrap();
        let mut mounts = Attachments::new(self.namespace.as_fd(), self.root.as_fd(), &self.added_flags);
        let (source, point, target) = (self.top.join(source), self.point(), Path::new(".volumes"));
        let bound = self.volumes.bind(id, &mount, &source, &point, target, &mut mounts).unwrap();
        mounts.attach_all().unwrap();
        bound.number
    }

    fn point(&self) -> PathBuf {
        self.top.join("share/.volumes")
    }

    fn release(&mut self, id: &str) -> Vec<u32> {
        let point = self.point();
        self.volumes.release(id, &point)
    }
}

#[test]
fn what_is_mounted_alike_is_one_volume_as_long_as_somebody_uses_it() {
    in_namespace("alike", |top| {
        let mut pod = Pod::new(top);
        let usual = ["rbind", "rprivate", "rw"];
        assert_eq!(pod.bind("a", "data", &usual), 0);
        assert_eq!(pod.bind("b", "data", &usual), 0);
        assert_eq!(pod.bind("b", "data", &["rbind", "rprivate", "ro"]), 0);
        assert_eq!(pod.bind("b", "data/file", &usual), 1);
        assert_eq!(pod.bind("a", "data/file", &usual), 1);
        std::os::unix::fs::symlink("data", top.join("link")).unwrap();
        assert_eq!(pod.bind("a", "link", &usual), 0);
        assert_eq!(pod.release("a"), [0; 0]);
        assert!(crate::storage::mounts::path_of_fd(pod.root.as_fd()).join(".volumes/0/file").exists());
        assert_eq!(pod.release("b"), [0, 1]);
        assert_eq!(fs::read_dir(pod.point()).unwrap().count(), 0);
        assert_eq!(pod.bind("a", "data", &usual), 2);
    });
}

#[test]
fn what_would_look_different_is_another_volume() {
    in_namespace("different", |top| {
        let mut pod = Pod::new(top);
        let usual = ["rbind", "rprivate", "rw"];
        let read_only = ["rbind", "rprivate", "ro"];
        assert_eq!(pod.bind("a", "data", &read_only), 0);
        assert_eq!(pod.bind("a", "data", &usual), 1, "it can be written");
        assert_eq!(pod.bind("a", "data", &read_only), 0);
        assert_eq!(pod.bind("a", "data", &["rbind", "rslave"]), 2, "it follows the host");
        assert_eq!(pod.bind("a", "data", &["bind", "rprivate"]), 3, "without what is mounted below");

        fs::rename(top.join("data"), top.join("old")).unwrap();
        fs::create_dir_all(top.join("data/below")).unwrap();
        assert_eq!(pod.bind("a", "data", &usual), 4, "another directory");
        mount(Some("none"), &top.join("data/below"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        assert_eq!(pod.bind("a", "data", &usual), 5, "something is mounted in it");
        assert_eq!(pod.bind("b", "data", &usual), 5);

        // As kubelet does with a subPath.
        let (data, part) = (top.join("data"), top.join("part"));
        fs::create_dir(&part).unwrap();
        mount(Some(&data), &part, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).unwrap();
        assert_eq!(pod.bind("b", "part", &usual), 5);
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOEXEC;
        mount(None::<&str>, &part, None::<&str>, flags, None::<&str>).unwrap();
        assert_eq!(pod.bind("b", "part", &usual), 6, "no programs run in it");
    });
}

#[test]
fn a_failure_leaves_no_volume() {
    in_namespace("failure", |top| {
        let mut pod = Pod::new(top);
        let mount = json!({"destination": "/mnt", "type": "bind", "source": ""});
        let mount = serde_json::from_value(mount).unwrap();
        // The directory in which it should have its place is not there.
        let (source, nowhere, target) = (top.join("data"), top.join("nowhere"), Path::new(".volumes"));
        let mut waiting = Attachments::new(pod.namespace.as_fd(), pod.root.as_fd(), &pod.added_flags);
        let failed = pod.volumes.bind("a", &mount, &source, &nowhere, target, &mut waiting);
        assert!(failed.unwrap_err().to_string().contains("no such file or directory"));
        assert_eq!(fs::read_dir(pod.point()).unwrap().count(), 0);
        assert_eq!(pod.release("a"), [0; 0]);
    });
}
