//! Processes that the host's tools run in a guest.

use serde::{Deserialize, Serialize};

/// `POST /exec`: runs a process in the guest. The answer is an [`Exit`], when the process has ended; if the connection
/// ends before, the process does as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// For `POST /exec/ID/resize`: letters, digits, "-" and "_", at most 64.
    pub id: String,
    /// The container that it runs in; none is the guest itself.
    pub container: Option<String>,
    /// What it does.
    pub run: Run,
    /// Paths of FIFOs of the host; none is no such stream.
    pub stdin: Option<String>,
    /// As `stdin`.
    pub stdout: Option<String>,
    /// As `stdin`; none with a terminal.
    pub stderr: Option<String>,
}

/// What a process of [`Exec`] does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    /// A program.
    Program(Program),
    /// Files of the container are copied.
    Copy(Copy),
}

/// A program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name and arguments; none is a shell.
    pub args: Vec<String>,
    /// The working directory; none is the container's, or the root.
    pub cwd: Option<String>,
    /// Variables in the form `NAME=VALUE`, besides those of the container.
    pub env: Vec<String>,
    /// It has a terminal of this size.
    pub terminal: Option<Size>,
}

/// A terminal's size, also the body of `POST /exec/ID/resize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// What is copied between a container's files and a tar stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Copy {
    /// To standard output.
    Out {
        /// A file or directory.
        path: String,
        /// A link is followed.
        follow: bool,
    },
    /// From standard input.
    In {
        /// Where to.
        path: String,
        /// The stream is the user's own archive.
        archive: bool,
        /// Owners and set-id bits are kept.
        keeps: bool,
    },
}

/// How a process of [`Exec`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit code, or 128 and the signal's number.
    pub exit_status: u32,
}
