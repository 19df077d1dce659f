//! What happens to single files: read whole, shown as a difference, written at once or not at all, taken back when a
//! later one fails.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, symlink};
use std::path::{Path, PathBuf};

use nix::libc::{O_CLOEXEC, O_NOFOLLOW, O_NONBLOCK};
use similar::TextDiff;

/// No daemon's configuration is this large.
const MOST: u64 = 1 << 20;

/// Why a file is not touched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is a symbolic link; name the file that it leads to", path.display())]
    Symlink { path: PathBuf },
    #[error("{} is not a regular file", path.display())]
    Kind { path: PathBuf },
    #[error("{} is larger than {MOST} bytes", path.display())]
    Large { path: PathBuf },
    #[error("{} is not UTF-8 text", path.display())]
    Text { path: PathBuf },
    #[error("cannot write {}: {source}; what was changed before it is as it was again", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Text(String),
    Link(PathBuf),
}

/// What is at a path, and what is to be there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) path: PathBuf,
    pub(crate) before: Option<Content>,
    pub(crate) after: Option<Content>,
    /// The file whose owner and mode a new one gets.
    pub(crate) like: Option<PathBuf>,
}

impl Change {
    /// Of a text file; none if there is nothing to change.
    pub(crate) fn of_text(path: &Path, before: Option<String>, after: Option<String>) -> Option<Self> {
        let like = before.is_some().then(|| path.to_owned());
        let (before, after) = (before.map(Content::Text), after.map(Content::Text));
        (before != after).then(|| Self { path: path.to_owned(), before, after, like })
    }

    /// One line, for who has it done.
    pub(crate) fn summary(&self) -> String {
        let path = self.path.display();
        match (&self.before, &self.after) {
            (_, Some(Content::Link(to))) => format!("linked {path} -> {}", to.display()),
            (None, _) => format!("made {path}"),
            (_, None) => format!("removed {path}"),
            _ => format!("changed {path}"),
        }
    }

    /// All lines that change, for who wants to see them first.
    pub(crate) fn difference(&self) -> String {
        let (old, new) = (shown(self.before.as_ref()), shown(self.after.as_ref()));
        let name = |content: &Option<Content>| match content {
            Some(_) => self.path.display().to_string(),
            None => "/dev/null".to_owned(),
        };
        if let (None, Some(copied)) = (&self.before, &self.like) {
            return format!("copy of {}: {}\n", copied.display(), self.path.display());
        }
        let (from, to) = (name(&self.before), name(&self.after));
        if old.is_empty() && new.is_empty() {
            return format!("--- {from}\n+++ {to}\n");
        }
        TextDiff::from_lines(&old, &new).unified_diff().header(&from, &to).to_string()
    }

    fn apply(&self) -> io::Result<()> {
        set(&self.path, self.after.as_ref(), self.like.as_deref())
    }

    fn undo(&self) -> io::Result<()> {
        set(&self.path, self.before.as_ref(), Some(&self.path))
    }
}

fn shown(content: Option<&Content>) -> String {
    match content {
        None => String::new(),
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Link(to)) => format!("link to {}\n", to.display()),
    }
}

/// Makes all changes, or none.
///
/// # Errors
/// The first one that failed; those before it are taken back.
pub(crate) fn apply(changes: &[Change]) -> Result<(), Error> {
    for (done, change) in changes.iter().enumerate() {
        if let Err(source) = change.apply() {
            for earlier in changes[..done].iter().rev() {
                // The first failure is what is reported.
                let _ = earlier.undo();
            }
            return Err(Error::Write { path: change.path.clone(), source });
        }
    }
    Ok(())
}

/// The text of a file; none if it is not there.
pub(crate) fn read(path: &Path) -> Result<Option<String>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    // A path of which even the directory is not there is as good as an absent file.
    let metadata = match fs::symlink_metadata(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        found => found.map_err(failed)?,
    };
    if metadata.is_symlink() {
        return Err(Error::Symlink { path: path.to_owned() });
    }
    // Between the two looks, another process may have put something else there: O_NOFOLLOW, and no waiting for a pipe.
    let flags = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::Kind { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST {
        return Err(Error::Large { path: path.to_owned() });
    }
    String::from_utf8(bytes).map(Some).map_err(|_| Error::Text { path: path.to_owned() })
}

fn set(path: &Path, content: Option<&Content>, like: Option<&Path>) -> io::Result<()> {
    match content {
        None => remove(path),
        Some(Content::Link(to)) => {
            fs::create_dir_all(parent(path))?;
            symlink(to, path)
        }
        Some(Content::Text(text)) => write(path, text, like),
    }
}

/// A reader finds the old file or the new one, never a part.
fn write(path: &Path, text: &str, like: Option<&Path>) -> io::Result<()> {
    fs::create_dir_all(parent(path))?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let draft = path.with_file_name(name);
    let written = (|| {
        let flags = O_NOFOLLOW | O_CLOEXEC;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(flags).open(&draft)?;
        copy_access(&file, like)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

fn copy_access(file: &File, like: Option<&Path>) -> io::Result<()> {
    match like.map(fs::symlink_metadata) {
        Some(Ok(metadata)) => {
            if (metadata.uid(), metadata.gid()) != (file.metadata()?.uid(), file.metadata()?.gid()) {
                fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
            }
            file.set_permissions(metadata.permissions())
        }
        _ => file.set_permissions(PermissionsExt::from_mode(0o644)),
    }
}

/// With the directories in which nothing is left; one that a daemon or a package misses, it makes again.
fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    let mut directory = parent(path);
    let depth = |path: &Path| path.components().count();
    // Never one directly below the root, such as /etc.
    while depth(directory) > 2 && fs::remove_dir(directory).is_ok() {
        directory = parent(directory);
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path, after: &str) -> Change {
        Change::of_text(path, read(path).unwrap(), Some(after.to_owned())).unwrap()
    }

    #[test]
    fn a_failure_takes_back_what_was_done() {
        let folder = std::env::temp_dir().join(format!("katana-change-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (one, new, bad) = (folder.join("one"), folder.join("d/new"), folder.join("one/below-a-file"));
        fs::write(&one, "old\n").unwrap();
        fs::set_permissions(&one, PermissionsExt::from_mode(0o640)).unwrap();
        let changes = [text(&one, "new\n"), text(&new, "new\n"), text(&bad, "new\n")];
        let error = apply(&changes).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot write {}", bad.display())), "{error}");
        assert_eq!((fs::read_to_string(&one).unwrap().as_str(), new.exists()), ("old\n", false));
        apply(&changes[..2]).unwrap();
        assert_eq!(fs::read_to_string(&one).unwrap(), "new\n");
        assert_eq!(fs::metadata(&one).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::metadata(&new).unwrap().mode() & 0o7777, 0o644);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_no_text_file_is_refused() {
        let folder = std::env::temp_dir().join(format!("katana-read-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("f");
        assert!(matches!(read(&file), Ok(None)));
        symlink("/dev/null", &file).unwrap();
        assert!(matches!(read(&file), Err(Error::Symlink { .. })));
        fs::remove_file(&file).unwrap();
        fs::write(&file, b"\xFF").unwrap();
        assert!(matches!(read(&file), Err(Error::Text { .. })));
        fs::write(&file, vec![b'a'; MOST as usize + 1]).unwrap();
        assert!(matches!(read(&file), Err(Error::Large { .. })));
        assert!(matches!(read(&folder), Err(Error::Kind { .. })));
        fs::remove_dir_all(&folder).unwrap();
    }
}
