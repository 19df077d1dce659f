//! What the shim serves: the containers of one pod, and the machine they are in.

pub mod config;
pub mod container;
mod end;
mod hooks;
mod logger_binary;
pub mod namespaces;
pub mod options;
pub mod process;
pub mod sandbox;
pub mod stats;
pub mod stdio;
pub mod tool;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use katana_config::Config;
use protobuf::well_known_types::any::Any;
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::host::events::Publisher;
use crate::host::logger;
use crate::machine::layout::{Identity, Layout, RUN, check_name};
use crate::machine::size::{Limits, Sum};
use crate::machine::{First, Launch, Machine};
use crate::pod::config::{PodConfig, PodFiles};
use crate::pod::container::{Container, Parts};
use crate::pod::namespaces::{Asked, Known};
use crate::pod::options::config_path;
use crate::pod::stdio::Paths;
use crate::spec::{self, Spec};
use crate::storage::rootfs::Layer;

/// A container by its id; nothing while the container is being created.
type Entry = Option<Arc<Container>>;

/// The pod.
pub struct Pod {
    identity: Identity,
    debug: bool,
    /// The configuration that the options of the runtime name for all of the pod.
    config_path: Option<PathBuf>,
    events: Arc<Publisher>,
    /// There for a pod of the Sandbox service: its machine is not launched for a container, nor ended after one.
    sandboxed: OnceLock<PodFiles>,
    containers: Mutex<HashMap<String, Entry>>,
    machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
    /// The machine as well, for those who only look at the pod: nobody waits here while it is launched or ends.
    launched: watch::Sender<Option<Arc<Machine>>>,
    /// Changed by one at a time, for as long as the machine follows.
    limits: tokio::sync::Mutex<Sum>,
    stop: watch::Sender<bool>,
}

/// Says which keys of the files and which annotations are accepted without a meaning.
fn log_without_meaning(config: &Config, annotations: &[String]) {
    if let Some(line) = config.without_meaning_line() {
        log::debug!("{line}");
    }
    for line in annotations {
        log::warn!("{line}");
    }
}

/// Takes an id, until the container is there or has failed.
struct Reservation<'a> {
    pod: &'a Pod,
    id: &'a str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut containers = self.pod.containers();
        if containers.get(self.id).is_some_and(Option::is_none) {
            containers.remove(self.id);
        }
    }
}

