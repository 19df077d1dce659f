//! What a pod costs its host in memory.

use std::fs;
use std::time::Duration;

use crate::{Pod, Process};

/// The least size of the mappings side by side that are a guest's memory, KiB: no machine has less.
const LEAST_GUEST_KIB: u64 = 64 * 1024;

/// Proportional set sizes (proc_pid_smaps(5), Pss), KiB: a page that several processes have counts as a part in each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// The shim's.
    pub shim: u64,
    /// The VMM's own.
    pub vmm: u64,
    /// The guest's memory, which is the VMM's as well and not counted there.
    pub guest: u64,
}

impl Memory {
    /// Of a pod's processes, as they are now; nothing for one that is gone.
    pub fn of(pod: &Pod) -> Self {
        let shim = pod.shim.read("smaps_rollup").map_or(0, |text| field(&text, "Pss:"));
        let smaps = pod.vmm.and_then(|vmm| vmm.read("smaps")).unwrap_or_default();
        let (all, guest) = split(&smaps);
        Self { shim, vmm: all.saturating_sub(guest), guest }
    }
}

impl Process {
    /// A file of its directory in /proc, if it still is that process.
    pub fn read(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(format!("/proc/{}/{name}", self.pid)).ok()?;
        self.is_there().then_some(text)
    }

    /// How long it has been there, on a host that has run for so long.
    pub fn age(&self, uptime: Duration) -> Duration {
        // The kernel shows times in a hundredth of a second, whatever its own clock does (USER_HZ).
        uptime.saturating_sub(Duration::from_millis(self.start.saturating_mul(10)))
    }

    /// Whether it is there.
    pub fn is_there(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        started(&stat) == Some(self.start)
    }
}

/// Field 22 of proc_pid_stat(5). The second one, the name, may have blanks and parentheses.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// All of a process, and the guest's memory in it: many mappings that lie side by side, some of them of the template.
fn split(smaps: &str) -> (u64, u64) {
    let (mut all, mut guest) = (0, 0);
    // Of the mappings side by side: where they end, their size, their pages.
    let mut run = (0, 0, 0);
    for line in smaps.lines().chain(["0-0 - - - - /"]) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Size:", size, _] => run.1 += number(size),
            ["Pss:", size, _] => {
                all += number(size);
                run.2 += number(size);
            }
            [range, _, _, _, _, ..] if range.contains('-') => {
                let (start, end) = range.split_once('-').unwrap_or_default();
                let address = |text| u64::from_str_radix(text, 16).unwrap_or(0);
                if address(start) != run.0 {
                    guest += if run.1 >= LEAST_GUEST_KIB { run.2 } else { 0 };
                    run = (0, 0, 0);
                }
                run.0 = address(end);
            }
            _ => {}
        }
    }
    (all, guest)
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    value.map_or(0, number)
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_memory_is_what_lies_side_by_side_and_is_large() {
        let smaps = "\
55e0-55f0 r-xp 00000000 fe:00 123 /opt/kata/bin/kata-vmm\nSize: 100 kB\nPss: 40 kB\n\
10000000-14000000 rw-p 00000000 00:00 0\nSize: 65536 kB\nPss: 1000 kB\n\
14000000-14001000 rw-p 00000000 00:1a 7 /run/kata-containers/template/x\nSize: 4 kB\nPss: 2 kB\n\
15001000-15002000 rw-p 00000000 fe:00 9 /opt/kata/share/image\nSize: 4 kB\nPss: 3 kB\n\
20000000-20001000 rw-p 00000000 00:00 0\nSize: 4 kB\nPss: 4 kB\n";
        assert_eq!(split(smaps), (1049, 1002));
        assert_eq!(split(""), (0, 0));
        assert_eq!(split("x-y\nPss: z kB\nSize: 99999999999999999999999 kB"), (0, 0));
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let mine = fs::read_to_string("/proc/self/stat").unwrap();
        let pid = std::process::id() as i32;
        let me = Process { pid, start: started(&mine).unwrap() };
        assert!(me.is_there() && me.read("smaps_rollup").is_some_and(|text| field(&text, "Pss:") > 0));
        let other = Process { pid, start: me.start + 1 };
        assert!(!other.is_there() && other.read("status").is_none());
        assert_eq!(started("1 (a) b) S 1 2"), None);
    }
}
