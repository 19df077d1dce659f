//! Manual pages and completions for shells, made from what the command line is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// Of programs that root runs, man-pages(7).
const SECTION: &str = "8";
/// Where shells look, below a prefix's `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/site-functions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// Why they are not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to {}: {source}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// Writes them all below a directory, as they are installed below `share`.
pub fn write(command: &Command, share: &Path) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error { path, source }
    };
    let name = command.get_name().to_owned();
    for (shell, directory) in COMPLETIONS {
        let directory = share.join(directory);
        fs::create_dir_all(&directory).map_err(failed(&directory))?;
        let file = generate_to(shell, &mut command.clone(), &name, &directory).map_err(failed(&directory))?;
        if shell == Shell::Bash {
            // bash-completion loads a file of the command's own name.
            fs::rename(&file, directory.join(&name)).map_err(failed(&file))?;
        }
    }
    let manuals = share.join("man/man8");
    fs::create_dir_all(&manuals).map_err(failed(&manuals))?;
    let mut command = command.clone().disable_help_subcommand(true);
    command.build();
    write_manuals(&command, &manuals).map_err(failed(&manuals))
}

/// The page of a command, and those of the commands below it.
fn write_manuals(command: &Command, directory: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        write_manuals(below, directory)?;
    }
    // No date: the same source makes the same page.
    let page = Man::new(command.clone())
        .section(SECTION)
        .date("")
        .source(concat!("Katana ", env!("CARGO_PKG_VERSION")))
        .manual("Katana");
    page.generate_to(directory).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn there_is_a_page_for_each_command() {
        let folder = std::env::temp_dir().join(format!("katana-pages-{}", std::process::id()));
        write(&crate::Cli::command(), &folder).unwrap();
        for name in ["kata-runtime", "kata-runtime-check", "kata-runtime-config-migrate"] {
            let page = fs::read_to_string(folder.join(format!("man/man8/{name}.8"))).unwrap();
            assert!(page.contains(&format!(".TH {name} 8")), "{page}");
        }
        let names: Vec<_> =
            fs::read_dir(folder.join("man/man8")).unwrap().flatten().map(|e| e.file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().contains("help")), "{names:?}");
        for file in [
            "bash-completion/completions/kata-runtime",
            "zsh/site-functions/_kata-runtime",
            "fish/vendor_completions.d/kata-runtime.fish",
        ] {
            assert!(fs::read_to_string(folder.join(file)).unwrap().contains("migrate"), "{file}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
