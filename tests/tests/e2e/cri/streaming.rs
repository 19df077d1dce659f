//! `kubectl exec -i`, `kubectl exec -it`, `kubectl attach` and `kubectl port-forward`; ports of the host.

use std::io::{Read, Write};
use std::net::TcpStream;

use katana_tests::Scratch;
use katana_tests::cri::{Pod, shared_pod};
use katana_tests::host::eventually;
use katana_tests::scratch::noise;
use serde_json::json;

use super::cases;

cases! {
    /// Three streams and an exit code
    2: exec_with_input,
    /// A terminal whose size changes
    exec_on_a_terminal,
    /// The container's own streams, while its log goes on
    attach_to_a_container,
    /// What a client that goes leaves behind: nothing of attach, all of the container
    a_client_goes_away,
    /// Servers on localhost: of IPv4, of IPv6, on all addresses, none at all
    ports_are_forwarded,
    /// hostPort, by TCP and UDP
    ports_of_the_host,
}

fn exec_with_input(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let script = "read line; echo \"got $line\"; echo err >&2; seq 1 50000; exit 5";
    let mut session = container.exec_streaming(&["sh", "-c", script], false).unwrap();
    session.write("some words\n");
    assert_eq!(session.exit_code(), 5);
    let numbers: String = (1..=50000).map(|number| format!("{number}\n")).collect();
    assert_eq!(session.stdout, format!("got some words\n{numbers}"));
    assert_eq!(session.stderr, "err\n");
    assert_eq!(container.exec_streaming(&["true"], false).unwrap().exit_code(), 0);
}

fn exec_on_a_terminal(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let mut session = container.exec_streaming(&["sh"], true).unwrap();
    session.resize(91, 33);
    session
        .write("until [ \"$(stty size)\" = '33 91' ]; do sleep 0.1; done; echo size is right | tr a-z A-Z\n");
    session.wait_for("SIZE IS RIGHT");
    session.write("exit 3\n");
    assert_eq!(session.exit_code(), 3);
}

fn attach_to_a_container(handler: &str) {
    let script = "echo ready; while read line; do echo \"$line\" | tr a-z A-Z; done";
    let container = shared_pod(handler).start(json!({"command": ["sh", "-c", script], "stdin": true}));
    container.wait_for_output("ready");
    let mut session = container.attach(false).unwrap();
    session.write("first\n");
    session.wait_for("FIRST");
    drop(session);
    // A second client comes after the first has gone.
    let mut session = container.attach(false).unwrap();
    session.write("second\n");
    session.wait_for("SECOND");
    container.wait_for_output("SECOND");
    assert_eq!(container.output(), "ready\nFIRST\nSECOND\n");
}

fn a_client_goes_away(handler: &str) {
    let container = shared_pod(handler).sh("while :; do echo tick; sleep 0.1; done");
    for _ in 0..3 {
        container.attach(false).unwrap().wait_for("tick");
    }
    let before = container.output().len();
    assert!(eventually(|| container.output().len() > before + 20), "the log stands still");
    container.stop(0).unwrap();
    assert_eq!(container.status().exit_code, 137);
}

/// Pages on localhost of either kind and on all addresses, and a program that prints who asks.
const SERVERS: &str = "cd /www; mkdir cgi-bin
    printf '#!/bin/sh\necho; echo client=$REMOTE_ADDR.\n' >cgi-bin/client; chmod +x cgi-bin/client
    for at in 127.0.0.1:7101 '[::1]:7102' 7103; do httpd -p $at; done
    echo ready; exec sleep 10000";

fn ports_are_forwarded(handler: &str) {
    let pod = shared_pod(handler);
    let (scratch, file) = (Scratch::new(), noise(3_000_000, 5));
    std::fs::write(scratch.path().join("file"), &file).unwrap();
    let www = json!({"host_path": scratch.path(), "container_path": "/www"});
    let container = pod.start(json!({"command": ["sh", "-c", SERVERS], "mounts": [www]}));
    container.wait_for_output("ready");
    let get = |port, page: &str| {
        let mut answer = pod.forward(port).unwrap();
        answer.write(format!("GET {page} HTTP/1.0\r\n\r\n").as_bytes());
        answer.read_to(usize::MAX);
        (answer.received, answer.error)
    };
    for port in [7101, 7102, 7103] {
        let (answer, error) = get(port, "/file");
        assert!(answer.ends_with(&file), "port {port}: {} bytes, {error:?}", answer.len());
    }
    // As anybody on localhost.
    let (answer, error) = get(7101, "/cgi-bin/client");
    assert!(answer.ends_with(b"client=127.0.0.1.\n"), "{:?}, {error:?}", String::from_utf8_lossy(&answer));

    // runc's client is refused, Katana's is reset.
    let mut answer = pod.forward(7104).unwrap();
    assert!(!answer.read_to(1));
    let expected = ["error forwarding port 7104 to pod", "connection re"];
    assert!(expected.iter().all(|part| answer.error.contains(part)), "{:?}", answer.error);
}

fn ports_of_the_host(handler: &str) {
    let port = if handler == "runc" { 17201 } else { 17202 };
    let mapping = json!({"protocol": "TCP", "container_port": 7103, "host_port": port});
    let pod = Pod::run_with(handler, json!({"port_mappings": [mapping]}));
    let container = pod.sh("exec nc -ll -p 7103 -e cat");
    let listens = || container.sh("netstat -tln").ok().contains(":7103 ");
    assert!(eventually(listens), "{:?}", container.log());
    let data = noise(1 << 20, 3);
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut writer, sent) = (connection.try_clone().unwrap(), data.clone());
    let sender = std::thread::spawn(move || writer.write_all(&sent));
    let mut received = vec![0; data.len()];
    connection.read_exact(&mut received).unwrap();
    sender.join().unwrap().unwrap();
    assert!(received == data, "what came back is not what was sent");
    drop(pod);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "the port is still open");
}
