//! The pod's machine is as large as its containers' limits need, and gives back what it does not use.

use katana_tests::environment::{self, is_vm_or_say};
use katana_tests::host::eventually;
use katana_tests::process::Process;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Configuration, Run, Scratch};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const MIB: u64 = 1 << 20;
const REPORT: &str =
    "echo cpus=$(nproc); echo kib=$(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";

#[test]
fn without_limits_it_is_the_configured_one() {
    let _turn = shared();
    if is_vm_or_say("this is about virtual machines") {
        let output = Run::new(BUSYBOX).sh(REPORT).output().ok();
        output.expect_values(&[("cpus", "1")]);
    }
}

#[test]
fn a_pod_sets_its_size_by_annotations_that_are_allowed() {
    let _turn = shared();
    if !is_vm_or_say("this is about virtual machines") {
        return;
    }
    let annotated = |key: &str, value: &str| {
        let options = format!("--annotation io.katacontainers.config.hypervisor.{key}={value}");
        Run::new(BUSYBOX).options(&options).sh(REPORT).output()
    };
    let output = annotated("default_memory", "200").ok();
    let kib: u64 = output.value("kib").and_then(|value| value.parse().ok()).unwrap_or_default();
    assert!((150 * MIB..200 * MIB).contains(&(kib << 10)), "{output}");
    let output = annotated("default_maxvcpus", "1");
    assert_ne!(output.code, 0, "{output}");
    output.expect_error_line(&["annotation", "default_maxvcpus", "not in enable_annotations"]);
    // Without it the pod has no less.
    annotated("enable_debug", "true").ok().expect_values(&[("cpus", "1")]);
}

#[test]
fn limits_add_processors_and_memory() {
    let _turn = shared();
    if !is_vm_or_say("this is about virtual machines") {
        return;
    }
    let scratch = Scratch::new();
    let small = Configuration::installed().set("hypervisor.katana.default_memory", 128).to_toml();
    let small = scratch.file("configuration.toml", small);
    // More than the base has, all of it used.
    let fill = "head -c 188743680 /dev/zero > /dev/shm/block && echo filled=$(stat -c %s /dev/shm/block)";
    let options =
        "--cpus 1.5 --memory-limit 268435456 --mount type=tmpfs,src=tmpfs,dst=/dev/shm,options=size=200m";
    let run = Run::new(BUSYBOX).configuration(&small).options(options);
    let output = run.sh(&format!("{REPORT}; {fill}")).output().ok();
    let kib: u64 = output.value("kib").and_then(|value| value.parse().ok()).unwrap_or_default();
    assert!((330 * MIB..384 * MIB).contains(&(kib << 10)), "128 MiB and a limit of 256\n{output}");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(2).to_string();
    output.expect_values(&[("cpus", &cpus), ("filled", "188743680")]);
}

/// A file of the cgroup in which the host has the container, as a number if it holds one.
fn on_host(pid: i32, file: &str) -> Option<u64> {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let text = std::fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[test]
fn limits_bound_what_it_costs_the_host() {
    const LIMIT: u64 = 64 * MIB;
    let _turn = shared();
    let start = |options: &str| Run::new(BUSYBOX).options(options).command(&["sleep", "10000"]).start();
    let limited = start(&format!("--cpus 0.5 --memory-limit {LIMIT}"));
    let (memory, cpu) = (on_host(limited.pid(), "memory.max"), on_host(limited.pid(), "cpu.max"));
    if environment::is_vm() {
        // All of the machine, and some more, but not the host's memory; whole CPUs.
        assert!(memory.is_some_and(|bytes| (LIMIT + 512 * MIB..1536 * MIB).contains(&bytes)), "{memory:?}");
        assert_eq!(cpu, Some(100_000));
    } else {
        assert_eq!((memory, cpu), (Some(LIMIT), Some(50_000)));
    }
    let free = start("");
    assert_eq!(on_host(free.pid(), "cpu.max"), None);
    let (memory, pids) = (on_host(free.pid(), "memory.max"), on_host(free.pid(), "pids.max"));
    if environment::is_vm() {
        // Nobody has set a limit, but a machine has a size.
        assert!(memory.is_some_and(|bytes| bytes > 512 * MIB && bytes < 8192 * MIB), "{memory:?}");
        assert!(pids.is_some_and(|pids| pids > 254), "{pids:?}");
        let scratch = Scratch::new();
        let tmpfs = scratch.directory("tmpfs");
        mount(Some("tmpfs"), &tmpfs, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).expect("tmpfs");
        let run = Run::new(BUSYBOX).bind(&tmpfs, "/mnt", "rw").command(&["sleep", "10000"]).start();
        let memory = on_host(run.pid(), "memory.max");
        drop(run);
        umount2(&tmpfs, MntFlags::MNT_DETACH).expect("unmount");
        assert_eq!(memory, None, "with a volume in memory, whose size is its mount's");
    } else {
        assert_eq!((memory, pids), (None, None));
    }
}

/// The memory of the host that a container can fill beside that of its machine.
#[test]
fn a_tmpfs_of_the_host_counts_for_who_fills_it() {
    let _turn = shared();
    let scratch = Scratch::new();
    let tmpfs = scratch.directory("tmpfs");
    mount(Some("tmpfs"), &tmpfs, Some("tmpfs"), MsFlags::empty(), Some("size=500m")).expect("tmpfs");
    let small = Configuration::installed().set("hypervisor.katana.default_memory", 64).to_toml();
    let small = scratch.file("configuration.toml", small);
    let run = |megabytes: u32| {
        let fill = format!("dd if=/dev/zero of=/mnt/file bs=1M count={megabytes} && echo filled");
        let run = Run::new(BUSYBOX).configuration(&small).options("--memory-limit 33554432");
        run.bind(&tmpfs, "/mnt", "rw").sh(&fill).output()
    };
    let little = run(10);
    let much = run(450);
    umount2(&tmpfs, MntFlags::MNT_DETACH).expect("unmount");
    little.ok().expect_text("filled");
    assert!(much.code != 0 && !much.text().contains("filled"), "{much}");
}

#[test]
fn processors_that_are_not_used_are_not_there() {
    let _turn = shared();
    if !is_vm_or_say("this is about virtual machines") {
        return;
    }
    let threads = |options: &str| {
        let container = Run::new(BUSYBOX).options(options).command(&["sleep", "10000"]).start();
        let tasks = format!("/proc/{}/task", Process::vmm_of(container.id()).pid);
        let tasks = std::fs::read_dir(tasks).expect("the VMM's threads").flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "vcpu").count()
    };
    assert_eq!(threads(""), 1);
    let two = std::thread::available_parallelism().map_or(1, usize::from).min(2);
    assert_eq!(threads("--cpus 2"), two);
}

#[test]
fn freed_memory_goes_back_to_the_host() {
    let _turn = shared();
    if !is_vm_or_say("this is about virtual machines") {
        return;
    }
    let options = "--mount type=tmpfs,src=tmpfs,dst=/dev/shm,options=size=300m";
    let container = Run::new(BUSYBOX).options(options).command(&["sleep", "10000"]).start();
    let vmm = Process::vmm_of(container.id());
    let resident = || {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vmm.pid)).unwrap_or_default();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() << 10
    };
    let before = resident();
    container.sh("head -c 209715200 /dev/zero > /dev/shm/block").ok();
    let full = resident();
    assert!(full > before + 190 * MIB, "{before} bytes before and {full} after 200 MiB were written");
    container.sh("rm /dev/shm/block").ok();
    assert!(eventually(|| resident() < before + 60 * MIB), "{} bytes stay of {full}", resident());
}
