//! Containers on networks of the host: what CNI plugins, hooks and container engines prepare reaches the inside.

mod names;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use katana_tests::container::new_id;
use katana_tests::host::{Host, eventually};
use katana_tests::network::{Bridge, Namespace};
use katana_tests::process::Process;
use katana_tests::scratch::noise;
use katana_tests::turn::{alone, shared};
use katana_tests::{
    BUSYBOX, Bundle, Configuration, Container, DEBIAN, NGINX, Run, Running, Scratch, environment,
};

const PORT: u16 = 7000;
const LENGTH: usize = 1 << 20;

/// What answers in a container, and what asks in one: TCP and UDP, IPv4 and IPv6, all that comes goes back.
const PEER: &str = r"
import hashlib, os, socket, sys, threading
PORT, LENGTH, HANG = 7000, 1 << 20, int(os.environ['HANG'])

def echo(connection):
    while block := connection.recv(1 << 16):
        connection.sendall(block)
    connection.close()

def serve():
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(('::', PORT))
    def answer():
        while True:
            packet, sender = udp.recvfrom(65536)
            udp.sendto(packet, sender)
    threading.Thread(target=answer).start()
    tcp = socket.create_server(('::', PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    print('ready', flush=True)
    while True:
        threading.Thread(target=echo, args=tcp.accept()[:1]).start()

def ask(host, mtu):
    data = os.urandom(LENGTH)
    connection = socket.create_connection((host, PORT), HANG)
    threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR))).start()
    digest = hashlib.sha256()
    while block := connection.recv(1 << 16):
        digest.update(block)
    assert digest.digest() == hashlib.sha256(data).digest(), f'TCP with {host}'
    family, headers = (socket.AF_INET6, 48) if ':' in host else (socket.AF_INET, 28)
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.settimeout(HANG)
    # Not to be fragmented: IP_MTU_DISCOVER and IPV6_MTU_DISCOVER are IP_PMTUDISC_DO.
    udp.setsockopt(socket.IPPROTO_IPV6 if headers == 48 else socket.IPPROTO_IP, 23 if headers == 48 else 10, 2)
    for number in range(20):
        packet = bytes([number]) * (mtu - headers)
        udp.sendto(packet, (host, PORT))
        assert udp.recvfrom(65536)[0] == packet, f'UDP with {host}'
    try:
        udp.sendto(bytes(mtu - headers + 1), (host, PORT))
        raise SystemExit('a packet longer than the MTU was sent')
    except OSError:
        pass

if sys.argv[1] == 'serve':
    serve()
for host in sys.argv[3:]:
    ask(host, int(sys.argv[2]))
print('all is well')
";

/// A container on a network, that answers.
struct Peer {
    container: Container,
    _output: Running,
}

impl Peer {
    /// With `vhost`, the host's kernel moves the packets if it can, as it does by default.
    fn start(namespace: &Namespace, vhost: bool, cpus: usize) -> Self {
        let (id, scratch) = (new_id(), Scratch::new());
        let options = format!("{} --cpus {cpus}", namespace.option());
        let mut run = Run::new(DEBIAN).id(&id).options(&options);
        if !vhost && environment::is_vm() {
            let text = Configuration::installed().set("hypervisor.katana.disable_vhost_net", true).to_toml();
            run = run.configuration(&scratch.file("configuration.toml", text));
        }
        let hang = format!("HANG={}", environment::hang_limit().as_secs());
        run = run.env(&hang).command(&["python3", "-c", PEER, "serve"]);
        let output = run.spawn();
        output.wait_for("ready");
        if environment::is_vm() && Path::new("/dev/vhost-net").exists() {
            let vmm = Process::vmm_of(&id);
            assert_eq!(vmm.has_vhost_worker(), vhost, "{:?}", vmm.threads());
        }
        Self { container: Container::adopt(&id), _output: output }
    }

