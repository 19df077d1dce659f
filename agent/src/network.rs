//! The guest's network: made to be what the shim found in the pod's network namespace on the host.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use katana_protocol::agent::{Interface, Network};
use katana_protocol::netlink::{
    self, Body, CREATE, EXCLUSIVE, LOOPBACK, REPLACE, Socket, attribute, kind, u32_at,
};
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::pci::{self, Kind};

/// How long a link may take to come up.
const LINK_LIMIT: Duration = Duration::from_secs(5);

// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;

/// What cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine has no such NIC, or no driver takes it.
    #[error("NIC {0}: {1}")]
    Nic(u32, io::Error),
    /// The kernel refuses.
    #[error("{0}: {1}")]
    Refused(String, netlink::Error),
    /// The shim does not make sense.
    #[error("{0} does not parse, or belongs to an interface that is not there")]
    Message(&'static str),
}

type Result<T> = std::result::Result<T, Error>;

fn refused(what: impl Into<String>) -> impl FnOnce(netlink::Error) -> Error {
    move |error| Error::Refused(what.into(), error)
}

/// Makes the network. What is there already stays.
pub async fn configure(network: &Network) -> Result<()> {
    if *network == Network::default() {
        return Ok(());
    }
    let socket = Socket::open().map_err(refused("network"))?;
    let changes = Socket::of_links().map_err(refused("network"))?;
    let mut indices = HashMap::from([(LOOPBACK, LOOPBACK)]);
    for interface in &network.interfaces {
        indices.insert(interface.index, set_up(&socket, interface)?);
    }
    for interface in &network.interfaces {
        if let Some(index) = indices.get(&interface.index) {
            wait_for_link(&socket, &changes, *index, &interface.name).await?;
        }
    }
    let guest = Indices(indices);
    for body in &network.addresses {
        let address = guest.at(body, ADDRESS_INDEX).ok_or(Error::Message("an address"))?;
        let what = || format!("address {}", value_of(body, kind::ADDRESS, IFA_ADDRESS));
        socket.set(kind::ADDRESS, CREATE | REPLACE, &address).map_err(|e| Error::Refused(what(), e))?;
    }
    for body in &network.routes {
        let route = guest.in_route(body).ok_or(Error::Message("a route"))?;
        let what = || format!("route to {}", value_of(body, kind::ROUTE, RTA_DST));
        socket.set(kind::ROUTE, CREATE | REPLACE, &route).map_err(|e| Error::Refused(what(), e))?;
    }
    for body in &network.neighbours {
        let neighbour = guest.at(body, NEIGHBOUR_INDEX).ok_or(Error::Message("a neighbour"))?;
        let what = || format!("neighbour {}", value_of(body, kind::NEIGHBOUR, NDA_DST));
        socket.set(kind::NEIGHBOUR, CREATE | REPLACE, &neighbour).map_err(|e| Error::Refused(what(), e))?;
    }
    network.rules.iter().try_for_each(|rule| add_rule(&socket, rule))
}

/// Rules cannot be replaced.
fn add_rule(socket: &Socket, rule: &[u8]) -> Result<()> {
    match socket.set(kind::RULE, CREATE | EXCLUSIVE, rule) {
        Err(error) if error.errno() == Some(Errno::EEXIST) => Ok(()),
        outcome => outcome.map_err(refused("routing rule")),
    }
}

/// Gives a NIC its name, address and MTU, and raises it. Answers its index.
fn set_up(socket: &Socket, interface: &Interface) -> Result<u32> {
    let failed = |error| Error::Nic(interface.slot, error);
    let what = || format!("network interface {}", interface.name);
    let index = nic(interface.slot).and_then(|name| index_of(&name)).map_err(failed)?;
    let link = Body::link(index, 0, 0)
        .with_text(IFLA_IFNAME, &interface.name)
        .with(IFLA_MTU, &interface.mtu.to_ne_bytes())
        .with(IFLA_ADDRESS, &interface.mac);
    let set = || socket.set(kind::LINK, 0, link.bytes());
    let mut outcome = set();
    if matches!(&outcome, Err(error) if error.errno() == Some(Errno::EEXIST)) {
        make_way(socket, &interface.name).map_err(refused(what()))?;
        outcome = set();
    }
    outcome.map_err(refused(what()))?;
    // Its IPv6 addresses are those of the host, and no others: IN6_ADDR_GEN_MODE_NONE.
    let setting = format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", interface.name);
    if let Err(error) = fs::write(&setting, "1")
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{setting}: {error}");
    }
    let up = libc::IFF_UP as u32;
    socket.set(kind::LINK, 0, Body::link(index, up, up).bytes()).map_err(refused(what()))?;
    Ok(index)
}

