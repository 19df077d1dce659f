//! The guest's CPUs: all are there from the start, and are brought on line when the pod may use them.

use std::fs;
use std::io;
use std::path::Path;

/// Linux, Documentation/core-api/cpu_hotplug.rst.
const CPUS: &str = "/sys/devices/system/cpu";

/// Brings the first `count` CPUs on line, at least one, and takes the others off.
///
/// # Errors
/// When there are fewer, or the kernel refuses; the text names the file.
pub fn set(count: u32) -> io::Result<()> {
    let root = Path::new(CPUS);
    let present = fs::read_to_string(root.join("present"))?;
    let last = last_of(&present).ok_or_else(|| io::Error::other(format!("{CPUS}/present: {present:?}")))?;
    if count > last + 1 {
        return Err(io::Error::other(format!("{count} CPUs are asked for, and there are {}", last + 1)));
    }
    // The first CPU is always on line.
    for number in 1..=last {
        let file = root.join(format!("cpu{number}/online"));
        let wanted = if number < count { "1" } else { "0" };
        let named = |e: io::Error| io::Error::other(format!("{}: {e}", file.display()));
        if fs::read_to_string(&file).map_err(named)?.trim() != wanted {
            fs::write(&file, wanted).map_err(named)?;
        }
    }
    Ok(())
}

/// The last number of a list such as "0-3".
fn last_of(list: &str) -> Option<u32> {
    list.trim().rsplit([',', '-']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cpu_is_found() {
        assert_eq!([last_of("0\n"), last_of("0-3\n"), last_of("0,2-63\n")], [Some(0), Some(3), Some(63)]);
        assert_eq!([last_of(""), last_of("0-\n"), last_of("x")], [None; 3]);
    }
}
