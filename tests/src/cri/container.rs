//! A container of a pod.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::messages::container_status::State;
use super::messages::{
    ContainerConfig, ContainerRequest, ContainerStats, ContainerStatsResponse, ContainerStatus,
    ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, ExecSyncRequest,
    ExecSyncResponse, Nothing, StopContainerRequest, UpdateContainerResourcesRequest,
};
use super::{Line, Pod, Status, call, log, message, overlay};
use crate::{BUSYBOX, Containerd, container, host};

/// A container. It goes with its pod.
pub struct Container {
    id: String,
    log: PathBuf,
    pub(super) containerd: Containerd,
}

/// What a command in a container gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Exec {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The exit code.
    pub code: i32,
}

impl Exec {
    /// Standard output of a command that went well, without the last line's end.
    ///
    /// # Panics
    /// When it did not go well.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{self:#?}");
        self.stdout.trim_end_matches('\n')
    }
}

impl Container {
    pub(super) fn create(pod: &Pod, config: Value) -> Result<Self, Status> {
        let name = container::new_id();
        let log = format!("{name}.log");
        let mut all = json!({
            "metadata": {"name": name},
            "image": {"image": BUSYBOX},
            "command": ["sleep", "10000"],
            "log_path": log,
            "linux": {"security_context": {"namespace_options": {"pid": "CONTAINER"}}},
        });
        overlay(&mut all, config);
        let config: ContainerConfig = message(&all);
        let log = pod.log_file(&config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id().to_owned(),
            config: Some(config).into(),
            sandbox_config: Some(pod.config().clone()).into(),
            ..Default::default()
        };
        let answer: CreateContainerResponse = call(pod.containerd(), "CreateContainer", &request)?;
        Ok(Self { id: answer.container_id, log, containerd: pod.containerd().clone() })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn request(&self) -> ContainerRequest {
        ContainerRequest { container_id: self.id.clone(), ..Default::default() }
    }

    /// Starts it.
    pub fn start(&self) -> Result<(), Status> {
        call::<Nothing>(&self.containerd, "StartContainer", &self.request()).map(drop)
    }

    /// Asks it to end, and ends it after so many seconds.
    pub fn stop(&self, grace: i64) -> Result<(), Status> {
        let request =
            StopContainerRequest { container_id: self.id.clone(), timeout: grace, ..Default::default() };
        call::<Nothing>(&self.containerd, "StopContainer", &request).map(drop)
    }

    /// As [`Container::stop`] by a client that goes away without an answer when so much time has passed.
    pub fn stop_and_leave(&self, grace: i64, after: Duration) -> Result<(), Status> {
        let request =
            StopContainerRequest { container_id: self.id.clone(), timeout: grace, ..Default::default() };
        let method = "runtime.v1.RuntimeService/StopContainer";
        crate::grpc::call::<Nothing>(&self.containerd.address(), method, &request, after).map(drop)
    }

    /// Removes it.
    pub fn remove(&self) -> Result<(), Status> {
        call::<Nothing>(&self.containerd, "RemoveContainer", &self.request()).map(drop)
    }

    /// Its status.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let answer: ContainerStatusResponse = call(&self.containerd, "ContainerStatus", &self.request())
            .unwrap_or_else(|e| panic!("status: {e}"));
        answer.status.unwrap_or_default()
    }

    /// Its state.
    #[track_caller]
    pub fn state(&self) -> State {
        self.status().state.enum_value_or_default()
    }

    /// The pid on the host by which containerd knows it.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let tasks = container::ctr(&["--namespace", "k8s.io", "tasks", "ls"]).output().ok().text();
        let line = tasks.lines().find(|line| line.starts_with(&self.id));
        let pid = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        pid.unwrap_or_else(|| panic!("no pid of {} in\n{tasks}", self.id))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn ended(&self) -> ContainerStatus {
        let ended = host::eventually(|| self.state() == State::CONTAINER_EXITED);
        assert!(ended, "container {} does not end: {:#?}", self.id, self.status());
        self.status()
    }

    /// Runs a command in it, which may take as long as it likes.
    ///
    /// # Panics
    /// When it cannot be run.
    #[track_caller]
    pub fn exec(&self, words: &[&str]) -> Exec {
        self.try_exec(words, 0).unwrap_or_else(|e| panic!("exec {words:?}: {e}"))
    }

    /// Runs a shell script in it.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Exec {
        self.exec(&["sh", "-c", script])
    }

    /// Runs a command in it for at most so many seconds; 0 is no limit.
    pub fn try_exec(&self, words: &[&str], timeout: i64) -> Result<Exec, Status> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            timeout,
            ..Default::default()
        };
        let answer: ExecSyncResponse = call(&self.containerd, "ExecSync", &request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Exec { stdout: text(&answer.stdout), stderr: text(&answer.stderr), code: answer.exit_code })
    }

    /// Its statistics.
    ///
    /// # Panics
    /// When there are none.
    #[track_caller]
    pub fn stats(&self) -> ContainerStats {
        let answer: ContainerStatsResponse = call(&self.containerd, "ContainerStats", &self.request())
            .unwrap_or_else(|e| panic!("statistics: {e}"));
        answer.stats.unwrap_or_default()
    }

    /// Changes its resources.
    pub fn update(&self, resources: &Value) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(message(resources)).into(),
            ..Default::default()
        };
        call::<Nothing>(&self.containerd, "UpdateContainerResources", &request).map(drop)
    }

    /// Where its log is.
    pub fn log_file(&self) -> &std::path::Path {
        &self.log
    }

    /// The lines of its log.
    #[track_caller]
    pub fn log(&self) -> Vec<Line> {
        log::read(&self.log)
    }

    /// What it wrote to standard output so far.
    #[track_caller]
    pub fn output(&self) -> String {
        self.log().into_iter().filter(|line| line.stream == "stdout").map(|line| line.text).collect()
    }

    /// Waits until its log has this in it.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn wait_for_output(&self, text: &str) {
        let come = host::eventually(|| self.output().contains(text));
        assert!(come, "no {text:?} in the log:\n{:#?}", self.log());
    }

    /// Has the log written to a new file of the same name: kubelet has renamed the old one.
    pub fn reopen_log(&self) -> Result<(), Status> {
        call::<Nothing>(&self.containerd, "ReopenContainerLog", &self.request()).map(drop)
    }
}
