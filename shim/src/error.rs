//! What can go wrong, and the one place where it becomes a ttrpc status.

use std::io;

use nix::errno::Errno;
use ttrpc::Code;

/// The shim's result.
pub type Result<T> = std::result::Result<T, Error>;

/// An error as containerd's client will see it: a kind and one line of text.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No such container, exec or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The request does not fit the task's state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request, the bundle or the configuration is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// What this runtime does not do.
    #[error("{0}")]
    Unimplemented(String),
    /// The virtual machine does not come up, or is gone.
    #[error("{0}")]
    Unavailable(String),
    /// Somebody did not answer in time.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The host refused something.
    #[error("{0}")]
    Host(String),
    /// The agent in the guest refused, with its own code.
    #[error("{text}")]
    Agent {
        /// The agent's code.
        code: Code,
        /// The agent's text.
        text: String,
    },
}

impl Error {
    /// The host refused `what`.
    pub fn io(what: impl std::fmt::Display, source: &io::Error) -> Self {
        Self::Host(format!("{what}: {}", reason(source)))
    }

    /// The host refused `what`.
    pub fn os(what: impl std::fmt::Display, errno: Errno) -> Self {
        Self::Host(format!("{what}: {}", describe(errno)))
    }

    /// The process is not there any more, in the words of containerd's runc shim.
    pub fn already_finished() -> Self {
        Self::NotFound("process already finished".into())
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Unavailable(_) => Code::UNAVAILABLE,
            Self::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
            // What runc's shim answers for any failure of the host or the runtime.
            Self::Host(_) => Code::UNKNOWN,
            Self::Agent { code, .. } => *code,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), one_line(&error.to_string())))
    }
}

impl From<katana_config::Error> for Error {
    fn from(error: katana_config::Error) -> Self {
        Self::InvalidArgument(error.to_string())
    }
}

/// The reason of an I/O error without Rust's "(os error N)", which is of no use to users.
pub fn reason(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| describe(Errno::from_raw(code)).into())
}

/// What has run out is to be seen.
fn describe(errno: Errno) -> &'static str {
    match errno {
        // Of fork(2) and of threads: no other EAGAIN is reported as an error.
        Errno::EAGAIN => "Resource temporarily unavailable (no more processes or threads: pids.max?)",
        errno => errno.desc(),
    }
}

/// Longest text of an error, bytes. Guests have a say in some.
const LONGEST: usize = 4096;

/// Clients print an error as one line, so it must be one; on terminals, which must not take any of it for more than
/// text.
pub fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    cut(plain(&lines), LONGEST)
}

/// A text in which all that is not for reading is escaped: control characters (C0, DEL and C1), and those that change
/// the order or the lines in which a text is shown (Unicode 16, 5.8 and 23.2).
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                plain.extend(character.escape_unicode());
            }
            '\t' => plain.push(' '),
            _ if character.is_control() => plain.extend(character.escape_default()),
            _ => plain.push(character),
        }
    }
    plain
}

/// No more than so many bytes of a text.
pub fn cut(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        text.truncate(text.floor_char_boundary(limit));
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_guests_are_only_text() {
        let hostile = "a\x1b[2J\u{9b}31m\x7f\rb\u{202e}c\u{2028}d\0\te\n\n f";
        let expected = "a\\u{1b}[2J\\u{9b}31m\\u{7f}\\rb\\u{202e}c\\u{2028}d\\u{0} e; f";
        assert_eq!(one_line(hostile), expected);
        assert_eq!(one_line(expected), expected);
        let long = one_line(&"\u{e4}\x1b".repeat(100_000));
        assert!(long.len() <= LONGEST + 3 && long.ends_with("..."), "{}", long.len());
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(Error::Host(hostile.into())) else {
            panic!()
        };
        assert_eq!(status.message, expected);
    }

    #[test]
    fn codes_and_texts_reach_the_client() {
        let cases = [
            (Error::already_finished(), Code::NOT_FOUND, "process already finished: not found"),
            (Error::AlreadyExists("id x".into()), Code::ALREADY_EXISTS, "id x: already exists"),
            (Error::Agent { code: Code::NOT_FOUND, text: "a\nb".into() }, Code::NOT_FOUND, "a; b"),
            (
                Error::io("kernel \"/x\"", &io::Error::from_raw_os_error(libc::ENOENT)),
                Code::UNKNOWN,
                "kernel \"/x\": No such file or directory",
            ),
        ];
        for (error, code, text) in cases {
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("no status") };
            assert_eq!((status.code(), status.message.as_str()), (code, text));
        }
    }
}
