mod access;
mod cache;
mod calls;
mod fuzzing;
mod replays;
mod special;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use virtiofsd::fuse::{
    AttrOut, EntryOut, InHeader, InitInCompat, InitOut, Opcode, OpenOut, OutHeader, ReadIn, SetattrIn,
    WriteIn, WriteOut,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::virtio::testing::{Bench, MEMORY, READ, WRITE};

const HIGH_PRIORITY: usize = 0;
const REQUESTS: usize = 1;
const ROOT: u64 = 1;
/// Each request has its own room in guest memory.
const ROOM: u64 = 0x1_0000;

struct Guest {
    bench: Bench<Fs>,
    dir: TempDir,
    next: u16,
}

fn guest() -> Guest {
    guest_with_limit(10_000)
}

fn guest_with_limit(descriptors: u64) -> Guest {
    guest_of(TempDir::new().unwrap(), descriptors)
}

fn guest_of(dir: TempDir, descriptors: u64) -> Guest {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let proc_self_fd = open("/proc/self/fd", flags, Mode::empty()).unwrap();
    let root = dir.as_path().to_str().unwrap().to_owned();
    // Under the filter of the real thing: a system call that it lacks ends the test.
    let confine = |kind| seccomp::install(kind).map_err(io::Error::other);
    let fs = Fs::serve("kataShared", &root, proc_self_fd, descriptors, confine).unwrap();
    let mut bench = Bench::new(fs);
    bench.activate(0);
    Guest { bench, dir, next: 0 }
}

/// An answer: error number and payload.
type Answer = (i32, Vec<u8>);

fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

impl Guest {
    /// Sends a request; its head.
    fn send(&mut self, opcode: Opcode, node: u64, uid: u32, payload: &[&[u8]]) -> u16 {
        self.send_number(opcode as u32, node, uid, payload)
    }

    fn send_number(&mut self, opcode: u32, node: u64, uid: u32, payload: &[&[u8]]) -> u16 {
        let head = self.next;
        self.next = (head + 2) % 64;
        let payload = payload.concat();
        let length = size_of::<InHeader>() + payload.len();
        let header = InHeader {
            len: length as u32,
            opcode,
            unique: head.into(),
            nodeid: node,
            uid: uid.into(),
            gid: uid.into(),
            ..InHeader::default()
        };
        let at = 0x20_0000 + u64::from(head) * ROOM;
        self.bench.memory.write_slice(&[header.as_slice(), &payload].concat(), GuestAddress(at)).unwrap();
        let ring = &mut self.bench.rings[REQUESTS];
        ring.chain(head, &[(at, length as u32, READ), (at + ROOM, ROOM as u32, WRITE)]);
        ring.publish(head);
        ring.kick.write(1).unwrap();
        head
    }

    fn wait(&mut self, queue: usize) -> (u16, u32) {
        self.bench.wait_used(queue)
    }

    fn answer(&mut self, head: u16) -> Answer {
        assert_eq!(self.wait(REQUESTS).0, head);
        let at = 0x20_0000 + (u64::from(head) + 1) * ROOM;
        let header: OutHeader = object(&self.bench.bytes(at, size_of::<OutHeader>()));
        assert_eq!(header.unique, u64::from(head));
        let payload = header.len as usize - size_of::<OutHeader>();
        (-header.error, self.bench.bytes(at + size_of::<OutHeader>() as u64, payload))
    }

    fn request(&mut self, opcode: Opcode, node: u64, uid: u32, payload: &[&[u8]]) -> Answer {
        let head = self.send(opcode, node, uid, payload);
        self.answer(head)
    }

