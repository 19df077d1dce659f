//! Pods of the Sandbox service.

use containerd_shim_protos::api::{CreateTaskRequest, PidsRequest, StartRequest, StateRequest, WaitRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, SandboxMetricsRequest, SandboxStatusRequest, SandboxStatusResponse,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::asynchronous::Client;

use crate::containerd::{Containerd, can_run, code_and_text, ctx, eventually};
use crate::silent::stop_agent_of;

/// A pod that is to be.
struct Pod {
    containerd: Containerd,
    client: SandboxClient,
}

impl Pod {
    async fn new(name: &str) -> Self {
        let containerd = Containerd::start_sandbox(name).await;
        let client = SandboxClient::new(Client::connect(&containerd.address).await.unwrap());
        Self { containerd, client }
    }

    fn id(&self) -> String {
        self.containerd.id()
    }

    async fn create(&self) -> ttrpc::Result<()> {
        let bundle_path = self.containerd.bundle().to_str().unwrap().into();
        let request = CreateSandboxRequest { sandbox_id: self.id(), bundle_path, ..Default::default() };
        self.client.create_sandbox(ctx(), &request).await.map(drop)
    }

    async fn start(&self) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest { sandbox_id: self.id(), ..Default::default() };
        self.client.start_sandbox(ctx(), &request).await.map(|answer| answer.pid)
    }

    async fn stop(&self, timeout_secs: u32) -> ttrpc::Result<()> {
        let request = StopSandboxRequest { sandbox_id: self.id(), timeout_secs, ..Default::default() };
        self.client.stop_sandbox(ctx(), &request).await.map(drop)
    }

    async fn wait(&self) -> ttrpc::Result<u32> {
        let request = WaitSandboxRequest { sandbox_id: self.id(), ..Default::default() };
        self.client.wait_sandbox(ctx(), &request).await.map(|answer| answer.exit_status)
    }

    async fn status(&self) -> ttrpc::Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest { sandbox_id: self.id(), ..Default::default() };
        self.client.sandbox_status(ctx(), &request).await
    }

    async fn ping(&self) -> ttrpc::Result<()> {
        let request = PingRequest { sandbox_id: self.id(), ..Default::default() };
        self.client.ping_sandbox(ctx(), &request).await.map(drop)
    }

    async fn metrics(&self) -> Metrics {
        let request = SandboxMetricsRequest { sandbox_id: self.id(), ..Default::default() };
        let answer = self.client.sandbox_metrics(ctx(), &request).await.unwrap();
        Metrics::parse_from_bytes(&answer.metrics.data.value).unwrap()
    }

    async fn shut_down(&self) {
        let request = ShutdownSandboxRequest { sandbox_id: self.id(), ..Default::default() };
        self.client.shutdown_sandbox(ctx(), &request).await.unwrap();
        let socket = self.containerd.address.strip_prefix("unix://").unwrap().to_owned();
        eventually(|| !std::path::Path::new(&socket).exists()).await;
        assert_eq!(self.containerd.traces(), Vec::<String>::new());
    }

    /// Creates and starts a container in it.
    async fn run(&self, id: &str, script: &str) -> ttrpc::Result<()> {
        self.run_in(id, script, &json!({"type": "pid"})).await.map(drop)
    }

    /// As [`Pod::run`], in a pid namespace. The answer is its pid.
    async fn run_in(&self, id: &str, script: &str, namespace: &Value) -> ttrpc::Result<u32> {
        let annotations = json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.id()});
        let process = json!({"args": ["sh", "-c", script]});
        let mut namespaces: Vec<_> =
            ["mount", "ipc", "uts", "cgroup", "network"].iter().map(|kind| json!({"type": kind})).collect();
        namespaces.push(namespace.clone());
        let linux = json!({"namespaces": namespaces});
        let changes = json!({"annotations": annotations, "process": process, "linux": linux});
        let bundle = self.containerd.add_bundle(id, &changes);
        let stdout = format!("file://{}", self.containerd.directory.join("out").display());
        let bundle = bundle.to_str().unwrap().into();
        let request = CreateTaskRequest { id: id.into(), bundle, stdout, ..Default::default() };
        self.containerd.client.create(ctx(), &request).await?;
        let request = StartRequest { id: id.into(), ..Default::default() };
        self.containerd.client.start(ctx(), &request).await.map(|answer| answer.pid)
    }
}

/// Bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    code_and_text(result.unwrap_err()).0
}

