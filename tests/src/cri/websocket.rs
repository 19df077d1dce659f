//! WebSockets (RFC 6455) with Kubernetes' subprotocol v4.channel.k8s.io: each message begins with the number of its
//! channel.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::environment;

/// RFC 6455, 5.2
const FINAL: u8 = 0x80;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const MASKED: u8 = 0x80;

/// A client's end.
pub struct WebSocket(TcpStream);

impl WebSocket {
    /// Connects.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn open(url: &str) -> Self {
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
        Self(connection)
    }

    /// Sends bytes to a channel.
    ///
    /// # Panics
    /// When the connection is gone.
    #[track_caller]
    pub fn send(&mut self, channel: u8, bytes: &[u8]) {
        // Clients have to mask what they send, and nobody says with what: zeroes leave it as it is.
        let length = u16::try_from(bytes.len() + 1).expect("a short message");
        let mut frame = vec![FINAL | BINARY, MASKED | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.0.write_all(&frame).expect("write to the stream");
    }

    /// Takes one message: its channel and the rest. Nothing at the end.
    pub fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let (kind, payload) = self.frame()?;
            if kind == CLOSE {
                return None;
            }
            if let Some((&channel, bytes)) = payload.split_first() {
                return Some((channel, bytes.to_vec()));
            }
        }
    }

    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut bytes = |count: usize| {
            let mut buffer = vec![0; count];
            self.0.read_exact(&mut buffer).ok()?;
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
