//! Files as a tar stream.

use std::fs::{self, File, Metadata, ReadDir};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{self, FsType, statfs};
use tar::{Builder, EntryType, Header};

use crate::{Error, Result, at, reason};

/// File systems that are the kernel's words and no files: they are left out below a directory.
const KERNELS: [FsType; 8] = [
    statfs::PROC_SUPER_MAGIC,
    statfs::SYSFS_MAGIC,
    statfs::CGROUP2_SUPER_MAGIC,
    statfs::CGROUP_SUPER_MAGIC,
    statfs::BPF_FS_MAGIC,
    statfs::DEBUGFS_MAGIC,
    statfs::TRACEFS_MAGIC,
    statfs::DEVPTS_SUPER_MAGIC,
];

/// Writes a file, a directory with all below it, or a link itself unless it is to be followed. The names in the stream
/// begin with the last name of `source`; with "." where that ends with "/." or has none. What cannot be copied of a
/// directory is passed to `left_out`, with the reason.
///
/// # Errors
/// When `source` cannot be read, or the stream not be written.
pub fn pack(
    source: &Path,
    follow: bool,
    out: impl Write,
    left_out: &mut dyn FnMut(&Path, &str),
) -> Result<()> {
    let metadata = if follow { fs::metadata(source) } else { fs::symlink_metadata(source) };
    let metadata = metadata.map_err(at(source))?;
    let text = source.as_os_str().as_encoded_bytes();
    let is_dot = text == b"." || text.ends_with(b"/.");
    let name = source.file_name().filter(|_| !is_dot).map_or(PathBuf::from("."), PathBuf::from);
    let mut packer = Packer { builder: Builder::new(out), left_out };
    packer.add(source, &name, &metadata, follow)?.map_err(at(source))?;
    if metadata.is_dir() {
        let entries = fs::read_dir(source).map_err(at(source))?;
        packer.below(Directory { entries, name, device: metadata.dev() })?;
    }
    packer.builder.into_inner().and_then(|mut out| out.flush()).map_err(Error::Stream)
}

/// A directory that is being packed.
struct Directory {
    entries: ReadDir,
    name: PathBuf,
    device: u64,
}

struct Packer<'a, W: Write> {
    builder: Builder<W>,
    left_out: &'a mut dyn FnMut(&Path, &str),
}

impl<W: Write> Packer<'_, W> {
    /// All below a directory, each directory below with all that is in it before the next.
    fn below(&mut self, top: Directory) -> Result<()> {
        let mut way = vec![top];
        while let Some(directory) = way.last_mut() {
            let Some(entry) = directory.entries.next() else {
                way.pop();
                continue;
            };
            // Its own directory is at fault, and ends.
            let Ok(entry) = entry else { continue };
            let (path, name, device) =
                (entry.path(), directory.name.join(entry.file_name()), directory.device);
            let entered = match entry.metadata() {
                Ok(metadata) if metadata.is_dir() && metadata.dev() != device && is_kernels(&path) => {
                    Err(io::Error::other("a file system of the kernel"))
                }
                Ok(metadata) => self.enter(&path, name, &metadata)?,
                Err(e) => Err(e),
            };
            match entered {
                Ok(directory) => way.extend(directory),
                Err(e) => (self.left_out)(&path, &reason(&e)),
            }
        }
        Ok(())
    }

    /// One entry, and the directory if it is one. The inner error is the file's.
    fn enter(
        &mut self,
        path: &Path,
        name: PathBuf,
        metadata: &Metadata,
    ) -> Result<io::Result<Option<Directory>>> {
        let entries = if metadata.is_dir() { fs::read_dir(path).map(Some) } else { Ok(None) };
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) => return Ok(Err(e)),
        };
        let added = self.add(path, &name, metadata, false)?;
        Ok(added.map(|()| entries.map(|entries| Directory { entries, name, device: metadata.dev() })))
    }

    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata, follow: bool) -> Result<io::Result<()>> {
        let kind = metadata.file_type();
        let mut header = Header::new_gnu();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        header.set_size(0);
        let written = if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.builder.append_data(&mut header, name, io::empty())
        } else if kind.is_symlink() {
            let target = match fs::read_link(path) {
                Ok(target) => target,
                Err(e) => return Ok(Err(e)),
            };
            header.set_entry_type(EntryType::Symlink);
            self.builder.append_link(&mut header, name, target)
        } else if kind.is_file() {
            let (file, length) = match open(path, follow) {
                Ok(opened) => opened,
                Err(e) => return Ok(Err(e)),
            };
            header.set_entry_type(EntryType::Regular);
            header.set_size(length);
            // The header says how much comes, whatever becomes of the file meanwhile.
            self.builder.append_data(&mut header, name, file.chain(io::repeat(0)).take(length))
        } else {
            let what = if kind.is_socket() { "a socket" } else { "a device or FIFO" };
            return Ok(Err(io::Error::other(format!("{what} is not copied"))));
        };
        written.map_err(Error::Stream).map(Ok)
    }
}

/// Opens a file, in whose place may be something else by now.
fn open(path: &Path, follow: bool) -> io::Result<(File, u64)> {
    let link = if follow { 0 } else { libc::O_NOFOLLOW };
    let file =
        File::options().read(true).custom_flags(link | libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a file any more"));
    }
    Ok((file, metadata.len()))
}

fn is_kernels(directory: &Path) -> bool {
    statfs(directory).is_ok_and(|status| KERNELS.contains(&status.filesystem_type()))
}
