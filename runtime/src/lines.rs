//! `kata-runtime logs` and `kata-runtime events`: what a shim has kept, and what comes.

use std::io::{self, Write};
use std::time::{Duration, UNIX_EPOCH};

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Bytes;
use katana_pods::Pod;
use katana_protocol::manage::{Event, FOLLOW};

use crate::table::plain;

/// Why there are no more lines.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kata-runtime {0}: {1}")]
    Pods(&'static str, katana_pods::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// The pod's lines in the shim's log, or its guest's console.
pub fn logs(id: &str, console: bool, follow: bool, out: &mut dyn Write) -> Result<(), Error> {
    let verb = if console { "console" } else { "logs" };
    run(verb, id, follow, &mut |line| writeln!(out, "{}", plain_line(line)))
}

/// What the pod has told containerd.
pub fn events(id: &str, follow: bool, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    run("events", id, follow, &mut |line| match serde_json::from_str::<Event>(line) {
        Ok(event) if !json => writeln!(out, "{}", plain_line(&for_people(&event))),
        _ => writeln!(out, "{}", plain_line(line)),
    })
}

/// The longest line that is waited for, bytes: none of the shim's is as long.
const LONGEST: usize = 64 * 1024;

fn run(
    verb: &'static str,
    id: &str,
    follow: bool,
    write: &mut dyn FnMut(&str) -> io::Result<()>,
) -> Result<(), Error> {
    let pod = katana_pods::find(id).map_err(|e| Error::Pods(verb, e))?;
    let path = if follow { format!("/{verb}?{FOLLOW}") } else { format!("/{verb}") };
    crate::block_on(print(&pod, verb, &path, write))?
}

async fn print(
    pod: &Pod,
    verb: &'static str,
    path: &str,
    write: &mut dyn FnMut(&str) -> io::Result<()>,
) -> Result<(), Error> {
    let failed = |e| Error::Pods(verb, e);
    let asked = pod.request(Method::GET, path, Bytes::new());
    let mut body = pod.within(katana_pods::request::LIMIT, asked).await.map_err(failed)?.into_body();
    let mut rest = Vec::new();
    // The shim of a pod that ends breaks the answer off.
    while let Some(Ok(frame)) = body.frame().await {
        rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            write(String::from_utf8_lossy(&line[..end]).as_ref())?;
        }
        rest.truncate(LONGEST);
    }
    Ok(())
}

/// The shim has escaped all that is not for reading; a pod that is not what it says has not.
fn plain_line(line: &str) -> String {
    line.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn for_people(event: &Event) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(u64::try_from(event.time).unwrap_or(0).min(LAST_TIME));
    let mut line = format!("{} {} {}", humantime::format_rfc3339_seconds(time), event.topic, event.container);
    let more = [
        event.exec.as_ref().map(|exec| format!(" exec={}", plain(exec))),
        event.pid.map(|pid| format!(" pid={pid}")),
        event.exit_status.map(|status| format!(" exit_status={status}")),
    ];
    line.extend(more.into_iter().flatten());
    line
}

/// 31 December 9999, the last day that has four digits.
const LAST_TIME: u64 = 253_402_300_799;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let mut event =
            Event { time: 0, topic: "/tasks/exit".into(), container: "c".into(), ..Event::default() };
        assert_eq!(for_people(&event), "1970-01-01T00:00:00Z /tasks/exit c");
        (event.exec, event.pid, event.exit_status) = (Some("e".into()), Some(7), Some(3));
        assert_eq!(for_people(&event), "1970-01-01T00:00:00Z /tasks/exit c exec=e pid=7 exit_status=3");
        event.time = i64::MAX;
        assert!(for_people(&event).starts_with("9999-12-31T23:59:59Z"));
    }
}
