//! Files of a cgroup that announce their changes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A `*.events` file: `key value` lines, and a poll event (`EPOLLPRI`) at each change.
///
/// Polled rather than watched with inotify: inotify instances are limited for each user, and containers' roots share
/// the agent's.
#[derive(Debug)]
pub struct EventFile(AsyncFd<File>);

impl EventFile {
    /// Opens the file; changes from now on are seen.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a File always answers the same descriptor, and keeps it open while it lives.
        Ok(Self(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?))
    }

    /// The value of one key now.
    pub fn read(&self, key: &str) -> io::Result<Option<u64>> {
        let mut text = [0; 1024];
        let length = self.0.get_ref().read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        Ok(parse(&text).get(key).copied())
    }

    /// Waits until the file changes after the last [`Self::read`].
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// The keys and values of an `*.events` file.
pub fn parse(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_pairs_are_passed_over() {
        let events = parse("populated 1\nfrozen x\n\nodd\nfrozen 0\n");
        assert_eq!(events.get("populated"), Some(&1));
        assert_eq!(events.get("frozen"), Some(&0));
        assert_eq!(events.len(), 2);
    }
}
