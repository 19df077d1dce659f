//! The life of tasks, as a client sees it.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, PauseRequest, PidsRequest, ResumeRequest, ShutdownRequest, StartRequest, StatsRequest,
    Status, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim::oci::ProcessDetails;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::containerd::{Containerd, HANG, can_run, code_and_text, ctx, eventually, say_skipped, shim};
use crate::hung::Hung;

#[tokio::test]
async fn a_container_from_create_to_delete() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("life").await;
    containerd
        .configure_container(&json!({"process": {"args": ["sh", "-c", "echo out; echo err >&2; exit 42"]}}));
    let pid = containerd.client.create(ctx(), &containerd.create_request()).await.unwrap().pid;
    let state = containerd.state("").await.unwrap();
    assert_eq!((state.status(), state.pid), (Status::CREATED, pid));
    let vmm = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(vmm.contains("stand_in"), "{vmm}");
    let start = StartRequest { id: containerd.id(), ..Default::default() };
    assert_eq!(containerd.client.start(ctx(), &start).await.unwrap().pid, pid);
    assert_eq!(containerd.wait("").await, 42);
    assert_eq!((containerd.file("out").as_str(), containerd.file("err").as_str()), ("out\n", "err\n"));
    let state = containerd.state("").await.unwrap();
    assert_eq!((state.status(), state.exit_status, state.exited_at.is_some()), (Status::STOPPED, 42, true));
    assert_eq!(containerd.wait("").await, 42);
    let error = code_and_text(containerd.kill("", 9).await.unwrap_err());
    assert_eq!(error, (Code::NOT_FOUND, "process already finished: not found".into()));
    let error = code_and_text(containerd.client.start(ctx(), &start).await.unwrap_err());
    assert_eq!(error, (Code::FAILED_PRECONDITION, "cannot start a stopped process".into()));
    let deleted = containerd.delete("").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (42, pid));
    assert_eq!(code_and_text(containerd.state("").await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(code_and_text(containerd.delete("").await.unwrap_err()).0, Code::NOT_FOUND);
    containerd.shut_down().await;
    assert_eq!(containerd.topics(), ["create", "start", "exit", "delete"]);
    assert_eq!(containerd.traces(), Vec::<String>::new());
}

#[tokio::test]
async fn execs_and_their_events() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("execs").await;
    containerd.run("exec sleep 1000").await;
    containerd.exec("one", "echo hello; exit 3").await.unwrap();
    assert_eq!(containerd.wait("one").await, 3);
    assert_eq!(containerd.file("one"), "hello\n");
    let error = code_and_text(containerd.exec("one", "true").await.unwrap_err());
    assert_eq!(error, (Code::ALREADY_EXISTS, "id one: already exists".into()));
    assert_eq!(containerd.delete("one").await.unwrap().exit_status, 3);
    assert_eq!(code_and_text(containerd.state("one").await.unwrap_err()).0, Code::NOT_FOUND);

    containerd.exec("two", "exec sleep 1000").await.unwrap();
    let processes =
        containerd.client.pids(ctx(), &PidsRequest { id: containerd.id(), ..Default::default() }).await;
    let processes = processes.unwrap().processes;
    assert_eq!(processes.len(), 2);
    let details: Vec<_> = processes.iter().filter_map(|process| process.info.as_ref()).collect();
    assert_eq!(details[0].type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(ProcessDetails::parse_from_bytes(&details[0].value).unwrap().exec_id, "two");
    let error = code_and_text(containerd.delete("two").await.unwrap_err());
    assert_eq!(error, (Code::FAILED_PRECONDITION, "cannot delete a running process".into()));
    containerd.kill("two", 9).await.unwrap();
    assert_eq!(containerd.wait("two").await, 137);

    // A missing program is reported at once, and the container lives.
    let process =
        json!({"args": ["nowhere"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    containerd.client.exec(ctx(), &containerd.exec_request("bad", &process)).await.unwrap();
    let (code, text) = code_and_text(containerd.start_exec("bad").await.unwrap_err());
    assert!(text.contains("executable file not found in $PATH"), "{code:?} {text}");
    assert_eq!(containerd.wait("bad").await, 255);
    containerd.delete("bad").await.unwrap();
    assert_eq!(containerd.state("").await.unwrap().status(), Status::RUNNING);
    let error = code_and_text(containerd.delete("").await.unwrap_err());
    assert_eq!(error, (Code::FAILED_PRECONDITION, "cannot delete a running process".into()));

    containerd.kill("", 15).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    containerd.kill("", 9).await.unwrap();
    assert_eq!(containerd.wait("").await, 137);
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
    let topics = containerd.topics();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "exec-added",
        "exec-started",
        "exit",
        "exec-added",
        "exit",
        "delete",
    ];
    assert_eq!(topics, expected);
}

#[tokio::test]
async fn many_execs_at_once_end_after_they_started() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("many").await;
    containerd.run("exec sleep 1000").await;
    let ids: Vec<_> = (0..50).map(|number| format!("e{number}")).collect();
    let mut all = Vec::new();
    for id in &ids {
        let containerd = &containerd;
        all.push(async move {
            containerd.exec(id, &format!("echo {id}; exit 7")).await.unwrap();
            assert_eq!(containerd.wait(id).await, 7);
            assert_eq!(containerd.file(id), format!("{id}\n"));
            containerd.delete(id).await.unwrap();
        });
    }
    join_all(all).await;
    containerd.end().await;
    let events = containerd.events();
    for id in &ids {
        let at = |topic: &str, matches: &dyn Fn(&serde_json::Value) -> bool| {
            events.iter().position(|(name, details)| name == topic && matches(details)).unwrap()
        };
        let started = at("/tasks/exec-started", &|details| details == id);
        let exited = at("/tasks/exit", &|details| details["id"] == **id && details["status"] == 7);
        assert!(started < exited, "{id}");
    }
}

/// Polls all futures until all are done.
async fn join_all<F: Future<Output = ()>>(futures: Vec<F>) {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| future.as_mut().poll(context).is_pending());
        if futures.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test]
async fn pause_stats_and_update() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("pause").await;
    containerd.run("while true; do echo x; sleep 0.01; done").await;
    let id = containerd.id();
    let pause = PauseRequest { id: id.clone(), ..Default::default() };
    if let Err(e) = containerd.client.pause(ctx(), &pause).await {
        say_skipped(&format!("no freezer for cgroup v2 here: {e}"));
    } else {
        assert_eq!(containerd.state("").await.unwrap().status(), Status::PAUSED);
        let error = code_and_text(containerd.client.pause(ctx(), &pause).await.unwrap_err());
        assert_eq!(error.0, Code::FAILED_PRECONDITION);
        let error = code_and_text(containerd.exec("e", "true").await.unwrap_err());
        assert_eq!(error, (Code::FAILED_PRECONDITION, "cannot exec in a paused state".into()));
        let error = code_and_text(containerd.delete("").await.unwrap_err());
        assert_eq!(error, (Code::FAILED_PRECONDITION, "cannot delete a paused process".into()));
        containerd
            .client
            .resume(ctx(), &ResumeRequest { id: id.clone(), ..Default::default() })
            .await
            .unwrap();
        assert_eq!(containerd.state("").await.unwrap().status(), Status::RUNNING);
        assert_eq!(containerd.topics()[2..], ["paused", "resumed"]);
    }
    let stats =
        containerd.client.stats(ctx(), &StatsRequest { id: id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.stats.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0, "{metrics:?}");
    let resources = Any { value: b"[".to_vec(), ..Default::default() };
    let update =
        UpdateTaskRequest { id: id.clone(), resources: Some(resources).into(), ..Default::default() };
    let error = code_and_text(containerd.client.update(ctx(), &update).await.unwrap_err());
    assert_eq!(error.0, Code::INVALID_ARGUMENT);
    containerd.kill("", 9).await.unwrap();
    containerd.wait("").await;
    // Not while there is a container.
    containerd.client.shutdown(ctx(), &ShutdownRequest { id, ..Default::default() }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
}

#[tokio::test]
async fn a_container_that_never_started_can_be_deleted() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("created").await;
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    let error =
        code_and_text(containerd.client.create(ctx(), &containerd.create_request()).await.unwrap_err());
    assert_eq!(error.0, Code::ALREADY_EXISTS);
    assert_eq!(containerd.delete("").await.unwrap().exit_status, 137);
    containerd.shut_down().await;
    assert_eq!(containerd.topics(), ["create", "exit", "delete"]);
}

#[tokio::test]
async fn the_end_of_the_vmm_is_the_end_of_all_processes() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("vmm-dies").await;
    containerd.run("exec sleep 1000").await;
    containerd.exec("e", "exec sleep 1000").await.unwrap();
    let pid = containerd.state("").await.unwrap().pid;
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    assert_eq!((containerd.wait("").await, containerd.wait("e").await), (137, 137));
    let error = code_and_text(containerd.exec("f", "true").await.unwrap_err());
    assert_eq!(error.0, Code::FAILED_PRECONDITION);
    containerd.delete("e").await.unwrap();
    assert_eq!(containerd.delete("").await.unwrap().exit_status, 137);
    containerd.shut_down().await;
    assert_eq!(containerd.topics().iter().filter(|topic| *topic == "exit").count(), 2);
}

