//! The start of a machine: what it is made of, and the VMM that gets it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use katana_config::Config;
use katana_protocol::AGENT_PORT;
use tokio::sync::watch;

use super::host_limits::{self, HostLimits};
use super::layout::{Identity, Layout};
use super::record::Record;
use super::size::{Bounds, Limits};
use super::template::Start;
use super::{Machine, cleanup, shape};
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::guest::ports::Ports;
use crate::guest::vmm::Vmm;
use crate::host::cgroup;
use crate::host::durations;
use crate::host::events::Publisher;
use crate::host::pidfd::ProcessId;
use crate::network::{Network, Nics};
use crate::spec::{Pod, Spec};
use crate::storage::disk_slots::Slots;
use crate::storage::disks;
use crate::storage::rootfs::Layer;
use crate::storage::share::Share;
use crate::storage::writable::Policy;

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

/// What a machine is launched with.
pub struct Launch<'a> {
    /// The pod.
    pub identity: &'a Identity,
    /// [`super::layout::RUN`].
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

impl Machine {
    /// Starts the VMM and lets it boot. The agent is there later, see [`Machine::agent`]; meanwhile the first
    /// container's mounts can be made. On failure nothing is left.
    pub async fn launch(launch: Launch<'_>, events: &Arc<Publisher>) -> Result<Arc<Self>> {
        let layout = launch.identity.layout(launch.run);
        // A shim that was killed may have left the same pod behind.
        cleanup::remove_blocking(&layout).await;
        if layout.state.exists() {
            // Its record would be overwritten, and nobody would know of it any more.
            let text = "not all of an earlier pod of this id could be removed, see the shim's log";
            return Err(Error::Host(format!("{}: {text}", layout.state.display())));
        }
        let launched = Self::try_launch(&launch, layout.clone(), events).await;
        if launched.is_err() {
            cleanup::remove_blocking(&layout).await;
        }
        launched
    }

