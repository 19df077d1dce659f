//! The console sessions of a document: what is typed and what it shows, to be compared with what happens.
//!
//! They are blocks of code that are marked `console`. A line that begins with `$ ` is a command, which goes on in lines
//! with `> `. What follows is its output, of both streams. In it, `...` stands for any text, and alone in a line for
//! any number of lines.

/// A command and what it shows.
#[derive(Debug, PartialEq, Eq)]
pub struct Step<'t> {
    /// The line of the document, from 1.
    pub line: usize,
    /// What is typed.
    pub command: String,
    /// The lines of what is shown.
    pub shown: Vec<&'t str>,
}

/// The steps of a document, in their order.
///
/// # Panics
/// When there is output without a command.
pub fn steps(text: &str) -> Vec<Step<'_>> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    let mut inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(command) = line.strip_prefix("$ ") {
            steps.push(Step { line: number, command: command.to_owned(), shown: Vec::new() });
        } else {
            let step = steps.last_mut().unwrap_or_else(|| panic!("line {number}: output without a command"));
            match line.strip_prefix("> ").filter(|_| step.shown.is_empty()) {
                Some(more) => step.command += &format!("\n{more}"),
                None => step.shown.push(line),
            }
        }
    }
    steps
}

impl Step<'_> {
    /// Whether an output is the one that is shown.
    pub fn is_shown(&self, output: &str) -> bool {
        lines_fit(&self.shown, &output.lines().collect::<Vec<_>>())
    }
}

fn lines_fit(shown: &[&str], output: &[&str]) -> bool {
    match shown.split_first() {
        None => output.is_empty(),
        Some((&"...", rest)) => {
            (0..=output.len()).any(|count| output.get(count..).is_some_and(|left| lines_fit(rest, left)))
        }
        Some((first, rest)) => output
            .split_first()
            .is_some_and(|(line, left)| fits(first, line.trim_end()) && lines_fit(rest, left)),
    }
}

/// Whether a line is the one that is shown.
fn fits(shown: &str, line: &str) -> bool {
    let Some((start, rest)) = shown.split_once("...") else { return shown == line };
    let Some(mut left) = line.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split("...").collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        match left.split_once(part) {
            Some((_, after)) => left = after,
            None => return false,
        }
    }
    left.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_become_steps() {
        let text = "a\n```sh\n$ no\n```\n```console\n$ cat <<END\n> x\n> END\nx\n$ true\n```\n$ no\n";
        let expected = [
            Step { line: 6, command: "cat <<END\nx\nEND".into(), shown: vec!["x"] },
            Step { line: 10, command: "true".into(), shown: vec![] },
        ];
        assert_eq!(steps(text), expected);
    }

    #[test]
    fn dots_stand_for_what_varies() {
        let shown = |text: &'static str, output: &str| {
            Step { line: 1, command: String::new(), shown: text.lines().collect() }.is_shown(output)
        };
        assert!(shown("", "") && shown("a\nb", "a \nb\n"));
        assert!(!shown("", "a\n") && !shown("a", "") && !shown("a", "a\nb\n") && !shown("a", "ab\n"));
        assert!(shown("...", "") && shown("...", "a\nb\n") && shown("a\n...\nc", "a\nb\nb\nc\n"));
        assert!(!shown("a\n...\nc", "a\nb\n"));
        assert!(shown("6.12...", "6.12.118\n") && shown("a ... b ... c", "a 1 b 2 3 c\n"));
        assert!(!shown("a ... b ... c", "a 1 c\n") && !shown("a...", "b\n"));
    }
}
