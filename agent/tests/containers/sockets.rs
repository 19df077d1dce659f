//! Stand-ins for sockets of the host.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex};

use katana_protocol::GUEST_SOCKETS;
use katana_protocol::agent::{CreateContainerRequest, HostSocket};
use katana_protocol::caller::{Caller, HEAD, Head, SECRET};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::harness::{Guest, ctx};

const PORT: u32 = 77_777;
const LENGTH: usize = 5 << 20;

/// What takes the shim's place: it echoes, and remembers who has called.
struct Host(Arc<Mutex<Vec<Caller>>>);

impl Host {
    /// `answers`: what is said to the callers; the last one to all that follow.
    fn new(guest: &Guest, answers: &'static [i32]) -> Self {
        let listener = UnixListener::bind(guest.directory.join(format!("{PORT}.sock"))).unwrap();
        let callers = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&callers);
        tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let answer = answers.get(number).or(answers.last()).copied().unwrap();
                tokio::spawn(serve(stream, answer, Arc::clone(&seen)));
            }
        });
        Self(callers)
    }

    fn callers(&self) -> Vec<Caller> {
        self.0.lock().unwrap().drain(..).collect()
    }
}

async fn serve(mut stream: UnixStream, answer: i32, seen: Arc<Mutex<Vec<Caller>>>) {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head).await.unwrap();
    let head = Head::parse(&head).unwrap();
    assert_eq!(head.secret, secret());
    let mut rest = vec![0; head.rest()];
    stream.read_exact(&mut rest).await.unwrap();
    seen.lock().unwrap().push(head.caller(&rest));
    stream.write_u8(u8::try_from(answer).unwrap()).await.unwrap();
    if answer == 0 {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
    }
}

fn secret() -> [u8; SECRET] {
    *b"a secret of some"
}

fn socket(mode: u32, gid: u32) -> HostSocket {
    HostSocket { port: PORT, secret: secret().to_vec(), mode, gid, ..Default::default() }
}

