//! What the guest wrote to its console, last part only: it explains a VM that did not come up.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// Bytes kept. In JSON, where a control character takes six, they still fit into one control message.
const CAPACITY: usize = 8 * 1024;
/// Longest line that is looked at; the rest of a longer one is kept but not searched.
const MAX_LINE: usize = 1024;
/// What Linux prints before anything else when it gives up (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing";

/// The console's memory, shared by the early serial port and the virtio console.
#[derive(Clone)]
pub struct ConsoleRing(Arc<Mutex<Ring>>);

struct Ring {
    bytes: VecDeque<u8>,
    line: Vec<u8>,
    panic: Option<String>,
    echo: bool,
}

impl ConsoleRing {
    /// An empty ring; with `echo`, lines go to standard error as well.
    #[must_use]
    pub fn new(echo: bool) -> Self {
        let (bytes, line) = (VecDeque::with_capacity(CAPACITY), Vec::new());
        Self(Arc::new(Mutex::new(Ring { bytes, line, panic: None, echo })))
    }

    /// The last lines; the first of them is whole unless it alone fills the ring.
    #[must_use]
    pub fn tail(&self) -> String {
        let ring = lock(&self.0);
        let bytes: Vec<u8> = ring.bytes.iter().copied().filter(|b| *b != b'\r').collect();
        let cut = ring.bytes.len() == CAPACITY;
        let start = bytes.iter().position(|b| *b == b'\n').filter(|_| cut).map_or(0, |newline| newline + 1);
        String::from_utf8_lossy(&bytes[start..]).trim_end().to_owned()
    }

    /// The line with which the guest's kernel gave up, if it did.
    #[must_use]
    pub fn panic_line(&self) -> Option<String> {
        let mut ring = lock(&self.0);
        ring.end_line();
        ring.panic.clone()
    }

    /// Appends what the guest wrote.
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = lock(&self.0);
        for byte in bytes {
            ring.push(*byte);
        }
    }
}

impl Ring {
    fn push(&mut self, byte: u8) {
        if self.bytes.len() == CAPACITY {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
        if byte == b'\n' {
            self.end_line();
        } else if self.line.len() < MAX_LINE {
            self.line.push(byte);
        }
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        let text = text.trim_end();
        if self.echo && !text.is_empty() {
            // The shim may be gone; then nobody is there to care.
            let _ = writeln!(io::stderr(), "console: {text}");
        }
        if self.panic.is_none()
            && let Some(at) = text.find(PANIC)
        {
            self.panic = Some(text[at..].to_owned());
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_bounded_and_starts_with_a_whole_line() {
        let ring = ConsoleRing::new(false);
        for n in 0..5000 {
            ring.push(format!("line {n}\r\n").as_bytes());
        }
        let tail = ring.tail();
        assert!(tail.len() <= CAPACITY && tail.starts_with("line ") && tail.ends_with("line 4999"), "{tail}");
        assert!(!tail.contains('\r'));
    }

    #[test]
    fn one_endless_line_and_broken_utf8_do_no_harm() {
        let ring = ConsoleRing::new(false);
        ring.push(&vec![0xff; 3 * CAPACITY]);
        assert_eq!(ring.tail().chars().count(), CAPACITY);
        assert_eq!(ring.panic_line(), None);
    }

    #[test]
    fn whatever_the_guest_prints_fits_into_a_message() {
        let ring = ConsoleRing::new(false);
        let line: Vec<u8> = [PANIC.as_bytes(), &[1; MAX_LINE], b"\n"].concat();
        ring.push(&line);
        ring.push(&[2; 2 * CAPACITY]);
        let reason = katana_protocol::vmm::ExitReason::Panic(ring.panic_line().unwrap());
        let event = katana_protocol::vmm::Event::Exit { reason, console: ring.tail() };
        assert!(serde_json::to_vec(&event).unwrap().len() <= katana_protocol::vmm::MAX_MESSAGE);
    }

    #[test]
    fn the_first_panic_is_found_even_in_an_unfinished_line() {
        let ring = ConsoleRing::new(false);
        ring.push(b"[    1.2] all is well\n[    1.3] Kernel panic - not sync");
        ring.push(b"ing: VFS: no root");
        assert_eq!(ring.panic_line().as_deref(), Some("Kernel panic - not syncing: VFS: no root"));
        ring.push(b"\nKernel panic - not syncing: again\n");
        assert_eq!(ring.panic_line().as_deref(), Some("Kernel panic - not syncing: VFS: no root"));
    }
}
