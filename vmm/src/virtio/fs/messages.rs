//! Requests as they come from the guest's queue: those that the library does not know are answered here, and writes,
//! whose count it loses. All others are the library's.
//!
//! linux/fuse.h, 7.39: FUSE_TMPFILE, FUSE_STATX and FUSE_IOCTL.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use katana_protocol::counters::Counter;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{
    Attr, BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, GETATTR_FH, InHeader, IoctlIn, IoctlOut,
    Opcode, OpenOut, OutHeader, WRITE_CACHE, WRITE_KILL_PRIV, WRITE_LOCKOWNER, WriteIn, WriteOut,
};
use virtiofsd::server::Server;
use vm_memory::ByteValued;

use super::checks;
use super::host::{Birth, Host};
use super::inode_flags::Request;
use super::replay::{self, Replaying};
use super::transfer::Written;
use crate::counters;

/// FUSE_STATX, which the library has no name for.
const STATX: u32 = 52;
/// Most bytes that are read of what comes with an ioctl(2).
const MOST_INPUT: usize = 64;

type Answer = io::Result<Vec<u8>>;

/// All that serves requests.
pub struct Messages {
    server: Server<Replaying>,
    replaying: Replaying,
    host: Arc<Host>,
}

impl Messages {
    pub fn new(host: Host) -> Self {
        let host = Arc::new(host);
        let replaying = Replaying::new(Arc::clone(&host));
        Self { server: Server::new(replaying.clone()), replaying, host }
    }

    /// The guest is gone.
    pub fn destroy(&self) {
        self.server.destroy();
    }

    /// Answers a request; the length of the answer.
    ///
    /// The header is read twice, and may have changed in between. Then the library gets what it does not know or loses
    /// the count of a write: the guest has deceived itself.
    ///
    /// # Errors
    /// When it cannot be answered, or not be made sense of: then nothing has been written. What was asked for may have
    /// been done if there was no room for the answer.
    pub fn handle(&self, mut reader: Reader<'_>, writer: Writer<'_>) -> Result<usize, virtiofsd::Error> {
        if reader.available_bytes().max(writer.available_bytes()) > checks::MOST_BYTES {
            return Err(nonsense("it is longer than any"));
        }
        if writer.available_bytes() < size_of::<OutHeader>() {
            // The library relies on this room, whatever the request is.
            return self.take(reader).map(|()| 0);
        }
        let header = read::<InHeader>(&mut reader.clone())?;
        let kind = Opcode::try_from(header.opcode);
        counters::count(counter(&kind));
        let replay = replay::is_one(&Context::from(header));
        let ours = header.opcode == STATX
            || !replay && matches!(kind, Ok(Opcode::Write | Opcode::TmpFile | Opcode::Ioctl));
        if !ours {
            // There is no shared memory window (DAX), hence no back-end to ask for one.
            let answered = self.server.handle_message(reader, writer, None::<&mut ()>)?;
            if matches!(kind, Ok(Opcode::Read)) {
                counters::add(Counter::FileBytesRead, answered.saturating_sub(size_of::<OutHeader>()));
            }
            return Ok(answered);
        }
        let header = read::<InHeader>(&mut reader)?;
        let answer = match Opcode::try_from(header.opcode) {
            Ok(Opcode::Write) => self.write(header, reader),
            Ok(Opcode::TmpFile) => self.make_unnamed(header, reader),
            Ok(Opcode::Ioctl) => self.inode_flags(header, reader),
            _ if header.opcode == STATX => self.statx(header, reader),
            _ => invalid(),
        };
        reply(writer, header.unique, answer).map_err(virtiofsd::Error::EncodeMessage)
    }

    /// Takes a request that has no answer.
    fn take(&self, mut reader: Reader<'_>) -> Result<(), virtiofsd::Error> {
        let header = read::<InHeader>(&mut reader)?;
        let (ctx, inode) = (Context::from(header), header.nodeid);
        counters::count(counter(&Opcode::try_from(header.opcode)));
        match Opcode::try_from(header.opcode) {
            Ok(Opcode::Forget) => {
                self.replaying.forget(ctx, inode, read::<ForgetIn>(&mut reader)?.nlookup);
            }
            Ok(Opcode::BatchForget) => {
                for _ in 0..read::<BatchForgetIn>(&mut reader)?.count {
                    let ForgetOne { nodeid, nlookup } = read(&mut reader)?;
                    self.replaying.forget(ctx, nodeid, nlookup);
                }
            }
            // There is nothing that can be interrupted.
            Ok(Opcode::Interrupt) => {}
            _ => return Err(nonsense("there is no room for an answer")),
        }
        Ok(())
    }

