//! The agent's service on this machine: the real binary as `kata-agent serve`, in a mount namespace of its own, with
//! Unix sockets in place of vsock, and a root file system of busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use katana_protocol::agent::{
    AgentClient, ContainerRequest, CreateContainerRequest, ExecProcessRequest, ProcessRequest,
    SignalProcessRequest, Stdio, WaitProcessResponse,
};
use katana_protocol::{AGENT_PORT, FIRST_STREAM_PORT};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

pub type Error = ttrpc::Error;

/// A static busybox, from scripts/unpack-busybox.
const BUSYBOX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/busybox");

/// One agent with a root file system.
pub struct Guest {
    pub directory: PathBuf,
    pub client: AgentClient,
    agent: Child,
    listener: UnixListener,
    next_port: AtomicU32,
}

/// What a process wrote and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

/// What a copy wrote and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Copied {
    pub status: u32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// The host's end of a process's streams.
pub struct Streams {
    pub ports: Stdio,
    pub stdin: Option<JoinHandle<UnixStream>>,
    pub stdout: JoinHandle<Vec<u8>>,
    pub stderr: Option<JoinHandle<Vec<u8>>>,
}

pub fn ctx() -> Context {
    context::with_duration(Duration::from_secs(180))
}

impl Guest {
    pub async fn new(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make containers: they have to run as root");
        let directory = std::env::temp_dir().join(format!("kata-agent-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        make_rootfs(&directory.join("rootfs"));
        let listener = UnixListener::bind(directory.join(format!("{AGENT_PORT}.sock"))).unwrap();
        let agent = start_agent(&directory);
        let (connection, _) = listener.accept().await.unwrap();
        let client = AgentClient::new(Client::new(Socket::new(connection)));
        Self { directory, client, agent, listener, next_port: AtomicU32::new(FIRST_STREAM_PORT) }
    }

    /// Waits until a container has made /tmp/ready.
    pub async fn until_ready(&self) {
        while !self.rootfs().join("tmp/ready").exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The agent's own /run.
    pub fn run_directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/run", self.agent.id()))
    }

    /// How often the agent has woken up so far.
    pub fn wakeups(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse().unwrap()
    }

    /// Hangs up and takes the agent's next connection.
    pub async fn reconnect(&mut self) {
        let (old, _) = UnixStream::pair().unwrap();
        self.client = AgentClient::new(Client::new(Socket::new(old)));
        let (connection, _) = self.listener.accept().await.unwrap();
        self.client = AgentClient::new(Client::new(Socket::new(connection)));
    }

    pub fn agent_pid(&self) -> u32 {
        self.agent.id()
    }

    pub fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// What containerd writes for `ctr run`, without a seccomp profile.
    pub fn spec(&self, arguments: &[&str]) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": self.rootfs()},
            "hostname": "box",
            "process": self.process(arguments),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/c", self.directory.file_name().unwrap().display()),
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                    {"type": "network"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore", "/proc/acpi", "/sys/firmware", "/proc/latency_stats"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }

    pub fn process(&self, arguments: &[&str]) -> Value {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
            "CAP_AUDIT_WRITE"
        ]);
        json!({
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/bin:/usr/bin", "GREETING=hello"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        })
    }

    /// Listens for the streams of a process.
    pub fn streams(&self, stdin: bool, stderr: bool) -> Streams {
        let listen = || {
            let port = self.next_port.fetch_add(1, Ordering::Relaxed);
            (port, UnixListener::bind(self.directory.join(format!("{port}.sock"))).unwrap())
        };
        let read = |listener: UnixListener| {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                if let Ok((mut stream, _)) = listener.accept().await {
                    stream.read_to_end(&mut bytes).await.unwrap();
                }
                bytes
            })
        };
        let (stdout_port, stdout) = listen();
        let mut ports = Stdio { stdout_port, ..Default::default() };
        let stdin = stdin.then(|| {
            let (port, listener) = listen();
            ports.stdin_port = port;
            tokio::spawn(async move { listener.accept().await.unwrap().0 })
        });
        let stderr = stderr.then(|| {
            let (port, listener) = listen();
            ports.stderr_port = port;
            read(listener)
        });
        Streams { ports, stdin, stdout: read(stdout), stderr }
    }

    pub async fn create(&self, id: &str, spec: &Value, stdio: &Stdio) -> Result<u32, Error> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(spec).unwrap(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        Ok(self.client.create_container(ctx(), &request).await?.pid)
    }

    /// Creates the container of a pod: it runs the agent's pause.
    pub async fn create_pause(&self, id: &str, spec: &Value) -> Result<u32, Error> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(spec).unwrap(),
            pause: true,
            ..Default::default()
        };
        Ok(self.client.create_container(ctx(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str) -> Result<(), Error> {
        self.client.start_container(ctx(), &container(id)).await.map(drop)
    }

    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value, stdio: &Stdio) -> Result<u32, Error> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        Ok(self.client.exec_process(ctx(), &request).await?.pid)
    }

