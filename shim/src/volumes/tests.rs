use super::*;
use crate::share::tests::in_namespace;
use nix::mount::{MsFlags, mount};
use serde_json::json;

/// A pod's volumes in a directory: `top` with the directory `data` and the file `data/file`.
struct Place<'a> {
    top: &'a Path,
    volumes: Volumes,
}

impl<'a> Place<'a> {
    fn new(top: &'a Path) -> Self {
        for directory in ["data", "share"] {
            fs::create_dir(top.join(directory)).unwrap();
        }
        fs::write(top.join("data/file"), "x").unwrap();
        Self { top, volumes: Volumes::default() }
    }

    /// The number of the volume that a container's mount gets.
    fn bind(&mut self, id: &str, source: &str, options: &[&str]) -> u32 {
        let mount = json!({"destination": "/mnt", "type": "bind", "source": "", "options": options});
        let (mount, share) = (serde_json::from_value(mount).unwrap(), self.top.join("share"));
        self.volumes.bind(id, &mount, &self.top.join(source), &share, &share).unwrap().number
    }

    fn release(&mut self, id: &str) -> Vec<u32> {
        let share = self.top.join("share");
        self.volumes.release(id, &share, &share)
    }
}

#[test]
fn what_is_mounted_alike_is_one_volume_as_long_as_somebody_uses_it() {
    in_namespace("alike", |top| {
        let mut place = Place::new(top);
        let usual = ["rbind", "rprivate", "rw"];
        assert_eq!(place.bind("a", "data", &usual), 0);
        assert_eq!(place.bind("b", "data", &usual), 0);
        assert_eq!(place.bind("b", "data", &["rbind", "rprivate", "ro"]), 0);
        assert_eq!(place.bind("b", "data/file", &usual), 1);
        assert_eq!(place.bind("a", "data/file", &usual), 1);
        std::os::unix::fs::symlink("data", top.join("link")).unwrap();
        assert_eq!(place.bind("a", "link", &usual), 0);
        assert_eq!(place.release("a"), [0; 0]);
        assert!(top.join("share/0/file").exists());
        assert_eq!(place.release("b"), [0, 1]);
        assert_eq!(fs::read_dir(top.join("share")).unwrap().count(), 0);
        assert_eq!(place.bind("a", "data", &usual), 2);
    });
}

#[test]
fn what_would_look_different_is_another_volume() {
    in_namespace("different", |top| {
        let mut place = Place::new(top);
        let usual = ["rbind", "rprivate", "rw"];
        let read_only = ["rbind", "rprivate", "ro"];
        assert_eq!(place.bind("a", "data", &read_only), 0);
        assert_eq!(place.bind("a", "data", &usual), 1, "it can be written");
        assert_eq!(place.bind("a", "data", &read_only), 0);
        assert_eq!(place.bind("a", "data", &["rbind", "rslave"]), 2, "it follows the host");
        assert_eq!(place.bind("a", "data", &["bind", "rprivate"]), 3, "without what is mounted below");

        fs::rename(top.join("data"), top.join("old")).unwrap();
        fs::create_dir_all(top.join("data/below")).unwrap();
        assert_eq!(place.bind("a", "data", &usual), 4, "another directory");
        mount(Some("none"), &top.join("data/below"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        assert_eq!(place.bind("a", "data", &usual), 5, "something is mounted in it");
        assert_eq!(place.bind("b", "data", &usual), 5);

        // As kubelet does with a subPath.
        let (data, part) = (top.join("data"), top.join("part"));
        fs::create_dir(&part).unwrap();
        mount(Some(&data), &part, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).unwrap();
        assert_eq!(place.bind("b", "part", &usual), 5);
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOEXEC;
        mount(None::<&str>, &part, None::<&str>, flags, None::<&str>).unwrap();
        assert_eq!(place.bind("b", "part", &usual), 6, "no programs run in it");
    });
}

#[test]
fn a_failure_leaves_no_volume() {
    in_namespace("failure", |top| {
        let mut place = Place::new(top);
        let mount = json!({"destination": "/mnt", "type": "bind", "source": ""});
        let mount = serde_json::from_value(mount).unwrap();
        let share = top.join("share");
        // The place in which it should be mounted is not there.
        let failed = place.volumes.bind("a", &mount, &top.join("data"), &share, &top.join("nowhere"));
        assert!(failed.unwrap_err().to_string().contains("no such file or directory"));
        assert_eq!(fs::read_dir(&share).unwrap().count(), 0);
        assert_eq!(place.release("a"), [0; 0]);
    });
}