    fn write(&self, header: InHeader, mut reader: Reader<'_>) -> Answer {
        let WriteIn { fh, offset, size, write_flags, lock_owner, flags, .. } = reader.read_obj()?;
        // The library takes whole buffers: what is behind the data must not follow it.
        if reader.split_at(size as usize).is_err() {
            return invalid();
        }
        let owner = (write_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
        let delayed = write_flags & WRITE_CACHE != 0;
        let kill = write_flags & WRITE_KILL_PRIV != 0;
        let (ctx, inode, data) = (Context::from(header), header.nodeid, Written(reader));
        let written = self.host.write(ctx, inode, fh, data, size, offset, owner, delayed, kill, flags)?;
        counters::add(Counter::FileBytesWritten, written);
        // It is not more than asked for.
        let size = u32::try_from(written).unwrap_or(size);
        Ok(WriteOut { size, ..WriteOut::default() }.as_slice().to_vec())
    }

    fn make_unnamed(&self, header: InHeader, mut reader: Reader<'_>) -> Answer {
        let CreateIn { flags, mode, umask, .. } = reader.read_obj()?;
        let (entry, fh) = self.host.make_unnamed(header.into(), header.nodeid, flags, mode, umask)?;
        let open = OpenOut { fh, ..OpenOut::default() };
        Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
    }

    fn inode_flags(&self, header: InHeader, mut reader: Reader<'_>) -> Answer {
        let IoctlIn { fh, cmd, in_size, out_size, .. } = reader.read_obj()?;
        let mut input = vec![0; (in_size as usize).min(MOST_INPUT)];
        reader.read_exact(&mut input)?;
        let Some(request) = Request::new(cmd, &input, out_size as usize) else {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        };
        let output = self.host.inode_flags(header.into(), header.nodeid, fh, request)?;
        Ok([IoctlOut::default().as_slice(), &output].concat())
    }

    fn statx(&self, header: InHeader, mut reader: Reader<'_>) -> Answer {
        // struct fuse_statx_in: getattr_flags, reserved, fh, sx_flags, sx_mask.
        let [flags, _, low, high, ..]: [u32; 6] = reader.read_obj()?;
        let fh = u64::from(high) << 32 | u64::from(low);
        let (ctx, inode) = (Context::from(header), header.nodeid);
        if let Some(shown) = replay::attributes(&self.host, ctx, inode) {
            let (attr, valid) = shown?;
            return Ok(statx_out(&attr, None, valid));
        }
        let (attr, birth) = self.host.statx(ctx, inode, (flags & GETATTR_FH != 0).then_some(fh))?;
        Ok(statx_out(&attr, birth, self.host.attributes_hold(inode)))
    }
}

/// Answers what made no sense.
pub fn refuse(mut reader: Reader<'_>, writer: Writer<'_>) -> io::Result<usize> {
    let header = reader.read_obj::<InHeader>()?;
    reply(writer, header.unique, invalid())
}

/// As what a request is counted.
fn counter<E>(kind: &Result<Opcode, E>) -> Counter {
    use Opcode as O;
    let Ok(kind) = kind else { return Counter::FileOther };
    match kind {
        O::Lookup => Counter::FileLookup,
        O::Forget | O::BatchForget => Counter::FileForget,
        O::Getattr => Counter::FileAttributes,
        O::Open | O::Opendir | O::Create | O::TmpFile | O::Release | O::Releasedir => Counter::FileOpen,
        O::Read => Counter::FileRead,
        O::Write => Counter::FileWrite,
        O::Readdir | O::Readdirplus => Counter::FileList,
        O::Flush | O::Fsync | O::Fsyncdir | O::Syncfs => Counter::FileSync,
        O::Getxattr | O::Setxattr | O::Listxattr | O::Removexattr => Counter::FileExtended,
        _ => Counter::FileOther,
    }
}

fn read<T: ByteValued>(reader: &mut Reader<'_>) -> Result<T, virtiofsd::Error> {
    reader.read_obj().map_err(virtiofsd::Error::DecodeMessage)
}

fn nonsense(why: &'static str) -> virtiofsd::Error {
    virtiofsd::Error::DecodeMessage(io::Error::new(io::ErrorKind::InvalidData, why))
}

fn invalid<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

fn reply(mut writer: Writer<'_>, unique: u64, answer: Answer) -> io::Result<usize> {
    let (error, payload) = match answer {
        Ok(payload) => (0, payload),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
    };
    let length = size_of::<OutHeader>() + payload.len();
    let len = u32::try_from(length).map_err(io::Error::other)?;
    if writer.available_bytes() < length {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    writer.write_all(OutHeader { len, error, unique }.as_slice())?;
    writer.write_all(&payload)?;
    Ok(length)
}

/// `struct fuse_statx_out`.
fn statx_out(attr: &Attr, birth: Option<Birth>, valid: Duration) -> Vec<u8> {
    use virtiofsd::soft_idmap::Id;
    let mask = libc::STATX_BASIC_STATS | birth.map_or(0, |_| libc::STATX_BTIME);
    let mut out = Vec::with_capacity(288);
    let longs = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    let words = |out: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    longs(&mut out, &[valid.as_secs()]);
    words(&mut out, &[valid.subsec_nanos(), 0]);
    longs(&mut out, &[0, 0]);
    // struct fuse_statx: which fields there are, block size, attributes, links, owners, mode ...
    words(&mut out, &[mask, attr.blksize]);
    longs(&mut out, &[0]);
    words(&mut out, &[attr.nlink, attr.uid.into_inner(), attr.gid.into_inner(), attr.mode & 0xffff]);
    longs(&mut out, &[attr.ino, attr.size, attr.blocks, 0]);
    // ... and the times of access, birth, change and modification, with their nanoseconds.
    let born = birth.unwrap_or_default();
    for (seconds, nanoseconds) in [
        (attr.atime, attr.atimensec),
        (born.seconds.cast_unsigned(), born.nanoseconds),
        (attr.ctime, attr.ctimensec),
        (attr.mtime, attr.mtimensec),
    ] {
        longs(&mut out, &[seconds]);
        words(&mut out, &[nanoseconds, 0]);
    }
    words(&mut out, &[libc::major(attr.rdev.into()), libc::minor(attr.rdev.into()), 0, 0]);
    longs(&mut out, &[0; 14]);
    out
}
