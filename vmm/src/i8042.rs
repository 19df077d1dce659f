//! The reset line of a PC's keyboard controller, which is all of it that is here: `reboot=k` ends the VM.

use std::ops::Range;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::end::{End, Ended};

/// Data port and command port, with what lies between.
pub const PORTS: Range<u64> = 0x60..0x65;

const COMMAND: u64 = 4;
/// Pulse output line 0, the CPU's reset.
const RESET_CPU: u8 = 0xfe;

/// The controller.
pub struct I8042 {
    end: Arc<End>,
}

impl I8042 {
    /// A controller that ends the VM.
    pub fn new(end: Arc<End>) -> Self {
        Self { end }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: both buffers empty. Linux waits for that before it writes a command.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) == (COMMAND, &[RESET_CPU]) {
            self.end.reach(Ended::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_ends_the_vm() {
        let end = Arc::new(End::new().unwrap());
        let controller = I8042::new(end.clone());
        controller.write(0, &[RESET_CPU]);
        controller.write(COMMAND, &[0xd1]);
        controller.write(COMMAND, &[RESET_CPU, 0]);
        assert!(end.reached().is_none());
        let mut status = [0xff];
        controller.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
        controller.write(COMMAND, &[RESET_CPU]);
        assert_eq!(end.reached(), Some(Ended::Reset));
    }
}
