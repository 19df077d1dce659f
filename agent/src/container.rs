//! A container: its cgroup, its first process, its execs, from create to remove.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katana_protocol::agent::{Disk, HostSocket, SharedMount};
use nix::sched::CloneFlags;
use nix::unistd::Pid;
use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxPersonalityDomain, LinuxResources, Process as ProcessSpec, Spec,
};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use crate::acls;
use crate::cgroup::{self, Cgroup};
use crate::device_filter::{self, DeviceFilter};
use crate::disks::{self, Disks};
use crate::execs::{self, Execs};
use crate::hooks::{self, Stage};
use crate::huge_pages::{self, HugePages};
use crate::init;
use crate::init::control::{Task, Work};
use crate::launch::{Gate, IdMaps, Spares};
use crate::oom::OomCounter;
use crate::process::{self, Process, Surroundings};
use crate::reaper::Reaper;
use crate::seccomp::{self, Filter};
use crate::sockets::{self, Sockets};
use crate::streams::Ports;
use crate::submounts::{self, Submounts};
use crate::transport::Transport;

/// What a container cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The specification does not parse.
    #[error("specification: {0}")]
    Parse(#[from] serde_json::Error),
    /// The specification lacks something.
    #[error("specification: {0}")]
    Invalid(&'static str),
    /// Its cgroup fails.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// Its device rules fail.
    #[error(transparent)]
    Devices(#[from] device_filter::Error),
    /// Its seccomp profile fails.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// One of its disks fails.
    #[error(transparent)]
    Disks(#[from] disks::Error),
    /// Its files would not be kept from whom their ACLs keep out.
    #[error(transparent)]
    Acls(#[from] acls::NotObeyed),
    /// There are no huge pages for it.
    #[error(transparent)]
    HugePages(#[from] huge_pages::Error),
    /// One of the host's sockets has no stand-in.
    #[error(transparent)]
    Sockets(#[from] sockets::Error),
    /// One of its processes fails.
    #[error(transparent)]
    Process(#[from] process::Error),
    /// There is no such exec, or the like.
    #[error(transparent)]
    Execs(#[from] execs::Error),
    /// It is not in the right state.
    #[error("{0}")]
    State(&'static str),
}

type Result<T> = std::result::Result<T, Error>;

/// What containers share.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Where streams go.
    pub transport: Transport,
    /// What reports ends.
    pub reaper: Reaper,
    /// Processes that were started ahead.
    pub spares: Spares,
    /// Takes the id of a container at each out-of-memory kill in it.
    pub ooms: UnboundedSender<String>,
    /// Who uses what of the share.
    pub share: Arc<submounts::Users>,
}

/// What is asked for with a container.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its specification as JSON.
    pub spec: &'a [u8],
    /// The ports of its streams.
    pub ports: Ports,
    /// Whether it is the pod's sandbox container, which runs no program.
    pub pause: bool,
    /// Disks that it uses.
    pub disks: Vec<Disk>,
    /// Sockets of the host that it mounts.
    pub sockets: Vec<HostSocket>,
    /// Mounts of the host in what it uses of the share.
    pub mounts: Vec<SharedMount>,
}

/// What a container's first process is doing.
#[derive(Debug)]
enum Phase {
    /// It waits for its start.
    Created(Gate),
    /// It was started; it runs or has ended.
    Started,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    pod: Pod,
    cgroup: Arc<Cgroup>,
    devices: Mutex<DeviceFilter>,
    seccomp: Option<Filter>,
    spec: Spec,
    init: Arc<Process>,
    phase: tokio::sync::Mutex<Phase>,
    execs: Execs,
    oom_watch: JoinHandle<()>,
    /// Until it is removed.
    disks: Mutex<Disks>,
    /// Likewise.
    huge_pages: Mutex<HugePages>,
    /// Likewise.
    sockets: Mutex<Sockets>,
    /// They go with the container's entry in the table, once its processes are gone.
    _submounts: Submounts,
}

impl Container {
    /// Makes a container up to where its process waits for the start.
    pub async fn create(pod: &Pod, request: Request<'_>) -> Result<Self> {
        let Request { id, spec, ports, pause, disks, sockets, mounts } = request;
        let mut spec: Spec = serde_json::from_slice(spec)?;
        let process = spec.process_mut().take().ok_or(Error::Invalid("process is missing"))?;
        // First of all: what is shared of a root that is otherwise on a disk has to be there.
        let submounts = Submounts::of(&spec, disks::shared_layers(&disks), mounts, &pod.share).await;
        let disks = Disks::take(id, disks).await?;
        disks.translate(&mut spec);
        let linux = spec.linux_mut().as_mut().ok_or(Error::Invalid("linux is missing"))?;
        let huge_pages = reserve_huge_pages(linux.resources().clone()).await?;
        let seccomp = linux.seccomp().as_ref().map(seccomp::compile).transpose()?;
        linux.set_seccomp(None);
        if linux.memory_policy().is_some() {
            return Err(Error::Invalid("linux.memoryPolicy is not supported"));
        }

        let sockets = Sockets::serve(&sockets, &pod.transport)?;
        let cgroup = Arc::new(Cgroup::create(linux.cgroups_path().as_deref(), id)?);
        let work = Work::Container { id: id.to_owned(), spec: Box::new(spec), pause };
        let built = Self::build(pod, work, submounts, process, seccomp, &cgroup, ports).await;
        let built = built.map(|container| Self {
            disks: Mutex::new(disks),
            huge_pages: Mutex::new(huge_pages),
            sockets: Mutex::new(sockets),
            ..container
        });
        if built.is_err() {
            if let Err(error) = cgroup.remove().await {
                log::warn!("container {id}: {error}");
            }
            init::forget_devices(id);
        }
        built
    }

    async fn build(
        pod: &Pod,
        work: Work,
        submounts: Submounts,
        process: ProcessSpec,
        seccomp: Option<Filter>,
        cgroup: &Arc<Cgroup>,
        ports: Ports,
    ) -> Result<Self> {
        let Work::Container { id, spec, .. } = &work else { return Err(Error::Invalid("not a container")) };
        let id = id.clone();
        acls::check(spec)?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or(Ok(()), |resources| cgroup.apply(resources))?;
        let devices = DeviceFilter::attach(device_rules(resources), cgroup.path(), None)?;

        let oom = Arc::new(OomCounter::new(&id, cgroup, &pod.ooms));
        let personality = personality(spec);
        let mut task = Task { cgroups: vec![cgroup.path().to_owned()], process, seccomp, personality, work };
        let surroundings = Surroundings {
            transport: &pod.transport,
            reaper: &pod.reaper,
            spares: &pod.spares,
            ports,
            maps: id_maps(&task.work),
        };
        let at_end = {
            let (cgroup, oom) = (cgroup.clone(), oom.clone());
            move || end_of_init(&cgroup, &oom)
        };
        let (init, gate) = Process::start(&task, None, surroundings, at_end).await?;
        let gate = gate.ok_or(Error::State("the container's process ran off"))?;
        let Work::Container { spec, .. } = task.work else { return Err(Error::Invalid("not a container")) };
        Ok(Self {
            id,
            pod: pod.clone(),
            cgroup: cgroup.clone(),
            devices: Mutex::new(devices),
            seccomp: task.seccomp.take(),
            spec: *spec,
            init: Arc::new(init),
            phase: tokio::sync::Mutex::new(Phase::Created(gate)),
            execs: Execs::default(),
            oom_watch: tokio::spawn(oom.watch(cgroup.clone())),
            disks: Mutex::default(),
            huge_pages: Mutex::default(),
            sockets: Mutex::default(),
            _submounts: submounts,
        })
    }

    /// Lets the first process run its program.
    pub async fn start(&self) -> Result<()> {
        let mut phase = self.phase.lock().await;
        let gate = match std::mem::replace(&mut *phase, Phase::Started) {
            Phase::Created(gate) => gate,
            Phase::Started if self.init.exit().is_some() => {
                return Err(Error::State("cannot start a container that has stopped"));
            }
            Phase::Started => return Err(Error::State("cannot start an already running container")),
        };
        gate.open().await.map_err(process::Error::from)?;
        self.init.started();
        self.run_hooks(Stage::Poststart).await;
        Ok(())
    }

    /// The process with this exec id; the empty id is the container's first process.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        Ok(self.execs.get(exec_id)?)
    }

    /// Runs one more process in the container: a program of it, or one of the agent's that copies files.
    pub async fn exec(&self, exec_id: &str, process: &[u8], ports: Ports, copies: bool) -> Result<Pid> {
        let process: ProcessSpec = serde_json::from_slice(process)?;
        if self.init.exit().is_some() {
            return Err(Error::State("cannot exec in a stopped container"));
        }
        if self.is_frozen() {
            return Err(Error::State("cannot exec in a paused container"));
        }
        self.execs.start(exec_id, self.start_exec(process, ports, copies)).await
    }

    async fn start_exec(&self, process: ProcessSpec, ports: Ports, copies: bool) -> Result<Process> {
        let mut cgroups = vec![self.cgroup.path().to_owned()];
        cgroups.extend(cgroup::of(self.init.pid()));
        let mut namespaces = private_namespaces(self.init.pid());
        if copies {
            // No process of the container sees one that copies, be it to trace it.
            namespaces &= CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUSER;
        }
        let work = Work::Exec { namespaces: namespaces.bits(), copies };
        let (seccomp, personality) = match copies {
            true => (None, None),
            false => (self.seccomp.clone(), personality(&self.spec)),
        };
        let task = Task { cgroups, process, seccomp, personality, work };
        let Pod { transport, reaper, spares, .. } = &self.pod;
        let surroundings = Surroundings { transport, reaper, spares, ports, maps: IdMaps::default() };
        Ok(Process::start(&task, Some(&self.init), surroundings, || ()).await?.0)
    }

    /// Forgets an exec that has ended.
    pub fn remove_process(&self, exec_id: &str) -> Result<()> {
        if exec_id.is_empty() {
            return Err(Error::State("the first process goes with its container"));
        }
        Ok(self.execs.remove(exec_id)?)
    }

    /// Sends a signal to every process of the container.
    pub fn signal_all(&self, signal: u32) -> Result<()> {
        if self.init.exit().is_some() {
            return Err(process::Error::Finished.into());
        }
        if signal == libc::SIGKILL.cast_unsigned() {
            return Ok(self.cgroup.kill()?);
        }
        let number = i32::try_from(signal).ok().filter(|number| (1..=libc::SIGRTMAX()).contains(number));
        let number = number.ok_or(process::Error::Signal(signal, io::ErrorKind::InvalidInput.into()))?;
        for pid in self.cgroup.members()? {
            // SAFETY: numbers only. A process that is gone meanwhile needs no signal.
            unsafe { libc::kill(pid.as_raw(), number) };
        }
        Ok(())
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<()> {
        if self.init.exit().is_some() {
            return Err(Error::State("container not running"));
        }
        Ok(self.cgroup.freeze(true).await?)
    }

    /// Thaws its processes.
    pub async fn resume(&self) -> Result<()> {
        if !self.is_frozen() {
            return Err(Error::State("container not paused"));
        }
        Ok(self.cgroup.freeze(false).await?)
    }

    /// Sets new limits, one caller after the other. Blocks for as long as the kernel takes memory away from the
    /// container.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        let mut resources: LinuxResources = serde_json::from_slice(resources)?;
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        self.disks().translate_rules(&mut resources);
        self.cgroup.apply(&resources)?;
        let rules = device_rules(Some(&resources));
        if !rules.is_empty() {
            *devices = DeviceFilter::attach(rules, self.cgroup.path(), Some(&devices))?;
        }
        Ok(())
    }

    /// The text of the cgroup's files.
    pub fn statistics(&self) -> HashMap<String, String> {
        self.cgroup.statistics()
    }

    /// CPU time in microseconds, and bytes of memory.
    pub fn used(&self) -> (u64, u64) {
        self.cgroup.used()
    }

    /// The processes in the container, with the id of those that are an exec's first.
    pub fn processes(&self) -> Result<Vec<(Pid, String)>> {
        let members = self.cgroup.members()?;
        let exec_id = |pid| self.execs.id_of(pid).unwrap_or_default();
        Ok(members.into_iter().map(|pid| (pid, exec_id(pid))).collect())
    }

    /// Kills what is left and removes the cgroup. Its mounts went with its last process; a root on a disk is unmounted.
    pub async fn remove(&self) -> Result<()> {
        self.cgroup.remove().await?;
        let disks = std::mem::take(&mut *self.disks());
        disks.unmount().await;
        drop(std::mem::take(&mut *self.huge_pages.lock().unwrap_or_else(PoisonError::into_inner)));
        drop(std::mem::take(&mut *self.sockets.lock().unwrap_or_else(PoisonError::into_inner)));
        self.oom_watch.abort();
        init::forget_devices(&self.id);
        self.run_hooks(Stage::Poststop).await;
        Ok(())
    }

    /// Hooks after the fact: a failure changes nothing (runtime-spec, runtime.md, "Lifecycle").
    async fn run_hooks(&self, stage: Stage) {
        for (number, hook) in stage.of(self.spec.hooks().as_ref()).iter().enumerate() {
            let state = hooks::state(stage, &self.id, &self.spec, Some(self.init.pid().as_raw()));
            let launch = self.pod.reaper.launch();
            let ended = match hooks::start(hook, &state) {
                Ok(child) => launch.watch(Pid::from_raw(child.id().cast_signed())),
                Err(error) => {
                    log::warn!("container {}: {}", self.id, stage.error(number, hook, error));
                    continue;
                }
            };
            let waited = match hooks::timeout(hook) {
                Some(timeout) => {
                    tokio::time::timeout(timeout, ended).await.ok().and_then(std::result::Result::ok)
                }
                None => ended.await.ok(),
            };
            if waited != Some(0) {
                log::warn!(
                    "container {}: hook {} failed or did not end in time",
                    self.id,
                    hook.path().display()
                );
            }
        }
    }

    fn is_frozen(&self) -> bool {
        fs::read_to_string(self.cgroup.path().join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn reserve_huge_pages(resources: Option<LinuxResources>) -> Result<HugePages> {
    let Some(resources) = resources.filter(|resources| resources.hugepage_limits().is_some()) else {
        return Ok(HugePages::default());
    };
    let reserved = tokio::task::spawn_blocking(move || HugePages::reserve(&resources)).await;
    Ok(reserved.map_err(|_| Error::State("the huge pages cannot be set aside"))??)
}

/// A pid namespace dies with its first process; a container without one of its own has to be cleared.
fn end_of_init(cgroup: &Cgroup, oom: &OomCounter) {
    // The shim reports the kill before it reports the end.
    oom.check();
    if let Err(error) = cgroup.kill() {
        log::debug!("{error}");
    }
}

fn device_rules(resources: Option<&LinuxResources>) -> &[LinuxDeviceCgroup] {
    resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default()
}

fn personality(spec: &Spec) -> Option<LinuxPersonalityDomain> {
    Some(spec.linux().as_ref()?.personality().as_ref()?.domain())
}

fn id_maps(work: &Work) -> IdMaps {
    let Work::Container { spec, .. } = work else { return IdMaps::default() };
    let Some(linux) = spec.linux() else { return IdMaps::default() };
    IdMaps {
        users: linux.uid_mappings().clone().unwrap_or_default(),
        groups: linux.gid_mappings().clone().unwrap_or_default(),
    }
}

/// The namespaces in which a process is apart from the agent.
fn private_namespaces(pid: Pid) -> CloneFlags {
    let all = [
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("time", init::CLONE_NEWTIME),
        ("user", CloneFlags::CLONE_NEWUSER),
        ("uts", CloneFlags::CLONE_NEWUTS),
    ];
    let identity = |process: &str, name: &str| {
        fs::metadata(format!("/proc/{process}/ns/{name}")).map(|m| (m.dev(), m.ino()))
    };
    let apart = |name: &str| matches!((identity(&pid.to_string(), name), identity("self", name)), (Ok(a), Ok(b)) if a != b);
    all.into_iter().filter(|(name, _)| apart(name)).fold(CloneFlags::empty(), |flags, (_, flag)| flags | flag)
}
