//! What a disk knows of the slot that it is in.

use std::borrow::Cow;
use std::time::Duration;

/// The name that the guest finds in /sys/block/vdX/serial.
pub type Serial = [u8; 20];

/// A slot, for one request.
pub struct Slot<'s> {
    /// Its name.
    pub serial: &'s Serial,
    /// Lets time pass, less if the disk is not wanted any more; answers whether it is.
    pub pause: &'s dyn Fn(Duration) -> bool,
}

/// A slot's name as text.
pub fn name(serial: &Serial) -> Cow<'_, str> {
    let length = serial.iter().position(|byte| *byte == 0).unwrap_or(serial.len());
    String::from_utf8_lossy(serial.get(..length).unwrap_or_default())
}
