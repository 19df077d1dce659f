//! Taps, and what connects them to the pod's interfaces: every packet that arrives at one leaves by the other.
//!
//! The interface keeps its place, name and addresses on the host, so that whoever made it finds it again; the host's
//! kernel just does not see its packets any more. A tap lives as long as the VMM holds its descriptor.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use katana_protocol::netlink::{self, Body, CREATE, EXCLUSIVE, Socket, kind, u32_at};
use nix::errno::Errno;

use super::scan::Interface;
use crate::error::{Error, Result};

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
/// The priority of the filters that are made here. It is also how they are known again.
const PRIORITY: u16 = 0x6b61;

/// Whether this is the name of a tap that a shim made.
pub fn is_ours(name: &str) -> bool {
    let number = name.strip_prefix("tap").and_then(|rest| rest.strip_suffix("_kata"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Makes the tap for a slot and connects it to an interface, in the network namespace of the calling thread.
pub fn connect(interface: &Interface, slot: u8) -> Result<OwnedFd> {
    let name = format!("tap{slot}_kata");
    let refused = |what: &str, e: &netlink::Error| Error::Host(format!("{what}: {e}"));
    let tap = create(&name).map_err(|e| Error::io(format_args!("create {name}"), &e))?;
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
    for (from, to) in [(interface.index, index), (index, interface.index)] {
        redirect(&socket, from, to)
            .map_err(|e| refused(&format!("connect {} and {name}", interface.name), &e))?;
    }
    Ok(tap)
}

fn create(name: &str) -> io::Result<OwnedFd> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: struct ifreq holds plain integers and pointers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
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
        Err(e) if e.errno() == Some(Errno::EEXIST) => remove_filter(socket, from),
        outcome => outcome?,
    }
    // struct tc_mirred: index, capab, action, refcnt, bindcnt; what to do; the interface.
    let words = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    let parameters: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mirred = Body::default().with(TCA_MIRRED_PARMS, &parameters);
    let action = Body::default().with_text(TCA_ACT_KIND, "mirred").with_nested(TCA_ACT_OPTIONS, &mirred);
    let actions = Body::default().with_nested(1, &action);
    let options = Body::default().with_nested(TCA_MATCHALL_ACT, &actions);
    let filter = filter(from).with_text(TCA_KIND, "matchall").with_nested(TCA_OPTIONS, &options);
    socket.set(kind::FILTER, CREATE | EXCLUSIVE, filter.bytes())
}

/// All filters of [`PRIORITY`] of an interface.
fn filter(index: u32) -> Body {
    let information = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
    Body::traffic(index, 0, TC_INGRESS_FILTERS, information)
}

fn remove_filter(socket: &Socket, index: u32) {
    if let Err(e) = socket.delete(kind::FILTER, filter(index).bytes()) {
        log::debug!("filter of interface {index}: {e}");
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
            |filter: &Vec<u8>| u32_at(filter, 16).is_some_and(|info| info >> 16 == u32::from(PRIORITY));
        // An interface without the qdisc has no filters, which the kernel says in more than one way.
        if !filters().unwrap_or_default().iter().any(is_ours) {
            continue;
        }
        remove_filter(&socket, index);
        if filters().is_ok_and(|rest| rest.is_empty()) {
            let ingress = Body::traffic(index, TC_INGRESS_HANDLE, TC_INGRESS, 0);
            socket.delete(kind::QDISC, ingress.bytes()).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_known_by_their_names() {
        assert!(is_ours("tap0_kata") && is_ours("tap12_kata"));
        for other in ["tap0", "tap_kata", "tapx_kata", "eth0", ""] {
            assert!(!is_ours(other), "{other}");
        }
    }
}