    /// Copies files of a container.
    pub async fn copy(&self, id: &str, asked: &Value, input: Option<&[u8]>) -> Copied {
        let mut streams = self.streams(input.is_some(), true);
        let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID"]);
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": [asked.to_string()],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        });
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: "copy".to_owned(),
            process: serde_json::to_vec(&process).unwrap(),
            stdio: Some(streams.ports.clone()).into(),
            copies: true,
            ..Default::default()
        };
        self.client.exec_process(ctx(), &request).await.unwrap();
        if let Some(input) = input {
            feed(streams.stdin.take().unwrap(), input).await;
        }
        let exit = self.wait(id, "copy").await;
        let (stdout, stderr) = (streams.stdout.await.unwrap(), streams.stderr.unwrap().await.unwrap());
        self.client.remove_process(ctx(), &self::process(id, "copy")).await.unwrap();
        Copied { status: exit.exit_status, stdout, stderr: String::from_utf8(stderr).unwrap() }
    }

    /// A wait that does not hold on to this guest.
    pub fn wait_later(
        &self,
        id: &str,
        exec_id: &str,
    ) -> impl Future<Output = Option<WaitProcessResponse>> + 'static {
        let (client, request) = (self.client.clone(), process(id, exec_id));
        async move { client.wait_process(ctx(), &request).await.ok() }
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> WaitProcessResponse {
        self.client.wait_process(ctx(), &process(id, exec_id)).await.unwrap()
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal_process(ctx(), &request).await.map(drop)
    }

    pub async fn remove(&self, id: &str) {
        self.client.remove_container(ctx(), &container(id)).await.unwrap();
    }

    /// Creates, starts, waits for and removes a container.
    pub async fn run(&self, spec: &Value) -> Result<Output, Error> {
        let streams = self.streams(false, true);
        self.create("c", spec, &streams.ports).await?;
        let started = self.start("c").await;
        let output = if started.is_ok() { Some(self.finish("c", "", streams).await) } else { None };
        self.remove("c").await;
        started.map(|()| output.unwrap())
    }

    /// Runs an exec in a container.
    pub async fn run_exec(&self, id: &str, exec_id: &str, process: &Value) -> Result<Output, Error> {
        let streams = self.streams(false, process["terminal"] != true);
        self.exec(id, exec_id, process, &streams.ports).await?;
        Ok(self.finish(id, exec_id, streams).await)
    }

    async fn finish(&self, id: &str, exec_id: &str, streams: Streams) -> Output {
        let exit = self.wait(id, exec_id).await;
        let stdout = streams.stdout.await.unwrap();
        let stderr = match streams.stderr {
            Some(stderr) => stderr.await.unwrap(),
            None => Vec::new(),
        };
        assert_eq!((exit.stdout_bytes, exit.stderr_bytes), (stdout.len() as u64, stderr.len() as u64));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output { status: exit.exit_status, stdout: text(stdout), stderr: text(stderr) }
    }

    /// Runs a shell script in a container; it has to succeed.
    pub async fn shell(&self, script: &str) -> String {
        self.shell_with(script, |_| ()).await
    }

    /// The same after a change to the specification.
    pub async fn shell_with(&self, script: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut spec = self.spec(&["sh", "-c", script]);
        change(&mut spec);
        let output = self.run(&spec).await.unwrap();
        assert_eq!(output.status, 0, "{script}: {output:?}");
        output.stdout
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let cgroup = Path::new("/sys/fs/cgroup");
        for root in [cgroup.to_owned(), cgroup.join("unified")] {
            let of_test = root.join(self.directory.file_name().unwrap());
            let _ = fs::write(of_test.join("cgroup.kill"), "1");
            // The dead leave in their own time.
            for _ in 0..100 {
                for container in ["c", "d"] {
                    let _ = fs::remove_dir(of_test.join(container));
                }
                if fs::remove_dir(&of_test).is_ok() || !of_test.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

pub fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..Default::default() }
}

pub fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

/// The code and the text of an error.
pub fn status(error: Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code.enum_value().unwrap(), status.message),
        other => panic!("not a status: {other}"),
    }
}

/// Writes everything to a process's standard input and closes it.
pub async fn feed(stdin: JoinHandle<UnixStream>, bytes: &[u8]) {
    let mut stream = stdin.await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    // The agent hangs up once the process has it all.
    let _ = stream.read(&mut [0]).await;
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "etc", "tmp", "root", "home", "dev", "proc", "sys"] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).expect("`make unit` unpacks busybox to target/");
    let list = Command::new(BUSYBOX).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    fs::set_permissions(rootfs.join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
}

fn start_agent(directory: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kata-agent"));
    command.arg("serve").arg(directory);
    let shared = directory.join("shared");
    fs::create_dir(&shared).unwrap();
    let hybrid = !Path::new("/sys/fs/cgroup/cgroup.procs").exists();
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let none = None::<&str>;
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
            // A volume whose mounts spread, like the guest's share.
            mount(Some("tmpfs"), &shared, Some("tmpfs"), MsFlags::empty(), none)?;
            mount(none, &shared, none, MsFlags::MS_SHARED, none)?;
            // Where the guest has it; hybrid hosts have it elsewhere.
            if !hybrid {
                return Ok(());
            }
            Ok(mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none)?)
        });
    }
    command.spawn().unwrap()
}
