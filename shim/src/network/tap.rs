//! Taps, and what connects them to the pod's interfaces: every packet that arrives at one leaves by the other.
//!
//! The interface keeps its place, name and addresses on the host, so that whoever made it finds it again; the host's
//! kernel just does not see its packets any more. A tap lives as long as the VMM holds its descriptor.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use katana_protocol::netlink::{self, Body, CREATE, EXCLUSIVE, Socket, kind, u32_at};
use katana_protocol::vmm::MOST_NET_PAIRS;
use nix::errno::Errno;

use super::scan::Interface;
use crate::error::{Error, Result};
use crate::storage::vmm_files;

const IFLA_MTU: u16 = 4;
// linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TC_INGRESS: u32 = 0xffff_fff1;
const TC_INGRESS_HANDLE: u32 = 0xffff_0000;
/// Where incoming packets are classified; it means the same below `ingress` and `clsact`.
const TC_INGRESS_FILTERS: u32 = 0xffff_fff2;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
const ETH_P_ALL: u16 = 3;
const TC_ACT_OK: u32 = 0;
const TCA_EGRESS_MIRROR: u32 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
/// The priorities of the filters that are made here, which is also how they are known again: what a name server on the
/// host needs, by protocol, and after that everything.
const PRIORITY_ARP: u16 = 0x6b5f;
const PRIORITY_IP: u16 = 0x6b60;
const PRIORITY_ALL: u16 = 0x6b61;
const PRIORITIES: [u16; 3] = [PRIORITY_ARP, PRIORITY_IP, PRIORITY_ALL];
const DNS_PORT: u16 = 53;
/// The lowest of the ports whose four highest bits are set.
const NAME_SERVER_PORTS: u16 = 0xf000;

/// Makes the tap for a slot and connects it to an interface, in the network namespace of the calling thread. The answer
/// is its queues, one for each pair of the NIC's. With a name server in that namespace, the answers that the server
/// waits for do not go to the guest.
pub fn connect(interface: &Interface, slot: u8, pairs: u8, name_server: bool) -> Result<Vec<OwnedFd>> {
    let name = format!("tap{slot}_kata");
    let refused = |what: &str, e: &netlink::Error| Error::Host(format!("{what}: {e}"));
    let taps = create(&name, pairs).map_err(|e| Error::io(format_args!("create {name}"), &e))?;
    let index = nix::net::if_::if_nametoindex(name.as_str()).map_err(|e| Error::os(&name, e))?;
    // Its other end is in the guest: the host's own IPv6 has nothing to announce there.
    let setting = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(e) = fs::write(&setting, "1")
        && e.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{setting}: {e}");
    }
    let socket = Socket::open().map_err(|e| refused("network", &e))?;
    let up = libc::IFF_UP as u32;
    let link = Body::link(index, up, up).with(IFLA_MTU, &interface.mtu.to_ne_bytes());
    socket.set(kind::LINK, 0, link.bytes()).map_err(|e| refused(&format!("set up {name}"), &e))?;
    let failed = |e: netlink::Error| refused(&format!("connect {} and {name}", interface.name), &e);
    for (from, to) in [(interface.index, index), (index, interface.index)] {
        redirect(&socket, from, to).map_err(failed)?;
    }
    if name_server {
        keep_answers(&socket, interface.index, index).map_err(failed)?;
    }
    Ok(taps)
}

/// What serves a tap's queues in the host's kernel, if there is such a thing.
pub fn vhosts(queues: usize) -> Vec<OwnedFd> {
    (0..queues).map_while(|_| vhost()).collect()
}

fn vhost() -> Option<OwnedFd> {
    const PATH: &str = "/dev/vhost-net";
    match vmm_files::open(Path::new(PATH), File::options().read(true).write(true)) {
        Ok(file) => Some(file.into()),
        Err(e) => {
            // Without the module there is no such file, or no device behind it.
            if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) {
                log::warn!("{PATH}: {e}");
            }
            None
        }
    }
}

fn create(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut taps = vec![open(name, libc::IFF_TUN_EXCL | many)?];
    for _ in 1..usize::from(queues).min(MOST_NET_PAIRS) {
        taps.push(open(name, many)?);
    }
    Ok(taps)
}

/// A queue of a tap; its first one makes it.
fn open(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = vmm_files::open(Path::new("/dev/net/tun"), File::options().read(true).write(true))?;
    // SAFETY: struct ifreq holds plain integers and pointers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    // IFF_TUN_EXCL is the sign bit.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the call reads and writes a struct ifreq that outlives it.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(file.into())
}

/// tc qdisc add dev FROM ingress; tc filter add dev FROM ingress matchall action mirred egress redirect dev TO
fn redirect(socket: &Socket, from: u32, to: u32) -> std::result::Result<(), netlink::Error> {
    let ingress = Body::traffic(from, TC_INGRESS_HANDLE, TC_INGRESS, 0).with_text(TCA_KIND, "ingress");
    match socket.set(kind::QDISC, CREATE | EXCLUSIVE, ingress.bytes()) {
        // Somebody else's, or that of a VM which is gone. Its own filters, if any, come first.
        Err(e) if e.errno() == Some(Errno::EEXIST) => remove_filters(socket, from),
        outcome => outcome?,
    }
    let actions = mirred(TCA_EGRESS_REDIR, TC_ACT_STOLEN, to);
    let options = Body::default().with_nested(TCA_MATCHALL_ACT, &actions);
    let all = filter(from, PRIORITY_ALL, ETH_P_ALL).with_text(TCA_KIND, "matchall");
    socket.set(kind::FILTER, CREATE | EXCLUSIVE, all.with_nested(TCA_OPTIONS, &options).bytes())
}

