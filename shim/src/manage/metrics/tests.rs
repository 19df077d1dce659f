//! What is written is what Prometheus reads, whatever a guest says, and what the documents list.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::*;

/// A pod of which all is known, with this host in place of the guest.
fn seen(files: HashMap<String, String>) -> Seen {
    for of in [Of::Requests, Of::Agent, Of::Start] {
        durations::record(of, "of a test", Duration::from_millis(3));
    }
    Seen {
        shim: Files::of(Path::new("/proc/self")),
        vmm: Some(Vmm {
            files: Files::of(Path::new("/proc/self")),
            net: "Inter-|\n face |\n tap0: 1 2\n".to_owned(),
        }),
        counts: Some(Counter::ALL.into_iter().map(|counter| (counter, 7)).collect()),
        guest: Some(GuestStatsResponse { files, open_descriptors: 5, ..Default::default() }),
        start: Some("template"),
        booted: booted(),
        asked: 3,
        overhead_cpu: Some(1.5),
    }
}

/// Reads the format as strictly as Prometheus does; the families' kinds by their names.
fn parse(text: &str) -> BTreeMap<String, String> {
    let (mut kinds, mut lines, mut current) = (BTreeMap::new(), HashSet::new(), String::new());
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            current = help.split(' ').next().unwrap().to_owned();
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, current);
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} is there twice");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line:?}");
        assert!(lines.insert(series.to_owned()), "{line:?} is there twice");
        let name = series.split('{').next().unwrap();
        let end = name.strip_prefix(current.as_str()).unwrap_or_else(|| panic!("{line:?} in {current}"));
        let histogram = kinds[&current] == "histogram";
        assert!(
            if histogram { ["_bucket", "_sum", "_count"].contains(&end) } else { end.is_empty() },
            "{line:?}"
        );
        check_labels(&series[name.len()..]);
    }
    kinds
}

/// `{name="value",...}`, with quotes, backslashes and ends of lines escaped.
fn check_labels(labels: &str) {
    if labels.is_empty() {
        return;
    }
    let mut rest = labels.strip_prefix('{').unwrap();
    loop {
        let (name, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{labels:?}"));
        assert!(
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'),
            "{labels:?}"
        );
        let mut end = None;
        let mut escaped = false;
        for (at, c) in value.char_indices() {
            assert!(!c.is_control(), "{labels:?}");
            match c {
                _ if escaped => {
                    assert!(matches!(c, '\\' | '"' | 'n'), "{labels:?}");
                    escaped = false;
                }
                '\\' => escaped = true,
                '"' => {
                    end = Some(at);
                    break;
                }
                _ => {}
            }
        }
        match &value[end.unwrap() + 1..] {
            "}" => return,
            more => rest = more.strip_prefix(',').unwrap_or_else(|| panic!("{labels:?}")),
        }
    }
}

#[test]
fn the_documents_list_what_is_written() {
    let written: BTreeMap<_, _> = parse(&seen(guest::tests::host_files()).text());
    let mut listed = BTreeMap::new();
    for line in include_str!("../../../../docs/metrics.md").lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        if let ["", name, kind, ..] = cells[..]
            && let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'))
            && name.starts_with("kata_")
            && !name.starts_with("kata_monitor_")
        {
            listed.insert(name.to_owned(), kind.to_owned());
        }
    }
    let names = |all: &BTreeMap<String, String>| all.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&listed), names(&written));
    assert_eq!(listed, written);
}

#[test]
fn without_a_guest_its_part_is_left_out_and_said_so() {
    let text = Seen { guest: None, overhead_cpu: None, ..seen(HashMap::new()) }.text();
    let kinds = parse(&text);
    assert!(text.contains("\nkata_shim_guest_up 0\n"), "{text}");
    assert!(kinds.keys().all(|name| !name.starts_with("kata_guest") && !name.contains("overhead")));
    assert!(kinds.contains_key("kata_hypervisor_threads"));
    // And without a machine.
    let text = Seen { shim: Files::of(Path::new("/proc/self")), ..Seen::default() }.text();
    assert!(
        parse(&text).keys().all(|name| name.starts_with("kata_shim_") || name == "kata_agent_scrape_count")
    );
}

#[test]
fn overhead_is_what_the_containers_do_not_use() {
    let seen = seen(HashMap::new());
    let at = Instant::now();
    let before = Used { at, host: 10.0, containers: 4.0 };
    let now = Used { at: at + Duration::from_secs(10), host: 16.0, containers: 8.0 };
    assert_eq!(seen.overhead_cpu(now, Some(before)), Some(20.0));
    // A guest that claims more than there is.
    let claimed = Used { containers: 1e9, ..now };
    assert_eq!(seen.overhead_cpu(claimed, Some(before)), Some(0.0));
    assert_eq!(seen.overhead_cpu(before, Some(before)), None);
}

/// Any text for each file that is looked at.
#[test]
fn fuzz_metrics() {
    let paths: Vec<_> = guest::tests::host_files().into_keys().chain(["self/x".to_owned()]).collect();
    let paths: Vec<_> = paths.iter().map(String::as_str).collect();
    katana_fuzz::fuzz("metrics", |input| {
        let mut files = HashMap::new();
        for _ in 0..3 {
            let path = input.one_of(&paths).to_owned();
            files.insert(path, String::from_utf8_lossy(input.bytes(512)).into_owned());
        }
        let path = input.one_of(&paths).to_owned();
        files.insert(path, String::from_utf8_lossy(input.rest()).into_owned());
        let guest = GuestStatsResponse { files, containers_memory_bytes: u64::MAX, ..Default::default() };
        parse(&Seen { guest: Some(guest), vmm: None, ..seen(HashMap::new()) }.text());
    });
}
