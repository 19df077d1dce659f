//! The metrics of several pods as one text: each family once, each line with labels that say whose it is.

use std::collections::BTreeMap;
use std::fmt::Write;

use katana_metrics::text::escaped;

/// Names of labels and their values.
pub type Labels = Vec<(&'static str, String)>;

/// All families, by name.
#[derive(Default)]
pub struct Merged(BTreeMap<String, Family>);

#[derive(Default)]
struct Family {
    head: String,
    lines: String,
}

impl Merged {
    /// Adds the text of a pod. A line that is none is left out.
    pub fn add(&mut self, text: &str, labels: &Labels) {
        let labels: Vec<_> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = labels.join(",");
        let mut name = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.split(' ');
                let what = words.next().unwrap_or_default();
                name = words.next().unwrap_or_default();
                // HELP and TYPE, from the first pod that has the family.
                let family = self.0.entry(name.to_owned()).or_default();
                if !family.head.contains(&format!("# {what} ")) {
                    let _ = writeln!(family.head, "{line}");
                }
            } else if let (Some(line), Some(family)) = (with_labels(line, &labels), self.0.get_mut(name)) {
                let _ = writeln!(family.lines, "{line}");
            }
        }
    }

    /// The whole text.
    pub fn finish(self) -> String {
        let with_lines = self.0.into_values().filter(|family| !family.lines.is_empty());
        with_lines.fold(String::new(), |text, family| text + &family.head + &family.lines)
    }
}

/// `name{a="b"} 1` or `name 1` with more labels.
fn with_labels(line: &str, labels: &str) -> Option<String> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at_checked(end)?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_name {
        return None;
    }
    match rest.strip_prefix('{') {
        Some(more) if more.starts_with('}') => Some(format!("{name}{{{labels}{more}")),
        Some(more) => Some(format!("{name}{{{labels},{more}")),
        None => Some(format!("{name}{{{labels}}}{rest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(id: &str) -> Labels {
        vec![("sandbox_id", id.to_owned())]
    }

    #[test]
    fn lines_of_a_family_are_together() {
        let one = "# HELP a A.\n# TYPE a gauge\na 1\n# HELP b B.\n# TYPE b counter\nb{x=\"y\"} 2\n";
        let other = "# HELP b B.\n# TYPE b counter\nb{x=\"}\"} 3\n# HELP c C.\n# TYPE c gauge\n";
        let mut merged = Merged::default();
        merged.add(one, &labels("p"));
        merged.add(other, &vec![("sandbox_id", "q\"".into()), ("cri_name", "n".into())]);
        let expected = "# HELP a A.\n# TYPE a gauge\na{sandbox_id=\"p\"} 1\n\
            # HELP b B.\n# TYPE b counter\nb{sandbox_id=\"p\",x=\"y\"} 2\n\
            b{sandbox_id=\"q\\\"\",cri_name=\"n\",x=\"}\"} 3\n";
        assert_eq!(merged.finish(), expected);
    }

    #[test]
    fn what_is_no_line_is_left_out() {
        let mut merged = Merged::default();
        merged.add("x 1\n# TYPE a gauge\n\n{} 1\nb\"{ 1\na\n#\na 1\n", &labels("p"));
        assert_eq!(merged.finish(), "# TYPE a gauge\na{sandbox_id=\"p\"} 1\n");
    }

    #[test]
    fn fuzz_merge() {
        katana_fuzz::fuzz("merge", |input| {
            let mut merged = Merged::default();
            let text = String::from_utf8_lossy(input.rest());
            merged.add(&text, &labels("p"));
            merged.add(&text, &labels("q"));
            let merged = merged.finish();
            assert!(merged.is_empty() || merged.ends_with('\n'));
            let heads: Vec<_> = merged.lines().filter_map(|line| line.strip_prefix("# HELP ")).collect();
            let mut names: Vec<_> = heads.iter().filter_map(|head| head.split(' ').next()).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all, "{merged}");
        });
    }
}
