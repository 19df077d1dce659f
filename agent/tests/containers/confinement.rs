//! Who a container's process is and what it may.

use serde_json::{Value, json};

use super::harness::Guest;

fn status_line<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap()
}

#[tokio::test]
async fn capabilities_and_no_new_privileges() {
    let guest = Guest::new("caps").await;
    let status = guest.shell("cat /proc/self/status").await;
    assert_eq!(status_line(&status, "CapEff:"), "00000000a80425fb");
    assert_eq!(status_line(&status, "CapBnd:"), "00000000a80425fb");
    assert_eq!(status_line(&status, "CapInh:"), "0000000000000000");
    assert_eq!(status_line(&status, "NoNewPrivs:"), "1");

    let status = guest
        .shell_with("cat /proc/self/status", |spec| {
            let set = json!(["CAP_NET_BIND_SERVICE"]);
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            spec["process"]["capabilities"] =
                json!({"bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": set});
        })
        .await;
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(status_line(&status, set), "0000000000000400", "{set}");
    }

    let status = guest
        .shell_with("cat /proc/self/status", |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            spec["process"]["noNewPrivileges"] = json!(false);
        })
        .await;
    assert_eq!(
        status_line(&status, "CapEff:"),
        "0000000000000000",
        "a user that is not root has no effective ones"
    );
    assert_eq!(status_line(&status, "NoNewPrivs:"), "0");
}

#[tokio::test]
async fn user_groups_umask_and_home() {
    let guest = Guest::new("user").await;
    let output = guest
        .shell_with("id -u; id -g; id -G; umask; echo $HOME; stat -c %u /proc/self/fd/1; echo x > /proc/self/fd/1; pwd", |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 63});
            spec["process"]["cwd"] = json!("/made/for/me");
        })
        .await;
    assert_eq!(output, "1000\n1001\n1001 5 7\n0077\n/home/user\n1000\nx\n/made/for/me\n");
    assert_eq!(guest.shell("umask; echo $HOME").await, "0022\n/root\n");
}

#[tokio::test]
async fn limits_and_scores() {
    let guest = Guest::new("limits").await;
    let output = guest
        .shell_with("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; cat /proc/self/sched | grep policy | tr -dc 0-9; echo; ls /proc/self/fd", |spec| {
            spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
            spec["process"]["oomScoreAdj"] = json!(300);
            spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH"});
            spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        })
        .await;
    assert_eq!(output, "100\n200\n300\n3\n0\n1\n2\n3\n", "descriptor 3 is ls reading the directory");
}

#[tokio::test]
async fn a_personality_is_taken() {
    let guest = Guest::new("personality").await;
    let with_32_bits = |spec: &mut Value| spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    assert_eq!(guest.shell_with("uname -m", with_32_bits).await, "i686\n");
}

#[tokio::test]
async fn signals_start_fresh() {
    let guest = Guest::new("fresh").await;
    let status = guest.run(&guest.spec(&["cat", "/proc/self/status"])).await.unwrap().stdout;
    assert_eq!(status_line(&status, "SigBlk:"), "0000000000000000");
    assert_eq!(status_line(&status, "SigIgn:"), "0000000000000000");
}

fn profile() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
        ],
    })
}

#[tokio::test]
async fn a_seccomp_profile_holds_for_containers_and_execs() {
    let guest = Guest::new("seccomp").await;
    for no_new_privileges in [true, false] {
        let script = "grep Seccomp: /proc/self/status; mkdir /tmp/d; hostname x; echo $?; kill -USR1 $$; kill -0 $$ && echo alive";
        let mut spec = guest.spec(&["sh", "-c", script]);
        spec["linux"]["seccomp"] = profile();
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let output = guest.run(&spec).await.unwrap();
        assert_eq!(output.stdout, "Seccomp:\t2\n159\nalive\n", "{output:?}");
        assert!(output.stderr.contains("No space left on device"), "{output:?}");
        assert!(output.stderr.contains("Operation not permitted"), "{output:?}");
    }
    let mut spec = guest.spec(&["sleep", "100"]);
    spec["linux"]["seccomp"] = profile();
    guest.create("c", &spec, &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let output = guest.run_exec("c", "e", &guest.process(&["mkdir", "/tmp/d"])).await.unwrap();
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("No space left on device"), "{output:?}");
    guest.remove("c").await;
}

/// The form of containerd's default profile: a list of what is allowed, some calls by their arguments.
#[tokio::test]
async fn a_profile_of_allowed_calls_holds() {
    let guest = Guest::new("allowed").await;
    let allowed = "accept access arch_prctl brk capget capset chdir chmod chown close connect dup dup2 execve exit \
        exit_group faccessat fchdir fchmod fchown fcntl fork fstat fstatfs futex getcwd getdents64 getegid geteuid \
        getgid getgroups getpgrp getpid getppid getrandom gettid gettimeofday getuid ioctl kill lseek lstat madvise \
        mkdir mmap mprotect mremap munmap nanosleep newfstatat open openat pipe pipe2 poll prctl pread64 prlimit64 \
        read readlink recvmsg rename rmdir rseq rt_sigaction rt_sigprocmask rt_sigreturn select sendmsg \
        set_robust_list set_tid_address setgid setgroups setpgid setresgid setresuid setsid setuid sigaltstack stat \
        statfs statx sysinfo tgkill time umask uname unlink vfork wait4 write writev";
    let names: Vec<&str> = allowed.split_whitespace().collect();
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": names, "action": "SCMP_ACT_ALLOW", "args": []},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": namespaces, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    });
    for no_new_privileges in [true, false] {
        let script = "unshare -U true; mount -t tmpfs x /tmp; (echo child); echo end";
        let mut spec = guest.spec(&["sh", "-c", script]);
        spec["linux"]["seccomp"] = profile.clone();
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let output = guest.run(&spec).await.unwrap();
        assert_eq!((output.status, output.stdout.as_str()), (0, "child\nend\n"), "{output:?}");
        assert!(
            output.stderr.contains("unshare: unshare(0x10000000): Operation not permitted"),
            "{output:?}"
        );
    }
}

