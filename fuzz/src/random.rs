//! Inputs made at random: wholly, or of those that there are.

/// A generator of numbers that are all different (SplitMix64, Steele, Lea and Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// The next input: one of the corpus with changes, or, once in four times or without a corpus, a new one.
    pub fn input(&mut self, corpus: &[Vec<u8>], longest: usize) -> Vec<u8> {
        if corpus.is_empty() || self.below(4) == 0 {
            let length = self.below(longest) >> self.below(8);
            return std::iter::repeat_with(|| self.next() as u8).take(length).collect();
        }
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, corpus);
        }
        bytes.truncate(longest);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let count = (1 + self.below(64)).min(bytes.len() - at);
        match self.below(8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..at + count)),
            2 => bytes.insert(at, self.next() as u8),
            // Once more, elsewhere: a member twice, a deeper nesting.
            3 => {
                let piece = bytes[at..at + count].to_vec();
                let to = self.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            // A piece of another one.
            4 => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len());
                let piece = other[from..(from + 1 + self.below(64)).min(other.len())].to_vec();
                bytes.splice(at..at + count, piece);
            }
            // A number that is an edge.
            5 => {
                let width = 1 << self.below(4);
                let number = [0, 1, 1 << 31, 1 << 63, u64::MAX, 0x7fff_ffff, 4096][self.below(7)];
                bytes.iter_mut().skip(at).zip(number.to_le_bytes()).take(width).for_each(|(to, b)| *to = b);
            }
            6 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = self.next() as u8),
        }
    }

    /// A number by which inputs are distinguished.
    pub fn hash(bytes: &[u8]) -> u64 {
        bytes.iter().fold(bytes.len() as u64, |hash, byte| mix(hash ^ u64::from(*byte)))
    }
}

fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