    #[track_caller]
    fn ask(&self, mtu: u32, hosts: &[String]) {
        let mtu = mtu.to_string();
        let mut words = vec!["python3", "-c", PEER, "ask", &mtu];
        words.extend(hosts.iter().map(String::as_str));
        self.container.exec_command(&[], &words).patiently().output().ok().expect_text("all is well");
    }
}

/// Answers on the host, for as long as the tests run.
fn serve_on_host(address: &str) {
    let address = SocketAddr::new(address.parse::<IpAddr>().expect("an address"), PORT);
    let tcp = TcpListener::bind(address).expect("bind");
    std::thread::spawn(move || {
        for mut connection in tcp.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = connection.try_clone().expect("a descriptor");
                std::io::copy(&mut reader, &mut connection)
            });
        }
    });
    let udp = UdpSocket::bind(address).expect("bind");
    std::thread::spawn(move || {
        let mut packet = vec![0; 65536];
        while let Ok((length, sender)) = udp.recv_from(&mut packet) {
            let _ = udp.send_to(&packet[..length], sender);
        }
    });
}

/// The host asks a container.
fn ask_from_host(address: &str) {
    let data = Arc::new(noise(LENGTH, 7));
    let address = SocketAddr::new(address.parse::<IpAddr>().expect("an address"), PORT);
    let mut connection = TcpStream::connect_timeout(&address, environment::hang_limit()).expect("connect");
    let (mut writer, sent) = (connection.try_clone().expect("a descriptor"), Arc::clone(&data));
    let sender = std::thread::spawn(move || {
        writer.write_all(&sent).expect("send");
        writer.shutdown(Shutdown::Write).expect("shut down");
    });
    let mut received = Vec::new();
    connection.read_to_end(&mut received).expect("receive");
    sender.join().expect("the sender");
    assert!(received == *data, "what came back from {address} is not what was sent");
    let udp = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("bind");
    udp.set_read_timeout(Some(environment::hang_limit())).expect("a timeout");
    // Longer than any MTU here: in fragments.
    for length in [1, 1000, 20_000] {
        udp.send_to(&data[..length], address).expect("send");
        let mut packet = vec![0; 65536];
        let (count, _) = udp.recv_from(&mut packet).expect("an answer by UDP");
        assert!(packet[..count] == data[..length]);
    }
}

fn containers_reach_each_other_and_the_host(mtu: u32, vhost: bool) {
    let _turn = shared();
    let bridge = Bridge::new(mtu);
    let [one, other] = [Namespace::new(), Namespace::new()];
    bridge.connect(one.name(), "eth0", 2);
    bridge.connect(other.name(), "eth0", 3);
    let hosts = bridge.addresses(1);
    hosts.iter().for_each(|address| serve_on_host(address));
    let (server, client) = (Peer::start(&one, vhost, 1), Peer::start(&other, vhost, 1));
    bridge.addresses(2).iter().for_each(|address| ask_from_host(address));
    client.ask(mtu, &[bridge.addresses(2), hosts].concat());
    server.ask(mtu, &bridge.addresses(3));
    for peer in [&server, &client] {
        peer.container.sh("cat /sys/class/net/eth0/mtu").ok().expect_text(&mtu.to_string());
    }
}

#[test]
fn two_containers_and_the_host_with_small_packets() {
    containers_reach_each_other_and_the_host(1400, true);
}

#[test]
fn two_containers_and_the_host_with_large_packets_without_vhost() {
    containers_reach_each_other_and_the_host(9000, false);
}

fn each_cpu_has_queues_of_its_own(vhost: bool) {
    const CPUS: usize = 2;
    let _turn = shared();
    let bridge = Bridge::new(1500);
    let namespace = Namespace::new();
    bridge.connect(namespace.name(), "eth0", 2);
    let peer = Peer::start(&namespace, vhost, CPUS);
    std::thread::scope(|scope| {
        for address in bridge.addresses(2).into_iter().cycle().take(8) {
            scope.spawn(move || ask_from_host(&address));
        }
    });
    if !environment::is_vm() {
        return;
    }
    let queues = "rx-0\nrx-1\ntx-0\ntx-1";
    assert_eq!(peer.container.sh("ls /sys/class/net/eth0/queues").ok().text().trim(), queues);
    // Of each pair: the name, and how often it has interrupted any CPU.
    let interrupts = "awk '/-(in|out)put[.]/ {print $NF, $2 + $3}' /proc/interrupts";
    let interrupts = peer.container.sh(interrupts).ok().text();
    let come = |line: &&str| line.contains("-input.") && !line.ends_with(" 0");
    assert_eq!(interrupts.lines().filter(come).count(), CPUS, "{interrupts}");
}

