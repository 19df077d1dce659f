//! What the guest's kernel can do, and what a container's kernel is expected to.

use std::fs::{self, File};
use std::process::Command;

use katana_tests::environment::{is_vm, is_vm_or_say};
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Configuration, DEBIAN, Output, Run, Scratch};

/// Tunnels and other virtual interfaces, protocols, ciphers; see there.
const CHECKS: &str = include_str!("kernel.py");

/// What [`CHECKS`] look at.
const CHECKED: &[&str] = &[
    "bridge",
    "dummy",
    "geneve",
    "gre",
    "gretap",
    "ifb",
    "ip6gre",
    "ip6tnl",
    "ipip",
    "sit",
    "vrf",
    "vxlan",
    "wireguard",
    "hash",
    "cipher",
    "sctp",
    "mptcp",
    "tls",
];
/// What of it only the full kernel can, and a host's.
const CHECKED_FULL: &[&str] = &["bond", "esp"];

/// All of them are ok.
fn expect_all(output: Output, names: &[&[&str]]) {
    let expected: Vec<_> = names.iter().copied().flatten().map(|name| (*name, "ok")).collect();
    output.expect_values(&expected);
}

#[test]
fn network_plugins_and_vpns_find_what_they_need() {
    let _turn = shared();
    let output = Run::new(DEBIAN).options("--privileged").command(&["python3", "-c", CHECKS]).output().ok();
    expect_all(output, if is_vm() { &[CHECKED] } else { &[CHECKED, CHECKED_FULL] });
}

/// On a host the modules come when they are asked for, and their tunnels with them. Here they are always there.
#[test]
fn drivers_bring_no_interfaces() {
    let _turn = shared();
    for options in ["", "--privileged"] {
        let output = Run::new(BUSYBOX).options(options).sh("echo links=$(ls /sys/class/net)").output().ok();
        output.expect_values(&[("links", "lo")]);
    }
    if is_vm() {
        // A namespace that a container engine in the container makes.
        let script = "echo links=$(unshare -n cat /proc/net/dev | grep -c :)";
        let output = Run::new(BUSYBOX).options("--privileged").sh(script).output().ok();
        output.expect_values(&[("links", "1")]);
    }
}

/// A host loads modules for them when they are used, and lists them only then.
#[test]
fn packet_filters_and_file_systems_are_there() {
    let _turn = shared();
    if !is_vm_or_say("a host's kernel has modules") {
        return;
    }
    let script = "for match in time set policy esp ipvs dscp helper connbytes recent physdev; do \
            grep -qx $match /proc/net/ip_tables_matches && echo $match=ok; done; \
        for target in TEE MARK CONNMARK DSCP TRACE; do \
            grep -qx $target /proc/net/ip_tables_targets && echo $target=ok; done; \
        head -1 /proc/net/ip_vs | grep -q 'IP Virtual Server' && echo virtual=ok; \
        for kind in nfs nfs4 cifs; do grep -qw $kind /proc/filesystems && echo $kind=ok; done; \
        echo last=$(cat /sys/devices/system/cpu/kernel_max)";
    let output = Run::new(BUSYBOX).options("--privileged").sh(script).output().ok();
    for name in [
        "time",
        "set",
        "ipvs",
        "dscp",
        "helper",
        "connbytes",
        "recent",
        "physdev",
        "TEE",
        "MARK",
        "CONNMARK",
        "DSCP",
        "TRACE",
        "virtual",
        "nfs",
        "nfs4",
        "cifs",
    ] {
        assert_eq!(output.value(name).as_deref(), Some("ok"), "{name}\n{output}");
    }
    // 254 CPUs, from 0 on.
    output.expect_values(&[("last", "253")]);
}

#[test]
fn a_privileged_container_mounts_an_image() {
    let _turn = shared();
    if !is_vm() {
        // Debian's kernel has it as a module, and a container what there is when it starts.
        let loaded = Command::new("modprobe").args(["loop", "max_loop=8"]).status().expect("modprobe");
        assert!(loaded.success());
    }
    let scratch = Scratch::new();
    let image = scratch.file("image", "");
    File::options().write(true).open(&image).and_then(|file| file.set_len(8 << 20)).expect("make room");
    let made = Command::new("mkfs.ext4").arg("-q").arg(&image).status().expect("mkfs.ext4");
    assert!(made.success());
    let script = "set -e; cp /image /tmp/image; mkdir -p /tmp/one /tmp/two; mount -o loop /tmp/image /tmp/one; echo inside > /tmp/one/file; umount /tmp/one; \
        device=$(/sbin/losetup --find --show --read-only /tmp/image); mount -o ro $device /tmp/two; \
        echo read=$(cat /tmp/two/file); umount /tmp/two; /sbin/losetup --detach $device; \
        echo control=$(stat -c '%t:%T' /dev/loop-control); echo first=$(stat -c '%t:%T' /dev/loop0)";
    let output =
        Run::new(DEBIAN).options("--privileged").bind(&image, "/image", "ro").sh(script).output().ok();
    output.expect_values(&[("read", "inside"), ("control", "a:ed"), ("first", "7:0")]);
    let output = Run::new(DEBIAN).sh("echo loops=$(ls /dev | grep -c loop)").output().ok();
    output.expect_values(&[("loops", "0")]);
}

