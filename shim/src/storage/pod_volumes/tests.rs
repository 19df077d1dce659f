use super::*;
use serde_json::json;

const POLICY: Policy = Policy { volumes: true, ..Policy::NONE };

/// A directory with an emptyDir of the pod `u-1`, which is removed in the end.
struct Kubelet(PathBuf);

impl Kubelet {
    fn new(name: &str) -> Self {
        let base = std::env::temp_dir().join(format!("katana-pod-volume-{name}-{}", std::process::id()));
        let kubelet = Self(base);
        fs::create_dir_all(kubelet.empty_dir()).unwrap();
        kubelet
    }

    fn empty_dir(&self) -> PathBuf {
        self.0.join("pods/u-1/volumes/kubernetes.io~empty-dir/data")
    }

    /// The volumes of a container with a mount of each of these, with these options.
    fn volumes(&self, mounts: &[(&Path, &str)]) -> Result<Vec<PodVolume>> {
        let sources: Vec<_> = mounts.iter().map(|(path, _)| Source::Host((*path).to_owned())).collect();
        let mounts: Vec<_> = mounts
            .iter()
            .map(|(_, option)| json!({"destination": "/d", "options": ["rbind", option]}))
            .collect();
        let annotations = json!({"io.kubernetes.cri.sandbox-uid": "u-1"});
        let spec = serde_json::from_value(json!({"annotations": annotations, "mounts": mounts})).unwrap();
        all("c", &spec, &sources, POLICY)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn directories_of_the_pod_alone_are_known_by_their_paths() {
    let part = Place::SubPath("/data/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/data".into());
    let of_image = "/var/lib/containerd/io.containerd.grpc.v1.cri/containers/4af/volumes/0ce";
    for (path, place) in [
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/data", Some(Place::EmptyDir)),
        ("/data/kubelet/pods/u-1/volume-subpaths/data/c1/0", Some(part)),
        (of_image, Some(Place::OfImage)),
        // Another pod's, which a hostPath names.
        ("/var/lib/kubelet/pods/u-2/volumes/kubernetes.io~empty-dir/data", None),
        ("/data/kubelet/pods/u-2/volume-subpaths/data/c1/0", None),
        ("/var/lib/containerd/io.containerd.grpc.v1.cri/containers/other/volumes/0ce", None),
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~configmap/data", None),
        ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/data/inner", None),
        ("/var/lib/kubelet/pods/u-1/etc-hosts", None),
        ("/", None),
    ] {
        assert_eq!(Place::of(Path::new(path), "4af", "u-1"), place, "{path}");
    }
}

#[test]
fn a_directory_without_files_may_be_a_disk() {
    let kubelet = Kubelet::new("plain");
    let data = kubelet.empty_dir();
    let may_be = |volumes: &[PodVolume]| volumes[0].may_be_disk(POLICY, 4);
    let volumes = kubelet.volumes(&[(&data, "rprivate"), (&data, "ro")]).unwrap();
    assert_eq!(volumes.len(), 1);
    assert_eq!(volumes[0].image.path(), data.join(".katana-disk.ext4"));
    let top = PathBuf::from("/run/kata-containers/volumes/3/upper");
    assert_eq!(volumes[0].in_guest(3).collect::<Vec<_>>(), [(0, top.clone()), (1, top)]);
    assert!(may_be(&volumes) && !volumes[0].may_be_disk(Policy::NONE, 4));
    fs::create_dir(data.join("made")).unwrap();
    assert!(!may_be(&volumes), "the guest would not have it");
    // kubelet makes what subPaths name.
    fs::create_dir(data.join("made/by")).unwrap();
    let mut part = volumes.clone();
    part[0].mounts.push((2, "made/by".into()));
    assert!(may_be(&part));
    fs::write(data.join("made/file"), "").unwrap();
    assert!(!may_be(&part));
    fs::remove_dir_all(data.join("made")).unwrap();
    // One mount of a container says how all of them have it.
    assert!(!may_be(&kubelet.volumes(&[(&data, "rprivate"), (&data, "rslave")]).unwrap()));
    for number in 0..4 {
        let other = data.with_file_name(format!("other-{number}"));
        fs::create_dir(&other).unwrap();
        fs::write(other.join(NAME), "").unwrap();
    }
    assert!(!may_be(&volumes), "there are slots for four");
}

#[test]
fn a_sub_path_is_part_of_the_directory_that_its_mount_shows() {
    let (point, directory) = (Path::new("/k/pods/u/volume-subpaths/data/c/0"), Path::new("/k/pods/u/e/data"));
    let shown = |lines: &[&str]| {
        let file = std::env::temp_dir().join(format!("katana-mountinfo-{}", std::process::id()));
        fs::write(&file, lines.join("\n")).unwrap();
        let mounts = mount_table::read(fs::File::open(&file).unwrap()).unwrap();
        fs::remove_file(&file).unwrap();
        relative(point, directory, &mounts).map(|path| path.to_str().unwrap().to_owned())
    };
    let bound =
        |device: &str, root: &str| format!("7 1 {device} {root} {} rw - ext4 /dev/x rw", point.display());
    let root = "1 1 8:1 / / rw - ext4 /dev/x rw";
    assert_eq!(shown(&[root, &bound("8:1", "/k/pods/u/e/data/a/b")]), Some("a/b".into()));
    // kubelet's directory, or that of its pods, may be a mount of anything.
    let pods = "2 1 8:2 /srv/x /k/pods rw - ext4 /dev/y rw";
    assert_eq!(shown(&[root, pods, &bound("8:2", "/srv/x/u/e/data/a")]), Some("a".into()));
    assert_eq!(shown(&[root, pods, &bound("8:1", "/srv/x/u/e/data/a")]), None);
    assert_eq!(shown(&[root, pods, &bound("8:2", "/srv/x/u/e/other/a")]), None);
    assert_eq!(shown(&[root]), None);
}

#[test]
fn a_sub_path_that_cannot_be_found_is_an_error() {
    let kubelet = Kubelet::new("lost");
    let point = kubelet.0.join("pods/u-1/volume-subpaths/data/c/0");
    fs::create_dir_all(&point).unwrap();
    let error = kubelet.volumes(&[(&point, "rprivate")]).unwrap_err().to_string();
    assert!(error.contains("nothing is mounted there"), "{error}");
    // Part of a volume of another kind.
    let other = kubelet.0.join("pods/u-1/volume-subpaths/claim/c/0");
    fs::create_dir_all(&other).unwrap();
    assert_eq!(kubelet.volumes(&[(&other, "rprivate")]).unwrap(), []);
}
