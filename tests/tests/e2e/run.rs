//! `ctr run` and its options.

use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Bundle, CGROUP_MOUNT, ENTER_CGROUP, Run, Scratch, ctr};

use crate::guest;

#[test]
fn exit_codes_are_those_of_the_process() {
    let _turn = shared();
    for code in [0, 1, 42, 255] {
        Run::new(BUSYBOX).sh(&format!("exit {code}")).output().expect_code(code);
    }
}

#[test]
fn death_by_sigkill_is_137() {
    let _turn = shared();
    // The first process of a pid namespace cannot kill itself: its child does that, and it passes the news on.
    Run::new(BUSYBOX).sh("sh -c 'kill -KILL $$'; exit $?").output().expect_code(137);
}

#[test]
fn signals_reach_the_process_by_name_and_by_number() {
    let _turn = shared();
    let id = katana_tests::container::new_id();
    let script = "trap 'echo got TERM' TERM; trap 'echo got USR1' USR1; trap 'echo got HUP' HUP
        echo ready; while :; do sleep 1000 & wait $!; done";
    let running = Run::new(BUSYBOX).id(&id).sh(script).spawn();
    running.wait_for("ready");
    for (signal, name) in [("SIGTERM", "TERM"), ("USR1", "USR1"), ("1", "HUP")] {
        ctr(&["tasks", "kill", "--signal", signal, &id]).output().ok();
        running.wait_for(&format!("got {name}"));
    }
    ctr(&["tasks", "kill", "--signal", "SIGKILL", &id]).output().ok();
    running.finish().expect_code(137);
}

