//! Exec and attach as `kubectl` does them: a WebSocket to the server whose address the CRI plugin answers with.
//!
//! The subprotocol is Kubernetes' v4.channel.k8s.io: each message begins with the number of its channel.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use super::messages::{AttachRequest, ExecRequest, StreamResponse};
use super::{Container, Status, call};
use crate::environment;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// RFC 6455, 5.2
const FINAL: u8 = 0x80;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const MASKED: u8 = 0x80;

/// The streams of a process in a container.
pub struct Session {
    connection: TcpStream,
    /// Standard output so far.
    pub stdout: String,
    /// Standard error so far.
    pub stderr: String,
    status: Option<Value>,
}

impl Container {
    /// Runs a command with standard input, output and, without a terminal, standard error.
    pub fn exec_streaming(&self, words: &[&str], tty: bool) -> Result<Session, Status> {
        let request = ExecRequest {
            container_id: self.id().to_owned(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let answer: StreamResponse = call(&self.containerd, "Exec", &request)?;
        Ok(Session::open(&answer.url))
    }

    /// Connects to the container's own streams.
    pub fn attach(&self, tty: bool) -> Result<Session, Status> {
        let request = AttachRequest {
            container_id: self.id().to_owned(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let answer: StreamResponse = call(&self.containerd, "Attach", &request)?;
        Ok(Session::open(&answer.url))
    }
}

impl Session {
    fn open(url: &str) -> Self {
        let (host, path) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).expect(url);
        let mut connection = TcpStream::connect(host).unwrap_or_else(|e| panic!("{url}: {e}"));
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2F0YW5hLXRlc3Qta2V5IQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nOrigin: http://{host}\r\n\r\n"
        );
        let prepared = connection.set_read_timeout(Some(environment::hang_limit()));
        prepared.and_then(|()| connection.write_all(request.as_bytes())).expect(url);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            connection.read_exact(&mut byte).expect(url);
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101 "), "{url}: {head}");
        Self { connection, stdout: String::new(), stderr: String::new(), status: None }
    }

    /// Writes to the process.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    /// Sets the terminal's size.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = serde_json::json!({ "Width": columns, "Height": rows }).to_string();
        self.send(RESIZE, size.as_bytes());
    }

    #[track_caller]
    fn send(&mut self, channel: u8, bytes: &[u8]) {
        // Clients have to mask what they send, and nobody says with what: zeroes leave it as it is.
        let length = u16::try_from(bytes.len() + 1).expect("a short message");
        let mut frame = vec![FINAL | BINARY, MASKED | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.connection.write_all(&frame).expect("write to the stream");
    }

    /// Reads until standard output has this in it.
    ///
    /// # Panics
    /// When the connection ends before.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            assert!(self.receive(), "no {text:?} in {:?}, {:?}, {:?}", self.stdout, self.stderr, self.status);
        }
    }

    /// Reads to the process's end, and gives its exit code.
    ///
    /// # Panics
    /// When the server tells of another failure, or of none.
    #[track_caller]
    pub fn exit_code(&mut self) -> i32 {
        while self.status.is_none() && self.receive() {}
        let status = self.status.take().expect("a status");
        if status["status"] == "Success" {
            return 0;
        }
        let code = status["details"]["causes"][0]["message"].as_str().and_then(|code| code.parse().ok());
        code.unwrap_or_else(|| panic!("{status}"))
    }

    /// Takes one message; false at the end.
    fn receive(&mut self) -> bool {
        let Some((kind, payload)) = self.frame() else { return false };
        if kind == CLOSE {
            return false;
        }
        let Some((&channel, bytes)) = payload.split_first() else { return true };
        let text = String::from_utf8_lossy(bytes);
        match channel {
            STDOUT => self.stdout.push_str(&text),
            STDERR => self.stderr.push_str(&text),
            ERROR if !bytes.is_empty() => self.status = serde_json::from_slice(bytes).ok(),
            _ => {}
        }
        true
    }

    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut bytes = |count: usize| {
            let mut buffer = vec![0; count];
            self.connection.read_exact(&mut buffer).ok()?;
            Some(buffer)
        };
        let head = bytes(2)?;
        let number = |bytes: Vec<u8>| bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
        let length = match head[1] & !MASKED {
            126 => number(bytes(2)?),
            127 => number(bytes(8)?),
            short => usize::from(short),
        };
        Some((head[0] & 0xf, bytes(length)?))
    }
}
