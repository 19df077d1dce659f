//! A guest that does not answer: its agent is stopped.

use std::time::Duration;

use containerd_shim_protos::api::{PidsRequest, StatsRequest, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use ttrpc::Code;

use crate::containerd::{Containerd, can_run, code_and_text, ctx, eventually};

/// Stops the agent of a container's machine.
async fn stop_agent(containerd: &Containerd) -> Pid {
    stop_agent_of(containerd.state("").await.unwrap().pid).await
}

/// Likewise, of a machine by its pid.
pub async fn stop_agent_of(machine: u32) -> Pid {
    let children = || {
        let tasks = std::fs::read_dir(format!("/proc/{machine}/task")).unwrap().flatten();
        let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        lists
            .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let is_agent = |pid: &&String| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "kata-agent")
    };
    let agent: i32 = children().iter().find(is_agent).expect("the agent").parse().unwrap();
    kill(Pid::from_raw(agent), Signal::SIGSTOP).unwrap();
    let stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{agent}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    eventually(stopped).await;
    Pid::from_raw(agent)
}

#[tokio::test]
async fn sigkill_ends_a_container_whose_agent_does_not_answer() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("silent").await;
    containerd.run("exec sleep 1000").await;
    containerd.exec("e", "exec sleep 1000").await.unwrap();
    let (id, pid) = (containerd.id(), containerd.state("e").await.unwrap().pid);
    stop_agent(&containerd).await;

    // Looking is answered, if only by an error, or by what the shim knows itself.
    let stats = StatsRequest { id: id.clone(), ..Default::default() };
    let error = code_and_text(containerd.client.stats(ctx(), &stats).await.unwrap_err());
    assert_eq!(error.0, Code::DEADLINE_EXCEEDED, "{}", error.1);
    let pids = containerd.client.pids(ctx(), &PidsRequest { id, ..Default::default() }).await.unwrap();
    assert!(pids.processes.len() == 2 && pids.processes.iter().any(|process| process.pid == pid), "{pids:?}");
    // What is no SIGKILL harms nobody.
    let error = code_and_text(containerd.kill("", 15).await.unwrap_err());
    assert_eq!(error.0, Code::DEADLINE_EXCEEDED, "{}", error.1);
    assert_eq!(containerd.state("").await.unwrap().status(), Status::RUNNING);

    containerd.kill("", 9).await.unwrap();
    assert_eq!((containerd.wait("").await, containerd.wait("e").await), (137, 137));
    assert_eq!(containerd.state("").await.unwrap().status(), Status::STOPPED);
    containerd.delete("e").await.unwrap();
    assert_eq!(containerd.delete("").await.unwrap().exit_status, 137);
    containerd.shut_down().await;
    let exits: Vec<_> = containerd.events().into_iter().filter(|(topic, _)| topic == "/tasks/exit").collect();
    assert!(exits.len() == 2 && exits.iter().all(|(_, exit)| exit["status"] == 137), "{exits:?}");
    assert_eq!(containerd.traces(), Vec::<String>::new());
}

#[tokio::test]
async fn a_container_whose_agent_stopped_before_its_start_is_deleted() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("silent-created").await;
    containerd.configure_container(&json!({"process": {"args": ["sleep", "1000"]}}));
    containerd.client.create(ctx(), &containerd.create_request()).await.unwrap();
    stop_agent(&containerd).await;
    assert_eq!(containerd.delete("").await.unwrap().exit_status, 137);
    containerd.shut_down().await;
    assert_eq!(containerd.topics(), ["create", "exit", "delete"]);
    assert_eq!(containerd.traces(), Vec::<String>::new());
}

/// The VMM itself may hang as well.
#[tokio::test]
async fn sigkill_ends_a_container_whose_machine_is_stopped() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("silent-vmm").await;
    containerd.run("exec sleep 1000").await;
    stop_agent(&containerd).await;
    let machine = Pid::from_raw(i32::try_from(containerd.state("").await.unwrap().pid).unwrap());
    kill(machine, Signal::SIGSTOP).unwrap();
    containerd.kill("", 9).await.unwrap();
    assert_eq!(containerd.wait("").await, 137);
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
    assert_eq!(containerd.topics(), ["create", "start", "exit", "delete"]);
}

/// Until Start of an exec is under way: the shim has opened the exec's output.
pub async fn starts(containerd: &Containerd, exec: &str) {
    let output = containerd.directory.join(exec);
    eventually(|| output.exists()).await;
}

/// A client that has given up on Start ends the exec as containerd's `Delete(WithProcessKill)` does.
#[tokio::test]
async fn an_exec_that_is_ended_while_it_starts_is_gone() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("starting").await;
    containerd.run("exec sleep 1000").await;
    let agent = stop_agent(&containerd).await;
    let end = async {
        starts(&containerd, "e").await;
        let ended = async {
            match containerd.kill("e", 9).await {
                Ok(()) => drop(containerd.wait("e").await),
                Err(e) => assert_eq!(code_and_text(e).0, Code::FAILED_PRECONDITION),
            }
            containerd.delete("e").await.unwrap();
        };
        tokio::pin!(ended);
        // They are not answered before the agent goes on.
        let early = tokio::time::timeout(Duration::from_millis(500), &mut ended).await.is_ok();
        kill(agent, Signal::SIGCONT).unwrap();
        if !early {
            ended.await;
        }
    };
    let (started, ()) = tokio::join!(containerd.exec("e", "exec sleep 1001"), end);
    started.unwrap();
    let request = PidsRequest { id: containerd.id(), ..Default::default() };
    let processes = containerd.client.pids(ctx(), &request).await.unwrap().processes;
    assert_eq!(processes.len(), 1, "{processes:?}");
    containerd.exec("e", "exit 4").await.unwrap();
    assert_eq!(containerd.wait("e").await, 4);
    containerd.end().await;
}

/// An exec that is being started holds nothing up but what is asked for it alone.
#[tokio::test]
async fn sigkill_ends_a_container_while_an_exec_starts() {
    if !can_run() {
        return;
    }
    let containerd = Containerd::start("silent-exec").await;
    containerd.run("exec sleep 1000").await;
    stop_agent(&containerd).await;
    let kill_exec = async {
        starts(&containerd, "e").await;
        containerd.kill("e", 9).await
    };
    let kill_all = async {
        starts(&containerd, "e").await;
        containerd.kill("", 9).await.unwrap();
        assert_eq!(containerd.wait("").await, 137);
    };
    let (started, killed, ()) = tokio::join!(containerd.exec("e", "exec sleep 1001"), kill_exec, kill_all);
    // Not that the agent did not answer in time, for which Start waits longer.
    let (code, text) = code_and_text(started.unwrap_err());
    assert!(text.starts_with("kata-vmm was killed by SIGKILL"), "{code:?} {text}");
    assert_eq!(code_and_text(killed.unwrap_err()).0, Code::NOT_FOUND);
    containerd.delete("e").await.unwrap();
    containerd.delete("").await.unwrap();
    containerd.shut_down().await;
    assert_eq!(containerd.traces(), Vec::<String>::new());
}
