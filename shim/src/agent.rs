//! The agent in the guest, as the shim calls it.

use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::agent as api;
use katana_protocol::{SHARE_TAG, STREAM_KEY};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::error::{Error, Result, one_line};
use crate::mount_table::Mounted;
use crate::vmm::{End, wait_end};
use crate::volumes::Changes;

/// How long the agent may take over a request that it should answer at once.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to an agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: api::AgentClient,
    ended: watch::Receiver<Option<Arc<End>>>,
}

/// What of the host a container uses.
pub struct Uses {
    /// Disks of the machine.
    pub disks: Vec<api::Disk>,
    /// Sockets, which have stand-ins in the guest.
    pub sockets: Vec<api::HostSocket>,
    /// Mounts in the share.
    pub mounts: Vec<Mounted>,
}

/// A process: a container's first (the exec is empty) or an exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessName {
    /// The container.
    pub container: String,
    /// The exec.
    pub exec: String,
}

impl Agent {
    /// Speaks to the agent over its connection.
    pub fn new(connection: UnixStream, ended: watch::Receiver<Option<Arc<End>>>) -> Result<Self> {
        let socket = Socket::try_from(connection).map_err(|e| Error::io("connection to the agent", &e))?;
        Ok(Self { client: api::AgentClient::new(ttrpc::asynchronous::Client::new(socket)), ended })
    }

