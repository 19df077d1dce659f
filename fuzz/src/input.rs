//! An input: bytes of which a target makes what it needs.

/// Bytes to be consumed from the front. Behind their end there are zeros.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// An input of these bytes.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether no byte is left: a target that does one thing after the other stops here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// So many bytes, or fewer if there are not so many.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// A number.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// A number.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A number.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A number.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`; 0 if there is none.
    pub fn below(&mut self, end: usize) -> usize {
        if end <= 256 { usize::from(self.u8()) % end.max(1) } else { self.u32() as usize % end }
    }

    /// One of these. Panics when there is none.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// True once in so many times.
    pub fn once_in(&mut self, count: u8) -> bool {
        self.u8() % count.max(1) == 1 % count.max(1)
    }

    /// A number that is often one on which something changes: small, at the end of a type or beside a power of 2.
    pub fn edge(&mut self) -> u64 {
        let kind = self.u8();
        let number = match kind % 8 {
            0 | 1 => u64::from(kind / 8),
            2 => 1 << (kind / 8),
            3 => 1 << (32 + u32::from(kind / 8)),
            4 => [0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX, 4096, 65536]
                [usize::from(kind / 8) % 8],
            5 => return self.u64(),
            _ => return self.u16().into(),
        };
        number.wrapping_add([0, 0, 1, u64::MAX][usize::from(self.u8()) % 4])
    }
}
