//! A pod's virtual machine: launched for its first container, ended after its last.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use katana_config::{Config, HostNamespaces};
use katana_protocol::{AGENT_PORT, agent as api};
use tokio::sync::watch;

use crate::agent::Agent;
use crate::ceiling::{self, Ceiling};
use crate::cgroup;
use crate::cleanup;
use crate::disks::{self, Place, Purpose, Slots, Wanted};
use crate::error::{Error, Result};
use crate::events::Publisher;
use crate::follow::Follower;
use crate::layout::{Identity, Layout, State};
use crate::machine;
use crate::members::Members;
use crate::network::{Cards, Loopback, Network, Record};
use crate::pidfd::{PidFd, ProcessId};
use crate::ports::{Ports, Waiter};
use crate::rootfs::Layer;
use crate::share::Share;
use crate::size::{Bounds, Limits, Size};
use crate::spec::{OnDisks, Pod, Source, Spec};
use crate::template::Start;
use crate::vmm::{Thread, Vmm, wait_end};
use crate::watch::Watcher;

/// How long a VMM may take to tell what was on the console of a guest that did not come up.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a guest may take to plug memory.
const PLUG_LIMIT: Duration = Duration::from_secs(10);
/// How long the end of a killed VMM is waited for.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long the end of a thread of the VMM is waited for. Nothing depends on it.
const UNPARK_LIMIT: Duration = Duration::from_secs(2);

/// A pod's virtual machine.
pub struct Sandbox {
    /// The shared directory.
    pub share: Arc<Share>,
    /// The ports that the guest may connect to.
    pub ports: Arc<Ports>,
    /// The directory of the host for which the guest has a tmpfs: the pod's /dev/shm.
    pub shared_memory: Option<PathBuf>,
    /// What becomes of containers that ask for namespaces of the host.
    pub host_namespaces: HostNamespaces,
    /// The containers that the agent may speak of.
    pub members: Arc<Members>,
    vmm: Vmm,
    /// The VMM's threads that stand for containers, by the containers' ids.
    threads: watch::Sender<Threads>,
    network: Network,
    /// The network as the guest knows it.
    told: tokio::sync::Mutex<api::Network>,
    /// Whether a container has been started; the pod's network is complete then.
    started: AtomicBool,
    layout: Layout,
    /// Whether a template is made of the machine: then it stays empty until the agent is there, or the machines that go on from
    /// the template would have its cards, disks and memory.
    becomes_template: bool,
    agent: watch::Receiver<Option<Result<Agent>>>,
    bounds: Bounds,
    size: tokio::sync::Mutex<Size>,
    /// On a host with cgroup v2.
    ceiling: Option<Arc<Ceiling>>,
    disks: tokio::sync::Mutex<Slots>,
    /// For the first volume that is watched.
    watcher: tokio::sync::Mutex<Option<Watcher>>,
    /// For the first volume that follows the host's mounts.
    follower: tokio::sync::Mutex<Option<Follower>>,
}

type Threads = BTreeMap<String, Thread>;

/// A pod's first container.
pub struct First<'a> {
    /// Its specification.
    pub spec: &'a Spec,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Its root, as the snapshotter gave it.
    pub layers: &'a [Layer],
    /// The directory of the host for which the guest is to have a tmpfs of so many bytes: the pod's /dev/shm.
    pub shared_memory: Option<(PathBuf, u64)>,
}

/// What a sandbox is launched with.
pub struct Launch<'a> {
    /// The pod.
    pub identity: &'a Identity,
    /// [`crate::layout::RUN`].
    pub run: &'a Path,
    /// The pod's first container.
    pub first: First<'a>,
    /// What the machine has to be large enough for at first.
    pub limits: Limits,
    /// The configuration.
    pub config: &'a Config,
    /// Whether the pod has changed something of it for itself.
    pub own: bool,
}

impl Sandbox {
    /// Starts the VMM and lets it boot. The agent is there later, see [`Sandbox::agent`]; meanwhile the first
    /// container's mounts can be made. On failure nothing is left.
    pub async fn launch(launch: Launch<'_>, events: &Arc<Publisher>) -> Result<Arc<Self>> {
        let layout = launch.identity.layout(launch.run);
        // A shim that was killed may have left the same pod behind.
        cleanup::remove_blocking(&layout).await;
        let launched = Self::try_launch(&launch, layout.clone(), events).await;
        if launched.is_err() {
            cleanup::remove_blocking(&layout).await;
        }
        launched
    }

