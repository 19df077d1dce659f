//! The pod's network: the interfaces in its network namespace, each connected to a NIC of the machine.
//!
//! The guest gets them with names, addresses and routes as they are on the host. [`Network::connect`] may be called any
//! number of times: interfaces that were added since get their NICs then. CNI plugins are done before the pod is
//! created; hooks run during its creation; Docker and `ctr --cni` add theirs between Create and Start.

mod dns;
mod loopback;
mod namespace;
mod scan;
mod sk_lookup;
mod tap;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use katana_protocol::agent as api;

pub use self::loopback::Loopback;
use self::namespace::Namespace;
pub use self::namespace::Record;
use self::scan::{Interface, Snapshot};
use crate::error::{Error, Result};
use crate::guest::ports::Ports;
use crate::guest::vmm::Vmm;
use crate::spec::Spec;

/// Containers of Docker have this namespace in containerd.
const DOCKER: &str = "moby";
/// Docker connects a container to any number of networks before its start.
const DOCKERS_SPARE_SLOTS: u8 = 4;

/// A pod's network.
pub struct Network {
    namespace: Arc<Namespace>,
    slots: u8,
    nics: Nics,
    state: tokio::sync::Mutex<State>,
}

/// What the machine's NICs are like.
#[derive(Debug, Clone, Copy)]
pub struct Nics {
    /// How many pairs of queues each has; as many as are possible if these are more.
    pub pairs: u8,
    /// Whether the host's kernel may move packets.
    pub vhost: bool,
}

#[derive(Default)]
struct State {
    /// What the namespace looked like before the machine was there.
    first: Option<Snapshot>,
    /// The index of the interface on each slot's NIC.
    nics: Vec<u32>,
    /// What stands in for the name servers on the namespace's loopback interface.
    name_servers: Vec<api::NameServer>,
}

impl Network {
    /// Finds or makes the network namespace of a specification. `client` is containerd's namespace.
    pub async fn open(spec: &Spec, client: &str, nics: Nics) -> Result<Self> {
        let wanted = spec.clone();
        let (namespace, first) = crate::host::threads::blocking(move || {
            let namespace = Namespace::of(&wanted)?;
            let first = if namespace.is_new() { Snapshot::default() } else { scan_inside(&namespace)? };
            Ok((namespace, first))
        })
        .await?;
        if first.in_use {
            return Err(Error::FailedPrecondition(
                "the network namespace is connected to another virtual machine already".into(),
            ));
        }
        let slots = slots(first.interfaces.len(), spec, client);
        let state = State { first: Some(first), ..State::default() };
        Ok(Self { namespace: Arc::new(namespace), slots, nics, state: tokio::sync::Mutex::new(state) })
    }

    /// How many NICs the machine must have slots for.
    pub fn slots(&self) -> u8 {
        self.slots
    }

    /// The network namespace.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// What a later process needs to revert [`Network::connect`].
    pub fn record(&self) -> Option<Record> {
        self.namespace.record().cloned()
    }

    /// Connects the interfaces that are not connected yet. The answer is the network for the guest.
    pub async fn connect(&self, vmm: &Vmm) -> Result<api::Network> {
        let mut state = self.state.lock().await;
        let snapshot = match state.first.take() {
            Some(first) => first,
            None => {
                let namespace = Arc::clone(&self.namespace);
                crate::host::threads::blocking(move || scan_inside(&namespace)).await?
            }
        };
        for interface in &snapshot.interfaces {
            if !state.nics.contains(&interface.index) {
                let slot = self.free_slot(&state.nics, interface)?;
                let taps = self.tap(interface.clone(), slot, !state.name_servers.is_empty()).await?;
                let vhosts = if self.nics.vhost { tap::vhosts(taps.len()) } else { Vec::new() };
                vmm.attach_net(slot, interface.mac, taps, vhosts).await?;
                state.nics.push(interface.index);
            }
        }
        Ok(api::Network { name_servers: state.name_servers.clone(), ..message(snapshot, &state.nics) })
    }

