//! containerd's events, as `ctr events` prints them.

use serde_json::Value;

use crate::command::Running;
use crate::container::ctr;
use crate::environment;
use crate::host::eventually;

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    /// For example `/tasks/exit`.
    pub topic: String,
    /// Its fields.
    pub body: Value,
}

/// All events from now on.
pub struct Events(Running);

impl Events {
    /// Starts to listen.
    ///
    /// # Panics
    /// When no event arrives.
    #[track_caller]
    pub fn follow() -> Self {
        let events = Self(ctr(&["events"]).spawn());
        // `ctr events` does not say when it listens: make events until it shows one.
        let mut round = 0;
        let heard = eventually(|| {
            round += 1;
            let label = format!("heard={round}");
            ctr(&["namespaces", "label", &environment::namespace(), &label]).output().ok();
            events.0.stdout().contains("/namespaces/update")
        });
        assert!(heard, "ctr events shows no event");
        events
    }

    /// The task events of a container so far, in the order in which they came.
    pub fn of(&self, id: &str) -> Vec<Event> {
        parse(&self.0.stdout(), id)
    }

    /// Waits for a task event of a container.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn wait_for(&self, id: &str, topic: &str) -> Event {
        let is_it = |event: &Event| event.topic == topic;
        let what = format!("{topic} of {id} comes");
        self.0.wait_until(&what, |text| parse(text, id).iter().any(is_it));
        self.of(id).into_iter().find(is_it).expect("it was there")
    }
}

/// A line is: date, time, offset, zone, namespace, topic, body.
fn parse(text: &str, id: &str) -> Vec<Event> {
    // The last line may be incomplete.
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let events = complete.lines().filter_map(|line| {
        let mut words = line.splitn(7, ' ').skip(5);
        let topic = words.next()?.to_owned();
        let body = serde_json::from_str(words.next()?).ok()?;
        Some(Event { topic, body })
    });
    let of_it = |event: &Event| {
        event.topic.starts_with("/tasks/")
            && event.body.get("container_id").and_then(Value::as_str) == Some(id)
    };
    events.filter(of_it).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_lines_about_the_container_count() {
        let text = "2026-11-21 05:15:31.3 +0000 UTC default /tasks/start {\"container_id\":\"a\",\"pid\":3}\n\
                    2026-11-21 05:15:31.4 +0000 UTC default /tasks/start {\"container_id\":\"b\",\"pid\":4}\n\
                    2026-11-21 05:15:31.5 +0000 UTC default /containers/delete {\"id\":\"a\"}\n\
                    2026-11-21 05:15:31.6 +0000 UTC default /tasks/exit {\"container_id\":\"a\"";
        let events = parse(text, "a");
        assert_eq!(events.len(), 1);
        assert_eq!((events[0].topic.as_str(), events[0].body["pid"].as_u64()), ("/tasks/start", Some(3)));
    }
}
