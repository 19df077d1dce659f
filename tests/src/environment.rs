//! What this run of the tests is about: read from the environment.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// The runtime that containers run with unless a test says otherwise.
pub const KATA: &str = "io.containerd.kata.v2";
/// The runtime that others are compared with.
pub const RUNC: &str = "io.containerd.runc.v2";

/// `$KATANA_RUNTIME`, or Katana. With runc, the tests test themselves: a case that runc fails is a wrong case.
pub fn runtime() -> String {
    std::env::var("KATANA_RUNTIME").unwrap_or_else(|_| KATA.to_owned())
}

/// Whether containers run in virtual machines.
pub fn is_vm() -> bool {
    runtime() != RUNC
}

/// Whether a test that is only about virtual machines should go on; says so when it should not.
pub fn is_vm_or_say(why: &str) -> bool {
    if !is_vm() {
        say_skipped(&format!("with {}: {why}", runtime()));
    }
    is_vm()
}

/// Says that the test of this thread does not run here. Not by `eprintln!`, whose output the test runner keeps to
/// itself when a test passes: tests/all counts these lines.
pub fn say_skipped(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}

/// Where Katana's programs are: `$KATANA_BIN`, or where they are installed.
pub fn bin() -> PathBuf {
    std::env::var_os("KATANA_BIN").map_or_else(|| PathBuf::from("/opt/kata/bin"), PathBuf::from)
}

/// The namespace in containerd.
pub fn namespace() -> String {
    std::env::var("CONTAINERD_NAMESPACE").unwrap_or_else(|_| "default".to_owned())
}

/// Ten times as many rounds when `$KATANA_SOAK` is set.
pub fn rounds(usual: usize) -> usize {
    if is_soak() { usual * 10 } else { usual }
}

/// Whether this is the long version of the tests.
pub fn is_soak() -> bool {
    std::env::var_os("KATANA_SOAK").is_some()
}

/// Whether the machine's clock counts instructions. Then it has one processor and is slow.
pub fn is_counted() -> bool {
    instructions_per_ns().is_some()
}

/// `$KATANA_COUNTED`: how many instructions a nanosecond of that clock is.
fn instructions_per_ns() -> Option<f64> {
    std::env::var("KATANA_COUNTED").ok()?.parse().ok()
}

/// A time of the machine's clock; if that counts instructions, one in which a millisecond is a million of them.
pub fn counted(time: Duration) -> Duration {
    time.mul_f64(instructions_per_ns().unwrap_or(1.0))
}

/// After how long a command counts as hung. No test measures anything with it.
pub fn hang_limit() -> Duration {
    let seconds = std::env::var("KATANA_HANG_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(180))
}
