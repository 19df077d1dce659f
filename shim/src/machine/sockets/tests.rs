use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream as StdStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use katana_protocol::caller::MOST_GROUPS;
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::json;

use super::*;

const SOMEBODY: Caller = Caller { uid: 1000, gid: 2000, groups: Vec::new() };

/// A place for sockets; gone when this is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("katana-sockets-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn server(&self, mode: u32) -> (PathBuf, UnixListener) {
        let path = self.0.join("socket");
        let server = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        (path, server)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The guest of a container that mounts one socket.
struct Guest {
    ports: Arc<Ports>,
    message: api::HostSocket,
    sockets: Sockets,
}

impl Guest {
    async fn of(path: &Path, more: serde_json::Value) -> Self {
        let mut spec: Spec = serde_json::from_value(json!({"mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": "/s", "source": path, "options": ["rbind", "ro"]},
        ]}))
        .unwrap();
        spec.linux = serde_json::from_value(more).unwrap();
        let mut sources = spec.sources(Path::new("/"), &crate::spec::Pod::default());
        assert_eq!(sources, [Source::Guest, Source::Socket(path.to_owned())]);
        let ports = Ports::new();
        let (messages, sockets) = open(&spec, &mut sources, &ports).await.unwrap();
        let [message] = <[_; 1]>::try_from(messages).unwrap();
        assert_eq!(sources[1], Source::StandIn(message.port));
        Self { ports, message, sockets }
    }

    fn connect(&self) -> UnixStream {
        let (mut ours, theirs) = StdStream::pair().unwrap();
        ours.write_all(&self.ports.key().unwrap()).unwrap();
        self.ports.connected(self.message.port, theirs);
        ours.set_nonblocking(true).unwrap();
        UnixStream::from_std(ours).unwrap()
    }

    /// Connects as somebody; the answer is 0 or an error number.
    async fn connect_as(&self, caller: &Caller) -> (UnixStream, i32) {
        let mut stream = self.connect();
        let secret = self.message.secret.as_slice().try_into().unwrap();
        stream.write_all(&caller.message(secret).unwrap()).await.unwrap();
        let answer = stream.read_u8().await.unwrap();
        (stream, answer.into())
    }
}

async fn is_closed(stream: &mut UnixStream) -> bool {
    stream.read_u8().await.is_err()
}

fn have_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        crate::host::say_skipped("it needs root");
    }
    root
}

