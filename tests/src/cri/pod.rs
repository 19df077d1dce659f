//! A pod sandbox.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::messages::{
    ListPodSandboxResponse, Nothing, PodSandboxConfig, PodSandboxRequest, PodSandboxStats,
    PodSandboxStatsResponse, PodSandboxStatus, PodSandboxStatusResponse, RunPodSandboxRequest,
    RunPodSandboxResponse,
};
use super::{Container, Status, call, message, overlay};
use crate::{Containerd, Scratch, container};

/// A pod. It is stopped and removed when this is dropped.
pub struct Pod {
    id: String,
    handler: String,
    config: PodSandboxConfig,
    logs: Scratch,
    containerd: Containerd,
}

impl Pod {
    /// Runs an ordinary pod.
    ///
    /// # Panics
    /// When it cannot be run.
    #[track_caller]
    pub fn run(handler: &str) -> Self {
        Self::run_with(handler, json!({}))
    }

    /// Runs a pod with this on top of what an ordinary one has.
    ///
    /// # Panics
    /// When it cannot be run.
    #[track_caller]
    pub fn run_with(handler: &str, config: Value) -> Self {
        Self::try_run(handler, config).unwrap_or_else(|e| panic!("run a pod with handler {handler}: {e}"))
    }

    /// Runs a pod, if it can be.
    #[track_caller]
    pub fn try_run(handler: &str, config: Value) -> Result<Self, Status> {
        let (logs, containerd) = (Scratch::new(), Containerd::current());
        let name = container::new_id();
        let mut all = json!({
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "log_directory": logs.path(),
            "linux": {
                "cgroup_parent": "/kubepods",
                "security_context": {"namespace_options": {"pid": "CONTAINER"}},
            },
        });
        overlay(&mut all, config);
        let config: PodSandboxConfig = message(&all);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()).into(),
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        let answer: RunPodSandboxResponse = call(&containerd, "RunPodSandbox", &request)?;
        Ok(Self { id: answer.pod_sandbox_id, handler: handler.to_owned(), config, logs, containerd })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The containerd that runs it.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// The runtime handler that it runs with.
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// As it was run.
    pub fn config(&self) -> &PodSandboxConfig {
        &self.config
    }

    /// The file of one of its containers' logs.
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.logs.path().join(name)
    }

    /// Stops and removes every pod that the current containerd knows, as kubelet does with those that it does not want.
    ///
    /// # Panics
    /// When one cannot be removed.
    #[track_caller]
    pub fn remove_all() {
        let containerd = Containerd::current();
        let all: ListPodSandboxResponse =
            call(&containerd, "ListPodSandbox", &Nothing::new()).unwrap_or_else(|e| panic!("list pods: {e}"));
        for pod in all.items {
            let request = PodSandboxRequest { pod_sandbox_id: pod.id, ..Default::default() };
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                let done: Result<Nothing, Status> = call(&containerd, method, &request);
                done.unwrap_or_else(|e| panic!("{method} {}: {e}", request.pod_sandbox_id));
            }
        }
    }

    fn request(&self) -> PodSandboxRequest {
        PodSandboxRequest { pod_sandbox_id: self.id.clone(), ..Default::default() }
    }

    /// Its status.
    pub fn try_status(&self) -> Result<PodSandboxStatus, Status> {
        let answer: PodSandboxStatusResponse = call(&self.containerd, "PodSandboxStatus", &self.request())?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Its status.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn status(&self) -> PodSandboxStatus {
        self.try_status().unwrap_or_else(|e| panic!("status of pod {}: {e}", self.id))
    }

    /// What its status reports when `verbose` is set: the JSON that `crictl inspectp` shows as `info`.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn info(&self) -> Value {
        let request = PodSandboxRequest { verbose: true, ..self.request() };
        let answer: PodSandboxStatusResponse = call(&self.containerd, "PodSandboxStatus", &request)
            .unwrap_or_else(|e| panic!("status of pod {}: {e}", self.id));
        let info = answer.info.get("info").unwrap_or_else(|| panic!("no info of pod {}", self.id));
        serde_json::from_str(info).unwrap_or_else(|e| panic!("{info}: {e}"))
    }

    /// Its statistics.
    ///
    /// # Panics
    /// When there are none.
    #[track_caller]
    pub fn stats(&self) -> PodSandboxStats {
        let answer: PodSandboxStatsResponse = call(&self.containerd, "PodSandboxStats", &self.request())
            .unwrap_or_else(|e| panic!("statistics: {e}"));
        answer.stats.unwrap_or_default()
    }

    /// Stops it and all its containers.
    pub fn stop(&self) -> Result<(), Status> {
        call::<Nothing>(&self.containerd, "StopPodSandbox", &self.request()).map(drop)
    }

    /// Removes it.
    pub fn remove(&self) -> Result<(), Status> {
        call::<Nothing>(&self.containerd, "RemovePodSandbox", &self.request()).map(drop)
    }

    /// Creates and starts a container that runs a shell script.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Container {
        self.start(json!({"command": ["sh", "-c", script]}))
    }

    /// Creates and starts a container with this on top of what an ordinary one has, which sleeps.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn start(&self, config: Value) -> Container {
        let container = self.create(config).unwrap_or_else(|e| panic!("create a container: {e}"));
        container.start().unwrap_or_else(|e| panic!("start a container: {e}"));
        container
    }

    /// Creates a container, if it can be.
    #[track_caller]
    pub fn create(&self, config: Value) -> Result<Container, Status> {
        Container::create(self, config)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // It may be gone already, and a test that fails must not hide its reason behind a second panic.
        let _ = self.stop();
        let _ = self.remove();
    }
}
