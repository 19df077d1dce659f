//! What the DaemonSet runs on a node, `packaging/kata-deploy/deploy`, with a server that answers like Kubernetes'.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use katana_tests::containerd::Version;
use katana_tests::cri::Pod;
use katana_tests::host::eventually;
use katana_tests::turn::alone;
use katana_tests::{Command, Scratch, environment};
use nix::sys::signal::Signal::SIGTERM;

use crate::install::Plain;
use crate::package::{ARTIFACTS, Aside};

const CONFIG: &str = "/etc/containerd/config.toml";
const SYSTEMCTL: &str = "/usr/local/bin/systemctl";

/// Method, path and body of each request.
type Requests = Arc<Mutex<Vec<String>>>;

/// Says that the DaemonSet is being deleted, and to all else that it is done.
fn serve(listener: &TcpListener, requests: &Requests) {
    for stream in listener.incoming().flatten() {
        // One that gives up is no concern of this test.
        let _ = answer(stream, requests);
    }
}

fn answer(stream: TcpStream, requests: &Requests) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    let mut token = false;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        token |= line == "authorization: bearer secret";
        if let Some(number) = line.strip_prefix("content-length: ") {
            length = number.parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let request = format!("{} {}", first.trim_end_matches(" HTTP/1.1\r\n"), String::from_utf8_lossy(&body));
    requests.lock().expect("no panic").push(request);
    let text = "{\"metadata\":{\"deletionTimestamp\":\"2026-01-01T00:00:00Z\"}}";
    let status = if token { "200 OK" } else { "401 Unauthorized" };
    let answer =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
    reader.into_inner().write_all(answer.as_bytes())
}

/// A systemctl that knows one unit: the tests' containerd, with the node's configuration.
fn write_systemctl(containerd: &Plain) {
    let directory = containerd.instance.containerd().directory().display();
    let program = containerd.program.display();
    let text = format!(
        r#"#!/bin/sh
case "$*" in
*ActiveState*" containerd") echo active ;;
*ActiveState*) echo inactive ;;
"restart containerd")
    kill "$(cat {directory}/containerd.pid)"
    while kill -0 "$(cat {directory}/containerd.pid)" 2>/dev/null; do sleep 0.1; done
    setsid --fork sh -c 'echo $$ >{directory}/containerd.pid; exec {program} --config {CONFIG} >>{directory}/containerd.log 2>&1'
    until ctr --address {directory}/containerd.sock version >/dev/null 2>&1; do sleep 0.1; done
    ;;
*) exit 1 ;;
esac
"#
    );
    fs::write(SYSTEMCTL, text).expect("systemctl written");
    fs::set_permissions(SYSTEMCTL, fs::Permissions::from_mode(0o755)).expect("mode");
}

/// What was at paths before is there again when this is dropped.
struct Restored(Vec<(&'static str, Option<Vec<u8>>)>);

impl Restored {
    fn new(paths: &[&'static str]) -> Self {
        Self(paths.iter().map(|path| (*path, fs::read(path).ok())).collect())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        for (path, before) in &self.0 {
            let _ = match before {
                Some(bytes) => fs::write(path, bytes),
                None => fs::remove_file(path),
            };
        }
    }
}

#[test]
fn a_node_gets_the_runtime_and_loses_it_again() {
    let _turn = alone();
    if !environment::is_vm_or_say("this is Katana's own installer") {
        return;
    }
    if !Path::new("/etc/katana-test-machine").exists() {
        return environment::say_skipped("a node is changed in the test machine only");
    }
    let containerd = Plain::start(Version::Two);
    let _entered = containerd.instance.containerd().enter();
    let _restored = Restored::new(&[CONFIG, SYSTEMCTL]);
    fs::create_dir_all("/etc/containerd").expect("directory");
    fs::copy(containerd.file(), CONFIG).expect("configuration");
    let before = fs::read(CONFIG).expect("configuration");
    write_systemctl(&containerd);
    let _aside = Aside::new();

    let scratch = Scratch::new();
    let script = scratch.file("deploy", include_str!("../../../packaging/kata-deploy/deploy"));
    scratch.file("token", "secret");
    scratch.file("ca.crt", "");
    let (listener, requests) = (TcpListener::bind("127.0.0.1:0").expect("a port"), Requests::default());
    let address = listener.local_addr().expect("its address");
    let seen = Arc::clone(&requests);
    std::thread::spawn(move || serve(&listener, &seen));
    let set = [
        "HOST=/".to_owned(),
        format!("ARTIFACTS={ARTIFACTS}"),
        format!("ACCOUNT={}", scratch.path().display()),
        format!("API=http://{address}"),
        "NODE_NAME=node-1".to_owned(),
    ];
    let script = script.display().to_string();
    let words = ["env"].into_iter().chain(set.iter().map(String::as_str)).chain(["sh", &script, "install"]);
    let deploy = Command::new(&words.collect::<Vec<_>>()).patiently().spawn();
    let label = |value| {
        format!(
            "PATCH /api/v1/nodes/node-1 {{\"metadata\":{{\"labels\":{{\"katacontainers.io/kata-runtime\":{value}}}}}}}"
        )
    };
    let said = |request: &str| requests.lock().expect("no panic").iter().any(|one| one == request);
    let installed = eventually(|| said(&label("\"true\"")));
    if !installed {
        deploy.signal(SIGTERM);
        panic!("the node has no label: {:?}\n{}", requests.lock(), deploy.finish());
    }
    let pod = Pod::run("kata");
    pod.sh("echo here").wait_for_output("here");
    drop(pod);

    deploy.signal(SIGTERM);
    let output = deploy.finish();
    assert!(said(&label("null")), "{:?}\n{output}", requests.lock());
    assert!(
        said("GET /apis/apps/v1/namespaces/kube-system/daemonsets/kata-deploy "),
        "{:?}",
        requests.lock()
    );
    assert_eq!(fs::read(CONFIG).expect("configuration"), before);
    for left in
        ["/opt/kata", "/etc/docker/daemon.json", "/etc/containerd/conf.d", "/usr/local/bin/kata-runtime"]
    {
        assert!(fs::symlink_metadata(left).is_err(), "{left} is left\n{output}");
    }
}
