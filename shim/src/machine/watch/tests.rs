use super::*;
use std::os::unix::fs::symlink;

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn watches(name: &str) -> (Scratch, Watches) {
    let share = std::env::temp_dir().join(format!("katana-watch-{name}-{}", std::process::id()));
    for volume in ["c/1", "c/2", "d/1/inner/most"] {
        fs::create_dir_all(share.join(volume)).unwrap();
    }
    let queue = Queue(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap());
    // SAFETY: the queue always answers the same descriptor, and keeps it open while it lives.
    let queue = unsafe { AsyncFd::register_with_interest(queue, Interest::READABLE) }.unwrap();
    let scratch = Scratch(share);
    let share = Arc::new(mounts::open_directory(&scratch.0).unwrap());
    (scratch, Watches { queue, share, state: Mutex::default(), sending: tokio::sync::Mutex::default() })
}

/// As (kind, directory, name).
fn reported(changes: &[Change]) -> Vec<(Kind, String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    changes.iter().map(|c| (c.kind.enum_value().unwrap(), text(&c.directory), text(&c.name))).collect()
}

fn what(kind: Kind, directory: &str, name: &str) -> (Kind, String, String) {
    (kind, directory.into(), name.into())
}

#[tokio::test]
async fn an_update_as_kubelet_makes_it_is_reported() {
    let (scratch, watches) = watches("update");
    let volume = scratch.0.join("c/1");
    fs::create_dir(volume.join("..old")).unwrap();
    symlink("..old", volume.join("..data")).unwrap();
    let added = watches.add(Path::new("c/1"), Path::new("."));
    assert_eq!(reported(&added), [what(Kind::WATCHED, "c/1", ""), what(Kind::WATCHED, "c/1/..old", "")]);
    fs::create_dir(volume.join("..new")).unwrap();
    symlink("..new", volume.join("..tmp")).unwrap();
    fs::rename(volume.join("..tmp"), volume.join("..data")).unwrap();
    fs::remove_dir(volume.join("..old")).unwrap();
    let changes = reported(&watches.digest(&watches.events().await.unwrap()));
    assert_eq!(
        changes,
        [
            what(Kind::CREATED, "c/1", "..new"),
            what(Kind::WATCHED, "c/1/..new", ""),
            what(Kind::CREATED, "c/1", "..tmp"),
            what(Kind::REMOVED, "c/1", "..tmp"),
            what(Kind::MOVED_HERE, "c/1", "..data"),
            what(Kind::REMOVED, "c/1", "..old"),
        ]
    );
    assert_eq!(watches.state().places.len(), 2, "the volume and ..new");
}

#[tokio::test]
async fn nothing_is_reported_for_a_removed_container() {
    let (scratch, watches) = watches("removed");
    assert_eq!(watches.add(Path::new("d/1"), Path::new(".")).len(), 3);
    assert_eq!(watches.add(Path::new("c/1"), Path::new(".")).len(), 1);
    watches.remove(Path::new("d"));
    fs::write(scratch.0.join("d/1/inner/file"), "x").unwrap();
    fs::write(scratch.0.join("c/1/file"), "x").unwrap();
    let mut changes = Vec::new();
    while changes.len() < 3 {
        changes.extend(reported(&watches.digest(&watches.events().await.unwrap())));
    }
    let place = "c/1";
    assert_eq!(changes, [Kind::CREATED, Kind::MODIFIED, Kind::WRITTEN].map(|kind| what(kind, place, "file")),);
}

#[tokio::test]
async fn there_is_a_limit() {
    let (scratch, watches) = watches("limit");
    for number in 0..MOST_DIRECTORIES + 10 {
        fs::create_dir(scratch.0.join(format!("c/1/{number}"))).unwrap();
    }
    assert_eq!(watches.add(Path::new("c/1"), Path::new(".")).len(), MOST_DIRECTORIES);
    assert!(watches.state().limit_reported);
}

#[tokio::test]
async fn no_link_is_followed() {
    let (scratch, watches) = watches("links");
    symlink("/etc", scratch.0.join("c/1/etc")).unwrap();
    symlink("../2", scratch.0.join("c/1/other")).unwrap();
    assert_eq!(watches.add(Path::new("c/1"), Path::new(".")).len(), 1);
    assert_eq!(watches.add(Path::new("c/1"), Path::new("etc")), []);
}
