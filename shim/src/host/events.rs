//! Events to containerd, in the order in which they happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Notify, watch};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

use super::recent::Recent;

/// How many events wait while containerd is away. Then the oldest are lost: State and Wait still know.
const CAPACITY: usize = 4096;
/// The longest event, bytes: that which fits into a message of ttrpc (4 MiB) with what is around it. A longer one would
/// never go, nor any that stands behind it.
const LONGEST: u64 = (4 << 20) - 4096;
/// How many of the last ones are kept for who looks later.
const KEPT: usize = 64;
/// How long containerd may take over one event.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest pause between two attempts to reach containerd.
const PAUSE: Duration = Duration::from_secs(2);

/// A message that is packed with the name of its type.
///
/// The message's own descriptor has that name as well, but its use makes the descriptors of every file that its own
/// imports first: half a MiB for the rest of the shim's life.
pub trait Named: Message {
    /// The full name.
    const TYPE: &'static str;
}

impl Named for Metrics {
    const TYPE: &'static str = "io.containerd.cgroups.v2.Metrics";
}

impl Named for ProcessDetails {
    const TYPE: &'static str = "containerd.runc.v1.ProcessDetails";
}

/// An event's topic.
pub trait Topic: Named {
    /// As containerd's own shims publish it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ident => $topic:ident),*) => { $(
        impl Named for $event {
            const TYPE: &'static str = concat!("containerd.events.", stringify!($event));
        }
        impl Topic for $event {
            const TOPIC: &'static str = topics::$topic;
        }
    )* };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC, TaskStart => TASK_START_EVENT_TOPIC, TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC, TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC, TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC, TaskOOM => TASK_OOM_EVENT_TOPIC
}

/// Passes events on, one after the other.
pub struct Publisher {
    namespace: String,
    queue: Mutex<VecDeque<Envelope>>,
    more: Notify,
    empty: watch::Sender<bool>,
    /// Whether somebody takes them.
    forwards: bool,
    recent: Recent<Arc<Envelope>>,
}

impl Publisher {
    /// Publishes to containerd's ttrpc socket, as its own task.
    pub fn start(address: String, namespace: &str) -> Arc<Self> {
        let publisher = Arc::new(Self::new(namespace, true));
        tokio::spawn(Arc::clone(&publisher).forward_all(address));
        publisher
    }

    /// For what is no task of containerd's: takes events and passes none on.
    pub fn silent(namespace: &str) -> Arc<Self> {
        Arc::new(Self::new(namespace, false))
    }

    fn new(namespace: &str, forwards: bool) -> Self {
        Self {
            namespace: namespace.to_owned(),
            queue: Mutex::default(),
            more: Notify::new(),
            empty: watch::channel(true).0,
            forwards,
            recent: Recent::new(KEPT),
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The topics of what waits.
    #[cfg(test)]
    pub fn topics(&self) -> Vec<String> {
        self.queue().iter().map(|envelope| envelope.topic.clone()).collect()
    }

    /// Queues an event. Never waits, so that what happens in order is published in order.
    pub fn publish<E: Topic>(&self, event: &E) {
        self.queue_up(self.envelope(event));
    }

    /// Queues an event, unless the same one waits already: for what may be published any number of times, but need not
    /// be.
    pub fn publish_once<E: Topic>(&self, event: &E) {
        let envelope = self.envelope(event);
        let waits = |other: &Envelope| other.topic == envelope.topic && other.event == envelope.event;
        if !self.queue().iter().any(waits) {
            self.queue_up(envelope);
        }
    }

    fn envelope<E: Topic>(&self, event: &E) -> Envelope {
        Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.into(),
            event: Some(any(event)).into(),
            ..Default::default()
        }
    }

    fn queue_up(&self, envelope: Envelope) {
        let length = envelope.compute_size();
        if length > LONGEST {
            return log::error!("{} of {length} bytes is too long for containerd and lost", envelope.topic);
        }
        self.recent.push(Arc::new(envelope.clone()), 1);
        let mut queue = self.queue();
        if queue.len() == CAPACITY
            && let Some(lost) = queue.pop_front()
        {
            log::error!("containerd does not take events: {} is lost", lost.topic);
        }
        queue.push_back(envelope);
        self.empty.send_replace(false);
        self.more.notify_one();
    }

    /// The last events, and those that come.
    pub fn recent(&self) -> &Recent<Arc<Envelope>> {
        &self.recent
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Waits until every event has been passed on, but not for ever.
    pub async fn flush(&self, limit: Duration) {
        if !self.forwards {
            return;
        }
        let mut empty = self.empty.subscribe();
        if tokio::time::timeout(limit, empty.wait_for(|empty| *empty)).await.is_err() {
            log::error!("{} events are lost", self.queue().len());
        }
    }

    async fn forward_all(self: Arc<Self>, address: String) {
        let mut client = None;
        loop {
            let next = self.queue().front().cloned();
            let Some(envelope) = next else {
                self.empty.send_replace(true);
                self.more.notified().await;
                continue;
            };
            self.forward(&address, &mut client, &envelope).await;
            let mut queue = self.queue();
            // Unless it was pushed out meanwhile.
            if queue.front() == Some(&envelope) {
                queue.pop_front();
            }
        }
    }

    /// Passes one event on, again and again until containerd has it or has refused it.
    async fn forward(&self, address: &str, client: &mut Option<EventsClient>, envelope: &Envelope) {
        let request = ForwardRequest { envelope: Some(envelope.clone()).into(), ..Default::default() };
        let mut pause = Duration::from_millis(50);
        loop {
            let connected = match client.take() {
                Some(connected) => Ok(connected),
                None => connect(address),
            };
            let outcome = match connected {
                Ok(connected) => {
                    let outcome = connected.forward(with_duration(LIMIT), &request).await;
                    *client = Some(connected);
                    outcome.map(drop)
                }
                Err(e) => Err(ttrpc::Error::Others(crate::error::reason(&e))),
            };
            match outcome {
                Ok(()) => return,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    log::error!("containerd refused {}: {}", envelope.topic, status.message);
                    return;
                }
                Err(e) => log::debug!("publish {}: {e}", envelope.topic),
            }
            *client = None;
            if self.queue().front() != Some(envelope) {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE);
        }
    }
}

fn connect(address: &str) -> std::io::Result<EventsClient> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let socket = Socket::try_from(std::os::unix::net::UnixStream::connect(path)?)?;
    Ok(EventsClient::new(Client::new(socket)))
}

/// As containerd's typeurl packs it: the bare name of the message's type.
pub fn any<M: Named>(message: &M) -> Any {
    Any {
        type_url: M::TYPE.to_owned(),
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

/// A time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
#[path = "events/tests.rs"]
mod tests;
