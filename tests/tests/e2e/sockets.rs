//! Sockets of the host that containers mount.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use katana_tests::host::eventually;
use katana_tests::turn::shared;
use katana_tests::{BUSYBOX, Run, Scratch};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};

use crate::guest;

/// A server on the host. It sends what it gets back, after the numbers of the user and the group that have connected.
/// Ended when this is dropped.
pub struct Server {
    pub path: PathBuf,
    listener: Arc<UnixListener>,
    /// Connections that have not ended.
    open: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(path: PathBuf, group: u32, mode: u32) -> Self {
        let listener = Arc::new(UnixListener::bind(&path).expect("bind"));
        chown(&path, Some(0), Some(group)).expect("chown");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("chmod");
        let (server, open) = (Arc::clone(&listener), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&open);
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = server.accept() {
                let count = Arc::clone(&count);
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    // A client may have thought better of it.
                    let _ = answer(stream);
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { path, listener, open, thread: Some(thread) }
    }
}

fn answer(mut stream: UnixStream) -> io::Result<()> {
    let caller = getsockopt(&stream, sockopt::PeerCredentials)?;
    let mut data = Vec::new();
    stream.read_to_end(&mut data)?;
    let numbers = [caller.uid().to_be_bytes(), caller.gid().to_be_bytes()].concat();
    stream.write_all(&[numbers, data].concat())
}

impl Drop for Server {
    fn drop(&mut self) {
        // unix(7) does not say it: that ends a waiting accept.
        shutdown(self.listener.as_raw_fd(), Shutdown::Both).expect("shut down");
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server's thread");
        }
    }
}

fn checks(names: &[&str]) -> Vec<String> {
    guest::command(
        &names.iter().map(|name| format!("guest::sockets::{name}")).collect::<Vec<_>>().join(" "),
        "/run/sockets",
    )
}

fn with(run: Run, socket: &Path, name: &str, mode: &str) -> Run {
    // Nothing of the destination's path is in the image.
    run.bind(socket, &format!("/run/sockets/{name}"), mode)
}

#[test]
fn connections_pass_as_between_two_processes() {
    let _turn = shared();
    let scratch = Scratch::new();
    let server = |name: &str, mode| Server::start(scratch.path().join(name), 2001, mode);
    let (open, group, closed) = (server("open", 0o666), server("group", 0o660), server("closed", 0o666));
    let run = guest::mounted(Run::new(BUSYBOX)).command(&["sleep", "100000"]);
    let run = with(run, &open.path, "open", "ro");
    let run = with(run, &group.path, "group", "rw");
    let container = with(run, &closed.path, "closed", "rw").start();
    let status = container.exec(&["stat", "-c", "%F %a %u:%g", "/run/sockets/group"]).ok();
    assert_eq!(status.text().trim(), "socket 660 0:2001");
    let names = ["the_server_sees", "the_mode_of", "twenty_connections", "many_megabytes"];
    guest::expect_passed(container.exec_command(&[], &checks(&names)).patiently().output());
    drop(closed);
    guest::expect_passed(container.exec_command(&[], &checks(&["nobody_listens"])).output());
    // What took the name of a socket since is another one.
    drop(open);
    std::fs::remove_file(scratch.path().join("open")).expect("remove");
    let later = server("open", 0o666);
    let refused = container.exec(&checks(&["the_server_sees"]));
    assert_ne!(refused.code, 0, "{refused}");
    drop(later);
}

#[test]
fn connections_end_with_their_container() {
    let _turn = shared();
    let scratch = Scratch::new();
    let server = Server::start(scratch.path().join("open"), 0, 0o600);
    let run = guest::mounted(Run::new(BUSYBOX)).command(&checks(&["a_connection_that_stays"]));
    let container = with(run, &server.path, "open", "rw").start();
    assert!(eventually(|| server.open.load(Ordering::SeqCst) == 1), "nobody connects");
    drop(container);
    assert!(eventually(|| server.open.load(Ordering::SeqCst) == 0), "the connection stays");
}