/// action mirred egress ..., as the only one of a filter.
fn mirred(what: u32, then: u32, to: u32) -> Body {
    // struct tc_mirred: index, capab, action, refcnt, bindcnt; what to do; the interface.
    let words = [0, 0, then, 0, 0, what, to];
    let parameters: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mirred = Body::default().with(TCA_MIRRED_PARMS, &parameters);
    let action = Body::default().with_text(TCA_ACT_KIND, "mirred").with_nested(TCA_ACT_OPTIONS, &mirred);
    Body::default().with_nested(1, &action)
}

/// Docker's name server asks others from the container's own namespace and with the container's address: their answers
/// must stay on the host. They are distinguished from those to the guest by the port: the namespace's sockets get ports
/// from [`NAME_SERVER_PORTS`] on, the guest's Linux gives smaller ones by default. Answers of ARP are for both.
fn keep_answers(socket: &Socket, interface: u32, tap: u32) -> std::result::Result<(), netlink::Error> {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{NAME_SERVER_PORTS} 65535"))?;
    let set = |priority, protocol, options: Body| {
        let filter = filter(interface, priority, protocol).with_text(TCA_KIND, "u32");
        socket.set(kind::FILTER, CREATE | EXCLUSIVE, filter.with_nested(TCA_OPTIONS, &options).bytes())
    };
    // RFC 826: the operation is at 6, and 2 is an answer.
    let answer = selector(&[(6, 2, 0xffff)]);
    let copy = mirred(TCA_EGRESS_MIRROR, TC_ACT_OK, tap);
    set(PRIORITY_ARP, ETH_P_ARP, answer.with_nested(TCA_U32_ACT, &copy))?;
    // RFC 791: version and length of the header, here one without options, are at 0, the protocol is at 9. The ports of
    // sender and receiver follow the header.
    const UDP: u16 = 17;
    const TCP: u16 = 6;
    let from_server =
        [(0, 0x4500, 0xff00), (20, DNS_PORT, 0xffff), (22, NAME_SERVER_PORTS, NAME_SERVER_PORTS)];
    [UDP, TCP].iter().try_for_each(|protocol| {
        let keys = [&from_server[..], &[(8, *protocol, 0x00ff)]].concat();
        set(PRIORITY_IP, ETH_P_IP, selector(&keys))
    })
}

/// What a u32 filter selects, which then goes on as if there were no filters: packets that have all these values. Each
/// is an even offset, a value, and which bits of it count.
fn selector(values: &[(u32, u16, u16)]) -> Body {
    const TC_U32_TERMINAL: u8 = 1;
    let count = u8::try_from(values.len()).unwrap_or(u8::MAX);
    // struct tc_u32_sel: flags, a shift, the number of keys; offsets to further headers and a hash mask, unused.
    let mut selector = [TC_U32_TERMINAL, 0, count].to_vec();
    selector.resize(16, 0);
    for (at, value, mask) in values {
        // struct tc_u32_key: mask and value as they are in four bytes of the packet, and where these are.
        let in_word = |half: &u16| if at % 4 == 0 { u32::from(*half) << 16 } else { (*half).into() };
        selector.extend(in_word(mask).to_be_bytes());
        selector.extend(in_word(value).to_be_bytes());
        selector.extend((at & !3).to_ne_bytes());
        selector.extend([0; 4]);
    }
    Body::default().with(TCA_U32_SEL, &selector)
}

/// Filters of a priority and a protocol.
fn filter(index: u32, priority: u16, protocol: u16) -> Body {
    let information = u32::from(priority) << 16 | u32::from(protocol.to_be());
    Body::traffic(index, 0, TC_INGRESS_FILTERS, information)
}

/// Removes the filters that were made here.
fn remove_filters(socket: &Socket, index: u32) {
    for priority in PRIORITIES {
        if let Err(e) = socket.delete(kind::FILTER, filter(index, priority, 0).bytes()) {
            log::debug!("filter of interface {index}: {e}");
        }
    }
}

/// Disconnects the interfaces in the network namespace of the calling thread, whose taps are gone with their VMM.
pub fn disconnect_all() -> Result<()> {
    let failed = |e: netlink::Error| Error::Host(format!("disconnect the network: {e}"));
    let socket = Socket::open().map_err(failed)?;
    let links = socket.list(kind::LINK, &[0; 16]).map_err(failed)?;
    for index in links.iter().filter_map(|link| u32_at(link, 4)) {
        let filters = || socket.list(kind::FILTER, Body::traffic(index, 0, TC_INGRESS_FILTERS, 0).bytes());
        let is_ours =
            |filter: &Vec<u8>| u32_at(filter, 16).is_some_and(|info| info >> 16 == u32::from(PRIORITY_ALL));
        // An interface without the qdisc has no filters, which the kernel says in more than one way.
        if !filters().unwrap_or_default().iter().any(is_ours) {
            continue;
        }
        remove_filters(&socket, index);
        if filters().is_ok_and(|rest| rest.is_empty()) {
            let ingress = Body::traffic(index, TC_INGRESS_HANDLE, TC_INGRESS, 0);
            socket.delete(kind::QDISC, ingress.bytes()).map_err(failed)?;
        }
    }
    Ok(())
}
