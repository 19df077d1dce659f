use super::super::disk_slots::{DiskSlot, Slots};
use super::*;
use serde_json::json;

fn layer(kind: &str, source: &str, options: &[&str]) -> Layer {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Layer { kind: kind.into(), source: source.into(), target: String::new(), options }
}

/// An image that is there. Only whether it is a file is looked at.
fn image() -> String {
    std::env::current_exe().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_root_on_one_disk_is_mounted_in_the_guest() {
    // containerd 1.7, blockfile, with the option of its default configuration; Prepare and View.
    let active = root(&[layer("ext4", &image(), &["loop", "rw"])]).unwrap();
    assert!(!active.read_only);
    let options = vec!["rw".to_owned()];
    assert_eq!(active.purpose, Purpose::Root { kind: "ext4".into(), options });
    assert!(root(&[layer("ext4", &image(), &["loop", "ro"])]).unwrap().read_only);
    // containerd 2.1, erofs: a View of one layer.
    let view = root(&[layer("erofs", &image(), &["ro", "loop"])]).unwrap();
    assert!(view.read_only);
    let options = vec!["ro".to_owned()];
    assert_eq!(view.purpose, Purpose::Root { kind: "erofs".into(), options });
}

#[test]
fn all_other_roots_are_mounted_on_the_host() {
    let overlay = ["workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/s/8/fs:/s/7/fs"];
    let image = image();
    for layers in [
        vec![],
        // containerd 2.1, erofs: its layers are mounted on the host by the snapshotter itself.
        vec![layer("overlay", "overlay", &overlay)],
        vec![layer("bind", "/s/9/fs", &["rw", "rbind"])],
        vec![layer("xfs", &image, &["nouuid"])],
        vec![layer("ext4", "/does/not/exist", &["rw"])],
        vec![layer("ext4", "/tmp", &["rw"])],
        vec![layer("erofs", &image, &["ro"]), layer("overlay", "overlay", &overlay)],
    ] {
        assert_eq!(root(&layers), None, "{layers:?}");
    }
}

#[test]
fn the_last_rule_that_speaks_of_a_device_decides() {
    let cases = [
        (json!([]), true),
        (json!([{"allow": false, "access": "rwm"}]), false),
        (
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rwm"}]),
            true,
        ),
        (
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rm"}]),
            false,
        ),
        (
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rwm"}]),
            false,
        ),
        (
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 7, "minor": 3, "access": "rwm"}]),
            false,
        ),
        (
            json!([{"allow": true, "type": "a"}, {"allow": false, "type": "b", "major": 7, "minor": -1, "access": "w"}]),
            false,
        ),
    ];
    for (rules, expected) in cases {
        let resources = json!({"devices": rules});
        let rules = Rules::of(resources.as_object());
        assert_eq!(rules.allow(7, 3, 'w'), expected, "{resources}");
    }
}

#[test]
fn the_hosts_disks_are_not_for_those_who_may_use_everything() {
    let spec = |rules| {
        let device = json!({"path": "/dev/sda", "type": "b", "major": 999, "minor": 0});
        let spec = json!({"linux": {"devices": [device], "resources": {"devices": rules}}});
        serde_json::from_value::<Spec>(spec).unwrap()
    };
    let privileged = spec(json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]));
    assert_eq!(wanted("c", &privileged, &[], &[], Policy::default()).unwrap(), []);
    let error = wanted("c", &spec(json!([])), &[], &[], Policy::default()).unwrap_err().to_string();
    assert!(error.contains("/dev/sda") && error.contains("999:0"), "{error}");
}

