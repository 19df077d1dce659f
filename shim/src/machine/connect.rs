//! The agent connects, and is sent the pod and its network; later the network again, when it has changed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Machine;
use crate::error::{Error, Result};
use crate::guest::agent::Agent;
use crate::guest::ports::Waiter;
use crate::guest::vmm::wait_end;
use crate::host::durations;
use crate::network::Loopback;
use crate::spec::Spec;

/// How long a VMM may take to report what was on the console of a guest that did not come up.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Machine {
    /// Connects the network while the guest boots, and introduces the pod to the agent. `vcpus`: if more are to be on
    /// line than there are after the boot.
    pub(super) async fn connect(
        &self,
        port: Waiter,
        limit: Duration,
        hostname: &str,
        shm_bytes: u64,
        vcpus: Option<u8>,
    ) -> Result<Agent> {
        let mut sent = self.sent_network.lock().await;
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
        durations::reached("agent connected");
        if let Some(vcpus) = vcpus {
            // Before the NICs are found: their driver uses as many pairs of queues as there are CPUs then.
            self.vmm.add_vcpus(vcpus).await?;
            agent.set_cpus(vcpus).await?;
        }
        agent.create_sandbox(hostname, shm_bytes, network.clone(), self.ports.key()?).await?;
        durations::reached("pod introduced");
        *sent = network;
        Ok(agent)
    }

    /// Takes what connects to `localhost` in a pod's network namespace. Nobody asks other clients' containers to
    /// forward ports, and their namespace may be shared with containers outside the guest.
    pub(super) async fn loopback(&self, is_pod: bool) -> Option<Loopback> {
        if is_pod { self.network.listen_on_loopback().await } else { None }
    }

    /// Leads that to the guest's `localhost`, until the guest is gone.
    pub(super) fn serve_loopback(&self, loopback: Loopback, agent: Agent) {
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
        let machine = Arc::clone(self);
        let updated = tokio::spawn(async move { machine.try_update_network().await });
        updated.await.map_err(|e| Error::Host(format!("network: {e}")))?
    }

    async fn try_update_network(&self) -> Result<()> {
        let agent = self.agent().await?;
        let mut sent = self.sent_network.lock().await;
        let network = self.network.connect(&self.vmm).await?;
        if *sent != network {
            agent.update_network(network.clone()).await?;
            *sent = network;
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
}