#[test]
fn each_cpu_has_queues_that_the_host_serves() {
    each_cpu_has_queues_of_its_own(true);
}

#[test]
fn each_cpu_has_queues_that_the_vmm_serves() {
    each_cpu_has_queues_of_its_own(false);
}

/// The lines in any order, without what only one side can see, and whether an address's duplicates are still looked for,
/// which depends on the moment.
fn lines(text: &str) -> BTreeSet<String> {
    let line = |line: &str| line.replace(" flags 02", "").replace(" tentative", "").trim().to_owned();
    text.lines().map(line).filter(|line| !line.is_empty()).collect()
}

/// Inside, every table is what it is outside.
#[track_caller]
fn expect_same(container: &Container, namespace: &Namespace, commands: &[(&str, &[&str])]) {
    for (command, expected) in commands {
        let inside = container.sh(command).ok();
        let outside = namespace.output(&["busybox", "sh", "-c", command]).ok();
        assert_eq!(lines(&inside.text()), lines(&outside.text()), "{command}: inside and outside");
        for part in *expected {
            assert!(inside.text().contains(part), "{command} should show {part:?}\n{inside}");
        }
    }
}

#[test]
fn two_interfaces_with_all_that_belongs_to_them() {
    let _turn = shared();
    let bridges = [Bridge::new(1500), Bridge::new(1400)];
    let [[near, near6], [far, _]] = [bridges[0].addresses(1), bridges[1].addresses(1)];
    let own = &bridges[0].addresses(2)[0];
    let namespace = Namespace::new();
    // In an order in which the kernel's own names for the NICs would be wrong.
    bridges[1].connect(namespace.name(), "eth1", 2);
    bridges[0].connect(namespace.name(), "eth0", 2);
    for command in [
        &format!("route add default via {near}"),
        &format!("route add 10.200.0.0/16 via {far} dev eth1 metric 77 src {}", bridges[1].addresses(2)[0]),
        "route add 169.254.1.1 dev eth1 scope link",
        "route add 10.201.0.0/16 via 169.254.1.1 dev eth1 mtu lock 1300",
        "route add 10.202.0.0/16 via 192.0.2.1 dev eth1 onlink",
        "route add blackhole 10.203.0.0/16",
        &format!("route add 10.204.0.0/16 nexthop via {near} weight 2 nexthop via {far} weight 1"),
        &format!("-6 route add default via {near6}"),
        "-6 route add fd99::/64 dev eth1 metric 5",
        &format!("rule add from {own} lookup 100 priority 500"),
        &format!("route add default via {far} table 100"),
        "neighbour add 192.0.2.1 lladdr 02:00:00:00:00:77 dev eth1 nud permanent",
        "address add 10.99.0.1/32 dev lo",
        "address add 10.99.0.2/24 brd 10.99.0.255 dev eth1 label eth1:x",
    ] {
        namespace.ip(command);
    }
    let container = Run::new(BUSYBOX).options(&namespace.option()).command(&["sleep", "10000"]).start();
    expect_same(
        &container,
        &namespace,
        &[
            (
                "ip route",
                &["10.200.0.0/16", "metric 77", "10.201.0.0/16", "blackhole", "10.204.0.0/16", "onlink"],
            ),
            ("ip -6 route | grep -v ^multicast", &["default via", "fd99::/64 dev eth1  metric 5"]),
            ("ip route show table 100", &["default via"]),
            ("ip rule", &["lookup 100"]),
            ("ip neigh | grep PERMANENT", &["02:00:00:00:00:77"]),
            ("ip address show dev eth0 | grep -v '^[0-9]'", &["scope global eth0", "inet6 fd88"]),
            ("ip address show dev eth1 | grep -v '^[0-9]'", &["scope global eth1:x", "brd 10.99.0.255"]),
            ("ip address show dev lo | grep inet", &["10.99.0.1/32"]),
            ("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu", &["1500"]),
            ("cat /sys/class/net/eth1/address /sys/class/net/eth1/mtu", &["1400"]),
        ],
    );
    for address in [near, far] {
        container.sh(&format!("ping -c 1 -w 20 {address}")).ok();
    }
}

