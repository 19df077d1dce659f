//! What there is in a network namespace, and what of it the guest gets.

use katana_protocol::netlink::{self, Body, LOOPBACK, Socket, attribute, kind, text_of, u16_at, u32_at};

/// A network namespace at one moment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The interfaces that the guest gets.
    pub interfaces: Vec<Interface>,
    /// Whether a VM is connected to it already.
    pub in_use: bool,
    /// Bodies of RTM_NEWADDR messages.
    pub addresses: Vec<Vec<u8>>,
    /// Bodies of RTM_NEWROUTE messages, those to gateways last.
    pub routes: Vec<Vec<u8>>,
    /// Bodies of RTM_NEWNEIGH messages.
    pub neighbours: Vec<Vec<u8>>,
    /// Bodies of RTM_NEWRULE messages.
    pub rules: Vec<Vec<u8>>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its largest packet in bytes.
    pub mtu: u32,
}

/// Looks at the network namespace that the calling thread is in.
pub fn scan() -> Result<Snapshot, netlink::Error> {
    let socket = Socket::open()?;
    let list = |kind: netlink::Kind| {
        let header = [0; 20];
        socket.list(kind, header.get(..kind.header).unwrap_or_default())
    };
    let links = list(kind::LINK)?;
    let interfaces: Vec<_> = links.iter().filter_map(|link| interface(link)).collect();
    let in_use = links.iter().filter_map(|link| name(link)).any(|name| is_ours(&name));
    let known = |index: u32| index == LOOPBACK || interfaces.iter().any(|known| known.index == index);
    let mut routes: Vec<_> = list(kind::ROUTE)?.iter().filter_map(|body| route(body, &known)).collect();
    routes.sort_by_key(|body| has_gateway(body));
    Ok(Snapshot {
        addresses: list(kind::ADDRESS)?.iter().filter_map(|body| address(body, &known)).collect(),
        neighbours: list(kind::NEIGHBOUR)?.iter().filter_map(|body| neighbour(body, &known)).collect(),
        rules: list(kind::RULE)?.iter().filter_map(|body| rule(body)).collect(),
        routes,
        interfaces,
        in_use,
    })
}

// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
/// if_arp.h
const ARPHRD_ETHER: u16 = 1;

/// The name of a link.
pub fn name(link: &[u8]) -> Option<String> {
    attribute(link, kind::LINK.header, IFLA_IFNAME).map(text_of)
}

/// An interface that carries something: Ethernet, and up. The down ones are those that some modules put into every
/// new namespace.
fn interface(link: &[u8]) -> Option<Interface> {
    const IFF_UP: u32 = libc::IFF_UP as u32;
    let name = name(link)?;
    let (device, index, flags) = (u16_at(link, 2)?, u32_at(link, 4)?, u32_at(link, 8)?);
    if device != ARPHRD_ETHER || flags & IFF_UP == 0 || is_ours(&name) {
        return None;
    }
    let mac = attribute(link, kind::LINK.header, IFLA_ADDRESS)?.try_into().ok()?;
    let mtu = u32_at(attribute(link, kind::LINK.header, IFLA_MTU)?, 0)?;
    Some(Interface { index, name, mac, mtu })
}

/// The same message with some attributes left out.
fn without(body: &[u8], header: usize, dropped: &[u16]) -> Body {
    let mut rest = Body::new(body.get(..header).unwrap_or_default());
    for (kind, at) in netlink::attributes(body, header) {
        if !dropped.contains(&kind) {
            rest.put(kind, body.get(at).unwrap_or_default());
        }
    }
    rest
}

/// An address of an interface that the guest has. `lo` has its usual ones already.
fn address(body: &[u8], known: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    const IFA_CACHEINFO: u16 = 6;
    const IFA_FLAGS: u16 = 8;
    const TEMPORARY: u32 = 0x01;
    const NODAD: u32 = 0x02;
    const HOMEADDRESS: u32 = 0x10;
    const NOPREFIXROUTE: u32 = 0x200;
    const MCAUTOJOIN: u32 = 0x400;
    const SCOPE_HOST: u8 = 254;
    let (family, short_flags, scope) = (*body.first()?, *body.get(2)?, *body.get(3)?);
    let index = u32_at(body, 4)?;
    let flags = attribute(body, kind::ADDRESS.header, IFA_FLAGS).and_then(|flags| u32_at(flags, 0));
    let flags = flags.unwrap_or(short_flags.into());
    let is_v6 = i32::from(family) == libc::AF_INET6;
    // The kernel makes temporary addresses itself.
    if !known(index) || index == LOOPBACK && scope == SCOPE_HOST || is_v6 && flags & TEMPORARY != 0 {
        return None;
    }
    // The host has looked for duplicates; a container must not wait for that to be done again. Lifetimes are left out:
    // who renews the address on the host does not reach the guest.
    let kept = flags & (HOMEADDRESS | NOPREFIXROUTE | MCAUTOJOIN) | if is_v6 { NODAD } else { 0 };
    let mut address = without(body, kind::ADDRESS.header, &[IFA_CACHEINFO, IFA_FLAGS])
        .with(IFA_FLAGS, &kept.to_ne_bytes())
        .into_bytes();
    // The old place of the first eight flags.
    if let Some(short) = address.get_mut(2) {
        *short = kept.to_le_bytes()[0];
    }
    Some(address)
}