#[tokio::test]
async fn a_pod_from_create_to_shutdown() {
    if !can_run() {
        return;
    }
    let pod = Pod::new("pod").await;
    let member = format!("{}-member", pod.id());
    assert_eq!(code(pod.status().await), Code::NOT_FOUND);
    pod.create().await.unwrap();
    assert_eq!(code(pod.create().await), Code::ALREADY_EXISTS);
    let status = pod.status().await.unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));
    assert_eq!(code(pod.run(&member, "true").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.ping().await), Code::FAILED_PRECONDITION);

    let pid = pod.start().await.unwrap();
    assert_eq!(code(pod.start().await), Code::FAILED_PRECONDITION);
    let status = pod.status().await.unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", pid));
    pod.ping().await.unwrap();
    let used = pod.metrics().await;
    let resident = [std::process::id(), pid].map(resident);
    // This process is far larger than the shim.
    assert!(used.memory.usage > resident[1] && used.memory.usage < resident[0] + 2 * resident[1], "{used:?}");
    assert!(used.cpu.usage_usec >= used.cpu.user_usec, "{used:?}");
    // It is no task.
    let request = StateRequest { id: pod.id(), ..Default::default() };
    assert_eq!(code(pod.containerd.client.state(ctx(), &request).await), Code::NOT_FOUND);
    let request = PidsRequest { id: pod.id(), ..Default::default() };
    assert_eq!(code(pod.containerd.client.pids(ctx(), &request).await), Code::NOT_FOUND);

    let script = "cat /etc/hostname; trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    pod.run(&member, script).await.unwrap();
    eventually(|| pod.containerd.file("out").contains("ready")).await;
    let name = nix::sys::utsname::uname().unwrap().nodename().to_string_lossy().into_owned();
    assert_eq!(pod.containerd.file("out"), format!("{name}\nready\n"));

    // Somebody waits while it is stopped.
    let (exit, stopped) = tokio::join!(pod.wait(), pod.stop(30));
    stopped.unwrap();
    assert_eq!(exit.unwrap(), 137);
    pod.stop(0).await.unwrap();
    let request = WaitRequest { id: member.clone(), ..Default::default() };
    assert_eq!(pod.containerd.client.wait(ctx(), &request).await.unwrap().exit_status, 7);
    let status = pod.status().await.unwrap();
    assert!(status.state == "SANDBOX_NOTREADY" && status.exited_at.is_some(), "{status:?}");
    assert_eq!(code(pod.start().await), Code::FAILED_PRECONDITION);
    assert_eq!(code(pod.run("late", "true").await), Code::FAILED_PRECONDITION);
    // containerd deletes the tasks of a pod at any time.
    let request = containerd_shim_protos::api::DeleteRequest { id: member, ..Default::default() };
    assert_eq!(pod.containerd.client.delete(ctx(), &request).await.unwrap().exit_status, 7);
    pod.shut_down().await;
    assert_eq!(pod.containerd.topics(), ["create", "start", "exit", "delete"], "of the container alone");
}

#[tokio::test]
async fn a_container_joins_the_processes_of_the_one_that_it_names() {
    if !can_run() {
        return;
    }
    let pod = Pod::new("debug").await;
    pod.create().await.unwrap();
    let machine = pod.start().await.unwrap();
    let own = json!({"type": "pid"});
    let of = |pid: u32| json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")});
    let one = pod.run_in("debug-one", "exec sleep 1001", &own).await.unwrap();
    let two = pod.run_in("debug-two", "exec sleep 1002", &own).await.unwrap();
    assert!(one != two && one != machine && two != machine, "{one}, {two}, {machine}");
    let first = "cat /proc/1/cmdline; echo; exec sleep 1003";
    pod.run_in("debug-three", first, &of(two)).await.unwrap();
    eventually(|| pod.containerd.file("out").contains('\n')).await;
    assert_eq!(pod.containerd.file("out"), "sleep\u{0}1002\u{0}\n");
    let (code, text) =
        code_and_text(pod.run_in("debug-four", first, &of(std::process::id())).await.unwrap_err());
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("the host's pid namespace"), "{text}");
    // There are no more threads.
    let other = pod.run_in("debug-five", "exec sleep 1004", &own).await.unwrap();
    assert_eq!(other, machine);
    pod.run_in("debug-six", first, &of(machine)).await.unwrap();
    eventually(|| pod.containerd.file("out").ends_with("sleep\u{0}1004\u{0}\n")).await;
    pod.run_in("debug-seven", "exec sleep 1005", &own).await.unwrap();
    let (code, _) = code_and_text(pod.run_in("debug-eight", first, &of(machine)).await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION);
    pod.shut_down().await;
}

#[tokio::test]
async fn a_pod_that_is_shut_down_is_gone_with_all_that_runs_in_it() {
    if !can_run() {
        return;
    }
    // containerd may give up at any point.
    let pod = Pod::new("given-up").await;
    assert_eq!(code(pod.stop(0).await), Code::NOT_FOUND);
    pod.shut_down().await;

    let pod = Pod::new("running").await;
    pod.create().await.unwrap();
    pod.start().await.unwrap();
    pod.run(&format!("{}-member", pod.id()), "exec sleep 1000").await.unwrap();
    pod.shut_down().await;
}

#[tokio::test]
async fn a_pod_that_cannot_start_says_why() {
    if !can_run() {
        return;
    }
    let pod = Pod::new("wrong").await;
    std::fs::remove_file(pod.containerd.directory.join("kernel")).unwrap();
    pod.create().await.unwrap();
    let (_, text) = code_and_text(pod.start().await.unwrap_err());
    assert!(text.contains("kernel") && text.contains("No such file"), "{text}");
    let status = pod.status().await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    pod.shut_down().await;
}

#[tokio::test]
async fn a_pod_whose_guest_does_not_answer_is_stopped() {
    if !can_run() {
        return;
    }
    let pod = Pod::new("sandbox-silent").await;
    pod.create().await.unwrap();
    let machine = pod.start().await.unwrap();
    pod.ping().await.unwrap();
    stop_agent_of(machine).await;
    assert_eq!(code(pod.ping().await), Code::DEADLINE_EXCEEDED);
    pod.stop(1).await.unwrap();
    assert_eq!(pod.wait().await.unwrap(), 137);
    pod.shut_down().await;
}
