//! A container: its first process, its execs, its place in the pod.

mod execs;
mod kill;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::events::task::{TaskExit, TaskPaused, TaskResumed, TaskStart};
use nix::libc::SIGKILL;
use serde_json::{Map, Value};

use super::hooks;
use super::process::{Exit, KILLED, Phase, Process};
use super::stdio::{Paths, Streams};
use crate::error::{Error, Result};
use crate::guest::agent::{Agent, ProcessName, Uses};
use crate::host::durations;
use crate::host::events::{Publisher, timestamp};
use crate::machine::Machine;
use crate::machine::disks::Attached;
use crate::machine::size::Limits;
use crate::machine::sockets::{self, Sockets};
use crate::spec::{Hook, Pod, Source, Spec};
use crate::storage::disks;
use crate::storage::rootfs::Layer;
use crate::storage::share::Added;

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its specification as the client wrote it.
    pub spec: Spec,
    /// The machine it is in.
    pub machine: Arc<Machine>,
    /// The pid on the host by which clients know it.
    pub pid: u32,
    /// Its first process.
    pub init: Arc<Process>,
    agent: Agent,
    events: Arc<Publisher>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    paused: AtomicBool,
    /// Whether it was sent SIGKILL.
    killed: AtomicBool,
    /// Until it is deleted.
    sockets: Mutex<Sockets>,
    /// Held by what changes the container's state: Start, Pause, Resume, Delete. True once it is deleted.
    changing: tokio::sync::Mutex<bool>,
}

/// What a container is made of.
pub struct Parts {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its specification.
    pub spec: Spec,
    /// Its root, as the snapshotter gave it.
    pub layers: Vec<Layer>,
    /// Its streams.
    pub paths: Paths,
    /// What it may share with the pod.
    pub pod: Pod,
    /// Whether it is the only container, or the one that stands for the pod; it has the VMM's pid then.
    pub first: bool,
    /// The limits of the pod with this container in it.
    pub limits: Limits,
}

/// What a container becomes in the guest.
struct GuestPart {
    /// Its specification there.
    spec: Vec<u8>,
    streams: Streams,
    uses: Uses,
    /// Whether later mounts of the host are to appear in it.
    follows: bool,
    /// Where changes by the host are watched for.
    watched: Vec<PathBuf>,
}

impl Container {
    /// Creates a container in a machine that may still be booting. On failure nothing is left of it.
    pub async fn create(parts: Parts, machine: Arc<Machine>, events: Arc<Publisher>) -> Result<Arc<Self>> {
        let id = parts.id.clone();
        let (container, guest_part) = match Self::prepare(parts, Arc::clone(&machine), events).await {
            Ok(prepared) => prepared,
            Err(e) => {
                remove_from_host(&machine, &id, None).await;
                return Err(e);
            }
        };
        if let Err(e) = container.create_in_guest(guest_part).await {
            if matches!(e, Error::DeadlineExceeded(_))
                && let Err(e) = container.agent.remove_container(&id, false).await
            {
                // The guest may create it still.
                log::warn!("container {id}, which was not created in time: {e}");
            }
            remove_from_host(&machine, &id, Some(&container)).await;
            return Err(e);
        }
        Ok(container)
    }

