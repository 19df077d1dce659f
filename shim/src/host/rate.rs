//! How often something may happen: a burst, and then so many in a second.

use std::time::{Duration, Instant};

/// A bucket that holds a burst, and fills evenly.
#[derive(Debug, Clone)]
pub struct Rate {
    /// The time of one.
    interval: Duration,
    /// The time of all that can be done at once.
    burst: Duration,
    /// Up to when the time of those that were admitted reaches.
    taken: Option<Instant>,
}

impl Rate {
    /// So many at once, at least one, and then so many in a second.
    pub fn new(burst: u32, per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { interval, burst: interval * burst.saturating_sub(1), taken: None }
    }

    /// How long one more has to wait; nothing if it is admitted now.
    pub fn admit(&mut self, now: Instant) -> Option<Duration> {
        let taken = self.taken.map_or(now, |taken| taken.max(now));
        let ahead = taken.duration_since(now);
        if ahead > self.burst {
            return Some(ahead - self.burst);
        }
        self.taken = Some(taken + self.interval);
        None
    }

    /// Waits until one more is admitted.
    pub async fn wait(&mut self) {
        while let Some(pause) = self.admit(tokio::time::Instant::now().into_std()) {
            tokio::time::sleep(pause).await;
        }
    }
}

/// Something that is reported at a rate, and counted beyond it.
#[derive(Debug, Clone)]
pub struct Sparing {
    rate: Rate,
    unreported: u64,
}

impl Sparing {
    /// See [`Rate::new`].
    pub fn new(burst: u32, per_second: u32) -> Self {
        Self { rate: Rate::new(burst, per_second), unreported: 0 }
    }

    /// If it is to be reported: how many have not been since the last report.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.rate.admit(now).is_some() {
            self.unreported = self.unreported.saturating_add(1);
            return None;
        }
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_evenly() {
        let (mut rate, begin) = (Rate::new(3, 10), Instant::now());
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        assert_eq!([0; 3].map(|_| rate.admit(at(0))), [None; 3]);
        assert_eq!(rate.admit(at(0)), Some(Duration::from_millis(100)));
        assert_eq!(rate.admit(at(60)), Some(Duration::from_millis(40)));
        assert_eq!(
            (rate.admit(at(100)), rate.admit(at(199)).is_some(), rate.admit(at(200))),
            (None, true, None)
        );
        // What was not used is a burst again, and no more than that.
        assert_eq!([0; 3].map(|_| rate.admit(at(60_000))), [None; 3]);
        assert!(rate.admit(at(60_000)).is_some());
        // A clock that seems to go backwards does no harm.
        assert!(rate.admit(at(0)).is_some());
    }

    #[test]
    fn what_is_not_reported_is_counted() {
        let (mut sparing, begin) = (Sparing::new(1, 1), Instant::now());
        assert_eq!(sparing.admit(begin), Some(0));
        assert_eq!([0; 5].map(|_| sparing.admit(begin)), [None; 5]);
        let later = begin + Duration::from_secs(1);
        assert_eq!((sparing.admit(later), sparing.admit(later)), (Some(5), None));
    }
}
