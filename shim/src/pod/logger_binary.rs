//! Loggers: programs of the host that take a container's output ("binary://"), by containerd's protocol: the
//! output at descriptors 3 and 4, and descriptor 5 to be closed when the program is ready.

use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::net::unix::pipe;

use crate::error::{Error, Result};
use crate::host::fds;
use crate::host::pidfd::PidFd;

/// How long a logger may take to be ready, as containerd has it.
const LIMIT: Duration = Duration::from_secs(10);

/// The ends to write to.
pub struct Logger {
    /// What the process writes to its standard output.
    pub stdout: pipe::Sender,
    /// What the process writes to its standard error.
    pub stderr: pipe::Sender,
}

/// Starts a logger and waits until it is ready. It ends when its input does.
pub async fn start(uri: &str, container: &str, namespace: &str) -> Result<Logger> {
    let (program, query) = uri.split_once('?').unwrap_or((uri, ""));
    let failed = |e: io::Error| Error::io(format_args!("logger binary://{program}"), &e);
    let mut command = Command::new(decode(program));
    command
        .args(arguments(query))
        .env_clear()
        .env("CONTAINER_ID", container)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    fds::usual_limit(&mut command);
    let (stdout, stdout_writer) = fds::pipe().map_err(failed)?;
    let (stderr, stderr_writer) = fds::pipe().map_err(failed)?;
    let (ready, ready_writer) = fds::pipe().map_err(failed)?;
    fds::pass(&mut command, &[(stdout.as_fd(), 3), (stderr.as_fd(), 4), (ready_writer.as_fd(), 5)])
        .map_err(failed)?;
    let ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
    let logger = Logger {
        stdout: pipe::Sender::from_owned_fd(stdout_writer).map_err(failed)?,
        stderr: pipe::Sender::from_owned_fd(stderr_writer).map_err(failed)?,
    };
    // Last of what can fail, so that no logger runs that nobody waits for.
    let process = PidFd::of_child(&mut command.spawn().map_err(failed)?).map_err(failed)?;
    drop((command, ready_writer));
    let in_time = tokio::time::timeout(LIMIT, ready.readable()).await.is_ok();
    if !in_time {
        process.kill();
    }
    tokio::spawn(async move {
        let _ = process.ended().await;
        process.reap();
    });
    if !in_time {
        return Err(Error::Host(format!(
            "logger binary://{program}: not ready within {} s",
            LIMIT.as_secs()
        )));
    }
    Ok(logger)
}

/// Each key of the query is an argument, and each value that is not empty one more.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let words = pairs.flat_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        [Some(key), Some(value).filter(|value| !value.is_empty())]
    });
    words.flatten().map(|word| decode(&word.replace('+', " "))).collect()
}

/// Percent-decoding, RFC 3986, 2.1; what is not a code stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digits =
            tail.get(..2).filter(|_| byte == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(value) = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            bytes.push(value);
            rest = tail.get(2..).unwrap_or_default();
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_a_command_line() {
        assert_eq!(arguments(""), Vec::<String>::new());
        assert_eq!(arguments("a=1&b&c=x+y%20z%2"), ["a", "1", "b", "c", "x y z%2"]);
        assert_eq!(decode("/usr/b%69n/%zz%"), "/usr/bin/%zz%");
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams() {
        let log = std::env::temp_dir().join(format!("katana-logger-{}", std::process::id()));
        let script = format!(
            "exec 5>&-; {{ cat <&3; cat <&4; echo $CONTAINER_ID $CONTAINER_NAMESPACE; }} > {}",
            log.display()
        );
        let script: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let logger = start(&format!("/bin/sh?-c={script}"), "c1", "ns").await.unwrap();
        logger.stdout.writable().await.unwrap();
        logger.stdout.try_write(b"out\n").unwrap();
        logger.stderr.writable().await.unwrap();
        logger.stderr.try_write(b"err\n").unwrap();
        drop(logger);
        for _ in 0..500 {
            if std::fs::read_to_string(&log).is_ok_and(|text| text == "out\nerr\nc1 ns\n") {
                std::fs::remove_file(log).unwrap();
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?}", std::fs::read_to_string(&log));
    }

    #[tokio::test]
    async fn a_logger_that_is_missing_is_named() {
        let error = start("/nowhere?x", "c", "n").await.err().unwrap().to_string();
        assert_eq!(error, "logger binary:///nowhere: No such file or directory");
    }

    #[test]
    fn a_logger_that_cannot_be_watched_does_not_run_on() {
        use without::without;
        mod without {
            include!("../../../protocol/src/kernel/without.rs");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for call in ["pidfd_open", "epoll_ctl"] {
            without(call, || {
                let started = runtime.block_on(start("/bin/sleep?100", "c", "n"));
                assert!(started.is_err(), "{call}");
                assert_eq!(std::fs::read_to_string("/proc/thread-self/children").unwrap(), "", "{call}");
            });
        }
    }
}
