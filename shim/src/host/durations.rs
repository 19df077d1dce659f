//! How long things took, for the pod's metrics. There is one pod in this process, and so one such record.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Of {
    /// Requests of containerd.
    Requests,
    /// Requests to the agent.
    Agent,
    /// The start of the pod, up to each of its stages.
    Start,
}

/// Upper bounds of the buckets in milliseconds, those of Kata Containers; the last bucket has none.
pub const BOUNDS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// How many durations were how long.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// In each bucket.
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

type All = BTreeMap<(Of, &'static str), Histogram>;

static ALL: Mutex<All> = Mutex::new(BTreeMap::new());
/// The beginning of the pod's start, and the stages that it has come to.
static START: Mutex<Option<(Instant, Vec<&'static str>)>> = Mutex::new(None);

fn all() -> MutexGuard<'static, All> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a duration of what has this name.
pub fn record(of: Of, name: &'static str, duration: Duration) {
    all().entry((of, name)).or_default().record(duration);
}

/// All that was measured of one kind, by name.
pub fn of(of: Of) -> Vec<(&'static str, Histogram)> {
    let all = all();
    all.iter().filter(|(key, _)| key.0 == of).map(|(key, histogram)| (key.1, histogram.clone())).collect()
}

/// Measures until it is dropped.
pub struct Timer {
    of: Of,
    name: &'static str,
    begun: Instant,
}

impl Timer {
    /// Begins.
    pub fn start(of: Of, name: &'static str) -> Self {
        Self { of, name, begun: Instant::now() }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        record(self.of, self.name, self.begun.elapsed());
    }
}

/// The pod's start begins.
pub fn start_begins() {
    log::debug!("timeline: Create");
    *START.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), Vec::new()));
}

/// The pod's start, or the life of one of its containers, has come to a stage. Only the first one of the start counts:
/// the pod's later containers come to the same stages.
pub fn reached(stage: &'static str) {
    log::debug!("timeline: {stage}");
    let mut start = START.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((begun, stages)) = start.as_mut().filter(|(_, stages)| !stages.contains(&stage)) {
        stages.push(stage);
        record(Of::Start, stage, begun.elapsed());
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

    #[test]
    fn a_stage_of_the_start_counts_once() {
        reached("too early");
        start_begins();
        reached("a stage of this test");
        reached("a stage of this test");
        let found = of(Of::Start);
        let of_stage = |name| found.iter().find(|(stage, _)| *stage == name).map(|(_, histogram)| histogram);
        assert_eq!(of_stage("too early"), None);
        assert_eq!(of_stage("a stage of this test").unwrap().buckets.iter().sum::<u64>(), 1);
        drop(Timer::start(Of::Requests, "a request of this test"));
        assert!(of(Of::Requests).iter().any(|(name, _)| *name == "a request of this test"));
    }
}
