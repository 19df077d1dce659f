//! Opens files that decide what runs as root on the host: programs, kernels, images, configurations, templates. Nobody
//! but root may be able to change them, nor to put others in their place: that is asked of the file and of every
//! directory and link on the way to it. The way is walked from one open directory to the next, so what was looked at is
//! what is opened.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

/// Links followed in one path, as the kernel's own limit (path_resolution(7)).
const MOST_LINKS: usize = 40;
const PLACE: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// Write permission of group and others. An access control list that lets anybody else write shows in the group's bits,
/// where its mask is (acl(5)).
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// What becomes of symbolic links on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They are followed, if they belong to root.
    Follow,
    /// They are refused: the path itself says where the file is.
    Refuse,
}

/// Opens a regular file or a directory for reading.
///
/// # Errors
/// When it cannot be opened; with a text when others than root could have had a hand in it, or it is something else.
pub fn open(path: &Path, links: Links) -> io::Result<File> {
    Walk::along(path, links)?.open()
}

/// Whether a file that is open belongs to root, and is root's alone to change. `path` is for the error.
///
/// # Errors
/// With a text if not.
pub fn check(file: impl AsFd, path: &Path) -> io::Result<()> {
    checked(&fstat(file)?, path).map(drop)
}

/// The directories that lead to where a path has got, root first, each with its name.
struct Walk {
    way: Vec<(OwnedFd, PathBuf)>,
    /// The name in the last of them, unless that itself is meant.
    name: Option<OsString>,
}

