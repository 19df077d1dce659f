//! Machines are restored from a template: what they must not have in common, and what becomes of a template that is no
//! good.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::SystemTime;

use katana_tests::environment::{self, is_vm_or_say};
use katana_tests::host::eventually;
use katana_tests::network::{Bridge, Namespace};
use katana_tests::process::Process;
use katana_tests::turn::{Turn, shared};
use katana_tests::{BUSYBOX, Configuration, Containerd, DEBIAN, Output, Run, Scratch};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// What one machine could have in common with another. A new process's AT_RANDOM decides where its stack is.
const IDENTITIES: &str = "echo urandom=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'); \
    echo getrandom=$(perl -e 'my $b = \"\\0\" x 32; syscall(318, $b, 32, 0); print unpack(\"H*\", $b)'); \
    echo uuid=$(cat /proc/sys/kernel/random/uuid); \
    echo boot_id=$(cat /proc/sys/kernel/random/boot_id); \
    echo stack=$(sed -n 's/ .*\\[stack\\]//p' /proc/self/maps); \
    echo seconds=$(date +%s.%N)";

/// Where the guest's kernel lies in physical memory and runs, and where it has its own memory mapped. Who is privileged
/// may know.
const LAYOUT: &str = "echo text=$(sed -n 's/ T _text$//p' /proc/kallsyms); \
    echo physical=$(sed -n 's/^ *\\([0-9a-f]*\\)-.*Kernel code$/\\1/p' /proc/iomem); \
    echo 1 > /proc/sys/kernel/kptr_restrict; echo vmalloc=$(sed -n '1s/-.*//p' /proc/vmallocinfo)";

type Damage<'a> = &'a dyn Fn(&File);

fn is_vm() -> bool {
    is_vm_or_say("this is about virtual machines")
}

/// Templates of a test's own: their directory, and a configuration that names it.
struct Templates {
    directory: PathBuf,
    configuration: PathBuf,
    _scratch: Scratch,
    _turn: Turn,
}

impl Templates {
    /// None without virtual machines.
    fn new() -> Option<Self> {
        let turn = shared();
        let scratch = is_vm().then(Scratch::new)?;
        let directory = scratch.path().join("templates");
        let configuration = Configuration::installed()
            .set("factory.enable_template", true)
            .set("factory.template_path", directory.display().to_string());
        let configuration = scratch.file("configuration.toml", configuration.to_toml());
        Some(Self { directory, configuration, _scratch: scratch, _turn: turn })
    }

    /// Starts a container, and gives its id.
    fn start(&self) -> String {
        let id = katana_tests::container::new_id();
        Run::new(BUSYBOX).id(&id).configuration(&self.configuration).command(&["true"]).output().ok();
        id
    }

    /// The only template there.
    fn only(&self) -> PathBuf {
        let mut files = fs::read_dir(&self.directory).expect("templates").flatten().map(|entry| entry.path());
        let file = files.next().expect("a template");
        assert_eq!(files.next(), None);
        file
    }

    /// Starts a container, for which no template is of use, and which says so once.
    fn start_without(&self, why: &str) {
        let id = self.start();
        // containerd copies a shim's log when it comes to it.
        eventually(|| !warnings(&id).is_empty());
        let warnings = warnings(&id);
        assert_eq!(warnings.len(), 1, "{why}: {warnings:?}");
    }
}

/// Where containerd's log warns that there was no use for a template, in the words of one container's shim.
fn warnings(id: &str) -> Vec<String> {
    let log = fs::read(Containerd::current().log()).expect("containerd's log");
    let text = String::from_utf8_lossy(&log);
    let own = format!(" sandbox={id}");
    text.lines()
        .filter(|line| line.contains("level=warning") && line.contains("template: ") && line.ends_with(&own))
        .map(str::to_owned)
        .collect()
}

#[test]
fn machines_from_one_template_have_nothing_in_common() {
    let _turn = shared();
    if !is_vm() {
        return;
    }
    let mut seen = BTreeSet::new();
    let count = environment::rounds(20);
    for _ in 0..count {
        let before = SystemTime::now();
        let output = Run::new(DEBIAN).sh(IDENTITIES).output().ok();
        check_clock(&output, before);
        for label in ["urandom", "getrandom", "uuid", "boot_id", "stack"] {
            let value = output.value(label).unwrap_or_default();
            assert!(
                value.len() >= 16 && seen.insert((label, value)),
                "{label} has been seen before\n{output}"
            );
        }
    }
}

