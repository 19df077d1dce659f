//! What a container gets that connects to the vsock ports of its host: nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use super::checked;

/// Where the shim begins to hand ports out, and as many as are in use and will be during the test.
const PORTS: std::ops::Range<u32> = 0x1_0000..0x1_0080;
/// The agent's own.
const AGENT_PORT: u32 = 1024;

/// A stream to a port of the host.
struct Stream {
    file: File,
    /// Whether it was seen to be connected, which the call that begins it does not wait for.
    counted: bool,
}

fn connect(port: u32) -> std::io::Result<File> {
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes integers.
    let socket = checked(unsafe { libc::socket(libc::AF_VSOCK, flags, 0) })?;
    // SAFETY: a descriptor that nobody else knows.
    let socket = unsafe { OwnedFd::from_raw_fd(i32::try_from(socket).expect("a descriptor")) };
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: libc::VMADDR_CID_HOST,
        svm_zero: [0; 4],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address of the given length, which lives through the call.
    match checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// Connects to every port again and again, saying something or nothing, until there is a file `stop`.
#[test]
#[ignore = "runs inside a container"]
fn nothing_comes_from_the_host() {
    let stop =
        Path::new(&std::env::var(super::DIRECTORY).expect("this runs inside a container")).join("stop");
    let (mut open, mut rounds, mut made) = (HashMap::<u32, Stream>::new(), 0_usize, 0_usize);
    while !stop.exists() {
        for port in PORTS.chain([AGENT_PORT]) {
            let mut bytes = [0; 64];
            let read = open.get_mut(&port).map(|stream| stream.file.read(&mut bytes));
            let (ended, connected) = match &read {
                None => (true, false),
                Some(Ok(0)) => (true, true),
                Some(Ok(count)) => panic!("port {port}: {:?}", &bytes[..*count]),
                Some(Err(error)) => match error.kind() {
                    ErrorKind::NotConnected => (false, false),
                    ErrorKind::WouldBlock => (false, true),
                    _ => (true, false),
                },
            };
            if connected && let Some(stream) = open.get_mut(&port) {
                made += usize::from(!std::mem::replace(&mut stream.counted, true));
            }
            if ended {
                open.remove(&port);
                // On a host there may be no such sockets.
                if let Ok(file) = connect(port) {
                    open.insert(port, Stream { file, counted: false });
                }
            } else if rounds % 2 == 1
                && let Some(stream) = open.get_mut(&port)
            {
                // It may not be connected yet, or not any more.
                let _ = stream.file.write(&[0; 16]);
            }
        }
        rounds += 1;
    }
    // Past what the test runner captures.
    let _ = writeln!(std::io::stdout(), "{rounds} rounds, {made} connections");
}
