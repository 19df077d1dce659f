//! A container's cgroup v2 files as containerd's metrics.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    RdmaEntry, RdmaStat,
};
use katana_metrics::process;

/// The files of a cgroup by name.
pub type Files = HashMap<String, String>;

/// The metrics that the files hold. What is missing or unreadable is zero, as in containerd's own reader.
pub fn metrics(files: &Files) -> Metrics {
    Metrics {
        pids: Some(PidsStat {
            current: value(files, "pids.current"),
            limit: limit(files, "pids.max").unwrap_or(0),
            ..Default::default()
        })
        .into(),
        cpu: Some(cpu(files)).into(),
        memory: Some(memory(files)).into(),
        memory_events: Some(memory_events(files)).into(),
        io: Some(IOStat {
            usage: io(files),
            psi: pressure(files, "io.pressure").into(),
            ..Default::default()
        })
        .into(),
        rdma: Some(RdmaStat {
            current: rdma(files, "rdma.current"),
            limit: rdma(files, "rdma.max"),
            ..Default::default()
        })
        .into(),
        hugetlb: huge_pages(files),
        ..Default::default()
    }
}

/// Adds what another container uses. Limits are each container's own and have no sum.
pub fn add(total: &mut Metrics, one: &Metrics) {
    macro_rules! add {
        ($part:ident: $($member:ident),+) => {{
            let sum = total.$part.mut_or_insert_default();
            $(sum.$member = sum.$member.saturating_add(one.$part.$member);)+
        }};
    }
    add!(pids: current);
    add!(cpu: usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec);
    add!(memory: usage, swap_usage, anon, file, kernel_stack, slab, sock, shmem, file_mapped, file_dirty, file_writeback,
         inactive_anon, active_anon, inactive_file, active_file, unevictable, slab_reclaimable, slab_unreclaimable,
         pgfault, pgmajfault);
    add!(memory_events: low, high, max, oom, oom_kill);
    total.pids.mut_or_insert_default().limit = 0;
    let memory = total.memory.mut_or_insert_default();
    (memory.usage_limit, memory.swap_limit) = (0, 0);
}

/// Puts what these processes of the host have used in the place of what a guest says that its containers have: the
/// guest's own part is in it, and nobody can claim another number.
pub fn count_host(total: &mut Metrics, processes: &[process::Files]) {
    let sum =
        |of: fn(&process::Files) -> Option<u64>| processes.iter().filter_map(of).fold(0, u64::saturating_add);
    let cpu = total.cpu.mut_or_insert_default();
    cpu.user_usec = sum(process::Files::user_usec);
    cpu.system_usec = sum(process::Files::system_usec);
    cpu.usage_usec = cpu.user_usec.saturating_add(cpu.system_usec);
    total.memory.mut_or_insert_default().usage = sum(process::Files::resident);
}

fn text<'a>(files: &'a Files, name: &str) -> &'a str {
    files.get(name).map_or("", String::as_str)
}

fn value(files: &Files, name: &str) -> u64 {
    text(files, name).trim().parse().unwrap_or(0)
}

/// A number, or "max" for the largest; nothing when the file is not there.
fn limit(files: &Files, name: &str) -> Option<u64> {
    number(files.get(name)?.trim())
}

fn number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// "key value" lines.
fn keyed<'a>(files: &'a Files, name: &str) -> HashMap<&'a str, u64> {
    let pairs = text(files, name).lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(key, value)| Some((key, value.trim().parse().ok()?))).collect()
}

/// "name key=value key=value" lines.
fn nested<'a>(files: &'a Files, name: &str) -> Vec<(&'a str, HashMap<&'a str, &'a str>)> {
    let line = |line: &'a str| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.filter_map(|word| word.split_once('=')).collect()))
    };
    text(files, name).lines().filter_map(line).collect()
}

fn cpu(files: &Files) -> CPUStat {
    let stat = keyed(files, "cpu.stat");
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: pressure(files, "cpu.pressure").into(),
        ..Default::default()
    }
}

