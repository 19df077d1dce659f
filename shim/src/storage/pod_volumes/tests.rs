use super::*;
use serde_json::json;

fn mount(options: &[&str]) -> Mount {
    Mount { options: options.iter().map(ToString::to_string).collect(), ..Mount::default() }
}

const POLICY: Policy = Policy { volumes: true, ..Policy::NONE };

/// An emptyDir of its own, with the directory above which it is to be removed.
fn prepared(name: &str) -> (PathBuf, PathBuf) {
    let base = std::env::temp_dir().join(format!("katana-pod-volume-{name}-{}", std::process::id()));
    let directory = base.join("pods/u-1/volumes/kubernetes.io~empty-dir/data");
    fs::create_dir_all(&directory).unwrap();
    (base, directory)
}

#[test]
fn directories_of_a_pod_alone_are_known_by_their_paths() {
    for (path, place) in [
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/data", Some(Place::EmptyDir)),
        ("/data/kubelet/pods/u-1/volume-subpaths/data/c1/0", Some(Place::SubPath)),
        ("/var/lib/containerd/io.containerd.grpc.v1.cri/containers/4af/volumes/0ce", Some(Place::OfImage)),
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~configmap/data", None),
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/data/inner", None),
        ("/var/lib/kubelet/pods/u-1/etc-hosts", None),
        ("/", None),
    ] {
        assert_eq!(Place::of(Path::new(path)), place, "{path}");
    }
}

#[test]
fn an_empty_directory_is_a_disk_unless_its_mounts_are_to_show() {
    let (base, directory) = prepared("plain");
    let plain = mount(&["rbind", "rprivate", "rw"]);
    let volume = PodVolume::of(&plain, &directory, POLICY).unwrap();
    assert_eq!(volume.image.path(), directory.join(".katana-disk.ext4"));
    assert_eq!(volume.in_guest(3), Path::new("/run/kata-containers/volumes/3/upper"));
    let mapped = Mount { rest: json!({"uidMappings": [{}]}).as_object().unwrap().clone(), ..plain.clone() };
    assert_eq!(PodVolume::of(&mapped, &directory, POLICY), None);
    fs::remove_dir_all(&base).unwrap();

    let (base, directory) = prepared("shown");
    assert_eq!(PodVolume::of(&mount(&["rbind", "rslave"]), &directory, POLICY), None);
    if is_marked(&directory, SHARED) {
        // The pod's other containers have it shared as well.
        assert_eq!(PodVolume::of(&plain, &directory, POLICY), None);
    } else {
        crate::host::say_skipped("marking a directory needs root");
    }
    fs::remove_dir_all(&base).unwrap();

    let (base, directory) = prepared("filled");
    fs::write(directory.join("file"), "").unwrap();
    assert_eq!(PodVolume::of(&plain, &directory, POLICY), None);
    fs::remove_file(directory.join("file")).unwrap();
    assert_eq!(PodVolume::of(&plain, &directory, Policy::NONE), None);
    fs::remove_dir_all(&base).unwrap();
}

#[test]
fn a_sub_path_is_part_of_the_volume_that_its_mount_shows() {
    let (base, directory) = prepared("part");
    let point = base.join("pods/u-1/volume-subpaths/data/c1/0");
    fs::create_dir_all(&point).unwrap();
    let shown = |root: &str| {
        let line = format!("7 1 8:1 {root} {} rw - ext4 /dev/root rw\n", point.display());
        let file = base.join("mountinfo");
        fs::write(&file, line).unwrap();
        let mounts = mount_table::read(fs::File::open(file).unwrap()).unwrap();
        origin(&point, &mounts).map(|(of, path)| (of == directory, path.to_str().unwrap().to_owned()))
    };
    // kubelet's directory may be a file system of its own.
    let volume = "/pods/u-1/volumes/kubernetes.io~empty-dir/data";
    assert_eq!(shown(&format!("{volume}/a/b")), Some((true, "a/b".into())));
    assert_eq!(shown(&format!("/var/lib/kubelet{volume}/a")), Some((true, "a".into())));
    assert_eq!(shown("/pods/u-1/volumes/kubernetes.io~empty-dir/other/a"), None);
    assert_eq!(shown("/pods/u-2/volumes/kubernetes.io~empty-dir/data/a"), None);
    assert_eq!(shown("/srv/nfs/a"), None);
    fs::remove_dir_all(&base).unwrap();
}
