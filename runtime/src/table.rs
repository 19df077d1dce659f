//! Tables for people.

use std::io::{self, Write};

/// Writes columns side by side, as wide as what is in them; no blanks at the ends of lines.
pub fn write<const N: usize>(out: &mut dyn Write, head: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
    let mut widths = head.map(|name| name.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut line = |cells: [&str; N]| {
        let cells = cells.iter().zip(widths);
        let text: String = cells.map(|(cell, width)| format!("{cell:width$}   ")).collect();
        writeln!(out, "{}", text.trim_end())
    };
    line(head)?;
    rows.iter().try_for_each(|row| line(row.each_ref().map(String::as_str)))
}

/// Bytes in the largest unit of which there is at least one.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (count.max(1).ilog2() / 10).min(4);
    if power == 0 {
        return format!("{count} B");
    }
    // Exact enough for one digit behind the point.
    let tenths = (u128::from(count) * 10) >> (10 * power);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[power as usize])
}

/// A time in its two largest units.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// What a guest or a pod's author chose, for a terminal: no control characters, and not too long.
pub fn plain(text: &str) -> String {
    text.chars().take(128).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut out = Vec::new();
        let rows = [["a".to_owned(), "bcd".to_owned()], ["long one".to_owned(), String::new()]];
        write(&mut out, ["X", "YY"], &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "X          YY\na          bcd\nlong one\n");
    }

    #[test]
    fn sizes_and_times_are_short() {
        let sizes = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, 5 << 30, u64::MAX].map(bytes);
        let expected = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1023.9 KiB", "1.0 MiB", "5.0 GiB"];
        assert_eq!(sizes[..7], expected);
        assert_eq!(sizes[7], "16777215.9 TiB");
        let times = [0, 59, 60, 3599, 3600, 86_399, 86_400, 90_000].map(duration);
        assert_eq!(times, ["0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d0h", "1d1h"]);
    }

    #[test]
    fn a_name_does_nothing_to_a_terminal() {
        assert_eq!(plain("a\x1b[2Jb\n"), "a?[2Jb?");
        assert_eq!(plain(&"x".repeat(1000)).len(), 128);
    }
}
