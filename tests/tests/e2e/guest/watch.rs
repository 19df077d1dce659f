//! A program that watches, as reloaders of configurations do.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

const DIRECTORY_EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE);

/// Watches each directory below the one that it is given, and each file `key` in them: whatever the name leads to.
/// Writes a line for each event, and what `key` says after an update. Ends when a file `end` comes.
#[test]
#[ignore = "runs inside a container"]
fn prints_what_happens() {
    let top = std::env::var(super::DIRECTORY).expect("this runs inside a container, for another test");
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
    let mut watched = HashMap::new();
    let mut directories = vec![PathBuf::from(top)];
    while let Some(directory) = directories.pop() {
        watched.insert(inotify.add_watch(&directory, DIRECTORY_EVENTS).expect("watch"), directory.clone());
        let key = directory.join("key");
        if key.exists() {
            watched.insert(inotify.add_watch(&key, AddWatchFlags::IN_DELETE_SELF).expect("watch"), key);
        }
        let entries = fs::read_dir(&directory).expect("list").map(|entry| entry.expect("an entry"));
        let plain = |name: &str| !name.starts_with("..");
        let inner = entries.filter(|entry| entry.file_type().expect("its type").is_dir());
        directories.extend(inner.filter(|e| plain(&e.file_name().to_string_lossy())).map(|e| e.path()));
    }
    println!("{} watched", watched.len());
    loop {
        for event in inotify.read_events().expect("events") {
            let name = event.name.unwrap_or_default();
            let Some(place) = watched.get(&event.wd) else { continue };
            report(place, event.mask, Path::new(&name));
            if name == "end" {
                return;
            }
        }
    }
}

fn report(place: &Path, mask: AddWatchFlags, name: &Path) {
    let flags: Vec<_> = mask.iter_names().map(|(name, _)| name).collect();
    println!("{} {} {}", place.display(), flags.join("+"), name.display());
    if name == Path::new("..data") && mask.contains(AddWatchFlags::IN_MOVED_TO) {
        println!("{} says {}", place.display(), fs::read_to_string(place.join("key")).expect("read"));
    }
    if mask.contains(AddWatchFlags::IN_CLOSE_WRITE) {
        println!("{} has {}", name.display(), fs::read_to_string(place.join(name)).expect("read"));
    }
}