    async fn try_launch(launch: &Launch<'_>, layout: Layout, events: &Arc<Publisher>) -> Result<Arc<Self>> {
        let Launch { config, identity, first, .. } = launch;
        let spec = first.spec;
        durations::start_begins();
        let mut record = Record {
            layout: layout.clone(),
            identity: (*identity).clone(),
            cgroup: cgroup_of(spec, identity),
            network: None,
        };
        // Before anything that may hang, as a volume whose server does not answer: by it `delete` finds this process,
        // which would launch a machine for nobody in the end.
        record.write(Vec::new(), BTreeMap::new())?;
        let files = shape::open_files(config)?;
        let disk_slots = disk_slots(launch).await?;
        let bounds = Bounds::of(config);
        let size = bounds.size(&launch.limits);
        let nics = Nics { pairs: size.vcpus, vhost: !config.hypervisor.disable_vhost_net };
        let network = Network::open(spec, &identity.namespace, nics).await?;
        durations::reached("network looked at");
        record.network = network.record();
        if record.network.is_some() {
            record.write(Vec::new(), BTreeMap::new())?;
        }
        let path = layout.share.clone();
        let share = crate::host::threads::blocking(move || Share::create(&path)).await?;
        let ports = Ports::new();
        let agent_port = ports.open(AGENT_PORT);
        let vmm = Vmm::spawn(&config.hypervisor.path, network.namespace(), Arc::clone(&ports), |pid| {
            let process = i32::try_from(pid).ok().and_then(|pid| ProcessId::of(pid).ok());
            record.write(process.into_iter().collect(), BTreeMap::new())
        })?;
        durations::reached("VMM spawned");
        let own = shape::machine(config, size.vcpus, network.slots(), disk_slots)?;
        let namespace = spec.owner(&identity.namespace);
        let start = if launch.own { Start::Boot } else { Start::choose(config, &namespace, &own) };
        let machine = start.machine(config, own);
        let (vcpus, mib, booted) = (size.vcpus, machine.memory_mib, machine.vcpus);
        let disk_slots = machine.disk_slots;
        log::info!("a VM with {vcpus} vCPUs and {mib} MiB, {} more to be plugged", size.plugged_mib);
        let directory = share.root();
        let cgroup = record.cgroup.as_deref().map(cgroup::make).transpose()?;
        let host_limits = record.cgroup.clone().map(|cgroup| {
            let alone = cgroup::is_ours(&cgroup);
            let machine = host_limits::Machine { base_mib: mib, is_pod: spec.is_sandbox(), alone };
            HostLimits::new(cgroup, machine, &launch.limits, size)
        });
        let [kvm, kernel, image] = &files;
        let files = [kvm.as_fd(), kernel.as_fd(), image.as_fd(), directory.as_fd()];
        let files = files.into_iter().chain(start.file()).chain(cgroup.as_ref().map(AsFd::as_fd));
        vmm.boot(machine, &files.collect::<Vec<_>>())?;
        let (becomes_template, begins) = (matches!(start, Start::First(_)), start.name());
        let (sender, agent) = watch::channel(None);
        start.expect(&vmm, is_there(agent.clone()));
        if size.plugged_mib > 0 && !becomes_template {
            vmm.plug_memory(size.plugged_mib)?;
        }

        let threads = watch::Sender::default();
        tokio::spawn(record.follow(vmm.processes(), threads.subscribe()));
        let (share, sent_network, started) =
            (Arc::new(share), tokio::sync::Mutex::default(), AtomicBool::new(false));
        let size = tokio::sync::Mutex::new(size);
        let (shared_memory, shm_bytes) = launch.first.shared_memory.clone().unzip();
        let shm_bytes = shm_bytes.unwrap_or(0);
        let launched = Arc::new(Self {
            share,
            ports,
            shared_memory,
            host_namespaces: config.runtime.host_namespaces,
            disk_policy: Policy::of(config),
            debug_console: config.agent.debug_console_enabled,
            members: Arc::default(),
            vmm,
            threads,
            network,
            sent_network,
            started,
            layout,
            becomes_template,
            start: begins,
            agent,
            bounds,
            size,
            host_limits,
            shared_volumes: tokio::sync::Mutex::default(),
            disks: Slots::new(disk_slots, spec.is_sandbox()).into(),
            watcher: tokio::sync::Mutex::default(),
            follower: tokio::sync::Mutex::default(),
        });
        let limit = Duration::from_secs(u64::from(config.agent.dial_timeout.max(1)));
        let hostname = spec.hostname.clone().unwrap_or_default();
        let (connecting, events, is_pod) = (Arc::clone(&launched), Arc::clone(events), spec.is_sandbox());
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
        Ok(launched)
    }
}

/// Slots for the disks of the first container, and for those of a pod's later ones.
async fn disk_slots(launch: &Launch<'_>) -> Result<u8> {
    let Launch { first: First { spec, bundle, layers, .. }, config, .. } = launch;
    if spec.is_sandbox() {
        return Ok(u8::try_from(config.hypervisor.disk_slots).unwrap_or(u8::MAX));
    }
    let (spec, bundle, layers) = ((*spec).clone(), bundle.to_path_buf(), layers.to_vec());
    let policy = Policy::of(config);
    crate::host::threads::blocking(move || {
        let wanted = disks::wanted("", &spec, &spec.sources(&bundle, &Pod::default()), &layers, policy)?;
        Ok(u8::try_from(wanted.len()).unwrap_or(u8::MAX))
    })
    .await
}

/// The pod's cgroup: the sandbox container's own place below the pod's, or that of the only container.
fn cgroup_of(spec: &Spec, identity: &Identity) -> Option<PathBuf> {
    cgroup::path(spec.linux.as_ref()?.cgroups_path.as_deref(), &identity.sandbox)
}

/// Waits until the agent is there, or it is known why it is not.
async fn is_there(mut agent: watch::Receiver<Option<Result<Agent>>>) {
    let _ = agent.wait_for(Option::is_some).await;
}
