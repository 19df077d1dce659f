//! How many durations were how long.

use std::time::Duration;

/// Upper bounds of the buckets in milliseconds, those of Kata Containers; the last bucket has none.
pub const BOUNDS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// Durations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// How many are in each bucket.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// All of them together, milliseconds.
    pub sum: f64,
}

impl Histogram {
    /// Counts one more.
    pub fn record(&mut self, duration: Duration) {
        let ms = duration.as_secs_f64() * 1000.0;
        let bucket = BOUNDS.iter().position(|bound| ms <= *bound as f64).unwrap_or(BOUNDS.len());
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count += 1;
        }
        self.sum += ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_their_buckets() {
        let mut histogram = Histogram::default();
        for ms in [0, 1, 2, 3, 512, 513, 100_000] {
            histogram.record(Duration::from_millis(ms));
        }
        assert_eq!(histogram.buckets, [2, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert!((histogram.sum - 101_031.0).abs() < 0.001);
    }
}
