//! What the pod tells containerd.

use std::ops::Deref;
use std::sync::Arc;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use katana_protocol::manage::Event;
use protobuf::Message;

use super::answer::{Answer, recent};
use crate::host::events::{Publisher, Topic};
use crate::host::recent::Recent;
use crate::pod::Pod;

/// The publisher's last events.
struct Events(Arc<Publisher>);

impl Deref for Events {
    type Target = Recent<Arc<Envelope>>;

    fn deref(&self) -> &Self::Target {
        self.0.recent()
    }
}

/// The last events, and with `follow` those that come.
pub fn answer(pod: &Pod, follow: bool) -> Answer {
    recent(Events(pod.events()), |envelope| line(envelope), "application/x-ndjson", follow)
}

fn line(envelope: &Envelope) -> String {
    serde_json::to_string(&event(envelope)).unwrap_or_default() + "\n"
}

fn event(envelope: &Envelope) -> Event {
    let time = envelope.timestamp.seconds;
    let event = Event { time, topic: envelope.topic.clone(), ..Event::default() };
    let bytes = &envelope.event.value[..];
    let (container, event) = match envelope.topic.as_str() {
        TaskCreate::TOPIC => {
            read(bytes, |e: TaskCreate| (e.container_id, Event { pid: Some(e.pid), ..event }))
        }
        TaskStart::TOPIC => read(bytes, |e: TaskStart| (e.container_id, Event { pid: Some(e.pid), ..event })),
        TaskExit::TOPIC => read(bytes, |e: TaskExit| {
            let exec = Some(e.id).filter(|id| *id != e.container_id);
            (e.container_id, Event { exec, pid: Some(e.pid), exit_status: Some(e.exit_status), ..event })
        }),
        TaskDelete::TOPIC => read(bytes, |e: TaskDelete| {
            (e.container_id, Event { pid: Some(e.pid), exit_status: Some(e.exit_status), ..event })
        }),
        TaskExecAdded::TOPIC => {
            read(bytes, |e: TaskExecAdded| (e.container_id, Event { exec: Some(e.exec_id), ..event }))
        }
        TaskExecStarted::TOPIC => read(bytes, |e: TaskExecStarted| {
            (e.container_id, Event { exec: Some(e.exec_id), pid: Some(e.pid), ..event })
        }),
        TaskPaused::TOPIC => read(bytes, |e: TaskPaused| (e.container_id, event)),
        TaskResumed::TOPIC => read(bytes, |e: TaskResumed| (e.container_id, event)),
        TaskOOM::TOPIC => read(bytes, |e: TaskOOM| (e.container_id, event)),
        _ => (String::new(), event),
    };
    Event { container, ..event }
}

fn read<E: Message>(bytes: &[u8], named: impl FnOnce(E) -> (String, Event)) -> (String, Event) {
    named(E::parse_from_bytes(bytes).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_of_json() {
        let events = Publisher::silent("n");
        events.publish(&TaskCreate { container_id: "c".into(), pid: 7, ..Default::default() });
        let exit = TaskExit {
            container_id: "c".into(),
            id: "e".into(),
            pid: 8,
            exit_status: 3,
            ..Default::default()
        };
        events.publish(&exit);
        events.publish(&TaskExit { id: "c".into(), ..exit });
        events.publish(&TaskOOM { container_id: "c".into(), ..Default::default() });
        let lines: Vec<_> = events.recent().after(0).0.iter().map(|envelope| line(envelope)).collect();
        let parsed: Vec<Event> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(lines.iter().all(|line| line.ends_with("}\n")) && parsed[0].time > 0);
        let told = |event: &Event| (event.topic.clone(), event.exec.clone(), event.pid, event.exit_status);
        assert_eq!(told(&parsed[0]), ("/tasks/create".into(), None, Some(7), None));
        assert_eq!(told(&parsed[1]), ("/tasks/exit".into(), Some("e".into()), Some(8), Some(3)));
        assert_eq!(told(&parsed[2]), ("/tasks/exit".into(), None, Some(8), Some(3)));
        assert_eq!(told(&parsed[3]), ("/tasks/oom".into(), None, None, None));
        assert!(parsed.iter().all(|event| event.container == "c"));
    }
}