/// Creates the container "c" with the socket at /run/deep/socket, and starts it.
async fn start(guest: &Guest, socket: HostSocket) {
    let mut spec = guest.spec(&["sleep", "1000"]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let source = format!("{GUEST_SOCKETS}/{PORT}");
    mounts.push(json!({"destination": "/run/deep/socket", "type": "bind", "source": source, "options": ["rbind", "ro"]}));
    let program = std::env::current_exe().unwrap();
    mounts
        .push(json!({"destination": "/check", "type": "bind", "source": program, "options": ["bind", "ro"]}));
    let request = CreateContainerRequest {
        container_id: "c".into(),
        spec: serde_json::to_vec(&spec).unwrap(),
        sockets: vec![socket],
        ..Default::default()
    };
    guest.client.create_container(ctx(), &request).await.unwrap();
    guest.start("c").await.unwrap();
}

/// Runs [`client`] as a user; the answer is what it says.
async fn call(guest: &Guest, name: &str, user: Value) -> String {
    let mut process = guest.process(&["/check", "--ignored", "--exact", "--nocapture", "sockets::client"]);
    process["user"] = user;
    let output = guest.run_exec("c", name, &process).await.unwrap();
    let said =
        output.stdout.lines().find_map(|line| line.split_once("client: ")).map(|(_, said)| said.to_owned());
    said.unwrap_or_else(|| panic!("{output:?}"))
}

#[test]
#[ignore = "runs inside a container"]
fn client() {
    println!("client: {}", talk().map_or_else(|error| error.to_string(), |()| "echoed".to_owned()));
}

fn talk() -> io::Result<()> {
    let mut stream = StdStream::connect("/run/deep/socket")?;
    let sent: Vec<u8> = (0..LENGTH as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // If it is refused after all, there may be nobody to write to.
    stream.write_all(&sent)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    if received == sent { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[tokio::test]
async fn a_stand_in_lets_in_whom_the_socket_would_and_reports_who_it_is() {
    let guest = Guest::new("socket").await;
    let host = Host::new(&guest, &[0]);
    start(&guest, socket(0o660, 3000)).await;
    assert_eq!(call(&guest, "root", json!({"uid": 0, "gid": 0})).await, "echoed");
    assert_eq!(host.callers(), [Caller { uid: 0, gid: 0, groups: vec![] }]);
    let denied = call(&guest, "stranger", json!({"uid": 1000, "gid": 1000})).await;
    assert!(denied.starts_with("Permission denied"), "{denied}");
    assert_eq!(host.callers(), []);
    let member = json!({"uid": 1000, "gid": 1000, "additionalGids": [3000, 4000]});
    assert_eq!(call(&guest, "member", member).await, "echoed");
    assert_eq!(host.callers(), [Caller { uid: 1000, gid: 1000, groups: vec![3000, 4000] }]);
    let status = guest.process(&["stat", "-c", "%F %a %u:%g", "/run/deep/socket"]);
    assert_eq!(guest.run_exec("c", "stat", &status).await.unwrap().stdout, "socket 660 0:3000\n");
    guest.kill("c", "", libc::SIGKILL, true).await.unwrap();
    guest.wait("c", "").await;
    guest.remove("c").await;
    assert_eq!(guest.run_directory().join("kata-containers/sockets").read_dir().unwrap().count(), 0);
}

#[tokio::test]
async fn an_access_control_list_counts() {
    let guest = Guest::new("socket-acl").await;
    let host = Host::new(&guest, &[0]);
    // The kernel's form (include/uapi/linux/posix_acl_xattr.h): version 2, then tag, permissions, id. user::rw-,
    // user:1000:rw-, group::---, mask::rw-, other::---
    let nobody = u32::MAX;
    let entries =
        [(0x01, 6, nobody), (0x02, 6, 1000), (0x04, 0, nobody), (0x10, 6, nobody), (0x20, 0, nobody)];
    let entry = |(tag, permissions, id): (u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let list = [2_u32.to_le_bytes().to_vec(), entries.into_iter().flat_map(entry).collect()].concat();
    start(&guest, HostSocket { acl: list, ..socket(0o660, 3000) }).await;
    assert_eq!(call(&guest, "named", json!({"uid": 1000, "gid": 1})).await, "echoed");
    // The mode alone would let the group in.
    let denied = call(&guest, "group", json!({"uid": 1001, "gid": 3000})).await;
    assert!(denied.starts_with("Permission denied"), "{denied}");
    assert_eq!(host.callers().len(), 1);
}

#[tokio::test]
async fn where_nobody_listens_connections_are_refused() {
    let guest = Guest::new("socket-refused").await;
    // A full queue is no reason to give up.
    let host = Host::new(&guest, &[libc::EAGAIN, 0, libc::ECONNREFUSED]);
    start(&guest, socket(0o666, 0)).await;
    let root = json!({"uid": 0, "gid": 0});
    assert_ne!(call(&guest, "busy", root.clone()).await, "echoed");
    assert_eq!(call(&guest, "one", root.clone()).await, "echoed");
    assert_ne!(call(&guest, "two", root.clone()).await, "echoed");
    let mut number = 0;
    // The agent closes its socket when it has had the answer.
    while !call(&guest, &format!("three-{number}"), root.clone()).await.starts_with("Connection refused") {
        number += 1;
    }
    assert!(host.callers().len() <= 3 + number);
}

#[tokio::test]
async fn a_closed_socket_refuses_from_the_start() {
    let guest = Guest::new("socket-closed").await;
    start(&guest, HostSocket { refuses: true, ..socket(0o600, 0) }).await;
    let refused = call(&guest, "one", json!({"uid": 0, "gid": 0})).await;
    assert!(refused.starts_with("Connection refused"), "{refused}");
}