#[tokio::test]
async fn the_server_sees_the_caller_and_both_ends() {
    if !have_root() {
        return;
    }
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    let guest = Guest::of(&path, json!({})).await;
    assert_eq!((guest.message.mode, guest.message.refuses), (0o666, false));
    let served = std::thread::spawn(move || {
        let (mut client, _) = server.accept().unwrap();
        let seen = getsockopt(&client, sockopt::PeerCredentials).unwrap();
        let mut request = Vec::new();
        // Up to the end of one direction; the other one goes on.
        client.read_to_end(&mut request).unwrap();
        client.write_all(&request).unwrap();
        (seen.uid(), seen.gid(), seen.pid())
    });
    let caller = Caller { groups: vec![7, 8], ..SOMEBODY };
    let (stream, answer) = guest.connect_as(&caller).await;
    assert_eq!(answer, 0);
    let sent: Vec<u8> = (0..4 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut from, mut to) = stream.into_split();
    let send = async {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let (_, read) = tokio::join!(send, from.read_to_end(&mut received));
    read.unwrap();
    assert!(received == sent);
    let pid = nix::unistd::getpid().as_raw();
    assert_eq!(served.join().unwrap(), (1000, 2000, pid));
    // The thread that was somebody else is gone.
    assert!(nix::unistd::geteuid().is_root());
}

#[tokio::test]
async fn the_host_decides_who_may_connect() {
    if !have_root() {
        return;
    }
    let directory = Directory::new();
    let (path, _server) = directory.server(0o660);
    std::os::unix::fs::chown(&path, Some(0), Some(3000)).unwrap();
    let guest = Guest::of(&path, json!({})).await;
    assert_eq!((guest.message.mode, guest.message.uid, guest.message.gid), (0o660, 0, 3000));
    let members = [Caller { gid: 3000, ..SOMEBODY }, Caller { groups: vec![5, 3000], ..SOMEBODY }];
    for member in &members {
        assert_eq!(guest.connect_as(member).await.1, 0, "{member:?}");
    }
    let (mut stream, answer) = guest.connect_as(&SOMEBODY).await;
    assert_eq!(answer, libc::EACCES);
    assert!(is_closed(&mut stream).await);
}

#[tokio::test]
async fn nobody_gets_through_without_the_secret_or_out_of_the_namespace() {
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    server.set_nonblocking(true).unwrap();
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let guest = Guest::of(&path, json!({"uidMappings": map, "gidMappings": map})).await;
    let secret: [u8; SECRET] = guest.message.secret.as_slice().try_into().unwrap();
    let inside = Caller { uid: 100_000, gid: 165_535, groups: vec![100_001] };
    let mut wrong = secret;
    wrong[SECRET - 1] ^= 1;
    let too_many = Caller { groups: vec![100_001; MOST_GROUPS], ..inside.clone() }.message(&secret).unwrap();
    let too_many = [&too_many[..HEAD - 2], &[0xff, 0xff], &too_many[HEAD..]].concat();
    let refused = [
        inside.message(&wrong).unwrap(),
        Caller { uid: 0, ..inside.clone() }.message(&secret).unwrap(),
        Caller { uid: u32::MAX, ..inside.clone() }.message(&secret).unwrap(),
        Caller { gid: 165_536, ..inside.clone() }.message(&secret).unwrap(),
        Caller { groups: vec![100_001, 0], ..inside.clone() }.message(&secret).unwrap(),
        too_many,
    ];
    for message in refused {
        let mut stream = guest.connect();
        // It may be closed before all of it is written.
        let _ = stream.write_all(&message).await;
        assert!(is_closed(&mut stream).await);
    }
    assert_eq!(server.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "somebody got through");
    if have_root() {
        assert_eq!(guest.connect_as(&inside).await.1, 0);
        server.accept().unwrap();
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_a_connection_whose_server_says_nothing() {
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    let guest = Guest::of(&path, json!({})).await;
    let (mut stream, answer) = guest.connect_as(&Caller { uid: 0, gid: 0, groups: vec![] }).await;
    assert_eq!(answer, 0);
    let (mut client, _) = server.accept().unwrap();
    stream.write_all(b"all of it").await.unwrap();
    drop(stream);
    let ended = tokio::task::spawn_blocking(move || {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        // POLLHUP, which nobody has to ask for.
        let mut fds = [PollFd::new(client.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        assert!(fds[0].revents().unwrap().contains(PollFlags::POLLHUP));
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(ended.await.unwrap(), "all of it");
}

#[tokio::test]
async fn a_socket_is_the_file_that_was_mounted_and_dies_with_its_server() {
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    let guest = Guest::of(&path, json!({})).await;
    let root = Caller { uid: 0, gid: 0, groups: vec![] };
    assert_eq!(guest.connect_as(&root).await.1, 0);
    drop(server);
    std::fs::remove_file(&path).unwrap();
    let _later = directory.server(0o666);
    assert_eq!(guest.connect_as(&root).await.1, libc::ECONNREFUSED);
}

#[tokio::test]
async fn what_cannot_be_connected_is_known_before_anybody_tries() {
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    drop(server);
    assert!(Guest::of(&path, json!({})).await.message.refuses, "its server is gone");
    let path = directory.0.join("datagrams");
    let socket = UnixDatagram::bind(&path).unwrap();
    assert!(Guest::of(&path, json!({})).await.message.refuses);
    let peer = UnixDatagram::bind(directory.0.join("peer")).unwrap();
    socket.connect(directory.0.join("peer")).unwrap();
    assert!(Guest::of(&path, json!({})).await.message.refuses, "it is connected to another one");
    drop(peer);

    let path = directory.0.join("not-yet");
    let flags = nix::sys::socket::SockFlag::SOCK_CLOEXEC;
    let silent = |kind, path: &Path| {
        use nix::sys::socket::{AddressFamily, UnixAddr, bind, socket};
        let bound = socket(AddressFamily::Unix, kind, flags, None).unwrap();
        bind(std::os::fd::AsRawFd::as_raw_fd(&bound), &UnixAddr::new(path).unwrap()).unwrap();
        bound
    };
    let bound = silent(nix::sys::socket::SockType::Stream, &path);
    let guest = Guest::of(&path, json!({})).await;
    let root = Caller { uid: 0, gid: 0, groups: vec![] };
    assert_eq!(guest.connect_as(&root).await.1, libc::EAGAIN, "it may listen later");
    nix::sys::socket::listen(&bound, nix::sys::socket::Backlog::new(5).unwrap()).unwrap();
    assert_eq!(guest.connect_as(&root).await.1, 0);

    let path = directory.0.join("packets");
    let _packets = silent(nix::sys::socket::SockType::SeqPacket, &path);
    assert_eq!(Guest::of(&path, json!({})).await.connect_as(&root).await.1, libc::EPROTOTYPE);
}

#[tokio::test]
async fn connections_end_with_their_container_and_are_not_too_many() {
    let directory = Directory::new();
    let (path, server) = directory.server(0o666);
    let mut guest = Guest::of(&path, json!({})).await;
    let root = Caller { uid: 0, gid: 0, groups: vec![] };
    let (mut stream, answer) = guest.connect_as(&root).await;
    assert_eq!(answer, 0);
    // They say nothing, so each takes a place.
    let mut silent: Vec<_> = Vec::new();
    for _ in 0..MOST_AT_ONCE - 1 {
        silent.push(guest.connect());
        tokio::task::yield_now().await;
    }
    let mut waiting = guest.connect();
    let secret = guest.message.secret.as_slice().try_into().unwrap();
    waiting.write_all(&root.message(secret).unwrap()).await.unwrap();
    tokio::time::timeout(Duration::from_millis(100), waiting.read_u8()).await.unwrap_err();
    drop(silent.pop());
    assert_eq!(waiting.read_u8().await.unwrap(), 0);
    guest.sockets = Sockets::default();
    assert!(is_closed(&mut stream).await && is_closed(&mut waiting).await);
    assert!(is_closed(&mut guest.connect()).await);
    drop(server);
}
