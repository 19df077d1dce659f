//! Processes that the host's tools run: in the guest itself, or in a container. containerd does not know of them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::libc::SIGKILL;
use serde_json::{Map, Value, json};

use super::process::{Exit, KILLED, Process};
use super::stdio::{Paths, Streams};
use crate::error::{Error, Result};
use crate::guest::agent::{Agent, ProcessName};
use crate::machine::Machine;
use crate::spec::Spec;

/// How long a killed process may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Where programs of the guest itself are.
const PATH: &str = "PATH=/bin:/sbin:/usr/bin:/usr/sbin";
/// What runs where nothing is named.
const SHELL: &str = "sh";
/// What it takes to read all files of a container and to write them for anybody.
const COPYING: [&str; 4] = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID"];

/// What such a process is to be.
pub struct Wanted {
    /// Its name, without a container if it is of the guest itself.
    pub name: ProcessName,
    /// Its streams on the host.
    pub paths: Paths,
    /// Its OCI process.
    pub spec: Map<String, Value>,
    /// It is the agent's own program, which copies files.
    pub copies: bool,
}

/// A program, as it is asked for.
pub struct Program<'a> {
    /// Its name and arguments, or none for a shell.
    pub args: &'a [String],
    /// Its working directory, if it is not the usual one.
    pub cwd: Option<&'a str>,
    /// Its variables besides the usual ones.
    pub env: &'a [String],
    /// Columns and rows of its terminal, if it has one.
    pub terminal: Option<(u16, u16)>,
}

impl Program<'_> {
    /// As a process of the guest itself.
    pub fn in_guest(&self) -> Map<String, Value> {
        self.over(object(json!({ "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": [PATH, "HOME=/"] })))
    }

    /// As a process of a container: as its first one, but for what is asked for.
    pub fn in_container(&self, spec: &Spec) -> Map<String, Value> {
        self.over(spec.process.clone().unwrap_or_default())
    }

    fn over(&self, mut process: Map<String, Value>) -> Map<String, Value> {
        let args = if self.args.is_empty() { json!([SHELL]) } else { json!(self.args) };
        process.insert("args".into(), args);
        process.remove("commandLine");
        if let Some(cwd) = self.cwd {
            process.insert("cwd".into(), cwd.into());
        }
        if let Some(env) = process.entry("env").or_insert_with(|| json!([])).as_array_mut() {
            env.extend(self.env.iter().map(|variable| Value::from(variable.as_str())));
        }
        process.remove("consoleSize");
        if let Some((columns, rows)) = self.terminal {
            process.insert("consoleSize".into(), json!({ "width": columns, "height": rows }));
        }
        process
    }
}

/// The process of a copy, with what is asked of it.
pub fn copying(asked: &str) -> Map<String, Value> {
    let sets = ["bounding", "effective", "permitted"].map(|set| (set.to_owned(), json!(COPYING)));
    object(json!({
        "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": [asked], "noNewPrivileges": true,
        "capabilities": Map::from_iter(sets),
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// A process that runs.
pub struct Running {
    process: Arc<Process>,
    agent: Agent,
    machine: Arc<Machine>,
}

impl Running {
    /// Starts one. On failure nothing is left of it.
    pub async fn start(machine: &Arc<Machine>, namespace: &str, wanted: Wanted) -> Result<Self> {
        let Wanted { name, paths, spec, copies } = wanted;
        let agent = machine.agent().await?;
        let mut streams = Streams::open(&paths, &name.container, namespace, &machine.ports).await?;
        let process = Process::new(name, paths, spec);
        let running = Self { process, agent, machine: Arc::clone(machine) };
        let (agent, process) = (&running.agent, &running.process);
        let spec = process.spec_for_guest();
        let pid = match agent.exec_process(&process.name, spec, streams.ports(), copies).await {
            Ok(pid) => streams.connected().await.map(|()| pid),
            // The guest may start it still.
            Err(e @ Error::DeadlineExceeded(_)) => Err(e),
            Err(e) => return Err(e),
        };
        let pid = match pid {
            Ok(pid) => pid,
            Err(e) => {
                running.end().await;
                return Err(e);
            }
        };
        process.exists(pid, streams);
        process.started();
        // What is to be read is at hand: the client has its end of the FIFO open before it asks.
        process.close_stdin();
        Ok(running)
    }

    /// Waits for its end, until all its output is delivered, and forgets it.
    pub async fn wait(&self) -> Exit {
        let exit = self.process.follow(&self.agent).await;
        self.process.stopped(exit);
        self.forget().await;
        exit
    }

    /// Ends it, with all that it has started if it is of the guest itself.
    pub async fn end(&self) {
        let name = &self.process.name;
        let all = name.container.is_empty();
        if let Err(e) = self.agent.signal_process(name, SIGKILL.unsigned_abs(), all).await {
            log::debug!("end {name:?}: {e}");
        }
        if tokio::time::timeout(END_LIMIT, self.agent.wait_process(name)).await.is_err() {
            log::warn!("{name:?} does not end");
        }
        self.process.stopped(Exit { status: KILLED, at: SystemTime::now() });
        self.forget().await;
    }

    async fn forget(&self) {
        if !self.machine.is_dead()
            && let Err(e) = self.agent.remove_process(&self.process.name).await
        {
            // With its container, maybe.
            log::debug!("remove {:?}: {e}", self.process.name);
        }
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        if !self.process.paths.terminal {
            return Err(Error::FailedPrecondition("the process has no terminal".into()));
        }
        self.process.resize(&self.agent, columns.into(), rows.into()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_in_a_container_is_as_its_first_process() {
        let spec: Spec = serde_json::from_value(json!({ "process": {
            "args": ["init"], "cwd": "/home", "env": ["A=1"], "user": { "uid": 7 }, "capabilities": {},
            "consoleSize": { "width": 1, "height": 2 },
        }}))
        .unwrap();
        let (args, env) = (["ls".to_owned()], ["B=2".to_owned()]);
        let program = Program { args: &args, cwd: None, env: &env, terminal: None };
        let expected = json!({
            "args": ["ls"], "cwd": "/home", "env": ["A=1", "B=2"], "user": { "uid": 7 }, "capabilities": {},
        });
        assert_eq!(Value::Object(program.in_container(&spec)), expected);
        let shell = Program { args: &[], cwd: Some("/tmp"), env: &[], terminal: Some((80, 24)) };
        let process = shell.in_guest();
        let size = json!({ "width": 80, "height": 24 });
        assert_eq!(
            (&process["args"], &process["cwd"], &process["consoleSize"]),
            (&json!(["sh"]), &json!("/tmp"), &size)
        );
    }

    #[test]
    fn a_copy_has_no_more_than_it_needs() {
        let process = copying("x");
        assert_eq!((&process["args"], &process["noNewPrivileges"]), (&json!(["x"]), &json!(true)));
        assert_eq!(process["capabilities"]["bounding"], json!(COPYING));
        assert!(process["capabilities"].get("inheritable").is_none());
    }
}
