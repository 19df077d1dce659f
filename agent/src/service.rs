//! The agent's ttrpc service: messages in, calls to containers and processes, errors out as codes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use katana_protocol::AGENT_PORT;
use katana_protocol::agent::{
    self, Agent, Changes, ContainerRequest, ContainerStatsResponse, CreateContainerRequest,
    CreateContainerResponse, CreateSandboxRequest, Empty, ExecProcessRequest, ExecProcessResponse,
    ForwardPortRequest, GuestStatsResponse, ListProcessesResponse, MountChanges, Network, OomResponse,
    ProcessRequest, ReleaseDiskRequest, ResizeTerminalRequest, SetCpusRequest, SignalProcessRequest, Stdio,
    UpdateContainerRequest, WaitProcessResponse, create_agent,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::boot::{self, Never};
use crate::container;
use crate::device_filter;
use crate::disks;
use crate::execs;
use crate::guest_stats;
use crate::huge_pages;
use crate::init::control::Kind;
use crate::launch::Spares;
use crate::process;
use crate::reaper::Reaper;
use crate::sandbox::{self, Sandbox, Settings};
use crate::start_error::StartError;
use crate::stream::Stream;
use crate::streams::Ports;
use crate::transport::Transport;
use crate::{cgroup, cpus, init};

/// Pause before the next try after the host refused a connection.
const RECONNECT: Duration = Duration::from_secs(1);

/// Serves the host for ever.
pub fn serve(transport: &Transport) -> Result<Never, StartError> {
    nix::sys::prctl::set_child_subreaper(true).map_err(|e| StartError::new("become a subreaper", &e))?;
    init::prepare().map_err(|e| StartError::new("make the mount point of containers", &e))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| StartError::new("start", &e))?.block_on(run(transport.clone()))
}

async fn run(transport: Transport) -> Result<Never, StartError> {
    let reaper = Reaper::default();
    let spares = Spares::default();
    let sandbox = Arc::new(Sandbox::new(transport.clone(), reaper.clone(), spares.clone()));
    if transport.is_guest() {
        // Without them, processes are started when they are asked for.
        if let Err(error) = spares.prepare(SPARES) {
            log::warn!("{error}");
        }
        boot::ready();
    }
    let first = first_connection(&transport).await;
    let first = first.map_err(|e| StartError::new(format!("connect to the host's port {AGENT_PORT}"), &e))?;
    let service = create_agent(Arc::new(Service { sandbox }));
    let mut server = Server::new().register_service(service).add_listener(connections(transport, first));
    server.start().await.map_err(|e| StartError::new("start the service", &e))?;
    reaper.run().await.map_err(|e| StartError::new("collect children", &e))
}

/// Processes to start ahead: for a pod's sandbox container and its first container.
const SPARES: usize = 2;

/// A guest that comes from a template learns its new vsock context id about now, which ends what it was connecting.
async fn first_connection(transport: &Transport) -> io::Result<Stream> {
    match transport.connect(AGENT_PORT).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => transport.connect(AGENT_PORT).await,
        first => first,
    }
}

/// The connection to the host, and a new one whenever it has ended. The agent connects and then is the server: the
/// host does not have to try until the guest is up.
fn connections(transport: Transport, first: Stream) -> Listener {
    let one_at_a_time = Arc::new(Semaphore::new(1));
    Listener::new(futures::stream::unfold(Some(first), move |first| {
        let (transport, one_at_a_time) = (transport.clone(), one_at_a_time.clone());
        async move {
            let alive = one_at_a_time.acquire_owned().await.ok()?;
            let stream = match first {
                Some(first) => first,
                None => reconnect(&transport).await,
            };
            Some((Ok(Connection { stream, _alive: alive }), None))
        }
    }))
}

