//! The guest as its kernel shows it, in files below /proc that its agent passes on. Their text is a guest's: what does
//! not parse is left out, and names are checked.

use std::collections::HashMap;

use katana_metrics::process::{self, Files, Whose};
use katana_metrics::text::{Family, Kind, Text};

/// Lines of meminfo that are passed on, and what Kata Containers calls them.
const MEMINFO: [(&str, &str); 57] = [
    ("MemTotal", "mem_total"),
    ("MemFree", "mem_free"),
    ("MemAvailable", "mem_available"),
    ("Buffers", "buffers"),
    ("Cached", "cached"),
    ("SwapCached", "swap_cached"),
    ("Active", "active"),
    ("Inactive", "inactive"),
    ("Active(anon)", "active_anon"),
    ("Inactive(anon)", "inactive_anon"),
    ("Active(file)", "active_file"),
    ("Inactive(file)", "inactive_file"),
    ("Unevictable", "unevictable"),
    ("Mlocked", "mlocked"),
    ("HighTotal", "high_total"),
    ("HighFree", "high_free"),
    ("LowTotal", "low_total"),
    ("LowFree", "low_free"),
    ("MmapCopy", "mmap_copy"),
    ("SwapTotal", "swap_total"),
    ("SwapFree", "swap_free"),
    ("Dirty", "dirty"),
    ("Writeback", "writeback"),
    ("AnonPages", "anon_pages"),
    ("Mapped", "mapped"),
    ("Shmem", "shmem"),
    ("KReclaimable", "k_reclaimable"),
    ("Slab", "slab"),
    ("SReclaimable", "s_reclaimable"),
    ("SUnreclaim", "s_unreclaim"),
    ("KernelStack", "kernel_stack"),
    ("PageTables", "page_tables"),
    ("Quicklists", "quicklists"),
    ("NFS_Unstable", "nfs_unstable"),
    ("Bounce", "bounce"),
    ("WritebackTmp", "writeback_tmp"),
    ("CommitLimit", "commit_limit"),
    ("Committed_AS", "committed_as"),
    ("VmallocTotal", "vmalloc_total"),
    ("VmallocUsed", "vmalloc_used"),
    ("VmallocChunk", "vmalloc_chunk"),
    ("Percpu", "per_cpu"),
    ("HardwareCorrupted", "hardware_corrupted"),
    ("AnonHugePages", "anon_hugepages"),
    ("ShmemHugePages", "shmem_hugepages"),
    ("ShmemPmdMapped", "shmem_pmd_mapped"),
    ("CmaTotal", "cma_total"),
    ("CmaFree", "cma_free"),
    ("HugePages_Total", "hugepages_total"),
    ("HugePages_Free", "hugepages_free"),
    ("HugePages_Rsvd", "hugepages_rsvd"),
    ("HugePages_Surp", "hugepages_surp"),
    ("Hugepagesize", "hugepagesize"),
    ("Hugetlb", "hugetlb"),
    ("DirectMap4k", "direct_map_4k"),
    ("DirectMap2M", "direct_map_2M"),
    ("DirectMap1G", "direct_map_1G"),
];
/// Columns of /proc/stat.
const CPU: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];
/// Columns of /proc/diskstats after the name.
const DISK: [&str; 17] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];
/// Columns of /proc/net/dev.
const NET: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
/// The most CPUs.
const MOST_CPUS: usize = 256;
/// The most interfaces and disks, each.
const MOST_DEVICES: usize = 64;
/// The most lines of vmstat; Linux 6.12 has some 190.
const MOST_VM_STATS: usize = 512;

/// All that the files say of the guest, and of the agent in it.
pub fn write(text: &mut Text, files: &HashMap<String, String>, descriptors: u32) {
    let of = |path: &str| files.get(path).map_or("", String::as_str);
    load(text, of("loadavg"));
    let mut family = text.family("kata_guest_cpu_time", Kind::Gauge, "Time of the guest's CPUs, ms.");
    cpu_time(&mut family, of("stat"));
    let mut family = text.family("kata_guest_vm_stat", Kind::Gauge, "The guest's /proc/vmstat.");
    vm_stat(&mut family, of("vmstat"));
    let mut family = text.family("kata_guest_netdev_stat", Kind::Gauge, "The guest's network interfaces.");
    net_devices(&mut family, of("net/dev"));
    let mut family = text.family("kata_guest_diskstat", Kind::Gauge, "The guest's disks.");
    disks(&mut family, of("diskstats"));
    let mut family = text.family("kata_guest_meminfo", Kind::Gauge, "The guest's memory, bytes.");
    memory(&mut family, of("meminfo"));

    let agent = Files {
        stat: of("self/stat").to_owned(),
        status: of("self/status").to_owned(),
        io: of("self/io").to_owned(),
        limits: of("self/limits").to_owned(),
        descriptors: Some(descriptors.into()),
    };
    process::write(text, Whose::Agent, &agent);
    let booted = of("stat").lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u32>().ok());
    process::write_usual(text, Whose::Agent, &agent, booted.map(f64::from));
    totals(text, &agent);
}

