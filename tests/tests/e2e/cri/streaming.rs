//! `kubectl exec -i`, `kubectl exec -it` and `kubectl attach`.

use katana_tests::cri::shared_pod;
use serde_json::json;

use super::cases;

cases! {
    /// Three streams and an exit code
    2: exec_with_input,
    /// A terminal whose size changes
    exec_on_a_terminal,
    /// The container's own streams, while its log goes on
    attach_to_a_container,
    /// What a client that goes leaves behind: nothing of attach, all of the container
    a_client_goes_away,
}

fn exec_with_input(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let script = "read line; echo \"got $line\"; echo err >&2; seq 1 50000; exit 5";
    let mut session = container.exec_streaming(&["sh", "-c", script], false).unwrap();
    session.write("some words\n");
    assert_eq!(session.exit_code(), 5);
    let numbers: String = (1..=50000).map(|number| format!("{number}\n")).collect();
    assert_eq!(session.stdout, format!("got some words\n{numbers}"));
    assert_eq!(session.stderr, "err\n");
    assert_eq!(container.exec_streaming(&["true"], false).unwrap().exit_code(), 0);
}

fn exec_on_a_terminal(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let mut session = container.exec_streaming(&["sh"], true).unwrap();
    session.resize(91, 33);
    session
        .write("until [ \"$(stty size)\" = '33 91' ]; do sleep 0.1; done; echo size is right | tr a-z A-Z\n");
    session.wait_for("SIZE IS RIGHT");
    session.write("exit 3\n");
    assert_eq!(session.exit_code(), 3);
}

fn attach_to_a_container(handler: &str) {
    let script = "echo ready; while read line; do echo \"$line\" | tr a-z A-Z; done";
    let container = shared_pod(handler).start(json!({"command": ["sh", "-c", script], "stdin": true}));
    container.wait_for_output("ready");
    let mut session = container.attach(false).unwrap();
    session.write("first\n");
    session.wait_for("FIRST");
    drop(session);
    // A second client comes after the first has gone.
    let mut session = container.attach(false).unwrap();
    session.write("second\n");
    session.wait_for("SECOND");
    container.wait_for_output("SECOND");
    assert_eq!(container.output(), "ready\nFIRST\nSECOND\n");
}

fn a_client_goes_away(handler: &str) {
    let container = shared_pod(handler).sh("while :; do echo tick; sleep 0.1; done");
    for _ in 0..3 {
        container.attach(false).unwrap().wait_for("tick");
    }
    let before = container.output().len();
    assert!(
        katana_tests::host::eventually(|| container.output().len() > before + 20),
        "the log stands still"
    );
    container.stop(0).unwrap();
    assert_eq!(container.status().exit_code, 137);
}
