//! `kata-runtime config migrate`: a file of Kata Containers as one of ours.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use katana_config::{Class, Config, Report, Sets, Use};
use toml_edit::{DocumentMut, Item, RawString, Value};

use super::Error;

/// Our sections, in the order of the shipped file.
const SECTIONS: [&str; 4] = ["hypervisor.katana", "agent.kata", "factory", "runtime"];

/// A line of the new file, with the comment above it.
struct Line {
    comment: String,
    key: &'static str,
    value: String,
}

/// Writes a file with those of another one's keys that work, under the names of our sections, with their values and
/// comments. What it does not take over is listed at its end.
///
/// # Errors
/// All that is wrong in the file.
pub(crate) fn migrate(file: &Path, out: &mut dyn Write) -> Result<(), Error> {
    let (Report { uses, problems }, config) = katana_config::examine(file)?;
    if !problems.is_empty() {
        return Err(katana_config::Error::Wrong(problems).into());
    }
    let path = || file.to_owned();
    let text = fs::read_to_string(file).map_err(|source| Error::Read { path: path(), source })?;
    let document = text.parse().map_err(|source| Error::Parse { path: path(), source })?;
    writeln!(out, "# Made by `kata-runtime config migrate` of {}", file.display())?;
    let lines = lines(&document, &uses, &config);
    for section in SECTIONS {
        let Some(lines) = lines.get(section) else { continue };
        writeln!(out, "\n[{section}]")?;
        for Line { comment, key, value } in lines {
            writeln!(out, "\n{comment}{key} = {value}")?;
        }
    }
    let mut left = uses.iter().filter(|used| used.class == Class::NoMeaning).peekable();
    if left.peek().is_some() {
        writeln!(out, "\n# What has no meaning here:")?;
    }
    for Use { section, key, remark, .. } in left {
        writeln!(out, "#   {key} in [{section}]: {remark}")?;
    }
    Ok(())
}

/// The lines of our sections.
fn lines(document: &DocumentMut, uses: &[Use], config: &Config) -> BTreeMap<&'static str, Vec<Line>> {
    let mut lines = BTreeMap::<_, Vec<Line>>::new();
    // Where two set the same, our own section wins, and of two that are translated the value has come of both.
    let is_own = |used: &Use, sets: Sets| used.section == sets.section && used.key == sets.key;
    for used in uses {
        let Some(sets) = used.sets else { continue };
        let of_same = || uses.iter().filter(|other| other.sets.is_some_and(|other| same(other, sets)));
        let wins = of_same().find(|other| is_own(other, sets)).or_else(|| of_same().next_back());
        if wins.is_some_and(|wins| std::ptr::eq(wins, used))
            && let Some(line) = line(document, used, sets, config)
        {
            lines.entry(sets.section).or_default().push(line);
        }
    }
    lines
}

fn same(one: Sets, other: Sets) -> bool {
    (one.section, one.key) == (other.section, other.key)
}

fn line(document: &DocumentMut, used: &Use, sets: Sets, config: &Config) -> Option<Line> {
    let table = table(document, &used.section)?;
    let (key, item) = table.get_key_value(&used.key)?;
    let text = |raw: Option<&RawString>| raw.and_then(RawString::as_str).unwrap_or_default().to_owned();
    // What stands right above it; a blank line ends what was said of others.
    let above = text(key.leaf_decor().prefix());
    let above = above.rsplit("\n\n").next().unwrap_or_default();
    let comment = above.lines().map(str::trim).filter(|line| line.starts_with('#'));
    let comment = comment.map(|line| format!("{line}\n")).collect();
    let mut value = item.as_value()?.clone();
    let beside = text(value.decor().suffix());
    value.decor_mut().clear();
    if sets.translated {
        value = match sets.key {
            "kernel_params" => Value::from(&config.hypervisor.kernel_params),
            "dial_timeout" => Value::from(i64::from(config.agent.dial_timeout)),
            _ => return None,
        };
    }
    Some(Line { comment, key: sets.key, value: format!("{value}{}", beside.trim_end()) })
}