async fn reconnect(transport: &Transport) -> Stream {
    loop {
        match transport.connect(AGENT_PORT).await {
            Ok(stream) => return stream,
            Err(error) => log::warn!("connect to the host's port {AGENT_PORT}: {error}"),
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

/// A connection to the host that lets the next one be made when it is dropped.
struct Connection {
    stream: Stream,
    _alive: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Service {
    sandbox: Arc<Sandbox>,
}

/// The one place that turns errors into codes.
fn status(error: &sandbox::Error) -> ttrpc::Error {
    use container::Error as C;
    use process::Error as P;
    let code = match error {
        sandbox::Error::NoContainer(_) => Code::NOT_FOUND,
        sandbox::Error::ContainerExists(_) => Code::ALREADY_EXISTS,
        sandbox::Error::BadId(_) | sandbox::Error::Key(_) => Code::INVALID_ARGUMENT,
        sandbox::Error::Guest(..) | sandbox::Error::Network(_) | sandbox::Error::Names(_) => Code::INTERNAL,
        sandbox::Error::Port(..) => Code::UNAVAILABLE,
        sandbox::Error::Container(error) => match error {
            C::Parse(_) | C::Invalid(_) | C::Seccomp(_) => Code::INVALID_ARGUMENT,
            C::Cgroup(cgroup::Error::Invalid(_)) | C::Devices(device_filter::Error::Rule(..)) => {
                Code::INVALID_ARGUMENT
            }
            C::Cgroup(cgroup::Error::InUse(_)) | C::Execs(execs::Error::Exists(_)) => Code::ALREADY_EXISTS,
            C::Execs(execs::Error::NoId) => Code::INVALID_ARGUMENT,
            C::Acls(_) => Code::FAILED_PRECONDITION,
            C::HugePages(huge_pages::Error::Size(_)) => Code::INVALID_ARGUMENT,
            C::HugePages(huge_pages::Error::Memory { .. }) => Code::RESOURCE_EXHAUSTED,
            C::Cgroup(_) | C::Devices(_) | C::Disks(_) | C::HugePages(_) | C::Sockets(_) => Code::INTERNAL,
            C::Execs(execs::Error::NoProcess(_)) | C::Process(P::Finished) => Code::NOT_FOUND,
            C::Execs(execs::Error::Running) | C::State(_) | C::Process(P::NoTerminal) => {
                Code::FAILED_PRECONDITION
            }
            C::Process(P::Signal(..)) => Code::INVALID_ARGUMENT,
            C::Process(error) => match error.failure().map(|failure| failure.kind) {
                Some(Kind::NotFound) => Code::NOT_FOUND,
                Some(Kind::PermissionDenied) => Code::PERMISSION_DENIED,
                Some(Kind::Invalid) => Code::INVALID_ARGUMENT,
                Some(Kind::Internal) | None => Code::INTERNAL,
            },
        },
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
}

fn container_status(error: container::Error) -> ttrpc::Error {
    status(&error.into())
}

fn process_status(error: process::Error) -> ttrpc::Error {
    container_status(error.into())
}

fn ports(stdio: Option<&Stdio>) -> Ports {
    stdio.map_or(Ports::default(), |s| Ports {
        stdin: s.stdin_port,
        stdout: s.stdout_port,
        stderr: s.stderr_port,
    })
}

/// Runs what must not stop halfway when the connection to the host ends.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> ttrpc::Result<T> {
    tokio::spawn(work).await.map_err(|e| ttrpc::Error::Others(e.to_string()))
}

#[async_trait]
impl Agent for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        let CreateSandboxRequest { hostname, clock_ns, entropy, share_tag, network, shm_bytes, .. } = request;
        self.sandbox.set_key(&request.stream_key).map_err(|e| status(&e))?;
        let settings = Settings { hostname, clock_ns, entropy, share_tag, shm_bytes };
        sandbox::configure(&settings).map_err(|e| status(&e))?;
        match network.into_option() {
            Some(network) => self.set_network(network).await,
            None => Ok(Empty::new()),
        }
    }

    async fn update_network(&self, _: &TtrpcContext, network: Network) -> ttrpc::Result<Empty> {
        self.set_network(network).await
    }

    async fn forward_port(&self, _: &TtrpcContext, request: ForwardPortRequest) -> ttrpc::Result<Empty> {
        self.sandbox.forward(request.port, request.host_port).await.map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let sandbox = self.sandbox.clone();
        let create = async move {
            let wanted = container::Request {
                id: &request.container_id,
                spec: &request.spec,
                ports: ports(request.stdio.as_ref()),
                pause: request.pause,
                disks: request.disks,
                sockets: request.sockets,
                mounts: request.mounts,
            };
            sandbox.create(wanted).await.map_err(|e| status(&e))
        };
        let container = to_the_end(create).await??;
        let pid = container.process("").map_err(container_status)?.pid();
        Ok(CreateContainerResponse { pid: pid.as_raw().cast_unsigned(), ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        to_the_end(async move { container.start().await.map_err(container_status) }).await??;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.remove(&request.container_id).await.map_err(|e| status(&e)) })
            .await??;
        Ok(Empty::new())
    }

    async fn follow_mounts(&self, _: &TtrpcContext, request: MountChanges) -> ttrpc::Result<Empty> {
        self.sandbox.follow_mounts(request.come, request.gone).await;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.container(&request.container_id)?.pause().await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.container(&request.container_id)?.resume().await.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        // Others are served meanwhile: who is not heard for a few seconds is taken for silent.
        let updated = tokio::task::spawn_blocking(move || container.update(&request.resources)).await;
        let updated = updated.map_err(|e| ttrpc::Error::Others(e.to_string()))?;
        updated.map_err(container_status)?;
        Ok(Empty::new())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let files = self.container(&request.container_id)?.statistics();
        Ok(ContainerStatsResponse { files, ..Default::default() })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = match request.container_id.as_str() {
            "" => self.sandbox.guest().processes(),
            id => self.container(id)?.processes().map_err(container_status)?,
        };
        let message = |(pid, exec_id): (nix::unistd::Pid, String)| agent::list_processes_response::Process {
            pid: pid.as_raw().cast_unsigned(),
            exec_id,
            ..Default::default()
        };
        Ok(ListProcessesResponse {
            processes: processes.into_iter().map(message).collect(),
            ..Default::default()
        })
    }

    async fn guest_stats(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<GuestStatsResponse> {
        let sandbox = self.sandbox.clone();
        // The kernel takes its time for some of them, and others are served meanwhile.
        let read = move || (guest_stats::files(), guest_stats::open_descriptors(), sandbox.used());
        let read = tokio::task::spawn_blocking(read).await;
        let (files, open_descriptors, (containers_cpu_us, containers_memory_bytes)) =
            read.map_err(|e| ttrpc::Error::Others(e.to_string()))?;
        Ok(GuestStatsResponse {
            files,
            open_descriptors,
            containers_cpu_us,
            containers_memory_bytes,
            ..Default::default()
        })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let sandbox = self.sandbox.clone();
        let exec = async move {
            let ports = ports(request.stdio.as_ref());
            let (id, process) = (&request.exec_id, &request.process);
            let started = match request.container_id.as_str() {
                "" => sandbox.guest().exec(id, process, ports).await,
                container => {
                    let container = sandbox.container(container).map_err(|e| status(&e))?;
                    container.exec(id, process, ports, request.copies).await
                }
            };
            started.map_err(container_status)
        };
        let pid = to_the_end(exec).await??;
        Ok(ExecProcessResponse { pid: pid.as_raw().cast_unsigned(), ..Default::default() })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        if request.all && request.container_id.is_empty() {
            self.sandbox.guest().kill(&request.exec_id).map_err(container_status)?;
        } else if request.all {
            let container = self.container(&request.container_id)?;
            container.signal_all(request.signal).map_err(container_status)?;
        } else {
            let process = self.process(&request.container_id, &request.exec_id)?;
            process.ready_for(request.signal).await;
            process.signal(request.signal).map_err(process_status)?;
        }
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process.resize(request.columns, request.rows).map_err(process_status)?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let end = self.process(&request.container_id, &request.exec_id)?.wait();
        // The sender is gone without a word only if the agent itself goes.
        let exit = end.await.ok_or_else(|| ttrpc::Error::Others("the agent ends".to_owned()))?;
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
            ..Default::default()
        })
    }

    async fn remove_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        if request.container_id.is_empty() {
            let sandbox = self.sandbox.clone();
            let remove = async move { sandbox.guest().remove(&request.exec_id).await };
            to_the_end(remove).await?.map_err(container_status)?;
        } else {
            let container = self.container(&request.container_id)?;
            container.remove_process(&request.exec_id).map_err(container_status)?;
        }
        Ok(Empty::new())
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: SetCpusRequest) -> ttrpc::Result<Empty> {
        // It takes a while, and others are served meanwhile.
        let set = tokio::task::spawn_blocking(move || cpus::set(request.count)).await;
        let set = set.map_err(io::Error::other).and_then(|set| set);
        set.map_err(|e| status(&sandbox::Error::Guest("CPUs".to_owned(), e)))?;
        Ok(Empty::new())
    }

    async fn release_disk(&self, _: &TtrpcContext, request: ReleaseDiskRequest) -> ttrpc::Result<Empty> {
        let released =
            tokio::task::spawn_blocking(move || disks::release(request.slot, request.volatile)).await;
        let released = released.map_err(|e| ttrpc::Error::Others(e.to_string()))?;
        released.map_err(|e| container_status(e.into()))?;
        Ok(Empty::new())
    }

    async fn replay_changes(&self, _: &TtrpcContext, request: Changes) -> ttrpc::Result<Empty> {
        self.sandbox.replay(request.changes).await.map_err(|e| status(&e))?;
        Ok(Empty::new())
    }

    async fn next_oom(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<OomResponse> {
        let container_id = self.sandbox.next_oom().await.map_err(|e| status(&e))?;
        Ok(OomResponse { container_id, ..Default::default() })
    }
}

impl Service {
    async fn set_network(&self, network: Network) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox.clone();
        to_the_end(async move { sandbox.set_network(&network).await.map_err(|e| status(&e)) }).await??;
        Ok(Empty::new())
    }

    fn container(&self, id: &str) -> ttrpc::Result<Arc<container::Container>> {
        self.sandbox.container(id).map_err(|e| status(&e))
    }

    fn process(&self, container_id: &str, exec_id: &str) -> ttrpc::Result<Arc<process::Process>> {
        let process = match container_id {
            "" => self.sandbox.guest().process(exec_id),
            id => self.container(id)?.process(exec_id),
        };
        process.map_err(container_status)
    }
}
