//! `ctr tasks` and `ctr events`.

use std::thread::sleep;
use std::time::Duration;

use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Container, Events, Run, ctr};
use serde_json::Value;

#[test]
fn a_paused_container_stands_still() {
    let _turn = shared();
    let id = katana_tests::container::new_id();
    let script = "echo first; while :; do echo tick; sleep 0.1; done";
    let running = Run::new(BUSYBOX).id(&id).sh(script).spawn();
    let container = Container::adopt(&id);
    running.wait_for("tick");
    container.task("pause", &[]).ok();
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    // What was under way when the container froze may still arrive.
    sleep(Duration::from_millis(500));
    let before = running.stdout().len();
    sleep(Duration::from_secs(2));
    assert_eq!(running.stdout().len(), before, "a paused container wrote something");
    container.task("resume", &[]).ok();
    running.wait_until("the container goes on", |text| text.len() > before);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    container.task("kill", &["--signal", "KILL"]).ok();
    running.finish().expect_code(137);
}

#[test]
fn ps_lists_the_containers_processes() {
    let _turn = shared();
    let container = Run::new(BUSYBOX).sh("sleep 10001 & sleep 10002 & echo; wait").start();
    let id = katana_tests::container::new_id();
    let exec =
        container.exec_command(&["--exec-id", &id], &["sh", "-c", "echo started; exec sleep 10003"]).spawn();
    exec.wait_for("started");
    let output = container.task("ps", &[]).ok();
    let rows: Vec<u32> =
        output.text().lines().skip(1).filter_map(|row| row.split_whitespace().next()?.parse().ok()).collect();
    assert_eq!(rows.len(), 4, "a shell, two sleeps and an exec\n{output}");
    assert!(output.text().contains(&id), "the exec's process is named\n{output}");
    drop(exec);
}

#[test]
fn ls_and_metrics_tell_the_truth() {
    let _turn = shared();
    // 32 MiB of page cache that the container wrote, and some work for the CPU
    let script =
        "head -c 33554432 /dev/zero > /dev/shm/block; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done
        mkfifo /f; echo > /tmp/ready; read x < /f";
    let options = "--memory-limit 134217728 --mount type=tmpfs,src=tmpfs,dst=/dev/shm,options=size=64m";
    let container = Run::new(BUSYBOX).options(options).sh(script).start();
    container.sh("until [ -e /tmp/ready ]; do sleep 0.1; done").ok();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    let output = container.task("metrics", &["--format", "json"]).ok();
    let metrics: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("not JSON: {e}\n{output}"));
    let number = |group: &str, field: &str| {
        metrics[group][field].as_u64().unwrap_or_else(|| panic!("no {group}.{field}\n{output}"))
    };
    assert_eq!(number("pids", "current"), 1, "{output}");
    assert!((32 << 20..128 << 20).contains(&number("memory", "usage")), "{output}");
    assert_eq!(number("memory", "usage_limit"), 128 << 20, "{output}");
    assert!(number("memory", "shmem") >= 32 << 20, "{output}");
    let used = number("cpu", "usage_usec");
    assert!(used > 0 && number("cpu", "user_usec") > 0, "{output}");
    container.sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done").ok();
    let again = container.task("metrics", &["--format", "json"]).ok();
    let metrics: Value = serde_json::from_slice(&again.stdout).unwrap_or_default();
    assert!(metrics["cpu"]["usage_usec"].as_u64() > Some(used), "CPU time grows\n{again}");
}

#[test]
fn events_come_in_order() {
    let _turn = shared();
    let events = Events::follow();
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    let id = container.id();
    container.exec_command(&["--exec-id", "one"], &["sh", "-c", "exit 3"]).output().expect_code(3);
    container.task("pause", &[]).ok();
    container.task("resume", &[]).ok();
    container.task("kill", &["--signal", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
    events.wait_for(id, "/tasks/delete");
    let all = events.of(id);
    let topics: Vec<&str> = all.iter().map(|event| event.topic.as_str()).collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    assert_eq!(topics, expected, "{all:#?}");
    let exit = |index: usize| (all[index].body["id"].as_str(), all[index].body["exit_status"].as_u64());
    assert_eq!(exit(4), (Some("one"), Some(3)), "{all:#?}");
    assert_eq!(exit(7), (Some(id), Some(137)), "{all:#?}");
    assert_eq!(all[8].body["exit_status"].as_u64(), Some(137), "{all:#?}");
    let pids: Vec<Option<u64>> = [0, 1, 7, 8].iter().map(|&index| all[index].body["pid"].as_u64()).collect();
    assert!(pids[0] > Some(0) && pids.iter().all(|pid| *pid == pids[0]), "one pid in all: {pids:?}");
}

#[test]
fn out_of_memory_is_an_event_and_137() {
    let _turn = shared();
    let events = Events::follow();
    let id = katana_tests::container::new_id();
    let fill = ["dd", "if=/dev/zero", "of=/dev/shm/file", "bs=1M", "count=60"];
    Run::new(BUSYBOX).id(&id).options("--memory-limit 33554432").command(&fill).output().expect_code(137);
    events.wait_for(&id, "/tasks/oom");
}

#[test]
fn only_a_stopped_task_can_be_deleted_and_then_started_again() {
    let _turn = shared();
    let container = Run::new(BUSYBOX).sh("echo again >> /starts; exec sleep 10000").start();
    let refused = container.task("delete", &[]);
    assert_ne!(refused.code, 0, "{refused}");
    refused.expect_error_line(&["failed precondition"]);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    container.task("kill", &["--signal", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    container.delete_task(137);
    assert_eq!(container.status(), None);
    // The container is still there, with what it wrote: a second task is a second start.
    container.task("start", &["--detach", "--null-io"]).ok();
    container.sh("wc -l < /starts").ok().expect_text("2");
}

#[test]
fn what_does_not_exist_is_not_found() {
    let _turn = shared();
    let container = Run::new(BUSYBOX).command(&["sleep", "10000"]).start();
    container.task("kill", &["--exec-id", "nobody"]).expect_error_line(&["not found"]);
    container.task("kill", &["--signal", "KILL"]).ok();
    container.wait_for_status(Some("STOPPED"));
    // runc's text, which scripts look for
    container.task("kill", &[]).expect_error_line(&["not found"]);
    ctr(&["tasks", "ps", "no-such-container"]).output().expect_error_line(&["not found"]);
}