    /// Makes a call on a task of its own: dropping a request that is half written would end the connection for
    /// all, and requests of containerd are dropped whenever containerd goes away.
    async fn call<T, F>(&self, name: &str, request: F) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let mut ended = self.ended.clone();
        let answer = tokio::select! {
            answer = tokio::spawn(request) => answer.map_err(|e| Error::Host(format!("{name}: {e}")))?,
            end = wait_end(&mut ended) => return Err(Error::Unavailable(end.to_string())),
        };
        match answer {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(Error::Agent { code: status.code(), text: one_line(&status.message) })
            }
            Err(ttrpc::Error::Others(text)) if text.contains("deadline") => Err(Error::DeadlineExceeded(
                format!("the agent did not answer {name} within {} s", LIMIT.as_secs()),
            )),
            // The connection ended, so the VM most likely did as well, and its end has a better reason.
            Err(e) => match tokio::time::timeout(Duration::from_secs(1), wait_end(&mut ended)).await {
                Ok(end) => Err(Error::Unavailable(end.to_string())),
                Err(_) => Err(Error::Unavailable(format!("{name}: {e}"))),
            },
        }
    }

    /// Clock, entropy, name, share, shared memory and network of the pod, and the key to the host's ports.
    pub async fn create_sandbox(
        &self,
        hostname: &str,
        shm_bytes: u64,
        network: api::Network,
        key: [u8; STREAM_KEY],
    ) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let request = api::CreateSandboxRequest {
            hostname: hostname.into(),
            clock_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            // As much as the kernel's pool holds.
            entropy: crate::random::<64>()?.to_vec(),
            share_tag: SHARE_TAG.into(),
            network: Some(network).into(),
            shm_bytes,
            stream_key: key.to_vec(),
            ..Default::default()
        };
        let client = self.client.clone();
        self.call("CreateSandbox", async move { client.create_sandbox(limit(), &request).await }).await?;
        Ok(())
    }

    /// Brings so many of the guest's CPUs on line.
    pub async fn set_cpus(&self, count: u8) -> Result<()> {
        let request = api::SetCpusRequest { count: count.into(), ..Default::default() };
        let client = self.client.clone();
        self.call("SetCpus", async move { client.set_cpus(limit(), &request).await }).await?;
        Ok(())
    }

    /// Has the guest let go of a disk that no container uses any more.
    pub async fn release_disk(&self, slot: u8) -> Result<()> {
        let request = api::ReleaseDiskRequest { slot: slot.into(), ..Default::default() };
        let client = self.client.clone();
        self.call("ReleaseDisk", async move { client.release_disk(limit(), &request).await }).await?;
        Ok(())
    }

    /// Makes changes of shared files known to those who watch them in the guest.
    pub async fn replay_changes(&self, changes: Vec<api::Change>) -> Result<()> {
        let request = api::Changes { changes, ..Default::default() };
        let client = self.client.clone();
        self.call("ReplayChanges", async move { client.replay_changes(limit(), &request).await }).await?;
        Ok(())
    }

    /// Makes the guest's network be this.
    pub async fn update_network(&self, network: api::Network) -> Result<()> {
        let client = self.client.clone();
        self.call("UpdateNetwork", async move { client.update_network(limit(), &network).await }).await?;
        Ok(())
    }

    /// Has the guest connect a port of its `localhost` to a vsock port of the host.
    pub async fn forward_port(&self, port: u16, host_port: u32) -> Result<()> {
        let request = api::ForwardPortRequest { port: port.into(), host_port, ..Default::default() };
        let client = self.client.clone();
        self.call("ForwardPort", async move { client.forward_port(limit(), &request).await }).await?;
        Ok(())
    }

    /// Creates a container; its first process, a program or the agent's pause, waits. The answer is that process's pid
    /// in the guest.
    pub async fn create_container(
        &self,
        id: &str,
        spec: Vec<u8>,
        stdio: api::Stdio,
        pause: bool,
        uses: Uses,
    ) -> Result<u32> {
        let request = api::CreateContainerRequest {
            container_id: id.into(),
            spec,
            stdio: Some(stdio).into(),
            pause,
            disks: uses.disks,
            sockets: uses.sockets,
            mounts: uses.mounts.iter().map(mounted).collect(),
            ..Default::default()
        };
        let client = self.client.clone();
        let call = async move { client.create_container(limit(), &request).await };
        Ok(self.call("CreateContainer", call).await?.pid)
    }

    /// Tells how the mounts in volumes have changed.
    pub async fn follow_mounts(&self, changes: &Changes) -> Result<()> {
        let gone = changes.gone.iter().map(|path| path.as_os_str().as_bytes().to_vec()).collect();
        let come = changes.come.iter().map(mounted).collect();
        let request = api::MountChanges { come, gone, ..Default::default() };
        let client = self.client.clone();
        self.call("FollowMounts", async move { client.follow_mounts(limit(), &request).await }).await?;
        Ok(())
    }

    /// Starts a container's first process.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("StartContainer", async move { client.start_container(limit(), &request).await }).await?;
        Ok(())
    }

    /// Removes a stopped container.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("RemoveContainer", async move { client.remove_container(limit(), &request).await }).await?;
        Ok(())
    }

    /// Freezes a container.
    pub async fn pause_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("PauseContainer", async move { client.pause_container(limit(), &request).await }).await?;
        Ok(())
    }

    /// Thaws a container.
    pub async fn resume_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("ResumeContainer", async move { client.resume_container(limit(), &request).await }).await?;
        Ok(())
    }

    /// Changes a container's limits.
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let request =
            api::UpdateContainerRequest { container_id: id.into(), resources, ..Default::default() };
        let client = self.client.clone();
        self.call("UpdateContainer", async move { client.update_container(limit(), &request).await }).await?;
        Ok(())
    }

    /// The text of a container's cgroup files, by name.
    pub async fn container_stats(&self, id: &str) -> Result<std::collections::HashMap<String, String>> {
        let (client, request) = (self.client.clone(), container(id));
        let answer = self
            .call("ContainerStats", async move { client.container_stats(limit(), &request).await })
            .await?;
        Ok(answer.files)
    }

    /// A container's processes: pid in the guest, and the exec that the process is the first of, if any.
    pub async fn list_processes(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let (client, request) = (self.client.clone(), container(id));
        let answer =
            self.call("ListProcesses", async move { client.list_processes(limit(), &request).await }).await?;
        Ok(answer.processes.into_iter().map(|process| (process.pid, process.exec_id)).collect())
    }

    /// Starts a further process; the answer is its pid in the guest.
    pub async fn exec_process(&self, name: &ProcessName, process: Vec<u8>, stdio: api::Stdio) -> Result<u32> {
        let request = api::ExecProcessRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            process,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let client = self.client.clone();
        let call = async move { client.exec_process(limit(), &request).await };
        Ok(self.call("ExecProcess", call).await?.pid)
    }

    /// Signals a process, or all of its container.
    pub async fn signal_process(&self, name: &ProcessName, signal: u32, all: bool) -> Result<()> {
        let request = api::SignalProcessRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal,
            all,
            ..Default::default()
        };
        let client = self.client.clone();
        self.call("SignalProcess", async move { client.signal_process(limit(), &request).await }).await?;
        Ok(())
    }

    /// Sets a terminal's size.
    pub async fn resize_terminal(&self, name: &ProcessName, columns: u32, rows: u32) -> Result<()> {
        let request = api::ResizeTerminalRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            columns,
            rows,
            ..Default::default()
        };
        let client = self.client.clone();
        self.call("ResizeTerminal", async move { client.resize_terminal(limit(), &request).await }).await?;
        Ok(())
    }

    /// Waits for a process to end.
    pub async fn wait_process(&self, name: &ProcessName) -> Result<api::WaitProcessResponse> {
        let (client, request) = (self.client.clone(), process(name));
        self.call("WaitProcess", async move { client.wait_process(Context::default(), &request).await }).await
    }

    /// Forgets an ended exec.
    pub async fn remove_process(&self, name: &ProcessName) -> Result<()> {
        let (client, request) = (self.client.clone(), process(name));
        self.call("RemoveProcess", async move { client.remove_process(limit(), &request).await }).await?;
        Ok(())
    }

    /// Waits for a container to run out of memory.
    pub async fn next_oom(&self) -> Result<String> {
        let (client, request) = (self.client.clone(), api::Empty::new());
        let answer =
            self.call("NextOom", async move { client.next_oom(Context::default(), &request).await }).await?;
        Ok(answer.container_id)
    }
}

fn limit() -> Context {
    with_duration(LIMIT)
}

fn container(id: &str) -> api::ContainerRequest {
    api::ContainerRequest { container_id: id.into(), ..Default::default() }
}

fn mounted(mounted: &Mounted) -> api::SharedMount {
    let path = mounted.point.as_os_str().as_bytes().to_vec();
    api::SharedMount { path, options: mounted.restrictions(), ..Default::default() }
}

fn process(name: &ProcessName) -> api::ProcessRequest {
    api::ProcessRequest {
        container_id: name.container.clone(),
        exec_id: name.exec.clone(),
        ..Default::default()
    }
}
