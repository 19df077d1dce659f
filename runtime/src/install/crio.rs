//! CRI-O's configuration: a file that is ours alone, in a directory of which CRI-O reads all.

use std::path::{Path, PathBuf};

use super::change::{self, Change};

const TEXT: &str = include_str!("../../../config/crio.conf");
/// Where the text says that the programs are.
const PROGRAMS: &str = "/opt/kata/bin/";

/// Why the file stays as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    File(#[from] change::Error),
    #[error("{} is there already, and does not name {}", path.display(), shim.display())]
    Taken { path: PathBuf, shim: PathBuf },
}

/// Adds the file; one that somebody has adapted stays.
pub(crate) fn install(path: &Path, programs: &Path) -> Result<Vec<Change>, Error> {
    let shim = programs.join("containerd-shim-kata-v2");
    let before = change::read(path)?;
    match &before {
        Some(there) if there.contains(&shim.display().to_string()) => Ok(Vec::new()),
        Some(_) => Err(Error::Taken { path: path.to_owned(), shim }),
        None => {
            let text = TEXT.replace(PROGRAMS, &format!("{}/", programs.display()));
            Ok(Change::of_text(path, None, Some(text)).into_iter().collect())
        }
    }
}

/// Removes it.
pub(crate) fn uninstall(path: &Path) -> Result<Vec<Change>, Error> {
    Ok(Change::of_text(path, change::read(path)?, None).into_iter().collect())
}
