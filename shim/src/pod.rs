//! What the shim serves: the containers of one pod, and the machine they are in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, DeleteResponse};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use katana_config::Config;
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::container::{Container, Parts};
use crate::error::{Error, Result};
use crate::events::{Publisher, timestamp};
use crate::layout::{Identity, RUN, check_name};
use crate::logger;
use crate::process::Exit;
use crate::rootfs::Layer;
use crate::sandbox::{Launch, Sandbox};
use crate::size::{Limits, Sum};
use crate::spec::{self, Spec};
use crate::stdio::Paths;

/// Kata's annotation for the configuration file.
const CONFIG_ANNOTATION: &str = "io.katacontainers.config_path";

/// A container's place; nothing in it while the container is being created.
type Place = Option<Arc<Container>>;

/// The pod.
pub struct Pod {
    identity: Identity,
    debug: bool,
    events: Arc<Publisher>,
    containers: Mutex<HashMap<String, Place>>,
    sandbox: tokio::sync::Mutex<Option<Arc<Sandbox>>>,
    /// Changed by one at a time, for as long as the machine follows.
    limits: tokio::sync::Mutex<Sum>,
    stop: watch::Sender<bool>,
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
    pub fn new(identity: Identity, debug: bool, events: Arc<Publisher>) -> Arc<Self> {
        Arc::new(Self {
            identity,
            debug,
            events,
            containers: Mutex::default(),
            sandbox: tokio::sync::Mutex::default(),
            limits: tokio::sync::Mutex::default(),
            stop: watch::channel(false).0,
        })
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container, once it has been created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = self.containers().get(id).cloned().flatten();
        found.ok_or_else(|| Error::NotFound(format!("container {id} not created")))
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
        let pid = container.sandbox.pid();
        self.containers().insert(request.id.clone(), Some(container));
        drop(reservation);
        self.events.publish(&created_event(request, pid));
        Ok(pid)
    }

