//! The log: lines on standard error, which the shim reads.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Instant;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::sync::lock;

/// Much of what is logged is the guest's doing, and a hostile guest must not fill the host's disk: so many
/// lines at once, and so many a second in the long run.
const BURST: f64 = 500.0;
const PER_SECOND: f64 = 10.0;

struct Logger {
    budget: Mutex<Budget>,
}

struct Budget {
    lines: f64,
    refilled: Option<Instant>,
    lost: u64,
}

static LOGGER: Logger = Logger { budget: Mutex::new(Budget { lines: BURST, refilled: None, lost: 0 }) };

/// Starts logging: errors, warnings and information, or everything in debug mode.
pub fn start(debug: bool) {
    // Fails only if there is a logger already.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
}

impl Budget {
    /// Takes one line; answers how many were lost before it, or nothing if this one is lost as well.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let last = self.refilled.replace(now).unwrap_or(now);
        self.lines = (self.lines + now.duration_since(last).as_secs_f64() * PER_SECOND).min(BURST);
        if self.lines < 1.0 {
            self.lost += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.lost))
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // What the libraries call an error is mostly a malformed request of the guest.
        let ours = record.target().starts_with("kata_vmm");
        if !self.enabled(record.metadata()) || (!ours && record.level() > Level::Warn) {
            return;
        }
        let Some(lost) = lock(&self.budget).take(Instant::now()) else { return };
        let mut stderr = io::stderr().lock();
        if lost > 0 {
            let _ = writeln!(stderr, "WARN {lost} log lines left out");
        }
        let _ = writeln!(stderr, "{} {}: {}", record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut budget = Budget { lines: BURST, refilled: None, lost: 0 };
        let passed = (0..10_000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(budget.take(start + Duration::from_secs(1)), Some(10_000 - BURST as u64));
        assert_eq!(budget.take(start + Duration::from_secs(1)), Some(0));
    }
}
