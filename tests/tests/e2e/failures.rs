//! What breaks is reported, and nothing stays behind.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use katana_tests::host::{Host, eventually};
use katana_tests::process::Process;
use katana_tests::turn::{alone, shared};
use katana_tests::{BUSYBOX, Command, Configuration, Container, Events, Run, Scratch, ctr, environment};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const KVM: &str = "/dev/kvm";

/// How long it takes here to run a container in which all goes well.
fn usual_time() -> Duration {
    static TIME: OnceLock<Duration> = OnceLock::new();
    *TIME.get_or_init(|| Run::new(BUSYBOX).command(&["true"]).output().ok().elapsed)
}

/// How long it takes here when the machine boots.
fn boot_time() -> Duration {
    let scratch = Scratch::new();
    let text = Configuration::installed().set("factory.enable_template", false).to_toml();
    let path = scratch.file("configuration.toml", text);
    Run::new(BUSYBOX).configuration(&path).command(&["true"]).output().ok().elapsed
}

/// A container cannot be started: one line says why, soon, and the host is as before.
#[track_caller]
fn expect_no_start(configuration: Option<&Path>, parts: &[&str]) {
    let before = Host::before();
    expect_refusal(Duration::ZERO, configuration, parts);
    before.expect_unchanged();
}

/// Likewise when the failure is one of waiting that long, and whatever becomes of the host.
#[track_caller]
fn expect_refusal(wait: Duration, configuration: Option<&Path>, parts: &[&str]) {
    // Less than what it takes to give up on an agent, which is a minute.
    let limit = wait + usual_time() * 3 + Duration::from_secs(30);
    let run = Run::new(BUSYBOX).command(&["true"]);
    let run = configuration.into_iter().fold(run, Run::configuration);
    let output = run.output();
    assert_ne!(output.code, 0, "expected an error with {parts:?}\n{output}");
    assert!(output.elapsed < limit, "it took too long; usually it takes {:?}\n{output}", usual_time());
    output.expect_error_line(parts);
}

fn is_vm() -> bool {
    environment::is_vm_or_say("this is about virtual machines")
}

/// Something else in the place of a file, until this is dropped.
struct Covered(PathBuf);

