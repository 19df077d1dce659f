//! Whether the host's kernel takes its time from the TSC. If it does not, the TSCs of the processors may differ or stop
//! (Linux, arch/x86/kernel/tsc.c: the clocksource watchdog), and a guest that read them would see time jump.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

/// The clocksource in use (Linux, timers/timekeeping.rst).
pub const FILE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Whether the host's clocksource is the TSC; not where nothing says so.
pub fn is_tsc() -> bool {
    // One look for the life of a shim: what a template's name stands for does not change in between.
    static IS_TSC: OnceLock<bool> = OnceLock::new();
    *IS_TSC.get_or_init(|| is_tsc_in(Path::new(FILE)))
}

fn is_tsc_in(file: &Path) -> bool {
    fs::read_to_string(file).is_ok_and(|name| name.trim_end() == "tsc")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_that_uses_the_tsc_vouches_for_it() {
        let file = std::env::temp_dir().join(format!("katana-clocksource-{}", std::process::id()));
        for (content, expected) in [
            ("tsc\n", true),
            ("tsc", true),
            ("tsc-early\n", false),
            ("hpet\n", false),
            ("kvm-clock\n", false),
            ("", false),
        ] {
            fs::write(&file, content).unwrap();
            assert_eq!(is_tsc_in(&file), expected, "{content:?}");
        }
        fs::remove_file(&file).unwrap();
        assert!(!is_tsc_in(&file));
    }
}
