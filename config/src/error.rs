//! Why there is no configuration, and where in its files.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the files exists.
    #[error("no configuration file: {} do not exist", join(.0))]
    None(Vec<PathBuf>),
    /// A file or the folder of drop-ins cannot be read.
    #[error("{}: cannot read the configuration: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// All that is wrong in the files, a line for each; never empty.
    #[error("{}", lines(.0))]
    Wrong(Vec<Problem>),
    /// A pod's annotation that cannot be followed.
    #[error("annotation {name}: {why}")]
    Annotation {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
}

/// One thing that is wrong in a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Not TOML.
    #[error("{place}: not valid TOML: {why}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        why: String,
    },
    /// A section that does not exist.
    #[error("{place}: unknown section [{section}]{}", meant(nearest.as_deref()))]
    UnknownSection {
        /// Where.
        place: Place,
        /// Its name.
        section: String,
        /// The known section with the most similar name, if one is similar.
        nearest: Option<String>,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key \"{key}\" in {}{}", described(section), meant(nearest.as_deref()))]
    UnknownKey {
        /// Where.
        place: Place,
        /// The section it stands in.
        section: String,
        /// Its name.
        key: String,
        /// The known key with the most similar name, if one is similar.
        nearest: Option<String>,
    },
    /// A value of the wrong type or out of range.
    #[error("{place}: key \"{key}\" in {}: {why}", described(section))]
    Value {
        /// Where.
        place: Place,
        /// The section it stands in.
        section: String,
        /// Its name.
        key: String,
        /// What is wrong with the value.
        why: String,
    },
    /// A value that asks for what does not exist here and must not be ignored.
    #[error("{place}: key \"{key}\" in {} cannot be followed: {why}", described(section))]
    Refused {
        /// Where.
        place: Place,
        /// The section it stands in.
        section: String,
        /// Its name.
        key: String,
        /// Why not, and what to do instead.
        why: &'static str,
    },
    /// A section of a VMM after that of another VMM.
    #[error("{place}: [{section}] is of another VMM than [{first}]: keep one of them")]
    SecondVmm {
        /// Where.
        place: Place,
        /// Its name.
        section: String,
        /// The name of the earlier one.
        first: String,
    },
}

impl Problem {
    /// Where it is.
    #[must_use]
    pub fn place(&self) -> &Place {
        match self {
            Self::Syntax { place, .. }
            | Self::UnknownSection { place, .. }
            | Self::UnknownKey { place, .. }
            | Self::Value { place, .. }
            | Self::Refused { place, .. }
            | Self::SecondVmm { place, .. } => place,
        }
    }
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

fn join(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn meant(nearest: Option<&str>) -> String {
    nearest.map(|nearest| format!("; did you mean {nearest}?")).unwrap_or_default()
}

fn described(section: &str) -> String {
    if section.is_empty() { "the top level".to_owned() } else { format!("[{section}]") }
}
