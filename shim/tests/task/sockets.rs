//! Sockets of the host that a container mounts.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use containerd_shim_protos::api::StartRequest;
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::json;

use crate::containerd::{Containerd, can_run, ctx};

#[test]
#[ignore = "runs inside a container"]
fn client() {
    let mut stream = UnixStream::connect("/run/deep/socket").unwrap();
    stream.write_all(b"a question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "an answer");
    // Until the container is killed.
    let _stays = UnixStream::connect("/run/deep/socket").unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1000));
}

#[tokio::test]
async fn a_socket_of_the_host_is_reached_until_the_container_is_deleted() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("socket").await;
    let path = containerd.directory.join("socket");
    let server = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let served = std::thread::spawn(move || {
        let (mut first, _) = server.accept().unwrap();
        let user = getsockopt(&first, sockopt::PeerCredentials).unwrap().uid();
        let mut question = String::new();
        first.read_to_string(&mut question).unwrap();
        first.write_all(b"an answer").unwrap();
        drop(first);
        (user, question, server.accept().unwrap().0)
    });
    containerd.configure_container(&json!({
        "process": {
            "args": ["/check", "--ignored", "--exact", "sockets::client"],
            "user": {"uid": 1000, "gid": 1000},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/check", "type": "bind", "source": std::env::current_exe().unwrap(), "options": ["rbind", "ro"]},
            {"destination": "/run/deep/socket", "type": "bind", "source": path, "options": ["rbind", "rw"]},
        ],
    }));
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    let start = StartRequest { id: containerd.id(), ..Default::default() };
    containerd.client.start(ctx(), &start).await.unwrap();
    let (user, question, mut idle) = tokio::task::spawn_blocking(|| served.join().unwrap()).await.unwrap();
    assert_eq!((user, question.as_str()), (1000, "a question"));
    containerd.kill("", 9).await.unwrap();
    containerd.wait("").await;
    containerd.delete("").await.unwrap();
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    containerd.shut_down().await;
}
