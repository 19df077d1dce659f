//! What was looked at, for people and for programs.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

use crate::table;

/// How something looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    Warning,
    Failed,
    Skipped,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Item {
    name: &'static str,
    result: Verdict,
    detail: String,
}

/// All that was looked at for one question, and the first that failed.
#[derive(Debug)]
pub(super) struct Report<E> {
    items: Vec<Item>,
    pub(super) failure: Option<E>,
}

impl<E> Default for Report<E> {
    fn default() -> Self {
        Self { items: Vec::new(), failure: None }
    }
}

impl<E> Report<E> {
    /// Something that is well or has failed.
    pub(super) fn add<F: fmt::Display + Into<E>>(&mut self, name: &'static str, found: Result<String, F>) {
        match found {
            Ok(detail) => self.items.push(Item { name, result: Verdict::Ok, detail }),
            Err(error) => {
                self.items.push(Item { name, result: Verdict::Failed, detail: error.to_string() });
                self.failure.get_or_insert(error.into());
            }
        }
    }

    /// Something that is worth a look, or could not be looked at.
    pub(super) fn note(&mut self, name: &'static str, result: Verdict, detail: String) {
        self.items.push(Item { name, result, detail });
    }
}

/// Both reports, as `--json` has them.
#[derive(Serialize)]
pub(super) struct Shown<'a> {
    capable: bool,
    /// None if it was not looked at, since root did not ask.
    can_create: Option<bool>,
    checks: Vec<&'a Item>,
}

impl<'a> Shown<'a> {
    pub(super) fn of<E>(machine: &'a Report<E>, installation: Option<&'a Report<E>>) -> Self {
        let capable = machine.failure.is_none();
        let items = machine.items.iter().chain(installation.into_iter().flat_map(|report| &report.items));
        let can_create = installation.map(|report| capable && report.failure.is_none());
        Self { capable, can_create, checks: items.collect() }
    }

    pub(super) fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }

    pub(super) fn write_list(&self, out: &mut dyn Write) -> io::Result<()> {
        let row =
            |item: &&Item| [item.result.to_string(), item.name.to_owned(), item.detail.replace('\n', " ")];
        let rows: Vec<_> = self.checks.iter().map(row).collect();
        table::write(out, ["RESULT", "CHECK", "DETAIL"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_the_answer() {
        let mut machine = Report::<String>::default();
        machine.add("one", Ok::<_, String>("fine".to_owned()));
        machine.add("two", Err("bad".to_owned()));
        machine.add("three", Err("worse".to_owned()));
        machine.note("four", Verdict::Skipped, "no three".to_owned());
        assert_eq!(machine.failure.as_deref(), Some("bad"));
        let mut out = Vec::new();
        Shown::of(&machine, None).write_list(&mut out).unwrap();
        let list = String::from_utf8(out).unwrap();
        let lines = [
            "RESULT    CHECK   DETAIL",
            "ok        one     fine",
            "FAILED    two     bad",
            "FAILED    three   worse",
            "skipped   four    no three",
        ];
        assert_eq!(list.lines().collect::<Vec<_>>(), lines);
        let mut out = Vec::new();
        Shown::of(&machine, Some(&Report::default())).write_json(&mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&value["capable"], &value["can_create"]), (&false.into(), &false.into()));
        assert_eq!(value["checks"][1]["result"], "failed");
    }
}
