//! What containerd does: a bundle, `start`, a connection, a place for events, `delete`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, ForwardRequest, KillRequest,
    ShutdownRequest, StartRequest, StateRequest, StateResponse, WaitRequest,
};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit};
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Client, Server, TtrpcContext};
use ttrpc::context::{Context, with_duration};

use crate::stand_in;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-kata-v2");

/// One containerd with one pod.
pub struct Containerd {
    pub directory: PathBuf,
    pub client: TaskClient,
    pub address: String,
    id: String,
    events: Arc<Mutex<Vec<(String, Value)>>>,
    _server: Server,
}

struct Collector(Arc<Mutex<Vec<(String, Value)>>>);

#[async_trait]
impl Events for Collector {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = &request.envelope.event;
        let details = match event.type_url.as_str() {
            "containerd.events.TaskExit" => {
                let exit = TaskExit::parse_from_bytes(&event.value).unwrap();
                json!({"id": exit.id, "status": exit.exit_status})
            }
            "containerd.events.TaskExecStarted" => {
                json!(TaskExecStarted::parse_from_bytes(&event.value).unwrap().exec_id)
            }
            _ => Value::Null,
        };
        self.0.lock().unwrap().push((request.envelope.topic.clone(), details));
        Ok(Empty::new())
    }
}

/// A static busybox, from scripts/unpack-busybox.
const BUSYBOX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/busybox");

/// After how long something counts as hung. No test measures anything with it.
pub const HANG: Duration = Duration::from_secs(180);

pub fn ctx() -> Context {
    with_duration(HANG)
}

/// Whether the tests of this file can run here. If not, that is said past the test runner, for tests/all to count.
pub fn can_run() -> bool {
    assert!(nix::unistd::geteuid().is_root(), "these tests start shims: they have to run as root");
    assert!(Path::new(BUSYBOX).exists(), "`make unit` unpacks busybox to target/");
    assert!(stand_in::agent().exists(), "there is no kata-agent: cargo build -p kata-agent");
    let can = Path::new("/dev/kvm").exists();
    if !can {
        say_skipped("the shim opens /dev/kvm, and there is none");
    }
    can
}

pub fn say_skipped(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}

impl Containerd {
    /// Starts a shim for a container of this name, which must be of this test alone.
    pub async fn start(name: &str) -> Self {
        Self::start_with(name, "").await
    }

    /// As [`Containerd::start`], with further kernel parameters, of which the stand-in knows some. With "console=on", the
    /// host's tools may run programs in the guest.
    pub async fn start_with(name: &str, kernel_params: &str) -> Self {
        Self::start_as(name, kernel_params, false).await
    }

    /// As containerd 2 starts a shim that is a sandbox: there is no specification, and options come with `start` only.
    pub async fn start_sandbox(name: &str) -> Self {
        Self::start_as(name, "", true).await
    }

