use super::*;

const V4: u8 = libc::AF_INET as u8;
const V6: u8 = libc::AF_INET6 as u8;
const ETH0: u32 = 7;

fn known(index: u32) -> bool {
    index == LOOPBACK || index == ETH0
}

fn link(index: u32, name: &str, device: u16, flags: u32) -> Vec<u8> {
    let mut link = Body::link(index, flags, 0)
        .with_text(IFLA_IFNAME, name)
        .with(IFLA_MTU, &1400_u32.to_ne_bytes())
        .with(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9])
        .into_bytes();
    link[2..4].copy_from_slice(&device.to_ne_bytes());
    link
}

#[test]
fn interfaces_that_are_up_are_passed_on() {
    let up = libc::IFF_UP as u32;
    let expected = Interface { index: ETH0, name: "eth0".into(), mac: [2, 0, 0, 0, 0, 9], mtu: 1400 };
    assert_eq!(interface(&link(ETH0, "eth0", ARPHRD_ETHER, up)), Some(expected));
    // Tunnels and fallback devices of modules, lo, and what a shim made.
    assert_eq!(interface(&link(2, "gretap0", ARPHRD_ETHER, 0)), None);
    assert_eq!(interface(&link(1, "lo", 772, up)), None);
    assert_eq!(interface(&link(9, "tap0_kata", ARPHRD_ETHER, up)), None);
    for length in 0..40 {
        let _ = interface(&link(ETH0, "eth0", ARPHRD_ETHER, up)[..length]);
    }
}

fn address_of(family: u8, index: u32, scope: u8, flags: u32) -> Option<Vec<u8>> {
    let [first, ..] = flags.to_le_bytes();
    let mut body = Body::new(&[family, 24, first, scope]);
    body = Body::new(&[body.into_bytes(), index.to_ne_bytes().to_vec()].concat());
    let body = body.with(2, &[10, 0, 0, 1]).with(6, &[0; 16]).with(8, &flags.to_ne_bytes());
    address(body.bytes(), &known)
}

fn address_flags(body: &[u8]) -> (u8, u32) {
    (body[2], u32_at(attribute(body, 8, 8).unwrap(), 0).unwrap())
}

#[test]
fn addresses_come_without_lifetimes_and_without_another_search_for_duplicates() {
    let v4 = address_of(V4, ETH0, 0, 0x280).unwrap();
    assert_eq!((address_flags(&v4), attribute(&v4, 8, 6)), ((0, 0x200), None));
    assert_eq!(attribute(&v4, 8, 2), Some(&[10, 0, 0, 1][..]));
    // Tentative, with a management of temporary addresses.
    let v6 = address_of(V6, ETH0, 0, 0x140).unwrap();
    assert_eq!(address_flags(&v6), (2, 2));
    assert_eq!(address_of(V6, ETH0, 0, 1), None, "temporary");
    assert_eq!(address_of(V4, 99, 0, 0), None, "an interface that the guest does not have");
    assert_eq!(address_of(V4, LOOPBACK, 254, 0), None, "127.0.0.1");
    assert!(address_of(V4, LOOPBACK, 0, 0).is_some(), "a further address of lo");
}

struct Route {
    table: u8,
    protocol: u8,
    kind: u8,
    flags: u32,
}

const ROUTE: Route = Route { table: 254, protocol: 3, kind: 1, flags: 0 };

impl Route {
    fn with(&self, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let header = [&[V4, 0, 0, 0, self.table, self.protocol, 0, self.kind][..], &self.flags.to_ne_bytes()];
        let body = Body::new(&header.concat());
        attributes.iter().fold(body, |body, (kind, value)| body.with(*kind, value)).into_bytes()
    }
}