const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
/// Of the flags, those that are somebody's wish; the others are the host's state.
const RTNH_F_PERVASIVE: u8 = 2;
const RTNH_F_ONLINK: u8 = 4;

/// A route that somebody has set: not those that the kernel makes for the addresses.
fn route(body: &[u8], known: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    const RTA_CACHEINFO: u16 = 12;
    const RTA_TABLE: u16 = 15;
    const RTA_EXPIRES: u16 = 23;
    const RTA_NH_ID: u16 = 30;
    const TABLE_LOCAL: u32 = 255;
    const RTPROT_KERNEL: u8 = 2;
    const RTM_F_CLONED: u32 = 0x200;
    // Unicast, and the kinds of refusal: blackhole, unreachable, prohibit, throw.
    const KINDS: [u8; 5] = [1, 6, 7, 8, 9];
    let header = kind::ROUTE.header;
    let (table, protocol, route_kind) = (*body.get(4)?, *body.get(5)?, *body.get(7)?);
    let table = attribute(body, header, RTA_TABLE).and_then(|table| u32_at(table, 0)).unwrap_or(table.into());
    let flags = u32_at(body, 8)?;
    let goes_out_at = attribute(body, header, RTA_OIF).and_then(|index| u32_at(index, 0));
    if table == TABLE_LOCAL
        || protocol == RTPROT_KERNEL
        || flags & RTM_F_CLONED != 0
        || !KINDS.contains(&route_kind)
        || !goes_out_at.is_none_or(known)
    {
        return None;
    }
    // A nexthop object (RTA_NH_ID) is listed with what it stands for.
    let mut route = without(body, header, &[RTA_CACHEINFO, RTA_EXPIRES, RTA_NH_ID]).into_bytes();
    let kept = flags & u32::from(RTNH_F_PERVASIVE | RTNH_F_ONLINK);
    route.get_mut(8..12)?.copy_from_slice(&kept.to_ne_bytes());
    let hops = netlink::attributes(&route, header).find(|(kind, _)| *kind == RTA_MULTIPATH);
    if let Some((_, at)) = hops {
        clean_hops(route.get_mut(at)?, known)?;
    }
    Some(route)
}

/// struct rtnexthop: length, flags, weight, interface; attributes follow. Nothing if a hop's interface is not known.
fn clean_hops(mut hops: &mut [u8], known: &impl Fn(u32) -> bool) -> Option<()> {
    while hops.len() >= 8 {
        let length = usize::from(u16_at(hops, 0)?);
        if !known(u32_at(hops, 4)?) || length < 8 {
            return None;
        }
        *hops.get_mut(2)? &= RTNH_F_PERVASIVE | RTNH_F_ONLINK;
        hops = hops.get_mut(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(())
}

fn has_gateway(route: &[u8]) -> bool {
    [RTA_GATEWAY, RTA_VIA, RTA_MULTIPATH]
        .iter()
        .any(|kind| attribute(route, kind::ROUTE.header, *kind).is_some())
}

/// A neighbour that somebody has set: the others are found again.
fn neighbour(body: &[u8], known: &impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    const NDA_CACHEINFO: u16 = 3;
    const NDA_PROBES: u16 = 4;
    const NUD_PERMANENT: u16 = 0x80;
    let (index, state) = (u32_at(body, 4)?, u16_at(body, 8)?);
    let wanted = state & NUD_PERMANENT != 0 && index != LOOPBACK && known(index);
    wanted.then(|| without(body, kind::NEIGHBOUR.header, &[NDA_CACHEINFO, NDA_PROBES]).into_bytes())
}

/// A rule that somebody has set: not the three that every namespace begins with.
fn rule(body: &[u8]) -> Option<Vec<u8>> {
    const FRA_PRIORITY: u16 = 6;
    const FIB_RULE_INVERT: u32 = 2;
    const DEFAULTS: [u32; 3] = [0, 32766, 32767];
    let header = kind::RULE.header;
    let priority =
        attribute(body, header, FRA_PRIORITY).and_then(|priority| u32_at(priority, 0)).unwrap_or(0);
    if DEFAULTS.contains(&priority) {
        return None;
    }
    let mut rule = body.to_vec();
    let kept = u32_at(body, 8)? & FIB_RULE_INVERT;
    rule.get_mut(8..12)?.copy_from_slice(&kept.to_ne_bytes());
    Some(rule)
}

/// Whether this is the name of a tap that a shim made.
fn is_ours(name: &str) -> bool {
    let number = name.strip_prefix("tap").and_then(|rest| rest.strip_suffix("_kata"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