    /// Lets the guest ask the name servers on the namespace's loopback interface that a container is given.
    pub async fn serve_names(&self, spec: &Spec, ports: &Arc<Ports>) {
        let servers = dns::servers_of(spec);
        let mut state = self.state.lock().await;
        if state.name_servers.is_empty() {
            let serve = |server| dns::serve(server, &self.namespace, ports);
            state.name_servers = servers.into_iter().map(serve).collect();
        }
    }

    /// Takes what connects to `localhost` in the namespace, as port forwarding does. That it cannot is no reason for a
    /// pod not to run.
    pub async fn listen_on_loopback(&self) -> Option<Loopback> {
        let listening = Loopback::listen(Arc::clone(&self.namespace)).await;
        listening.inspect_err(|e| log::warn!("ports of this pod cannot be forwarded: {e}")).ok()
    }

    fn free_slot(&self, nics: &[u32], interface: &Interface) -> Result<u8> {
        let slot = u8::try_from(nics.len()).ok().filter(|slot| *slot < self.slots);
        slot.ok_or_else(|| {
            Error::FailedPrecondition(format!(
                "network interface {} was added too late: the machine was made for {} of them",
                interface.name, self.slots
            ))
        })
    }

    async fn tap(&self, interface: Interface, slot: u8, name_server: bool) -> Result<Vec<OwnedFd>> {
        let (namespace, pairs) = (Arc::clone(&self.namespace), self.nics.pairs);
        crate::host::threads::blocking(move || {
            namespace.inside(|| tap::connect(&interface, slot, pairs, name_server))
        })
        .await
    }
}

fn scan_inside(namespace: &Namespace) -> Result<Snapshot> {
    namespace.inside(|| scan::scan().map_err(|e| Error::Host(format!("look at the pod's network: {e}"))))
}

/// A NIC for each interface, and one that may come later if there is a sign of it: nothing there yet, or hooks.
fn slots(present: usize, spec: &Spec, client: &str) -> u8 {
    let hooks = spec
        .hooks
        .as_ref()
        .is_some_and(|hooks| !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty());
    let spare = match present {
        _ if client == DOCKER => DOCKERS_SPARE_SLOTS,
        0 => 1,
        _ => u8::from(hooks),
    };
    u8::try_from(present).unwrap_or(u8::MAX).saturating_add(spare)
}

fn message(snapshot: Snapshot, nics: &[u32]) -> api::Network {
    let interface = |interface: Interface| {
        let slot = nics.iter().position(|index| *index == interface.index)?;
        Some(api::Interface {
            slot: u32::try_from(slot).ok()?,
            index: interface.index,
            name: interface.name,
            mac: interface.mac.to_vec(),
            mtu: interface.mtu,
            ..Default::default()
        })
    };
    api::Network {
        interfaces: snapshot.interfaces.into_iter().filter_map(interface).collect(),
        addresses: snapshot.addresses,
        routes: snapshot.routes,
        neighbours: snapshot.neighbours,
        rules: snapshot.rules,
        ..Default::default()
    }
}

/// Removes what is left of [`Network::connect`] in a namespace that lives longer than its pod. The VMM is gone, and its
/// taps with it.
///
/// # Errors
/// When something is left. A namespace that is gone has nothing.
pub fn remove(record: &Record) -> Result<()> {
    Namespace::find(record)?.map_or(Ok(()), |namespace| namespace.inside(tap::disconnect_all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn there_is_a_card_for_each_interface_and_for_one_that_may_come() {
        let plain = Spec::default();
        let hook = json!({"hooks": {"createRuntime": [{"path": "/bin/true"}]}});
        let hooked: Spec = serde_json::from_value(hook).unwrap();
        let cases = [(0, &plain, 1), (1, &plain, 1), (3, &plain, 3), (0, &hooked, 1), (2, &hooked, 3)];
        for (present, spec, expected) in cases {
            assert_eq!(slots(present, spec, "default"), expected, "{present}");
        }
        assert_eq!(slots(0, &plain, DOCKER), 4);
    }
}