fn table<'d>(document: &'d DocumentMut, section: &str) -> Option<&'d dyn toml_edit::TableLike> {
    let mut item: &Item = document.as_item();
    for name in section.split('.').filter(|name| !name.is_empty()) {
        item = item.get(name)?;
    }
    item.as_table_like()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: [&str; 7] = [
        include_str!("../../../config/src/tests/stock/clh.toml"),
        include_str!("../../../config/src/tests/stock/cloud-hypervisor.toml"),
        include_str!("../../../config/src/tests/stock/dragonball.toml"),
        include_str!("../../../config/src/tests/stock/fc.toml"),
        include_str!("../../../config/src/tests/stock/qemu.toml"),
        include_str!("../../../config/src/tests/stock/qemu-runtime-rs.toml"),
        include_str!("../../../config/src/tests/stock/stratovirt.toml"),
    ];

    /// A file that is there for as long as something is done with it.
    fn with_file<T>(name: &str, text: &str, done: impl FnOnce(&Path) -> T) -> T {
        let directory =
            std::env::temp_dir().join(format!("katana-config-migrate-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("f.toml");
        fs::write(&file, text).unwrap();
        let result = done(&file);
        fs::remove_dir_all(&directory).unwrap();
        result
    }

    fn migrated(name: &str, text: &str) -> String {
        with_file(name, text, |file| {
            let mut out = Vec::new();
            migrate(file, &mut out).unwrap();
            String::from_utf8(out).unwrap().replace(&file.display().to_string(), "F")
        })
    }

    fn examined(name: &str, text: &str) -> (Report, Config) {
        let (report, mut config) = with_file(name, text, |file| katana_config::examine(file).unwrap());
        config.path.clear();
        (report, config)
    }

    #[test]
    fn values_and_comments_are_kept() {
        let text = "# Of all of them.\n\n# Of the VMM.\n[hypervisor.qemu]\npath = \"/q\"\n\
                    # For another key.\n#machine = \"q35\"\n\n  # MiB for each.\n  # Or more.\n\
                    default_memory = 0x400  # a gigabyte\ndefault_vcpus = 1.5\nkernel_params = \"quiet console=ttyS0\"\n\
                    enable_annotations = [\n  \"default_.*\",  # both\n]\n\
                    [agent.kata]\nreconnect_timeout_ms = 3000\ndial_timeout_ms = 70500\n\
                    [hypervisor.katana]\ndefault_vcpus = 1\n";
        let expected = "# Made by `kata-runtime config migrate` of F\n\n[hypervisor.katana]\n\n\
                        # MiB for each.\n# Or more.\ndefault_memory = 0x400  # a gigabyte\n\n\
                        kernel_params = \"quiet\"\n\nenable_annotations = [\n  \"default_.*\",  # both\n]\n\n\
                        default_vcpus = 1\n\n[agent.kata]\n\ndial_timeout = 71\n\n\
                        # What has no meaning here:\n#   path in [hypervisor.qemu]: Katana's own VMM, kernel and image \
                        are used; [hypervisor.katana] names others\n";
        assert_eq!(migrated("kept", text), expected);
    }

    #[test]
    fn a_file_of_kata_containers_means_the_same_afterwards() {
        for (number, text) in STOCK.iter().enumerate() {
            let name = format!("stock-{number}");
            let (_, before) = examined(&name, text);
            let new = migrated(&name, text);
            let (report, after) = examined(&name, &new);
            assert_eq!(after, before, "{new}");
            assert!(report.problems.is_empty(), "{:?}", report.problems);
            assert!(report.uses.iter().all(|used| used.class == Class::Works), "{new}");
            // There is nothing left to do.
            let (_, again) = examined(&name, &migrated(&name, &new));
            assert_eq!(again, before);
        }
    }

    #[test]
    fn a_file_that_is_refused_is_not_written_anew() {
        let errors = with_file("refused", "[runtime]\nenable_debgu = true\n", |file| {
            let mut out = Vec::new();
            let result = migrate(file, &mut out).map_err(|e| e.to_string());
            assert!(out.is_empty());
            result.unwrap_err()
        });
        assert!(errors.contains("unknown key \"enable_debgu\""), "{errors}");
    }
}