/// What Kata Containers' agent tells beside that.
fn totals(text: &mut Text, files: &Files) {
    let mut one = |metric: &str, help, value: Option<f64>| {
        text.family(&format!("kata_agent_{metric}"), Kind::Gauge, help).add_known(&[], value);
    };
    let number = |value: Option<u64>| value.map(|value| value as f64);
    one("total_time", "Processor time of the agent, seconds.", files.cpu_seconds());
    one("total_vm", "Address space of the agent, bytes.", number(files.virtual_size()));
    one("total_rss", "Resident memory of the agent, bytes.", number(files.resident()));
}

/// "0.20 0.18 0.12 1/80 11206"
fn load(text: &mut Text, load: &str) {
    let mut words = load.split_ascii_whitespace();
    let mut family = text.family("kata_guest_load", Kind::Gauge, "Load averages of the guest.");
    for item in ["load1", "load5", "load15"] {
        let number = words.next().and_then(|word| word.parse::<f64>().ok());
        family.add_known(&[("item", item)], number.filter(|number| number.is_finite()));
    }
    let tasks = words.next().and_then(|word| word.split_once('/'));
    let mut family = text.family("kata_guest_tasks", Kind::Gauge, "Tasks of the guest that run, and all.");
    if let Some((running, all)) = tasks {
        family.add_known(&[("item", "cur")], running.parse::<u64>().ok());
        family.add_known(&[("item", "max")], all.parse::<u64>().ok());
    }
}

/// "cpu0 1 2 3 ...", and "cpu ..." for all of them, in clock ticks.
fn cpu_time(family: &mut Family<'_>, stat: &str) {
    let lines = stat.lines().map_while(|line| line.strip_prefix("cpu"));
    for line in lines.take(MOST_CPUS) {
        let (cpu, columns) = line.split_once(' ').unwrap_or((line, ""));
        let cpu = if cpu.is_empty() { "total" } else { cpu };
        if cpu != "total" && cpu.parse::<u16>().is_err() {
            continue;
        }
        for (item, value) in CPU.iter().zip(numbers(columns)) {
            family.add_known(&[("cpu", cpu), ("item", item)], value.map(|value| value.saturating_mul(10)));
        }
    }
}

/// "nr_free_pages 1234"
fn vm_stat(family: &mut Family<'_>, text: &str) {
    let is_name = |name: &str| name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    for (name, value) in pairs.filter(|(name, _)| !name.is_empty() && is_name(name)).take(MOST_VM_STATS) {
        family.add_known(&[("item", name)], value.trim().parse::<u64>().ok());
    }
}

/// "  eth0: 1 2 3 ...", after two lines of headings.
pub fn net_devices(family: &mut Family<'_>, text: &str) {
    for line in text.lines().skip(2).take(MOST_DEVICES) {
        let Some((name, columns)) = line.rsplit_once(": ").or_else(|| line.rsplit_once(':')) else {
            continue;
        };
        for (item, value) in NET.iter().zip(numbers(columns)) {
            family.add_known(&[("interface", name.trim()), ("item", item)], value);
        }
    }
}

/// " 254 0 vda 1 2 3 ..."
fn disks(family: &mut Family<'_>, text: &str) {
    for line in text.lines().take(MOST_DEVICES) {
        let mut words = line.split_ascii_whitespace().skip(2);
        let Some(name) = words.next() else { continue };
        for (item, value) in DISK.iter().zip(words) {
            family.add_known(&[("disk", name), ("item", item)], value.parse::<u64>().ok());
        }
    }
}