    async fn start_as(name: &str, kernel_params: &str, sandbox: bool) -> Self {
        let directory = std::env::temp_dir().join(format!("katana-task-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        configure(&directory, kernel_params);
        let events = Arc::new(Mutex::default());
        let socket = UnixListener::bind(directory.join("ttrpc")).unwrap();
        let service = create_events(Arc::new(Collector(Arc::clone(&events))));
        let mut server =
            Server::new().add_listener(Listener::try_from(socket).unwrap()).register_service(service);
        server.start().await.unwrap();
        let id = format!("{name}-{}", std::process::id());
        let bundle = bundle(&directory, &id, &json!({}));
        let address = if sandbox {
            fs::remove_file(bundle.join("config.json")).unwrap();
            let options = options(&directory).write_to_bytes().unwrap();
            let output = shim_of(&directory, &bundle, &id, "start", &options);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!((answer["version"].as_u64(), answer["protocol"].as_str()), (Some(3), Some("ttrpc")));
            answer["address"].as_str().unwrap().to_owned()
        } else {
            let output = shim(&directory, &bundle, &id, "start");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        let client = TaskClient::new(Client::connect(&address).await.unwrap());
        Self { directory, client, address, id, events, _server: server }
    }

    pub fn id(&self) -> String {
        self.id.clone()
    }

    pub fn bundle(&self) -> PathBuf {
        self.directory.join(&self.id)
    }

    /// Another container of the pod.
    pub fn add_bundle(&self, id: &str, changes: &Value) -> PathBuf {
        bundle(&self.directory, id, changes)
    }

    /// Replaces parts of the specification.
    pub fn configure_container(&self, changes: &Value) {
        bundle(&self.directory, &self.id, changes);
    }

    /// A Create request with streams in files.
    pub fn create_request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id(),
            bundle: self.bundle().to_str().unwrap().into(),
            stdout: format!("file://{}", self.directory.join("out").display()),
            stderr: format!("file://{}", self.directory.join("err").display()),
            options: Some(self.options()).into(),
            ..Default::default()
        }
    }

    /// `ctr run --runtime-config-path`
    pub fn options(&self) -> Any {
        options(&self.directory)
    }

    /// Runs the container with `sh -c script` up to its start.
    pub async fn run(&self, script: &str) {
        self.configure_container(&json!({"process": {"args": ["sh", "-c", script]}}));
        self.client.create(ctx(), &self.create_request()).await.unwrap();
        self.client.start(ctx(), &StartRequest { id: self.id(), ..Default::default() }).await.unwrap();
    }

    pub async fn exec(&self, exec_id: &str, script: &str) -> ttrpc::Result<()> {
        let args = json!(["sh", "-c", script]);
        let process = json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
        self.client.exec(ctx(), &self.exec_request(exec_id, &process)).await?;
        self.start_exec(exec_id).await
    }

    pub fn exec_request(&self, exec_id: &str, process: &Value) -> ExecProcessRequest {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        ExecProcessRequest {
            id: self.id(),
            exec_id: exec_id.into(),
            spec: Some(spec).into(),
            stdout: format!("file://{}", self.directory.join(exec_id).display()),
            ..Default::default()
        }
    }

    pub async fn start_exec(&self, exec_id: &str) -> ttrpc::Result<()> {
        let request = StartRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        self.client.start(ctx(), &request).await.map(drop)
    }

    pub async fn wait(&self, exec_id: &str) -> u32 {
        let request = WaitRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        self.client.wait(ctx(), &request).await.unwrap().exit_status
    }

    pub async fn kill(&self, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest { id: self.id(), exec_id: exec_id.into(), signal, ..Default::default() };
        self.client.kill(ctx(), &request).await.map(drop)
    }

    pub async fn state(&self, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        self.client.state(ctx(), &request).await
    }

    pub async fn delete(&self, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        self.client.delete(ctx(), &request).await
    }

    /// Ends a container that runs, and its shim.
    pub async fn end(&self) {
        self.kill("", 9).await.unwrap();
        self.wait("").await;
        self.delete("").await.unwrap();
        self.shut_down().await;
    }

    /// Shutdown, until the shim is gone.
    pub async fn shut_down(&self) {
        let _ = self.client.shutdown(ctx(), &ShutdownRequest { id: self.id(), ..Default::default() }).await;
        let socket = PathBuf::from(self.address.strip_prefix("unix://").unwrap());
        eventually(|| !socket.exists()).await;
    }

    pub fn file(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap()
    }

    /// The topics so far, with the details of some.
    pub fn events(&self) -> Vec<(String, Value)> {
        self.events.lock().unwrap().clone()
    }

    pub fn topics(&self) -> Vec<String> {
        self.events().into_iter().map(|(topic, _)| topic.trim_start_matches("/tasks/").to_owned()).collect()
    }

    /// containerd's `delete`.
    pub fn delete_action(&self) -> DeleteResponse {
        let output = shim(&self.directory, &self.bundle(), &self.id, "delete");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// What of this pod is on the host: directories, mounts, sockets.
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        for directory in ["/run/kata-containers/sandboxes", "/run/kata-containers/shared/sandboxes"] {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            traces.extend(
                entries
                    .map(|entry| entry.path().display().to_string())
                    .filter(|path| path.contains(&self.id)),
            );
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        traces.extend(mounts.lines().filter(|line| line.contains(&self.id)).map(str::to_owned));
        let socket = self.address.strip_prefix("unix://").unwrap();
        traces.extend(Path::new(socket).exists().then(|| socket.to_owned()));
        traces
    }

    /// The pid of the shim.
    pub async fn shim_pid(&self) -> i32 {
        let request = containerd_shim_protos::api::ConnectRequest { id: self.id(), ..Default::default() };
        i32::try_from(self.client.connect(ctx(), &request).await.unwrap().shim_pid).unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let output = shim(&self.directory, &self.bundle(), &self.id, "delete");
        if !std::thread::panicking() {
            assert!(output.status.success());
            assert_eq!(self.traces(), Vec::<String>::new());
        }
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// `ctr run --runtime-config-path`, and ConfigPath of a handler
fn options(directory: &Path) -> Any {
    let path = directory.join("configuration.toml");
    let path = path.to_str().unwrap();
    let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
    value.extend(path.as_bytes());
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() }
}

/// Runs the shim as containerd does: in the bundle, with a pipe for what it says.
pub fn shim(directory: &Path, bundle: &Path, id: &str, action: &str) -> Output {
    shim_of(directory, bundle, id, action, b"")
}

/// Likewise, with options on standard input. containerd 2.1 announces the same version.
fn shim_of(directory: &Path, bundle: &Path, id: &str, action: &str, input: &[u8]) -> Output {
    let mut command = Command::new(SHIM);
    command.args(["-namespace", "test", "-publish-binary", "/bin/true", "-id", id, "-address"]);
    command.arg(directory.join("containerd.sock")).arg("-debug").arg(action);
    command.env("TTRPC_ADDRESS", directory.join("ttrpc")).env("MAX_SHIM_VERSION", "2").current_dir(bundle);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A `delete` does not read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Waits for something that must come soon.
pub async fn eventually(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < HANG, "it does not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn code_and_text(error: ttrpc::Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

fn configure(directory: &Path, kernel_params: &str) {
    let vmm = stand_in::script(directory);
    let (kernel, image) = (directory.join("kernel"), directory.join("image"));
    fs::write(&kernel, b"\x7fELF, a kernel").unwrap();
    let mut erofs = vec![0; 4096];
    erofs[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
    fs::write(&image, erofs).unwrap();
    // Long enough for any host, but where the agent is not to come.
    let dial_timeout = if kernel_params == "fail=silent" { 3 } else { 60 };
    let console = kernel_params == "console=on";
    let text = format!(
        "[hypervisor.katana]\npath = {vmm:?}\nkernel = {kernel:?}\nimage = {image:?}\nkernel_params = {kernel_params:?}\n\
         [agent.kata]\ndial_timeout = {dial_timeout}\ndebug_console_enabled = {console}\n[factory]\nenable_template = false\n"
    );
    fs::write(directory.join("configuration.toml"), text).unwrap();
}

/// A bundle with busybox as its root and a specification, of which `changes` replaces members.
fn bundle(directory: &Path, id: &str, changes: &Value) -> PathBuf {
    static LOGS: AtomicU32 = AtomicU32::new(0);
    let bundle = directory.join(id);
    let bin = bundle.join("rootfs/bin");
    if !bundle.exists() {
        for path in ["rootfs/bin", "rootfs/proc", "rootfs/dev", "rootfs/sys", "rootfs/tmp"] {
            fs::create_dir_all(bundle.join(path)).unwrap();
        }
        fs::copy(BUSYBOX, bin.join("busybox")).unwrap();
        for applet in
            ["sh", "cat", "sleep", "echo", "id", "dd", "sha256sum", "stty", "head", "hostname", "ls"]
        {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        relay_log(&bundle.join("log"), LOGS.fetch_add(1, Ordering::Relaxed));
    }
    let namespaces: Vec<_> = ["mount", "pid", "ipc", "uts", "cgroup", "network"]
        .iter()
        .map(|kind| json!({"type": kind}))
        .collect();
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
                    "capabilities": {"bounding": [], "effective": [], "permitted": []}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                   {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}],
        "linux": {"namespaces": namespaces, "cgroupsPath": format!("/katana-test/{id}")}
    });
    merge(&mut spec, changes);
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    bundle
}

/// What the shim logs is seen when a test fails.
fn relay_log(fifo: &Path, number: u32) {
    let mut reader = fs::File::options().read(true).write(true).open(fifo).unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 4096];
        while let Ok(count) = reader.read(&mut buffer) {
            eprint!("[{number}] {}", String::from_utf8_lossy(&buffer[..count]));
        }
    });
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}