/// NICs get names from the kernel in the order in which they are found; one of them may have another one's.
fn make_way(socket: &Socket, name: &str) -> std::result::Result<(), netlink::Error> {
    let index = index_of(name)?;
    socket.set(kind::LINK, 0, Body::link(index, 0, 0).with_text(IFLA_IFNAME, &format!("nic{index}")).bytes())
}

/// The present name of the NIC in a slot of the VMM.
fn nic(slot: u32) -> io::Result<String> {
    let function = pci::function(Kind::Nic, slot)?;
    if let Some(name) = interface_of(&function) {
        return Ok(name);
    }
    pci::probe(&function)?;
    interface_of(&function).ok_or_else(|| io::Error::other("no driver takes it"))
}

fn interface_of(function: &Path) -> Option<String> {
    pci::made_of(function, "net")?.file_name()?.to_str().map(str::to_owned)
}

fn index_of(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(Path::new("/sys/class/net").join(name).join("ifindex"))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Waits until packets pass: a driver's first look at its NIC's link comes after the interface was raised. A link that
/// stays down is no reason not to start.
async fn wait_for_link(socket: &Socket, changes: &Socket, index: u32, name: &str) -> Result<()> {
    let failed = |error: io::Error| Error::Refused(format!("network interface {name}"), error.into());
    // SAFETY: the borrowed descriptor stays open and the same for as long as this function borrows it.
    let events = unsafe { AsyncFd::register_with_interest(changes.as_fd(), Interest::READABLE) };
    let events = events.map_err(|error| failed(error.into()))?;
    let wait = async {
        while !is_running(socket, index).map_err(refused(format!("network interface {name}")))? {
            let mut ready = events.readable().await.map_err(failed)?;
            changes.drain();
            ready.clear_ready();
        }
        Ok(())
    };
    tokio::time::timeout(LINK_LIMIT, wait).await.unwrap_or_else(|_| {
        log::warn!("network interface {name} has no link");
        Ok(())
    })
}

fn is_running(socket: &Socket, index: u32) -> std::result::Result<bool, netlink::Error> {
    let links = socket.list(kind::LINK, &[0; 16])?;
    let link = links.iter().find(|link| u32_at(link, 4) == Some(index));
    let flags = link.and_then(|link| u32_at(link, 8)).ok_or(Errno::ENODEV)?;
    Ok(flags & libc::IFF_RUNNING as u32 != 0)
}

// linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h
const IFA_ADDRESS: u16 = 1;
const RTA_DST: u16 = 1;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const NDA_DST: u16 = 1;
/// ifaddrmsg.ifa_index
const ADDRESS_INDEX: usize = 4;
/// ndmsg.ndm_ifindex
const NEIGHBOUR_INDEX: usize = 4;
/// rtnexthop.rtnh_ifindex
const HOP_INDEX: usize = 4;

/// The guest's index of an interface, by the host's.
struct Indices(HashMap<u32, u32>);

impl Indices {
    /// The message with the index that stands at this place replaced.
    fn at(&self, body: &[u8], place: usize) -> Option<Vec<u8>> {
        let mut body = body.to_vec();
        self.replace(&mut body, place)?;
        Some(body)
    }

    fn in_route(&self, body: &[u8]) -> Option<Vec<u8>> {
        let mut route = body.to_vec();
        for (kind, at) in netlink::attributes(body, kind::ROUTE.header) {
            match kind {
                RTA_OIF | RTA_IIF => self.replace(&mut route, at.start)?,
                RTA_MULTIPATH => self.in_hops(route.get_mut(at)?)?,
                _ => {}
            }
        }
        Some(route)
    }

    fn in_hops(&self, mut hops: &mut [u8]) -> Option<()> {
        while !hops.is_empty() {
            let length = usize::from(netlink::u16_at(hops, 0)?);
            self.replace(hops, HOP_INDEX)?;
            if length < 8 {
                return None;
            }
            hops = hops.get_mut(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(())
    }

    fn replace(&self, bytes: &mut [u8], place: usize) -> Option<()> {
        let index = self.0.get(&u32_at(bytes, place)?)?;
        bytes.get_mut(place..place + 4)?.copy_from_slice(&index.to_ne_bytes());
        Some(())
    }
}

/// An IP address in a message, for an error's text. In the three kinds of messages that have one, the length of a
/// prefix is the second byte, and counts but for neighbours.
fn value_of(body: &[u8], kind: netlink::Kind, which: u16) -> String {
    let Some(value) = attribute(body, kind.header, which) else { return "default".to_owned() };
    let address = if let Ok(v4) = <[u8; 4]>::try_from(value) {
        std::net::IpAddr::from(v4).to_string()
    } else if let Ok(v6) = <[u8; 16]>::try_from(value) {
        std::net::IpAddr::from(v6).to_string()
    } else {
        return format!("{value:x?}");
    };
    match body.get(1) {
        Some(length) if which != NDA_DST || kind.header != kind::NEIGHBOUR.header => {
            format!("{address}/{length}")
        }
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indices() -> Indices {
        Indices(HashMap::from([(LOOPBACK, LOOPBACK), (70, 3)]))
    }

    #[test]
    fn indices_of_the_host_become_those_of_the_guest() {
        let host = 70_u32.to_ne_bytes();
        let address = Body::new(&[&[2, 24, 0, 0][..], &host].concat()).with(IFA_ADDRESS, &[10, 0, 0, 1]);
        let translated = indices().at(address.bytes(), ADDRESS_INDEX).unwrap();
        assert_eq!((u32_at(&translated, 4), translated.len()), (Some(3), address.bytes().len()));
        assert_eq!(value_of(address.bytes(), kind::ADDRESS, IFA_ADDRESS), "10.0.0.1/24");

        let route = Body::new(&[0; 12]).with(RTA_OIF, &host).into_bytes();
        let translated = indices().in_route(&route).unwrap();
        assert_eq!(attribute(&translated, 12, RTA_OIF), Some(&3_u32.to_ne_bytes()[..]));
        assert_eq!(value_of(&route, kind::ROUTE, RTA_DST), "default");

        let hop = [&[8, 0, 0, 0][..], &host].concat();
        let route = Body::new(&[0; 12]).with(RTA_MULTIPATH, &[hop.clone(), hop].concat()).into_bytes();
        let translated = indices().in_route(&route).unwrap();
        let hops = attribute(&translated, 12, RTA_MULTIPATH).unwrap();
        assert_eq!((u32_at(hops, 4), u32_at(hops, 12)), (Some(3), Some(3)));
    }

    #[test]
    fn unknown_interfaces_and_broken_messages_are_refused() {
        let other = Body::new(&[0; 12]).with(RTA_OIF, &[9, 0, 0, 0]).into_bytes();
        assert_eq!(indices().in_route(&other), None);
        assert_eq!(indices().at(&[0; 8], ADDRESS_INDEX), None);
        assert_eq!(indices().at(&[0; 6], ADDRESS_INDEX), None);
        for hops in [&[0; 8][..], &[8, 0, 0], &[4, 0, 0, 0, 70, 0, 0, 0]] {
            let route = Body::new(&[0; 12]).with(RTA_MULTIPATH, hops).into_bytes();
            assert_eq!(indices().in_route(&route), None, "{hops:?}");
        }
    }

    #[test]
    fn fuzz_guest_network() {
        let guest = indices();
        katana_fuzz::fuzz("guest-network", |input| {
            let at = input.below(64);
            let body = input.rest();
            for kept in [guest.at(body, at), guest.in_route(body)] {
                assert!(kept.is_none_or(|kept| kept.len() == body.len()));
            }
            let _ = (value_of(body, kind::ADDRESS, IFA_ADDRESS), value_of(body, kind::NEIGHBOUR, NDA_DST));
        });
    }
}