#[tokio::test]
async fn delete_cleans_up_after_a_killed_shim() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("shim-dies").await;
    containerd.run("exec sleep 1000").await;
    let vmm = Pid::from_raw(containerd.state("").await.unwrap().pid as i32);
    kill(Pid::from_raw(containerd.shim_pid().await), Signal::SIGKILL).unwrap();
    assert!(!containerd.traces().is_empty());
    let deleted = containerd.delete_action();
    assert_eq!(
        (deleted.exit_status, deleted.pid, deleted.exited_at.is_some()),
        (137, vmm.as_raw() as u32, true)
    );
    assert_eq!(containerd.traces(), Vec::<String>::new());
    eventually(|| kill(vmm, None).is_err()).await;
    assert_eq!(containerd.delete_action().exit_status, 137);
}

/// `ctr run` with a volume whose server does not answer, and then Ctrl-C: containerd does not know of a task.
#[tokio::test]
async fn delete_ends_a_shim_that_is_still_busy_with_create() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("busy").await;
    let Some(volume) = Hung::mount(&containerd.directory.join("volume")) else {
        say_skipped("no FUSE here");
        return containerd.shut_down().await;
    };
    let mount = json!({"destination": "/mnt", "type": "bind", "source": volume.path, "options": ["rbind"]});
    containerd.configure_container(&json!({"mounts": [mount]}));
    let shim = containerd.shim_pid().await;
    let request = containerd.create_request();
    let mut created = std::pin::pin!(containerd.client.create(ctx(), &request));
    tokio::select! {
        outcome = &mut created => panic!("{outcome:?}"),
        () = eventually(|| volume.is_asked()) => {}
    }
    assert_eq!(code_and_text(containerd.delete("").await.unwrap_err()).0, Code::NOT_FOUND);
    let shut_down = ShutdownRequest { id: containerd.id(), ..Default::default() };
    containerd.client.shutdown(ctx(), &shut_down).await.unwrap();
    assert_eq!(containerd.delete_action().pid, 0);
    let stat = std::fs::read_to_string(format!("/proc/{shim}/stat")).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    created.await.unwrap_err();
    drop(volume);
    assert_eq!(containerd.traces(), Vec::<String>::new());
    assert!(containerd.topics().is_empty());
}

