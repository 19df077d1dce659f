//! Commands with a time limit, whose output can be watched while they run.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::containerd::Containerd;
use crate::environment;

/// A command to run. It is ended, and the test fails, when it takes longer than [`environment::hang_limit`].
pub struct Command {
    words: Vec<String>,
    input: Option<Vec<u8>>,
    limit: Duration,
}

impl Command {
    /// A program and its arguments.
    pub fn new<S: AsRef<str>>(words: &[S]) -> Self {
        let words = words.iter().map(|word| word.as_ref().to_owned()).collect();
        Self { words, input: None, limit: environment::hang_limit() }
    }

    /// What the command reads from its standard input, which is /dev/null otherwise.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// For much work: allows it several times as long.
    #[must_use]
    pub fn patiently(mut self) -> Self {
        self.limit = environment::hang_limit() * 5;
        self
    }

    /// Runs the command to its end.
    pub fn output(self) -> Output {
        self.spawn().finish()
    }

    /// Starts the command.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(self) -> Running {
        let mut command = self.prepare();
        command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", self.words[0]));
        if let (Some(mut stdin), Some(bytes)) = (child.stdin.take(), self.input) {
            // A command need not read all; what it read is for the test to judge.
            thread::spawn(move || stdin.write_all(&bytes));
        }
        let stdout = child.stdout.take().map_or_else(Capture::closed, Capture::of);
        let stderr = child.stderr.take().map_or_else(Capture::closed, Capture::of);
        let mut running = Running::new(self.words.join(" "), child, stdout, stderr);
        running.limit = self.limit;
        running
    }

    pub(crate) fn prepare(&self) -> std::process::Command {
        let mut command = std::process::Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        command
    }

    pub(crate) fn line(&self) -> String {
        self.words.join(" ")
    }
}

/// What a stream has delivered so far.
#[derive(Clone)]
pub(crate) struct Capture(Arc<(Mutex<Stream>, Condvar)>);

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads a stream to its end, in a thread.
    pub(crate) fn of(mut source: impl Read + Send + 'static) -> Self {
        let capture = Self(Arc::default());
        let writer = capture.clone();
        thread::spawn(move || {
            let mut block = vec![0; 1 << 16];
            // A terminal's master reads EIO when the last process has closed the other end: an end as well.
            while let Ok(count @ 1..) = source.read(&mut block) {
                writer.stream().bytes.extend_from_slice(&block[..count]);
                writer.0.1.notify_all();
            }
            writer.stream().ended = true;
            writer.0.1.notify_all();
        });
        capture
    }

    pub(crate) fn closed() -> Self {
        Self(Arc::new((Mutex::new(Stream { bytes: Vec::new(), ended: true }), Condvar::new())))
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes(&self) -> Vec<u8> {
        self.stream().bytes.clone()
    }

    /// Waits until `enough` holds, the stream ends or the limit is over; then whether it holds.
    fn wait(&self, limit: Duration, enough: impl Fn(&[u8]) -> bool) -> bool {
        let unfinished = |stream: &mut Stream| !stream.ended && !enough(&stream.bytes);
        let waited = self.0.1.wait_timeout_while(self.stream(), limit, unfinished);
        let (stream, _) = waited.unwrap_or_else(PoisonError::into_inner);
        enough(&stream.bytes)
    }

    fn wait_for_end(&self, limit: Duration) -> bool {
        self.wait(limit, |_| false);
        self.stream().ended
    }
}

/// A command that was started. It is killed when this is dropped.
pub struct Running {
    line: String,
    pid: i32,
    started: Instant,
    log_start: u64,
    log: PathBuf,
    stdout: Capture,
    stderr: Capture,
    exit: Receiver<ExitStatus>,
    limit: Duration,
    finished: bool,
}

impl Running {
    pub(crate) fn new(
        line: String,
        mut child: std::process::Child,
        stdout: Capture,
        stderr: Capture,
    ) -> Self {
        let pid = i32::try_from(child.id()).expect("a process id");
        let (sender, exit) = mpsc::channel();
        thread::spawn(move || child.wait().map(|status| sender.send(status)));
        let (log_start, limit) = (log_length(), environment::hang_limit());
        let log = Containerd::current().log();
        Self {
            line,
            pid,
            started: Instant::now(),
            log_start,
            log,
            stdout,
            stderr,
            exit,
            limit,
            finished: false,
        }
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// Waits until its standard output contains a text.
    ///
    /// # Panics
    /// When the output ends without it, or does not go on.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_until(&format!("the output contains {text:?}"), |output| output.contains(text));
    }

