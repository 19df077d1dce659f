//! What containerd lists by its own services. `ctr` lists the same, and takes a third of a second for that in the test
//! machine.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use protobuf::{Enum, Message};

use crate::containerd::Containerd;
use crate::cri::messages::{
    ListContainersRequest, ListContainersResponse, ListSnapshotsRequest, ListSnapshotsResponse,
    ListTasksRequest, ListTasksResponse, ListedTask, TaskStatus,
};
use crate::{environment, grpc};

/// A task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its container.
    pub container: String,
    /// Of the container's first process.
    pub pid: u32,
    /// RUNNING, STOPPED, PAUSED..., as `ctr tasks ls` has it.
    pub status: String,
}

/// Asks again while containerd is not there: it may be about to start.
///
/// # Panics
/// When it does not come, or refuses to answer.
#[track_caller]
pub fn expect<T>(ask: impl Fn() -> Result<T, grpc::Status>) -> T {
    let end = Instant::now() + environment::hang_limit();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(status) if status.code != grpc::UNAVAILABLE || Instant::now() > end => {
                panic!("containerd does not list what it has: {status}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The containers of the tests' namespace.
///
/// # Errors
/// When containerd does not answer.
pub fn containers(containerd: &Containerd) -> Result<BTreeSet<String>, grpc::Status> {
    let answer: Vec<ListContainersResponse> =
        list(containerd, "containers.v1.Containers", &ListContainersRequest::new())?;
    Ok(answer.into_iter().flat_map(|answer| answer.containers).map(|container| container.id).collect())
}

/// Their tasks.
///
/// # Errors
/// When containerd does not answer.
pub fn tasks(containerd: &Containerd) -> Result<Vec<Task>, grpc::Status> {
    let answer: Vec<ListTasksResponse> = list(containerd, "tasks.v1.Tasks", &ListTasksRequest::new())?;
    Ok(answer.into_iter().flat_map(|answer| answer.tasks).map(Task::from).collect())
}

/// The snapshots of the usual snapshotter.
///
/// # Errors
/// When containerd does not answer.
pub fn snapshots(containerd: &Containerd) -> Result<BTreeSet<String>, grpc::Status> {
    let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), ..Default::default() };
    let answer: Vec<ListSnapshotsResponse> = list(containerd, "snapshots.v1.Snapshots", &request)?;
    Ok(answer.into_iter().flat_map(|answer| answer.info).map(|snapshot| snapshot.name).collect())
}

fn list<Answer: Message>(
    containerd: &Containerd,
    service: &str,
    request: &impl Message,
) -> Result<Vec<Answer>, grpc::Status> {
    let method = format!("containerd.services.{service}/List");
    let namespace = environment::namespace();
    grpc::call_in(Some(&namespace), &containerd.address(), &method, request, environment::hang_limit())
}

impl From<ListedTask> for Task {
    fn from(task: ListedTask) -> Self {
        let status = TaskStatus::from_i32(task.status.value()).unwrap_or(TaskStatus::UNKNOWN);
        // Such as a task of `ctr`, whose id is its container's in all versions.
        let container = if task.container_id.is_empty() { task.id } else { task.container_id };
        Self { container, pid: task.pid, status: format!("{status:?}") }
    }
}