/// With a host path of a block device, which does not come with the right to use it.
#[test]
fn a_disk_that_is_mounted_has_to_be_allowed() {
    let directory = std::env::temp_dir().join(format!("katana-disks-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let node = directory.join("node");
    let number = nix::sys::stat::makedev(999, 5);
    let mode = nix::sys::stat::Mode::S_IRUSR;
    if nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFBLK, mode, number).is_err() {
        return crate::host::say_skipped("it needs root");
    }
    let found = |rules: Value| {
        let mount =
            json!({"destination": "/disk", "type": "bind", "source": node, "options": ["rbind", "rw"]});
        let spec = json!({"mounts": [mount], "linux": {"resources": {"devices": rules}}});
        let spec = serde_json::from_value::<Spec>(spec).unwrap();
        let found = wanted("c", &spec, &[Source::BlockDevice(node.clone())], &[], Policy::default())
            .map_err(|e| e.to_string())?;
        Ok::<_, String>(found[0].read_only)
    };
    let none = json!({"allow": false, "access": "rwm"});
    let one = |access: &str| json!({"allow": true, "type": "b", "major": 999, "minor": 5, "access": access});
    assert_eq!(found(json!([none, one("rwm")])), Ok(false));
    assert_eq!(found(json!([none, one("r")])), Ok(true));
    assert_eq!(found(json!([none, {"allow": true, "access": "rwm"}])), Ok(false));
    let error = found(json!([none, one("m")])).unwrap_err();
    assert!(error.contains("do not allow 999:5"), "{error}");
    assert!(found(json!([none])).is_err());
    fs::remove_dir_all(directory).unwrap();
}

fn opened(inode: u64, read_only: bool) -> Opened {
    let file = File::open("/dev/null").unwrap();
    Opened {
        path: PathBuf::new(),
        file,
        read_only,
        purpose: Purpose::Device(None),
        numbers: (0, 0),
        identity: (false, 1, inode),
    }
}

#[test]
fn a_disk_of_two_containers_takes_one_slot() {
    let mut slots = Slots::new(2, false);
    let place = |slot, shared| Some(DiskSlot { slot, shared });
    assert_eq!(slots.take("a", &opened(5, false)), place(0, false));
    assert_eq!(slots.take("b", &opened(5, true)), place(0, true));
    assert_eq!(slots.take("b", &opened(6, true)), place(1, false));
    // It would have to be written to.
    assert_eq!(slots.take("c", &opened(6, false)), None);
    assert!(slots.leave("a").is_empty());
    assert_eq!(slots.leave("b"), [(0, false), (1, false)]);
    // The host may have given the number of its inode to another file by now.
    assert_eq!(slots.take("c", &opened(6, true)), None);
    // Until the guest has released it.
    assert_eq!(slots.take("c", &opened(7, false)), None);
    // If it does not, nobody else can have it, and the same disk is still there.
    slots.is_busy(0);
    assert_eq!(slots.leave_busy(), [(0, false)]);
    assert_eq!(slots.take("c", &opened(5, true)), None, "somebody tries again to release it");
    slots.is_busy(0);
    assert_eq!(slots.take("c", &opened(5, true)), place(0, true));
    assert!(slots.leave_busy().is_empty() && slots.give_back("c", 0));
    slots.free(1);
    assert_eq!(slots.take("c", &opened(7, false)), place(1, false));
    assert!(slots.any_lasts("c") && !slots.any_lasts("b"));
}

/// A writable layer can be shared instead.
#[test]
fn writable_layers_leave_slots_to_others() {
    let mut slots = Slots::new(6, true);
    let upper = std::env::temp_dir().join(format!("katana-slots-{}", std::process::id()));
    fs::create_dir_all(&upper).unwrap();
    let options = [&format!("upperdir={}", upper.display()), "workdir=/w", "lowerdir=/l"];
    let layers = [layer("overlay", "overlay", &options)];
    let spec = json!({"annotations": {"io.kubernetes.cri.container-type": "container"}});
    let spec = serde_json::from_value::<Spec>(spec).unwrap();
    let layer = |inode| {
        let writable = Writable::of(&layers, &spec, Policy::default()).unwrap();
        Opened { purpose: Purpose::Writable(writable), ..opened(inode, false) }
    };
    assert!(slots.have_room(Kind::Root) && slots.take("a", &layer(1)).is_some());
    assert!(slots.have_room(Kind::Root) && slots.take("b", &layer(2)).is_some());
    assert!(!slots.have_room(Kind::Root) && slots.have_room(Kind::EmptyDir));
    // What is on it cannot be had in another way.
    assert!(slots.take("c", &layer(3)).is_some());
    assert!(!slots.any_lasts("c"));
    assert_eq!(slots.leave("c"), [(2, true)]);
    slots.free(2);
    assert!(slots.have_room(Kind::Device) && slots.take("d", &opened(4, false)).is_some());
    fs::remove_dir(&upper).unwrap();
}

#[test]
fn what_was_exchanged_since_the_rules_were_asked_is_not_opened() {
    let wanted = |checked| Wanted {
        path: image().into(),
        read_only: true,
        purpose: Purpose::Device(Some(0)),
        checked,
    };
    let error = wanted(Some((7, 3))).open().err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("not the block device any more"), "{error}");
    assert!(wanted(None).open().is_ok());
}