impl Walk {
    fn along(path: &Path, links: Links) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let root = openat(AT_FDCWD, "/", PLACE, Mode::empty())?;
        checked(&fstat(&root)?, Path::new("/"))?;
        let mut walk = Self { way: vec![(root, PathBuf::from("/"))], name: None };
        let mut rest = names(&path);
        let mut followed = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                // That of the root is the root.
                walk.way.truncate((walk.way.len() - 1).max(1));
                continue;
            }
            let (entry, place) = walk.enter(&name)?;
            let status = fstat(&entry)?;
            match kind(&status) {
                SFlag::S_IFLNK => {
                    owned(&status, &place)?;
                    walk.check_names()?;
                    followed += 1;
                    if links == Links::Refuse || followed > MOST_LINKS {
                        return Err(other(&place, "is a symbolic link"));
                    }
                    let target = readlinkat(&entry, "")?;
                    let target = Path::new(&target);
                    if target.is_absolute() {
                        walk.way.truncate(1);
                    }
                    let mut before = names(target);
                    before.append(&mut rest);
                    rest = before;
                }
                SFlag::S_IFDIR => {
                    checked(&status, &place)?;
                    walk.way.push((entry, place));
                }
                _ if !rest.is_empty() => return Err(Errno::ENOTDIR.into()),
                _ => walk.name = Some(name),
            }
        }
        Ok(walk)
    }

    /// What has this name in the directory that was reached.
    fn enter(&self, name: &OsString) -> io::Result<(OwnedFd, PathBuf)> {
        let (directory, path) = self.here()?;
        Ok((openat(directory, name.as_os_str(), PLACE, Mode::empty())?, path.join(name)))
    }

    fn here(&self) -> io::Result<&(OwnedFd, PathBuf)> {
        // There is always the root.
        self.way.last().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// In a directory of all users, such as /tmp, a name of root's file or link can be another user's hard link to it,
    /// and one that is about to be made can be another user's link. What is a directory of root's there is root's alone
    /// to rename.
    fn check_names(&self) -> io::Result<()> {
        let (directory, path) = self.here()?;
        if fstat(directory)?.st_mode & OTHERS_WRITE != 0 {
            return Err(other(path, "is a directory in which others than root can make files"));
        }
        Ok(())
    }

    fn open(self) -> io::Result<File> {
        self.check_names()?;
        let (directory, path) = self.here()?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let Some(name) = &self.name else {
            return Ok(openat(directory, ".", flags | OFlag::O_DIRECTORY, Mode::empty())?.into());
        };
        let path = path.join(name);
        // To open a device or a FIFO is to do something already.
        if kind(&fstat(self.enter(name)?.0)?) != SFlag::S_IFREG {
            return Err(io::Error::other("not a regular file"));
        }
        let file = openat(directory, name.as_os_str(), flags, Mode::empty())?;
        checked(&fstat(&file)?, &path)?;
        Ok(file.into())
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().filter_map(name).collect()
}

fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

/// Whether a file or directory is root's alone to change. In a directory with the sticky bit, others can make new
/// names, but not take away what is root's, and what is not root's is refused.
fn checked(status: &FileStat, path: &Path) -> io::Result<()> {
    owned(status, path)?;
    let shared = kind(status) == SFlag::S_IFDIR && status.st_mode & STICKY != 0;
    if status.st_mode & OTHERS_WRITE != 0 && !shared {
        let mode = status.st_mode & 0o7777;
        return Err(other(path, &format!("can be written to by others than root (mode {mode:04o})")));
    }
    Ok(())
}

/// Root's, or that of the user whom this program has as well: tests are run by others than root.
fn owned(status: &FileStat, path: &Path) -> io::Result<()> {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    if status.st_uid == 0 || status.st_uid == unsafe { libc::geteuid() } {
        return Ok(());
    }
    Err(other(path, &format!("belongs to user {}, not to root", status.st_uid)))
}

fn other(path: &Path, what: &str) -> io::Error {
    io::Error::other(format!("\"{}\" {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("katana-trusted-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("a/b")).unwrap();
            fs::write(path.join("a/b/file"), "text").unwrap();
            let tree = Self(path);
            for (at, mode) in [("", 0o755), ("a", 0o755), ("a/b", 0o755), ("a/b/file", 0o644)] {
                tree.mode(at, mode);
            }
            tree
        }

        fn mode(&self, at: &str, mode: u32) {
            fs::set_permissions(self.0.join(at), fs::Permissions::from_mode(mode)).unwrap();
        }

        fn open(&self, at: &str) -> Result<String, String> {
            let said = |links| {
                let opened = open(&self.0.join(at), links).and_then(io::read_to_string);
                opened.map_err(|e| e.to_string().replace(&self.0.display().to_string(), "T"))
            };
            // A path without links is the same to both.
            let (followed, refused) = (said(Links::Follow), said(Links::Refuse));
            assert!(followed == refused || refused.as_ref().is_err_and(|e| e.contains("symbolic link")));
            followed
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_others_can_write_to_is_refused_wherever_it_is_on_the_way() {
        let tree = Tree::new("modes");
        assert_eq!(tree.open("a/b/file"), Ok("text".into()));
        assert_eq!(tree.open("a/b/../b/./file"), Ok("text".into()));
        for (at, mode, name) in
            [("a/b/file", 0o666, "T/a/b/file"), ("a/b", 0o775, "T/a/b"), ("a", 0o757, "T/a")]
        {
            let before = fs::metadata(tree.0.join(at)).unwrap().permissions().mode();
            tree.mode(at, mode);
            let error = format!("\"{name}\" can be written to by others than root (mode {mode:04o})");
            assert_eq!(tree.open("a/b/file"), Err(error));
            tree.mode(at, before & 0o7777);
        }
        // As /tmp is.
        tree.mode("a", 0o1777);
        assert_eq!(tree.open("a/b/file"), Ok("text".into()));
        tree.mode("a/b", 0o1777);
        let error = tree.open("a/b/file").unwrap_err();
        assert_eq!(error, "\"T/a/b\" is a directory in which others than root can make files");
    }

    #[test]
    fn what_is_not_roots_is_refused() {
        let tree = Tree::new("owners");
        for at in ["a/b/file", "a/b", "a"] {
            if chown(tree.0.join(at), Some(1234), None).is_err() {
                let thread = std::thread::current();
                let name = thread.name().unwrap_or("a test");
                // Past the test runner, for tests/all to count.
                return writeln!(io::stderr(), "skipped: {name}: only root gives files away").unwrap();
            }
            assert_eq!(tree.open("a/b/file"), Err(format!("\"T/{at}\" belongs to user 1234, not to root")));
            chown(tree.0.join(at), Some(0), None).unwrap();
        }
        symlink("b/file", tree.0.join("a/link")).unwrap();
        std::os::unix::fs::lchown(tree.0.join("a/link"), Some(1234), None).unwrap();
        assert_eq!(tree.open("a/link"), Err("\"T/a/link\" belongs to user 1234, not to root".into()));
    }

    #[test]
    fn links_are_followed_step_by_step_or_not_at_all() {
        let tree = Tree::new("links");
        symlink("../a/b", tree.0.join("a/link")).unwrap();
        symlink(tree.0.join("a/link/file"), tree.0.join("a/far")).unwrap();
        symlink("self", tree.0.join("a/self")).unwrap();
        assert_eq!(tree.open("a/far"), Ok("text".into()));
        let refused = |at: &str| open(&tree.0.join(at), Links::Refuse).unwrap_err().to_string();
        assert!(refused("a/far").ends_with("a/far\" is a symbolic link"), "{}", refused("a/far"));
        assert!(refused("a/link/file").ends_with("a/link\" is a symbolic link"));
        assert!(tree.open("a/self").unwrap_err().contains("symbolic link"));
        // What the link leads through counts as well.
        tree.mode("a/b", 0o777);
        assert!(tree.open("a/far").unwrap_err().starts_with("\"T/a/b\" can be written to"));
    }

    #[test]
    fn errors_of_the_kernel_stay_what_they_are() {
        let tree = Tree::new("kernel");
        let error = |at: &str| open(&tree.0.join(at), Links::Follow).unwrap_err().raw_os_error();
        assert_eq!(error("a/none"), Some(libc::ENOENT));
        assert_eq!(error("a/b/file/x"), Some(libc::ENOTDIR));
        assert_eq!(
            open(Path::new("/dev/zero"), Links::Follow).unwrap_err().to_string(),
            "not a regular file"
        );
        let directory = open(&tree.0.join("a"), Links::Refuse).unwrap();
        assert!(directory.metadata().unwrap().is_dir());
    }
}