#[tokio::test]
async fn sigterm_ends_the_pod_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("sigterm").await;
    containerd.run("exec sleep 1000").await;
    let shim = containerd.shim_pid().await;
    kill(Pid::from_raw(shim), Signal::SIGTERM).unwrap();
    eventually(|| containerd.traces().is_empty()).await;
    assert_eq!(containerd.topics(), ["create", "start", "exit"]);
}

/// containerd goes away in the middle of Create; the next one finds the task and can delete it
/// (kata-containers#5246).
#[tokio::test]
async fn a_create_survives_its_client() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("orphan").await;
    let client = ttrpc::asynchronous::Client::connect(&containerd.address).await.unwrap();
    let client = containerd_shim_protos::shim_async::TaskClient::new(client);
    let request = containerd.create_request();
    let cut = tokio::time::timeout(Duration::from_millis(20), client.create(ctx(), &request)).await;
    drop(client);
    let begin = Instant::now();
    while containerd.state("").await.is_err() {
        assert!(cut.is_err() && begin.elapsed() < HANG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
    assert_eq!(containerd.topics(), ["create", "exit", "delete"]);
}

/// Both names of the service lead to the same tasks, and a second `start` of the same id to the same shim.
#[tokio::test]
async fn the_service_has_two_names_and_one_shim() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("names").await;
    let output = shim(&containerd.directory, &containerd.bundle(), &containerd.id(), "start");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), containerd.address);
    let client = ttrpc::asynchronous::Client::connect(&containerd.address).await.unwrap();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = ttrpc::Request::new();
        request.service = service.into();
        request.method = "Checkpoint".into();
        let error = code_and_text(client.request(request).await.unwrap_err());
        assert_eq!(error, (Code::UNIMPLEMENTED, "checkpoint is not supported".into()), "{service}");
    }
    let pids =
        containerd.client.pids(ctx(), &PidsRequest { id: containerd.id(), ..Default::default() }).await;
    assert_eq!(code_and_text(pids.unwrap_err()).0, Code::NOT_FOUND);
    assert_ne!(containerd.shim_pid().await, 0);
    containerd.shut_down().await;
}

