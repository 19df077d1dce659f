//! How long things took, for the pod's metrics. There is one pod in this process, and so one such record.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use katana_metrics::histogram::Histogram;

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