    async fn try_create(&self, request: &CreateTaskRequest) -> Result<Arc<Container>> {
        let bundle = PathBuf::from(&request.bundle);
        let spec = Spec::load(&bundle)?;
        let limits = self.add_limits(&request.id, &spec).await;
        let sandbox = self.sandbox(&spec, &bundle, limits, request.options.as_ref()).await?;
        let pod = spec::Pod {
            sandbox_pid: self.sandbox_pid(&request.id),
            target_pid: self.target_pid(&spec)?,
            shared_memory: sandbox.shared_memory.clone(),
        };
        let parts = Parts {
            id: request.id.clone(),
            namespace: self.identity.namespace.clone(),
            bundle,
            spec,
            layers: request.rootfs.iter().map(Layer::from).collect(),
            paths: Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
            pod,
            limits,
        };
        Container::create(parts, sandbox, Arc::clone(&self.events)).await
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

    /// Update: of a container's limits, and of the machine, which is large enough for the old and the new ones meanwhile.
    pub async fn update(&self, id: &str, resources: Map<String, Value>) -> Result<()> {
        let container = self.container(id)?;
        let mut limits = self.limits.lock().await;
        let (old, before) = (limits.get(id), limits.total());
        limits.forget_announced();
        limits.set(id, old.updated(&resources));
        let after = limits.total();
        let updated = match container.sandbox.fit(&before.max(after)).await {
            Ok(()) => container.update(resources).await,
            failed => failed,
        };
        if updated.is_err() {
            limits.set(id, old);
        }
        updated?;
        container.sandbox.fit(&after).await
    }

    /// The machine, launched if there is none.
    async fn sandbox(
        &self,
        spec: &Spec,
        bundle: &Path,
        limits: Limits,
        options: Option<&Any>,
    ) -> Result<Arc<Sandbox>> {
        let mut sandbox = self.sandbox.lock().await;
        if let Some(sandbox) = &*sandbox {
            return Ok(Arc::clone(sandbox));
        }
        let annotated = spec.annotation(&[CONFIG_ANNOTATION]).map(PathBuf::from);
        let explicit = config_path(options)?.or(annotated);
        let common = katana_config::load(explicit.as_deref())?;
        let config: Config = common.clone().annotated(&spec.annotations)?;
        logger::set_debug(self.debug || config.runtime.enable_debug);
        let (identity, run) = (&self.identity, Path::new(RUN));
        let launch = Launch { identity, run, spec, bundle, limits, config: &config, own: config != common };
        let launched = Sandbox::launch(launch, &self.events).await?;
        *sandbox = Some(Arc::clone(&launched));
        Ok(launched)
    }

    /// The pid in the guest of the sandbox container's first process, for the pod's other containers.
    fn sandbox_pid(&self, id: &str) -> Option<u32> {
        let sandbox = &self.identity.sandbox;
        let container = if sandbox == id { None } else { self.container(sandbox).ok() };
        container.map(|container| container.init.guest_pid()).filter(|pid| *pid != 0)
    }

    /// The pid in the guest of the container whose pid namespace a new one joins, unless that is the sandbox's.
    ///
    /// Clients name it by the path of a process of the host, which is the same for all containers of a machine. In a
    /// pod that shares one pid namespace no container has its own; in any other pod, who joins one means the debugged
    /// container, an ephemeral container of Kubernetes being the debugger.
    fn target_pid(&self, spec: &Spec) -> Result<Option<u32>> {
        if !spec.joins_pid_namespace() {
            return Ok(None);
        }
        let containers = self.containers();
        let candidates = containers.iter().filter(|(id, _)| **id != self.identity.sandbox);
        let mut candidates = candidates.filter_map(|(_, place)| {
            let container = place.as_ref()?;
            let runs = container.init.exit().is_none() && container.spec.owns_pid_namespace();
            runs.then(|| container.init.guest_pid())
        });
        match (candidates.next(), candidates.next()) {
            (Some(_), Some(_)) => Err(Error::Unimplemented(
                "joining the pid namespace of one of several containers is not supported: \
                 in the host's eyes all containers of a VM are one process"
                    .into(),
            )),
            (only, _) => Ok(only.filter(|pid| *pid != 0)),
        }
    }

    /// Delete: of an exec, or of the container and with the pod's last one of the machine.
    pub async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        if !request.exec_id.is_empty() {
            let (pid, exit) = container.delete_exec(&request.exec_id).await?;
            return Ok(deleted(pid, exit));
        }
        let pid = container.sandbox.pid();
        let guest_goes_on = self.containers().len() > 1;
        let exit = container.delete(guest_goes_on).await?;
        self.containers().remove(&request.id);
        self.remove_limits(&container).await;
        self.end_if_empty().await;
        self.events.publish(&TaskDelete {
            container_id: request.id,
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
        Ok(deleted(pid, exit))
    }

    /// A container is gone, and the machine of those that stay shrinks.
    async fn remove_limits(&self, container: &Container) {
        let mut limits = self.limits.lock().await;
        limits.remove(&container.id);
        if !self.containers().is_empty()
            && !container.sandbox.is_dead()
            && let Err(e) = container.sandbox.fit(&limits.total()).await
        {
            log::warn!("the machine does not shrink: {e}");
        }
    }

    async fn end_if_empty(&self) {
        let mut sandbox = self.sandbox.lock().await;
        // Looked at under the lock: a Create takes its place first and this lock second.
        if self.containers().is_empty()
            && let Some(sandbox) = sandbox.take()
        {
            sandbox.end().await;
        }
    }

    /// Shutdown: the shim ends, unless there are containers.
    pub fn shut_down(&self) {
        if self.containers().is_empty() {
            self.stop.send_replace(true);
        }
    }

    /// Waits for Shutdown.
    pub async fn stopped(&self) {
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the machine whatever is in it: the shim was told to end by a signal.
    pub async fn abandon(&self) {
        if let Some(sandbox) = self.sandbox.lock().await.take() {
            sandbox.end().await;
        }
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

fn deleted(pid: u32, exit: Exit) -> DeleteResponse {
    let exited_at = Some(timestamp(exit.at)).into();
    DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() }
}

/// ConfigPath of `runtimeoptions.v1.Options`, with which `ctr run --runtime-config-path` and the CRI plugin
/// name a configuration. Options of other types are those of other runtimes.
fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options else { return Ok(None) };
    if !options.type_url.ends_with("runtimeoptions.v1.Options") {
        return Ok(None);
    }
    let parsed = string_field(&options.value, 2);
    let path = parsed.map_err(|e| Error::InvalidArgument(format!("runtime options: {e}")))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// A string member of a message of which nothing else is of interest.
fn string_field(message: &[u8], field: u32) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // protobuf encoding: field number above three bits of wire type, 2 for what has a length.
        match (tag >> 3, tag & 7) {
            (number, 2) if number == field => found = Some(input.read_string()?),
            (_, 0) => drop(input.read_raw_varint64()?),
            (_, 1) => drop(input.read_fixed64()?),
            (_, 2) => drop(input.read_bytes()?),
            (_, 5) => drop(input.read_fixed32()?),
            _ => return Err(protobuf::Error::from(std::io::Error::from(std::io::ErrorKind::InvalidData))),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: &str, value: &[u8]) -> Option<Any> {
        Some(Any { type_url: kind.into(), value: value.to_vec(), ..Default::default() })
    }

    #[test]
    fn the_configuration_of_a_client_is_found() {
        let value = b"\x0a\x01x\x12\x06/a.tom\x1a\x00\x20\x01";
        for kind in ["runtimeoptions.v1.Options", "type.googleapis.com/runtimeoptions.v1.Options"] {
            assert_eq!(config_path(options(kind, value).as_ref()).unwrap(), Some(PathBuf::from("/a.tom")));
        }
        assert_eq!(config_path(options("containerd.runc.v1.Options", value).as_ref()).unwrap(), None);
        assert_eq!(config_path(options("runtimeoptions.v1.Options", b"").as_ref()).unwrap(), None);
        assert_eq!(config_path(None).unwrap(), None);
        for hostile in [&b"\x12\xff"[..], b"\x12\xff\xff\xff\xff\x0f", b"\x12\x02\xff\xfe", b"\x17", b"\xff"]
        {
            assert!(
                config_path(options("runtimeoptions.v1.Options", hostile).as_ref()).is_err(),
                "{hostile:?}"
            );
        }
    }
}