    /// All that comes before the hooks.
    async fn prepare(
        parts: Parts,
        machine: Arc<Machine>,
        events: Arc<Publisher>,
    ) -> Result<(Arc<Self>, GuestPart)> {
        let Parts { id, namespace, bundle, spec, layers, paths, pod, first, limits } = parts;
        let pause = spec.is_sandbox();
        let host_limits = Arc::clone(&machine);
        let own = id.clone();
        let (found, mut sources, wanted) = crate::host::threads::blocking(move || {
            let sources = spec.sources(&bundle, &pod);
            if !pause {
                host_limits.see_sources(&spec, &sources, &layers);
            }
            let policy = host_limits.disk_policy;
            let wanted =
                if pause { Vec::new() } else { disks::wanted(&own, &spec, &sources, &layers, policy)? };
            Ok(((spec, bundle, layers, pod), sources, wanted))
        })
        .await?;
        let (spec, bundle, layers, pod) = found;
        let Attached { disks, on_disks, below } = machine.attach_disks(&id, wanted).await?;
        for (number, path) in &on_disks.mounts {
            sources.iter_mut().skip(*number).take(1).for_each(|source| *source = Source::Disk(path.clone()));
        }
        let streams = Streams::open(&paths, &id, &namespace, &machine.ports).await?;
        let (stand_ins, sockets) = if pause {
            Default::default()
        } else {
            sockets::open(&spec, &mut sources, &machine.ports).await?
        };
        let (spec, id, bundle, guest_spec, added) = if pause {
            // Neither its root nor its mounts are of use to anybody.
            let guest_spec = spec.for_pause().for_guest(&id, paths.terminal, &[], &pod, &on_disks)?;
            (spec, id, bundle, guest_spec, Added::default())
        } else {
            let vmm = machine.running().await?;
            let (share, terminal) = (Arc::clone(&machine.share), paths.terminal);
            let added = crate::host::threads::blocking(move || {
                let below = below.as_slice();
                let layers = if on_disks.root {
                    Some(below).filter(|below| !below.is_empty())
                } else {
                    Some(&layers[..])
                };
                let added = share.add(&id, &bundle, &spec, layers, &mut sources, vmm.as_fd())?;
                let guest_spec = spec.for_guest(&id, terminal, &sources, &pod, &on_disks)?;
                Ok((spec, id, bundle, guest_spec, added))
            });
            match added.await {
                // Why the VM has ended says more.
                Err(e @ Error::Unavailable(_)) => return Err(machine.agent().await.err().unwrap_or(e)),
                added => added?,
            }
        };
        let agent = machine.agent().await?;
        machine.fit(&limits).await?;
        let pid = if first { machine.pid() } else { machine.take_pid(&id).await };
        let name = ProcessName { container: id.clone(), exec: String::new() };
        let container = Arc::new(Self {
            init: Process::new(name, paths, Map::new()),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            sockets: Mutex::new(sockets),
            changing: tokio::sync::Mutex::default(),
            id,
            bundle,
            spec,
            machine,
            pid,
            agent,
            events,
        });
        let uses = Uses { disks, sockets: stand_ins, mounts: added.mounts };
        let (follows, watched) = (added.follows, added.watched);
        Ok((container, GuestPart { spec: guest_spec, streams, uses, follows, watched }))
    }

    /// Runs the hooks of its creation, then creates it in the guest.
    async fn create_in_guest(self: &Arc<Self>, part: GuestPart) -> Result<()> {
        let GuestPart { spec, mut streams, uses, follows, watched } = part;
        self.run_hooks("creating", |hooks| [&hooks.prestart[..], &hooks.create_runtime].concat()).await?;
        if self.spec.hooks.is_some() {
            // That is where container engines without CNI set up a network.
            self.machine.update_network(&self.spec).await?;
        }
        self.machine.members.add(&self.id);
        let pause = self.spec.is_sandbox();
        let answer = self.agent.create_container(&self.id, spec, streams.ports(), pause, uses).await;
        let pid = self.with_streams(&self.init, &mut streams, answer).await?;
        durations::reached("container created");
        self.init.exists(pid, streams);
        self.machine.watch(watched);
        if follows && let Err(e) = self.machine.follow_mounts().await {
            log::warn!("later mounts of the host do not appear: {e}");
        }
        self.follow(&self.init);
        Ok(())
    }

    async fn run_hooks(
        self: &Arc<Self>,
        status: &'static str,
        which: impl FnOnce(&crate::spec::Hooks) -> Vec<Hook>,
    ) -> Result<()> {
        let hooks = self.spec.hooks.as_ref().map(which).unwrap_or_default();
        if hooks.is_empty() {
            return Ok(());
        }
        let container = Arc::clone(self);
        crate::host::threads::blocking(move || {
            let pid = i32::try_from(container.pid).unwrap_or(0);
            let (id, bundle, spec) = (container.id.as_str(), container.bundle.as_path(), &container.spec);
            hooks::run(&hooks, &hooks::State { id, status, pid, bundle, spec })
        })
        .await
    }