/// What the next two tests see in the container.
const SHOW: &str = "ip -o address show dev eth0 | awk '$3 == \"inet\" {print \"address=\" $4}'";

/// Container engines without CNI connect a container from a hook, which knows it by a process id.
#[test]
fn an_interface_from_a_hook() {
    let _turn = alone();
    let before = Host::before();
    let bridge = Bridge::new(1500);
    let [gateway, _] = bridge.addresses(1);
    let mut bundle = Bundle::new(&format!("{SHOW}; ping -c 1 -w 20 {gateway} >/dev/null && echo ping=ok"));
    let connect = bridge.commands("$pid", "nsenter -t $pid -n ip", "eth0", 9).join("\n");
    let script = format!("set -e\npid=$(jq .pid)\n{connect}\n");
    let script = bundle.scratch().file("hook", script).display().to_string();
    bundle.spec["hooks"] = serde_json::json!({"createRuntime": [
        {"path": "/bin/sh", "args": ["sh", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
    let [address, _] = bridge.addresses(9);
    let address = format!("{address}/24");
    bundle.run().output().ok().expect_values(&[("address", &address), ("ping", "ok")]);
    drop((bundle, bridge));
    before.expect_unchanged();
}

/// `ctr run --cni` connects a container between Create and Start, as Docker does.
#[test]
fn an_interface_between_create_and_start() {
    let _turn = alone();
    let plugins = Path::new("/opt/cni/bin/e2e-plugin");
    let list = Path::new("/etc/cni/net.d/10-e2e.conflist");
    if !Path::new("/etc/katana-test-machine").exists() {
        return environment::say_skipped("ctr wants the plugin in directories of this machine");
    }
    let bridge = Bridge::new(1400);
    let [address, _] = bridge.addresses(9);
    let connect = bridge.commands("$pid", "ip netns exec $pid ip", "eth0", 9).join(" >&2\n");
    // The specification of CNI 1.0. The namespace is named for the time, to be known to ip.
    let plugin = format!(
        "#!/bin/sh\nset -e\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\ncase $CNI_COMMAND in\n\
         VERSION) echo '{{\"cniVersion\": \"1.0.0\", \"supportedVersions\": [\"1.0.0\"]}}' ;;\n\
         ADD) pid=e2e-cni; touch /run/netns/$pid; mount --bind $CNI_NETNS /run/netns/$pid\n{connect} >&2\n\
         umount /run/netns/$pid; rm /run/netns/$pid\n\
         echo '{{\"cniVersion\": \"1.0.0\", \"interfaces\": [{{\"name\": \"eth0\", \"sandbox\": \"x\"}}], \
         \"ips\": [{{\"address\": \"{address}/24\", \"interface\": 0}}]}}' ;;\nesac\n"
    );
    let configuration = r#"{"cniVersion": "1.0.0", "name": "e2e", "plugins": [{"type": "e2e-plugin"}]}"#;
    for (path, content) in [(plugins, plugin.as_str()), (list, configuration)] {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("make the directory");
        std::fs::create_dir_all("/run/netns").expect("make the directory");
        std::fs::write(path, content).expect("write");
    }
    std::fs::set_permissions(plugins, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let output =
        Run::new(BUSYBOX).options("--cni").sh(&format!("{SHOW}; cat /sys/class/net/eth0/mtu")).output();
    std::fs::remove_file(plugins).expect("remove");
    std::fs::remove_file(list).expect("remove");
    let output = output.ok().expect_values(&[("address", &format!("{address}/24"))]);
    assert!(output.text().contains("1400"), "{output}");
}

#[test]
fn the_hosts_network_is_refused() {
    let _turn = alone();
    if !environment::is_vm_or_say("runc shares the host's network") {
        return;
    }
    let before = Host::before();
    for option in ["--net-host", "--with-ns network:/proc/1/ns/net"] {
        let output = Run::new(BUSYBOX).options(option).command(&["true"]).output();
        assert_ne!(output.code, 0, "{output}");
        output.expect_error_line(&["the host's network cannot be used from a virtual machine"]);
    }
    let output = Run::new(BUSYBOX).options("--with-ns network:/run/nothing").command(&["true"]).output();
    output.expect_error_line(&["network namespace /run/nothing: No such file or directory"]);
    before.expect_unchanged();
}

/// Taps, filters and queueing disciplines in a namespace that outlives its containers.
#[test]
fn a_namespace_is_left_as_it_was() {
    let _turn = alone();
    let bridge = Bridge::new(1500);
    let namespace = Namespace::new();
    bridge.connect(namespace.name(), "eth0", 2);
    let [gateway, _] = bridge.addresses(1);
    let outside = Host::before();
    let state = || {
        let links = namespace.output(&["ip", "-o", "link"]).ok().text();
        links
            + &namespace.output(&["tc", "qdisc"]).ok().text()
            + &namespace.output(&["ip", "route"]).ok().text()
    };
    let before = state();
    let run = || Run::new(BUSYBOX).options(&namespace.option());
    run().sh(&format!("ping -c 1 -w 20 {gateway}")).output().ok();
    assert_eq!(state(), before);
    if !environment::is_vm_or_say("the rest is about the shim of virtual machines") {
        return;
    }
    let container = run().command(&["sleep", "10000"]).start();
    assert_ne!(state(), before);
    let output = run().command(&["true"]).output();
    output.expect_error_line(&["the network namespace is connected to another virtual machine already"]);
    Process::shim_of(container.id()).kill();
    assert!(eventually(|| state() == before), "after the shim was killed: {}", state());
    drop(container);
    // What a crash of everything leaves is no obstacle.
    namespace.output(&["tc", "qdisc", "add", "dev", "eth0", "ingress"]).ok();
    run().sh(&format!("ping -c 1 -w 20 {gateway}")).output().ok();
    outside.expect_unchanged();
}

/// 20 clients on the host at once, each the whole file.
#[test]
fn nginx_serves_a_large_file_to_many() {
    let _turn = shared();
    let (megabytes, clients) = (10, 20);
    let scratch = Scratch::new();
    let content = Arc::new(noise(megabytes << 20, 3));
    scratch.file("large", &*content);
    let bridge = Bridge::new(1500);
    let namespace = Namespace::new();
    bridge.connect(namespace.name(), "eth0", 2);
    let run = Run::new(NGINX).options(&namespace.option()).bind(scratch.path(), "/srv/www", "ro");
    let _container = run.start();
    let address: IpAddr = bridge.addresses(2)[0].parse().expect("an address");
    let address = SocketAddr::new(address, 80);
    assert!(
        eventually(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()),
        "nginx answers"
    );
    let client = |_| {
        let content = Arc::clone(&content);
        std::thread::spawn(move || {
            let mut connection = TcpStream::connect(address).expect("connect");
            connection.set_read_timeout(Some(environment::hang_limit())).expect("a timeout");
            write!(connection, "GET /large HTTP/1.0\r\n\r\n").expect("ask");
            let mut answer = Vec::with_capacity(content.len() + 1024);
            connection.read_to_end(&mut answer).expect("an answer");
            let body = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a header") + 4;
            assert!(answer[body..] == content[..], "{} bytes that are not the file", answer.len() - body);
        })
    };
    let clients: Vec<_> = (0..clients).map(client).collect();
    clients.into_iter().for_each(|client| client.join().expect("a client"));
}