impl Pod {
    /// A pod without containers.
    pub fn new(
        identity: Identity,
        debug: bool,
        config_path: Option<PathBuf>,
        events: Arc<Publisher>,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            debug,
            config_path,
            events,
            sandboxed: OnceLock::new(),
            containers: Mutex::default(),
            machine: tokio::sync::Mutex::default(),
            launched: watch::channel(None).0,
            limits: tokio::sync::Mutex::default(),
            stop: watch::channel(false).0,
        })
    }

    /// Waits until the ends of all that ran have been published.
    pub async fn ended(&self) {
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        for container in containers {
            container.ended().await;
        }
    }

    /// Whether the machine is launched and ended by requests of the Sandbox service.
    pub fn is_of_sandbox_service(&self) -> bool {
        self.sandboxed.get().is_some()
    }

    /// Whether nobody has asked for anything yet, or all of it is gone.
    pub fn is_empty(&self) -> bool {
        self.sandboxed.get().is_none() && self.containers().is_empty()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox's id.
    pub fn id(&self) -> &str {
        &self.identity.sandbox
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.identity.namespace
    }

    /// Its events to containerd.
    pub fn events(&self) -> Arc<Publisher> {
        Arc::clone(&self.events)
    }

    /// The pod's places on the host.
    pub fn layout(&self) -> Layout {
        self.identity.layout(Path::new(RUN))
    }

    /// A container, once it has been created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        // What holds the namespaces of a pod of the Sandbox service is no task.
        let hidden = self.sandboxed.get().is_some() && id == self.id();
        let found = self.any_container(id).filter(|_| !hidden);
        found.ok_or_else(|| Error::NotFound(format!("container {id} not created")))
    }

    fn any_container(&self, id: &str) -> Option<Arc<Container>> {
        self.containers().get(id).cloned().flatten()
    }

    /// All containers, in the order of their ids.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.containers().values().flatten().cloned().collect();
        all.sort_by(|one, other| one.id.cmp(&other.id));
        all
    }

    /// All containers but the one that stands for the pod.
    pub fn members(&self) -> Vec<Arc<Container>> {
        let containers = self.containers();
        let members = containers.iter().filter(|(id, _)| **id != self.identity.sandbox);
        members.filter_map(|(_, place)| place.clone()).collect()
    }

    /// From now on this is a pod of the Sandbox service.
    pub fn be_sandboxed(&self, files: PodFiles) -> Result<()> {
        let taken = !self.containers().is_empty() || self.sandboxed.set(files).is_err();
        if taken {
            return Err(Error::FailedPrecondition("the shim serves containers of its own already".into()));
        }
        Ok(())
    }

    fn reserve<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>> {
        check_name("id", id)?;
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), None);
        Ok(Reservation { pod: self, id })
    }

    /// Create: the machine for the pod's first container, then the container in it.
    pub async fn create(&self, request: CreateTaskRequest) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("restoring a checkpoint is not supported".into()));
        }
        let reservation = self.reserve(&request.id)?;
        let created = self.try_create(&request).await;
        let container = match created {
            Ok(container) => container,
            Err(e) => {
                drop(reservation);
                self.limits.lock().await.remove(&request.id);
                self.end_if_empty().await;
                return Err(e);
            }
        };
        let pid = container.pid;
        self.containers().insert(request.id.clone(), Some(container));
        drop(reservation);
        self.events.publish(&created_event(request, pid));
        Ok(pid)
    }

    async fn try_create(&self, request: &CreateTaskRequest) -> Result<Arc<Container>> {
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = Spec::load(&bundle)?;
        if let Some(files) = self.sandboxed.get() {
            files.add_to(&mut spec);
        }
        let asked = self.asked(&request.id, &mut spec)?;
        let limits = self.add_limits(&request.id, &spec).await;
        let layers: Vec<_> = request.rootfs.iter().map(Layer::from).collect();
        let machine = match self.sandboxed.get() {
            Some(_) => self.running_machine().await?,
            None => {
                let shared_memory = spec.shared_memory(&bundle);
                let first = First { spec: &spec, bundle: &bundle, layers: &layers, shared_memory };
                self.machine(first, &asked, limits, request.options.as_ref()).await?
            }
        };
        if request.id != self.identity.sandbox {
            asked.resolve(machine.host_namespaces)?;
        }
        let pod = spec::Pod {
            sandbox_pid: self.sandbox_pid(&request.id),
            target_pid: self.target_pid(&spec, machine.pid())?,
            shared_memory: machine.shared_memory.clone(),
        };
        let first = request.id == self.identity.sandbox;
        let parts = Parts {
            id: request.id.clone(),
            namespace: self.identity.namespace.clone(),
            bundle,
            spec,
            layers,
            paths: Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
            pod,
            first,
            limits,
        };
        let container = Container::create(parts, machine, Arc::clone(&self.events)).await?;
        let in_pod = self.sandboxed.get().is_some() || container.spec.is_sandbox();
        if !in_pod && first {
            tokio::spawn(Arc::clone(&container).end_alone());
        }
        Ok(container)
    }

    /// Launches the machine of a pod of the Sandbox service, and in it what holds its namespaces.
    pub async fn create_holder(&self, config: &PodConfig, bundle: &Path) -> Result<Arc<Container>> {
        let id = self.id().to_owned();
        let reservation = self.reserve(&id)?;
        let holder = self.try_create_holder(config, bundle).await;
        match &holder {
            Ok(holder) => drop(self.containers().insert(id.clone(), Some(Arc::clone(holder)))),
            Err(_) => self.abandon().await,
        }
        drop(reservation);
        holder
    }

    async fn try_create_holder(&self, config: &PodConfig, bundle: &Path) -> Result<Arc<Container>> {
        let mut spec = config.spec.clone();
        let asked = self.asked(self.id(), &mut spec)?;
        let limits = self.add_limits(self.id(), &spec).await;
        let shared_memory = Some(config.files.shared_memory());
        let first = First { spec: &spec, bundle, layers: &[], shared_memory };
        let machine = self.machine(first, &asked, limits, None).await?;
        config.write_files()?;
        let parts = Parts {
            id: self.id().to_owned(),
            namespace: self.identity.namespace.clone(),
            bundle: bundle.to_owned(),
            spec,
            layers: Vec::new(),
            paths: Paths::default(),
            pod: spec::Pod { shared_memory: machine.shared_memory.clone(), ..spec::Pod::default() },
            first: true,
            limits,
        };
        let holder = Container::create(parts, machine, Publisher::silent(&self.identity.namespace)).await?;
        holder.start("").await?;
        Ok(holder)
    }

    /// Counts a container that is to come; answers what the pod needs with it.
    async fn add_limits(&self, id: &str, spec: &Spec) -> Limits {
        let mut limits = self.limits.lock().await;
        if id == self.identity.sandbox {
            limits.announce(Limits::announced(spec));
        }
        limits.set(id, Limits::of_container(spec));
        limits.total()
    }

    /// Update: of a container's limits, and of the machine, which is large enough for the old and the new ones
    /// meanwhile.
    pub async fn update(&self, id: &str, resources: Map<String, Value>) -> Result<()> {
        let container = self.container(id)?;
        let mut limits = self.limits.lock().await;
        let (old, before) = (limits.get(id), limits.total());
        limits.forget_announced();
        limits.set(id, old.updated(&resources));
        let after = limits.total();
        let updated = match container.machine.fit(&before.max(after)).await {
            Ok(()) => container.update(resources).await,
            failed => failed,
        };
        if updated.is_err() {
            limits.set(id, old);
        }
        updated?;
        container.machine.fit(&after).await
    }

    /// What a container asks for of the host's namespaces.
    fn asked(&self, id: &str, spec: &mut Spec) -> Result<Asked> {
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        let pids: Vec<_> = containers.iter().map(|container| container.pid).collect();
        let sandbox =
            containers.iter().find(|container| container.id == self.identity.sandbox && id != container.id);
        Asked::take(spec, &Known { sandbox: sandbox.map(|sandbox| &sandbox.spec), pids: &pids })
    }

    /// The machine, launched if there is none.
    async fn machine(
        &self,
        first: First<'_>,
        asked: &Asked,
        limits: Limits,
        options: Option<&Any>,
    ) -> Result<Arc<Machine>> {
        let mut machine = self.machine.lock().await;
        if let Some(machine) = &*machine {
            return Ok(Arc::clone(machine));
        }
        let explicit = config_path(options)?.or_else(|| self.config_path.clone());
        let annotations = &first.spec.annotations;
        let common = katana_config::load(explicit.as_deref())?.chosen(annotations)?;
        let (config, ignored) = common.clone().annotated(annotations)?;
        asked.resolve(config.runtime.host_namespaces)?;
        logger::set_debug(self.debug || config.runtime.enable_debug);
        log_without_meaning(&config, &ignored);
        let (identity, run) = (&self.identity, Path::new(RUN));
        let launch = Launch { identity, run, first, limits, config: &config, own: config != common };
        let launched = Machine::launch(launch, &self.events).await?;
        *machine = Some(Arc::clone(&launched));
        self.launched.send_replace(Some(Arc::clone(&launched)));
        Ok(launched)
    }

    /// The machine of a pod of the Sandbox service, which runs or has never been started or has ended.
    async fn running_machine(&self) -> Result<Arc<Machine>> {
        let machine = self.machine.lock().await.clone();
        machine.ok_or_else(|| Error::FailedPrecondition(format!("sandbox {} does not run", self.id())))
    }

    /// The pid in the guest of the sandbox container's first process, for the pod's other containers.
    fn sandbox_pid(&self, id: &str) -> Option<u32> {
        let sandbox = &self.identity.sandbox;
        let container = if sandbox == id { None } else { self.any_container(sandbox) };
        container.map(|container| container.init.guest_pid()).filter(|pid| *pid != 0)
    }

    /// The pid in the guest of the container whose pid namespace a new one joins, unless that is the sandbox's.
    ///
    /// Clients name it by the path of a process of the host, with the pid that they have got for it.
    fn target_pid(&self, spec: &Spec, vmm: u32) -> Result<Option<u32>> {
        let Some(pid) = spec.joined_pid() else { return Ok(None) };
        let containers = self.containers();
        let others = containers.iter().filter(|(id, _)| **id != self.identity.sandbox);
        // The VMM's is that of the sandbox container, in whose namespace no container has one of its own, and of those
        // for which there was no other.
        let named = |container: &&Arc<Container>| {
            let means_it = pid != vmm || container.spec.owns_pid_namespace();
            container.pid == pid && means_it && container.init.exit().is_none()
        };
        let mut targets = others.filter_map(|(_, place)| place.as_ref()).filter(named);
        match (targets.next(), targets.next()) {
            (Some(_), Some(_)) => Err(Error::FailedPrecondition(format!(
                "pid namespace of process {pid}: several containers have this pid, for lack of threads"
            ))),
            (Some(target), None) => Ok(Some(target.init.guest_pid()).filter(|pid| *pid != 0)),
            (None, _) if pid == vmm => Ok(None),
            (None, _) => Err(Error::FailedPrecondition(format!(
                "pid namespace of process {pid}: no container of the pod has this pid"
            ))),
        }
    }

    /// Follows the machine: there from its launch, before the agent answers, to the beginning of its end.
    pub fn launched(&self) -> watch::Receiver<Option<Arc<Machine>>> {
        self.launched.subscribe()
    }
}

fn created_event(request: CreateTaskRequest, pid: u32) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: Some(io).into(),
        checkpoint: request.checkpoint,
        pid,
        ..Default::default()
    }
}