    /// Waits for a process's end, as a task, and publishes it.
    fn follow(self: &Arc<Self>, process: &Arc<Process>) {
        let (container, process) = (Arc::clone(self), Arc::clone(process));
        tokio::spawn(async move {
            let exit = process.follow(&container.agent).await;
            let is_init = process.name.exec.is_empty();
            if is_init && !container.spec.owns_pid_namespace() && !container.machine.is_dead() {
                // No namespace ends with this process, so the rest of the container is ended here.
                let _ = container.agent.signal_process(&process.name, SIGKILL.unsigned_abs(), true).await;
            }
            let _published = process.starting.lock().await;
            container.events.publish(&TaskExit {
                container_id: container.id.clone(),
                id: if is_init { container.id.clone() } else { process.name.exec.clone() },
                pid: container.pid_of(&process),
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..Default::default()
            });
            process.stopped(exit);
        });
    }

    /// Ends the machine of a container that is alone in it as soon as that has ended: it takes the kernel a while,
    /// meanwhile containerd asks for the Delete.
    pub async fn end_alone(self: Arc<Self>) {
        let exit = self.init.wait().await;
        log::debug!("timeline: container ended");
        let execs_end = self.execs().values().any(|exec| exec.phase() == Phase::Running);
        // Delete has to write disks first. After a SIGKILL, the agent may be about to report a lack of memory.
        if exit.status != KILLED && !execs_end && !self.machine.has_lasting_disks(&self.id).await {
            self.machine.kill();
        }
    }

    /// The pid that clients get. For the container it is a process of the host, of which clients look up namespaces and
    /// cgroups: the VMM, or a thread of it; for an exec, of which the host has none, it is the one in the guest.
    pub fn pid_of(&self, process: &Process) -> u32 {
        if process.name.exec.is_empty() { self.pid } else { process.guest_pid() }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container's first process, or an exec.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let found = self.execs().get(exec).cloned();
        found.ok_or_else(|| Error::NotFound(format!("process does not exist {exec}")))
    }

    /// Waits until all its processes have ended, and that has been published.
    pub async fn ended(&self) {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        for process in execs.iter().chain([&self.init]).filter(|process| process.phase() == Phase::Running) {
            process.wait().await;
        }
    }

    /// Whether the container is frozen.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Starts the first process or an exec; the answer is its pid.
    pub async fn start(self: &Arc<Self>, exec: &str) -> Result<u32> {
        let process = self.process(exec)?;
        if exec.is_empty() {
            let _changing = self.changing.lock().await;
            let _starting = process.starting.lock().await;
            self.start_init().await?;
        } else {
            let _starting = process.starting.lock().await;
            self.start_exec(&process).await?;
        }
        Ok(self.pid_of(&process))
    }

    async fn start_init(self: &Arc<Self>) -> Result<()> {
        self.init.may_start()?;
        self.machine.starting(&self.spec).await?;
        self.agent.start_container(&self.id).await?;
        durations::reached("container started");
        self.init.started();
        let (container_id, pid) = (self.id.clone(), self.pid);
        self.events.publish(&TaskStart { container_id, pid, ..Default::default() });
        if let Err(e) = self.run_hooks("running", |hooks| hooks.poststart.clone()).await {
            // runtime-spec: a failing poststart hook is a warning, the container lives.
            log::warn!("container {}: {e}", self.id);
        }
        Ok(())
    }