#[test]
fn a_killed_sleep_ends_its_container() {
    let _turn = shared();
    let container = Run::new(BUSYBOX).command(&["sleep", "1000"]).start();
    container.task("kill", &["--signal", "SIGKILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
}

#[test]
fn environment_working_directory_and_host_name() {
    let _turn = shared();
    let script =
        "echo greeting=$GREETING; echo empty=${EMPTY-unset}; echo cwd=$(pwd); echo hostname=$(hostname)
        echo domain=$(cat /proc/sys/kernel/hostname)";
    Run::new(BUSYBOX)
        .env("GREETING=good day, world")
        .env("EMPTY=")
        .options("--cwd /home/app --hostname box.example")
        .sh(script)
        .output()
        .ok()
        .expect_values(&[
            ("greeting", "good day, world"),
            ("empty", ""),
            ("cwd", "/home/app"),
            ("hostname", "box.example"),
            ("domain", "box.example"),
        ]);
}

#[test]
fn users_by_name_and_by_number_with_their_groups() {
    let _turn = shared();
    let script = "echo uid=$(id -u); echo gid=$(id -g); echo groups=$(grep ^Groups: /proc/self/status | cut -f 2)
        echo file=$(touch /tmp/f && stat -c %u:%g /tmp/f); touch /root/f 2>/dev/null && echo root=open || echo root=shut";
    // user, uid, gid, groups: app is also in the group extra, 2000, by /etc/group
    let cases = [
        ("app", "1000", "1000", "1000 2000"),
        ("1000:2000", "1000", "2000", "1000 2000"),
        ("4711", "4711", "0", "0"),
    ];
    for (user, uid, gid, groups) in cases {
        let output = Run::new(BUSYBOX).options(&format!("--user {user}")).sh(script).output().ok();
        let file = format!("{uid}:{gid}");
        let output = output.expect_values(&[("uid", uid), ("gid", gid), ("file", &file), ("root", "shut")]);
        let found = output.value("groups").unwrap_or_default();
        // containerd's releases differ in whether the first group is among the additional ones.
        let extra = |groups: &str| {
            groups.split(' ').filter(|g| *g != gid && *g != uid).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(extra(&found), extra(groups), "additional groups of {user}\n{output}");
    }
}

#[test]
fn a_read_only_root_refuses_every_write() {
    let _turn = shared();
    let script =
        "for f in /file /tmp/file /etc/file; do touch $f 2>&1; done; touch /dev/shm/file && echo shm=open
        echo changed > /etc/passwd; echo code=$?; chmod 777 /tmp 2>&1; echo code2=$?";
    let output = Run::new(BUSYBOX).options("--read-only").sh(script).output().ok();
    let refused = output.text().matches("Read-only file system").count();
    assert_eq!(refused, 4, "three touches and one chmod must fail\n{output}");
    output.expect_values(&[("code", "1"), ("code2", "1"), ("shm", "open")]);
}

#[test]
fn mounts_bind_writable_bind_read_only_and_tmpfs() {
    let _turn = shared();
    let scratch = Scratch::new();
    let (writable, read_only) = (scratch.directory("writable"), scratch.directory("read-only"));
    let single = scratch.file("single", "one file\n");
    scratch.file("writable/from-host", "hello from outside\n");
    scratch.file("read-only/from-host", "look, do not touch\n");
    let script = "echo read=$(cat /rw/from-host); echo hello from inside > /rw/from-container; chown 7:8 /rw/from-container
        echo ro=$(cat /ro/from-host); touch /ro/new 2>&1; echo touch=$?
        echo single=$(cat /etc/single); echo more >> /etc/single
        echo tmpfs=$(grep ' /scratch ' /proc/mounts | cut -d ' ' -f 3)
        echo size=$(df -k /scratch | tail -1 | awk '{print $2}'); echo ok > /scratch/file; echo kept=$(cat /scratch/file)";
    let output = Run::new(BUSYBOX)
        .bind(&writable, "/rw", "rw")
        .bind(&read_only, "/ro", "ro")
        .bind(&single, "/etc/single", "rw")
        .options("--mount type=tmpfs,src=tmpfs,dst=/scratch,options=size=8m:mode=1777")
        .sh(script)
        .output()
        .ok();
    assert!(output.text().contains("Read-only file system"), "{output}");
    output.expect_values(&[
        ("read", "hello from outside"),
        ("ro", "look, do not touch"),
        ("touch", "1"),
        ("single", "one file"),
        ("tmpfs", "tmpfs"),
        ("size", "8192"),
        ("kept", "ok"),
    ]);
    let written = writable.join("from-container");
    assert_eq!(std::fs::read_to_string(&written).expect("the container's file"), "hello from inside\n");
    let data = std::os::unix::fs::MetadataExt::uid(&written.metadata().expect("its metadata"));
    assert_eq!(data, 7, "the owner that the container gave");
    assert_eq!(std::fs::read_to_string(&single).expect("the single file"), "one file\nmore\n");
}

#[test]
fn memory_and_cpu_limits_are_in_the_containers_cgroup() {
    let _turn = shared();
    let script = format!("{ENTER_CGROUP}; echo memory=$(cat memory.max); echo cpu=$(cat cpu.max)");
    Run::new(BUSYBOX)
        .options(CGROUP_MOUNT)
        .options("--memory-limit 67108864 --cpus 0.5")
        .sh(&script)
        .output()
        .ok()
        .expect_values(&[("memory", "67108864"), ("cpu", "50000 100000")]);
}

/// `ctr run` has no option for these: a whole specification has, and a root file system that is a plain directory.
#[test]
fn limits_and_settings_that_only_a_specification_can_give() {
    let _turn = shared();
    let script = "echo pids=$(cat /sys/fs/cgroup/pids.max); echo low=$(cat /sys/fs/cgroup/memory.low)
        echo files=$(ulimit -n); echo hard=$(ulimit -Hn); echo oom=$(cat /proc/self/oom_score_adj)
        echo sysctl=$(cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '); echo umask=$(umask); echo root=$(cat /proc/self/cgroup)
        echo masked=$(wc -c < /proc/version); touch /proc/sys/kernel/domainname 2>/dev/null || echo readonly=yes
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 5 & done 2>&1; echo unreachable=no";
    let mut bundle = Bundle::new(script);
    let spec = &mut bundle.spec;
    spec["process"]["rlimits"] = serde_json::json!([{"type": "RLIMIT_NOFILE", "soft": 333, "hard": 444}]);
    spec["process"]["oomScoreAdj"] = 123.into();
    spec["process"]["user"]["umask"] = 0o027.into();
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.push(serde_json::json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.push(serde_json::json!({"type": "cgroup"}));
    spec["linux"]["sysctl"] = serde_json::json!({"net.ipv4.ip_local_port_range": "20000 30000"});
    spec["linux"]["maskedPaths"] = serde_json::json!(["/proc/version"]);
    spec["linux"]["resources"]["pids"] = serde_json::json!({"limit": 17});
    spec["linux"]["resources"]["unified"] = serde_json::json!({"memory.low": "1048576"});
    let output = bundle.run().spawn().finish();
    let output = output.expect_values(&[
        ("pids", "17"),
        ("low", "1048576"),
        ("root", "0::/"),
        ("files", "333"),
        ("hard", "444"),
        ("oom", "123"),
        ("sysctl", "20000 30000"),
        ("umask", "0027"),
        ("masked", "0"),
        ("readonly", "yes"),
    ]);
    assert!(output.text().contains("an't fork"), "the seventeenth process must be refused\n{output}");
}

#[test]
fn capabilities_are_the_default_ones_plus_and_minus() {
    let _turn = shared();
    // The fourteen that containerd gives, as their bits: capabilities(7), linux/capability.h.
    const DEFAULT: u64 = 0xa804_25fb;
    const CHOWN: u64 = 1 << 0;
    const SYS_TIME: u64 = 1 << 25;
    let script = "for set in CapPrm CapEff CapBnd CapInh NoNewPrivs Seccomp; do
        echo $set=$(grep ^$set: /proc/self/status | cut -f 2); done
        touch /f; chown 1:1 /f 2>/dev/null; echo chown=$?; unshare -U true; echo userns=$?";
    let bits = |set: u64| format!("{set:016x}");
    let changed = (DEFAULT | SYS_TIME) & !CHOWN;
    for (options, set, chown) in
        [("", DEFAULT, "0"), ("--cap-add CAP_SYS_TIME --cap-drop CAP_CHOWN", changed, "1")]
    {
        let output = Run::new(BUSYBOX).options(options).sh(script).output().ok();
        output.expect_values(&[
            ("CapPrm", &bits(set)),
            ("CapEff", &bits(set)),
            ("CapBnd", &bits(set)),
            ("NoNewPrivs", "1"),
            ("chown", chown),
            // The counterpart of the seccomp profile's test below: without a profile, this is allowed.
            ("Seccomp", "0"),
            ("userns", "0"),
        ]);
    }
}

#[test]
fn an_ordinary_user_has_no_capability() {
    let _turn = shared();
    let script =
        "for set in CapPrm CapEff CapAmb; do echo $set=$(grep ^$set: /proc/self/status | cut -f 2); done";
    let none = "0000000000000000";
    let output = Run::new(BUSYBOX).options("--user app").sh(script).output().ok();
    output.expect_values(&[("CapPrm", none), ("CapEff", none), ("CapAmb", none)]);
}

#[test]
fn the_default_seccomp_profile_is_enforced() {
    let _turn = shared();
    let script = "echo Seccomp=$(grep ^Seccomp: /proc/self/status | cut -f 2)
        unshare -U true; echo userns=$?; exec /check --ignored --test-threads=1 guest::seccomp";
    let output = guest::mounted(Run::new(BUSYBOX).options("--seccomp")).sh(script).output();
    // SECCOMP_MODE_FILTER
    guest::expect_passed(output.expect_values(&[("Seccomp", "2"), ("userns", "1")]));
}

#[test]
fn a_privileged_container_may_do_everything() {
    let _turn = shared();
    let script = "echo effective=$(grep ^CapEff: /proc/self/status | cut -f 2)
        echo bounding=$(grep ^CapBnd: /proc/self/status | cut -f 2)
        mkdir /m && mount -t tmpfs tmpfs /m && touch /m/file; echo mount=$?
        echo $(cat /proc/sys/vm/swappiness) > /proc/sys/vm/swappiness; echo sysctl=$?
        mkdir /sys/fs/cgroup/child && rmdir /sys/fs/cgroup/child; echo cgroup=$?
        echo Seccomp=$(grep ^Seccomp: /proc/self/status | cut -f 2); test -c /dev/kmsg; echo kmsg=$?";
    let output = Run::new(BUSYBOX).options("--privileged").options(CGROUP_MOUNT).sh(script).output().ok();
    // containerd gives what it has itself, and its capabilities are those of this test.
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc/self/status");
    let all = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).expect("capabilities");
    output.expect_values(&[
        ("effective", all),
        ("bounding", all),
        ("mount", "0"),
        ("sysctl", "0"),
        ("cgroup", "0"),
        ("Seccomp", "0"),
        ("kmsg", "0"),
    ]);
}

#[test]
fn the_usual_devices_and_nothing_else() {
    let _turn = shared();
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d && echo $d=yes; done
        echo zeros=$(head -c 4 /dev/zero | od -An -tx1 | tr -d ' '); echo x > /dev/full; echo full=$?
        for l in fd stdin stdout stderr ptmx; do test -e /dev/$l && echo $l=yes; done
        mknod /dev/sneaky c 1 1 && head -c 1 /dev/sneaky; echo memory=$?; echo pid=$$
        echo parts=$(ls /dev | grep -c -e '^[vs]d' -e pmem -e '^kvm$')";
    let output = Run::new(BUSYBOX).sh(script).output().ok();
    let yes = ["null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr", "ptmx"];
    let mut expected: Vec<(&str, &str)> =
        yes.iter().filter(|name| **name != "full").map(|name| (*name, "yes")).collect();
    expected.extend([("zeros", "00000000"), ("memory", "1"), ("pid", "1"), ("parts", "0")]);
    output.expect_values(&expected);
}

#[test]
fn a_command_that_does_not_exist_is_an_error_that_names_it() {
    let _turn = shared();
    let output = Run::new(BUSYBOX).command(&["no-such-command"]).output();
    assert_ne!(output.code, 0, "{output}");
    output.expect_error_line(&["no-such-command", "executable file not found in $PATH"]);
}