    async fn try_launch(launch: &Launch<'_>, layout: Layout, events: &Arc<Publisher>) -> Result<Arc<Self>> {
        let Launch { config, identity, first, .. } = launch;
        let spec = first.spec;
        log::debug!("timeline: Create");
        let files = machine::open_files(config)?;
        let disk_slots = disk_slots(launch).await?;
        let bounds = Bounds::of(config);
        let size = bounds.size(&launch.limits);
        let cards = Cards { pairs: size.vcpus, vhost: !config.hypervisor.disable_vhost_net };
        let network = Network::open(spec, &identity.namespace, cards).await?;
        log::debug!("timeline: network looked at");
        let record = Written {
            layout: layout.clone(),
            identity: (*identity).clone(),
            cgroup: cgroup_of(spec, identity),
            network: network.record(),
        };
        record.write(Vec::new(), BTreeMap::new())?;
        let path = layout.share.clone();
        let share = crate::blocking(move || Share::create(&path)).await?;
        let ports = Ports::new();
        let agent_port = ports.open(AGENT_PORT);
        let vmm = Vmm::spawn(&config.hypervisor.path, network.namespace(), Arc::clone(&ports), |pid| {
            let process = i32::try_from(pid).ok().and_then(|pid| ProcessId::of(pid).ok());
            record.write(process.into_iter().collect(), BTreeMap::new())
        })?;
        log::debug!("timeline: VMM spawned");
        let own = machine::machine(config, size.vcpus, network.slots(), disk_slots)?;
        let namespace = spec.owner(&identity.namespace);
        let start = if launch.own { Start::Boot } else { Start::choose(config, &namespace, &own) };
        let machine = start.machine(config, own);
        let (vcpus, mib, booted) = (size.vcpus, machine.memory_mib, machine.vcpus);
        let disk_slots = machine.disk_slots;
        log::info!("a VM with {vcpus} vCPUs and {mib} MiB, {} more to be plugged", size.plugged_mib);
        let directory = share.root();
        let cgroup = record.cgroup.as_deref().map(cgroup::make).transpose()?;
        let ceiling = record.cgroup.clone().map(|cgroup| {
            let alone = cgroup::is_ours(&cgroup);
            let machine = ceiling::Machine { base_mib: mib, is_pod: spec.is_sandbox(), alone };
            Ceiling::new(cgroup, machine, &launch.limits, size)
        });
        let [kvm, kernel, image] = &files;
        let files = [kvm.as_fd(), kernel.as_fd(), image.as_fd(), directory.as_fd()];
        let files = files.into_iter().chain(start.file()).chain(cgroup.as_ref().map(AsFd::as_fd));
        vmm.boot(machine, &files.collect::<Vec<_>>())?;
        let becomes_template = matches!(start, Start::First(_));
        let (sender, agent) = watch::channel(None);
        start.expect(&vmm, is_there(agent.clone()));
        if size.plugged_mib > 0 && !becomes_template {
            vmm.plug_memory(size.plugged_mib)?;
        }

        let threads = watch::Sender::default();
        tokio::spawn(record.follow(vmm.processes(), threads.subscribe()));
        let (share, told, started) = (Arc::new(share), tokio::sync::Mutex::default(), AtomicBool::new(false));
        let size = tokio::sync::Mutex::new(size);
        let (shared_memory, shm_bytes) = launch.first.shared_memory.clone().unzip();
        let shm_bytes = shm_bytes.unwrap_or(0);
        let sandbox = Arc::new(Self {
            share,
            ports,
            shared_memory,
            host_namespaces: config.runtime.host_namespaces,
            members: Arc::default(),
            vmm,
            threads,
            network,
            told,
            started,
            layout,
            becomes_template,
            agent,
            bounds,
            size,
            ceiling,
            disks: Slots::new(disk_slots).into(),
            watcher: tokio::sync::Mutex::default(),
            follower: tokio::sync::Mutex::default(),
        });
        let limit = Duration::from_secs(u64::from(config.agent.dial_timeout.max(1)));
        let hostname = spec.hostname.clone().unwrap_or_default();
        let (connecting, events, is_pod) = (Arc::clone(&sandbox), Arc::clone(events), spec.is_sandbox());
        tokio::spawn(async move {
            let missing = Some(vcpus).filter(|vcpus| *vcpus > booted);
            let loopback = connecting.loopback(is_pod);
            let agent = connecting.connect(agent_port, limit, &hostname, shm_bytes, missing);
            let (agent, loopback) = tokio::join!(agent, loopback);
            if let Ok(agent) = &agent {
                tokio::spawn(Arc::clone(&connecting.members).report_oom(agent.clone(), events));
                if let Some(loopback) = loopback {
                    connecting.serve_loopback(loopback, agent.clone());
                }
            }
            sender.send_replace(Some(agent));
        });
        Ok(sandbox)
    }

