//! The Task service of containerd, once as `containerd.task.v2.Task` and once as `containerd.task.v3.Task`.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Map, Value};
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::error::{Error, Result};
use crate::host::durations::{Of, Timer};
use crate::host::events::{any, timestamp};
use crate::pod::Pod;
use crate::pod::container::Container;
use crate::pod::process::{Phase, Process};
use crate::pod::stats;
use crate::pod::stdio::Paths;

/// The service of containerd 2.
const TASK_V3: &str = "containerd.task.v3.Task";
/// The service of containerd 1.6 and 1.7: the same messages under another name.
const TASK_V2: &str = "containerd.task.v2.Task";

struct Tasks(Arc<Pod>);

/// The service under both of its names.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(Tasks(Arc::clone(pod))));
    let mut services = service();
    services.extend(service().remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service)));
    services
}

/// Runs a request as a task of its own. The server drops a request's future when containerd's connection ends,
/// and what has begun must end one way or the other (kata-containers#5246).
pub async fn run<T, F>(request: F) -> ttrpc::Result<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Send + 'static,
{
    let outcome = tokio::spawn(request).await;
    outcome.map_err(|e| ttrpc::Error::Others(e.to_string()))?.map_err(ttrpc::Error::from)
}

fn timer(request: &'static str) -> Timer {
    Timer::start(Of::Requests, request)
}

#[async_trait]
impl Task for Tasks {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let _timer = timer("create");
        let pod = Arc::clone(&self.0);
        let pid = run(async move { pod.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let _timer = timer("start");
        let container = self.0.container(&request.id)?;
        let pid = run(async move { container.start(&request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let _timer = timer("delete");
        let pod = Arc::clone(&self.0);
        run(async move { pod.delete(request).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let _timer = timer("state");
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        Ok(state(&container, &process, request))
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let _timer = timer("wait");
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        let exited_at = Some(timestamp(exit.at)).into();
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("kill");
        let container = self.0.container(&request.id)?;
        run(async move { container.kill(&request.exec_id, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("exec");
        let container = self.0.container(&request.id)?;
        let spec = json_object("exec", &request.spec)?;
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.add_exec(&request.exec_id, spec, paths)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("pause");
        let container = self.0.container(&request.id)?;
        run(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("resume");
        let container = self.0.container(&request.id)?;
        run(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("resize_pty");
        let container = self.0.container(&request.id)?;
        let (columns, rows) = (request.width, request.height);
        run(async move { container.resize(&request.exec_id, columns, rows).await }).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let _timer = timer("close_io");
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("update");
        let pod = Arc::clone(&self.0);
        let resources = json_object("update", &request.resources)?;
        run(async move { pod.update(&request.id, resources).await }).await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let _timer = timer("pids");
        let container = self.0.container(&request.id)?;
        let processes = run(async move { container.processes().await }).await?;
        let processes = processes.into_iter().map(|(pid, exec)| process_info(pid, exec)).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let _timer = timer("stats");
        let container = self.0.container(&request.id)?;
        let files = run(async move { container.stats().await }).await?;
        Ok(StatsResponse { stats: Some(any(&stats::metrics(&files))).into(), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let _timer = timer("connect");
        let task_pid = self.0.container(&request.id).map_or(0, |container| container.pid);
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("shutdown");
        let pod = Arc::clone(&self.0);
        run(async move {
            pod.shut_down(&request.id).await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let _timer = timer("checkpoint");
        Err(Error::Unimplemented("checkpoint is not supported".into()).into())
    }
}

fn state(container: &Container, process: &Process, request: StateRequest) -> StateResponse {
    let exit = process.exit();
    let status = match process.phase() {
        Phase::Created => Status::CREATED,
        Phase::Running if container.is_paused() && request.exec_id.is_empty() => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped(_) => Status::STOPPED,
    };
    StateResponse {
        id: request.id,
        exec_id: request.exec_id,
        bundle: container.bundle.to_string_lossy().into_owned(),
        pid: container.pid_of(process),
        status: status.into(),
        stdin: process.paths.stdin.clone(),
        stdout: process.paths.stdout.clone(),
        stderr: process.paths.stderr.clone(),
        terminal: process.paths.terminal,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| timestamp(exit.at)).into(),
        ..Default::default()
    }
}

fn process_info(pid: u32, exec_id: String) -> ProcessInfo {
    let details = (!exec_id.is_empty()).then(|| any(&ProcessDetails { exec_id, ..Default::default() }));
    ProcessInfo { pid, info: details.into(), ..Default::default() }
}

/// An OCI object, which containerd packs as JSON.
fn json_object(what: &str, packed: &MessageField<Any>) -> Result<Map<String, Value>> {
    let bytes = packed.as_ref().map_or(&[][..], |packed| &packed.value);
    serde_json::from_slice(bytes).map_err(|e| Error::InvalidArgument(format!("{what}: {e}")))
}
