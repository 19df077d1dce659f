//! The VMM is a shell script here: what counts is what the shim makes of a process that ends in some way.

use super::*;
use std::os::unix::fs::PermissionsExt;
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
            Event::Parked { thread: id as i32 },
            Event::Done(None),
            // It has no such thread, and the shim does not want it.
            Event::Parked { thread: 1 },
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
    let thread = vmm.park().await.unwrap();
    assert_eq!(thread.pid, id);
    vmm.unpark(thread).await.unwrap();
    vmm.park().await.unwrap_err();
    assert_eq!(vmm.park().await.unwrap_err().to_string(), "kata-vmm: no threads");
    let (unpark, own) = (|thread| Request::Unpark { thread }, id as i32);
    let expected = [Request::Park, unpark(own), Request::Park, unpark(1), Request::Park];
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
