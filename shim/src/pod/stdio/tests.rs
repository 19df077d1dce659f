//! Real FIFOs on the host's side; on the guest's side a socket pair as the VMM makes it.

use super::*;
use sha2::{Digest, Sha256};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("katana-stdio-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.0.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn guest(ports: &Arc<ports::Ports>, port: u32) -> StdStream {
    let (mut guest, host) = StdStream::pair().unwrap();
    guest.write_all(&ports.key().unwrap()).unwrap();
    ports.connected(port, host);
    guest
}

async fn open(paths: &Paths) -> (Streams, Arc<ports::Ports>) {
    let ports = ports::Ports::new();
    (Streams::open(paths, "c1", "ns", &ports).await.unwrap(), ports)
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Every byte of a large stream is with a slow reader before `drain` returns.
#[tokio::test]
async fn a_large_stream_arrives_whole() {
    let directory = Directory::new("large");
    let paths = Paths { stdout: directory.fifo("out"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let mut reader = File::open(&paths.stdout).unwrap();
    let mut writer = guest(&ports, streams.ports().stdout_port);
    let data = pattern(64 << 20);
    let expected = Sha256::digest(&data);
    let length = data.len() as u64;
    let writer = thread::spawn(move || writer.write_all(&data).unwrap());
    let reader = thread::spawn(move || {
        let (mut hash, mut buffer, mut total, mut chunks) = (Sha256::new(), vec![0; 1 << 20], 0, 0);
        loop {
            let count = reader.read(&mut buffer).unwrap();
            if count == 0 {
                return (hash.finalize(), total);
            }
            hash.update(&buffer[..count]);
            total += count as u64;
            chunks += 1;
            if chunks % 100 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
    streams.drain(length, 0).await;
    assert_eq!(streams.stdout.as_ref().unwrap().progress.borrow().delivered, length);
    // The end of the guest's stream is the end of the FIFO, which the reader waits for.
    let (hash, total) = tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap();
    writer.join().unwrap();
    assert_eq!((hash, total), (expected, length));
}

#[tokio::test]
async fn a_reader_may_vanish_and_come_back() {
    let directory = Directory::new("vanish");
    let paths = Paths { stdout: directory.fifo("out"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let mut writer = guest(&ports, streams.ports().stdout_port);
    drop(File::open(&paths.stdout).unwrap());
    writer.write_all(b"nobody reads").unwrap();
    streams.drain(12, 0).await;
    let mut reader = File::open(&paths.stdout).unwrap();
    writer.write_all(b"; somebody does").unwrap();
    streams.drain(27, 0).await;
    drop((writer, streams));
    tokio::task::yield_now().await;
    let text = tokio::task::spawn_blocking(move || io::read_to_string(&mut reader).unwrap()).await.unwrap();
    assert_eq!(text, "nobody reads; somebody does");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_read_delays_the_end_for_a_while_only() {
    let directory = Directory::new("stuck");
    let paths = Paths { stdout: directory.fifo("out"), stderr: directory.fifo("err"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let mut writer = guest(&ports, streams.ports().stdout_port);
    let bytes = (1 << 20) as u64;
    let thread = thread::spawn(move || writer.write_all(&vec![0; 1 << 20]).map_err(drop));
    let begin = tokio::time::Instant::now();
    streams.drain(bytes, 0).await;
    assert!(begin.elapsed() >= PATIENCE && begin.elapsed() < PATIENCE * 3);
    drop(streams);
    tokio::task::yield_now().await;
    let _ = thread.join().unwrap();
}

#[tokio::test]
async fn a_stream_that_ends_early_does_not_hold_the_exit() {
    let directory = Directory::new("early");
    let paths = Paths { stdout: directory.fifo("out"), stderr: directory.fifo("err"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let begin = Instant::now();
    guest(&ports, streams.ports().stdout_port).write_all(b"abc").unwrap();
    ports.close();
    streams.drain(1000, 1000).await;
    assert!(begin.elapsed() < PATIENCE);
}

#[tokio::test]
async fn input_ends_with_close_io_and_not_with_a_client() {
    let directory = Directory::new("input");
    let paths = Paths { stdin: directory.fifo("in"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let port = streams.ports().stdin_port;
    assert!(port != 0 && streams.ports().stdout_port == 0);
    let mut process = guest(&ports, port);
    let data = pattern(4 << 20);
    let (first, second) = (data[..1000].to_vec(), data[1000..].to_vec());
    let path = paths.stdin.clone();
    let clients = thread::spawn(move || {
        for part in [first, second] {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(&part).unwrap();
        }
    });
    let process = thread::spawn(move || {
        let mut head = vec![0; 4 << 20];
        process.read_exact(&mut head).unwrap();
        process.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let more = process.read(&mut [0; 1]).unwrap_err().kind();
        (head, more, process)
    });
    let (head, more, mut process) = tokio::task::spawn_blocking(|| process.join().unwrap()).await.unwrap();
    clients.join().unwrap();
    assert!(head == data && more == io::ErrorKind::WouldBlock);
    streams.close_stdin();
    process.set_read_timeout(None).unwrap();
    let end = tokio::task::spawn_blocking(move || process.read(&mut [0; 1]).unwrap()).await.unwrap();
    assert_eq!(end, 0);
}

#[tokio::test]
async fn files_are_appended_to_and_other_targets_are_named() {
    let directory = Directory::new("file");
    let log = directory.0.join("deep/log");
    fs::create_dir(log.parent().unwrap()).unwrap();
    fs::write(&log, "old\n").unwrap();
    let uri = format!("file://{}", log.display());
    let (streams, ports) = open(&Paths { stdout: uri.clone(), stderr: uri, ..Paths::default() }).await;
    guest(&ports, streams.ports().stdout_port).write_all(b"out\n").unwrap();
    streams.drain(4, 0).await;
    guest(&ports, streams.ports().stderr_port).write_all(b"err\n").unwrap();
    streams.drain(4, 4).await;
    assert_eq!(fs::read_to_string(&log).unwrap(), "old\nout\nerr\n");
    let error = |paths: Paths| async move {
        Streams::open(&paths, "c", "n", &ports::Ports::new()).await.unwrap_err().to_string()
    };
    let cases = [
        (
            Paths { stdout: "npipe://x".into(), ..Paths::default() },
            "npipe://x: output to npipe:// is not supported",
        ),
        (Paths { stdout: "/nowhere".into(), ..Paths::default() }, "open /nowhere: No such file or directory"),
        (
            Paths { stdin: "/nowhere".into(), ..Paths::default() },
            "open stdin /nowhere: No such file or directory",
        ),
    ];
    for (paths, text) in cases {
        assert_eq!(error(paths).await, text);
    }
}

/// A guest that says there is more to come, and gives it byte by byte.
#[tokio::test(start_paused = true)]
async fn a_stream_that_trickles_does_not_hold_the_exit_for_ever() {
    let directory = Directory::new("trickle");
    let paths = Paths { stdout: directory.fifo("out"), ..Paths::default() };
    let (streams, ports) = open(&paths).await;
    let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&paths.stdout).unwrap();
    let mut writer = guest(&ports, streams.ports().stdout_port);
    let trickle = tokio::spawn(async move {
        loop {
            writer.write_all(b"x").unwrap();
            tokio::time::sleep(PATIENCE / 2).await;
        }
    });
    let begin = tokio::time::Instant::now();
    tokio::time::timeout(DRAIN_LIMIT * 10, streams.drain(u64::MAX, 0)).await.expect("it ends");
    assert!(
        begin.elapsed() >= PATIENCE && begin.elapsed() <= DRAIN_LIMIT + PATIENCE,
        "{:?}",
        begin.elapsed()
    );
    trickle.abort();
}
