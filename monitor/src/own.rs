//! What this program tells of itself.

use std::path::Path;
use std::time::Duration;

use katana_metrics::histogram::Histogram;
use katana_metrics::process::{self, Files, Whose, booted};
use katana_metrics::text::{Kind, Text};

/// What it counts.
#[derive(Debug, Default)]
pub struct Own {
    scrapes: u64,
    failed: u64,
    durations: Histogram,
}

impl Own {
    /// Counts that all pods were asked, and how long it took.
    pub fn scraped(&mut self, took: Duration, failed: usize) {
        self.scrapes += 1;
        self.failed += u64::from(failed > 0);
        self.durations.record(took);
    }

    /// The text; each pod by its id, and whether its shim has answered.
    pub fn text(&self, pods: &[(&str, bool)]) -> String {
        let mut text = Text::default();
        let help = "Pods of this host.";
        text.family("kata_monitor_running_shim_count", Kind::Gauge, help).add(&[], pods.len());
        let help = "Whether the pod's shim has answered.";
        let mut up = text.family("kata_monitor_shim_up", Kind::Gauge, help);
        for (id, answered) in pods {
            up.add(&[("sandbox_id", id)], u8::from(*answered));
        }
        let help = "How often all pods were asked.";
        text.family("kata_monitor_scrape_count", Kind::Counter, help).add(&[], self.scrapes);
        let help = "How often a shim did not answer then.";
        text.family("kata_monitor_scrape_failed_count", Kind::Counter, help).add(&[], self.failed);
        let name = "kata_monitor_scrape_durations_histogram_milliseconds";
        let help = "How long it took to ask all pods.";
        text.family(name, Kind::Histogram, help).add_histogram(&[], &self.durations);
        let files = Files::of(Path::new("/proc/self"));
        process::write_usual(&mut text, Whose::Monitor, &files, booted());
        text.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_documents_list_what_is_written() {
        let mut own = Own::default();
        own.scraped(Duration::from_millis(3), 1);
        own.scraped(Duration::from_millis(3), 0);
        let text = own.text(&[("a", true), ("b", false)]);
        for line in [
            "kata_monitor_running_shim_count 2",
            "kata_monitor_shim_up{sandbox_id=\"b\"} 0",
            "kata_monitor_scrape_count 2",
            "kata_monitor_scrape_failed_count 1",
            "kata_monitor_scrape_durations_histogram_milliseconds_bucket{le=\"4\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let written: BTreeMap<_, _> = kinds.collect();
        let mut listed = BTreeMap::new();
        for line in include_str!("../../docs/metrics.md").lines() {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            if let ["", name, kind, ..] = cells[..]
                && name.starts_with("`kata_monitor_")
            {
                listed.insert(name.trim_matches('`'), kind);
            }
        }
        assert_eq!(listed, written);
    }

    #[test]
    fn the_dashboard_shows_what_is_listed() {
        let listed = include_str!("../../docs/metrics.md");
        let dashboard = include_str!("../../packaging/monitor/dashboard.json");
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        let names = dashboard.split(|c| !is_name(c)).filter(|word| word.starts_with("kata_"));
        let mut count = 0;
        for name in names {
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(listed.contains(&format!("| `{name}` |")), "{name}");
            count += 1;
        }
        assert!(count > 20, "{count}");
    }
}
