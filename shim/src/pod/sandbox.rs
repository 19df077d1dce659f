//! A pod of containerd's Sandbox service: the machine comes and goes by its own requests, not with the first and the
//! last container. What holds the pod's namespaces is the same pause as in other pods, and no task of containerd's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use katana_metrics::process::Files;
use nix::libc::SIGTERM;
use tokio::sync::{Mutex, watch};

use super::Pod;
use super::config::PodConfig;
use super::container::Container;
use super::process::Exit;
use super::stats;
use crate::error::{Error, Result};

/// How long the guest may take to answer a ping.
const PING_LIMIT: Duration = Duration::from_secs(10);

/// The pod as the Sandbox service sees it.
pub struct PodSandbox {
    pod: Arc<Pod>,
    /// Held by Create, Start and Stop for as long as they take.
    created: Mutex<Option<Created>>,
    holder: watch::Sender<Option<Arc<Container>>>,
}

/// What Create has left for Start.
struct Created {
    at: SystemTime,
    bundle: PathBuf,
    config: PodConfig,
    stopped: bool,
}

/// What SandboxStatus reports.
pub struct Status {
    /// Whether containers can be created.
    pub ready: bool,
    /// The VMM's, or 0.
    pub pid: u32,
    /// The time of Create.
    pub created_at: SystemTime,
    /// The end, if it has come.
    pub exit: Option<Exit>,
}

impl PodSandbox {
    /// No pod yet.
    pub fn new(pod: &Arc<Pod>) -> Arc<Self> {
        Arc::new(Self { pod: Arc::clone(pod), created: Mutex::default(), holder: watch::channel(None).0 })
    }

