//! The life of pods and of their containers.

use katana_tests::cri::Pod;
use katana_tests::cri::messages::container_status::State;
use katana_tests::cri::messages::pod_sandbox_status::State as PodState;
use serde_json::json;

use super::cases;

cases! {
    /// Run, status, stop, remove; stop and remove as often as one likes.
    a_pod_is_run_stopped_and_removed,
}

fn a_pod_is_run_stopped_and_removed(handler: &str) {
    let pod = Pod::run_with(handler, json!({"labels": {"app": "test"}, "annotations": {"note": "a b"}}));
    let status = pod.status();
    assert_eq!(status.state.enum_value_or_default(), PodState::SANDBOX_READY);
    assert_eq!(status.runtime_handler, handler);
    assert_eq!(status.metadata.name, pod.config().metadata.name);
    assert_eq!((status.labels["app"].as_str(), status.annotations["note"].as_str()), ("test", "a b"));

    let container = pod.sh("echo hello; exec sleep 10000");
    assert_eq!(container.state(), State::CONTAINER_RUNNING);
    container.wait_for_output("hello");
    assert_eq!(container.exec(&["echo", "hi"]).ok(), "hi");

    pod.stop().unwrap();
    pod.stop().unwrap();
    assert_eq!(pod.status().state.enum_value_or_default(), PodState::SANDBOX_NOTREADY);
    assert_eq!(container.status().exit_code, 137);
    pod.remove().unwrap();
    pod.remove().unwrap();
    assert_eq!(pod.try_status().map_err(|e| e.code), Err(5), "not found");
}
