use super::*;
use serde_json::json;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

const DISK: Policy = Policy { layer: Some(WritableLayer::Disk), ..Policy::NONE };
const SHARED: Policy = Policy::NONE;
const UNSAID: Policy = Policy { layer: None, ..Policy::NONE };
const IMAGE: &str = ".katana-disk.ext4";

fn overlay(options: &[&str]) -> Layer {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Layer { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
}

fn spec(pods: bool, read_only: bool) -> Spec {
    let annotations = if pods { json!({"io.kubernetes.cri.container-type": "container"}) } else { json!({}) };
    let root = json!({"path": "rootfs", "readonly": read_only});
    serde_json::from_value(json!({"annotations": annotations, "root": root})).unwrap()
}

/// An empty upper directory, and the overlay that it is of.
fn prepared(name: &str) -> (PathBuf, Layer) {
    let upper = std::env::temp_dir().join(format!("katana-writable-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&upper);
    fs::create_dir(&upper).unwrap();
    let layer =
        overlay(&["index=off", "workdir=/w", &format!("upperdir={}", upper.display()), "lowerdir=/l"]);
    (upper, layer)
}

#[test]
fn the_rest_of_an_overlay_is_read_only() {
    let whole = overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/s/8:/s/7", "index=off", "volatile"]);
    let (upper, below) = split(&whole).unwrap();
    assert_eq!(upper, Path::new("/u"));
    assert_eq!(below, overlay(&["index=off", "lowerdir=/s/8:/s/7", "ro"]));
    // A single layer is no overlay.
    let single = overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/s/8"]);
    let (_, below) = split(&single).unwrap();
    assert_eq!(below.bound(), Some((Path::new("/s/8"), false)));
    for other in [
        overlay(&["lowerdir=/s/8:/s/7"]),
        overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/s/8", "ro"]),
        overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/s/8", "nodev"]),
        overlay(&["workdir=/w", "upperdir=/u", r"lowerdir=/s/a\\:b"]),
        overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/s/8", "uidmap=0:1000:1"]),
        Layer { kind: "bind".into(), ..overlay(&["rw"]) },
    ] {
        assert_eq!(split(&other), None, "{other:?}");
    }
}

#[test]
fn a_pods_container_has_a_disk_unless_said_otherwise() {
    let (upper, layer) = prepared("policy");
    let is = |spec: &Spec, policy| Writable::of(std::slice::from_ref(&layer), spec, policy).is_some();
    assert!(is(&spec(true, false), UNSAID) && !is(&spec(false, false), UNSAID));
    assert!(is(&spec(true, false), DISK) && is(&spec(false, false), DISK));
    assert!(!is(&spec(true, false), SHARED) && !is(&spec(false, false), SHARED));
    // Nobody writes to it.
    assert!(!is(&spec(true, true), DISK));
    // What is in an upper directory would be missing.
    fs::write(upper.join("file"), "").unwrap();
    assert!(!is(&spec(true, false), DISK));
    fs::remove_dir_all(&upper).unwrap();
}

#[test]
fn an_image_that_is_there_is_used_again() {
    let (upper, layer) = prepared("again");
    let layers = [layer];
    let pods = spec(true, false);
    let writable = Writable::of(&layers, &pods, DISK).unwrap();
    match writable.image.make() {
        Err(e) if e.to_string().contains("not permitted") => {
            return crate::host::say_skipped("it needs root");
        }
        made => made.unwrap(),
    }
    let inode = fs::metadata(writable.image.path()).unwrap().ino();
    // Whatever the configuration says by now: what the container wrote is on it.
    let again = Writable::of(&layers, &pods, SHARED).unwrap();
    assert!(again.image.is_there());
    assert_eq!(fs::metadata(again.image.path()).unwrap().ino(), inode);
    assert_eq!(again.lower("c1"), "/run/kata-containers/shared/c1/own");
    fs::remove_dir_all(&upper).unwrap();
}

/// By a container that had the directory shared, before the configuration changed.
#[test]
fn what_a_container_has_put_there_is_no_image() {
    let (upper, layer) = prepared("planted");
    let (layers, pods) = ([layer], spec(true, false));
    fs::write(upper.join(IMAGE), "an image of the container's").unwrap();
    assert_eq!(Writable::of(&layers, &pods, DISK), None);
    fs::remove_file(upper.join(IMAGE)).unwrap();

    let victim = upper.with_extension("victim");
    fs::write(&victim, "of the host").unwrap();
    symlink(&victim, upper.join(".katana-disk.new")).unwrap();
    let made = Writable::of(&layers, &pods, DISK).unwrap().image.make();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "of the host");
    fs::remove_file(&victim).unwrap();
    if made.is_ok() {
        assert!(fs::symlink_metadata(upper.join(IMAGE)).unwrap().is_file());
    }
    fs::remove_dir_all(&upper).unwrap();
}
