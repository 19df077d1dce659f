//! Transparent huge pages, used as the host uses them: the shim passes the host's settings as parameters of the kernel.
//! The kernel turns them off by itself where it boots with less than 512 MiB, with a part of their settings (Linux,
//! mm/huge_memory.c, `hugepage_init`), for good, however much memory is plugged later.

use std::fs;
use std::io;
use std::path::Path;

use katana_protocol::TRANSPARENT_HUGE_PAGES;

const DIRECTORY: &str = "/sys/kernel/mm/transparent_hugepage";

/// What Linux has in other machines: reading of memory that was never written shares one huge page of zeroes, and the
/// thread that makes huge pages of small ones may move others out of the way.
const USUAL: [(&str, &str); 2] = [("use_zero_page", "1"), ("khugepaged/defrag", "1")];

/// Sets what the command line says. A kernel without transparent huge pages is left alone.
pub fn set(command_line: &str) {
    let directory = Path::new(DIRECTORY);
    if directory.is_dir()
        && let Err((file, value, error)) = set_in(directory, command_line)
    {
        log::warn!("{DIRECTORY}/{file}: cannot write {value:?}: {error}");
    }
}

fn set_in<'a>(directory: &Path, command_line: &'a str) -> Result<(), (&'static str, &'a str, io::Error)> {
    let asked = asked(command_line);
    if asked.is_empty() {
        return Ok(());
    }
    for (file, value) in USUAL.into_iter().chain(asked) {
        fs::write(directory.join(file), value).map_err(|error| (file, value, error))?;
    }
    Ok(())
}

/// Files and what is to be in them. Of two parameters of a name the last one holds, as in the kernel.
fn asked(command_line: &str) -> Vec<(&'static str, &str)> {
    let value = |parameter: &str| {
        let words = command_line.split_ascii_whitespace();
        words.rev().find_map(|word| word.strip_prefix(parameter)?.strip_prefix('='))
    };
    TRANSPARENT_HUGE_PAGES.iter().filter_map(|(parameter, file)| Some((*file, value(parameter)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_parameter_of_a_name_holds() {
        let line =
            "quiet transparent_hugepage=always agent.thp_defrag=madvise agent.thp_defrag=defer+madvise x=y";
        assert_eq!(asked(line), [("enabled", "always"), ("defrag", "defer+madvise")]);
        assert_eq!(asked("transparent_hugepages=always agent.thp_shmem"), []);
    }

    #[test]
    fn nothing_is_written_where_nothing_is_asked() {
        assert!(set_in(Path::new("/nowhere"), "quiet").is_ok());
        let (file, ..) = set_in(Path::new("/nowhere"), "transparent_hugepage=never").unwrap_err();
        assert_eq!(file, "use_zero_page");
    }
}