/// Without a template, for all that come from one have the kernel that this has booted.
#[test]
fn each_boot_has_its_own_layout() {
    let _turn = shared();
    if !is_vm() {
        return;
    }
    let boot = |parameters: &str| {
        let configuration = Configuration::installed()
            .set("factory.enable_template", false)
            .set("hypervisor.katana.kernel_params", parameters);
        let scratch = Scratch::new();
        let configuration = scratch.file("configuration.toml", configuration.to_toml());
        Run::new(BUSYBOX).configuration(&configuration).options("--privileged").sh(LAYOUT).output().ok()
    };
    let linked = [("text", "ffffffff81000000"), ("physical", "01000000"), ("vmalloc", "0xffffc90000000000")];
    boot("nokaslr").expect_values(&linked);
    let boots = [boot(""), boot(""), boot("")];
    for (what, without) in linked {
        // Of at least two hundred places each, so that one of 40,000 runs of this test may find three times the same.
        let seen: BTreeSet<_> = boots.iter().map(|output| output.value(what).expect(what)).collect();
        assert!(seen.len() > 1, "{what}: {seen:?}");
        assert!(seen.iter().all(|place| place.len() == without.len()), "{what}: {seen:?}");
    }
}

/// The guest's time, in seconds, is one between then and now, give or take 50 ms.
fn check_clock(output: &Output, then: SystemTime) {
    let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs_f64();
    let guest: f64 = output.value("seconds").and_then(|text| text.parse().ok()).unwrap_or_default();
    let (first, last) = (since(then) - 0.05, since(SystemTime::now()) + 0.05);
    assert!((first..last).contains(&guest), "{guest} is not between {first} and {last}\n{output}");
}

/// In a machine that becomes a template, time passes at once, so that its kernel does what it has put off.
#[test]
fn clocks_are_right_where_time_has_passed_at_once() {
    let Some(own) = Templates::new() else { return };
    // The one that becomes the template, and one that comes from it.
    for _ in 0..2 {
        let before = SystemTime::now();
        let ask = "echo seconds=$(date +%s.%N); echo uptime=$(cut -d ' ' -f 1 /proc/uptime)";
        let output = Run::new(DEBIAN).configuration(&own.configuration).sh(ask).output().ok();
        own.only();
        check_clock(&output, before);
        let uptime: f64 = output.value("uptime").and_then(|text| text.parse().ok()).unwrap_or_default();
        // Several times three seconds, far more than a boot takes.
        assert!(uptime >= 12.0, "{output}");
    }
}

/// Those that come from a template share the guest's code, in pages that are quickly mapped.
#[test]
fn code_of_the_guest_is_in_huge_pages() {
    let Some(own) = Templates::new() else { return };
    fs::create_dir(&own.directory).expect("mkdir");
    mount(Some("templates"), &own.directory, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))
        .expect("mount");
    own.start();
    own.only();
    let container = Run::new(BUSYBOX).configuration(&own.configuration).command(&["sleep", "10000"]).start();
    let rollup = format!("/proc/{}/smaps_rollup", Process::vmm_of(container.id()).pid);
    let rollup = fs::read_to_string(rollup).expect("the VMM's memory");
    umount2(&own.directory, MntFlags::MNT_DETACH).expect("unmount");
    let huge = rollup.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap_or_default();
    let kib: u64 = huge.trim().trim_end_matches(" kB").parse().unwrap_or_default();
    // What Linux 6.12 can, with transparent huge pages, on a tmpfs; 6.1 did not.
    assert!(kib >= 4096, "{rollup}");
}

