//! A tar stream as files, at a place that is chosen as cp(1) and Docker's `cp` choose it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::entries::{self, Head, Kind};
use crate::tree::Tree;
use crate::{Error, Result, at};

/// How a stream is unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// It is an archive of the user's, and not what [`pack`](crate::pack) made of a source: all its names are kept.
    pub archive: bool,
    /// Owners and set-id bits are kept.
    pub keeps: bool,
}

/// What becomes of the names of a stream.
enum Names {
    /// They stay.
    Kept,
    /// The first part of each, if there is one for all of the source, becomes this one.
    Instead { of: bool, name: OsString },
}

impl Names {
    fn moved(&self, path: &Path) -> PathBuf {
        match self {
            Self::Kept => path.to_owned(),
            Self::Instead { of, name } => {
                std::iter::once(name.as_os_str()).chain(path.iter().skip(usize::from(*of))).collect()
            }
        }
    }
}

/// Unpacks a stream at a destination.
///
/// # Errors
/// When the stream is none or breaks a rule, the destination is not fit for it, or a file cannot be written. What came
/// before stays.
pub fn unpack(input: impl Read, destination: &Path, manner: Manner) -> Result<()> {
    let mut place = None;
    // Directories that the stream is in, with their times.
    let mut way: Vec<(PathBuf, i64)> = Vec::new();
    entries::read(input, |mut head, contents| {
        let (tree, names) = match &place {
            Some(place) => place,
            None => place.insert(choose(destination, &head, manner)?),
        };
        head.path = names.moved(&head.path);
        while let Some((path, mtime)) = way.pop_if(|(path, _)| !head.path.starts_with(path)) {
            tree.leave(&path, mtime);
        }
        match &head.kind {
            Kind::Directory => {
                tree.directory(&head)?;
                way.push((head.path, head.mtime));
                Ok(())
            }
            Kind::File => tree.file(&head, contents),
            Kind::Link(target) => tree.link(&head, target),
            Kind::SameAs(other) => tree.same(&head, &names.moved(other)),
        }
    })?;
    let Some((tree, _)) = place else {
        return Err(Error::Stream(io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")));
    };
    for (path, mtime) in way.into_iter().rev() {
        tree.leave(&path, mtime);
    }
    Ok(())
}

/// The tree to write in, and what becomes of the names.
fn choose(destination: &Path, first: &Head, manner: Manner) -> Result<(Tree, Names)> {
    let is_directory = first.kind == Kind::Directory;
    let slash = destination.as_os_str().as_encoded_bytes().ends_with(b"/");
    let there = match fs::metadata(destination) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        there => Some(there.map_err(at(destination))?),
    };
    let refused = |why| Err(Error::Destination(destination.to_owned(), why));
    match there {
        Some(there) if there.is_dir() => Ok((Tree::open(destination, manner.keeps)?, Names::Kept)),
        _ if manner.archive => refused("an archive is unpacked into a directory that is there"),
        Some(_) if is_directory => refused("a directory cannot take the place of a file"),
        // A link's file is replaced, not the link.
        Some(_) => instead(&fs::canonicalize(destination).map_err(at(destination))?, first, manner),
        None if slash && !is_directory => refused("there is no such directory"),
        None => instead(destination, first, manner),
    }
}

/// The directory that a path names something in, and its name there for what comes.
fn instead(path: &Path, first: &Head, manner: Manner) -> Result<(Tree, Names)> {
    let name = path.file_name().ok_or_else(|| Error::Destination(path.to_owned(), "it has no name"))?;
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    let tree = Tree::open(directory.unwrap_or(Path::new(".")), manner.keeps)?;
    let of = !first.path.as_os_str().is_empty();
    Ok((tree, Names::Instead { of, name: name.to_owned() }))
}