impl Covered {
    fn new(path: &str, with: &Path) -> Self {
        // Both run a container the first time, which is not to be one that cannot start.
        drop((Host::before(), usual_time()));
        mount(Some(with), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("bind mount");
        Self(PathBuf::from(path))
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmount");
    }
}

#[test]
fn a_killed_vmm_ends_its_task() {
    let _turn = alone();
    if !is_vm() {
        return;
    }
    let before = Host::before();
    let events = Events::follow();
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    Process::vmm_of(container.id()).kill();
    let exit = events.wait_for(container.id(), "/tasks/exit");
    assert_eq!(exit.body["exit_status"].as_u64(), Some(137), "{exit:?}");
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
    ctr(&["containers", "delete", container.id()]).output().ok();
    drop(events);
    before.expect_unchanged();
}

#[test]
fn a_killed_vmm_ends_what_is_attached() {
    let _turn = alone();
    if !is_vm() {
        return;
    }
    let before = Host::before();
    let id = katana_tests::container::new_id();
    let running = Run::new(BUSYBOX).id(&id).sh("echo started; sleep 10000").spawn();
    running.wait_for("started");
    let container = Container::adopt(&id);
    let exec = container.exec_command(&[], &["sh", "-c", "echo started; sleep 10000"]).spawn();
    exec.wait_for("started");
    Process::vmm_of(&id).kill();
    assert_ne!(exec.finish().code, 0, "the exec's client");
    running.finish().expect_code(137);
    drop(container);
    before.expect_unchanged();
}

#[test]
fn a_killed_shim_is_cleaned_up_after_by_containerd() {
    let _turn = alone();
    let before = Host::before();
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    let shim = Process::shim_of(container.id());
    let children: Vec<Process> =
        Process::all().into_iter().filter(|process| process.parent == shim.pid).collect();
    assert!(!children.is_empty(), "the shim has no child to be cleaned up");
    shim.kill();
    // containerd notices the closed connection, and runs the shim's delete action.
    container.wait_for_status(None);
    let gone = eventually(|| !children.iter().any(Process::lives));
    assert!(gone, "still there: {children:?}");
    ctr(&["containers", "delete", container.id()]).output().ok();
    // runc's shim leaves its socket behind.
    if environment::is_vm() {
        before.expect_unchanged();
    }
}

#[test]
fn mistakes_in_the_configuration_are_named() {
    let _turn = alone();
    if !is_vm() {
        return;
    }
    let scratch = Scratch::new();
    let kernel = scratch.file("vmlinux", vec![b'#'; 1 << 20]).display().to_string();
    let image = scratch.file("image", vec![0; 4 << 20]).display().to_string();
    let path = scratch.path().join("configuration.toml");
    let place = path.display().to_string();
    let unknown = Configuration::installed().set("runtime.no_such_key", true).to_toml();
    let line = unknown.lines().position(|line| line.starts_with("no_such_key")).expect("the key") + 1;
    let line = line.to_string();
    let with = |key: &str, value: &str| Configuration::installed().set(key, value).to_toml();
    let cases: [(String, &[&str]); 5] = [
        (with("hypervisor.katana.kernel", "/no/such/vmlinux"), &["/no/such/vmlinux", "No such file"]),
        (with("hypervisor.katana.kernel", &kernel), &[&kernel, "is not an ELF file"]),
        (with("hypervisor.katana.image", &image), &[&image, "is not an erofs image"]),
        (unknown, &[&place, &line, "no_such_key"]),
        (with("hypervisor.katana.default_memory", "much"), &[&place, "default_memory"]),
    ];
    let before = Host::before();
    for (text, parts) in cases {
        std::fs::write(&path, text).expect("the configuration");
        expect_refusal(Duration::ZERO, Some(&path), parts);
    }
    before.expect_unchanged();
}

/// Its first block is what it should be, so that only the guest can find out.
#[test]
fn an_image_with_damaged_content_is_reported_by_the_guest() {
    let _turn = alone();
    if is_vm() {
        let scratch = Scratch::new();
        let configuration = Configuration::installed();
        let mut image = std::fs::read(configuration.text("hypervisor.katana.image")).expect("the image");
        let length = image.len();
        image[4096..].copy_from_slice(&katana_tests::scratch::noise(length - 4096, 5));
        let image = scratch.file("image", image).display().to_string();
        let text = configuration.set("hypervisor.katana.image", image.as_str()).to_toml();
        expect_no_start(Some(&scratch.file("configuration.toml", text)), &["panic"]);
    }
}

#[test]
fn a_panic_of_the_guest_at_boot_is_quoted() {
    let _turn = alone();
    if is_vm() {
        let scratch = Scratch::new();
        let text =
            Configuration::installed().set("hypervisor.katana.kernel_params", "init=/nonexistent").to_toml();
        expect_no_start(Some(&scratch.file("configuration.toml", text)), &["panic", "/nonexistent"]);
    }
}

/// What the host has left of it is no other than after a panic that is reported, where it is compared.
#[test]
fn the_last_words_of_a_guest_that_hangs_are_quoted() {
    let _turn = shared();
    if is_vm() {
        let scratch = Scratch::new();
        // Time enough for a boot and a panic, however slow the machine is.
        let wait = (boot_time().as_secs() * 4).min(environment::hang_limit().as_secs() / 2).max(15);
        let text = Configuration::installed()
            .set("hypervisor.katana.kernel_params", "init=/nonexistent panic=0")
            .set("agent.kata.dial_timeout", i64::try_from(wait).expect("a time"))
            .to_toml();
        let path = scratch.file("configuration.toml", text);
        let late = format!("did not connect within {wait} s");
        let expected = [late.as_str(), "Kernel panic", "/nonexistent"];
        expect_refusal(Duration::from_secs(wait), Some(&path), &expected);
    }
}

/// Whoever can change one of them is root on the host, or in all guests.
#[test]
fn files_that_others_can_change_are_named() {
    let _turn = alone();
    if !is_vm() {
        return;
    }
    let scratch = Scratch::new();
    let open = scratch.directory("open");
    let before = Host::before();
    for (key, name) in [("path", "VMM"), ("kernel", "kernel"), ("image", "guest image")] {
        let key = format!("hypervisor.katana.{key}");
        let file = open.join("file");
        std::fs::copy(Configuration::installed().text(&key), &file).expect("copy");
        let text = Configuration::installed().set(&key, file.display().to_string()).to_toml();
        let path = scratch.file("configuration.toml", text);
        let quoted = |path: &Path| format!("\"{}\"", path.display());
        let modes =
            |of: &Path, mode| std::fs::set_permissions(of, Permissions::from_mode(mode)).expect("chmod");
        modes(&file, 0o775);
        let why = "can be written to by others than root (mode 0775)";
        expect_refusal(Duration::ZERO, Some(&path), &[name, &quoted(&file), why]);
        modes(&file, 0o755);
        modes(&open, 0o757);
        expect_refusal(Duration::ZERO, Some(&path), &[name, &quoted(&open), "(mode 0757)"]);
        modes(&open, 0o755);
        std::os::unix::fs::chown(&file, Some(1000), None).expect("chown");
        expect_refusal(
            Duration::ZERO,
            Some(&path),
            &[name, &quoted(&file), "belongs to user 1000, not to root"],
        );
        let tool = environment::bin().join("kata-runtime").display().to_string();
        let config = path.display().to_string();
        let check =
            Command::new(&[tool.as_str(), "--config", config.as_str(), "check"]).output().expect_code(1);
        check.expect_error_line(&["belongs to user 1000, not to root"]);
        std::os::unix::fs::chown(&file, Some(0), None).expect("chown");
        std::fs::remove_file(&file).expect("remove");
    }
    before.expect_unchanged();
}

/// A socket's node cannot be opened, and a plain file knows nothing of virtual machines.
#[test]
fn an_unusable_dev_kvm_is_named() {
    let _turn = alone();
    if is_vm() {
        let scratch = Scratch::new();
        let node = scratch.path().join("socket");
        let _listener = UnixListener::bind(&node).expect("a socket");
        for (with, why) in [(node, "No such device or address"), (scratch.file("file", ""), KVM)] {
            let covered = Covered::new(KVM, &with);
            expect_no_start(None, &[KVM, why]);
            let tool = environment::bin().join("kata-runtime").display().to_string();
            let check = Command::new(&[tool.as_str(), "check"]).output().expect_code(1);
            assert!((check.text() + &check.errors()).contains(KVM), "{check}");
            drop(covered);
        }
    }
}

/// The process on the host that is the container, or its machine, stands still: it answers nothing any more.
fn stop(container: &Container) {
    kill(Pid::from_raw(container.pid()), Signal::SIGSTOP).expect("SIGSTOP");
}

#[test]
fn a_container_that_does_not_answer_is_killed_and_removed() {
    let _turn = alone();
    let before = Host::before();
    let events = Events::follow();
    let (stuck, other) = (
        Run::new(BUSYBOX).command(&["sleep", "10000"]).start(),
        Run::new(BUSYBOX).command(&["sleep", "10000"]).start(),
    );
    stop(&stuck);
    // Looking at it comes to an end, and others are looked at.
    stuck.task("metrics", &[]);
    other.task("metrics", &[]).ok();
    other.exec(&["echo", "alive"]).ok().expect_text("alive");
    assert_eq!(stuck.status().as_deref(), Some("RUNNING"));
    stuck.task("kill", &["--signal", "KILL"]).ok();
    let exit = events.wait_for(stuck.id(), "/tasks/exit");
    assert_eq!(exit.body["exit_status"].as_u64(), Some(137), "{exit:?}");
    stuck.wait_for_status(Some("STOPPED"));
    stuck.delete_task(137);
    ctr(&["containers", "delete", stuck.id()]).output().ok();
    drop((events, other));
    before.expect_unchanged();
}

/// What is in it is stopped on the host, and kubelet removes the pod.
#[test]
fn a_pod_that_does_not_answer_is_removed() {
    let _turn = shared();
    let pod = |name: &str| {
        let pod = katana_tests::cri::Pod::run(name);
        let container = pod.sh("sleep 10000");
        (pod, container)
    };
    let handler = if is_vm() { "kata" } else { "runc" };
    let ((stuck, container), (other, lively)) = (pod(handler), pod(handler));
    kill(Pid::from_raw(container.pid()), Signal::SIGSTOP).expect("SIGSTOP");
    assert!(lively.stats().memory.is_some(), "the other pod's metrics");
    container.stop(1).or_else(|_| container.stop(1)).expect("the container stops");
    container.remove().expect("the container is removed");
    stuck.stop().expect("the pod stops");
    stuck.remove().expect("the pod is removed");
    assert_eq!(lively.sh("echo alive").ok().trim(), "alive");
    drop((lively, other));
}