fn memory(files: &Files) -> MemoryStat {
    let stat = keyed(files, "memory.stat");
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    let kinds = |key: &str| {
        let parts = [get(key), get(&format!("{key}_anon")), get(&format!("{key}_file"))];
        parts.into_iter().fold(0, u64::saturating_add)
    };
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: kinds("workingset_refault"),
        workingset_activate: kinds("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: value(files, "memory.current"),
        usage_limit: limit(files, "memory.max").unwrap_or(0),
        swap_usage: value(files, "memory.swap.current"),
        swap_limit: limit(files, "memory.swap.max").unwrap_or(0),
        max_usage: value(files, "memory.peak"),
        swap_max_usage: value(files, "memory.swap.peak"),
        psi: pressure(files, "memory.pressure").into(),
        ..Default::default()
    }
}

fn memory_events(files: &Files) -> MemoryEvents {
    let events = keyed(files, "memory.events");
    let get = |key: &str| events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

fn io(files: &Files) -> Vec<IOEntry> {
    let entry = |(device, values): (&str, HashMap<&str, &str>)| {
        let (major, minor) = device.split_once(':')?;
        let get = |key: &str| values.get(key).and_then(|value| value.parse().ok()).unwrap_or(0);
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get("rbytes"),
            wbytes: get("wbytes"),
            rios: get("rios"),
            wios: get("wios"),
            ..Default::default()
        })
    };
    nested(files, "io.stat").into_iter().filter_map(entry).collect()
}

fn pressure(files: &Files, name: &str) -> Option<PSIStats> {
    let lines: HashMap<_, _> = nested(files, name).into_iter().collect();
    let data = |kind: &str| {
        let values = lines.get(kind)?;
        let get = |key: &str| values.get(key).and_then(|value| value.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: get("avg10"),
            avg60: get("avg60"),
            avg300: get("avg300"),
            total: values.get("total").and_then(|value| value.parse().ok()).unwrap_or(0),
            ..Default::default()
        })
    };
    let (some, full) = (data("some"), data("full"));
    (some.is_some() || full.is_some()).then(|| PSIStats {
        some: some.into(),
        full: full.into(),
        ..Default::default()
    })
}

fn rdma(files: &Files, name: &str) -> Vec<RdmaEntry> {
    let entry = |(device, values): (&str, HashMap<&str, &str>)| {
        let get = |key: &str| {
            let value = values.get(key).and_then(|value| number(value)).unwrap_or(0);
            u32::try_from(value).unwrap_or(u32::MAX)
        };
        RdmaEntry {
            device: device.into(),
            hca_handles: get("hca_handle"),
            hca_objects: get("hca_object"),
            ..Default::default()
        }
    };
    nested(files, name).into_iter().map(entry).collect()
}

