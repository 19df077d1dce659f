//! Log lines on standard error, where systemd and containers' engines take them.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Nobody may be left to read it.
        let _ = writeln!(std::io::stderr(), "{} {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Logs lines of this level and those that matter more.
pub fn init(level: LevelFilter) {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
