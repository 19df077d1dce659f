//! Commands in containers, and what containers write.

use katana_tests::cri::shared_pod;
use katana_tests::host::eventually;
use serde_json::json;

use super::cases;

cases! {
    /// Standard output, standard error, exit code; as much output as there is.
    exec_sync_tells_output_and_exit_code,
    /// A probe that hangs.
    exec_sync_ends_what_takes_too_long,
    /// A program that is not there, a container that has ended.
    exec_sync_fails_readably,
    /// Kubernetes' form, both streams, lines cut at 16 KiB, a last line without an end.
    2: logs_have_both_streams,
    /// What kubelet does when a log gets long.
    logs_are_rotated,
    /// One stream, and a terminal.
    a_terminal_is_logged,
}

fn exec_sync_tells_output_and_exit_code(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let result = container.sh("echo out; echo err >&2; exit 42");
    assert_eq!((result.stdout.as_str(), result.stderr.as_str(), result.code), ("out\n", "err\n", 42));
    assert_eq!(container.sh("kill -9 $$").code, 137);
    let much = container.sh("seq 1 200000");
    assert_eq!(much.ok().lines().count(), 200_000);
    assert!(much.ok().ends_with("\n199999\n200000"));
}

fn exec_sync_ends_what_takes_too_long(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let error = container.try_exec(&["sleep", "10004"], 1).unwrap_err();
    assert_eq!(error.code, 4, "{error}");
    assert!(eventually(|| !container.exec(&["ps"]).ok().contains("sleep 10004")), "the command goes on");
    assert_eq!(container.try_exec(&["echo", "in time"], 60).unwrap().ok(), "in time");
}

fn exec_sync_fails_readably(handler: &str) {
    let container = shared_pod(handler).start(json!({}));
    let error = container.try_exec(&["no-such-program"], 0).unwrap_err();
    assert!(error.message.contains("executable file not found in $PATH"), "{error}");
    container.stop(0).unwrap();
    let error = container.try_exec(&["true"], 0).unwrap_err();
    assert!(error.message.contains("CONTAINER_EXITED"), "{error}");
}

fn logs_have_both_streams(handler: &str) {
    let long = "head -c 40000 /dev/zero | tr '\\0' x; echo";
    let container = shared_pod(handler).sh(&format!("echo out; echo err >&2; {long}; printf end"));
    assert_eq!(container.ended().exit_code, 0);
    let log = container.log();
    let stderr: Vec<_> = log.iter().filter(|line| line.stream == "stderr").collect();
    assert_eq!(stderr.len(), 1);
    assert_eq!((stderr[0].tag.as_str(), stderr[0].text.as_str()), ("F", "err\n"));
    let stdout: Vec<_> = log.iter().filter(|line| line.stream == "stdout").collect();
    let form: Vec<_> = stdout.iter().map(|line| (line.tag.as_str(), line.text.len())).collect();
    let expected = [("F", 4), ("P", 16384), ("P", 16384), ("F", 40000 - 2 * 16384 + 1), ("P", 3)];
    assert_eq!(form, expected);
}

fn logs_are_rotated(handler: &str) {
    let container = shared_pod(handler).sh("i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done");
    container.wait_for_output("3\n");
    let old = container.log_file().with_extension("old");
    std::fs::rename(container.log_file(), &old).unwrap();
    container.reopen_log().unwrap();
    assert!(eventually(|| container.output().lines().count() > 3), "nothing in the new file");
    container.stop(0).unwrap();
    let first = std::fs::read_to_string(&old).unwrap();
    let first = first.lines().map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned());
    let numbers: Vec<_> = first.chain(container.output().lines().map(str::to_owned)).collect();
    let expected: Vec<_> = (0..numbers.len()).map(|number| number.to_string()).collect();
    assert_eq!(numbers, expected, "nothing is lost or doubled");
}

fn a_terminal_is_logged(handler: &str) {
    let container = shared_pod(handler)
        .start(json!({"tty": true, "command": ["sh", "-c", "test -t 0 && test -t 1 && echo terminal; echo err >&2"]}));
    assert_eq!(container.ended().exit_code, 0);
    let log = container.log();
    let text: Vec<_> = log.iter().map(|line| (line.stream.as_str(), line.text.trim_end())).collect();
    assert_eq!(text, [("stdout", "terminal"), ("stdout", "err")]);
}
