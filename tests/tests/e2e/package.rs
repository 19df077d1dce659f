//! Debian's package: installed, upgraded under a running pod, removed, purged.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use katana_tests::command::Output;
use katana_tests::out_of_sight::OutOfSight;
use katana_tests::process::Process;
use katana_tests::turn::alone;
use katana_tests::{BUSYBOX, Command, Run, Scratch, environment};

const TREE: &str = "/opt/kata";
/// As in the image of the DaemonSet.
pub const ARTIFACTS: &str = "/opt/kata-artifacts";
const ASIDE: &str = "/opt/kata-artifacts/opt/kata";
/// What packs it, and of what.
const FILES: [(&str, &str); 6] = [
    ("scripts/deb", include_str!("../../../scripts/deb")),
    ("packaging/deb/control", include_str!("../../../packaging/deb/control")),
    ("packaging/deb/copyright", include_str!("../../../packaging/deb/copyright")),
    ("packaging/deb/lintian-overrides", include_str!("../../../packaging/deb/lintian-overrides")),
    ("packaging/deb/prerm", include_str!("../../../packaging/deb/prerm")),
    ("packaging/deb/postrm", include_str!("../../../packaging/deb/postrm")),
];

/// The tests' own installation and pods make room, and are back when this is dropped.
pub struct Aside(OutOfSight);

impl Aside {
    pub fn new() -> Self {
        fs::create_dir_all(ASIDE).expect("directory");
        fs::rename(TREE, ASIDE).expect("the tests' installation is moved");
        Self(OutOfSight::new())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = Command::new(&["dpkg", "--purge", "--force-all", "katana"]).output();
        let _ = fs::remove_dir_all(TREE);
        let _ = fs::rename(ASIDE, TREE);
        let _ = fs::remove_dir_all(ARTIFACTS);
    }
}

fn pack(scratch: &Scratch, version: &str) -> PathBuf {
    for (name, text) in FILES {
        let path = scratch.path().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("directory");
        fs::write(&path, text).expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    }
    let script = scratch.path().join("scripts/deb").display().to_string();
    // xz would take the test machine minutes.
    let fast = "DPKG_DEB_COMPRESSOR_TYPE=none";
    let words = ["env", fast, &script, version, ASIDE, &scratch.path().display().to_string()];
    Command::new(&words).patiently().output().ok().text().trim().into()
}

fn dpkg(arguments: &[&str]) -> Output {
    Command::new(&[&["dpkg"], arguments].concat()).patiently().output()
}

fn is_deleted(process: &Process) -> bool {
    let program = fs::read_link(format!("/proc/{}/exe", process.pid)).expect("its program");
    program.to_string_lossy().ends_with("(deleted)")
}

#[test]
fn an_upgrade_leaves_pods_alone_and_a_purge_leaves_nothing() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is Katana's own package") {
        return;
    }
    if !Path::new("/etc/katana-test-machine").exists() {
        return environment::say_skipped("packages are installed in the test machine only");
    }
    let aside = Aside::new();
    let scratch = Scratch::new();
    let (first, second) = (pack(&scratch, "0.1.0"), pack(&scratch, "0.1.1"));
    let path = |package: &Path| package.display().to_string();

    dpkg(&["--install", &path(&first)]).ok();
    let tool = |arguments: &[&str]| Command::new(&[&["/usr/bin/kata-runtime"], arguments].concat()).output();
    tool(&["check"]).ok();
    let old = Run::new(BUSYBOX).sh("echo mine > /mark; sleep 10000").start();
    let (shim, vmm) = (Process::shim_of(old.id()), Process::vmm_of(old.id()));

    dpkg(&["--install", &path(&second)]).ok();
    assert!(is_deleted(&shim), "the shim runs what it ran before");
    assert!(vmm.lives());
    old.sh("until cat /mark; do sleep 0.1; done 2>/dev/null").ok().expect_text("mine");
    let new = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    assert!(!is_deleted(&Process::shim_of(new.id())));
    new.exec(&["true"]).ok();

    // Also its end is.
    old.task("kill", &["--signal", "KILL"]).ok();
    old.wait_for_status(Some("STOPPED"));
    old.delete_task(137);
    drop(old);
    assert!(!shim.lives() && !vmm.lives());

    let refused = dpkg(&["--remove", "katana"]);
    assert_ne!(refused.code, 0, "{refused}");
    refused.expect_error_line(&["katana: these pods run, stop them first: ", new.id()]);
    new.exec(&["true"]).ok();
    drop(new);

    tool(&["install", "--docker"]).ok();
    assert!(Path::new("/etc/docker/daemon.json").exists());
    dpkg(&["--purge", "katana"]).ok();
    for left in [
        TREE,
        "/usr/bin/kata-runtime",
        "/usr/bin/containerd-shim-kata-v2",
        "/etc/docker/daemon.json",
        "/usr/share/doc/katana",
    ] {
        assert!(fs::symlink_metadata(left).is_err(), "{left} is left");
    }
    let run: Vec<_> = fs::read_dir("/run/kata-containers").into_iter().flatten().flatten().collect();
    assert!(run.is_empty(), "{run:?}");
    drop(aside);
}