    /// As fine a session as Linux has; what the server agreed to.
    fn init(&mut self) -> InitOut {
        // All that the server may offer, in particular HANDLE_KILLPRIV_V2 (1 << 28).
        let init = InitInCompat { major: 7, minor: 36, max_readahead: 1 << 17, flags: 0x3fff_ffff };
        let (error, answer) = self.request(Opcode::Init, 0, 0, &[init.as_slice(), &[0; 48]]);
        assert_eq!(error, 0);
        let mut bytes = answer;
        bytes.resize(size_of::<InitOut>(), 0);
        object(&bytes)
    }

    fn lookup(&mut self, name: &[u8]) -> EntryOut {
        let (error, answer) = self.request(Opcode::Lookup, ROOT, 0, &[name, b"\0"]);
        assert_eq!(error, 0);
        object(&answer)
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        let (error, answer) = self.request(Opcode::Open, node, 0, &[&flags.to_le_bytes(), &[0; 4]]);
        assert_eq!(error, 0);
        object::<OpenOut>(&answer).fh
    }

    fn path(&self) -> &Path {
        self.dir.as_path()
    }
}

#[test]
fn the_configuration_has_tag_and_queues() {
    let guest = guest();
    let config = guest.bench.config(0, 40);
    assert_eq!(&config[..10], b"kataShared");
    assert_eq!((&config[10..36], &config[36..]), (&[0; 26][..], &[1, 0, 0, 0][..]));
    let proc = || open("/proc/self/fd", OFlag::O_PATH, Mode::empty()).unwrap();
    for tag in ["", "a tag that is longer than thirty-six bytes"] {
        assert_eq!(
            Fs::serve(tag, "/", proc(), 100, |_| Ok(())).err().unwrap().kind(),
            io::ErrorKind::InvalidInput
        );
    }
    let refused = Fs::serve("x", "/", proc(), 100, |_| Err(io::ErrorKind::PermissionDenied.into()));
    assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn files_are_found_and_read_and_written() {
    let mut guest = guest();
    std::fs::write(guest.path().join("hello"), "contents").unwrap();
    assert_eq!(guest.init().major, 7);
    let entry = guest.lookup(b"hello");
    assert_eq!((entry.attr.size, entry.attr.mode & libc::S_IFMT), (8, libc::S_IFREG));
    assert_eq!((entry.entry_valid, entry.attr_valid), (1, 1));
    let (error, answer) = guest.request(Opcode::Getattr, entry.nodeid, 0, &[&[0; 16]]);
    assert_eq!((error, object::<AttrOut>(&answer).attr.ino), (0, entry.attr.ino));

    let fh = guest.open(entry.nodeid, libc::O_RDWR);
    let write = WriteIn { fh, offset: 4, size: 3, ..WriteIn::default() };
    let (error, answer) = guest.request(Opcode::Write, entry.nodeid, 0, &[write.as_slice(), b"ACT"]);
    assert_eq!((error, object::<WriteOut>(&answer).size), (0, 3));
    let read = ReadIn { fh, offset: 2, size: 100, ..ReadIn::default() };
    assert_eq!(guest.request(Opcode::Read, entry.nodeid, 0, &[read.as_slice()]), (0, b"ntACTs".to_vec()));
    assert_eq!(std::fs::read(guest.path().join("hello")).unwrap(), b"contACTs");

    assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[b"missing\0"]).0, libc::ENOENT);
    for escape in [&b"../etc\0"[..], b"/etc\0", b"a/b\0"] {
        assert_ne!(guest.request(Opcode::Lookup, ROOT, 0, &[escape]).0, 0);
    }
}

#[test]
fn a_write_by_others_clears_set_user_id() {
    let mut guest = guest();
    let path = guest.path().join("suid");
    std::fs::write(&path, "x").unwrap();
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4777)).unwrap();
    const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    assert_ne!(guest.init().flags & HANDLE_KILLPRIV_V2, 0);
    let entry = guest.lookup(b"suid");
    let fh = guest.open(entry.nodeid, libc::O_RDWR);
    const WRITE_KILL_PRIV: u32 = 1 << 2;
    for (write_flags, expected) in [(0, 0o4777), (WRITE_KILL_PRIV, 0o777)] {
        let write = WriteIn { fh, size: 1, write_flags, ..WriteIn::default() };
        assert_eq!(guest.request(Opcode::Write, entry.nodeid, 0, &[write.as_slice(), b"y"]).0, 0);
        assert_eq!(mode(), expected, "flags {write_flags}");
    }
}

