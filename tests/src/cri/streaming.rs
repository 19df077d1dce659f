//! Exec, attach and port-forward as `kubectl` does them: a WebSocket to the server whose address the CRI plugin answers
//! with.

use serde_json::Value;

use super::messages::{AttachRequest, ExecRequest, PortForwardRequest, StreamResponse};
use super::websocket::WebSocket;
use super::{Container, Pod, Status, call};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// The streams of a process in a container.
pub struct Session {
    socket: WebSocket,
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
        let socket = WebSocket::open(url);
        Self { socket, stdout: String::new(), stderr: String::new(), status: None }
    }

    /// Writes to the process.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.socket.send(STDIN, text.as_bytes());
    }

    /// Sets the terminal's size.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = serde_json::json!({ "Width": columns, "Height": rows }).to_string();
        self.socket.send(RESIZE, size.as_bytes());
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
    /// When the server reports another failure, or none.
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
        let Some((channel, bytes)) = self.socket.receive() else { return false };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => self.stdout.push_str(&text),
            STDERR => self.stderr.push_str(&text),
            ERROR if !bytes.is_empty() => self.status = serde_json::from_slice(&bytes).ok(),
            _ => {}
        }
        true
    }
}

/// A connection to a port of a pod.
pub struct Forward {
    socket: WebSocket,
    /// What has come so far.
    pub received: Vec<u8>,
    /// What the server says of a failure.
    pub error: String,
    /// On each of the two channels, the first message is the port's number.
    headers: u8,
}

impl Pod {
    /// Connects to a port of this pod's localhost.
    pub fn forward(&self, port: u16) -> Result<Forward, Status> {
        let request = PortForwardRequest {
            pod_sandbox_id: self.id().to_owned(),
            port: vec![port.into()],
            ..Default::default()
        };
        let answer: StreamResponse = call(self.containerd(), "PortForward", &request)?;
        let socket = WebSocket::open(&answer.url);
        Ok(Forward { socket, received: Vec::new(), error: String::new(), headers: 0 })
    }
}

impl Forward {
    const DATA: u8 = 0;
    const ERROR: u8 = 1;

    /// Sends bytes, at most 64 KiB.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn write(&mut self, bytes: &[u8]) {
        self.socket.send(Self::DATA, bytes);
    }

    /// Reads on until there are so many bytes; false if the connection ends before.
    pub fn read_to(&mut self, count: usize) -> bool {
        while self.received.len() < count {
            let Some((channel, bytes)) = self.socket.receive() else { return false };
            match channel {
                channel if self.headers & (1 << channel) == 0 => self.headers |= 1 << channel,
                Self::DATA => self.received.extend(bytes),
                Self::ERROR => self.error.push_str(&String::from_utf8_lossy(&bytes)),
                _ => {}
            }
        }
        true
    }
}
