//! Paths inside a container's root, whose links an image may have laid to lead out of it.
//!
//! What exists is opened with openat2(2), RESOLVE_IN_ROOT. What has to be made on the way is made step by step from
//! descriptors, links being followed by hand: the kernel has no call that creates under that rule.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

/// Links followed in one path, as the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Tries against renames that race with a resolution (openat2(2), EAGAIN).
const TRIES: usize = 8;

/// A container's root directory.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// What to make at the end of a path that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Make {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

impl Root {
    /// Paths will be inside this directory.
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens what is there, as a place (O_PATH).
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH, ResolveFlag::empty())
    }

    /// Opens what is there for use.
    pub fn open_file(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlag::empty())
    }

    /// Opens a place that no link leads to; ELOOP if one does.
    pub fn open_without_links(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH, ResolveFlag::RESOLVE_NO_SYMLINKS)
    }

    /// Opens a place, and makes it and the directories that lead to it where they are missing.
    pub fn ensure(&self, path: &Path, make: Make) -> io::Result<OwnedFd> {
        match self.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.walk(path, make),
            other => other,
        }
    }

    /// The directory of a path, made if it is missing, and the path's last name.
    pub fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        Ok((self.ensure(directory, Make::Directory)?, name))
    }

    fn resolve(&self, path: &Path, flags: OFlag, resolve: ResolveFlag) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
        let resolve = resolve | ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        let mut result = Err(Errno::EAGAIN);
        for _ in 0..TRIES {
            result = openat2(&self.0, path, how);
            if !matches!(result, Err(Errno::EAGAIN)) {
                break;
            }
        }
        Ok(result?)
    }

    /// Resolves a path by hand. The directories on the way are kept as descriptors, so that ".." leads back to where
    /// the path came from whatever is renamed meanwhile.
    fn walk(&self, path: &Path, make: Make) -> io::Result<OwnedFd> {
        let mut way: Vec<OwnedFd> = Vec::new();
        let mut rest: VecDeque<OsString> = names(path);
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                way.pop();
                continue;
            }
            let here = way.last().map_or(self.0.as_fd(), AsFd::as_fd);
            let next = open_or_make(here, &name, if rest.is_empty() { make } else { Make::Directory })?;
            if !is(&fstat(&next)?, SFlag::S_IFLNK) {
                way.push(next);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
            let target = readlinkat(&next, "")?;
            let target = Path::new(&target);
            if target.is_absolute() {
                way.clear();
            }
            let mut names = names(target);
            names.append(&mut rest);
            rest = names;
        }
        way.pop().map_or_else(|| self.0.try_clone(), Ok)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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

/// Whether a file is of a type.
pub fn is(status: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == kind
}

fn open_or_make(directory: BorrowedFd<'_>, name: &OsStr, make: Make) -> io::Result<OwnedFd> {
    let place = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(directory, name, place, Mode::empty()) {
        Err(Errno::ENOENT) => (),
        other => return Ok(other?),
    }
    let made = match make {
        Make::Directory => mkdirat(directory, name, Mode::from_bits_truncate(0o755)),
        Make::File => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            openat(directory, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        }
    };
    match made {
        // Someone else made it meanwhile.
        Ok(()) | Err(Errno::EEXIST) => Ok(openat(directory, name, place, Mode::empty())?),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("kata-agent-confined-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("root/etc")).unwrap();
            Self(path)
        }

        fn root(&self) -> Root {
            Root::new(fs::File::open(self.0.join("root")).unwrap().into())
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn links_and_dots_do_not_lead_out() {
        let tree = Tree::new("out");
        for (link, target) in
            [("up", "../../.."), ("abs", "/outside/dir"), ("etc/deep", "../../../../outside2"), ("me", "me")]
        {
            symlink(target, tree.0.join("root").join(link)).unwrap();
        }
        let root = tree.root();
        root.ensure(Path::new("/up/a/b"), Make::Directory).unwrap();
        root.ensure(Path::new("/abs/c"), Make::File).unwrap();
        root.ensure(Path::new("/etc/deep/d"), Make::File).unwrap();
        root.ensure(Path::new("/../../e/../f"), Make::File).unwrap();
        assert_eq!(
            root.ensure(Path::new("/me/x"), Make::File).unwrap_err().raw_os_error(),
            Some(libc::ELOOP)
        );
        for inside in ["a/b", "outside/dir/c", "outside2/d", "f"] {
            assert!(tree.0.join("root").join(inside).exists(), "{inside}");
        }
        assert_eq!(fs::read_dir(&tree.0).unwrap().count(), 1, "nothing beside the root");
    }

    #[test]
    fn a_dangling_link_is_made_where_it_points() {
        let tree = Tree::new("dangling");
        symlink("../run/resolve/stub.conf", tree.0.join("root/etc/resolv.conf")).unwrap();
        let root = tree.root();
        root.ensure(Path::new("/etc/resolv.conf"), Make::File).unwrap();
        assert!(tree.0.join("root/run/resolve/stub.conf").is_file());
        assert!(root.open_without_links(Path::new("/etc/resolv.conf")).is_err());
        assert!(root.open_without_links(Path::new("/run/resolve/stub.conf")).is_ok());
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let tree = Tree::new("file");
        fs::write(tree.0.join("root/file"), "x").unwrap();
        let error = tree.root().ensure(Path::new("/file/below"), Make::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
        assert!(tree.root().parent(Path::new("/")).is_err());
    }
}
