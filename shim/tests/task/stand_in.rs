//! What takes the VMM's place: this test's own binary, started by a script that the configuration names.

use std::collections::HashMap;
use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use katana_protocol::counters::Counter;
use katana_protocol::vmm::{CONTROL_FD, Event, ExitReason, MAX_FDS, Request, receive, send};
use katana_protocol::{AGENT_PORT, FIRST_STREAM_PORT, GUEST_SHARE};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// As many streams as a test opens.
const STREAMS: u32 = 400;
/// As many further containers of a pod have pids of their own.
const THREADS: usize = 3;

/// A script that runs [`stand_in`] in a mount namespace, for `[hypervisor.katana] path`.
pub fn script(directory: &Path) -> PathBuf {
    let path = directory.join("kata-vmm");
    let test = std::env::current_exe().unwrap();
    let arguments = "--exact stand_in::stand_in --ignored --nocapture --test-threads 1";
    fs::write(
        &path,
        format!(
            "#!/bin/sh\nexport TMPDIR={}\nexec unshare --mount --propagation slave {} {arguments} >&2\n",
            directory.display(),
            test.display()
        ),
    )
    .unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    path
}

/// The agent that cargo has built beside this test.
pub fn agent() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("kata-agent")
}

#[test]
#[ignore = "is the VMM of the other tests"]
fn stand_in() {
    // SAFETY: the shim has put the control socket there, and this process has no other use for the number.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    let (Request::Boot(machine), fds) = receive(control).unwrap() else { panic!("not a boot request") };
    assert_eq!(fds.len(), 4);
    if machine.kernel_params.contains("fail=boot") {
        return send(control, &Event::Failed("kernel: not an ELF file".into()), &[]).unwrap();
    }
    if machine.kernel_params.contains("fail=panic") {
        let panic = "Kernel panic - not syncing: Attempted to kill init!";
        let event =
            Event::Exit { reason: ExitReason::Panic(panic.into()), console: format!("Linux 6\n{panic}\n") };
        send(control, &Event::Running, &[]).unwrap();
        return send(control, &event, &[]).unwrap();
    }
    let directory = std::env::temp_dir().join(format!("stand-in-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let ports = [AGENT_PORT].into_iter().chain(FIRST_STREAM_PORT..FIRST_STREAM_PORT + STREAMS);
    let listeners: HashMap<u32, UnixListener> = ports
        .map(|port| (port, UnixListener::bind(directory.join(format!("{port}.sock"))).unwrap()))
        .collect();
    // The agent's namespaces leave no way to make any later.
    let threads = (0..THREADS).map(|_| placeholder()).collect();
    let lost = Lost::of(&machine.kernel_params);
    let silent = machine.kernel_params.contains("fail=silent");
    make_guest_of_namespace(&directory, &fds[3]);
    // From now on the shim mounts in there.
    send(control, &Event::Running, &[]).unwrap();
    let mut agent = (!silent).then(|| start_agent(&directory));
    forward(control, &listeners, threads, lost);
    if let Some(agent) = &mut agent {
        agent.kill().unwrap();
        agent.wait().unwrap();
    }
    fs::remove_dir_all(directory).unwrap();
}

/// The stream that comes as to a shim that may have no more descriptors.
#[derive(Clone, Copy)]
struct Lost {
    port: u32,
    /// Until it comes, what is short has ended.
    delay: Duration,
}

impl Lost {
    /// The kernel parameter `lose=STREAM` or `lose=STREAM,MILLISECONDS`.
    fn of(parameters: &str) -> Option<Self> {
        let value = parameters.split_whitespace().find_map(|word| word.strip_prefix("lose="))?;
        let (stream, delay) = value.split_once(',').unwrap_or((value, "0"));
        let port = FIRST_STREAM_PORT + stream.parse::<u32>().unwrap();
        Some(Self { port, delay: Duration::from_millis(delay.parse().unwrap()) })
    }
}

/// Passes connections on, and gives threads away that do nothing, until the shim is gone.
fn forward(
    control: BorrowedFd<'_>,
    listeners: &HashMap<u32, UnixListener>,
    mut threads: Vec<(i32, Sender<()>)>,
    lost: Option<Lost>,
) {
    let mut kept = Vec::new();
    let mut placeholders = HashMap::new();
    loop {
        let ports: Vec<_> = listeners.iter().collect();
        let mut fds = vec![PollFd::new(control, PollFlags::POLLIN)];
        fds.extend(ports.iter().map(|(_, listener)| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[0].any() == Some(true) {
            match receive(control) {
                Ok((Request::AddPlaceholder, _)) => {
                    let answer = threads.pop().map(|(thread, end)| {
                        placeholders.insert(thread, end);
                        Event::PlaceholderAdded { thread }
                    });
                    let failed = || Event::Done(Some("no more threads".into()));
                    send(control, &answer.unwrap_or_else(failed), &[]).unwrap();
                }
                Ok((Request::RemovePlaceholder { thread }, _)) => {
                    let failed = placeholders.remove(&thread).is_none().then(|| "no such thread".to_owned());
                    send(control, &Event::Done(failed), &[]).unwrap();
                }
                Ok((Request::Counts, _)) => {
                    send(control, &Event::Counts((0..).take(Counter::ALL.len()).collect()), &[]).unwrap();
                }
                _ => return,
            }
            continue;
        }
        for (fd, (port, listener)) in fds[1..].iter().zip(&ports) {
            if fd.any() == Some(true) {
                let connection = listener.accept().unwrap().0;
                let event = Event::Connection { port: **port };
                if let Some(lost) = lost.filter(|lost| lost.port == **port) {
                    std::thread::sleep(lost.delay);
                    send_too_many(control, &event, connection.as_fd());
                    // The agent does not find it closed.
                    kept.push(connection);
                } else {
                    send(control, &event, &[connection.as_fd()]).unwrap();
                }
            }
        }
    }
}

/// Sends more descriptors than are taken, of which the receiver then gets none, as one who may not open any more.
fn send_too_many(control: BorrowedFd<'_>, event: &Event, fd: BorrowedFd<'_>) {
    let bytes = serde_json::to_vec(event).unwrap();
    let many = [fd.as_raw_fd(); 2 * MAX_FDS];
    let rights = [ControlMessage::ScmRights(&many)];
    let iov = [IoSlice::new(&bytes)];
    sendmsg::<()>(control.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
}

/// A thread that waits until the sender is dropped.
fn placeholder() -> (i32, Sender<()>) {
    let ((sender, id), (end, ended)) = (channel(), channel());
    std::thread::spawn(move || {
        sender.send(nix::unistd::gettid().as_raw()).unwrap();
        let _ = ended.recv();
    });
    (id.recv().unwrap(), end)
}

/// Makes this process's mount namespace, which [`script`] has made, look like a guest's, with the share where a guest
/// has it.
fn make_guest_of_namespace(directory: &Path, share: &OwnedFd) {
    let none = None::<&str>;
    let run = directory.join("run");
    fs::create_dir(&run).unwrap();
    mount(Some("run"), &run, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let guest_share = run.join(Path::new(GUEST_SHARE).strip_prefix("/run").unwrap());
    fs::create_dir_all(&guest_share).unwrap();
    mount(Some(&run), "/run", none, MsFlags::MS_BIND | MsFlags::MS_REC, none).unwrap();
    katana_protocol::mount::attach_mount_at(share, Path::new(GUEST_SHARE)).unwrap();
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none).unwrap();
}

/// The agent as the first process of its own pid namespace, so that all of its containers end with it.
fn start_agent(directory: &Path) -> Child {
    let flags = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWPID;
    unshare(flags).unwrap();
    let none = None::<&str>;
    let mut command = Command::new(agent());
    command.arg("serve").arg(directory);
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            keep_the_clock()
        });
    }
    command.spawn().unwrap()
}

/// The agent sets its guest's clock, which here is that of the machine: the system call does nothing.
fn keep_the_clock() -> std::io::Result<()> {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let number = libc::SYS_clock_settime as u32;
    let mut filter = [
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: number,
        },
        statement((libc::BPF_RET | libc::BPF_K) as u16, libc::SECCOMP_RET_ERRNO),
        statement((libc::BPF_RET | libc::BPF_K) as u16, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a filter program that outlives the call.
    let done =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program, 0, 0) };
    nix::errno::Errno::result(done)?;
    Ok(())
}
