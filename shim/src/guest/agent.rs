//! The agent in the guest, as the shim calls it. It may be in a guest's hands: this is the one place where its answers
//! enter, and each has a time to come in and is checked here.

use std::collections::HashMap;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katana_protocol::agent as api;
use katana_protocol::{SHARE_TAG, STREAM_KEY};
use tokio::sync::watch;
use tokio::time::Instant;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use super::vmm::{End, wait_end};
use crate::error::{Error, Result, one_line};
use crate::host::durations::{Of, Timer};
use crate::storage::mount_table::Mounted;
use crate::storage::volumes::Changes;

/// For what reads programs and files, mounts, or writes to disks.
const LONG: Duration = Duration::from_secs(60);
/// For what only the guest's kernel has to do.
const SHORT: Duration = Duration::from_secs(20);
/// For what the end of a container, or of a process, waits for. containerd gives 10 s to all that follows from an exit
/// (`handleEventTimeout` of its CRI plugin).
const TIDY: Duration = Duration::from_secs(8);
/// For a signal. The agent lets one wait so long for a young program that has no handler yet (`GROWN` in
/// agent/src/early_signals.rs, 10 s), and drops what it has not done in time.
const SIGNAL: Duration = Duration::from_secs(12);
/// For SIGKILL, after which the machine ends.
const KILL: Duration = Duration::from_secs(5);
/// For looking at a container. containerd asks one after the other, so that a guest that does not answer delays the
/// answers about the others; and as it starts it takes 5 s for a sign that a shim is of no use
/// (`io.containerd.timeout.shim.load`).
const LOOK: Duration = Duration::from_secs(3);
/// For so long after an answer that did not come in time, nobody waits to look again.
const NO_LOOK: Duration = Duration::from_secs(10);
/// How much longer a request is waited for that cannot even be sent.
const GRACE: Duration = Duration::from_secs(1);

/// The most that is believed of the text of files of a container's cgroup or of the guest's kernel, bytes: lines for
/// each disk are the longest.
const MOST_STATS: usize = 256 * 1024;
/// The most processes of a container that are listed: as many as an answer to containerd can hold.
const MOST_PROCESSES: usize = 32 * 1024;
/// The highest pid that Linux can be configured to use (PID_MAX_LIMIT).
const LAST_PID: u32 = 4 << 20;
/// The highest exit code, and that of a process that was killed by the highest signal.
const LAST_STATUS: u32 = 255;

/// A connection to an agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: api::AgentClient,
    ended: watch::Receiver<Option<Arc<End>>>,
    /// When one who looked got no answer in time, unless there has been one since.
    missed: Arc<Mutex<Option<Instant>>>,
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

