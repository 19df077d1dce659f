//! The parts of containerd's Sandbox service for which Kubernetes has no request: asked of the shim itself.

use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest, StopSandboxRequest,
    WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use katana_tests::cri::Pod;
use katana_tests::turn::shared;
use katana_tests::{Instance, environment};
use ttrpc::context::with_timeout;

/// Nanoseconds.
const LIMIT: i64 = 100_000_000_000;

fn client(instance: &Instance, id: &str) -> SandboxClient {
    let plugin = instance.containerd().directory().join("state/io.containerd.sandbox.controller.v1.shim");
    let written =
        std::fs::read(plugin.join("k8s.io").join(id).join("bootstrap.json")).expect("bootstrap.json");
    let written: serde_json::Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!((written["version"].as_u64(), written["protocol"].as_str()), (Some(3), Some("ttrpc")));
    let address = written["address"].as_str().expect("an address");
    SandboxClient::new(ttrpc::sync::Client::connect(address).expect("connect to the shim"))
}

#[test]
fn a_shim_tells_of_its_sandbox_and_ends_it_gracefully() {
    let _turn = shared();
    if !environment::is_vm_or_say("runc's shim is no sandbox") {
        return;
    }
    let instance = Instance::of_version_2();
    let _here = instance.containerd().enter();
    let pod = Pod::run("kata-shim");
    let polite = pod.sh("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done");
    polite.wait_for_output("ready");
    let (client, sandbox_id) = (client(&instance, pod.id()), pod.id().to_owned());
    let context = || with_timeout(LIMIT);

    let ping = PingRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
    client.ping_sandbox(context(), &ping).expect("ping");
    let unknown = PingRequest { sandbox_id: "another".into(), ..Default::default() };
    assert!(client.ping_sandbox(context(), &unknown).unwrap_err().to_string().contains("NOT_FOUND"));

    let request = PlatformRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
    let platform = client.platform(context(), &request).expect("platform").platform.unwrap_or_default();
    assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));

    let status = SandboxStatusRequest { sandbox_id: sandbox_id.clone(), verbose: true, ..Default::default() };
    let answer = client.sandbox_status(context(), &status).expect("status");
    assert_eq!(answer.state, "SANDBOX_READY");
    assert!(Path::new(&format!("/proc/{}", answer.pid)).exists() && answer.exited_at.is_none(), "{answer:?}");
    assert!(answer.created_at.seconds > 0 && answer.info["info"].contains(polite.id()), "{answer:?}");

    let request = SandboxMetricsRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
    let metric = client.sandbox_metrics(context(), &request).expect("metrics").metrics.unwrap_or_default();
    assert_eq!(metric.data.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&metric.data.value).expect("metrics");
    assert!(metrics.cpu.usage_usec > 1000 && metrics.pids.current >= 2, "{metrics:?}");
    assert!((50 << 10..256 << 20).contains(&metrics.memory.usage), "{metrics:?}");

    let stop = StopSandboxRequest { sandbox_id: sandbox_id.clone(), timeout_secs: 60, ..Default::default() };
    client.stop_sandbox(context(), &stop).expect("stop");
    let wait = WaitSandboxRequest { sandbox_id, ..Default::default() };
    let exit = client.wait_sandbox(context(), &wait).expect("wait");
    assert!(exit.exited_at.seconds > 0, "{exit:?}");
    let answer = client.sandbox_status(context(), &status).expect("status");
    assert_eq!(
        (answer.state.as_str(), answer.exited_at.seconds),
        ("SANDBOX_NOTREADY", exit.exited_at.seconds)
    );
    assert!(client.ping_sandbox(context(), &ping).is_err());
    assert_eq!(polite.ended().exit_code, 7);
    assert!(polite.output().contains("bye"));
    pod.stop().expect("stop");
    pod.remove().expect("remove");
}
