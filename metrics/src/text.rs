//! The text format of Prometheus (exposition format 0.0.4). What is written can always be read: labels are escaped, no
//! line is there twice, and a family without lines is not there.

use std::collections::HashSet;
use std::fmt::{Display, Write};

use crate::histogram::{BOUNDS, Histogram};

/// The most lines of a family. A guest chooses how many interfaces, disks and CPUs it has.
const MOST_LINES: usize = 4096;
/// Longest value of a label, bytes.
const LONGEST_LABEL: usize = 128;

/// What Prometheus calls it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// They only grow.
    Counter,
    /// They are what they are now.
    Gauge,
    /// Counts in buckets.
    Histogram,
}

/// Names of labels and their values.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// The text.
#[derive(Default)]
pub struct Text {
    text: String,
    names: HashSet<String>,
}

impl Text {
    /// Begins a family, which is not there yet.
    ///
    /// # Panics
    /// Where debug assertions are on, when it is.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) -> Family<'_> {
        let kind_name = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let again = !self.names.insert(name.to_owned());
        debug_assert!(!again, "{name} is there twice");
        let head = format!("# HELP {name} {help}\n# TYPE {name} {kind_name}\n");
        Family { text: &mut self.text, name: name.to_owned(), head: Some(head), lines: HashSet::new() }
    }

    /// The whole text.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }
}

/// A family, to which lines are added.
pub struct Family<'a> {
    text: &'a mut String,
    name: String,
    head: Option<String>,
    lines: HashSet<String>,
}

impl Family<'_> {
    /// Adds a number, unless there is one with these labels.
    pub fn add(&mut self, labels: Labels<'_>, value: impl Display) {
        let labels = written(labels);
        if self.lines.len() < MOST_LINES && self.lines.insert(labels.clone()) {
            self.line("", &labels, value);
        }
    }

    /// Likewise one that may not be known.
    pub fn add_known(&mut self, labels: Labels<'_>, value: Option<impl Display>) {
        if let Some(value) = value {
            self.add(labels, value);
        }
    }

    /// Adds a histogram in milliseconds, unless there is one with these labels.
    pub fn add_histogram(&mut self, labels: Labels<'_>, histogram: &Histogram) {
        self.add_histogram_in(labels, histogram, 1.0);
    }

    /// Likewise in seconds.
    pub fn add_histogram_in_seconds(&mut self, labels: Labels<'_>, histogram: &Histogram) {
        self.add_histogram_in(labels, histogram, 1000.0);
    }

    fn add_histogram_in(&mut self, labels: Labels<'_>, histogram: &Histogram, unit: f64) {
        let written_labels = written(labels);
        if self.lines.len() >= MOST_LINES || !self.lines.insert(written_labels.clone()) {
            return;
        }
        let mut count = 0;
        let bounds = BOUNDS.iter().map(|bound| (*bound as f64 / unit).to_string());
        let bounds = bounds.chain(["+Inf".to_owned()]);
        for (bound, in_bucket) in bounds.zip(histogram.buckets) {
            count += in_bucket;
            self.line("_bucket", &written(&[labels, &[("le", bound.as_str())]].concat()), count);
        }
        self.line("_sum", &written_labels, histogram.sum / unit);
        self.line("_count", &written_labels, count);
    }

    fn line(&mut self, end: &str, labels: &str, value: impl Display) {
        if let Some(head) = self.head.take() {
            self.text.push_str(&head);
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{}{end}{labels} {value}", self.name);
    }
}

fn written(labels: Labels<'_>) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let pairs: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// A label's value as it is written, without quotes. Control characters are nobody's name, and a terminal may show
/// this.
#[must_use]
pub fn escaped(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if escaped.len() >= LONGEST_LABEL {
            break;
        }
        match c {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_family_is_written_once_and_only_with_lines() {
        let mut text = Text::default();
        text.family("nothing", Kind::Gauge, "Not there.");
        let mut family = text.family("a_total", Kind::Counter, "Some.");
        family.add(&[("x", "1"), ("y", "a\"b\\c\nd")], 7);
        family.add(&[("x", "1"), ("y", "a\"b\\c\nd")], 8);
        family.add(&[("x", "2")], u64::MAX);
        family.add_known(&[("x", "3")], None::<u64>);
        let expected = "# HELP a_total Some.\n# TYPE a_total counter\n\
            a_total{x=\"1\",y=\"a\\\"b\\\\c?d\"} 7\na_total{x=\"2\"} 18446744073709551615\n";
        assert_eq!(text.finish(), expected);
    }

    #[test]
    fn buckets_of_a_histogram_are_sums() {
        let mut histogram = Histogram::default();
        [1, 3, 3, 9999].into_iter().for_each(|ms| histogram.record(Duration::from_millis(ms)));
        let mut text = Text::default();
        text.family("h", Kind::Histogram, "Some.").add_histogram(&[("action", "x")], &histogram);
        let mut family = text.family("s", Kind::Histogram, "Some.");
        family.add_histogram_in_seconds(&[], &histogram);
        let text = text.finish();
        for line in [
            "s_bucket{le=\"0.004\"} 3",
            "s_sum 10.006",
            "h_bucket{action=\"x\",le=\"2\"} 1",
            "h_bucket{action=\"x\",le=\"4\"} 3",
            "h_bucket{action=\"x\",le=\"512\"} 3",
            "h_bucket{action=\"x\",le=\"+Inf\"} 4",
            "h_sum{action=\"x\"} 10006",
            "h_count{action=\"x\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
