//! The log files of containers.

use std::path::Path;

/// A line of a log, without the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// stdout or stderr
    pub stream: String,
    /// F for a full line, P for a part of one
    pub tag: String,
    /// What was written, with the line's end when it had one.
    pub text: String,
}

/// Reads a log: `TIME STREAM TAG TEXT` (kubernetes, design proposal "CRI: Log Management").
///
/// # Panics
/// When the file is of another form.
#[track_caller]
pub(super) fn read(path: &Path) -> Vec<Line> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    // The last line may be half written yet.
    let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    lines.map(|line| parse(line).unwrap_or_else(|| panic!("not a line of a log: {line:?}"))).collect()
}

fn parse(line: &str) -> Option<Line> {
    let mut fields = line.splitn(4, ' ');
    let (time, stream, tag) = (fields.next()?, fields.next()?, fields.next()?);
    let is_time = time.len() >= "2026-01-01T00:00:00Z".len() && time.as_bytes().get(10) == Some(&b'T');
    let known = ["stdout", "stderr"].contains(&stream) && ["F", "P"].contains(&tag);
    let end = if tag == "F" { "\n" } else { "" };
    let text = format!("{}{end}", fields.next().unwrap_or_default());
    (is_time && known).then(|| Line { stream: stream.to_owned(), tag: tag.to_owned(), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let line = |text: &str| parse(text).map(|line| (line.stream, line.tag, line.text));
        let some =
            |stream: &str, tag: &str, text: &str| Some((stream.to_owned(), tag.to_owned(), text.to_owned()));
        let time = "2026-11-21T09:00:00.123456789Z";
        assert_eq!(line(&format!("{time} stdout F a b")), some("stdout", "F", "a b\n"));
        assert_eq!(line(&format!("{time} stderr P a")), some("stderr", "P", "a"));
        assert_eq!(line(&format!("{time} stdout F ")), some("stdout", "F", "\n"));
        assert_eq!(line("no log"), None);
    }
}