#[tokio::test]
async fn the_device_filter_holds() {
    let guest = Guest::new("filter").await;
    let script = "mknod /tmp/mem c 1 1 && cat /tmp/mem | head -c 1; mknod /tmp/zero c 1 5; head -c 3 /tmp/zero | wc -c";
    let output = guest.run(&guest.spec(&["sh", "-c", script])).await.unwrap();
    assert_eq!(output.stdout.trim(), "3");
    assert!(output.stderr.contains("Operation not permitted"), "{output:?}");
    let output = guest
        .shell_with("mknod /tmp/kmsg c 1 11 && : > /tmp/kmsg && echo opened", |spec| {
            spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"}]);
            spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
        })
        .await;
    assert_eq!(output, "opened\n");
}

#[tokio::test]
async fn namespaces_are_apart() {
    let guest = Guest::new("apart").await;
    let output = guest
        .shell_with(
            "hostname; cat /proc/sys/kernel/domainname; echo $$; cat /proc/self/cgroup | tail -n1; cat /proc/sys/kernel/shm_rmid_forced",
            |spec| {
                spec["domainname"] = json!("example.org");
                spec["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1"});
            },
        )
        .await;
    assert_eq!(output, "box\nexample.org\n1\n0::/\n1\n");
    let own = std::fs::read_link("/proc/self/ns/net").unwrap().display().to_string();
    assert_eq!(guest.shell("readlink /proc/self/ns/net").await.trim(), own, "the network is the pod's");
}

#[tokio::test]
async fn a_user_namespace_maps_its_root() {
    let guest = Guest::new("userns").await;
    let owner =
        std::process::Command::new("chown").args(["-R", "-h", "100000:100000"]).arg(guest.rootfs()).status();
    assert!(owner.unwrap().success());
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let with_user_namespace = |spec: &mut Value| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map.clone();
    };
    let script = "id -u; cat /proc/self/uid_map | tr -s ' '; echo 1 > /dev/null && echo null; touch /dev/shm/x && stat -c %u /dev/shm/x; hostname";
    let output = guest.shell_with(script, with_user_namespace).await;
    assert_eq!(output, "0\n 0 100000 65536\nnull\n0\nbox\n");

    let mut spec = guest.spec(&["sleep", "100"]);
    with_user_namespace(&mut spec);
    guest.create("c", &spec, &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let output = guest
        .run_exec("c", "e", &guest.process(&["sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '"]))
        .await;
    assert_eq!(output.unwrap().stdout, "0\n 0 100000 65536\n");
    let mut terminal = guest.process(&["tty"]);
    terminal["terminal"] = json!(true);
    assert_eq!(guest.run_exec("c", "t", &terminal).await.unwrap().stdout, "/dev/pts/0\r\n");
    guest.remove("c").await;
}

#[tokio::test]
async fn a_time_namespace_has_offsets() {
    let guest = Guest::new("time").await;
    let output = guest
        .shell_with("cut -d. -f1 /proc/uptime", |spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
            spec["linux"]["timeOffsets"] =
                json!({"boottime": {"secs": 100_000_000}, "monotonic": {"secs": 7}});
        })
        .await;
    assert!(output.trim().parse::<u64>().unwrap() > 100_000_000, "{output}");
}

#[tokio::test]
async fn hooks_run_in_their_stages() {
    let guest = Guest::new("hooks").await;
    let script = guest.directory.join("hook.sh");
    std::fs::write(&script, "#!/bin/sh\necho \"$1 $(cat)\" >> $LOG\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let log = guest.directory.join("hooks.log");
    let hook = |stage: &str| {
        json!([{"path": script, "args": ["hook", stage], "env": [format!("LOG={}", log.display()),
        "PATH=/bin:/usr/bin"], "timeout": 10}])
    };
    let inside = json!([{"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state"], "env": ["PATH=/bin"]}]);
    guest
        .shell_with("grep -o '\"status\":\"[a-z]*\"' /tmp/state; rm /tmp/state", |spec| {
            spec["hooks"] = json!({"createContainer": hook("createContainer"), "startContainer": inside,
                "poststart": hook("poststart"), "poststop": hook("poststop")});
        })
        .await;
    let log = std::fs::read_to_string(log).unwrap();
    let stages: Vec<&str> = log.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(stages, ["createContainer", "poststart", "poststop"]);
    assert!(log.contains(r#""id":"c""#) && log.contains(r#""status":"creating""#), "{log}");

    let mut spec = guest.spec(&["true"]);
    spec["hooks"] = json!({"createContainer": [{"path": "/bin/false"}]});
    let error = guest.create("c", &spec, &Default::default()).await.unwrap_err();
    assert!(
        error.to_string().contains("error running createContainer hook #0: /bin/false: exit status: 1"),
        "{error}"
    );
}
