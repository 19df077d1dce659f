//! The entries of a tar stream, with names that are checked. Extended headers are read here and not by the library, which
//! takes any length of them.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use tar::{EntryType, PaxExtensions};

use crate::{Error, Result};

/// The longest name, bytes: a path of Linux (PATH_MAX).
const LONGEST_NAME: usize = 4096;
/// The longest extended header, bytes.
const LONGEST_EXTENSION: u64 = 64 * 1024;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file, whose contents follow.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Link(PathBuf),
    /// Another name of a file of the stream.
    SameAs(PathBuf),
}

/// An entry of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Relative, without "." and "..". Empty for the top.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-id bits included.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
}

/// What extended headers say of the entry that follows them.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u32>,
    gid: Option<u32>,
}

/// Hands each entry on, with its contents.
pub fn read(input: impl Read, mut take: impl FnMut(Head, &mut dyn Read) -> Result<()>) -> Result<()> {
    let mut archive = tar::Archive::new(input);
    let mut extended = Extended::default();
    for entry in archive.entries().map_err(Error::Stream)?.raw(true) {
        let mut entry = entry.map_err(Error::Stream)?;
        if !extended.hear(&mut entry)? {
            let head = std::mem::take(&mut extended).head(entry.header())?;
            take(head, &mut entry)?;
        }
    }
    Ok(())
}

impl Extended {
    /// Whether this entry is an extended header; then what it says is kept.
    fn hear<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<bool> {
        match entry.header().entry_type() {
            EntryType::GNULongName => self.path = Some(until_zero(body(entry)?)),
            EntryType::GNULongLink => self.link = Some(until_zero(body(entry)?)),
            EntryType::XHeader => self.hear_pax(&body(entry)?)?,
            // Comments, such as git's.
            EntryType::XGlobalHeader => drop(body(entry)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn hear_pax(&mut self, body: &[u8]) -> Result<()> {
        let refused = |what| Err(Error::Kind(PathBuf::from("an entry"), what));
        for record in PaxExtensions::new(body) {
            let record = record.map_err(Error::Stream)?;
            let (key, value) = (record.key_bytes(), record.value_bytes());
            let number = || std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            match key {
                b"path" => self.path = Some(value.to_owned()),
                b"linkpath" => self.link = Some(value.to_owned()),
                b"uid" => self.uid = number(),
                b"gid" => self.gid = number(),
                // Of 8 GiB and more; the header says another one.
                b"size" => return refused("of a length that only an extended header says"),
                key if key.starts_with(b"GNU.sparse.") => return refused("a sparse file"),
                _ => {}
            }
        }
        Ok(())
    }

    /// The entry that follows.
    fn head(self, header: &tar::Header) -> Result<Head> {
        let short = header.path_bytes();
        let path = name(self.path.as_deref().unwrap_or(&short))?;
        let target = || {
            let short = header.link_name_bytes().unwrap_or_default();
            let target = self.link.as_deref().unwrap_or(&short).to_owned();
            let good = !target.is_empty() && target.len() <= LONGEST_NAME && !target.contains(&0);
            if good { Ok(target) } else { Err(bad(&target)) }
        };
        let refused = |kind| Err(Error::Kind(path.clone(), kind));
        let kind = match header.entry_type() {
            // In archives of old, a directory is a file whose name ends with a slash.
            EntryType::Regular if short.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Link(PathBuf::from(OsStr::from_bytes(&target()?))),
            EntryType::Link => Kind::SameAs(name(&target()?)?),
            EntryType::Char | EntryType::Block => return refused("a device"),
            EntryType::Fifo => return refused("a FIFO"),
            EntryType::GNUSparse => return refused("a sparse file"),
            _ => return refused("of an unknown kind"),
        };
        let id = |id: std::io::Result<u64>| id.map(|id| u32::try_from(id).unwrap_or(u32::MAX));
        Ok(Head {
            kind,
            mode: header.mode().map_err(Error::Stream)? & 0o7777,
            uid: self.uid.map_or_else(|| id(header.uid()), Ok).map_err(Error::Stream)?,
            gid: self.gid.map_or_else(|| id(header.gid()), Ok).map_err(Error::Stream)?,
            mtime: i64::try_from(header.mtime().map_err(Error::Stream)?).unwrap_or(0),
            path,
        })
    }
}

fn body<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Vec<u8>> {
    if entry.size() > LONGEST_EXTENSION {
        return Err(Error::Extension(entry.size()));
    }
    let mut body = Vec::new();
    entry.read_to_end(&mut body).map_err(Error::Stream)?;
    Ok(body)
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}

fn bad(name: &[u8]) -> Error {
    let start = name.get(..name.len().min(256)).unwrap_or_default();
    Error::Name(String::from_utf8_lossy(start).into_owned())
}

/// A name of the stream as a path that leads down only.
fn name(bytes: &[u8]) -> Result<PathBuf> {
    if bytes.is_empty() || bytes.len() > LONGEST_NAME || bytes.contains(&0) || bytes.starts_with(b"/") {
        return Err(bad(bytes));
    }
    let parts = bytes.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts = parts.map(|part| if part == b".." { Err(bad(bytes)) } else { Ok(OsStr::from_bytes(part)) });
    parts.collect()
}
