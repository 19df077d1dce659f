//! `kata-runtime config`: what becomes of the keys of a configuration file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use katana_config::{Report, Use};

mod migrate;

pub(crate) use migrate::migrate;

/// Why a file is not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Configuration(#[from] katana_config::Error),
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    Parse { path: PathBuf, source: toml_edit::TomlError },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Lists the keys of a file, each with its line, what becomes of it and why.
///
/// # Errors
/// All that is wrong in the file.
pub(crate) fn check(file: &Path, out: &mut dyn Write) -> Result<(), Error> {
    let (Report { uses, problems }, _) = katana_config::examine(file)?;
    write_table(&uses, out)?;
    if problems.is_empty() { Ok(()) } else { Err(katana_config::Error::Wrong(problems).into()) }
}

fn write_table(uses: &[Use], out: &mut dyn Write) -> io::Result<()> {
    let name = |used: &Use| match &*used.section {
        "" => used.key.clone(),
        section => format!("{section}.{}", used.key),
    };
    let wide = |longest: Option<usize>, title: &str| longest.unwrap_or_default().max(title.len());
    let names = wide(uses.iter().map(|used| name(used).chars().count()).max(), "KEY");
    let lines = wide(uses.iter().map(|used| used.place.line.to_string().len()).max(), "LINE");
    let mut row = |key: &str, line: &str, class: &str, remark: &str| {
        let text = format!("{key:names$}  {line:>lines$}  {class:10}  {remark}");
        writeln!(out, "{}", text.trim_end())
    };
    row("KEY", "LINE", "CLASS", "REMARK")?;
    for used in uses {
        row(&name(used), &used.place.line.to_string(), &used.class.to_string(), &used.remark)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(name: &str, text: &str) -> (String, Result<(), String>) {
        let file = std::env::temp_dir().join(format!("katana-config-check-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&file).unwrap();
        let file = file.join("f.toml");
        std::fs::write(&file, text).unwrap();
        let mut out = Vec::new();
        let result =
            check(&file, &mut out).map_err(|e| e.to_string().replace(&file.display().to_string(), "F"));
        std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
        (String::from_utf8(out).unwrap(), result)
    }

    #[test]
    fn keys_are_listed_in_their_classes() {
        let text = "[hypervisor.qemu]\ndefault_memory = 700\ndefault_vcpus = 1\nkernel = \"/k\"\n\
                    [runtime]\nname = \"virt\"\n";
        let (table, result) = checked("accepted", text);
        assert_eq!(result, Ok(()));
        let lines = [
            "KEY                             LINE  CLASS       REMARK",
            "hypervisor.qemu.default_memory     2  works",
            "hypervisor.qemu.default_vcpus      3  works       a fraction is rounded up",
            "hypervisor.qemu.kernel             4  no meaning  Katana's own VMM, kernel and image are used; \
             [hypervisor.katana] names others",
            "runtime.name                       6  no meaning  there is one runtime, one VMM and one agent",
        ];
        assert_eq!(table.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn all_that_is_wrong_is_said_after_the_table() {
        let text = "[runtime]\nenable_debgu = true\n[hypervisor.clh]\nrootless = true\nenable_debug = 1\n";
        let (table, result) = checked("refused", text);
        let rows = table.lines().filter(|line| line.contains("  refused     ")).count();
        assert_eq!((rows, table.lines().count()), (3, 4), "{table}");
        let errors = result.unwrap_err();
        let places: Vec<_> =
            errors.lines().filter_map(|line| line.split_once(": ")).map(|(at, _)| at).collect();
        assert_eq!(places, ["F:2:1", "F:4:12", "F:5:16"], "{errors}");
    }
}