/// A process: a container's first (the exec is empty) or an exec; without a container one of the guest itself.
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
        let client = api::AgentClient::new(ttrpc::asynchronous::Client::new(socket));
        Ok(Self { client, ended, missed: Arc::default() })
    }

    fn missed(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call on a task of its own: dropping a request that is half written would end the connection for
    /// all, and requests of containerd are dropped whenever containerd goes away.
    async fn call<T, F>(&self, name: &'static str, limit: Option<Duration>, request: F) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let _timer = Timer::start(Of::Agent, name);
        let mut ended = self.ended.clone();
        let asked = tokio::spawn(request);
        let answer = async move {
            match limit {
                Some(limit) => tokio::time::timeout(limit + GRACE, asked).await.ok(),
                None => Some(asked.await),
            }
        };
        let answer = tokio::select! {
            answer = answer => answer.transpose().map_err(|e| Error::Host(format!("{name}: {e}")))?,
            end = wait_end(&mut ended) => return Err(Error::Unavailable(end.to_string())),
        };
        let late = || {
            let limit = limit.unwrap_or_default().as_secs();
            Error::DeadlineExceeded(format!("the agent did not answer {name} within {limit} s"))
        };
        match answer {
            None => Err(late()),
            Some(Ok(answer)) => {
                *self.missed() = None;
                Ok(answer)
            }
            Some(Err(ttrpc::Error::RpcStatus(status))) => {
                *self.missed() = None;
                Err(Error::Agent { code: status.code(), text: one_line(&status.message) })
            }
            Some(Err(ttrpc::Error::Others(text))) if text.contains("deadline") => Err(late()),
            // The connection ended, so the VM most likely did as well, and its end has a better reason.
            Some(Err(e)) => match tokio::time::timeout(Duration::from_secs(1), wait_end(&mut ended)).await {
                Ok(end) => Err(Error::Unavailable(end.to_string())),
                Err(_) => Err(Error::Unavailable(format!("{name}: {e}"))),
            },
        }
    }

    fn check_missed(&self, name: &str) -> Result<()> {
        if self.missed().is_some_and(|missed| missed.elapsed() < NO_LOOK) {
            return Err(silent(name));
        }
        Ok(())
    }

    /// Likewise for what others wait behind.
    async fn look<T, F>(&self, name: &'static str, request: F) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        self.check_missed(name)?;
        let answer = self.call(name, Some(LOOK), request).await;
        // Only these say that it is silent: what others take depends on what runs in the guest.
        if matches!(answer, Err(Error::DeadlineExceeded(_))) {
            *self.missed() = Some(Instant::now());
        }
        answer
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
            entropy: crate::host::random::<64>()?.to_vec(),
            share_tag: SHARE_TAG.into(),
            network: Some(network).into(),
            shm_bytes,
            stream_key: key.to_vec(),
            ..Default::default()
        };
        let client = self.client.clone();
        self.call("CreateSandbox", Some(LONG), async move {
            client.create_sandbox(with_duration(LONG), &request).await
        })
        .await?;
        Ok(())
    }

    /// Brings so many of the guest's CPUs on line.
    pub async fn set_cpus(&self, count: u8) -> Result<()> {
        let request = api::SetCpusRequest { count: count.into(), ..Default::default() };
        let client = self.client.clone();
        self.call(
            "SetCpus",
            Some(SHORT),
            async move { client.set_cpus(with_duration(SHORT), &request).await },
        )
        .await?;
        Ok(())
    }

    /// Has the guest release a disk that no container uses any more.
    pub async fn release_disk(&self, slot: u8, volatile: bool) -> Result<()> {
        let request = api::ReleaseDiskRequest { slot: slot.into(), volatile, ..Default::default() };
        let client = self.client.clone();
        let limit = if volatile { TIDY } else { LONG };
        self.call("ReleaseDisk", Some(limit), async move {
            client.release_disk(with_duration(limit), &request).await
        })
        .await?;
        Ok(())
    }

    /// Makes changes of shared files known to those who watch them in the guest.
    pub async fn replay_changes(&self, changes: Vec<api::Change>) -> Result<()> {
        let request = api::Changes { changes, ..Default::default() };
        let client = self.client.clone();
        self.call("ReplayChanges", Some(SHORT), async move {
            client.replay_changes(with_duration(SHORT), &request).await
        })
        .await?;
        Ok(())
    }

    /// Makes the guest's network be this.
    pub async fn update_network(&self, network: api::Network) -> Result<()> {
        let client = self.client.clone();
        self.call("UpdateNetwork", Some(SHORT), async move {
            client.update_network(with_duration(SHORT), &network).await
        })
        .await?;
        Ok(())
    }

    /// Has the guest connect a port of its `localhost` to a vsock port of the host.
    pub async fn forward_port(&self, port: u16, host_port: u32) -> Result<()> {
        let request = api::ForwardPortRequest { port: port.into(), host_port, ..Default::default() };
        let client = self.client.clone();
        self.call("ForwardPort", Some(LONG), async move {
            client.forward_port(with_duration(LONG), &request).await
        })
        .await?;
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
        let call = async move { client.create_container(with_duration(LONG), &request).await };
        checked_pid(self.call("CreateContainer", Some(LONG), call).await?.pid)
    }

    /// Sends the changes of the mounts in volumes.
    pub async fn follow_mounts(&self, changes: &Changes) -> Result<()> {
        let gone = changes.gone.iter().map(|path| path.as_os_str().as_bytes().to_vec()).collect();
        let come = changes.come.iter().map(mounted).collect();
        let request = api::MountChanges { come, gone, ..Default::default() };
        let client = self.client.clone();
        self.call("FollowMounts", Some(LONG), async move {
            client.follow_mounts(with_duration(LONG), &request).await
        })
        .await?;
        Ok(())
    }

    /// Starts a container's first process.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("StartContainer", Some(LONG), async move {
            client.start_container(with_duration(LONG), &request).await
        })
        .await?;
        Ok(())
    }

    /// Removes a stopped container. What it has on disks may have to be written, if somebody reads it later.
    pub async fn remove_container(&self, id: &str, writes: bool) -> Result<()> {
        let limit = if writes { LONG } else { TIDY };
        let (client, request) = (self.client.clone(), container(id));
        self.call("RemoveContainer", Some(limit), async move {
            client.remove_container(with_duration(limit), &request).await
        })
        .await?;
        Ok(())
    }

    /// Freezes a container.
    pub async fn pause_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("PauseContainer", Some(SHORT), async move {
            client.pause_container(with_duration(SHORT), &request).await
        })
        .await?;
        Ok(())
    }

    /// Thaws a container.
    pub async fn resume_container(&self, id: &str) -> Result<()> {
        let (client, request) = (self.client.clone(), container(id));
        self.call("ResumeContainer", Some(SHORT), async move {
            client.resume_container(with_duration(SHORT), &request).await
        })
        .await?;
        Ok(())
    }

    /// Changes a container's limits.
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let request =
            api::UpdateContainerRequest { container_id: id.into(), resources, ..Default::default() };
        let client = self.client.clone();
        self.call("UpdateContainer", Some(SHORT), async move {
            client.update_container(with_duration(SHORT), &request).await
        })
        .await?;
        Ok(())
    }

    /// The text of a container's cgroup files, by name.
    pub async fn container_stats(&self, id: &str) -> Result<HashMap<String, String>> {
        let (client, request) = (self.client.clone(), container(id));
        let call = async move { client.container_stats(with_duration(LOOK), &request).await };
        let files = self.look("ContainerStats", call).await?.files;
        let is_text = |text: &String| text.bytes().all(|byte| matches!(byte, b'\n' | b'\t' | b' '..=b'~'));
        if length(&files) > MOST_STATS || !files.iter().flat_map(|(name, text)| [name, text]).all(is_text) {
            return Err(nonsense("ContainerStats"));
        }
        Ok(files)
    }

    /// What the guest as a whole does. Who asks does not wait long, and says nothing about the guest to those who wait
    /// longer.
    pub async fn guest_stats(&self, limit: Duration) -> Result<api::GuestStatsResponse> {
        self.check_missed("GuestStats")?;
        let (client, request) = (self.client.clone(), api::Empty::new());
        let call = async move { client.guest_stats(with_duration(limit), &request).await };
        let answer = tokio::time::timeout(limit, self.call("GuestStats", Some(limit), call)).await;
        let answer = answer.map_err(|_| silent("GuestStats"))??;
        // What is in them is looked at where they are read: interfaces can have any names.
        if length(&answer.files) > MOST_STATS { Err(nonsense("GuestStats")) } else { Ok(answer) }
    }

    /// A container's processes: pid in the guest, and the exec that the process is the first of, if any.
    pub async fn list_processes(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let (client, request) = (self.client.clone(), container(id));
        let call = async move { client.list_processes(with_duration(LOOK), &request).await };
        let mut processes = self.look("ListProcesses", call).await?.processes;
        if processes.len() > MOST_PROCESSES {
            log::warn!("only {MOST_PROCESSES} of {} processes are listed", processes.len());
            processes.truncate(MOST_PROCESSES);
        }
        let processes = processes.into_iter().map(|process| Ok((checked_pid(process.pid)?, process.exec_id)));
        processes.collect()
    }

    /// Whether the agent answers, without a look at any container.
    pub async fn ping(&self) -> Result<()> {
        let (client, request) = (self.client.clone(), container(""));
        let call = async move { client.list_processes(with_duration(LOOK), &request).await };
        self.call("ListProcesses", Some(LOOK), call).await.map(drop)
    }

    /// Starts a further process, or one that copies files; the answer is its pid in the guest.
    pub async fn exec_process(
        &self,
        name: &ProcessName,
        process: Vec<u8>,
        stdio: api::Stdio,
        copies: bool,
    ) -> Result<u32> {
        let request = api::ExecProcessRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            process,
            stdio: Some(stdio).into(),
            copies,
            ..Default::default()
        };
        let client = self.client.clone();
        let call = async move { client.exec_process(with_duration(LONG), &request).await };
        checked_pid(self.call("ExecProcess", Some(LONG), call).await?.pid)
    }

    /// Signals a process, or all of its container.
    pub async fn signal_process(&self, name: &ProcessName, signal: u32, all: bool) -> Result<()> {
        let limit = if signal == libc::SIGKILL.unsigned_abs() { KILL } else { SIGNAL };
        let request = api::SignalProcessRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal,
            all,
            ..Default::default()
        };
        let client = self.client.clone();
        self.call("SignalProcess", Some(limit), async move {
            client.signal_process(with_duration(limit), &request).await
        })
        .await?;
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
        self.call("ResizeTerminal", Some(TIDY), async move {
            client.resize_terminal(with_duration(TIDY), &request).await
        })
        .await?;
        Ok(())
    }

    /// Waits for a process to end.
    pub async fn wait_process(&self, name: &ProcessName) -> Result<api::WaitProcessResponse> {
        let (client, request) = (self.client.clone(), process(name));
        let call = async move { client.wait_process(Context::default(), &request).await };
        let mut answer = self.call("WaitProcess", None, call).await?;
        answer.exit_status = answer.exit_status.min(LAST_STATUS);
        Ok(answer)
    }

    /// Forgets an ended exec.
    pub async fn remove_process(&self, name: &ProcessName) -> Result<()> {
        let (client, request) = (self.client.clone(), process(name));
        self.call("RemoveProcess", Some(TIDY), async move {
            client.remove_process(with_duration(TIDY), &request).await
        })
        .await?;
        Ok(())
    }

    /// Waits for a container to run out of memory. Whether there is one of this name is not known here.
    pub async fn next_oom(&self) -> Result<String> {
        let (client, request) = (self.client.clone(), api::Empty::new());
        let call = async move { client.next_oom(Context::default(), &request).await };
        Ok(self.call("NextOom", None, call).await?.container_id)
    }
}

fn length(files: &HashMap<String, String>) -> usize {
    files.iter().map(|(name, text)| name.len() + text.len()).sum()
}

fn silent(name: &str) -> Error {
    Error::DeadlineExceeded(format!("{name}: the agent does not answer"))
}

fn nonsense(name: &str) -> Error {
    Error::Host(format!("the agent's answer to {name} makes no sense"))
}

fn checked_pid(pid: u32) -> Result<u32> {
    if (1..=LAST_PID).contains(&pid) { Ok(pid) } else { Err(nonsense("a request for a process")) }
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

#[cfg(test)]
#[path = "agent/tests.rs"]
mod tests;