fn huge_pages(files: &Files) -> Vec<HugeTlbStat> {
    let size = |name: &String| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned());
    let mut sizes: Vec<_> = files.keys().filter_map(size).filter(|size| !size.contains('.')).collect();
    sizes.sort();
    let entry = |pagesize: String| HugeTlbStat {
        current: value(files, &format!("hugetlb.{pagesize}.current")),
        max: limit(files, &format!("hugetlb.{pagesize}.max")).unwrap_or(0),
        failcnt: keyed(files, &format!("hugetlb.{pagesize}.events")).get("max").copied().unwrap_or(0),
        pagesize,
        ..Default::default()
    };
    sizes.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        list.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn files_become_metrics() {
        let metrics = metrics(&files(&[
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 100\nuser_usec 60\nsystem_usec 40\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\nworkingset_refault_anon 3\nworkingset_refault_file 4\n"),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n"),
            ("io.stat", "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n"),
            ("hugetlb.2MB.current", "5\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.rsvd.current", "5\n"),
        ]));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.cpu.throttled_usec, metrics.cpu.psi.some.total),
            (100, 3, 99)
        );
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, u64::MAX));
        assert_eq!((metrics.memory.anon, metrics.memory.workingset_refault), (1, 7));
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (3, 4));
        let io = &metrics.io.usage[0];
        assert_eq!((io.major, io.minor, io.rbytes, io.wios), (254, 0, 10, 2));
        assert_eq!(metrics.hugetlb.len(), 1);
        assert_eq!((metrics.hugetlb[0].pagesize.as_str(), metrics.hugetlb[0].max), ("2MB", u64::MAX));
        assert_eq!(crate::host::events::any(&metrics).type_url, "io.containerd.cgroups.v2.Metrics");
    }

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let one = metrics(&files(&[
            ("pids.current", "3"),
            ("cpu.stat", "usage_usec 100"),
            ("memory.current", "18446744073709551615"),
            ("memory.max", "4096"),
            ("memory.stat", "inactive_file 7"),
        ]));
        let mut total = one.clone();
        add(&mut total, &one);
        assert_eq!((total.pids.current, total.cpu.usage_usec, total.memory.inactive_file), (6, 200, 14));
        assert_eq!((total.memory.usage, total.memory.usage_limit), (u64::MAX, 0));
    }

    #[test]
    fn a_pod_costs_the_host_what_shim_and_vmm_do() {
        let stat = |user, system, pages| process::Files {
            stat: format!("7 (a) S 1 2 3 4 5 6 7 8 9 10 {user} {system} 0 0 20 0 3 0 9 1000 {pages}"),
            ..process::Files::default()
        };
        let mut total =
            metrics(&files(&[("cpu.stat", "usage_usec 99"), ("memory.current", "18446744073709551615")]));
        count_host(&mut total, &[stat(1, 2, 3), stat(10, 20, 30), process::Files::default()]);
        let cpu = &total.cpu;
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (330_000, 110_000, 220_000));
        assert_eq!(total.memory.usage, 33 * 4096);
    }

    #[test]
    fn a_hostile_guests_files_do_no_harm() {
        let metrics = metrics(&files(&[
            ("cpu.stat", "usage_usec\nusage_usec -1\n\u{0}\n \nuser_usec 99999999999999999999999"),
            ("io.stat", ":\n8 rbytes=1\nx:y rbytes=1\n8:0 rbytes wbytes==\n8:1 Rbytes=1"),
            ("memory.max", ""),
            ("memory.pressure", "some\nfull avg10=NaN total=-1"),
            (
                "memory.stat",
                "workingset_refault 18446744073709551615\nworkingset_refault_anon 18446744073709551615",
            ),
            ("hugetlb..current", "1"),
            ("rdma.max", "mlx hca_handle=max hca_object=99999999999"),
        ]));
        assert_eq!(metrics.cpu.usage_usec, 0);
        assert_eq!(metrics.io.usage.len(), 2);
        assert_eq!(metrics.rdma.limit[0].hca_objects, u32::MAX);
    }

    /// Files of a guest's cgroups: names of those that are looked for, and any text.
    #[test]
    fn fuzz_stats() {
        let names = [
            "pids.current",
            "pids.max",
            "cpu.stat",
            "cpu.pressure",
            "memory.current",
            "memory.max",
            "memory.stat",
            "memory.events",
            "memory.swap.current",
            "io.stat",
            "io.pressure",
            "rdma.current",
            "hugetlb.2MB.current",
            "hugetlb.2MB.max",
            "hugetlb.",
        ];
        katana_fuzz::fuzz("stats", |input| {
            let mut files = Files::new();
            let name = input.one_of(&names).to_owned();
            let mut other = || String::from_utf8_lossy(input.bytes(8)).into_owned();
            let second = other();
            files.insert(second, other());
            files.insert(name, String::from_utf8_lossy(input.rest()).into_owned());
            let one = metrics(&files);
            let mut total = one.clone();
            add(&mut total, &one);
            crate::host::events::any(&total);
        });
    }
}
