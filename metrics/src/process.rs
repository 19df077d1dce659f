//! A process as Linux shows it below /proc: the shim, the VMM, `kata-monitor` and, by what the guest says, the agent.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::text::{Family, Kind, Text};

/// Clock ticks in a second, in which /proc counts for all programs (USER_HZ).
const TICKS: f64 = 100.0;
/// One of them, microseconds.
const TICK_USEC: u64 = 10_000;
const PAGE: u64 = 4096;
/// Lines of status that are passed on.
const STATUS: [&str; 19] = [
    "VmPeak",
    "VmSize",
    "VmLck",
    "VmPin",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmData",
    "VmStk",
    "VmExe",
    "VmLib",
    "VmPTE",
    "VmPMD",
    "VmSwap",
    "HugetlbPages",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];

/// Lines of io.
const IO: [&str; 7] =
    ["rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes"];

/// The text of a process's files.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// `stat`.
    pub stat: String,
    /// `status`.
    pub status: String,
    /// `io`.
    pub io: String,
    /// `limits`.
    pub limits: String,
    /// How many descriptors are open.
    pub descriptors: Option<u64>,
}

impl Files {
    /// Of a process of this host. What cannot be read is empty.
    #[must_use]
    pub fn of(process: &Path) -> Self {
        let read = |name| fs::read_to_string(process.join(name)).unwrap_or_default();
        let descriptors = fs::read_dir(process.join("fd")).ok().map(|open| open.count() as u64);
        Self {
            stat: read("stat"),
            status: read("status"),
            io: read("io"),
            limits: read("limits"),
            descriptors,
        }
    }

    /// A field of stat by its number in proc_pid_stat(5). The name before the third may hold anything.
    fn field(&self, number: usize) -> Option<u64> {
        let (_, fields) = self.stat.rsplit_once(')')?;
        fields.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
    }

    fn status(&self, key: &str) -> Option<u64> {
        let line = self.status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    }

    /// The soft limit in a line of limits; without one, the largest number.
    fn limit(&self, key: &str) -> Option<u64> {
        let line = self.limits.lines().find_map(|line| line.strip_prefix(key))?;
        match line.split_ascii_whitespace().next()? {
            "unlimited" => Some(u64::MAX),
            number => number.parse().ok(),
        }
    }

    fn io(&self, key: &str) -> Option<u64> {
        let line = self.io.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))?;
        line.trim().parse().ok()
    }

    /// Processor time outside the kernel, microseconds; that of a VMM's guest is in it.
    #[must_use]
    pub fn user_usec(&self) -> Option<u64> {
        self.field(14).map(|ticks| ticks.saturating_mul(TICK_USEC))
    }

    /// Processor time in the kernel, microseconds.
    #[must_use]
    pub fn system_usec(&self) -> Option<u64> {
        self.field(15).map(|ticks| ticks.saturating_mul(TICK_USEC))
    }

    /// Processor time in seconds.
    #[must_use]
    pub fn cpu_seconds(&self) -> Option<f64> {
        Some(self.field(14)?.saturating_add(self.field(15)?) as f64 / TICKS)
    }

    /// Resident memory in bytes.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        self.field(24).map(|pages| pages.saturating_mul(PAGE))
    }

    /// How long the process has been there, in seconds.
    #[must_use]
    pub fn age(&self) -> Option<f64> {
        Some(uptime()? - self.field(22)? as f64 / TICKS)
    }

    fn threads(&self) -> Option<u64> {
        self.field(20)
    }

    /// Address space in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> Option<u64> {
        self.field(23)
    }
}

/// Whose files these are. Kata Containers' programs differ in how they name and count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The shim's.
    Shim,
    /// The VMM's.
    Hypervisor,
    /// The agent's.
    Agent,
    /// Those of `kata-monitor`.
    Monitor,
}

impl Whose {
    fn prefix(self) -> &'static str {
        match self {
            Self::Shim => "kata_shim",
            Self::Hypervisor => "kata_hypervisor",
            Self::Agent => "kata_agent",
            Self::Monitor => "kata_monitor",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shim => "the shim",
            Self::Hypervisor => "the VMM",
            Self::Agent => "the agent",
            Self::Monitor => "kata-monitor",
        }
    }

    fn gauge<'t>(self, text: &'t mut Text, metric: &str, help: &str) -> Family<'t> {
        text.family(&format!("{}_{metric}", self.prefix()), Kind::Gauge, help)
    }
}

/// When this host booted, in seconds since 1970: by the clock that is right now, as those who read it compare.
#[must_use]
pub fn booted() -> Option<f64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(now.as_secs_f64() - uptime()?)
}

fn uptime() -> Option<f64> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    uptime.split_ascii_whitespace().next()?.parse().ok()
}