#[test]
fn routes_keep_what_was_set_and_lose_what_was_observed() {
    let out = ETH0.to_ne_bytes();
    let body = Route { flags: 0x14, ..ROUTE }.with(&[
        (RTA_OIF, &out),
        (RTA_GATEWAY, &[10, 0, 0, 1]),
        (6, &100_u32.to_ne_bytes()),
        (12, &[0; 32]),
        (30, &[1, 0, 0, 0]),
    ]);
    let kept = route(&body, &known).unwrap();
    let kinds: Vec<_> = netlink::attributes(&kept, 12).map(|(kind, _)| kind).collect();
    assert_eq!((kinds, u32_at(&kept, 8)), (vec![RTA_OIF, RTA_GATEWAY, 6], Some(4)));
    assert!(has_gateway(&kept) && !has_gateway(&ROUTE.with(&[(RTA_OIF, &out)])));

    assert_eq!(route(&Route { protocol: 2, ..ROUTE }.with(&[(RTA_OIF, &out)]), &known), None, "the kernel's");
    assert_eq!(route(&Route { table: 255, ..ROUTE }.with(&[]), &known), None, "local");
    assert_eq!(route(&Route { table: 0, ..ROUTE }.with(&[(15, &255_u32.to_ne_bytes())]), &known), None);
    assert_eq!(route(&Route { kind: 3, ..ROUTE }.with(&[]), &known), None, "broadcast");
    assert_eq!(route(&Route { flags: 0x200, ..ROUTE }.with(&[]), &known), None, "cache");
    assert_eq!(route(&ROUTE.with(&[(RTA_OIF, &99_u32.to_ne_bytes())]), &known), None);
    assert!(route(&Route { kind: 6, ..ROUTE }.with(&[]), &known).is_some(), "blackhole");
    for length in 0..body.len() {
        let _ = route(&body[..length], &known);
    }
}

#[test]
fn all_hops_of_a_route_must_be_known() {
    let hop = |index: u32| [&[16, 0, 0x14, 0][..], &index.to_ne_bytes(), &[8, 0, 5, 0, 10, 0, 0, 1]].concat();
    let both = |second| ROUTE.with(&[(RTA_MULTIPATH, &[hop(ETH0), hop(second)].concat())]);
    let kept = route(&both(ETH0), &known).unwrap();
    let hops = attribute(&kept, 12, RTA_MULTIPATH).unwrap();
    assert_eq!((hops[2], hops[18]), (4, 4));
    assert_eq!(route(&both(99), &known), None);
    for hostile in [&[0; 16][..], &[7, 0, 0, 0, 7, 0, 0, 0], &[255, 255, 0, 0, 7, 0, 0, 0]] {
        let _ = route(&ROUTE.with(&[(RTA_MULTIPATH, hostile)]), &known);
    }
}

#[test]
fn only_what_somebody_has_set_is_passed_on() {
    let neighbour_of = |index: u32, state: u16| {
        let header = [&[V4, 0, 0, 0][..], &index.to_ne_bytes(), &state.to_ne_bytes(), &[0, 1]].concat();
        neighbour(Body::new(&header).with(1, &[10, 0, 0, 9]).with(3, &[0; 16]).bytes(), &known)
    };
    let kept = neighbour_of(ETH0, 0x80).unwrap();
    assert_eq!((attribute(&kept, 12, 1), attribute(&kept, 12, 3)), (Some(&[10, 0, 0, 9][..]), None));
    assert_eq!((neighbour_of(ETH0, 2), neighbour_of(99, 0x80), neighbour_of(1, 0x80)), (None, None, None));

    let rule_of = |priority: u32| {
        let body = Body::new(&[V4, 0, 0, 0, 254, 0, 0, 1, 1, 0, 0, 0]);
        rule(body.with(6, &priority.to_ne_bytes()).bytes())
    };
    assert_eq!((rule_of(0), rule_of(32766), rule_of(32767)), (None, None, None));
    assert_eq!(u32_at(&rule_of(100).unwrap(), 8), Some(0), "the mark of a permanent rule");
}

#[test]
fn the_machines_own_network_can_be_read() {
    scan().unwrap();
}

/// Whatever the kernel lists.
#[test]
fn fuzz_scan() {
    katana_fuzz::fuzz("scan", |input| {
        let body = input.rest();
        let _ = (name(body), interface(body), has_gateway(body));
        for kept in [address(body, &known), route(body, &known), neighbour(body, &known), rule(body)] {
            // What is kept is looked at again by the agent.
            assert!(kept.is_none_or(|kept| kept.len() <= body.len() + 16));
        }
    });
}

#[test]
fn taps_are_known_by_their_names() {
    assert!(is_ours("tap0_kata") && is_ours("tap12_kata"));
    for other in ["tap0", "tap_kata", "tapx_kata", "eth0", ""] {
        assert!(!is_ours(other), "{other}");
    }
}
