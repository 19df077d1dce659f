use super::*;
use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use tokio::sync::mpsc;
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

struct Containerd(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        // Some take longer than others, and one is refused: the order must hold.
        let envelope = request.envelope.unwrap_or_default();
        let pid = TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid;
        tokio::time::sleep(Duration::from_millis(u64::from(7 - pid % 7))).await;
        self.0.send(envelope).unwrap();
        if pid == 3 {
            Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no")))
        } else {
            Ok(Empty::new())
        }
    }
}

use protobuf::Message;

async fn serve(path: &PathBuf) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
    let (sender, events) = mpsc::unbounded_channel();
    let _ = std::fs::remove_file(path);
    let listener = Listener::try_from(UnixListener::bind(path).unwrap()).unwrap();
    let service = create_events(Arc::new(Containerd(sender)));
    let mut server = Server::new().add_listener(listener).register_service(service);
    server.start().await.unwrap();
    (server, events)
}

#[tokio::test]
async fn order_holds_over_a_restart_of_containerd() {
    let path = std::env::temp_dir().join(format!("katana-events-{}", std::process::id()));
    let publisher = Publisher::start(path.to_str().unwrap().to_owned(), "ns");
    // Nobody listens yet.
    let publish = |pid| publisher.publish(&TaskStart { container_id: "c".into(), pid, ..Default::default() });
    (0..5).for_each(publish);
    tokio::time::sleep(Duration::from_millis(60)).await;
    let (mut server, mut events) = serve(&path).await;
    publisher.flush(Duration::from_secs(10)).await;
    server.shutdown().await.unwrap();
    drop(server);
    (5..10).for_each(publish);
    let (_server, mut later) = serve(&path).await;
    publisher.flush(Duration::from_secs(10)).await;
    let mut pids = Vec::new();
    while let Ok(envelope) = events.try_recv().or_else(|_| later.try_recv()) {
        assert_eq!((envelope.topic.as_str(), envelope.namespace.as_str()), ("/tasks/start", "ns"));
        assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");
        pids.push(TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid);
    }
    assert_eq!(pids, (0..10).collect::<Vec<_>>());
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn the_queue_is_bounded_and_flush_ends() {
    let publisher = Publisher::start("/nowhere".into(), "ns");
    for pid in 0..u32::try_from(CAPACITY).unwrap() + 10 {
        publisher.publish(&TaskStart { pid, ..Default::default() });
    }
    assert_eq!(publisher.queue().len(), CAPACITY);
    publisher.flush(Duration::from_millis(20)).await;
    let first = publisher.queue().front().cloned().unwrap();
    assert_eq!(TaskStart::parse_from_bytes(&first.event.value).unwrap().pid, 10);
}

/// An event that ttrpc does not take must not stay at the head of the queue for ever.
#[tokio::test]
async fn an_event_that_is_too_long_does_not_hold_up_those_behind_it() {
    let path = std::env::temp_dir().join(format!("katana-events-long-{}", std::process::id()));
    let (_server, mut events) = serve(&path).await;
    let publisher = Publisher::start(path.to_str().unwrap().to_owned(), "ns");
    let publish = |pid, length| {
        publisher.publish(&TaskStart { container_id: "c".repeat(length), pid, ..Default::default() });
    };
    // The longest that goes is found out: it must arrive.
    let rest = LONGEST as usize - 100;
    [(1, 1), (2, 5 << 20), (4, 4 << 20), (5, rest), (6, 1)]
        .into_iter()
        .for_each(|(pid, length)| publish(pid, length));
    let mut pids = Vec::new();
    while pids.last() != Some(&6) {
        let next = tokio::time::timeout(Duration::from_secs(180), events.recv()).await;
        let envelope = next.expect("the last event comes").unwrap();
        pids.push(TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid);
    }
    assert_eq!(pids, [1, 5, 6]);
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn what_waits_already_is_not_queued_again() {
    let publisher = Publisher::start("/nowhere".into(), "ns");
    for round in 0..10 {
        for id in ["a", "b"] {
            publisher.publish_once(&TaskOOM { container_id: id.into(), ..Default::default() });
        }
        publisher.publish(&TaskStart { pid: round, ..Default::default() });
    }
    assert_eq!(publisher.queue().len(), 2 + 10);
}

#[test]
fn types_have_the_names_of_their_descriptors() {
    fn check<M: Named + protobuf::MessageFull>() {
        assert_eq!(M::TYPE, M::descriptor().full_name());
    }
    check::<TaskCreate>();
    check::<TaskStart>();
    check::<TaskExit>();
    check::<TaskDelete>();
    check::<TaskExecAdded>();
    check::<TaskExecStarted>();
    check::<TaskPaused>();
    check::<TaskResumed>();
    check::<TaskOOM>();
    check::<Metrics>();
    check::<ProcessDetails>();
}
