//! The Sandbox service of containerd 2 (`containerd.runtime.sandbox.v1.Sandbox`), for pods whose handler has
//! `sandboxer = "shim"`. Their containers come through the Task service of the same shim.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::task::run;
use crate::error::{Error, Result};
use crate::host::events::{any, timestamp};
use crate::pod::Pod;
use crate::pod::sandbox::PodSandbox;

/// The states of a pod in Kubernetes' words, which containerd passes on.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

struct Sandboxes {
    /// The one that this shim serves.
    id: String,
    sandbox: Arc<PodSandbox>,
}

/// The service by its name.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(Sandboxes { id: pod.id().to_owned(), sandbox: PodSandbox::new(pod) }))
}

impl Sandboxes {
    fn of(&self, id: &str) -> Result<Arc<PodSandbox>> {
        if id == self.id {
            return Ok(Arc::clone(&self.sandbox));
        }
        Err(Error::NotFound(format!("sandbox {id}")))
    }
}

#[async_trait]
impl Sandbox for Sandboxes {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let sandbox = self.of(&request.sandbox_id)?;
        run(async move { sandbox.create(request).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let sandbox = self.of(&request.sandbox_id)?;
        let (pid, created_at) = run(async move { sandbox.start().await }).await?;
        let created_at = Some(timestamp(created_at)).into();
        Ok(StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.of(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        // The words of Go, as in image configurations.
        (platform.os, platform.architecture) = ("linux".into(), "amd64".into());
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let sandbox = self.of(&request.sandbox_id)?;
        let grace = Duration::from_secs(request.timeout_secs.into());
        run(async move { sandbox.stop(grace).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.of(&request.sandbox_id)?.wait().await?;
        let exited_at = Some(timestamp(exit.at)).into();
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let sandbox = self.of(&request.sandbox_id)?;
        let status = sandbox.status().await?;
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: if status.ready { READY } else { NOT_READY }.into(),
            info: if request.verbose { sandbox.details().await } else { HashMap::new() },
            created_at: Some(timestamp(status.created_at)).into(),
            exited_at: status.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.of(&request.sandbox_id)?.ping().await?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let sandbox = self.of(&request.sandbox_id)?;
        run(async move {
            sandbox.shut_down().await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let metrics = self.of(&request.sandbox_id)?.metrics().await?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.id = request.sandbox_id;
        metric.data = Some(any(&metrics)).into();
        Ok(response)
    }
}
