//! MSI-X: PCI Local Bus Specification 3.0, 6.8.2. One table of vectors per function.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::copy_out;
use crate::sync::lock;

/// Bytes of a table entry.
const ENTRY: usize = 16;
/// Vector control: masked.
const MASKED: u32 = 1;
/// Message control: enabled, and all vectors masked.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// The bits of message control that a driver may write.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;

/// Where the message of one vector is sent: an interrupt line of the hypervisor.
pub trait Line: Send + Sync {
    /// Sets the message that the line sends.
    fn set_message(&mut self, address: u64, data: u32);
    /// Sends the message.
    fn send(&self);
    /// What sends the message when it is written to, if there can be such a thing.
    fn event(&mut self) -> Option<Arc<EventFd>> {
        None
    }
}

/// The vectors of a function.
pub struct Msix {
    state: Mutex<State>,
    vectors: u16,
}

struct State {
    control: u16,
    vectors: Vec<Vector>,
}

struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    /// The message that the line sends now.
    routed: Option<(u64, u32)>,
    line: Box<dyn Line>,
}

/// The vectors of a function as the driver has set them up: message control, and of each vector address, data, control
/// and whether it is pending.
#[derive(Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    vectors: Vec<(u64, u32, u32, bool)>,
}

impl Msix {
    /// The state, to be kept.
    pub fn save(&self) -> MsixState {
        let state = lock(&self.state);
        let vector = |v: &Vector| (v.address, v.data, v.control, v.pending);
        MsixState { control: state.control, vectors: state.vectors.iter().map(vector).collect() }
    }

    /// Takes over what was kept of a function like this one.
    pub fn restore(&self, saved: &MsixState) {
        let mut state = lock(&self.state);
        for (vector, saved) in state.vectors.iter_mut().zip(&saved.vectors) {
            (vector.address, vector.data, vector.control, vector.pending) = *saved;
        }
        drop(state);
        self.set_control(saved.control);
    }

    /// One vector per line, all masked, disabled: the state after a reset.
    pub fn new(lines: Vec<Box<dyn Line>>) -> Self {
        let vectors = u16::try_from(lines.len()).unwrap_or(u16::MAX);
        let vector =
            |line| Vector { address: 0, data: 0, control: MASKED, pending: false, routed: None, line };
        Self {
            state: Mutex::new(State { control: 0, vectors: lines.into_iter().map(vector).collect() }),
            vectors,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether the driver uses MSI-X at all.
    pub fn enabled(&self) -> bool {
        lock(&self.state).control & ENABLE != 0
    }

    /// The driver wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = lock(&self.state);
        state.control = control & CONTROL_WRITABLE;
        for index in 0..state.vectors.len() {
            state.update(index);
        }
    }

    /// Interrupts by `vector`, or remembers that while it is masked.
    pub fn trigger(&self, vector: u16) {
        let mut state = lock(&self.state);
        if state.control & ENABLE == 0 {
            return;
        }
        let unmasked = state.unmasked(usize::from(vector));
        let Some(vector) = state.vectors.get_mut(usize::from(vector)) else { return };
        if unmasked {
            vector.line.send();
        } else {
            vector.pending = true;
        }
    }

    /// What interrupts by `vector` when it is written to, while MSI-X is enabled.
    pub fn event(&self, vector: u16) -> Option<Arc<EventFd>> {
        let mut state = lock(&self.state);
        if state.control & ENABLE == 0 {
            return None;
        }
        state.vectors.get_mut(usize::from(vector))?.line.event()
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let entry = state.vectors.get(at / ENTRY).map(Vector::bytes).unwrap_or_default();
        copy_out(&entry, (at % ENTRY) as u64, data);
    }

    /// Writes the table. Only aligned accesses of four or eight bytes are defined; others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let (index, field) = (offset as usize / ENTRY, offset as usize % ENTRY);
        if !matches!(data.len(), 4 | 8) || !field.is_multiple_of(data.len()) {
            return;
        }
        let mut state = lock(&self.state);
        let Some(vector) = state.vectors.get_mut(index) else { return };
        for (field, word) in (field..).step_by(4).zip(data.chunks_exact(4)) {
            let Ok(word) = word.try_into().map(u32::from_le_bytes) else { return };
            match field {
                0 => vector.address = vector.address & !0xffff_ffff | u64::from(word & !3),
                4 => vector.address = vector.address & 0xffff_ffff | u64::from(word) << 32,
                8 => vector.data = word,
                _ => vector.control = word & MASKED,
            }
        }
        state.update(index);
    }

