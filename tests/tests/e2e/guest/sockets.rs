//! Sockets of the host: `open` for all, `group` for OWNER's group and `closed`, whose server has ended, as
//! `crate::sockets` makes them.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use katana_tests::scratch::noise;

use super::{Findings, MEMBER, OWNER, ROOT, STRANGER, User, errno};

fn at(name: &str) -> PathBuf {
    let directory = std::env::var(super::DIRECTORY).expect("this runs inside a container, for another test");
    Path::new(&directory).join(name)
}

/// Sends data, ends that direction, and gets them back after the numbers of user and group that the server sees.
fn ask(name: &str, sent: &[u8]) -> io::Result<(u32, u32)> {
    let mut stream = UnixStream::connect(at(name))?;
    stream.write_all(sent)?;
    stream.shutdown(Shutdown::Write)?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    let (numbers, data) = received.split_at_checked(8).ok_or(io::ErrorKind::UnexpectedEof)?;
    assert!(data == sent, "{} bytes came back as {} others", sent.len(), data.len());
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
    Ok((number(&numbers[..4]), number(&numbers[4..])))
}

#[test]
#[ignore = "runs inside a container"]
fn the_server_sees_who_has_connected() {
    let mut findings = Findings::default();
    for user in [ROOT, OWNER, STRANGER] {
        let seen = user.does(|| ask("open", b"hello"));
        findings.expect(&format!("{user:?}"), seen.ok(), Some((user.id, user.group)));
    }
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn the_mode_of_a_socket_decides() {
    let mut findings = Findings::default();
    let mut expect = |user: User, expected| {
        findings.expect_errno(&format!("{user:?}"), user.does(|| ask("group", b"hello")), expected);
    };
    expect(ROOT, 0);
    expect(OWNER, 0);
    expect(MEMBER, 0);
    expect(STRANGER, libc::EACCES);
    findings.none();
}

#[test]
#[ignore = "runs inside a container"]
fn twenty_connections_at_once() {
    let streams: Vec<_> = (0..20).map(|_| UnixStream::connect(at("open")).expect("connect")).collect();
    for (number, mut stream) in (0_u8..20).zip(streams).rev() {
        stream.write_all(&[number; 1000]).expect("write");
        stream.shutdown(Shutdown::Write).expect("shut down");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("read");
        assert!(received.len() == 1008 && received[8..] == [number; 1000]);
    }
}

#[test]
#[ignore = "runs inside a container"]
fn many_megabytes() {
    ask("open", &noise(16 << 20, 7)).expect("a connection");
}

/// In a machine, the first to connect may find out for all that the server has ended.
#[test]
#[ignore = "runs inside a container"]
fn nobody_listens() {
    let refused = |_: &i32| {
        std::thread::sleep(Duration::from_millis(20));
        errno(ask("closed", b"hello")) == libc::ECONNREFUSED
    };
    assert!((0..500).any(|try_number| refused(&try_number)), "connections are not refused");
}

#[test]
#[ignore = "runs inside a container"]
fn a_server_in_the_volume() {
    let listener = UnixListener::bind(at("inner")).expect("bind");
    for stream in listener.incoming() {
        let mut data = vec![0; 8];
        let mut stream = stream.expect("accept");
        stream.read_to_end(&mut data).expect("read");
        stream.write_all(&data).expect("write");
    }
}

#[test]
#[ignore = "runs inside a container"]
fn the_volumes_server_is_reached() {
    ask("inner", b"hello").expect("a connection");
}

#[test]
#[ignore = "runs inside a container"]
fn a_connection_that_stays() {
    let _stream = UnixStream::connect(at("open")).expect("connect");
    std::thread::sleep(Duration::from_secs(10_000));
}