    /// Connects the network while the guest boots, and introduces the pod to the agent. `vcpus`: if more are to be on
    /// line than there are after the boot.
    async fn connect(
        &self,
        port: Waiter,
        limit: Duration,
        hostname: &str,
        shm_bytes: u64,
        vcpus: Option<u8>,
    ) -> Result<Agent> {
        let mut told = self.told.lock().await;
        let (agent, network) = if self.becomes_template {
            let agent = self.connect_agent(port, limit).await?;
            let plugged_mib = self.size.lock().await.plugged_mib;
            if plugged_mib > 0 {
                self.vmm.plug_memory(plugged_mib)?;
            }
            (agent, self.network.connect(&self.vmm).await?)
        } else {
            let (agent, network) =
                tokio::join!(self.connect_agent(port, limit), self.network.connect(&self.vmm));
            // Whatever was wrong with the network, that there is no agent says more.
            (agent?, network?)
        };
        log::debug!("timeline: agent connected");
        if let Some(vcpus) = vcpus {
            // Before the cards are found: their driver uses as many pairs of queues as there are CPUs then.
            self.vmm.add_vcpus(vcpus).await?;
            agent.set_cpus(vcpus).await?;
        }
        agent.create_sandbox(hostname, shm_bytes, network.clone(), self.ports.key()?).await?;
        log::debug!("timeline: pod introduced");
        *told = network;
        Ok(agent)
    }

    /// Takes what connects to `localhost` in a pod's network namespace. Nobody asks other clients' containers to forward
    /// ports, and their namespace may be shared with containers outside the guest.
    async fn loopback(&self, is_pod: bool) -> Option<Loopback> {
        if is_pod { self.network.listen_on_loopback().await } else { None }
    }

    /// Leads that to the guest's `localhost`, until the guest is gone.
    fn serve_loopback(&self, loopback: Loopback, agent: Agent) {
        let (ports, mut ended) = (Arc::clone(&self.ports), self.vmm.ended());
        tokio::spawn(async move {
            tokio::select! {
                Err(e) = loopback.serve(agent, ports) => log::error!("ports are not forwarded any more: {e}"),
                _ = wait_end(&mut ended) => {}
            }
        });
    }

    async fn connect_agent(&self, port: Waiter, limit: Duration) -> Result<Agent> {
        let mut ended = self.vmm.ended();
        let Ok(connection) = tokio::time::timeout(limit, port.connection()).await else {
            let end = self.vmm.stop(LAST_WORDS).await;
            let text = format!("the agent in the guest did not connect within {} s; {end}", limit.as_secs());
            return Err(Error::Unavailable(text));
        };
        match connection {
            // Why it has ended says more.
            Err(Error::Unavailable(_)) => Err(Error::Unavailable(wait_end(&mut ended).await.to_string())),
            connection => Agent::new(connection?, ended),
        }
    }

    /// Brings the guest's network up to date, after something may have changed it on the host.
    ///
    /// On a task of its own: it must not stop halfway when containerd drops its request.
    pub async fn update_network(self: &Arc<Self>, spec: &Spec) -> Result<()> {
        // First, since new interfaces are connected in another way if there are any.
        self.network.serve_names(spec, &self.ports).await;
        let sandbox = Arc::clone(self);
        let updated = tokio::spawn(async move { sandbox.try_update_network().await });
        updated.await.map_err(|e| Error::Host(format!("network: {e}")))?
    }

    async fn try_update_network(&self) -> Result<()> {
        let agent = self.agent().await?;
        let mut told = self.told.lock().await;
        let network = self.network.connect(&self.vmm).await?;
        if *told != network {
            agent.update_network(network.clone()).await?;
            *told = network;
        }
        Ok(())
    }

