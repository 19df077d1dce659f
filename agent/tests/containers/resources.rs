//! Limits that need controllers of cgroup v2. A machine that has given them to cgroup v1 proves nothing here; the
//! guest of the test machine does.

use katana_protocol::agent::{Empty, UpdateContainerRequest};
use serde_json::{Value, json};

use super::harness::{Guest, container, ctx};

fn has_controllers() -> bool {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let has =
        ["cpu", "memory", "pids"].iter().all(|name| controllers.split_whitespace().any(|have| have == *name));
    if !has {
        eprintln!("cgroup v2 has no cpu, memory and pids controllers here");
    }
    has
}

fn with_cgroup_mount(spec: &mut Value) {
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup",
        "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]}));
}

#[tokio::test]
async fn limits_are_read_back_in_the_container() {
    if !has_controllers() {
        return;
    }
    let guest = Guest::new("readback").await;
    let output = guest
        .shell_with("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight", |spec| {
            with_cgroup_mount(spec);
            spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
            spec["linux"]["resources"]["pids"] = json!({"limit": 77});
            spec["linux"]["resources"]["cpu"] = json!({"quota": 50000, "period": 100000, "shares": 512});
        })
        .await;
    assert_eq!(output, format!("{}\n77\n50000 100000\n20\n", 64 << 20));
}

#[tokio::test]
async fn an_update_changes_limits() {
    if !has_controllers() {
        return;
    }
    let guest = Guest::new("update").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let resources = format!(r#"{{"memory":{{"limit":{}}},"pids":{{"limit":9}}}}"#, 32 << 20).into_bytes();
    let request = UpdateContainerRequest { container_id: "c".to_owned(), resources, ..Default::default() };
    guest.client.update_container(ctx(), &request).await.unwrap();
    let files = guest.client.container_stats(ctx(), &container("c")).await.unwrap().files;
    assert_eq!(
        (files["memory.max"].trim(), files["pids.max"].trim()),
        ((32 << 20).to_string().as_str(), "9")
    );
    assert!(files["memory.current"].trim().parse::<u64>().unwrap() > 0);
    guest.remove("c").await;
}

#[tokio::test]
async fn an_out_of_memory_kill_is_reported() {
    if !has_controllers() {
        return;
    }
    let guest = Guest::new("oom").await;
    let mut spec = guest.spec(&["sh", "-c", "tail /dev/zero; echo $?; exit 9"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    let streams = guest.streams(false, false);
    guest.create("c", &spec, &streams.ports).await.unwrap();
    let client = guest.client.clone();
    let oom = tokio::spawn(async move { client.next_oom(ctx(), &Empty::new()).await });
    guest.start("c").await.unwrap();
    assert_eq!(oom.await.unwrap().unwrap().container_id, "c");
    assert_eq!(guest.wait("c", "").await.exit_status, 9);
    assert_eq!(streams.stdout.await.unwrap(), b"137\n");
    guest.remove("c").await;
}

#[tokio::test]
async fn a_memory_limit_too_low_for_the_start_says_so() {
    if !has_controllers() {
        return;
    }
    let guest = Guest::new("toolow").await;
    let mut spec = guest.spec(&["true"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 4096});
    let error = guest.create("c", &spec, &Default::default()).await.unwrap_err();
    assert!(error.to_string().contains("is its memory limit too low?"), "{error}");
}