    /// CreateSandbox: looks whether the pod can be one. Its machine boots when it is started.
    pub async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        let mut created = self.created.lock().await;
        if created.is_some() {
            return Err(Error::AlreadyExists(format!("sandbox {}", request.sandbox_id)));
        }
        let config = PodConfig::new(&request, &self.pod.layout().state)?;
        self.pod.be_sandboxed(config.files.clone())?;
        let bundle = PathBuf::from(request.bundle_path);
        *created = Some(Created { at: SystemTime::now(), bundle, config, stopped: false });
        Ok(())
    }

    /// StartSandbox: boots the machine. The answer is the VMM's pid and the time of Create.
    pub async fn start(&self) -> Result<(u32, SystemTime)> {
        let created = self.created.lock().await;
        let created = created.as_ref().ok_or_else(not_created)?;
        if created.stopped || self.holder.borrow().is_some() {
            return Err(Error::FailedPrecondition("the sandbox was started before".into()));
        }
        let holder = self.pod.create_holder(&created.config, &created.bundle).await?;
        let pid = holder.pid;
        self.holder.send_replace(Some(holder));
        Ok((pid, created.at))
    }

    fn holder(&self) -> Option<Arc<Container>> {
        self.holder.borrow().clone()
    }

    fn running(&self) -> Result<Arc<Container>> {
        let holder = self.holder().filter(|holder| holder.init.exit().is_none());
        holder.ok_or_else(|| Error::FailedPrecondition("the sandbox does not run".into()))
    }

    /// StopSandbox: ends the pod, whatever is in it. Given some time, its containers are asked to end first.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        if self.holder().is_none() {
            // Whoever starts it now finds the machine gone, and does not wait for it any longer.
            self.pod.abandon().await;
        }
        let mut created = self.created.lock().await;
        let Some(created) = created.as_mut() else { return Err(not_created()) };
        created.stopped = true;
        let Some(holder) = self.holder() else { return Ok(()) };
        if holder.init.exit().is_none() && !grace.is_zero() {
            self.ask_containers_to_end(grace).await;
        }
        self.pod.abandon().await;
        holder.init.wait().await;
        Ok(())
    }

    async fn ask_containers_to_end(&self, grace: Duration) {
        let containers = self.pod.members();
        // A guest that does not even take the signals has no more time than one whose containers do not heed them.
        let all_ended = async {
            for container in &containers {
                if let Err(e) = container.kill("", SIGTERM.unsigned_abs(), false).await {
                    log::debug!("stop container {}: {e}", container.id);
                }
            }
            for container in &containers {
                container.init.wait().await;
            }
        };
        let _ = tokio::time::timeout(grace, all_ended).await;
    }

    /// WaitSandbox: waits for the end of the pod, which need not have been started yet.
    pub async fn wait(&self) -> Result<Exit> {
        self.created.lock().await.as_ref().ok_or_else(not_created)?;
        let mut holder = self.holder.subscribe();
        let started = holder.wait_for(Option::is_some).await.ok().and_then(|holder| holder.clone());
        let holder = started.ok_or_else(|| Error::Unavailable("the sandbox is gone".into()))?;
        Ok(holder.init.wait().await)
    }

    /// SandboxStatus.
    pub async fn status(&self) -> Result<Status> {
        let holder = self.holder();
        let (pid, exit) = match &holder {
            Some(holder) => (holder.pid, holder.init.exit()),
            None => (0, None),
        };
        let created = self.created.lock().await;
        let created_at = created.as_ref().ok_or_else(not_created)?.at;
        Ok(Status { ready: holder.is_some() && exit.is_none(), pid, created_at, exit })
    }

    /// PingSandbox: whether the guest answers.
    pub async fn ping(&self) -> Result<()> {
        let holder = self.running()?;
        let answer = tokio::time::timeout(PING_LIMIT, holder.ping()).await;
        answer.map_err(|_| Error::DeadlineExceeded("the guest does not answer".into()))?
    }

    /// SandboxMetrics: what the pod uses of the host, shim and VMM with all that is in it; and in more detail what its
    /// containers use together, by what the guest says. Those that have ended use nothing.
    pub async fn metrics(&self) -> Result<Metrics> {
        let holder = self.running()?;
        let mut total = stats::metrics(&holder.stats().await?);
        for container in self.pod.members() {
            match container.stats().await {
                Ok(files) => stats::add(&mut total, &stats::metrics(&files)),
                Err(e) => log::debug!("statistics of container {}: {e}", container.id),
            }
        }
        let vmm = holder.machine.pid();
        let processes = ["/proc/self".to_owned(), format!("/proc/{vmm}")];
        stats::count_host(&mut total, &processes.map(|process| Files::of(Path::new(&process))));
        Ok(total)
    }

    /// What SandboxStatus reports when `verbose` is set. containerd passes on, as `crictl inspectp` shows it, what its
    /// own sandboxer has names for; the rest is for who asks the shim itself.
    pub async fn details(&self) -> HashMap<String, String> {
        let (shim, bundle) = (std::process::id(), std::env::current_dir().unwrap_or_default());
        let holder = self.holder();
        let status = match &holder {
            None => "created",
            Some(holder) if holder.init.exit().is_none() => "running",
            Some(_) => "stopped",
        };
        let containers: Vec<_> = self.pod.members().iter().map(|container| container.id.clone()).collect();
        let created = self.created.lock().await;
        let info = serde_json::json!({
            "pid": holder.as_ref().map_or(0, |holder| holder.pid),
            "processStatus": status,
            "runtimeType": crate::RUNTIME,
            "runtimeSpec": created.as_ref().map(|created| &created.config.spec),
            "shimPid": shim,
            "bundle": path(&bundle),
            "containers": containers,
        });
        HashMap::from([("info".to_owned(), info.to_string())])
    }

    /// ShutdownSandbox: ends the pod if it has not ended, and the shim.
    pub async fn shut_down(&self) {
        self.pod.abandon().await;
        if let Some(created) = self.created.lock().await.as_mut() {
            created.stopped = true;
        }
        self.pod.shut_down_with_all().await;
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn not_created() -> Error {
    Error::NotFound("sandbox not created".into())
}
