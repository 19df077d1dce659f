//! The VMM is a shell script here: what counts is what the shim makes of a process that ends in some way.

use super::listen::TAIL;
use super::*;
use katana_protocol::vmm::{Event, ExitReason};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

fn program(name: &str, script: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("katana-vmm-{name}-{}", std::process::id()));
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    path
}

fn own_network() -> fs::File {
    fs::File::open("/proc/self/ns/net").unwrap()
}

async fn run(name: &str, script: &str) -> Arc<End> {
    let path = program(name, script);
    let vmm = Vmm::spawn(&path, own_network().as_fd(), Ports::new(), |_| Ok(())).unwrap();
    let end = tokio::time::timeout(Duration::from_secs(180), wait_end(&mut vmm.ended())).await.unwrap();
    fs::remove_file(path).unwrap();
    end
}

#[tokio::test]
async fn a_vmm_that_cannot_be_started_is_named() {
    let error = Vmm::spawn(Path::new("/nowhere/kata-vmm"), own_network().as_fd(), Ports::new(), |_| Ok(()))
        .err()
        .unwrap();
    assert_eq!(error.to_string(), "start \"/nowhere/kata-vmm\": No such file or directory");
}

#[test]
fn a_vmm_that_cannot_be_watched_does_not_run_on() {
    use without::without;
    mod without {
        include!("../../../../protocol/src/kernel/without.rs");
    }
    let path = program("unwatched", "exec sleep 100");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for call in ["pidfd_open", "epoll_ctl"] {
        without(call, || {
            let _in_runtime = runtime.enter();
            let started = Vmm::spawn(&path, own_network().as_fd(), Ports::new(), |_| Ok(()));
            assert!(started.is_err(), "{call}");
            assert_eq!(fs::read_to_string("/proc/thread-self/children").unwrap(), "", "{call}");
        });
    }
    fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn the_end_of_a_silent_vmm_is_explained() {
    assert_eq!(
        run("exit", "echo bad >&2; exec 3>&-; exit 3").await.reason,
        "kata-vmm ended with exit code 3: bad"
    );
    assert_eq!(run("kill", "kill -9 $$").await.reason, "kata-vmm was killed by SIGKILL");
}

#[tokio::test]
async fn what_the_vmm_says_counts() {
    // Opening another shell's descriptor 3 is not possible, so the socket is spoken to from here.
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let process = PidFd::open(child.id() as i32).unwrap();
    let ports = Ports::new();
    let waiter = ports.open(7);
    let vmm = Vmm::listen(ours, process, child.id(), ports, None).unwrap();
    vmm.boot(
        Machine {
            vcpus: 1,
            max_vcpus: 1,
            pluggable_mib: 0,
            memory_mib: 1,
            kernel_params: String::new(),
            net_slots: 0,
            disk_slots: 0,
            invariant_tsc: true,
            guest_cid: 3,
            template: vmm::Template::None,
            debug: false,
        },
        &[],
    )
    .unwrap();
    assert!(matches!(vmm::receive::<Request>(&theirs).unwrap().0, Request::Boot(_)));
    let (guest, host) = UnixStream::pair().unwrap();
    vmm::send(&theirs, &Event::Connection { port: 7 }, &[host.as_fd()]).unwrap();
    drop(host);
    let connection = waiter.connection().await.unwrap();
    drop(connection);
    assert_eq!(io::Read::read(&mut &guest, &mut [0; 1]).unwrap(), 0);
    let console = "one\n\n".to_owned() + &"line\n".repeat(20) + "Kernel panic - not syncing: no init\n";
    let reason = ExitReason::Panic("Kernel panic - not syncing: no init".into());
    vmm::send(&theirs, &Event::Exit { reason, console }, &[]).unwrap();
    let stopped = vmm.stop(Duration::from_millis(50)).await;
    assert!(stopped.reason.starts_with("the guest's kernel panicked: Kernel panic"), "{stopped}");
    assert!(stopped.tail.ends_with("| Kernel panic - not syncing: no init") && !stopped.tail.contains("one"));
    assert_eq!(stopped.tail.split(" | ").count(), TAIL);
    let _ = child.wait();
}

#[tokio::test]
async fn a_thread_of_the_vmm_is_known_by_the_hosts_id() {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let id = child.id();
    let vmm = Vmm::listen(ours, PidFd::open(id as i32).unwrap(), id, Ports::new(), None).unwrap();
    let asked = std::thread::spawn(move || {
        let answers = [
            Event::PlaceholderAdded { thread: id as i32 },
            Event::Done(None),
            // It has no such thread, and the shim does not want it.
            Event::PlaceholderAdded { thread: 1 },
            Event::Done(None),
            Event::Done(Some("no threads".into())),
        ];
        let one = |answer| {
            let (request, _) = vmm::receive::<Request>(&theirs).unwrap();
            vmm::send(&theirs, &answer, &[]).unwrap();
            request
        };
        answers.map(one)
    });
    let thread = vmm.add_placeholder().await.unwrap();
    assert_eq!(thread.pid, id);
    vmm.remove_placeholder(thread).await.unwrap();
    vmm.add_placeholder().await.unwrap_err();
    assert_eq!(vmm.add_placeholder().await.unwrap_err().to_string(), "kata-vmm: no threads");
    let (remove, own) = (|thread| Request::RemovePlaceholder { thread }, id as i32);
    let expected =
        [Request::AddPlaceholder, remove(own), Request::AddPlaceholder, remove(1), Request::AddPlaceholder];
    assert_eq!(asked.join().unwrap(), expected);
    vmm.kill();
    let _ = child.wait();
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_is_nobody_elses() {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let id = child.id();
    let vmm = Vmm::listen(ours, PidFd::open(id as i32).unwrap(), id, Ports::new(), None).unwrap();
    // containerd drops its call.
    tokio::time::timeout(Duration::from_millis(50), vmm.detach_disk(0)).await.unwrap_err();
    assert_eq!(vmm::receive::<Request>(&theirs).unwrap().0, Request::DetachDisk { slot: 0 });
    let asked = std::thread::spawn(move || {
        vmm::send(&theirs, &Event::Done(Some("no such slot".into())), &[]).unwrap();
        let (request, _) = vmm::receive::<Request>(&theirs).unwrap();
        vmm::send(&theirs, &Event::Done(None), &[]).unwrap();
        request
    });
    vmm.add_vcpus(2).await.unwrap();
    assert_eq!(asked.join().unwrap(), Request::AddVcpus { count: 2 });
    vmm.kill();
    let _ = child.wait();
}

/// A VMM that is this test, with the process by which the shim knows it.
fn hostile() -> (Vmm, OwnedFd, std::process::Child, Arc<Ports>) {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    let ports = Ports::new();
    let process = PidFd::open(child.id() as i32).unwrap();
    let vmm = Vmm::listen(ours, process, child.id(), Arc::clone(&ports), None).unwrap();
    (vmm, theirs, child, ports)
}

/// Sends more descriptors than are taken, of which the receiver then gets none, as one who may not open any more.
fn send_too_many(theirs: &OwnedFd, event: &Event, fd: BorrowedFd<'_>) {
    let bytes = serde_json::to_vec(event).unwrap();
    let many = [fd.as_raw_fd(); 2 * vmm::MAX_FDS];
    let rights = [ControlMessage::ScmRights(&many)];
    let iov = [io::IoSlice::new(&bytes)];
    sendmsg::<()>(theirs.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
}

/// Whatever was sent before has been heard when this returns: memory is reported in the order of messages.
async fn heard(vmm: &Vmm, theirs: &OwnedFd, mark: u64) {
    vmm::send(theirs, &Event::MemoryPlugged { mib: mark }, &[]).unwrap();
    let mut plugged = vmm.plugged();
    let come = plugged.wait_for(|mib| *mib == mark);
    drop(tokio::time::timeout(Duration::from_secs(180), come).await.expect("it is heard").unwrap());
}

/// Kills, once it is dropped.
struct Bystander(std::process::Child, i32);

impl Bystander {
    /// A process that is no child of this one, but of a shell.
    fn new() -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(shell.stdout.take().unwrap()), &mut line).unwrap();
        Self(shell, line.trim().parse().unwrap())
    }

    fn lives(&self) -> bool {
        let state = fs::read_to_string(format!("/proc/{}/stat", self.1)).unwrap_or_default();
        state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        if let Ok(process) = PidFd::open(self.1) {
            process.kill();
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_process_that_is_not_the_vmms_is_neither_taken_for_it_nor_killed() {
    let (bystander, mut child_of_ours) =
        (Bystander::new(), Command::new("sleep").arg("1000").spawn().unwrap());
    let jailed = |pid| Event::Jailed { pid };
    // No child of the shim, at the one time at which the message may come.
    let (vmm, theirs, mut process, _ports) = hostile();
    vmm::send(&theirs, &jailed(bystander.1), &[]).unwrap();
    heard(&vmm, &theirs, 1).await;
    assert_eq!(vmm.pid(), process.id() as i32);
    vmm.kill();
    drop(theirs);
    wait_end(&mut vmm.ended()).await;
    let _ = process.wait();
    // Another child of the shim, when the machine runs.
    let (vmm, theirs, mut process, _ports) = hostile();
    vmm::send(&theirs, &Event::Running, &[]).unwrap();
    vmm::send(&theirs, &jailed(child_of_ours.id() as i32), &[]).unwrap();
    heard(&vmm, &theirs, 2).await;
    assert_eq!(vmm.pid(), process.id() as i32);
    vmm.kill();
    drop(theirs);
    wait_end(&mut vmm.ended()).await;
    let _ = process.wait();
    // The true one is taken, and nothing after it.
    let (vmm, theirs, mut process, _ports) = hostile();
    let mut inside = Command::new("sleep").arg("1000").spawn().unwrap();
    vmm::send(&theirs, &jailed(inside.id() as i32), &[]).unwrap();
    vmm::send(&theirs, &jailed(child_of_ours.id() as i32), &[]).unwrap();
    heard(&vmm, &theirs, 3).await;
    assert_eq!(vmm.pid(), inside.id() as i32);
    vmm.kill();
    drop(theirs);
    wait_end(&mut vmm.ended()).await;
    let _ = (process.wait(), inside.wait());
    assert!(bystander.lives() && child_of_ours.try_wait().unwrap().is_none());
    child_of_ours.kill().unwrap();
    child_of_ours.wait().unwrap();
}

/// The first process reports the jailed one, and is killed meanwhile.
#[tokio::test]
async fn a_jailed_process_that_is_heard_of_after_the_kill_ends_too() {
    let (vmm, theirs, mut process, _ports) = hostile();
    let mut inside = Command::new("sleep").arg("1000").spawn().unwrap();
    let jailed = PidFd::open(inside.id() as i32).unwrap();
    vmm.kill();
    vmm::send(&theirs, &Event::Jailed { pid: inside.id() as i32 }, &[]).unwrap();
    heard(&vmm, &theirs, 1).await;
    let ended = tokio::time::timeout(Duration::from_secs(60), jailed.ended()).await;
    jailed.kill();
    assert!(ended.is_ok(), "it goes on");
    drop(theirs);
    wait_end(&mut vmm.ended()).await;
    let _ = (process.wait(), inside.wait());
}

#[tokio::test]
async fn answers_that_nobody_has_asked_for_are_dropped() {
    let (vmm, theirs, mut child, _ports) = hostile();
    for number in 0..100 {
        vmm::send(&theirs, &Event::Done(Some(format!("{number} {}", "x".repeat(1000)))), &[]).unwrap();
        heard(&vmm, &theirs, 1000 + number).await;
    }
    let asked = std::thread::spawn(move || {
        assert!(matches!(vmm::receive::<Request>(&theirs).unwrap().0, Request::AddPlaceholder));
        // Not what was asked for: a thread is.
        vmm::send(&theirs, &Event::Done(None), &[]).unwrap();
        vmm::send(&theirs, &Event::Done(Some("none\x1b[2J left".into())), &[]).unwrap();
        theirs
    });
    assert_eq!(vmm.add_placeholder().await.unwrap_err().to_string(), "kata-vmm: none\\u{1b}[2J left");
    drop(asked.join().unwrap());
    vmm.kill();
    let _ = child.wait();
}

#[tokio::test]
async fn counts_that_are_none_are_nobodys() {
    let (vmm, theirs, mut child, _ports) = hostile();
    let counts: Vec<u64> = (0..).take(Counter::ALL.len()).collect();
    let asked = std::thread::spawn(move || {
        for counts in [counts.get(1..).unwrap_or_default().to_vec(), vec![u64::MAX; 1000], counts] {
            assert!(matches!(vmm::receive::<Request>(&theirs).unwrap().0, Request::Counts));
            vmm::send(&theirs, &Event::PlaceholderAdded { thread: 1 }, &[]).unwrap();
            vmm::send(&theirs, &Event::Counts(counts), &[]).unwrap();
        }
        theirs
    });
    let limit = Duration::from_secs(180);
    assert_eq!(vmm.counts(limit).await, None);
    assert_eq!(vmm.counts(limit).await, None);
    let counts = vmm.counts(limit).await.expect("counts");
    assert_eq!(counts.last(), Some(&(Counter::VsockBytesSent, Counter::ALL.len() as u64 - 1)));
    // From now on the VMM is silent: the first one waits for the answer, the next for his turn.
    let theirs = asked.join().unwrap();
    for _ in 0..2 {
        assert_eq!(vmm.counts(Duration::from_millis(20)).await, None);
    }
    assert!(matches!(vmm::receive::<Request>(&theirs).unwrap().0, Request::Counts));
    nonblocking(&theirs).unwrap();
    assert!(vmm::receive::<Request>(&theirs).is_err());
    vmm.kill();
    let _ = child.wait();
}

#[tokio::test]
async fn a_vmm_that_does_not_answer_is_not_waited_for_for_ever() {
    let (vmm, theirs, mut child, _ports) = hostile();
    tokio::time::pause();
    let error =
        tokio::time::timeout(LIMIT * 10, vmm.detach_disk(0)).await.expect("it is given up").unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");
    drop(theirs);
    vmm.kill();
    let _ = child.wait();
}

#[tokio::test]
async fn what_is_no_connection_is_not_taken_for_one() {
    let (vmm, theirs, mut child, ports) = hostile();
    let (waiter, lost) = (ports.open(7), ports.open(8));
    let file = fs::File::open("/proc/self/comm").unwrap();
    let (packets, _other) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = Event::Connection { port: 7 };
    // One for which the shim had no descriptor: whoever waits does not wait for ever.
    send_too_many(&theirs, &Event::Connection { port: 8 }, file.as_fd());
    // One that never had any.
    vmm::send(&theirs, &connection, &[]).unwrap();
    for fd in [file.as_fd(), packets.as_fd(), internet.as_fd()] {
        vmm::send(&theirs, &connection, &[fd]).unwrap();
    }
    heard(&vmm, &theirs, 1).await;
    assert!(lost.connection().await.unwrap_err().to_string().ends_with("Too many open files"));
    let (guest, host) = UnixStream::pair().unwrap();
    vmm::send(&theirs, &connection, &[host.as_fd()]).unwrap();
    drop(host);
    drop(waiter.connection().await.expect("the port is still open"));
    assert_eq!(io::Read::read(&mut &guest, &mut [0; 1]).unwrap(), 0);
    vmm.kill();
    let _ = child.wait();
}

#[tokio::test]
async fn last_words_are_short_and_plain() {
    let (vmm, theirs, mut child, _ports) = hostile();
    let reason = ExitReason::Panic(format!("Kernel panic \x1b]0;owned\x07 {}", "p".repeat(20_000)));
    let console = format!("\u{9b}2J{}\n", "c".repeat(1000)).repeat(30);
    vmm::send(&theirs, &Event::Exit { reason, console }, &[]).unwrap();
    drop(theirs);
    vmm.kill();
    let end = wait_end(&mut vmm.ended()).await.to_string();
    assert!(end.contains("Kernel panic \\u{1b}]0;owned\\u{7} ppp") && end.contains("\\u{9b}2Jccc"), "{end}");
    assert!(end.len() < 5000 && !end.contains(char::is_control), "{}", end.len());
    let _ = child.wait();
}
