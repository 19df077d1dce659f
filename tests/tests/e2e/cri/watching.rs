//! Programs that watch their volumes hear of what the host changes there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use katana_tests::cri::{Container, shared_pod};
use katana_tests::host::eventually;
use katana_tests::{Scratch, environment};
use serde_json::json;

use super::cases;

cases! {
    /// 100 ConfigMaps, and 100 directories in one volume; a certificate; a file that is edited in place
    changes_of_the_host_raise_events,
}

const MANY: usize = 100;

/// As kubelet's AtomicWriter: key -> ..data/key, ..data -> a directory with the time in its name.
fn publish(volume: &Path, version: &str) {
    let old = fs::read_link(volume.join("..data"));
    let directory = volume.join(format!("..{version}"));
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("key"), version).unwrap();
    symlink(directory.file_name().unwrap(), volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    match old {
        Ok(old) => fs::remove_dir_all(volume.join(old)).unwrap(),
        Err(_) => symlink("..data/key", volume.join("key")).unwrap(),
    }
}

/// A container that watches volumes of their own, and many directories of one more, "tree".
fn watcher(handler: &str, scratch: &Scratch) -> Container {
    let bind = |host: &Path, container: &str| json!({"host_path": host, "container_path": container, "readonly": true});
    let mut mounts = vec![bind(&std::env::current_exe().unwrap(), "/check")];
    for number in 0..MANY {
        let volume = scratch.directory(&format!("volume-{number}"));
        publish(&volume, "one");
        mounts.push(bind(&volume, &format!("/watched/{number}")));
        publish(&scratch.directory(&format!("tree/{number}")), "one");
    }
    mounts.push(bind(&scratch.path().join("tree"), "/watched/tree"));
    let test = "guest::watch::prints_what_happens";
    shared_pod(handler).start(json!({
        "mounts": mounts,
        "envs": [{"key": "KATANA_CHECK_DIRECTORY", "value": "/watched"}],
        "command": ["/check", "--ignored", "--exact", test, "--nocapture"],
    }))
}

fn changes_of_the_host_raise_events(handler: &str) {
    let scratch = Scratch::new();
    scratch.directory("tree");
    let container = watcher(handler, &scratch);
    // The volumes' directories with their keys, the top, the tree.
    container.wait_for_output(&format!("{} watched", 4 * MANY + 2));
    // That the container runs does not say that its volumes are watched already; those of one container are all
    // together.
    let first = scratch.path().join("volume-0/first");
    let heard = eventually(|| {
        fs::write(&first, "").unwrap();
        container.output().contains("first")
    });
    assert!(heard, "no event");
    let mut longest = Duration::ZERO;
    for number in (0..MANY).step_by(if environment::is_soak() { 1 } else { MANY / 10 }) {
        let updated = [
            (format!("volume-{number}"), number.to_string()),
            (format!("tree/{number}"), format!("tree/{number}")),
        ];
        for (volume, place) in updated {
            let begun = Instant::now();
            publish(&scratch.path().join(volume), "two");
            container.wait_for_output(&format!("/watched/{place} IN_MOVED_TO ..data"));
            longest = longest.max(begun.elapsed());
            container.wait_for_output(&format!("/watched/{place} says two"));
            // Of the old certificate: its file is gone.
            container.wait_for_output(&format!("/watched/{place}/key IN_DELETE_SELF"));
            container.wait_for_output(&format!("/watched/{place} IN_DELETE+IN_ISDIR ..one"));
        }
    }
    eprintln!("{handler}: the slowest update was heard of after {longest:?}");
    let volume = scratch.path().join("volume-7");
    fs::write(volume.join("edited"), "old contents").unwrap();
    container.wait_for_output("/watched/7 IN_CREATE edited");
    container.wait_for_output("edited has old contents");
    fs::write(volume.join("edited"), "new contents").unwrap();
    container.wait_for_output("/watched/7 IN_MODIFY edited");
    container.wait_for_output("edited has new contents");
    fs::remove_file(volume.join("edited")).unwrap();
    container.wait_for_output("/watched/7 IN_DELETE edited");
    fs::write(volume.join("end"), "").unwrap();
    container.ended();
    container.remove().unwrap();
}