/// Linux would turn them off in such small machines.
#[test]
fn huge_pages_come_by_themselves_as_on_the_host() {
    let _turn = shared();
    const FILES: [&str; 3] = ["enabled", "defrag", "shmem_enabled"];
    const DIRECTORY: &str = "/sys/kernel/mm/transparent_hugepage";
    let script = format!(
        "for file in {}; do echo $file=\"$(sed 's/.*\\[//; s/\\].*//' {DIRECTORY}/$file)\"; done; \
        python3 -c 'import mmap, re; \
m = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); \
m.madvise(mmap.MADV_HUGEPAGE); m.write(b\"x\" * (32 << 20)); \
print(\"huge=\" + re.search(\"AnonHugePages: *([0-9]+)\", open(\"/proc/self/smaps_rollup\").read())[1])'",
        FILES.join(" ")
    );
    let scratch = Scratch::new();
    for (name, memory, template) in [("booted", 200, false), ("first", 256, true), ("restored", 256, true)] {
        let configuration = Configuration::installed()
            .set("hypervisor.katana.default_memory", memory)
            .set("factory.enable_template", template)
            .set("factory.template_path", scratch.path().join("templates").display().to_string());
        let file = scratch.file("configuration.toml", configuration.to_toml());
        let run = Run::new(DEBIAN).sh(&script);
        let output = if is_vm() { run.configuration(&file) } else { run }.output().ok();
        let mut host = String::new();
        for file in FILES {
            let choices = fs::read_to_string(format!("{DIRECTORY}/{file}")).expect("the host's choice");
            let chosen = choices.split(['[', ']']).nth(1).expect("one of several").to_owned();
            assert_eq!(output.value(file).as_ref(), Some(&chosen), "{name}: {file}\n{output}");
            host.push_str(&chosen);
        }
        let huge: u64 = output.value("huge").and_then(|kib| kib.parse().ok()).unwrap_or_default();
        assert!(host.starts_with("never") || huge >= 2048, "{name}\n{output}");
    }
}

/// What Falco, Tetragon and bpftrace start with.
#[test]
fn the_full_kernel_can_be_looked_into() {
    let _turn = shared();
    if !is_vm_or_say("it would change the tracing of the machine") {
        return;
    }
    let scratch = Scratch::new();
    let installed = Configuration::installed();
    let kernel = katana_tests::environment::bin().join("../share/kata-containers/vmlinux-full.container");
    let Ok(kernel) = kernel.canonicalize() else {
        return katana_tests::environment::say_skipped("the full kernel is not built: KATANA_FULL_KERNEL=1");
    };
    let configuration = installed
        .set("hypervisor.katana.kernel", kernel.display().to_string())
        .set("factory.enable_template", false);
    let file = scratch.file("configuration.toml", configuration.to_toml());
    let script = "set -e; test $(stat -c %s /sys/kernel/btf/vmlinux) -gt 1000000; mount -t tracefs none /sys/kernel/tracing; \
        cd /sys/kernel/tracing; echo 'p:kprobes/opened do_sys_openat2' > kprobe_events; \
        echo 1 > events/kprobes/opened/enable; echo 1 > events/syscalls/sys_enter_newuname/enable; uname; \
        grep -q 'opened: (do_sys_openat2' trace && echo kprobe=ok; grep -q sys_newuname trace && echo event=ok; \
        echo 0 > events/kprobes/opened/enable; \
        echo 'p:uprobes/entered /bin/busybox:0x1000' > uprobe_events && echo uprobe=ok; \
        grep -q 'schedule$' available_filter_functions && echo functions=ok";
    let run = Run::new(BUSYBOX).configuration(&file).options("--privileged");
    let output = run.sh(script).patiently().output().ok();
    output.expect_values(&[("kprobe", "ok"), ("event", "ok"), ("uprobe", "ok"), ("functions", "ok")]);
    // All that the other one can.
    let run = Run::new(DEBIAN).configuration(&file).options("--privileged");
    let output = run.command(&["python3", "-c", CHECKS]).output().ok();
    expect_all(output, &[CHECKED, CHECKED_FULL]);
}