/// "MemTotal: 1234 kB"; those without a unit are counts.
fn memory(family: &mut Family<'_>, text: &str) {
    for (key, rest) in text.lines().filter_map(|line| line.split_once(':')) {
        let item = MEMINFO.iter().find(|(name, _)| *name == key);
        let mut words = rest.split_ascii_whitespace();
        let value = words.next().and_then(|word| word.parse::<u64>().ok());
        let factor = if words.next() == Some("kB") { 1024 } else { 1 };
        if let Some((_, item)) = item {
            family.add_known(&[("item", item)], value.map(|value| value.saturating_mul(factor)));
        }
    }
}

fn numbers(text: &str) -> impl Iterator<Item = Option<u64>> {
    text.split_ascii_whitespace().map(|word| word.parse().ok())
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs;

    /// This host in place of a guest.
    pub fn host_files() -> HashMap<String, String> {
        let paths = [
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
        let file = |path: &str| Some((path.to_owned(), fs::read_to_string(format!("/proc/{path}")).ok()?));
        paths.into_iter().filter_map(file).collect()
    }

    fn written(files: &[(&str, &str)]) -> String {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let mut text = Text::default();
        write(&mut text, &files, 3);
        text.finish()
    }

    #[test]
    fn lines_of_the_files_become_lines_of_metrics() {
        let text = written(&[
            ("loadavg", "0.20 0.18 0.12 1/80 11206\n"),
            ("stat", "cpu  10 0 2 3\ncpu0 10 0 2 3\nintr 1\ncpu9 1\nbtime 1700000000\n"),
            ("vmstat", "nr_free_pages 12\npgfault 7\n"),
            ("diskstats", " 254       0 vda 5 6 7\n"),
            ("net/dev", "Inter-|\n face |\n  eth0: 1 2 3\n"),
            ("meminfo", "MemTotal:  100 kB\nHugePages_Total:  4\nActive(anon): 1 kB\nNew: 1 kB\n"),
            ("self/stat", "1 (kata-agent) S 1 2 3 4 5 6 7 8 9 10 150 250 0 0 20 0 3 0 100 1000 2"),
            ("self/status", "VmRSS:\t 12 kB\n"),
            ("self/io", "read_bytes: 9\n"),
        ]);
        for line in [
            "kata_guest_load{item=\"load15\"} 0.12",
            "kata_guest_tasks{item=\"max\"} 80",
            "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} 100",
            "kata_guest_cpu_time{cpu=\"0\",item=\"idle\"} 30",
            "kata_guest_vm_stat{item=\"pgfault\"} 7",
            "kata_guest_diskstat{disk=\"vda\",item=\"sectors_read\"} 7",
            "kata_guest_netdev_stat{interface=\"eth0\",item=\"recv_packets\"} 2",
            "kata_guest_meminfo{item=\"mem_total\"} 102400",
            "kata_guest_meminfo{item=\"hugepages_total\"} 4",
            "kata_guest_meminfo{item=\"active_anon\"} 1024",
            "kata_agent_proc_stat{item=\"utime\"} 150",
            "kata_agent_proc_status{item=\"vmrss\"} 12",
            "kata_agent_io_stat{item=\"read_bytes\"} 9",
            "kata_agent_total_time 4",
            "kata_agent_process_start_time_seconds 1700000001",
            "kata_agent_process_open_fds 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains("cpu=\"9\"") && !text.contains("new"), "{text}");
    }

    #[test]
    fn a_hostile_guests_words_make_no_lines_of_their_own() {
        let text = written(&[
            ("stat", "cpu  10\ncpu  11\ncpux 1\ncpu-1 1\n"),
            ("vmstat", "a\"} 1\nb 1\nb 2\nkata{x=\"y\"} 9\n"),
            ("diskstats", "1 2 a\"b\\c 5\n1 2 a\"b\\c 6\n"),
            ("loadavg", "NaN inf 1 /"),
            ("meminfo", "MemTotal: -1 kB\nMemTotal: 18446744073709551615 kB\nMemTotal: 1 kB"),
        ]);
        assert!(text.contains("kata_guest_cpu_time{cpu=\"total\",item=\"user\"} 100\n"), "{text}");
        assert!(text.contains("kata_guest_diskstat{disk=\"a\\\"b\\\\c\",item=\"reads\"} 5\n"), "{text}");
        assert!(text.contains("kata_guest_meminfo{item=\"mem_total\"} 18446744073709551615\n"), "{text}");
        let lines = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(
            (lines("kata_guest_vm_stat"), lines("kata_guest_cpu_time"), lines("kata_guest_load")),
            (1, 1, 1)
        );
    }
}