/// A second container of the pod is in the same machine, and the machine lives until the last one is deleted.
#[tokio::test]
async fn a_pod_of_two_containers() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("pod-of-two").await;
    let sandbox = containerd.id();
    let annotations = |kind: &str| json!({"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox});
    containerd.configure_container(
        &json!({"annotations": annotations("sandbox"), "process": {"args": ["sleep", "1000"]}}),
    );
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    let start = |id: &str| StartRequest { id: id.into(), ..Default::default() };
    containerd.client.start(ctx(), &start(&sandbox)).await.unwrap();

    let second = format!("{sandbox}-app");
    let bundle = containerd.directory.join(&second);
    assert!(
        std::process::Command::new("cp")
            .arg("-a")
            .args([&containerd.bundle(), &bundle])
            .status()
            .unwrap()
            .success()
    );
    let mut spec: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bundle.join("config.json")).unwrap()).unwrap();
    spec["annotations"] = annotations("container");
    spec["process"]["args"] = json!(["sh", "-c", "exit 5"]);
    let path = format!("/proc/{}/ns/ipc", containerd.state("").await.unwrap().pid);
    spec["linux"]["namespaces"][2] = json!({"type": "ipc", "path": path});
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let output = shim(&containerd.directory, &bundle, &second, "start");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), containerd.address);
    let mut request = containerd.create_request();
    (request.id, request.bundle) = (second.clone(), bundle.to_str().unwrap().into());
    // It is known by a thread of the machine's process.
    let pid = containerd.client.create(ctx(), &request).await.unwrap().pid;
    assert_eq!(containerd.client.start(ctx(), &start(&second)).await.unwrap().pid, pid);
    let machine = containerd.state("").await.unwrap().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(pid != machine && status.contains(&format!("\nTgid:\t{machine}\n")), "{machine}, {status}");
    let connect = ConnectRequest { id: second.clone(), ..Default::default() };
    assert_eq!(containerd.client.connect(ctx(), &connect).await.unwrap().task_pid, pid);
    let wait = containerd_shim_protos::api::WaitRequest { id: second.clone(), ..Default::default() };
    assert_eq!(containerd.client.wait(ctx(), &wait).await.unwrap().exit_status, 5);
    let delete = containerd_shim_protos::api::DeleteRequest { id: second, ..Default::default() };
    assert_eq!(containerd.client.delete(ctx(), &delete).await.unwrap().pid, pid);
    eventually(|| !std::path::Path::new(&format!("/proc/{pid}")).exists()).await;
    assert_eq!(containerd.state("").await.unwrap().status(), Status::RUNNING);
    containerd.end().await;
}
