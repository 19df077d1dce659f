//! The early console: the transmit half of a 16550 at 0x3F8, enough for `earlyprintk=ttyS0`. What the guest
//! prints before its virtio console is there, above all an early panic, comes this way.

use std::ops::Range;
use std::sync::Mutex;

use crate::bus::BusDevice;
use crate::console_ring::ConsoleRing;
use crate::sync::lock;

/// The ports of COM1.
pub const PORTS: Range<u64> = 0x3f8..0x400;

const TRANSMIT: u64 = 0;
const LINE_CONTROL: u64 = 3;
const LINE_STATUS: u64 = 5;

/// Line control: the first two registers are the baud rate divisor.
const DIVISOR_LATCH: u8 = 0x80;
/// Line status: transmitter empty and ready.
const READY: u8 = 0x60;

/// The port.
pub struct Serial {
    console: ConsoleRing,
    line_control: Mutex<u8>,
}

impl Serial {
    /// A port that writes to `console`.
    pub fn new(console: ConsoleRing) -> Self {
        Self { console, line_control: Mutex::new(0) }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([status], LINE_STATUS) = (data, offset) {
            *status = READY;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // More than one byte is a string instruction (`rep outsb`).
            (TRANSMIT, bytes) if *lock(&self.line_control) & DIVISOR_LATCH == 0 => {
                self.console.push(bytes);
            }
            (LINE_CONTROL, [control]) => *lock(&self.line_control) = *control,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_transmitted_is_printed() {
        let console = ConsoleRing::new(false);
        let serial = Serial::new(console.clone());
        serial.write(LINE_CONTROL, &[0x83]);
        serial.write(TRANSMIT, b"\x01");
        serial.write(LINE_CONTROL, &[0x03]);
        serial.write(1, &[0]);
        serial.write(TRANSMIT, b"o");
        serial.write(TRANSMIT, b"k\n");
        assert_eq!(console.tail(), "ok");
        let mut status = [0];
        serial.read(LINE_STATUS, &mut status);
        assert_eq!(status, [READY]);
        // Not a full UART: Linux's 8250 driver must not take it for one.
        serial.read(1, &mut status);
        assert_eq!(status, [0]);
    }
}