    /// To be called before a container's start. Before the first one, clients add to the pod's network.
    pub async fn starting(self: &Arc<Self>, spec: &Spec) -> Result<()> {
        if !self.started.load(Ordering::Relaxed) {
            self.update_network(spec).await?;
            self.started.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until the VMM is in its jail, in whose mount namespace containers' mounts are made from now on; the answer is
    /// its process.
    pub async fn running(&self) -> Result<PidFd> {
        let process = if self.vmm.running().await { self.vmm.process() } else { None };
        match process {
            Some(process) => Ok(process),
            None => {
                Err(self.agent().await.err().unwrap_or_else(|| Error::Unavailable("the VM is gone".into())))
            }
        }
    }

    /// The agent, as soon as it is there, or why it is not.
    pub async fn agent(&self) -> Result<Agent> {
        let mut agent = self.agent.clone();
        let ready = agent.wait_for(Option::is_some).await.ok().and_then(|agent| agent.clone());
        let agent = ready.unwrap_or_else(|| Err(Error::Unavailable("the VM is gone".into())))?;
        match &*self.vmm.ended().borrow() {
            Some(end) => Err(Error::Unavailable(end.to_string())),
            None => Ok(agent),
        }
    }

    /// A container is about to come that can write to these volumes and layers. Blocks.
    pub fn see_sources(&self, spec: &Spec, sources: &[Source], layers: &[Layer]) {
        let Some(ceiling) = &self.ceiling else { return };
        let upper = layers.iter().flat_map(|layer| &layer.options);
        let upper = upper.filter_map(|option| option.strip_prefix("upperdir=")).map(Path::new);
        let binds = spec.mounts.iter().zip(sources).filter_map(|(mount, source)| match source {
            Source::Host(path) if crate::volumes::access(&mount.options).lets_write() => Some(path.as_path()),
            _ => None,
        });
        ceiling.see(binds.chain(upper));
    }

    /// Grows or shrinks the machine to what these limits need. Does not wait for memory to be given back.
    pub async fn fit(&self, limits: &Limits) -> Result<()> {
        let wanted = self.bounds.size(limits);
        let mut size = self.size.lock().await;
        if let Some(ceiling) = &self.ceiling {
            ceiling.follow(limits, wanted, self.vmm.plugged());
        }
        if size.vcpus != wanted.vcpus {
            if size.vcpus < wanted.vcpus {
                self.vmm.add_vcpus(wanted.vcpus).await?;
            }
            self.agent().await?.set_cpus(wanted.vcpus).await?;
            size.vcpus = wanted.vcpus;
        }
        if size.plugged_mib != wanted.plugged_mib {
            self.vmm.plug_memory(wanted.plugged_mib)?;
            size.plugged_mib = wanted.plugged_mib;
        }
        let mut plugged = self.vmm.plugged();
        let grown = plugged.wait_for(|mib| *mib >= wanted.plugged_mib);
        if tokio::time::timeout(PLUG_LIMIT, grown).await.is_err() {
            // The containers' own limits hold all the same, and there may be enough without.
            log::warn!("the guest does not plug {} MiB of memory", wanted.plugged_mib);
        }
        Ok(())
    }

    /// Gives a container its disks; answers what the agent is told of them, and what the specification.
    ///
    /// On a task of its own: it must not stop halfway when containerd drops its request.
    pub async fn attach_disks(
        self: &Arc<Self>,
        container: &str,
        wanted: Vec<Wanted>,
    ) -> Result<(Vec<api::Disk>, OnDisks)> {
        let (sandbox, container) = (Arc::clone(self), container.to_owned());
        let attached = tokio::spawn(async move { sandbox.try_attach_disks(&container, wanted).await });
        attached.await.map_err(|e| Error::Host(format!("disks: {e}")))?
    }

    async fn try_attach_disks(
        &self,
        container: &str,
        wanted: Vec<Wanted>,
    ) -> Result<(Vec<api::Disk>, OnDisks)> {
        let (mut messages, mut on_disks) = (Vec::new(), OnDisks::default());
        if self.becomes_template && !wanted.is_empty() {
            self.agent().await?;
        }
        for wanted in wanted {
            let (path, is_needed) = (wanted.path.clone(), wanted.is_needed());
            let disk = crate::blocking(move || wanted.open()).await?;
            let mut slots = self.disks.lock().await;
            let Some(Place { slot, shared }) = slots.take(container, &disk) else {
                if !is_needed {
                    log::info!("{} is mounted on the host: all disk slots are in use", path.display());
                    continue;
                }
                return Err(Error::FailedPrecondition(format!(
                    "disk {}: all {} disk slots of the pod's VM are in use (disk_slots in the configuration)",
                    path.display(),
                    slots.count()
                )));
            };
            let message = disk.message(slot);
            match disk.purpose() {
                Purpose::Root { .. } => on_disks.root = true,
                Purpose::Device(mount) => {
                    on_disks.mounts.extend(mount.map(|number| (number, slot)));
                    on_disks.devices.push((message.major.into(), message.minor.into()));
                }
            }
            messages.push(message);
            if !shared {
                self.vmm.attach_disk(slot, disk.read_only(), disk.into_file()).await?;
            }
        }
        Ok((messages, on_disks))
    }

    /// Whether a container has disks. What it wrote to them is on them after [`Sandbox::release_disks`].
    pub async fn has_disks(&self, container: &str) -> bool {
        self.disks.lock().await.has(container)
    }

    /// A container is gone from the guest, and its disks with it. On a task of its own.
    pub async fn release_disks(self: &Arc<Self>, container: &str) {
        let (sandbox, container) = (Arc::clone(self), container.to_owned());
        let released = tokio::spawn(async move {
            let mut slots = sandbox.disks.lock().await;
            for slot in slots.leave(&container) {
                match sandbox.release_disk(slot).await {
                    Ok(()) => slots.free(slot),
                    // The guest may still write to it: nobody else gets the slot.
                    Err(e) => log::error!("disk slot {slot}: {e}"),
                }
            }
        });
        let _ = released.await;
    }

    async fn release_disk(&self, slot: u8) -> Result<()> {
        if self.is_dead() {
            return Ok(());
        }
        self.agent().await?.release_disk(slot).await?;
        self.vmm.detach_disk(slot).await
    }

    /// From now on the host's changes in these volumes raise events in the guest. On a task: no start waits for this.
    pub fn watch(self: &Arc<Self>, volumes: Vec<PathBuf>) {
        let sandbox = Arc::clone(self);
        if !volumes.is_empty() {
            tokio::spawn(async move {
                if let Err(e) = sandbox.try_watch(volumes).await {
                    log::warn!("changes of files by the host raise no events: {e}");
                }
            });
        }
    }

    async fn try_watch(&self, volumes: Vec<PathBuf>) -> Result<()> {
        let agent = self.agent().await?;
        let mut watcher = self.watcher.lock().await;
        if watcher.is_none() {
            let started = Watcher::start(self.share.root(), agent.clone());
            *watcher = Some(started.map_err(|e| Error::io("inotify", &e))?);
        }
        let Some(watcher) = &*watcher else { return Ok(()) };
        watcher.add(volumes).await
    }

    /// From now on the host's mounts appear in volumes that are to show them.
    pub async fn follow_mounts(&self) -> Result<()> {
        let mut follower = self.follower.lock().await;
        if follower.is_none() {
            let (vmm, agent) = (self.running().await?, self.agent().await?);
            let started = Follower::start(Arc::clone(&self.share), vmm, agent);
            *follower = Some(started.map_err(|e| Error::io("/proc/self/mountinfo", &e))?);
        }
        Ok(())
    }

    /// A container has no root and no volumes any more.
    pub async fn remove_from_share(&self, id: String) {
        let removed = Arc::clone(&self.share).remove_beside(id).await;
        if let Some(watcher) = &*self.watcher.lock().await {
            removed.iter().for_each(|volume| watcher.remove(volume));
        }
    }

    /// The pid on the host by which clients are to know one more container of a pod, so that they can name it by that. If it
    /// cannot have one of its own, it is the VMM's. On a task of its own: see [`Sandbox::attach_disks`].
    pub async fn take_pid(self: &Arc<Self>, container: &str) -> u32 {
        let (sandbox, container) = (Arc::clone(self), container.to_owned());
        let taken = tokio::spawn(async move {
            let thread = sandbox.vmm.park().await?;
            sandbox.threads.send_modify(|threads| {
                threads.insert(container, thread);
            });
            Ok::<_, Error>(thread.pid)
        });
        match taken.await {
            Ok(Ok(pid)) => return pid,
            Ok(Err(e)) => log::warn!("a container has the VMM's pid: {e}"),
            Err(e) => log::warn!("a container has the VMM's pid: {e}"),
        }
        self.pid()
    }

    /// A container is gone, and its pid with it. On a task of its own.
    pub async fn release_pid(self: &Arc<Self>, container: &str) {
        let mut thread = None;
        // Without a word to who writes it down: a wrong pid of what is gone does no harm, a file that is written while the pod is
        // removed does.
        self.threads.send_if_modified(|threads| {
            thread = threads.remove(container);
            false
        });
        let Some(thread) = thread.filter(|_| !self.is_dead()) else { return };
        let sandbox = Arc::clone(self);
        let released = tokio::spawn(async move { sandbox.vmm.unpark(thread).await });
        match tokio::time::timeout(UNPARK_LIMIT, released).await {
            Ok(Ok(Err(e))) => log::warn!("the pid of container {container}: {e}"),
            Err(_) => log::warn!("the pid of container {container}: kata-vmm does not answer"),
            Ok(_) => {}
        }
    }

    /// The VMM's pid on the host.
    pub fn pid(&self) -> u32 {
        u32::try_from(self.vmm.pid()).unwrap_or(0)
    }

    /// Whether the VM has ended.
    pub fn is_dead(&self) -> bool {
        self.vmm.ended().borrow().is_some()
    }

    /// Has the VM end; what is left of it stays.
    pub fn kill(&self) {
        self.vmm.kill();
    }

    /// Ends the VM and removes all that is left of it.
    pub async fn end(&self) {
        self.vmm.kill();
        if tokio::time::timeout(END_LIMIT, wait_end(&mut self.vmm.ended())).await.is_err() {
            log::error!("the killed VMM does not end");
        }
        cleanup::remove_blocking(&self.layout).await;
    }
}

/// Places for the disks of the first container, and for those of a pod's later ones.
async fn disk_slots(launch: &Launch<'_>) -> Result<u8> {
    let Launch { first: First { spec, bundle, layers, .. }, config, .. } = launch;
    if spec.is_sandbox() {
        return Ok(u8::try_from(config.hypervisor.disk_slots).unwrap_or(u8::MAX));
    }
    let (spec, bundle, layers) = ((*spec).clone(), bundle.to_path_buf(), layers.to_vec());
    crate::blocking(move || {
        let wanted = disks::wanted(&spec, &spec.sources(&bundle, &Pod::default()), &layers)?;
        Ok(u8::try_from(wanted.len()).unwrap_or(u8::MAX))
    })
    .await
}

/// The pod's cgroup: the sandbox container's own place below the pod's, or that of the only container.
fn cgroup_of(spec: &Spec, identity: &Identity) -> Option<PathBuf> {
    cgroup::path(spec.linux.as_ref()?.cgroups_path.as_deref(), &identity.sandbox)
}

/// What is written down of a pod, but for its processes.
struct Written {
    layout: Layout,
    identity: Identity,
    cgroup: Option<PathBuf>,
    network: Option<Record>,
}

impl Written {
    fn write(&self, vmm: Vec<ProcessId>, pids: BTreeMap<String, u32>) -> Result<()> {
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        let written = ProcessId::of(pid).and_then(|shim| {
            self.layout.write(&State {
                namespace: self.identity.namespace.clone(),
                sandbox: self.identity.sandbox.clone(),
                shim,
                vmm,
                pids,
                cgroup: self.cgroup.clone(),
                network: self.network.clone(),
            })
        });
        written.map_err(|e| Error::io(self.layout.state.display(), &e))
    }

    /// Writes the VMM's processes down as they become known, and the pids of containers.
    async fn follow(
        self,
        mut processes: watch::Receiver<Vec<ProcessId>>,
        mut threads: watch::Receiver<Threads>,
    ) {
        loop {
            let changed = tokio::select! {
                changed = processes.changed() => changed,
                changed = threads.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            let processes = processes.borrow_and_update().clone();
            let pids = threads.borrow_and_update().clone().into_iter();
            let pids = pids.map(|(container, thread)| (container, thread.pid)).collect();
            // Once the state is gone the pod is, and must not come back.
            if self.layout.read().is_some()
                && let Err(e) = self.write(processes, pids)
            {
                log::error!("{e}");
            }
        }
    }
}

/// Waits until the agent is there, or it is known why it is not.
async fn is_there(mut agent: watch::Receiver<Option<Result<Agent>>>) {
    let _ = agent.wait_for(Option::is_some).await;
}
