"""What VPNs, network plugins and cluster nodes ask of a kernel. Says `NAME=ok` or what the kernel said.

Runs in a privileged container. Numbers are those of linux/if_link.h, linux/rtnetlink.h, linux/netlink.h, linux/in.h.
"""

import socket
import struct

RTM_NEWLINK, RTM_DELLINK = 16, 17
NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 1, 4, 0x200, 0x400
NLMSG_ERROR = 2
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA = 3, 18, 1, 2
IPPROTO_SCTP, IPPROTO_MPTCP, TCP_ULP, NETLINK_XFRM, PF_KEY, PF_KEY_V2 = 132, 262, 31, 6, 15, 2


def attribute(kind, value):
    return struct.pack("HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def u32(kind, value):
    return attribute(kind, struct.pack("I", value))


V4, V6 = socket.inet_aton("192.0.2.9"), socket.inet_pton(socket.AF_INET6, "2001:db8::9")

LINKS = {
    "bond": b"",
    "bridge": b"",
    "dummy": b"",
    "geneve": u32(1, 7) + attribute(2, V4),  # IFLA_GENEVE_ID, IFLA_GENEVE_REMOTE
    "gre": attribute(7, V4),  # IFLA_GRE_REMOTE
    "gretap": attribute(7, V4),
    "ifb": b"",
    "ip6gre": attribute(7, V6),
    "ip6tnl": attribute(3, V6),  # IFLA_IPTUN_REMOTE
    "ipip": attribute(3, V4),
    "sit": attribute(3, V4),
    "vrf": u32(1, 77),  # IFLA_VRF_TABLE
    "vxlan": u32(1, 7),  # IFLA_VXLAN_ID
    "wireguard": b"",
    "xfrm": u32(2, 7),  # IFLA_XFRM_IF_ID
}


def request(kind, flags, attributes, header=b"\0" * 16, family=0):
    """Of rtnetlink unless a family is named; the header is then a struct ifinfomsg of zeroes."""
    body = header + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family) as netlink:
        netlink.send(struct.pack("IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, 1, 0) + body)
        answer = netlink.recv(65536)
    number, error = struct.unpack_from("H", answer, 4)[0], struct.unpack_from("i", answer, 16)[0]
    if number != NLMSG_ERROR or error:
        raise OSError(-error, "netlink")


def link(kind, data):
    name = attribute(IFLA_IFNAME, b"test0\0")
    info = attribute(IFLA_INFO_KIND, kind.encode()) + (attribute(IFLA_INFO_DATA, data) if data else b"")
    request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, name + attribute(IFLA_LINKINFO, info))
    request(RTM_DELLINK, 0, name)


def state():
    """What `ip xfrm state add` does: struct xfrm_usersa_info and a key for AES-GCM (linux/xfrm.h)."""
    selector = b"\0" * 56
    identity = socket.inet_aton("192.0.2.9") + b"\0" * 12 + struct.pack(">IBxxx", 0x1000, 50)  # spi, IPPROTO_ESP
    source = socket.inet_aton("192.0.2.8") + b"\0" * 12
    limits = struct.pack("QQQQ", *[2**64 - 1] * 4) + b"\0" * 32
    info = selector + identity + source + limits + b"\0" * 32 + struct.pack("IIIIIHBBBxxxxxxx", 0, 0, 0, 0, 0, socket.AF_INET, 0, 0, 0)
    key = b"rfc4106(gcm(aes))".ljust(64, b"\0") + struct.pack("II", 160, 128) + b"k" * 20
    request(0x10, NLM_F_CREATE | NLM_F_EXCL, attribute(18, key), info, NETLINK_XFRM)  # XFRM_MSG_NEWSA, XFRMA_ALG_AEAD


def hashes():
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0) as algorithm:
        algorithm.bind(("hash", "sha256"))
        operation, _ = algorithm.accept()
        with operation:
            operation.sendall(b"abc")
            if operation.recv(64)[:4] != bytes.fromhex("ba7816bf"):
                raise OSError(0, "wrong hash")


def encrypts():
    for kind, name in (("skcipher", "cbc(aes)"), ("aead", "gcm(aes)")):
        with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0) as algorithm:
            algorithm.bind((kind, name))


def connected(protocol):
    """A connection to itself by a protocol of streams, on which something is said."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
            client.connect(listener.getsockname())
            server, _ = listener.accept()
            with server:
                client.sendall(b"hello")
                if server.recv(5) != b"hello":
                    raise OSError(0, "nothing came")
                if protocol == socket.IPPROTO_TCP:
                    client.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")


def check(name, work, *arguments):
    try:
        work(*arguments)
        print(f"{name}=ok")
    except OSError as error:
        print(f"{name}={error.strerror}")


# The loopback interface of a new network namespace may be down.
with socket.socket() as any_socket:
    import fcntl

    request_of_flags = struct.pack("16sh14x", b"lo", 1)
    fcntl.ioctl(any_socket, 0x8914, request_of_flags)  # SIOCSIFFLAGS, IFF_UP
for kind, data in LINKS.items():
    check(kind, link, kind, data)
check("esp", state)
check("hash", hashes)
check("cipher", encrypts)
check("sctp", connected, IPPROTO_SCTP)
check("mptcp", connected, IPPROTO_MPTCP)
check("tls", connected, socket.IPPROTO_TCP)
check("ipsec", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM).close())
check("pfkey", lambda: socket.socket(PF_KEY, socket.SOCK_RAW, PF_KEY_V2).close())