/// virtiofsd's way to drop a capability works in a thread that sees no /proc.
#[test]
fn capabilities_are_dropped_without_proc() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().to_owned();
    let fsetid = || {
        let (mut header, mut sets) = ([0x2008_0522_u32, 0], [0_u32; 6]);
        // SAFETY: as in `know_capabilities`.
        assert_eq!(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) }, 0);
        sets[0] & 1 << 4 != 0
    };
    let jailed = thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        nix::unistd::chroot(&path).unwrap();
        nix::unistd::chdir("/").unwrap();
        threads::know_capabilities().unwrap();
        let before = fsetid();
        let dropped = passthrough::credentials::drop_effective_cap("FSETID").unwrap();
        let within = fsetid();
        drop(dropped);
        (before, within, fsetid())
    });
    assert_eq!(jailed.join().unwrap(), (true, false, true));
}

#[test]
fn files_belong_to_whoever_makes_them() {
    use std::os::unix::fs::MetadataExt;
    let mut guest = guest();
    guest.init();
    std::fs::set_permissions(guest.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    // struct fuse_mkdir_in: mode, umask.
    let (error, _) =
        guest.request(Opcode::Mkdir, ROOT, 1234, &[&0o755_u32.to_le_bytes(), &[0; 4], b"mine\0"]);
    let metadata = std::fs::metadata(guest.path().join("mine")).unwrap();
    assert_eq!((error, metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (0, 1234, 1234, 0o755));
}

#[test]
fn what_programs_do_with_files_is_served() {
    let mut guest = guest();
    guest.init();
    std::fs::set_permissions(guest.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let mut ok = |opcode, node, uid, payload: &[&[u8]]| {
        let (error, answer) = guest.request(opcode, node, uid, payload);
        assert_eq!(error, 0, "{opcode:?}: {}", io::Error::from_raw_os_error(error));
        answer
    };
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();

    // A file, by somebody who is not root. struct fuse_create_in: flags, mode, umask, open_flags.
    let create = words(&[libc::O_RDWR as u32, 0o644, 0, 0]);
    let created = ok(Opcode::Create, ROOT, 1234, &[&create, b"file\0"]);
    let file = object::<EntryOut>(&created).nodeid;
    let fh = object::<OpenOut>(&created[size_of::<EntryOut>()..]).fh;
    ok(Opcode::Write, file, 1234, &[WriteIn { fh, size: 5, ..WriteIn::default() }.as_slice(), b"bytes"]);
    ok(Opcode::Fallocate, file, 0, &[&longs(&[fh, 0, 8192]), &[0; 8]]);
    ok(Opcode::Lseek, file, 0, &[&longs(&[fh, 0]), &words(&[libc::SEEK_HOLE as u32, 0])]);
    ok(Opcode::CopyFileRange, file, 0, &[&longs(&[fh, 0, file, fh, 4096, 5, 0])]);
    ok(Opcode::Flush, file, 0, &[&longs(&[fh, 0, 0])]);
    ok(Opcode::Fsync, file, 0, &[&longs(&[fh, 0])]);
    ok(Opcode::Syncfs, ROOT, 0, &[&[0; 8]]);
    ok(Opcode::Statfs, ROOT, 0, &[]);
    ok(Opcode::Access, file, 1234, &[&words(&[libc::R_OK as u32, 0])]);

    // chmod, chown, truncate, utimes (FATTR_MODE, UID, GID, SIZE, ATIME, MTIME_NOW).
    let set = SetattrIn {
        valid: 0x11f,
        mode: 0o2750,
        uid: 7.into(),
        gid: 8.into(),
        size: 3,
        ..SetattrIn::default()
    };
    let attr = object::<AttrOut>(&ok(Opcode::Setattr, file, 0, &[set.as_slice()])).attr;
    assert_eq!(
        (attr.mode & 0o7777, attr.size),
        (0o750, 3),
        "chown clears set-group-ID where the group can execute"
    );
    let set = SetattrIn { valid: 1, mode: 0o2750, ..SetattrIn::default() };
    let attr = object::<AttrOut>(&ok(Opcode::Setattr, file, 0, &[set.as_slice()])).attr;
    assert_eq!(attr.mode & 0o7777, 0o2750);

    // Extended attributes: size, flags, further flags, padding; size, padding.
    ok(Opcode::Setxattr, file, 0, &[&words(&[5, 0, 0, 0]), b"user.name\0value"]);
    assert_eq!(ok(Opcode::Getxattr, file, 0, &[&words(&[64, 0]), b"user.name\0"]), b"value");
    assert_eq!(ok(Opcode::Listxattr, file, 0, &[&words(&[64, 0])]), b"user.name\0");
    ok(Opcode::Removexattr, file, 0, &[b"user.name\0"]);

    // Names.
    ok(Opcode::Mkdir, ROOT, 1234, &[&words(&[0o755, 0]), b"dir\0"]);
    let dir = object::<EntryOut>(&ok(Opcode::Lookup, ROOT, 0, &[b"dir\0"])).nodeid;
    ok(Opcode::Mknod, dir, 0, &[&words(&[libc::S_IFIFO | 0o600, 0, 0, 0]), b"fifo\0"]);
    let link = object::<EntryOut>(&ok(Opcode::Symlink, dir, 1234, &[b"link\0target\0"])).nodeid;
    assert_eq!(ok(Opcode::Readlink, link, 0, &[]), b"target");
    ok(Opcode::Link, dir, 0, &[&longs(&[file]), b"second\0"]);
    ok(Opcode::Rename, dir, 0, &[&longs(&[ROOT]), b"second\0third\0"]);
    let no_replace = words(&[libc::RENAME_NOREPLACE, 0]);
    ok(Opcode::Rename2, ROOT, 0, &[&longs(&[dir]), &no_replace, b"third\0fourth\0"]);
    let open = ok(Opcode::Opendir, dir, 0, &[&[0; 8]]);
    let read = ReadIn { fh: object::<OpenOut>(&open).fh, size: 8192, ..ReadIn::default() };
    let entries = ok(Opcode::Readdirplus, dir, 0, &[read.as_slice()]);
    for name in ["fifo", "link", "fourth"] {
        assert!(entries.windows(name.len()).any(|window| window == name.as_bytes()), "{name}");
    }
    ok(Opcode::Readdir, dir, 0, &[read.as_slice()]);
    ok(Opcode::Releasedir, dir, 0, &[&longs(&[read.fh, 0, 0])]);
    ok(Opcode::Unlink, dir, 0, &[b"fifo\0"]);
    ok(Opcode::Release, file, 0, &[&longs(&[fh, 0, 0])]);
    assert_eq!(guest.request(Opcode::Rmdir, ROOT, 0, &[b"dir\0"]).0, libc::ENOTEMPTY);
}

/// Has every open of the file for writing block until the lease is given back.
fn lease(path: &Path) -> File {
    // SAFETY: the signal that asks for the lease is ignored; no handler runs.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let file = File::open(path).unwrap();
    // SAFETY: the call takes integers.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    file
}

#[test]
fn a_request_that_blocks_holds_up_no_other() {
    let mut guest = guest();
    let path = guest.path().join("leased");
    std::fs::write(&path, "x").unwrap();
    guest.init();
    let node = guest.lookup(b"leased").nodeid;
    let leased = lease(&path);
    let blocked = guest.send(Opcode::Open, node, 0, &[&libc::O_RDWR.to_le_bytes(), &[0; 4]]);
    for _ in 0..200 {
        assert_eq!(guest.request(Opcode::Getattr, ROOT, 0, &[&[0; 16]]).0, 0);
    }
    drop(leased);
    assert_eq!(guest.answer(blocked).0, 0);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut guest = guest();
    guest.init();
    for _ in 0..50 {
        let mut heads: Vec<u16> =
            (0..30).map(|_| guest.send(Opcode::Getattr, ROOT, 0, &[&[0; 16]])).collect();
        let mut answered: Vec<u16> = (0..30).map(|_| guest.wait(REQUESTS).0).collect();
        heads.sort_unstable();
        answered.sort_unstable();
        assert_eq!(heads, answered);
    }
}

#[test]
fn malformed_requests_come_back() {
    let mut guest = guest();
    for queue in [HIGH_PRIORITY, REQUESTS] {
        // The threads answer in any order.
        let count = guest.bench.rings[queue].write_hostile();
        guest.bench.rings[queue].kick.write(1).unwrap();
        let mut heads: Vec<_> = (0..count).map(|_| guest.wait(queue)).collect();
        heads.sort_unstable();
        let expected: Vec<_> = (0..count as u16).map(|index| (4 * index, 0)).collect();
        assert_eq!(heads, expected);
    }
    // Short headers, names without an end, lengths that lie, no room for an answer.
    let header =
        |len: u32| InHeader { len, opcode: Opcode::Lookup as u32, nodeid: ROOT, ..InHeader::default() };
    for (length, size) in [(0, 40), (39, 39), (45, 45), (u32::MAX, 60), (1 << 20, 60)] {
        let at = guest.bench.data(&[header(length).as_slice(), &[b'x'; 20]].concat());
        for room in [0, 15, 16] {
            let pieces = [(at, size, READ), (0x10_0000, room, WRITE)];
            guest.bench.rings[REQUESTS].chain(0, &pieces);
            guest.bench.rings[REQUESTS].publish(0);
            guest.bench.kick(REQUESTS);
            assert_eq!(guest.wait(REQUESTS).0, 0);
        }
    }
    assert_eq!(guest.init().major, 7);
    let beyond = (MEMORY as u64, 64, READ);
    guest.bench.rings[REQUESTS].chain(0, &[beyond]);
    guest.bench.rings[REQUESTS].publish(0);
    guest.bench.kick(REQUESTS);
    assert_eq!(guest.wait(REQUESTS), (0, 0));
}

#[test]
fn a_reset_waits_for_requests_and_forgets_files() {
    let mut guest = guest();
    let path = guest.path().join("leased");
    std::fs::write(&path, "x").unwrap();
    guest.init();
    let node = guest.lookup(b"leased").nodeid;
    assert!(is_open(&path));
    let leased = lease(&path);
    guest.send(Opcode::Open, node, 0, &[&libc::O_RDWR.to_le_bytes(), &[0; 4]]);
    let start = Instant::now();
    while lock(&guest.bench.device().shared.state).in_flight == 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    let releaser = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(leased);
    });
    guest.bench.device().reset();
    assert!(releaser.is_finished() || start.elapsed() >= Duration::from_millis(300));
    releaser.join().unwrap();
    assert_eq!(guest.bench.used(REQUESTS), None);
    assert!(!is_open(&path));
    guest.bench.activate(0);
    guest.next = 0;
    assert_eq!(guest.init().major, 7);
    guest.lookup(b"leased");
}

/// Whether a descriptor of this process refers to `path`.
fn is_open(path: &Path) -> bool {
    let mut entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    entries.any(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == path))
}

#[test]
fn threads_end_with_the_device() {
    let fs = guest();
    let shared = Arc::downgrade(&fs.bench.device().shared);
    drop(fs);
    let start = Instant::now();
    while shared.strong_count() > 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
}
