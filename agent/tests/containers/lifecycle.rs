//! Create, start, exec, signal, wait, pause, remove.

use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use katana_protocol::agent::{CreateSandboxRequest, ResizeTerminalRequest, UpdateContainerRequest};
use serde_json::json;
use ttrpc::Code;

use super::harness::{Guest, container, ctx, process, status};

#[tokio::test]
async fn exit_codes_and_output() {
    let guest = Guest::new("exit").await;
    for status in [0, 1, 42, 255] {
        let script = format!("echo out; echo err >&2; exit {status}");
        let output = guest.run(&guest.spec(&["sh", "-c", &script])).await.unwrap();
        assert_eq!(
            (output.status, output.stdout.as_str(), output.stderr.as_str()),
            (status, "out\n", "err\n")
        );
    }
    let killed = guest.run(&guest.spec(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])).await.unwrap();
    assert_eq!(killed.status, 137);
}

/// The first process of a pid namespace does not hear a signal that it has no handler for.
#[tokio::test]
async fn a_signal_waits_for_who_is_to_handle_it() {
    let guest = Guest::new("young").await;
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; trap 'exit 7' TERM; sleep 1000 & wait";
    guest.create("c", &guest.spec(&["sh", "-c", script]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    guest.kill("c", "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 7);
    guest.remove("c").await;
}

#[tokio::test]
async fn signals_reach_one_or_all() {
    let guest = Guest::new("signals").await;
    let spec = guest.spec(&[
        "sh",
        "-c",
        "trap 'echo got it; exit 7' TERM; echo ready; : > /tmp/ready; while :; do sleep 0.1; done",
    ]);
    let streams = guest.streams(false, false);
    guest.create("c", &spec, &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    let (first, second) = (guest.wait("c", ""), guest.wait("c", ""));
    guest.until_ready().await;
    guest.kill("c", "", libc::SIGTERM, false).await.unwrap();
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first.exit_status, &first), (7, &second));
    assert_eq!(String::from_utf8(streams.stdout.await.unwrap()).unwrap(), "ready\ngot it\n");
    for all in [false, true] {
        let error = guest.kill("c", "", libc::SIGKILL, all).await.unwrap_err();
        assert_eq!(status(error), (Code::NOT_FOUND, "process already finished".to_owned()));
    }
    let error = guest.kill("nobody", "", libc::SIGKILL, false).await.unwrap_err();
    assert_eq!(status(error), (Code::NOT_FOUND, "container \"nobody\" does not exist".to_owned()));
    guest.remove("c").await;

    for (signal, all, status) in [(libc::SIGKILL, true, 137), (libc::SIGKILL, false, 137), (40, false, 168)] {
        guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
        // A first process ignores what would only kill it by default: that is for an exec.
        guest.start("c").await.unwrap();
        guest.exec("c", "e", &guest.process(&["sleep", "100"]), &Default::default()).await.unwrap();
        guest.kill("c", "e", signal, all).await.unwrap();
        assert_eq!(guest.wait("c", "e").await.exit_status, status, "signal {signal}");
        guest.remove("c").await;
    }
}

#[tokio::test]
async fn a_container_that_cannot_start_says_why_and_leaves_nothing() {
    let guest = Guest::new("cannot").await;
    let try_to = async |arguments: &[&str]| {
        let error = guest.create("c", &guest.spec(arguments), &Default::default()).await.unwrap_err();
        status(error)
    };
    let missing = r#"exec: "nonexistent": executable file not found in $PATH"#;
    assert_eq!(try_to(&["nonexistent"]).await, (Code::NOT_FOUND, missing.to_owned()));
    let denied = r#"exec: "/etc/passwd": permission denied"#;
    assert_eq!(try_to(&["/etc/passwd"]).await, (Code::PERMISSION_DENIED, denied.to_owned()));
    assert_eq!(try_to(&[]).await.0, Code::INVALID_ARGUMENT);

    std::fs::write(guest.rootfs().join("bin/garbage"), "\0garbage").unwrap();
    std::fs::set_permissions(
        guest.rootfs().join("bin/garbage"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let error = guest.run(&guest.spec(&["garbage"])).await.unwrap_err();
    assert_eq!(status(error).1, "exec /bin/garbage: exec format error");

    let mut spec = guest.spec(&["true"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/x", "source": "/no/such", "options": ["bind"]}));
    let error = guest.create("c", &spec, &Default::default()).await.unwrap_err();
    let text = r#"error mounting "/no/such" to rootfs at "/x": no such file or directory"#;
    assert_eq!(status(error), (Code::INTERNAL, text.to_owned()));

    let cgroup = Path::new("/sys/fs/cgroup/unified").join(guest.directory.file_name().unwrap()).join("c");
    assert!(!cgroup.exists(), "a failed create removes the cgroup");
    assert_eq!(guest.shell("echo works").await, "works\n");
}

#[tokio::test]
async fn hostile_requests_are_refused() {
    let guest = Guest::new("hostile").await;
    let good = guest.spec(&["sleep", "100"]);
    for id in ["", "..", "a/b", ".hidden", "a b"] {
        let error = guest.create(id, &good, &Default::default()).await.unwrap_err();
        assert_eq!(status(error).0, Code::INVALID_ARGUMENT, "{id:?}");
    }
    let mut request = katana_protocol::agent::CreateContainerRequest::new();
    request.container_id = "c".to_owned();
    for spec in ["", "{", "[]", "{}", r#"{"process":{"cwd":"/"}}"#, r#"{"process":{"user":{},"cwd":"/"}}"#] {
        request.spec = spec.into();
        let error = guest.client.create_container(ctx(), &request).await.unwrap_err();
        assert_eq!(status(error).0, Code::INVALID_ARGUMENT, "{spec}");
    }
    guest.create("c", &good, &Default::default()).await.unwrap();
    let error = guest.create("c", &good, &Default::default()).await.unwrap_err();
    assert_eq!(status(error), (Code::ALREADY_EXISTS, "container \"c\" already exists".to_owned()));
    let error = guest.create("d", &good, &Default::default()).await.unwrap_err();
    assert_eq!(status(error).0, Code::ALREADY_EXISTS, "another container with the same cgroup");
    let error = guest.kill("c", "", 9999, false).await.unwrap_err();
    assert_eq!(status(error).0, Code::INVALID_ARGUMENT);
    let request =
        ResizeTerminalRequest { container_id: "c".to_owned(), columns: 1, rows: 1, ..Default::default() };
    let error = guest.client.resize_terminal(ctx(), &request).await.unwrap_err();
    assert_eq!(status(error), (Code::FAILED_PRECONDITION, "the process has no terminal".to_owned()));
}

#[tokio::test]
async fn the_guest_takes_its_settings() {
    let guest = Guest::new("settings").await;
    guest.client.create_sandbox(ctx(), &CreateSandboxRequest::new()).await.unwrap();
    let request = CreateSandboxRequest {
        hostname: "pod".to_owned(),
        entropy: (0..=255).cycle().take(1000).collect(),
        clock_ns: clock(),
        ..Default::default()
    };
    guest.client.create_sandbox(ctx(), &request).await.unwrap();
    let without_uts = |spec: &mut serde_json::Value| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "uts");
    };
    assert_eq!(
        guest.shell_with("hostname", without_uts).await,
        "pod\n",
        "a container may share the pod's name"
    );
    let request = CreateSandboxRequest { share_tag: "none".to_owned(), ..Default::default() };
    let error = status(guest.client.create_sandbox(ctx(), &request).await.unwrap_err());
    assert_eq!(error.0, Code::INTERNAL);
    assert!(error.1.starts_with("mount virtio-fs \"none\" on /run/kata-containers/shared: "), "{error:?}");
}

/// Nobody's clock but a guest's is set here.
fn clock() -> u64 {
    let in_guest = std::env::var_os("KATANA_TEST_GUEST").is_some();
    if in_guest { 1_800_000_000_000_000_000 } else { 0 }
}

#[tokio::test]
async fn a_container_is_started_once_and_removed_in_any_state() {
    let guest = Guest::new("states").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.remove("c").await;

    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let error = guest.start("c").await.unwrap_err();
    assert_eq!(
        status(error),
        (Code::FAILED_PRECONDITION, "cannot start an already running container".to_owned())
    );
    guest.remove("c").await;
    let error = guest.client.wait_process(ctx(), &process("c", "")).await.unwrap_err();
    assert_eq!(status(error).0, Code::NOT_FOUND);
}

/// The host gives up a creation that takes too long.
#[tokio::test]
async fn a_container_that_is_removed_while_it_is_created_is_gone_afterwards() {
    let guest = Guest::new("abandoned").await;
    let [begun, goes_on] = ["begun", "goes-on"].map(|name| guest.directory.join(name));
    for fifo in [&begun, &goes_on] {
        nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let script = format!("echo > {}; cat {}", begun.display(), goes_on.display());
    let mut spec = guest.spec(&["sleep", "1000"]);
    spec["hooks"] = json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    let stdio = Default::default();
    let removal = async {
        tokio::task::spawn_blocking(move || std::fs::read(begun)).await.unwrap().unwrap();
        guest.remove("c").await;
        let (code, _) = status(guest.start("c").await.unwrap_err());
        assert_eq!(code, Code::NOT_FOUND);
        tokio::task::spawn_blocking(move || std::fs::write(goes_on, "")).await.unwrap().unwrap();
    };
    let (created, ()) = tokio::join!(guest.create("c", &spec, &stdio), removal);
    assert_eq!(status(created.unwrap_err()).0, Code::NOT_FOUND);
    // Nothing of it is in the way of the next one.
    guest.create("c", &guest.spec(&["true"]), &stdio).await.unwrap();
    guest.remove("c").await;
}

#[tokio::test]
async fn execs_join_the_container() {
    let guest = Guest::new("exec").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();

    let script = "for n in mnt pid uts ipc cgroup; do \
        test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo $n differs; done; hostname; echo $GREETING";
    let output = guest.run_exec("c", "ns", &guest.process(&["sh", "-c", script])).await.unwrap();
    assert_eq!((output.status, output.stdout.as_str(), output.stderr.as_str()), (0, "box\nhello\n", ""));

    let error = guest.run_exec("c", "bad", &guest.process(&["nonexistent"])).await.unwrap_err();
    let text = r#"exec: "nonexistent": executable file not found in $PATH"#;
    assert_eq!(status(error), (Code::NOT_FOUND, text.to_owned()));
    let error = guest.run_exec("c", "bad", &guest.process(&["/bin/none"])).await.unwrap_err();
    assert_eq!(status(error).1, r#"exec: "/bin/none": stat /bin/none: no such file or directory"#);
    let mut elsewhere = guest.process(&["true"]);
    elsewhere["cwd"] = json!("/x");
    let error = guest.run_exec("c", "bad", &elsewhere).await.unwrap_err();
    let text = r#"chdir to cwd ("/x") set in config.json failed: no such file or directory"#;
    assert_eq!(status(error), (Code::NOT_FOUND, text.to_owned()));

    guest.exec("c", "e", &guest.process(&["sleep", "100"]), &Default::default()).await.unwrap();
    let error = guest.exec("c", "e", &guest.process(&["true"]), &Default::default()).await.unwrap_err();
    assert_eq!(status(error).0, Code::ALREADY_EXISTS);
    let error = guest.client.remove_process(ctx(), &process("c", "e")).await.unwrap_err();
    assert_eq!(status(error).0, Code::FAILED_PRECONDITION);

    let list = guest.client.list_processes(ctx(), &container("c")).await.unwrap().processes;
    assert_eq!(list.len(), 2);
    assert_eq!(list.iter().filter(|process| process.exec_id == "e").count(), 1);

    guest.kill("c", "e", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("c", "e").await.exit_status, 137);
    guest.client.remove_process(ctx(), &process("c", "e")).await.unwrap();
    let error = guest.client.wait_process(ctx(), &process("c", "e")).await.unwrap_err();
    assert_eq!(status(error).0, Code::NOT_FOUND);

    guest.kill("c", "", libc::SIGKILL, false).await.unwrap();
    guest.wait("c", "").await;
    let error = guest.exec("c", "late", &guest.process(&["true"]), &Default::default()).await.unwrap_err();
    assert_eq!(status(error), (Code::FAILED_PRECONDITION, "cannot exec in a stopped container".to_owned()));
    guest.remove("c").await;
}

#[tokio::test]
async fn fifty_execs_at_once() {
    let guest = Guest::new("fifty").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    for terminal in [false, true] {
        let one = async |number: u32| {
            let mut process = guest.process(&["sh", "-c", &format!("echo {number}; exit {number}")]);
            process["terminal"] = json!(terminal);
            guest.run_exec("c", &format!("{terminal}-{number}"), &process).await.unwrap()
        };
        for (number, output) in join_all((0..50).map(one)).await.into_iter().enumerate() {
            assert_eq!(
                (output.status as usize, output.stdout.trim_end()),
                (number, number.to_string().as_str())
            );
        }
    }
    guest.remove("c").await;
}

#[tokio::test]
async fn a_paused_container_stands_still() {
    let guest = Guest::new("pause").await;
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.01; done";
    guest.create("c", &guest.spec(&["sh", "-c", script]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let count = || std::fs::read_to_string(guest.rootfs().join("tmp/count")).unwrap_or_default();
    let moves = async || {
        let before = count();
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if count() != before {
                return true;
            }
        }
        false
    };
    assert!(moves().await);
    guest.client.pause_container(ctx(), &container("c")).await.unwrap();
    assert!(!moves().await);
    let error = guest.exec("c", "e", &guest.process(&["true"]), &Default::default()).await.unwrap_err();
    assert_eq!(status(error), (Code::FAILED_PRECONDITION, "cannot exec in a paused container".to_owned()));
    guest.client.resume_container(ctx(), &container("c")).await.unwrap();
    assert!(moves().await);
    let error = guest.client.resume_container(ctx(), &container("c")).await.unwrap_err();
    assert_eq!(status(error), (Code::FAILED_PRECONDITION, "container not paused".to_owned()));

    guest.client.pause_container(ctx(), &container("c")).await.unwrap();
    guest.kill("c", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 137, "death comes to the frozen too");
    guest.remove("c").await;
}

#[tokio::test]
async fn an_agent_with_nothing_to_do_sleeps() {
    let guest = Guest::new("idle").await;
    let streams = guest.streams(true, true);
    guest.create("c", &guest.spec(&["sleep", "100"]), &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    let mut terminal = guest.process(&["sleep", "100"]);
    terminal["terminal"] = json!(true);
    let streams = guest.streams(true, false);
    guest.exec("c", "e", &terminal, &streams.ports).await.unwrap();
    guest.client.pause_container(ctx(), &container("c")).await.unwrap();
    guest.client.resume_container(ctx(), &container("c")).await.unwrap();
    let waiting = tokio::spawn(guest.wait_later("c", "e"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = guest.wakeups();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(guest.wakeups(), before);
    waiting.abort();
    guest.remove("c").await;
}

#[tokio::test]
async fn statistics_and_updates() {
    let guest = Guest::new("stats").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let files = guest.client.container_stats(ctx(), &container("c")).await.unwrap().files;
    assert!(files["cpu.stat"].contains("usage_usec"), "{files:?}");
    let update = async |resources: &str| {
        let resources = resources.into();
        let request =
            UpdateContainerRequest { container_id: "c".to_owned(), resources, ..Default::default() };
        guest.client.update_container(ctx(), &request).await
    };
    update(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#).await.unwrap();
    assert_eq!(status(update("{").await.unwrap_err()).0, Code::INVALID_ARGUMENT);
    let error = update(r#"{"unified":{"no.such":"1"}}"#).await.unwrap_err();
    assert_eq!(status(error).0, Code::INTERNAL);
    guest.remove("c").await;
}

#[tokio::test]
async fn containers_outlive_the_connection() {
    let mut guest = Guest::new("reconnect").await;
    guest.create("c", &guest.spec(&["sh", "-c", "sleep 1; exit 5"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let waiting = tokio::spawn(guest.wait_later("c", ""));
    tokio::time::sleep(Duration::from_millis(200)).await;
    waiting.abort();
    let _ = waiting.await;
    guest.reconnect().await;
    assert_eq!(guest.wait("c", "").await.exit_status, 5);
    guest.remove("c").await;
}

#[tokio::test]
async fn what_a_first_process_leaves_is_killed() {
    let guest = Guest::new("left").await;
    let mut spec = guest.spec(&["sh", "-c", "sleep 100 & echo $! > /tmp/pid"]);
    // In the pid namespace of the agent itself nothing else would end the child.
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    guest.create("c", &spec, &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 0);
    let child = std::fs::read_to_string(guest.rootfs().join("tmp/pid")).unwrap();
    let child = Path::new("/proc").join(child.trim()).join("cmdline");
    for _ in 0..50 {
        if std::fs::read_to_string(&child).unwrap_or_default().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(std::fs::read_to_string(&child).unwrap_or_default(), "");
    guest.remove("c").await;
}

#[tokio::test]
async fn a_pods_first_process_holds_its_namespaces_and_reaps() {
    let guest = Guest::new("pod").await;
    let mut pod = guest.spec(&["/no/such/program"]);
    // Neither its image nor its mounts are there.
    pod["root"] = json!(null);
    pod["mounts"] = json!([]);
    pod["process"]["user"] = json!({"uid": 65535, "gid": 65535});
    pod["process"]["capabilities"] = json!(null);
    let pid = guest.create_pause("c", &pod).await.unwrap();
    guest.start("c").await.unwrap();
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    assert_eq!(file("cmdline"), "kata-agent\0pause\0");
    // It names itself once it runs, which nobody waits for.
    while file("comm") != "pause\n" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let status = file("status");
    for line in ["Uid:\t65535\t65535\t65535\t65535", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line}\n{status}");
    }
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "its root is empty");

    // The background process is an orphan at once; the wait is for its end and for the pod's first process to see it.
    let script =
        "(sleep 0.2 &); sleep 0.1; hostname; until ! pidof sleep > /tmp/sleeps; do :; done; cat /proc/1/comm";
    let mut member = guest.spec(&["sh", "-c", script]);
    let cgroup = member["linux"]["cgroupsPath"].as_str().unwrap().replace("/c", "/d");
    member["linux"]["cgroupsPath"] = json!(cgroup);
    member["linux"]["namespaces"] = json!([{"type": "pid", "path": format!("/proc/{pid}/ns/pid")},
        {"type": "uts", "path": format!("/proc/{pid}/ns/uts")}, {"type": "mount"}, {"type": "cgroup"}]);
    member.as_object_mut().unwrap().remove("hostname");
    let streams = guest.streams(false, false);
    guest.create("d", &member, &streams.ports).await.unwrap();
    guest.start("d").await.unwrap();
    assert_eq!(guest.wait("d", "").await.exit_status, 0);
    assert_eq!(String::from_utf8(streams.stdout.await.unwrap()).unwrap(), "box\npause\n");
    guest.remove("d").await;

    guest.kill("c", "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 0);
    guest.remove("c").await;
}
