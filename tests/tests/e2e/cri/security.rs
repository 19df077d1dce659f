//! Security contexts.

use katana_tests::Scratch;
use katana_tests::cri::{Container, Pod, shared_pod};
use serde_json::{Value, json};

use super::cases;
use crate::guest;

cases! {
    /// run_as_user, run_as_group, supplemental_groups
    users_and_groups_are_numbers,
    /// run_as_username, with the groups that the image's files give that user
    a_user_is_found_by_name,
    /// Added to and dropped from the default ones, also all of them
    capabilities_are_added_and_dropped,
    /// RuntimeDefault, Unconfined, Localhost
    seccomp_profiles_are_applied,
    /// A set-user-ID program gains nothing.
    no_new_privileges,
    /// Nothing can be written but to volumes and the container's own tmpfs.
    the_root_is_read_only,
    /// What kubelet hides of /proc and /sys
    paths_are_masked_and_read_only,
    /// Everything is allowed, and nothing is hidden.
    2: a_privileged_container_may_everything,
    /// Whoever is first at the guest's way to the host
    streams_are_not_another_containers,
}

/// A container of the shared pod with this security context.
#[track_caller]
fn with(handler: &str, context: Value) -> Container {
    let mut config = json!({"linux": {}});
    config["linux"]["security_context"] = context;
    shared_pod(handler).start(config)
}

/// A line of /proc/self/status.
#[track_caller]
fn status(container: &Container, name: &str) -> String {
    container.sh(&format!("sed -n 's/^{name}:[[:space:]]*//p' /proc/self/status")).ok().to_owned()
}

fn users_and_groups_are_numbers(handler: &str) {
    let context = json!({"run_as_user": {"value": 1234}, "run_as_group": {"value": 3000}, "supplemental_groups": [4000, 5000]});
    let container = with(handler, context);
    let ids = container.sh("id -u; id -g; id -G").stdout;
    assert_eq!(ids, "1234\n3000\n3000 4000 5000\n");
    assert_eq!(container.sh("echo x > /etc/passwd").code, 1);
}

fn a_user_is_found_by_name(handler: &str) {
    let container = with(handler, json!({"run_as_username": "app"}));
    assert_eq!(container.sh("id -u; id -g; id -G; echo $HOME").stdout, "1000\n1000\n1000 2000\n/home/app\n");
}

fn capabilities_are_added_and_dropped(handler: &str) {
    const DEFAULT: u64 = 0xa804_25fb;
    const SYS_TIME: u64 = 1 << 25;
    const CHOWN: u64 = 1 << 0;
    let effective = |capabilities: Value| {
        let container = with(handler, json!({"capabilities": capabilities}));
        u64::from_str_radix(&status(&container, "CapEff"), 16).unwrap()
    };
    assert_eq!(effective(json!({})), DEFAULT);
    let changed = json!({"add_capabilities": ["SYS_TIME"], "drop_capabilities": ["CHOWN"]});
    assert_eq!(effective(changed), (DEFAULT | SYS_TIME) & !CHOWN);
    assert_eq!(effective(json!({"drop_capabilities": ["ALL"]})), 0);
}

fn seccomp_profiles_are_applied(handler: &str) {
    let unconfined = with(handler, json!({"seccomp": {"profile_type": "Unconfined"}}));
    assert_eq!(status(&unconfined, "Seccomp"), "0");
    let default = with(handler, json!({"seccomp": {"profile_type": "RuntimeDefault"}}));
    assert_eq!(status(&default, "Seccomp"), "2");
    assert_ne!(default.exec(&["unshare", "-m", "true"]).code, 0);
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    let scratch = Scratch::new();
    let file = scratch.file("profile.json", profile.to_string());
    let own = with(handler, json!({"seccomp": {"profile_type": "Localhost", "localhost_ref": file}}));
    let made = own.exec(&["mkdir", "/directory"]);
    assert!(made.code != 0 && made.stderr.contains("No space left on device"), "{made:?}");
}

fn no_new_privileges(handler: &str) {
    let may = with(handler, json!({"run_as_user": {"value": 1000}}));
    assert_eq!(status(&may, "NoNewPrivs"), "0");
    let may_not = with(handler, json!({"run_as_user": {"value": 1000}, "no_new_privs": true}));
    assert_eq!(status(&may_not, "NoNewPrivs"), "1");
}

fn the_root_is_read_only(handler: &str) {
    let container = with(handler, json!({"readonly_rootfs": true}));
    let refused = container.sh("echo x > /file");
    assert!(refused.stderr.contains("Read-only file system"), "{refused:?}");
    container.sh("echo x > /dev/shm/file").ok();
}

fn paths_are_masked_and_read_only(handler: &str) {
    let context = json!({
        "masked_paths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/no-such"],
        "readonly_paths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    let container = with(handler, context);
    assert_eq!(container.sh("cat /proc/timer_list; ls /sys/firmware").ok(), "");
    let refused = container.sh("echo 1 > /proc/sys/vm/drop_caches");
    assert!(refused.stderr.contains("Read-only file system"), "{refused:?}");
}

fn a_privileged_container_may_everything(handler: &str) {
    let pod = Pod::run_with(handler, json!({"linux": {"security_context": {"privileged": true}}}));
    let container = pod.start(json!({"linux": {"security_context": {"privileged": true}}}));
    assert_eq!(status(&container, "CapEff"), "000001ffffffffff");
    assert_eq!(status(&container, "Seccomp"), "0");
    container
        .sh("mount -t tmpfs tmpfs /mnt 2>/dev/null || { mkdir -p /mnt && mount -t tmpfs tmpfs /mnt; }")
        .ok();
    container.sh("mkdir /sys/fs/cgroup/own && rmdir /sys/fs/cgroup/own").ok();
    container.sh("echo 1 > /proc/sys/net/ipv4/ip_forward && echo 0 > /proc/sys/net/ipv4/ip_forward").ok();
    container.sh("test -c /dev/null && echo > /dev/null").ok();
}

/// A container without privileges connects to all vsock ports that the streams of others may have.
fn streams_are_not_another_containers(handler: &str) {
    let pod = Pod::run(handler);
    let program = std::env::current_exe().unwrap();
    let thief = pod.start(json!({
        "command": guest::command("guest::vsock", "/tmp"),
        "mounts": [{"host_path": program, "container_path": guest::PROGRAM, "readonly": true}],
        "linux": {"security_context": {"run_as_user": {"value": 65534}}},
    }));
    thief.wait_for_output("running 1 test");
    let victim = pod.start(json!({}));
    for number in 0..8 {
        assert_eq!(victim.sh(&format!("echo out {number}")).ok(), format!("out {number}"));
        let mut session =
            victim.exec_streaming(&["sh", "-c", "read line; echo \"got $line\""], false).unwrap();
        session.write("a password\n");
        assert_eq!(session.exit_code(), 0);
        assert_eq!(session.stdout, "got a password\n");
    }
    thief.sh("touch /tmp/stop").ok();
    assert_eq!(thief.ended().exit_code, 0, "{}", thief.output());
    assert!(thief.output().contains("1 passed"), "{}", thief.output());
    // It has tried, where the host answers at all.
    let output = thief.output();
    let made = output.contains(" connections") && !output.contains(", 0 connections");
    assert!(handler == "runc" || made, "{output}");
}
