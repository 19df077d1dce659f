//! Pods as kubelet makes them: through containerd's Container Runtime Interface.
//!
//! Requests are written as JSON with the interface's names, as in the files of `crictl`, over what kubelet always sends.

mod container;
mod grpc;
mod log;
mod pod;
mod shared;
mod streaming;
mod websocket;

pub use container::{Container, Exec};
pub use grpc::Status;
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
}

use protobuf::{Message, MessageFull};
use serde_json::Value;

use crate::{Containerd, environment};

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