/// The machine of which a template is made has NICs, CPUs, memory and a disk of its own afterwards.
#[test]
fn a_template_has_nothing_of_the_machine_that_it_is_made_of() {
    const SHOW: &str = "echo net=$(ls /sys/class/net) cpus=$(nproc); \
        awk '/MemTotal/ {print \"mib=\" int($2 / 1024)}' /proc/meminfo; echo disks=$(ls /sys/block | grep ^vd | wc -l)";
    let Some(own) = Templates::new() else { return };
    let bridge = Bridge::new(1500);
    let namespace = Namespace::new();
    bridge.connect(namespace.name(), "eth0", 2);
    let address = &bridge.addresses(1)[0];
    let plain = || Run::new(BUSYBOX).configuration(&own.configuration).sh(SHOW).output();
    let large = || {
        let options = format!("{} --cpus 2 --memory-limit 1073741824", namespace.option());
        let ask = format!("{SHOW}; ping -c 3 -w 20 {address} > /dev/null && echo ping=ok");
        Run::new(BUSYBOX).configuration(&own.configuration).options(&options).sh(&ask).output()
    };
    let before = Run::new(BUSYBOX).sh(SHOW).output();
    let first = large().ok().expect_values(&[("ping", "ok")]);
    own.only();
    assert_eq!(plain().ok().text(), before.ok().text());
    let after = large().ok().expect_values(&[("ping", "ok")]);
    assert_eq!(after.text(), first.text());
}

#[test]
fn a_template_that_is_no_good_is_not_used() {
    let Some(own) = Templates::new() else { return };
    own.start();
    let file = own.only();
    let open = || File::options().read(true).write(true).open(&file).expect("the template");
    let length = open().metadata().expect("the template").len();
    let damage: [(&str, Damage<'_>); 3] = [
        ("a flipped bit in memory", &|file| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 17 << 20).expect("read");
            file.write_all_at(&[byte[0] ^ 4], 17 << 20).expect("write");
        }),
        ("a flipped bit in the state", &|file| file.write_all_at(&[0xa5], length - 100).expect("write")),
        ("cut", &|file| file.set_len(length - 1).expect("cut")),
    ];
    for (what, damage) in damage {
        damage(&open());
        own.start_without(what);
        assert!(!file.exists(), "{what}");
        // The next one makes another.
        own.start();
        assert_eq!(own.only(), file, "{what}");
    }
    assert_eq!(warnings(&own.start()), [""; 0]);
}

#[test]
fn a_template_that_another_makes_is_not_waited_for() {
    let Some(own) = Templates::new() else { return };
    own.start();
    let file = own.only();
    let mut part = file.clone().into_os_string();
    part.push(".part");
    fs::rename(&file, &part).expect("rename");
    let other = File::open(&part).expect("the other's file");
    let lock = Flock::lock(other, FlockArg::LockExclusive).map_err(|(_, e)| e).expect("lock");
    own.start();
    assert!(!file.exists());
    // It has ended in the middle.
    drop(lock);
    own.start();
    assert_eq!(own.only(), file);
}

#[test]
fn a_full_disk_is_no_obstacle() {
    let Some(own) = Templates::new() else { return };
    fs::create_dir(&own.directory).expect("mkdir");
    mount(Some("full"), &own.directory, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).expect("mount");
    own.start_without("the disk is full");
    let left: Vec<_> = fs::read_dir(&own.directory).expect("templates").flatten().collect();
    umount2(&own.directory, MntFlags::MNT_DETACH).expect("unmount");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_directory_that_takes_no_template_is_no_obstacle() {
    let Some(own) = Templates::new() else { return };
    // In the place of the directory is a file.
    fs::write(&own.directory, "").expect("write");
    own.start_without("a file is in its place");
}

/// Whoever can write to a template is in all machines that are restored from it.
#[test]
fn templates_that_others_can_change_are_of_no_use() {
    let Some(own) = Templates::new() else { return };
    own.start();
    let file = own.only();
    for (path, mode) in [(&file, 0o606), (&own.directory, 0o707)] {
        let before = fs::metadata(path).expect("metadata").permissions();
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
        own.start_without("others can write to it");
        fs::set_permissions(path, before).expect("chmod");
    }
    // Somebody has made the directory before the first start.
    fs::remove_dir_all(&own.directory).expect("remove");
    fs::create_dir(&own.directory).expect("make the directory");
    std::os::unix::fs::chown(&own.directory, Some(1000), None).expect("chown");
    own.start_without("another user has made the directory");
    assert_eq!(fs::read_dir(&own.directory).expect("templates").count(), 0);
}