    /// Waits until something holds for what it has written to its standard output.
    ///
    /// # Panics
    /// When the output ends before it does, or does not go on.
    #[track_caller]
    pub fn wait_until(&self, what: &str, holds: impl Fn(&str) -> bool) {
        let enough = |bytes: &[u8]| holds(&String::from_utf8_lossy(bytes));
        if !self.stdout.wait(self.limit, enough) {
            panic!("waited in vain until {what}\n{}", self.so_far(-1));
        }
    }

    /// Sends a signal to the command.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = killpg(Pid::from_raw(self.pid), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end: it is killed then.
    #[track_caller]
    pub fn finish(mut self) -> Output {
        let limit = self.limit;
        let status = match self.exit.recv_timeout(limit) {
            Ok(status) => status,
            Err(RecvTimeoutError::Timeout) => panic!("still running after {limit:?}\n{}", self.so_far(-1)),
            Err(RecvTimeoutError::Disconnected) => panic!("cannot wait for it\n{}", self.so_far(-1)),
        };
        self.finished = true;
        let elapsed = self.started.elapsed();
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        if !(self.stdout.wait_for_end(limit) && self.stderr.wait_for_end(limit)) {
            panic!("ended, but somebody holds its output open\n{}", self.so_far(code));
        }
        Output { elapsed, ..self.so_far(code) }
    }

    fn so_far(&self, code: i32) -> Output {
        Output {
            line: self.line.clone(),
            code,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            elapsed: self.started.elapsed(),
            log_start: self.log_start,
            log: self.log.clone(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.finished {
            self.signal(Signal::SIGKILL);
        }
    }
}

/// What came of a command. Its display is all that is known about it, for failure messages.
pub struct Output {
    line: String,
    /// The exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// How long it ran.
    pub elapsed: Duration,
    log_start: u64,
    log: PathBuf,
}

impl Output {
    /// The standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails the test unless the exit code is this.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit code {code}\n{self}");
        self
    }

    /// Fails the test unless the command succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Fails the test unless the standard output is this text, but for white space around it.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn expect_text(self, text: &str) -> Self {
        assert!(self.text().trim() == text, "expected the output {text:?}\n{self}");
        self
    }

    /// Fails the test unless one line of the standard error contains all of these.
    ///
    /// # Panics
    /// When none does.
    #[track_caller]
    pub fn expect_error_line(self, parts: &[&str]) -> Self {
        let found = self.errors().lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "expected a line with all of {parts:?} on standard error\n{self}");
        self
    }

    /// Fails the test unless the output has the line `label=value`, for each of these.
    ///
    /// # Panics
    /// When it has not.
    #[track_caller]
    pub fn expect_values(self, expected: &[(&str, &str)]) -> Self {
        let wrong: Vec<String> = expected
            .iter()
            .filter(|(label, value)| self.value(label).as_deref() != Some(value))
            .map(|(label, value)| {
                format!("{label} is {:?}, not {value:?}", self.value(label).unwrap_or_default())
            })
            .collect();
        assert!(wrong.is_empty(), "{}\n{self}", wrong.join("\n"));
        self
    }

    /// The value in the line `label=value` of the standard output.
    pub fn value(&self, label: &str) -> Option<String> {
        let text = self.text();
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines.find(|(name, _)| *name == label).map(|(_, value)| value.trim().to_owned())
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "command: {}\nexit code: {} after {:.1?}", self.line, self.code, self.elapsed)?;
        writeln!(f, "--- stdout ({} bytes)\n{}", self.stdout.len(), tail(&self.text()))?;
        writeln!(f, "--- stderr ({} bytes)\n{}", self.stderr.len(), tail(&self.errors()))?;
        if let Some(log) = log_since(&self.log, self.log_start) {
            writeln!(f, "--- containerd's log meanwhile\n{}", tail(&log))?;
        }
        Ok(())
    }
}

/// The last part of a long text.
fn tail(text: &str) -> String {
    const MOST_LINES: usize = 60;
    const LONGEST_LINE: usize = 2000;
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(MOST_LINES);
    let note = if skipped > 0 { format!("[{skipped} lines before]\n") } else { String::new() };
    let shorten = |line: &&str| line.chars().take(LONGEST_LINE).collect::<String>();
    note + &lines[skipped..].iter().map(shorten).collect::<Vec<_>>().join("\n")
}

fn log_length() -> u64 {
    Containerd::current().log().metadata().map_or(0, |data| data.len())
}

fn log_since(log: &Path, start: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
