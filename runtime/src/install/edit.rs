//! A file of somebody else's that gets an entry of ours, and loses it again.
//!
//! What the file was before is kept beside it. As long as nobody else changes the file, taking the entry out puts back
//! exactly that; otherwise the entry alone is taken out. That copy also says that it was us who put the entry there: one
//! that somebody wrote by hand stays.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::change::{self, Change};

/// Beside a file: what it was before.
const BEFORE: &str = ".before-katana";
/// Beside a file that was not there before.
const ABSENT: &str = ".absent-before-katana";

/// How one kind of file gets its entry: `add` and `remove` answer with the new text, `add` with none if the entry is
/// there already.
pub(crate) trait Entry {
    /// Why it cannot be.
    type Error: From<change::Error>;
    /// The text with the entry.
    fn add(&self, text: Option<&str>) -> Result<Option<String>, Self::Error>;
    /// The text without it.
    fn remove(&self, text: &str) -> Result<String, Self::Error>;
}

/// What has to be changed so that the entry is there.
pub(crate) fn add<E: Entry>(path: &Path, entry: &E) -> Result<Vec<Change>, E::Error> {
    let before = change::read(path)?;
    let Some(after) = entry.add(before.as_deref())? else { return Ok(Vec::new()) };
    let (kept, other) = (beside(path, BEFORE), beside(path, ABSENT));
    let was_there = before.is_some();
    let (kept, other) = if was_there { (kept, other) } else { (other, kept) };
    // One of an earlier installation whose entry somebody has taken out by hand.
    let stale = Change::of_text(&other, change::read(&other)?, None);
    let mut backup = Change::of_text(&kept, change::read(&kept)?, Some(before.clone().unwrap_or_default()));
    if let Some(backup) = backup.as_mut().filter(|_| was_there) {
        backup.like = Some(path.to_owned());
    }
    let main = Change::of_text(path, before, Some(after));
    Ok([stale, backup, main].into_iter().flatten().collect())
}

/// What has to be changed so that the entry is gone.
pub(crate) fn remove<E: Entry>(path: &Path, entry: &E) -> Result<Vec<Change>, E::Error> {
    let now = change::read(path)?;
    let (kept, absent) = (beside(path, BEFORE), beside(path, ABSENT));
    let (before, marker) = (change::read(&kept)?, change::read(&absent)?);
    if before.is_none() && marker.is_none() {
        return Ok(Vec::new());
    }
    let after = match &now {
        None => None,
        Some(now) => {
            let unchanged = matches!(entry.add(before.as_deref()), Ok(Some(ours)) if ours == *now);
            if unchanged { before.clone() } else { Some(entry.remove(now)?) }
        }
    };
    let main = Change::of_text(path, now, after);
    let gone = [(kept, before), (absent, marker)];
    let gone = gone.into_iter().filter_map(|(path, text)| Change::of_text(&path, text, None));
    Ok(main.into_iter().chain(gone).collect())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
