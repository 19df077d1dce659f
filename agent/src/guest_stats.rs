//! What the guest's kernel says of itself and of the agent, for the host's metrics.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};

/// Files below /proc. Those of self are the agent's, as they are read in it.
const FILES: [&str; 10] = [
    "stat",
    "meminfo",
    "loadavg",
    "vmstat",
    "diskstats",
    "net/dev",
    "self/stat",
    "self/status",
    "self/io",
    "self/limits",
];
/// The most that is passed on of each, bytes. The longest is net/dev, with a line for each interface.
const LONGEST: u64 = 32 * 1024;

/// The text of the files, by their paths.
pub fn files() -> HashMap<String, String> {
    let file = |path: &&str| Some(((*path).to_owned(), read(path).ok()?));
    FILES.iter().filter_map(file).collect()
}

fn read(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(format!("/proc/{path}"))?.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// How many descriptors this process has open, but for the one that looks.
pub fn open_descriptors() -> u32 {
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    u32::try_from(open.saturating_sub(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_short_and_says_something() {
        let files = files();
        assert!(files["meminfo"].starts_with("MemTotal:"));
        assert!(files["self/status"].contains("VmRSS:"));
        assert!(files.values().all(|text| !text.is_empty() && text.len() as u64 <= LONGEST));
        assert!(open_descriptors() > 0);
    }
}