    /// Removes the container, which must not run: from the guest if that goes on, then from the host.
    pub async fn delete(self: &Arc<Self>, guest_goes_on: bool) -> Result<Exit> {
        let mut deleted = self.changing.lock().await;
        if *deleted {
            return Err(Error::NotFound(format!("container {}", self.id)));
        }
        let exit = match self.init.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Running if self.is_paused() => {
                return Err(Error::FailedPrecondition("cannot delete a paused process".into()));
            }
            Phase::Running => {
                return Err(Error::FailedPrecondition("cannot delete a running process".into()));
            }
            Phase::Created => self.discard().await?,
        };
        // A machine that ends takes all else with it, but not what is to be written to disks.
        let writes = self.machine.has_lasting_disks(&self.id).await;
        if (guest_goes_on || writes)
            && !self.machine.is_dead()
            && let Err(e) = self.agent.remove_container(&self.id, writes).await
        {
            log::error!("remove container {}: {e}", self.id);
        }
        drop(std::mem::take(&mut *self.sockets.lock().unwrap_or_else(PoisonError::into_inner)));
        remove_from_host(&self.machine, &self.id, Some(self)).await;
        *deleted = true;
        Ok(exit)
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.must_run("pause")?;
        if self.is_paused() {
            return Err(Error::FailedPrecondition("cannot pause a paused container".into()));
        }
        self.agent.pause_container(&self.id).await?;
        self.paused.store(true, Ordering::Relaxed);
        self.events.publish(&TaskPaused { container_id: self.id.clone(), ..Default::default() });
        Ok(())
    }

    /// Thaws the container.
    pub async fn resume(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.must_run("resume")?;
        if !self.is_paused() {
            return Err(Error::FailedPrecondition("cannot resume a running process".into()));
        }
        self.agent.resume_container(&self.id).await?;
        self.paused.store(false, Ordering::Relaxed);
        self.events.publish(&TaskResumed { container_id: self.id.clone(), ..Default::default() });
        Ok(())
    }

    fn must_run(&self, what: &str) -> Result<()> {
        match self.init.phase() {
            Phase::Running => Ok(()),
            Phase::Created => Err(Error::FailedPrecondition(format!("cannot {what} task in created state"))),
            Phase::Stopped(_) => Err(Error::FailedPrecondition(format!("cannot {what} a stopped container"))),
        }
    }

    /// Sets a terminal's size.
    pub async fn resize(&self, exec: &str, columns: u32, rows: u32) -> Result<()> {
        self.process(exec)?.resize(&self.agent, columns, rows).await
    }

    /// Changes limits.
    pub async fn update(&self, mut resources: Map<String, Value>) -> Result<()> {
        crate::spec::resources_for_guest(&mut resources);
        let resources = Value::Object(resources).to_string().into_bytes();
        self.agent.update_container(&self.id, resources).await
    }

    /// Whether the guest answers.
    pub async fn ping(&self) -> Result<()> {
        self.agent.list_processes(&self.id).await.map(drop)
    }

    /// The processes by pid in the guest, each with the exec it is the first of.
    pub async fn processes(&self) -> Result<Vec<(u32, String)>> {
        if self.init.exit().is_some() {
            return Ok(Vec::new());
        }
        let listed = self.agent.list_processes(&self.id).await;
        let execs: Vec<_> = self.execs().values().cloned().collect();
        match listed {
            Ok(mut processes) => {
                for (_, exec) in &mut processes {
                    if !execs.iter().any(|known| known.name.exec == *exec) {
                        exec.clear();
                    }
                }
                Ok(processes)
            }
            // What is known without asking: a containerd that starts takes a shim that answers with nothing for a
            // useless one, and ends it.
            Err(Error::DeadlineExceeded(why)) => {
                log::warn!("{why}");
                let running = execs.iter().chain([&self.init]).filter(|process| process.exit().is_none());
                let known = running.filter(|process| process.guest_pid() != 0);
                Ok(known.map(|process| (process.guest_pid(), process.name.exec.clone())).collect())
            }
            Err(e) => Err(e),
        }
    }

    /// The container's cgroup files.
    pub async fn stats(&self) -> Result<crate::pod::stats::Files> {
        if self.init.exit().is_some() {
            return Err(Error::NotFound("cgroup deleted".into()));
        }
        self.agent.container_stats(&self.id).await
    }
}

/// Takes away what is left of a container that is not in the guest any more, or never was. There is a container once
/// the hooks of its creation may have begun: those of its end take back what they set up, also when the creation
/// fails.
async fn remove_from_host(machine: &Arc<Machine>, id: &str, container: Option<&Arc<Container>>) {
    machine.release_disks(id).await;
    machine.remove_from_share(id.to_owned()).await;
    if let Some(container) = container
        && let Err(e) = container.run_hooks("stopped", |hooks| hooks.poststop.clone()).await
    {
        log::warn!("container {id}: {e}");
    }
    machine.release_pid(id).await;
    machine.members.remove(id);
}
