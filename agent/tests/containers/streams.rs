//! Standard streams and terminals.

use katana_protocol::agent::{ResizeTerminalRequest, Stdio};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::harness::{Guest, ctx, feed};

#[tokio::test]
async fn a_long_stream_arrives_whole_before_the_end() {
    let guest = Guest::new("long").await;
    const SIZE: usize = 64 << 20;
    // A counter rather than zeroes: a lost or doubled block would show.
    let script = format!("seq 1 200000 > /tmp/n; while cat /tmp/n; do :; done | head -c {SIZE}; exit 3");
    let streams = guest.streams(false, false);
    guest.create("c", &guest.spec(&["sh", "-c", &script]), &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    let exit = guest.wait("c", "").await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (3, SIZE as u64));
    let bytes = streams.stdout.await.unwrap();
    let pattern: Vec<u8> = (1..=200_000).flat_map(|n| format!("{n}\n").into_bytes()).collect();
    assert!(bytes.len() == SIZE && bytes.chunks(pattern.len()).all(|chunk| pattern.starts_with(chunk)));
    guest.remove("c").await;
}

/// Neither waits for the other: the host learns of the exit, with the count of all that was written, before it reads any.
#[tokio::test]
async fn the_exit_counts_what_the_host_has_not_taken() {
    let guest = Guest::new("untaken").await;
    // A listener for input accepts and does not read.
    let mut streams = guest.streams(true, false);
    let ports = Stdio { stdout_port: streams.ports.stdin_port, ..Default::default() };
    let spec = guest.spec(&["sh", "-c", "cat /dev/zero & sleep 1; kill $!"]);
    guest.create("c", &spec, &ports).await.unwrap();
    guest.start("c").await.unwrap();
    let exit = guest.wait("c", "").await;
    let mut untaken = Vec::new();
    streams.stdin.take().unwrap().await.unwrap().read_to_end(&mut untaken).await.unwrap();
    assert_eq!(exit.stdout_bytes, untaken.len() as u64);
    // More than a pipe holds: the rest was on its way.
    assert!(untaken.len() > 64 << 10, "{}", untaken.len());
    guest.remove("c").await;
}

#[tokio::test]
async fn input_flows_through_and_ends() {
    let guest = Guest::new("input").await;
    let mut streams = guest.streams(true, true);
    guest.create("c", &guest.spec(&["cat"]), &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    let input: Vec<u8> = (0..8 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    feed(streams.stdin.take().unwrap(), &input).await;
    let exit = guest.wait("c", "").await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (0, input.len() as u64));
    assert!(streams.stdout.await.unwrap() == input);
    guest.remove("c").await;
}

#[tokio::test]
async fn a_child_that_holds_the_pipe_delays_nothing() {
    let guest = Guest::new("holder").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let streams = guest.streams(false, false);
    let script = "echo first; (until [ -e /tmp/go ]; do sleep 0.1; done; echo later) & exit 4";
    guest.exec("c", "e", &guest.process(&["sh", "-c", script]), &streams.ports).await.unwrap();
    let exit = guest.wait("c", "e").await;
    assert_eq!((exit.exit_status, exit.stdout_bytes), (4, 6));
    std::fs::write(guest.rootfs().join("tmp/go"), "").unwrap();
    assert_eq!(streams.stdout.await.unwrap(), b"first\nlater\n", "the child's output arrives all the same");
    guest.remove("c").await;
}

#[tokio::test]
async fn a_host_that_hangs_up_blocks_nobody() {
    let guest = Guest::new("hangup").await;
    let streams = guest.streams(false, false);
    let script = "head -c 4000000 /dev/zero; echo done > /tmp/done";
    guest.create("c", &guest.spec(&["sh", "-c", script]), &streams.ports).await.unwrap();
    streams.stdout.abort();
    let _ = streams.stdout.await;
    guest.start("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 0);
    assert_eq!(std::fs::read_to_string(guest.rootfs().join("tmp/done")).unwrap(), "done\n");
    guest.remove("c").await;
}

#[tokio::test]
async fn a_terminal_has_a_size_and_is_the_console() {
    let guest = Guest::new("terminal").await;
    let mut spec = guest.spec(&[
        "sh",
        "-c",
        "stty size; tty; test -c /dev/console && echo console; : > /tmp/ready; read line; stty size; echo \"<$line>\"",
    ]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    let mut streams = guest.streams(true, false);
    guest.create("c", &spec, &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    guest.until_ready().await;
    let request =
        ResizeTerminalRequest { container_id: "c".to_owned(), columns: 132, rows: 43, ..Default::default() };
    guest.client.resize_terminal(ctx(), &request).await.unwrap();
    let mut stdin = streams.stdin.take().unwrap().await.unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    let exit = guest.wait("c", "").await;
    let text = String::from_utf8(streams.stdout.await.unwrap()).unwrap();
    assert_eq!(exit.stdout_bytes, text.len() as u64);
    assert_eq!(text, "30 100\r\n/dev/pts/0\r\nconsole\r\nhello\r\n43 132\r\n<hello>\r\n");
    guest.remove("c").await;
}

#[tokio::test]
async fn the_end_of_input_leaves_a_terminal_open() {
    let guest = Guest::new("ttyeof").await;
    let mut spec = guest.spec(&["sh", "-c", "sleep 0.5; echo still here; exit 6"]);
    spec["process"]["terminal"] = json!(true);
    let mut streams = guest.streams(true, false);
    guest.create("c", &spec, &streams.ports).await.unwrap();
    guest.start("c").await.unwrap();
    let mut stdin = streams.stdin.take().unwrap().await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 6);
    assert_eq!(streams.stdout.await.unwrap(), b"still here\r\n");
    assert_eq!(stdin.read(&mut [0]).await.unwrap(), 0);
    guest.remove("c").await;
}

#[tokio::test]
async fn a_control_character_interrupts_the_terminals_program() {
    let guest = Guest::new("interrupt").await;
    guest.create("c", &guest.spec(&["sleep", "100"]), &Default::default()).await.unwrap();
    guest.start("c").await.unwrap();
    let mut process = guest.process(&["sleep", "50"]);
    process["terminal"] = json!(true);
    let mut streams = guest.streams(true, false);
    guest.exec("c", "e", &process, &streams.ports).await.unwrap();
    let mut stdin = streams.stdin.take().unwrap().await.unwrap();
    stdin.write_all(b"\x03").await.unwrap();
    assert_eq!(guest.wait("c", "e").await.exit_status, 130);
    guest.remove("c").await;
}
