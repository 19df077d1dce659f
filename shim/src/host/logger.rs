//! Log lines into the FIFO that containerd reads, in the form its own log has.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

use super::rate::Sparing;
use super::recent::Recent;
use crate::error::cut;

/// The target of lines that the VMM has written. With `enable_debug` the guest's kernel logs its boot there.
pub const VMM: &str = "kata-vmm";
/// Of the VMM's lines at once, and of those of any other place in this program.
const BURSTS: (u32, u32) = (1000, 100);
/// In a second from one place after these.
const PER_SECOND: u32 = 2;
/// Longest text, bytes.
const LONGEST: usize = 4096;
/// Bytes of the lines that are kept for who looks later.
const KEPT: usize = 64 * 1024;

static RECENT: OnceLock<Recent<Arc<str>>> = OnceLock::new();

/// The last lines, each with its end, and those that come.
pub fn recent() -> &'static Recent<Arc<str>> {
    RECENT.get_or_init(|| Recent::new(KEPT))
}

struct FifoLogger {
    fifo: File,
    sandbox: String,
    places: Mutex<Places>,
}

/// How much each place in this program has logged. Guests can cause many lines to be logged over and over; they shall
/// neither fill the host's disk nor have lines of other places left out.
#[derive(Default)]
struct Places(HashMap<(&'static str, u32), Sparing>);

impl Places {
    /// If the line is to be written: how many of its place have been left out before it.
    fn admit(&mut self, record: &Record<'_>, now: Instant) -> Option<u64> {
        let (Some(file), Some(line)) = (record.file_static(), record.line()) else { return Some(0) };
        let burst = if record.target() == VMM { BURSTS.0 } else { BURSTS.1 };
        self.0.entry((file, line)).or_insert_with(|| Sparing::new(burst, PER_SECOND)).admit(now)
    }
}

/// Logs to `fifo` from now on. Without the FIFO (a shim started by hand) nothing is logged.
///
/// The FIFO is opened for reading as well, so that a write does not fail while containerd restarts, and
/// non-blocking, so that a containerd that does not read cannot stop the shim: then lines are lost.
pub fn init(fifo: &Path, sandbox: &str, debug: bool) {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo);
    let Ok(fifo) = opened else { return };
    let logger = FifoLogger { fifo, sandbox: sandbox.to_owned(), places: Mutex::default() };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        set_debug(debug);
    }
}

/// Chooses between the levels "info" and "debug".
pub fn set_debug(debug: bool) {
    log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
}

impl Log for FifoLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The ttrpc crate logs every refused request as an error of its own.
        metadata.level() <= log::max_level() && !metadata.target().starts_with("ttrpc")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let left_out =
            self.places.lock().unwrap_or_else(PoisonError::into_inner).admit(record, Instant::now());
        if let Some(left_out) = left_out {
            let line = line(SystemTime::now(), record, left_out, &self.sandbox);
            // One write per line: containerd copies the bytes of all shims into one log.
            let _ = (&self.fifo).write(line.as_bytes());
            recent().push(line.as_str().into(), line.len());
        }
    }

    fn flush(&self) {}
}

fn line(now: SystemTime, record: &Record<'_>, left_out: u64, sandbox: &str) -> String {
    let level = match record.level() {
        log::Level::Warn => "warning",
        log::Level::Error => "error",
        log::Level::Info => "info",
        log::Level::Debug | log::Level::Trace => "debug",
    };
    let mut text = cut(record.args().to_string(), LONGEST);
    if left_out > 0 {
        let _ = write!(text, " (and {left_out} lines like this one before it)");
    }
    let message = quote(&text);
    format!("time=\"{}\" level={level} msg={message} runtime=kata sandbox={sandbox}\n", rfc3339(now))
}

/// Quotes as Go's logrus does, so that no text can end its field or its line, or do anything to a terminal.
fn quote(text: &str) -> String {
    let quoted = serde_json::to_string(text).unwrap_or_default();
    // JSON leaves DEL, C1 and what turns a text around as they are.
    crate::error::plain(&quoted)
}

/// The time in UTC as RFC 3339, by the days-to-civil rule of the proleptic Gregorian calendar.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 1 March of year 0, in eras of 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let mut text = String::with_capacity(30);
    let _ = write!(text, "{year:04}-{month:02}-{day:02}T");
    let _ = write!(text, "{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60);
    let _ = write!(text, ".{:09}Z", since.subsec_nanos());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59.000000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn a_message_cannot_forge_a_line() {
        let text = line(
            UNIX_EPOCH,
            &Record::builder()
                .level(log::Level::Warn)
                .args(format_args!("a\" level=info\nb\u{1b}\u{9b}\u{202e}"))
                .build(),
            0,
            "s1",
        );
        assert_eq!(
            text,
            "time=\"1970-01-01T00:00:00.000000000Z\" level=warning msg=\"a\\\" level=info\\nb\\u001b\\u{9b}\\u{202e}\" runtime=kata sandbox=s1\n"
        );
    }

    #[test]
    fn a_place_that_logs_on_and_on_is_cut_short_and_counted_and_no_other() {
        let (mut places, now) = (Places::default(), Instant::now());
        let mut admit = |target: &str, line: u32, now| {
            let mut record = Record::builder();
            record.target(target).file_static(Some("f.rs")).line(Some(line)).args(format_args!("x"));
            places.admit(&record.build(), now)
        };
        let admitted = (0..1000).filter(|_| admit("ports", 1, now).is_some()).count();
        assert_eq!(admitted, BURSTS.1 as usize);
        assert_eq!(admit("ports", 2, now), Some(0));
        assert_eq!((0..1000).filter(|_| admit(VMM, 3, now).is_some()).count(), 1000);
        let later = now + Duration::from_secs(1);
        assert_eq!(admit("ports", 1, later), Some(900));
        let record = Record::builder().level(log::Level::Info).args(format_args!("x")).build();
        let text = line(UNIX_EPOCH, &record, 900, "s");
        assert!(text.contains("msg=\"x (and 900 lines like this one before it)\""), "{text}");
    }
}
