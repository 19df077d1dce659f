//! Processes of the guest itself, outside of all containers.

use katana_protocol::agent::ContainerRequest;
use serde_json::{Value, json};
use ttrpc::Code;

use super::harness::{Guest, ctx, process, status};

fn shell(script: &str) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0}, "cwd": "/",
        "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin", "GREETING=hello"],
    })
}

#[tokio::test]
async fn a_process_of_the_guest_runs_where_the_agent_does() {
    let guest = Guest::new("guest").await;
    let namespaces = "readlink /proc/self/ns/mnt /proc/self/ns/pid /proc/self/ns/uts";
    let script = format!("{namespaces}; echo $GREETING >&2; exit 3");
    let output = guest.run_exec("", "e", &shell(&script)).await.unwrap();
    let own = |name: &str| std::fs::read_link(format!("/proc/{}/ns/{name}", guest.agent_pid())).unwrap();
    let expected = ["mnt", "pid", "uts"].map(|name| format!("{}\n", own(name).display())).concat();
    assert_eq!((output.status, output.stdout, output.stderr), (3, expected, "hello\n".to_owned()));

    let error = guest.exec("", "e", &shell("true"), &Default::default()).await.unwrap_err();
    assert_eq!(status(error), (Code::ALREADY_EXISTS, "process \"e\" already exists".to_owned()));
    guest.client.remove_process(ctx(), &process("", "e")).await.unwrap();
    let missing = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["nonexistent"]});
    let error = guest.exec("", "e", &missing, &Default::default()).await.unwrap_err();
    let text = "exec: \"nonexistent\": executable file not found in $PATH".to_owned();
    assert_eq!(status(error), (Code::NOT_FOUND, text));
    let error = guest.exec("", "../e", &shell("true"), &Default::default()).await.unwrap_err();
    assert_eq!(status(error).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn it_has_a_terminal_if_it_wants_one() {
    let guest = Guest::new("guest-tty").await;
    let mut process = shell("tty >/dev/null && stty size");
    process["terminal"] = true.into();
    process["consoleSize"] = json!({"width": 91, "height": 17});
    let output = guest.run_exec("", "tty", &process).await.unwrap();
    assert_eq!((output.status, output.stdout.as_str()), (0, "17 91\r\n"));
}

#[tokio::test]
async fn what_it_has_started_ends_with_it() {
    let guest = Guest::new("guest-kill").await;
    let listed = async || {
        let request = ContainerRequest::new();
        guest.client.list_processes(ctx(), &request).await.unwrap().processes
    };
    for script in ["sleep 1000 & exec sleep 1000", "sleep 1000 & exit 0"] {
        guest.exec("", "kill", &shell(script), &Default::default()).await.unwrap();
        if script.ends_with("1000") {
            assert_eq!(listed().await.iter().map(|one| one.exec_id.as_str()).collect::<Vec<_>>(), ["kill"]);
            let error = guest.client.remove_process(ctx(), &process("", "kill")).await.unwrap_err();
            assert_eq!(status(error), (Code::FAILED_PRECONDITION, "cannot remove a running process".into()));
            guest.kill("", "kill", libc::SIGKILL, true).await.unwrap();
            assert_eq!(guest.wait("", "kill").await.exit_status, 137);
        } else {
            assert_eq!(guest.wait("", "kill").await.exit_status, 0);
        }
        guest.client.remove_process(ctx(), &process("", "kill")).await.unwrap();
        assert!(listed().await.is_empty());
    }
    let error = guest.kill("", "kill", libc::SIGKILL, true).await.unwrap_err();
    assert_eq!(status(error), (Code::NOT_FOUND, "process \"kill\" does not exist".to_owned()));
}
