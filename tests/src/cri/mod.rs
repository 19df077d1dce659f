//! Pods as kubelet makes them: through containerd's Container Runtime Interface.
//!
//! Requests are written as JSON with the interface's names, as in the files of `crictl`, over what kubelet always
//! sends.

mod container;
mod log;
mod pod;
mod shared;
mod streaming;
mod websocket;

pub use crate::grpc::Status;
pub use container::{Container, Exec};
pub use log::Line;
pub use pod::Pod;
pub use shared::shared_pod;
pub use streaming::{Forward, Session};

/// The interface's messages.
#[allow(missing_docs, unused_imports, unused_qualifications)]
#[allow(clippy::all, clippy::pedantic, clippy::restriction)]
pub mod messages {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
    }
    pub use self::generated::cri::*;
    pub use self::generated::introspection::{PluginInfoRequest, PluginInfoResponse};
    pub use self::generated::services::{
        ListContainersRequest, ListContainersResponse, ListSnapshotsRequest, ListSnapshotsResponse,
        ListTasksRequest, ListTasksResponse, ListedTask, TaskStatus,
    };
}

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeRequest};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageFull};
use serde_json::Value;

use crate::{Containerd, environment, grpc};

/// The runtime handlers of the tests' containerd.
pub const HANDLERS: [&str; 2] = ["kata", "runc"];

/// Calls a method of the runtime service.
fn call<Answer: Message>(
    containerd: &Containerd,
    method: &str,
    request: &impl Message,
) -> Result<Answer, Status> {
    let method = format!("runtime.v1.RuntimeService/{method}");
    grpc::call(&containerd.address(), &method, request, environment::hang_limit())
}

/// Whether a containerd that has started answers kubelet, too.
pub fn is_ready(containerd: &Containerd) -> bool {
    let pods: Result<messages::ListPodSandboxResponse, _> =
        call(containerd, "ListPodSandbox", &messages::Nothing::new());
    pods.is_ok()
}

/// What a runtime can do, as containerd 2 passes it on: the features of the OCI runtime specification.
///
/// # Panics
/// When there is no answer, or none that has features.
#[track_caller]
pub fn features(containerd: &Containerd, runtime: &str) -> Value {
    let request = RuntimeRequest { runtime_path: runtime.to_owned(), ..Default::default() };
    let options = Any {
        type_url: "containerd.types.RuntimeRequest".to_owned(),
        value: request.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    };
    let request = messages::PluginInfoRequest {
        type_: "io.containerd.runtime.v2".to_owned(),
        id: "task".to_owned(),
        options: Some(options).into(),
        ..Default::default()
    };
    let method = "containerd.services.introspection.v1.Introspection/PluginInfo";
    let answer: Result<messages::PluginInfoResponse, _> =
        grpc::call(&containerd.address(), method, &request, environment::hang_limit());
    let extra =
        answer.unwrap_or_else(|e| panic!("introspection of {runtime}: {e}")).extra.unwrap_or_default();
    let info = RuntimeInfo::parse_from_bytes(&extra.value).unwrap_or_else(|e| panic!("{runtime}: {e}"));
    let features = info.features.unwrap_or_default();
    let kind = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
    assert_eq!(features.type_url, kind, "{runtime}");
    serde_json::from_slice(&features.value).unwrap_or_else(|e| panic!("{runtime}: {e}"))
}

/// A message from JSON.
///
/// # Panics
/// When it does not fit the message.
#[track_caller]
fn message<M: MessageFull>(json: &Value) -> M {
    protobuf_json_mapping::parse_from_str(&json.to_string()).unwrap_or_else(|e| panic!("{json}: {e}"))
}

/// Puts `over` on top of `base`: objects member by member, all else as a whole.
fn overlay(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                overlay(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}