/// What all of Kata Containers' programs but the monitor have.
pub fn write(text: &mut Text, whose: Whose, files: &Files) {
    let name = whose.name();
    whose.gauge(text, "threads", &format!("Threads of {name}.")).add_known(&[], files.threads());
    let help = format!("Processor time of {name}, in clock ticks of 10 ms.");
    let mut stat = whose.gauge(text, "proc_stat", &help);
    for (item, field) in [("utime", 14), ("stime", 15), ("cutime", 16), ("cstime", 17)] {
        stat.add_known(&[("item", item)], files.field(field));
    }
    let (unit, factor) = if whose == Whose::Agent { ("KiB", 1) } else { ("bytes", 1024) };
    let help = format!("Memory of {name} in {unit}, and its context switches.");
    let mut status = whose.gauge(text, "proc_status", &help);
    for key in STATUS {
        let factor = if key.ends_with("switches") { 1 } else { factor };
        let value = files.status(key).map(|value| value.saturating_mul(factor));
        status.add_known(&[("item", &key.to_ascii_lowercase())], value);
    }
    let mut io = whose.gauge(text, "io_stat", &format!("Input and output of {name}, of files and sockets."));
    for key in IO {
        let item = if whose == Whose::Agent { key.to_owned() } else { key.replace('_', "") };
        io.add_known(&[("item", &item)], files.io(key));
    }
    if whose != Whose::Agent {
        let help = format!("Descriptors that {name} has open.");
        whose.gauge(text, "fds", &help).add_known(&[], files.descriptors);
    }
}

/// What the clients' libraries of Prometheus tell of any program. `booted`: when its kernel did, in seconds since 1970.
pub fn write_usual(text: &mut Text, whose: Whose, files: &Files, booted: Option<f64>) {
    let (prefix, name) = (whose.prefix(), whose.name());
    let mut one = |metric: &str, kind, help: String, value: Option<f64>| {
        text.family(&format!("{prefix}_process_{metric}"), kind, &help).add_known(&[], value);
    };
    let number = |value: Option<u64>| value.map(|value| value as f64);
    let cpu = files.cpu_seconds();
    one("cpu_seconds_total", Kind::Counter, format!("Processor time of {name}."), cpu);
    let open = number(files.descriptors);
    one("open_fds", Kind::Gauge, format!("Descriptors that {name} has open."), open);
    let most = number(files.limit("Max open files"));
    one("max_fds", Kind::Gauge, format!("Descriptors that {name} may have open."), most);
    let resident = number(files.resident());
    one("resident_memory_bytes", Kind::Gauge, format!("Resident memory of {name}."), resident);
    let size = number(files.virtual_size());
    one("virtual_memory_bytes", Kind::Gauge, format!("Address space of {name}."), size);
    let most = number(files.limit("Max address space"));
    one("virtual_memory_max_bytes", Kind::Gauge, format!("Address space that {name} may have."), most);
    let started = booted.zip(files.field(22)).map(|(booted, ticks)| booted + ticks as f64 / TICKS);
    one("start_time_seconds", Kind::Gauge, format!("When {name} started, since 1970."), started);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_this_process() {
        let files = Files::of(Path::new("/proc/self"));
        let mut text = Text::default();
        write(&mut text, Whose::Shim, &files);
        write_usual(&mut text, Whose::Shim, &files, Some(1e9));
        let text = text.finish();
        let value = |line: &str| {
            let found = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
            found.unwrap_or_else(|| panic!("{line}: {text}")).parse::<f64>().unwrap()
        };
        let resident = files.status("VmRSS").unwrap() as f64 * 1024.0;
        assert_eq!(value("kata_shim_proc_status{item=\"vmrss\"}"), resident);
        // The kernel counts pages in several places, and adds them up now and then.
        let counted = value("kata_shim_process_resident_memory_bytes");
        assert!((counted - resident).abs() < 2e6, "{counted} {resident}");
        assert_eq!(value("kata_shim_fds"), files.descriptors.unwrap() as f64);
        assert!(value("kata_shim_threads") >= 1.0);
        assert!(value("kata_shim_process_start_time_seconds") > 1e9);
        assert!(text.contains("kata_shim_io_stat{item=\"readbytes\"}"), "{text}");
    }

    #[test]
    fn the_name_of_a_program_is_not_taken_for_fields() {
        let stat = "7 (a) S 1 (x) R 1 2 3 4 5 6 7 8 9 10 150 250 0 0 20 0 3 0 9 1000 2";
        let files = Files { stat: stat.into(), ..Files::default() };
        assert_eq!(
            (files.cpu_seconds(), files.threads(), files.resident()),
            (Some(4.0), Some(3), Some(8192))
        );
        assert_eq!(Files { stat: ")".into(), ..Files::default() }.threads(), None);
    }
}
