//! Processes that the host's tools run in the guest: started, resized, ended with the client's connection.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::Incoming;
use katana_protocol::manage::LONGEST_REQUEST;
use katana_protocol::manage::exec::{Copy, Exec, Exit, Program, Run, Size};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::answer::{Answer, json};
use crate::error::{Error, Result};
use crate::guest::agent::ProcessName;
use crate::machine::Machine;
use crate::pod::Pod;
use crate::pod::process::Phase;
use crate::pod::stdio::Paths;
use crate::pod::tool::{self, Running, Wanted};

/// Processes at a time.
const MOST: usize = 16;
/// Longest id of one.
const LONGEST_ID: usize = 64;
/// How long the client may take to send what it asks for.
const BODY_LIMIT: Duration = Duration::from_secs(5);
/// How long the agent may take to show that it is there.
const PING_LIMIT: Duration = Duration::from_secs(1);

/// Those that run, by their ids; nothing while one is being started. A shim has one pod.
static RUNNING: LazyLock<Mutex<HashMap<String, Option<Arc<Running>>>>> = LazyLock::new(Mutex::default);

fn table() -> MutexGuard<'static, HashMap<String, Option<Arc<Running>>>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes an id for as long as the process is there.
struct Place(String);

impl Place {
    fn take(id: String) -> Result<Self> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if id.is_empty() || id.len() > LONGEST_ID || !id.bytes().all(good) {
            return Err(Error::InvalidArgument(format!("{id:?} is no id")));
        }
        let mut table = table();
        if table.len() >= MOST {
            return Err(Error::FailedPrecondition(format!(
                "{MOST} processes of the host's tools run already"
            )));
        }
        if table.contains_key(&id) {
            return Err(Error::AlreadyExists(format!("process {id}")));
        }
        table.insert(id.clone(), None);
        Ok(Self(id))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        table().remove(&self.0);
    }
}

/// `POST /exec`
pub async fn run(pod: &Arc<Pod>, request: Request<Incoming>) -> Result<Answer> {
    let exec: Exec = body(request).await?;
    let place = Place::take(exec.id.clone())?;
    let pod = Arc::clone(pod);
    // Dropped with this request, when the client goes. What is being started then has to come to its end first.
    let (_client, gone) = oneshot::channel::<()>();
    let run = tokio::spawn(async move { to_its_end(&pod, exec, gone, &place).await });
    json(&run.await.map_err(|e| Error::Host(format!("exec: {e}")))??)
}

async fn to_its_end(pod: &Pod, exec: Exec, gone: oneshot::Receiver<()>, place: &Place) -> Result<Exit> {
    let machine = pod.launched().borrow().clone();
    let machine = machine.ok_or_else(|| Error::Unavailable(format!("pod {} has no machine", pod.id())))?;
    let wanted = wanted(pod, &machine, exec)?;
    let answers = tokio::time::timeout(PING_LIMIT, async { machine.agent().await?.ping().await }).await;
    answers.unwrap_or_else(|_| {
        Err(Error::DeadlineExceeded(format!("the agent of pod {} does not answer", pod.id())))
    })?;
    let running = Arc::new(Running::start(&machine, pod.namespace(), wanted).await?);
    table().insert(place.0.clone(), Some(Arc::clone(&running)));
    tokio::select! {
        exit = running.wait() => Ok(Exit { exit_status: exit.status }),
        _ = gone => {
            running.end().await;
            Err(Error::Unavailable("the client is gone".into()))
        }
    }
}

fn wanted(pod: &Pod, machine: &Machine, exec: Exec) -> Result<Wanted> {
    let container = exec.container.as_deref().map(|id| pod.container(id)).transpose()?;
    if let Some(container) = &container {
        let id = &container.id;
        let refused = |text: String| Err(Error::FailedPrecondition(text));
        match container.init.phase() {
            Phase::Running if !container.is_paused() => {}
            Phase::Running => return refused(format!("container {id} is paused")),
            Phase::Created => return refused(format!("container {id} has not been started")),
            Phase::Stopped(_) => return refused(format!("container {id} has ended")),
        }
    } else if !machine.debug_console {
        return Err(Error::FailedPrecondition(format!(
            "pod {} was started without debug_console_enabled = true in [agent.kata] of its configuration, so that \
             nothing but its containers runs in its guest",
            pod.id()
        )));
    }
    let (spec, terminal, copies) = match (&exec.run, &container) {
        (Run::Program(program), None) => (asked(program).in_guest(), program.terminal.is_some(), false),
        (Run::Program(program), Some(container)) => {
            (asked(program).in_container(&container.spec), program.terminal.is_some(), false)
        }
        (Run::Copy(copy), Some(_)) => (tool::copying(&text(copy)?), false, true),
        (Run::Copy(_), None) => {
            return Err(Error::InvalidArgument("files are copied of containers only".into()));
        }
    };
    let name = ProcessName {
        container: exec.container.unwrap_or_default(),
        exec: format!("kata-runtime-{}", exec.id),
    };
    let path = Option::unwrap_or_default;
    let paths =
        Paths { stdin: path(exec.stdin), stdout: path(exec.stdout), stderr: path(exec.stderr), terminal };
    Ok(Wanted { name, paths, spec, copies })
}

fn asked(program: &Program) -> tool::Program<'_> {
    tool::Program {
        args: &program.args,
        cwd: program.cwd.as_deref(),
        env: &program.env,
        terminal: program.terminal.map(|size| (size.columns, size.rows)),
    }
}

fn text(copy: &Copy) -> Result<String> {
    serde_json::to_string(copy).map_err(|e| Error::InvalidArgument(e.to_string()))
}

/// The id in the path `/exec/ID/resize`.
pub fn resized(path: &str) -> Option<&str> {
    path.strip_prefix("/exec/")?.strip_suffix("/resize")
}

/// `POST /exec/ID/resize`
pub async fn resize(id: &str, request: Request<Incoming>) -> Result<Answer> {
    let id = id.to_owned();
    let Size { columns, rows } = body(request).await?;
    let running = table().get(&id).cloned().flatten();
    let running = running.ok_or_else(|| Error::NotFound(format!("process {id}")))?;
    running.resize(columns, rows).await?;
    json(&serde_json::json!({}))
}

async fn body<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T> {
    let body = Limited::new(request.into_body(), LONGEST_REQUEST).collect();
    let body = tokio::time::timeout(BODY_LIMIT, body).await;
    let body = body.map_err(|_| Error::DeadlineExceeded("the client does not send its request".into()))?;
    let body = body.map_err(|e| Error::InvalidArgument(e.to_string()))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|e| Error::InvalidArgument(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_and_taken_once() {
        for bad in ["", "a/b", "..", "a b", &"x".repeat(65)] {
            assert!(matches!(Place::take(bad.to_owned()), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
        let place = Place::take("a-1".to_owned()).unwrap();
        assert!(matches!(Place::take("a-1".to_owned()), Err(Error::AlreadyExists(_))));
        let others: Vec<_> = (1..MOST).map(|number| Place::take(format!("b{number}")).unwrap()).collect();
        assert!(matches!(Place::take("c".to_owned()), Err(Error::FailedPrecondition(_))));
        drop((place, others));
        assert!(Place::take("a-1".to_owned()).is_ok() && table().is_empty());
        assert_eq!((resized("/exec/a-1/resize"), resized("/exec/a-1")), (Some("a-1"), None));
    }
}
