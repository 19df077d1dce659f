//! Files that the host copies out of containers and into them.

use std::fs;
use std::os::unix::fs::symlink;

use katana_archive::{Manner, pack, unpack};
use serde_json::{Value, json};

use super::harness::Guest;

fn out(path: &str) -> Value {
    json!({"out": {"path": path, "follow": false}})
}

fn into(path: &str) -> Value {
    json!({"in": {"path": path, "archive": false, "keeps": false}})
}

#[tokio::test]
async fn files_come_and_go_without_a_program_of_the_container() {
    let guest = Guest::new("copies").await;
    let script = "echo mine > /run/inside; : > /tmp/ready; exec sleep 1000";
    guest.create("c", &guest.spec(&["sh", "-c", script]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    guest.until_ready().await;
    let here = guest.directory.join("here");
    fs::create_dir_all(&here).unwrap();

    // Of a mount that only the container has.
    let copied = guest.copy("c", &out("/run/inside"), None).await;
    assert_eq!((copied.status, copied.stderr.as_str()), (0, ""));
    unpack(&*copied.stdout, &here, Manner::default()).unwrap();
    assert_eq!(fs::read_to_string(here.join("inside")).unwrap(), "mine\n");

    let large: Vec<u8> = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(here.join("large"), &large).unwrap();
    let mut stream = Vec::new();
    pack(&here, false, &mut stream, &mut |_, _| ()).unwrap();
    let copied = guest.copy("c", &into("/run"), Some(&stream)).await;
    assert_eq!((copied.status, copied.stderr.as_str()), (0, ""));
    let copied = guest.copy("c", &out("/run/here/large"), None).await;
    unpack(&*copied.stdout, &here.join("back"), Manner::default()).unwrap();
    assert!(fs::read(here.join("back")).unwrap() == large);

    let copied = guest.copy("c", &out("/run/none"), None).await;
    assert_eq!((copied.status, copied.stderr.as_str()), (1, "/run/none: No such file or directory\n"));
    let mut small = Vec::new();
    pack(&here.join("inside"), false, &mut small, &mut |_, _| ()).unwrap();
    let copied = guest.copy("c", &into("/run/none/inside"), Some(&small)).await;
    assert_eq!((copied.status, copied.stderr.as_str()), (1, "/run/none: No such file or directory\n"));
    // What the container's specification makes read-only is so for the host as well.
    let copied = guest.copy("c", &into("/proc/sys/kernel/hostname"), Some(&small)).await;
    assert_eq!(copied.status, 1, "{}", copied.stderr);
    guest.remove("c").await;
}

#[tokio::test]
async fn links_of_a_container_lead_nowhere_else() {
    let guest = Guest::new("copies-links").await;
    fs::remove_dir_all(guest.rootfs().join("etc")).unwrap();
    let outside = guest.directory.join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("passwd"), "secret").unwrap();
    symlink(&outside, guest.rootfs().join("etc")).unwrap();
    symlink("../".repeat(20) + outside.to_str().unwrap().trim_start_matches('/'), guest.rootfs().join("up"))
        .unwrap();
    guest.create("c", &guest.spec(&["sleep", "1000"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    for path in ["/etc/passwd", "/up/passwd", "/../../etc/passwd"] {
        let copied = guest.copy("c", &out(path), None).await;
        assert_eq!((copied.status, copied.stderr), (1, format!("{path}: No such file or directory\n")));
        let mut stream = Vec::new();
        pack(&outside.join("passwd"), false, &mut stream, &mut |_, _| ()).unwrap();
        let copied = guest.copy("c", &into(path), Some(&stream)).await;
        assert_eq!(copied.status, 1, "{path}: {}", copied.stderr);
    }
    assert_eq!(fs::read_to_string(outside.join("passwd")).unwrap(), "secret");
    guest.remove("c").await;
}

/// Of a container with users of its own, root is the one of these.
#[tokio::test]
async fn in_a_user_namespace_files_are_of_its_users() {
    use std::os::unix::fs::MetadataExt;
    let guest = Guest::new("copies-userns").await;
    let owner =
        std::process::Command::new("chown").args(["-R", "-h", "100000:100000"]).arg(guest.rootfs()).status();
    assert!(owner.unwrap().success());
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mut spec = guest.spec(&["sleep", "1000"]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    guest.create("c", &spec, &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let file = guest.directory.join("file");
    fs::write(&file, "text").unwrap();
    std::os::unix::fs::chown(&file, Some(7), Some(8)).unwrap();
    let mut stream = Vec::new();
    pack(&file, false, &mut stream, &mut |_, _| ()).unwrap();
    let keeping = json!({"in": {"path": "/tmp/kept", "archive": false, "keeps": true}});
    for (asked, name, owner) in [(into("/tmp"), "file", 100_000), (keeping, "kept", 100_007)] {
        let copied = guest.copy("c", &asked, Some(&stream)).await;
        assert_eq!((copied.status, copied.stderr.as_str()), (0, ""));
        assert_eq!(fs::metadata(guest.rootfs().join("tmp").join(name)).unwrap().uid(), owner);
    }
    guest.remove("c").await;
}

/// Whoever traced it could use its privileges.
#[tokio::test]
async fn a_container_does_not_see_who_copies() {
    let guest = Guest::new("copies-hidden").await;
    let script = "mkfifo /run/fifo; : > /tmp/ready; exec sleep 1000";
    guest.create("c", &guest.spec(&["sh", "-c", script]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    guest.until_ready().await;
    let stdin = guest.streams(true, true);
    let process = json!({
        "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": [into("/run").to_string()],
    });
    let request = katana_protocol::agent::ExecProcessRequest {
        container_id: "c".to_owned(),
        exec_id: "copy".to_owned(),
        process: serde_json::to_vec(&process).unwrap(),
        stdio: Some(stdin.ports.clone()).into(),
        copies: true,
        ..Default::default()
    };
    let pid = guest.client.exec_process(super::harness::ctx(), &request).await.unwrap().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t0") && status.contains("CapEff:\t0000000000000000"), "{status}");
    let output = guest.run_exec("c", "ps", &guest.process(&["ps"])).await.unwrap();
    assert!(output.stdout.contains("sleep") && !output.stdout.contains("copy"), "{}", output.stdout);
    guest.kill("c", "copy", libc::SIGKILL, false).await.unwrap();
    guest.remove("c").await;
}