    /// Reads the pending bits, 64 to a word.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let byte =
            |vectors: &[Vector]| vectors.iter().rev().fold(0, |bits, v| bits << 1 | u8::from(v.pending));
        let bits: Vec<u8> = state.vectors.chunks(8).map(byte).collect();
        copy_out(&bits, offset, data);
    }
}

impl State {
    fn unmasked(&self, index: usize) -> bool {
        let open = self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        open && self.vectors.get(index).is_some_and(|vector| vector.control & MASKED == 0)
    }

    /// After any change: gives the message of an unmasked vector to its line, and sends what was pending.
    /// Masked vectors may be half written, so their lines wait.
    fn update(&mut self, index: usize) {
        if !self.unmasked(index) {
            return;
        }
        let Some(vector) = self.vectors.get_mut(index) else { return };
        let message = (vector.address, vector.data);
        if vector.routed != Some(message) {
            vector.line.set_message(message.0, message.1);
            vector.routed = Some(message);
        }
        if std::mem::take(&mut vector.pending) {
            vector.line.send();
        }
    }
}

impl Vector {
    fn bytes(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A call to a line.
    #[derive(Debug, PartialEq, Eq)]
    pub enum Call {
        Message(u64, u32),
        Send,
    }

    /// A line that remembers.
    #[derive(Clone, Default)]
    pub struct Recorder(pub Arc<Mutex<Vec<Call>>>);

    impl Recorder {
        pub fn take(&self) -> Vec<Call> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl Line for Recorder {
        fn set_message(&mut self, address: u64, data: u32) {
            lock(&self.0).push(Call::Message(address, data));
        }
        fn send(&self) {
            lock(&self.0).push(Call::Send);
        }
    }

    fn two_vectors() -> (Msix, Recorder, Recorder) {
        let (a, b) = (Recorder::default(), Recorder::default());
        (Msix::new(vec![Box::new(a.clone()), Box::new(b.clone())]), a, b)
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn a_masked_vector_stays_pending_until_it_is_unmasked() {
        let (msix, a, b) = two_vectors();
        msix.set_control(ENABLE);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(16 + 8, &0x31u32.to_le_bytes());
        msix.trigger(1);
        assert_eq!((pending(&msix), b.take()), (0b10, vec![]));
        msix.write_table(16 + 12, &0u32.to_le_bytes());
        assert_eq!((pending(&msix), b.take()), (0, vec![Call::Message(0xfee0_1000, 0x31), Call::Send]));
        msix.trigger(1);
        assert_eq!(b.take(), [Call::Send]);
        assert_eq!(a.take(), []);
    }

    #[test]
    fn the_function_mask_covers_all_vectors() {
        let (msix, a, b) = two_vectors();
        msix.write_table(12, &0u32.to_le_bytes());
        msix.write_table(28, &0u32.to_le_bytes());
        msix.trigger(0);
        assert_eq!((pending(&msix), a.take()), (0, vec![]), "disabled: nothing happens");
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.trigger(0);
        assert_eq!((pending(&msix), a.take()), (1, vec![]));
        msix.set_control(ENABLE);
        assert_eq!((a.take(), b.take()), (vec![Call::Message(0, 0), Call::Send], vec![Call::Message(0, 0)]));
    }

    #[test]
    fn a_message_is_given_to_the_line_once() {
        let (msix, a, _) = two_vectors();
        msix.set_control(ENABLE);
        msix.write_table(8, &[7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(a.take(), [Call::Message(0, 7)]);
        msix.write_table(12, &1u32.to_le_bytes());
        msix.write_table(12, &0u32.to_le_bytes());
        assert_eq!(a.take(), []);
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let (msix, a, _) = two_vectors();
        msix.set_control(ENABLE);
        for (offset, length) in [(1, 4), (0, 1), (0, 2), (4, 8), (32, 4), (u64::MAX, 8), (0, 0)] {
            msix.write_table(offset, &vec![0xff; length]);
            msix.read_table(offset, &mut vec![0; length]);
            msix.read_pending(offset, &mut vec![0; length]);
        }
        msix.trigger(2);
        msix.trigger(u16::MAX);
        let mut entry = [0xff; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(a.take(), []);
    }
}
