//! The agent is this test, and means no good.

use super::*;
use crate::host::events::Publisher;
use crate::machine::members::Members;
use async_trait::async_trait;
use futures::StreamExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

/// What it answers depends on the container that it is asked about.
#[derive(Default)]
struct Hostile {
    /// Requests that came.
    count: Arc<AtomicUsize>,
}

#[async_trait]
impl api::Agent for Hostile {
    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ContainerStatsResponse> {
        self.count.fetch_add(1, Ordering::Relaxed);
        let file = |text: &str| [("memory.stat".to_owned(), text.to_owned())].into_iter().collect();
        let files = match request.container_id.as_str() {
            "silent" => std::future::pending().await,
            "long" => file(&"x".repeat(1 << 20)),
            "terminal" => file("\x1b[2J 1"),
            _ => file("anon 1\n"),
        };
        Ok(api::ContainerStatsResponse { files, ..Default::default() })
    }

    async fn guest_stats(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::GuestStatsResponse> {
        match self.count.fetch_add(1, Ordering::Relaxed) {
            0 => std::future::pending().await,
            1 => {
                let files = [("meminfo".to_owned(), "x".repeat(1 << 20))].into_iter().collect();
                Ok(api::GuestStatsResponse { files, ..Default::default() })
            }
            _ => Ok(api::GuestStatsResponse::default()),
        }
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ListProcessesResponse> {
        let pid = if request.container_id == "zero" { 0 } else { 1 };
        let process = api::list_processes_response::Process { pid, ..Default::default() };
        let processes = vec![process; MOST_PROCESSES + 10];
        Ok(api::ListProcessesResponse { processes, ..Default::default() })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        _: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::ExecProcessResponse> {
        Ok(api::ExecProcessResponse { pid: u32::MAX, ..Default::default() })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        _: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        std::future::pending().await
    }

    async fn pause_container(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        let text = format!("no\x1b[31m\n{}", "x".repeat(1 << 20));
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, text)))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        Ok(api::WaitProcessResponse { exit_status: u32::MAX, ..Default::default() })
    }

    async fn next_oom(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::OomResponse> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let container_id = if count.is_multiple_of(2) { "mine".to_owned() } else { "x".repeat(500_000) };
        Ok(api::OomResponse { container_id, ..Default::default() })
    }
}

/// The server, the shim's end, and how many requests have come of those that are counted. The machine never ends.
async fn hostile() -> (Server, Agent, Arc<AtomicUsize>, watch::Sender<Option<Arc<End>>>) {
    let service = Hostile::default();
    let count = Arc::clone(&service.count);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = tokio::net::UnixStream::from_std(theirs);
    let one = futures::stream::iter([theirs]).chain(futures::stream::pending());
    let mut server =
        Server::new().add_listener(Listener::new(one)).register_service(api::create_agent(Arc::new(service)));
    server.start().await.unwrap();
    let (end, ended) = watch::channel(None);
    (server, Agent::new(ours, ended).unwrap(), count, end)
}

fn name() -> ProcessName {
    ProcessName { container: "c".into(), exec: String::new() }
}

#[tokio::test(start_paused = true)]
async fn a_silent_agent_delays_nobody_twice() {
    let (_server, agent, count, _end) = hostile().await;
    let begin = Instant::now();
    let error = agent.container_stats("silent").await.unwrap_err();
    assert_eq!(error.to_string(), "the agent did not answer ContainerStats within 3 s");
    assert!(begin.elapsed() <= LOOK + GRACE, "{:?}", begin.elapsed());
    // The other containers of the pod, which are asked about next.
    let begin = Instant::now();
    let error = agent.container_stats("other").await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)) && begin.elapsed().is_zero(), "{error}");
    assert_eq!(count.load(Ordering::Relaxed), 1);
    let begin = Instant::now();
    let error = agent.signal_process(&name(), libc::SIGKILL.unsigned_abs(), true).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)) && begin.elapsed() <= KILL + GRACE, "{error}");
    // Once it answers anything, it is asked again.
    agent.pause_container("c").await.unwrap_err();
    agent.container_stats("other").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_numbers_does_not_wait_for_a_silent_agent() {
    let (_server, agent, _count, _end) = hostile().await;
    let (begin, limit) = (Instant::now(), Duration::from_millis(700));
    let error = agent.guest_stats(limit).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)) && begin.elapsed() <= limit, "{error}");
    // That it was slow once keeps nobody from asking.
    let error = agent.guest_stats(limit).await.unwrap_err().to_string();
    assert_eq!(error, "the agent's answer to GuestStats makes no sense");
    agent.guest_stats(limit).await.unwrap();
    agent.container_stats("silent").await.unwrap_err();
    let begin = Instant::now();
    agent.guest_stats(limit).await.unwrap_err();
    assert!(begin.elapsed().is_zero());
}

#[tokio::test]
async fn answers_that_make_no_sense_are_refused() {
    let (_server, agent, _count, _end) = hostile().await;
    for container in ["long", "terminal"] {
        let error = agent.container_stats(container).await.unwrap_err().to_string();
        assert_eq!(error, "the agent's answer to ContainerStats makes no sense");
    }
    assert_eq!(agent.container_stats("fine").await.unwrap()["memory.stat"], "anon 1\n");
    assert_eq!(agent.list_processes("many").await.unwrap().len(), MOST_PROCESSES);
    agent.list_processes("zero").await.unwrap_err();
    agent.exec_process(&name(), Vec::new(), api::Stdio::new(), false).await.unwrap_err();
    assert_eq!(agent.wait_process(&name()).await.unwrap().exit_status, LAST_STATUS);
    let error = agent.pause_container("c").await.unwrap_err().to_string();
    assert!(error.starts_with("no\\u{1b}[31m; xxx") && error.len() < 5000, "{}", error.len());
}

#[tokio::test(start_paused = true)]
async fn only_containers_of_the_machine_run_out_of_memory_and_not_too_often() {
    let (_server, agent, count, _end) = hostile().await;
    let (members, events) = (Arc::new(Members::default()), Publisher::silent("ns"));
    members.add("mine");
    let reports = tokio::spawn(Arc::clone(&members).report_oom(agent, Arc::clone(&events)));
    let begin = Instant::now();
    // The seconds of this clock pass when nothing else happens.
    while count.load(Ordering::Relaxed) < 100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(begin.elapsed() >= Duration::from_secs(15), "{:?}", begin.elapsed());
    assert_eq!(events.topics(), ["/tasks/oom"]);
    reports.abort();
}
