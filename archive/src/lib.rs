//! Copies of files between the host and a container, as a tar stream: [`pack`] writes one on one side, [`unpack`] reads
//! it on the other.
//!
//! Who reads does not trust who writes. Names have bounds and lead down only; nothing is written through a symbolic
//! link; devices are refused, and neither owners nor set-id bits come along unless they are asked for.

mod entries;
mod pack;
mod tree;
mod unpack;

use std::io;
use std::path::{Path, PathBuf};

pub use pack::pack;
pub use unpack::{Manner, unpack};

/// Why not all could be copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory.
    #[error("{}: {}", path.display(), reason(source))]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The stream broke off, or is none.
    #[error("tar stream: {}", reason(.0))]
    Stream(io::Error),
    /// A name that leads up or to the top, or is too long.
    #[error("tar stream: {0:?} is no name below the destination")]
    Name(String),
    /// An extended header that is too long.
    #[error("tar stream: an extended header of {0} bytes")]
    Extension(u64),
    /// What is never unpacked.
    #[error("tar stream: {0:?} is {1}, which is not copied")]
    Kind(PathBuf, &'static str),
    /// What is at the destination already does not fit.
    #[error("{}: {}", .0.display(), .1)]
    Destination(PathBuf, &'static str),
}

type Result<T> = std::result::Result<T, Error>;

fn at<E: Into<io::Error>>(path: impl AsRef<Path>) -> impl FnOnce(E) -> Error {
    move |source| Error::File { path: path.as_ref().to_owned(), source: source.into() }
}

/// An error in the words of strerror(3).
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error ").map_or(text.clone(), |(text, _)| text.to_owned())
}

#[cfg(test)]
mod tests;
