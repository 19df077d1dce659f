//! What the library does differently or not at all.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use virtiofsd::fuse::{CreateIn, IoctlIn, IoctlOut};

use super::*;
use crate::virtio::testing::small_file_system;

const STATX: u32 = 52;

impl Guest {
    fn make_unnamed(&mut self, uid: u32, flags: i32, mode: u32) -> (EntryOut, u64) {
        let flags = (flags | libc::O_TMPFILE).cast_unsigned();
        let create = CreateIn { flags, mode: libc::S_IFREG | mode, umask: 0o022, open_flags: 0 };
        let (error, answer) = self.request(Opcode::TmpFile, ROOT, uid, &[create.as_slice(), b"/\0"]);
        assert_eq!(error, 0, "{}", io::Error::from_raw_os_error(error));
        (object(&answer), object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh)
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, flags: i32, data: &[u8]) -> Result<u32, i32> {
        let size = data.len() as u32;
        let write = WriteIn { fh, offset, size, flags: flags.cast_unsigned(), ..WriteIn::default() };
        match self.request(Opcode::Write, node, 0, &[write.as_slice(), data]) {
            (0, answer) => Ok(object::<WriteOut>(&answer).size),
            (error, _) => Err(error),
        }
    }

    fn read(&mut self, node: u64, fh: u64) -> Vec<u8> {
        let read = ReadIn { fh, size: 4096, ..ReadIn::default() };
        self.request(Opcode::Read, node, 0, &[read.as_slice()]).1
    }

    fn ioctl(&mut self, node: u64, fh: u64, cmd: u32, input: &[u8], out_size: u32) -> Answer {
        let ioctl = IoctlIn { fh, cmd, in_size: input.len() as u32, out_size, ..IoctlIn::default() };
        let (error, answer) = self.request(Opcode::Ioctl, node, 0, &[ioctl.as_slice(), input]);
        (error, answer.get(size_of::<IoctlOut>()..).unwrap_or_default().to_vec())
    }
}

/// A guest whose share is a file system of its own.
pub fn guest_with_pages(pages: usize) -> Guest {
    guest_of(small_file_system(pages), 10_000)
}

#[test]
fn a_write_that_fills_the_disk_says_how_much_it_wrote() {
    let mut guest = guest_with_pages(4);
    guest.init();
    std::fs::write(guest.path().join("file"), [1; 3000]).unwrap();
    let node = guest.lookup(b"file").nodeid;
    let fh = guest.open(node, libc::O_RDWR);
    let written = guest.write(node, fh, 0, libc::O_APPEND, &[2; 20_000]);
    assert_eq!(written, Ok(4 * 4096 - 3000));
    assert_eq!(guest.path().join("file").metadata().unwrap().len(), 4 * 4096);
    assert_eq!(guest.write(node, fh, 0, libc::O_APPEND, b"x"), Err(libc::ENOSPC));
    assert_eq!(guest.write(node, fh, 0, 0, b"x"), Ok(1));
}

#[test]
fn writes_are_as_long_as_they_say() {
    let mut guest = guest();
    guest.init();
    std::fs::write(guest.path().join("file"), "").unwrap();
    let node = guest.lookup(b"file").nodeid;
    let fh = guest.open(node, libc::O_RDWR);
    let mut write = |offset, size| {
        let write = WriteIn { fh, offset, size, ..WriteIn::default() };
        let (error, answer) = guest.request(Opcode::Write, node, 0, &[write.as_slice(), b"data"]);
        if error == 0 { Ok(object::<WriteOut>(&answer).size) } else { Err(error) }
    };
    assert_eq!(write(0, 2), Ok(2));
    for (offset, size) in [(0, 5), (0, u32::MAX), (u64::MAX, 4), (1 << 63, 1), (i64::MAX as u64, 1)] {
        assert_eq!(write(offset, size), Err(libc::EINVAL), "{size} at {offset}");
    }
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), b"da");
}

#[test]
fn a_file_without_a_name_can_get_one() {
    let mut guest = guest();
    guest.init();
    let (entry, fh) = guest.make_unnamed(1234, libc::O_RDWR, 0o4666);
    let file = entry.nodeid;
    assert_eq!((entry.attr.nlink, entry.attr.mode & 0o7777), (0, 0o4644));
    assert_eq!((entry.attr.uid, entry.attr.gid), (1234.into(), 1234.into()));
    assert_eq!(guest.path().read_dir().unwrap().count(), 0);
    assert_eq!(guest.write(file, fh, 0, 0, b"contents"), Ok(8));
    assert_eq!(guest.write(file, fh, 0, libc::O_APPEND, b"!"), Ok(1));
    let set = SetattrIn { valid: 1 | 8, mode: 0o640, size: 9, ..SetattrIn::default() };
    let (error, answer) = guest.request(Opcode::Setattr, file, 0, &[set.as_slice()]);
    let attr = object::<AttrOut>(&answer).attr;
    assert_eq!((error, attr.mode & 0o7777, attr.size), (0, 0o640, 9));
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let set = [&words(&[5, 0, 0, 0])[..], b"user.name\0value"];
    assert_eq!(guest.request(Opcode::Setxattr, file, 0, &set).0, 0);
    assert_eq!(guest.request(Opcode::Listxattr, file, 0, &[&words(&[64, 0])]), (0, b"user.name\0".to_vec()));
    let get = [&words(&[64, 0])[..], b"user.name\0"];
    assert_eq!(guest.request(Opcode::Getxattr, file, 0, &get), (0, b"value".to_vec()));
    assert_eq!(guest.request(Opcode::Removexattr, file, 0, &[b"user.name\0"]).0, 0);
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
    assert_eq!(guest.request(Opcode::Fsync, file, 0, &[&longs(&[fh, 1])]).0, 0);
    assert_eq!(guest.request(Opcode::Fallocate, file, 0, &[&longs(&[fh, 0, 9, 0])]).0, 0);
    let seek = words(&[libc::SEEK_HOLE as u32, 0]);
    assert_eq!(guest.request(Opcode::Lseek, file, 0, &[&longs(&[fh, 0]), &seek]), (0, longs(&[9])));
    let copy = longs(&[fh, 0, file, fh, 4096, 5, 0]);
    assert_eq!(guest.request(Opcode::CopyFileRange, file, 0, &[&copy]).0, libc::EXDEV);

    // Opened again, and given a name.
    let again = guest.open(file, libc::O_RDONLY);
    assert_eq!(guest.read(file, again), b"contents!");
    assert_eq!(guest.write(file, again, 0, 0, b"x"), Err(libc::EBADF));
    assert_eq!(guest.request(Opcode::Link, ROOT, 0, &[&longs(&[file]), b"../name\0"]).0, libc::EINVAL);
    let (error, answer) = guest.request(Opcode::Link, ROOT, 0, &[&longs(&[file]), b"name\0"]);
    assert_eq!((error, object::<EntryOut>(&answer).attr.nlink), (0, 1));
    assert_eq!(std::fs::read(guest.path().join("name")).unwrap(), b"contents!");

    // And forgotten.
    for handle in [fh, again] {
        assert_eq!(guest.request(Opcode::Flush, file, 0, &[&longs(&[handle, 0, 0])]).0, 0);
        assert_eq!(guest.request(Opcode::Release, file, 0, &[&longs(&[handle, 0, 0])]).0, 0);
        assert_eq!(guest.request(Opcode::Flush, file, 0, &[&longs(&[handle, 0, 0])]).0, libc::EBADF);
    }
    guest.send(Opcode::Forget, file, 0, &[&longs(&[1])]);
    guest.wait(REQUESTS);
    assert_eq!(guest.request(Opcode::Getattr, file, 0, &[&[0; 16]]).0, libc::EBADF);
}

#[test]
fn files_without_a_name_have_a_limit() {
    let mut guest = guest();
    guest.init();
    for _ in 0..512 {
        guest.make_unnamed(0, libc::O_WRONLY, 0o600);
    }
    let create = CreateIn { flags: libc::O_RDWR.cast_unsigned(), ..CreateIn::default() };
    let (error, _) = guest.request(Opcode::TmpFile, ROOT, 0, &[create.as_slice(), b"/\0"]);
    assert_eq!(error, libc::ENFILE);
    guest.bench.device().reset();
    guest.bench.activate(0);
    guest.next = 0;
    guest.init();
    guest.make_unnamed(0, libc::O_WRONLY, 0o600);
}

/// Offsets in `struct fuse_statx_out`, behind the 32 bytes of its head.
#[test]
fn files_have_a_time_of_birth() {
    let mut guest = guest();
    let path = guest.path().join("file");
    std::fs::write(&path, "contents").unwrap();
    std::os::unix::fs::symlink("file", guest.path().join("link")).unwrap();
    guest.init();
    let (file, link) = (guest.lookup(b"file").nodeid, guest.lookup(b"link").nodeid);
    let fh = guest.open(file, libc::O_RDONLY);
    let by_handle = [&1_u64.to_le_bytes()[..], &fh.to_le_bytes(), &[0; 8]].concat();
    let metadata = path.metadata().unwrap();
    let born = metadata.created().ok().map(|time| time.duration_since(std::time::UNIX_EPOCH).unwrap());
    for (node, request, birth) in
        [(file, vec![0; 24], true), (file, by_handle, true), (link, vec![0; 24], false)]
    {
        let head = guest.send_number(STATX, node, 0, &[&request]);
        let (error, answer) = guest.answer(head);
        assert_eq!((error, answer.len()), (0, 288));
        let word = |at: usize| u32::from_le_bytes(answer[32 + at..][..4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(answer[32 + at..][..8].try_into().unwrap());
        assert_eq!((answer[0], word(0) & libc::STATX_BASIC_STATS), (1, libc::STATX_BASIC_STATS));
        let reported = (word(0) & libc::STATX_BTIME != 0).then(|| Duration::new(long(80), word(88)));
        assert_eq!(reported, born.filter(|_| birth));
        if node == file {
            assert_eq!((long(32), long(40), word(16)), (metadata.ino(), 8, 1));
            assert_eq!((word(28) & 0xffff, long(112)), (metadata.mode(), metadata.mtime() as u64));
        }
    }
    let head = guest.send_number(STATX, 12345, 0, &[&[0; 24]]);
    assert_eq!(guest.answer(head).0, libc::EBADF);
    let head = guest.send_number(STATX, file, 0, &[&[0; 23]]);
    assert_ne!(guest.answer(head).0, 0);
}

/// Past the test runner, for tests/all to count.
fn say_skipped(why: &str) {
    let thread = thread::current();
    let _ = writeln!(io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}

#[test]
fn flags_of_inodes_are_the_hosts() {
    let mut guest = guest();
    let path = guest.path().join("file");
    std::fs::write(&path, "").unwrap();
    guest.init();
    let node = guest.lookup(b"file").nodeid;
    let fh = guest.open(node, libc::O_RDONLY);
    let (get, set, no_dump) = (0x8008_6601, 0x4008_6602, 0x40_u32);
    let (error, before) = guest.ioctl(node, fh, get, &[], 4);
    if error == libc::ENOTTY {
        return say_skipped("this file system has no flags");
    }
    assert_eq!((error, before.len()), (0, 4));
    let flags = u32::from_le_bytes(before.try_into().unwrap()) | no_dump;
    assert_eq!(guest.ioctl(node, fh, set, &flags.to_le_bytes(), 0), (0, Vec::new()));
    assert_eq!(guest.ioctl(node, fh, get, &[], 4), (0, flags.to_le_bytes().to_vec()));
    // FS_IOC_GETVERSION, which some have and some have not.
    let (mut version, version_of) = (0_i64, 0x8008_7601);
    // SAFETY: the kernel writes an int, of a long that is there.
    let direct = unsafe { libc::ioctl(File::open(&path).unwrap().as_raw_fd(), version_of, &raw mut version) };
    let expected =
        if direct == 0 { (0, version.to_le_bytes()[..4].to_vec()) } else { (libc::ENOTTY, Vec::new()) };
    assert_eq!(guest.ioctl(node, fh, 0x8008_7601, &[], 8), expected);
    // All others, too little room, and a handle that is not there.
    for (fh, request, input, room) in
        [(fh, 0x5401, &[][..], 64), (fh, get, &[], 3), (fh, set, &[0; 3], 0), (12345, get, &[], 4)]
    {
        let error = guest.ioctl(node, fh, request, input, room).0;
        assert_eq!(error, if fh == 12345 { libc::EBADF } else { libc::ENOTTY });
    }
}

#[test]
fn replays_do_none_of_it() {
    let mut guest = guest();
    std::fs::write(guest.path().join("file"), "x").unwrap();
    guest.init();
    let node = guest.lookup(b"file").nodeid;
    let replay = katana_protocol::REPLAY_GID;
    let create = CreateIn { flags: libc::O_RDWR.cast_unsigned(), ..CreateIn::default() };
    assert_ne!(guest.request(Opcode::TmpFile, ROOT, replay, &[create.as_slice(), b"/\0"]).0, 0);
    let fh = guest.open(node, libc::O_RDWR);
    let write = WriteIn { fh, size: 1, ..WriteIn::default() };
    assert_eq!(guest.request(Opcode::Write, node, replay, &[write.as_slice(), b"y"]).0, libc::EPERM);
    // With the link that is to be taken away, and looked up again at the next use.
    let head = guest.send_number(STATX, node, replay, &[&[0; 24]]);
    let (error, answer) = guest.answer(head);
    assert_eq!((error, &answer[..16], answer[32 + 16]), (0, &[0; 16][..], 2));
}

/// What is in a field that the library passes on as it is.
#[test]
fn requests_that_linux_does_not_make_get_an_error() {
    let mut guest = guest();
    std::fs::create_dir(guest.path().join("inside")).unwrap();
    std::fs::write(guest.path().join("inside/file"), "contents").unwrap();
    guest.init();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
    let inside = guest.lookup(b"inside").nodeid;
    let (error, answer) = guest.request(Opcode::Lookup, inside, 0, &[b"file\0"]);
    assert_eq!(error, 0);
    let file = object::<EntryOut>(&answer).nodeid;
    let fh = guest.open(file, libc::O_RDWR);

    let create = CreateIn { flags: libc::O_RDWR.cast_unsigned(), mode: 0o600, ..CreateIn::default() };
    let (file_number, inside_number) = (file.to_le_bytes(), inside.to_le_bytes());
    for bad in [&b"../made\0"[..], b"/tmp/made\0", b"x/made\0", b"..\0", b".\0", b"\0"] {
        let requests: [(Opcode, Vec<&[u8]>); 9] = [
            (Opcode::Lookup, vec![bad]),
            (Opcode::Symlink, vec![bad, b"anything\0"]),
            (Opcode::Mknod, vec![&[0; 16], bad]),
            (Opcode::Mkdir, vec![&[0; 8], bad]),
            (Opcode::Unlink, vec![bad]),
            (Opcode::Rmdir, vec![bad]),
            (Opcode::Link, vec![&file_number[..], bad]),
            (Opcode::Create, vec![create.as_slice(), bad]),
            (Opcode::Rename, vec![&inside_number[..], b"file\0", bad]),
        ];
        for (opcode, payload) in requests {
            assert_eq!(guest.request(opcode, inside, 0, &payload).0, libc::EINVAL, "{opcode:?} {bad:?}");
        }
        let rename = [&longs(&[inside, 0])[..], bad, b"name\0"];
        assert_eq!(guest.request(Opcode::Rename2, inside, 0, &rename).0, libc::EINVAL);
    }
    assert_eq!(guest.path().read_dir().unwrap().count(), 1);

    const BEYOND: u64 = 1 << 63;
    let read = |offset, size| ReadIn { fh, offset, size, ..ReadIn::default() };
    for (offset, size) in [(BEYOND, 1), (u64::MAX, 1), (BEYOND - 1, 8), (0, (1 << 20) + 1), (0, u32::MAX)] {
        let (error, _) = guest.request(Opcode::Read, file, 0, &[read(offset, size).as_slice()]);
        assert_eq!(error, libc::EINVAL, "{size} at {offset:#x}");
    }
    let size = SetattrIn { valid: 8, size: BEYOND, ..SetattrIn::default() };
    let others: [(Opcode, Vec<u8>, i32); 10] = [
        (Opcode::Setattr, size.as_slice().to_vec(), libc::EINVAL),
        (Opcode::Lseek, [longs(&[fh, 0]), words(&[0, 0])].concat(), libc::EINVAL),
        (Opcode::Lseek, [longs(&[fh, BEYOND]), words(&[3, 0])].concat(), libc::EINVAL),
        (Opcode::Fallocate, [longs(&[fh, BEYOND, 1]), words(&[0, 0])].concat(), libc::EINVAL),
        (Opcode::Fallocate, [longs(&[fh, 0, 4096]), words(&[8, 0])].concat(), libc::EOPNOTSUPP),
        (Opcode::CopyFileRange, longs(&[fh, BEYOND, file, fh, 0, 1, 0]), libc::EINVAL),
        (Opcode::CopyFileRange, longs(&[fh, 0, file, fh, 0, 1, 1]), libc::EINVAL),
        (Opcode::CopyFileRange, longs(&[fh, 0, 999, fh, 0, 1, 0]), libc::EBADF),
        (Opcode::Setxattr, [words(&[9, 0, 0, 0]), b"user.x\0value".to_vec()].concat(), libc::EINVAL),
        (Opcode::Setxattr, [words(&[5, 4, 0, 0]), b"user.x\0value".to_vec()].concat(), libc::EINVAL),
    ];
    for (opcode, payload, expected) in others {
        assert_eq!(guest.request(opcode, file, 0, &[&payload]).0, expected, "{opcode:?}");
    }
    // What the library makes no sense of is refused like all else.
    for payload in [&b""[..], b"no end", b"an end\0 and more\0"] {
        assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[payload]).0, libc::EINVAL);
    }
    assert_eq!(std::fs::read(guest.path().join("inside/file")).unwrap(), b"contents");
    let (error, answer) = guest.request(Opcode::Read, file, 0, &[read(0, 100).as_slice()]);
    assert_eq!((error, &answer[..]), (0, &b"contents"[..]));
}

#[test]
fn there_is_always_room_for_the_header_of_an_answer_and_never_for_more_than_the_longest() {
    let mut guest = guest();
    guest.init();
    let directory = guest.open(ROOT, libc::O_RDONLY | libc::O_DIRECTORY);
    let read = ReadIn { fh: directory, size: 8, ..ReadIn::default() };
    let header = |opcode: u32, payload: &[u8]| {
        let len = (size_of::<InHeader>() + payload.len()) as u32;
        let header = InHeader { len, opcode, nodeid: ROOT, ..InHeader::default() };
        [header.as_slice(), payload].concat()
    };
    // Every request there is, and READ and READDIR in particular.
    for opcode in 0..64 {
        let at = guest.bench.data(&header(opcode, &[read.as_slice(), &[0; 64]].concat()));
        for room in [0, 1, 15] {
            let length = (size_of::<InHeader>() + size_of::<ReadIn>() + 64) as u32;
            let mut pieces = vec![(at, length, READ)];
            pieces.extend((room > 0).then_some((0x10_0000, room, WRITE)));
            for queue in [HIGH_PRIORITY, REQUESTS] {
                guest.bench.rings[queue].chain(0, &pieces);
                guest.bench.rings[queue].publish(0);
                guest.bench.kick(queue);
                assert_eq!(guest.wait(queue), (0, 0), "{opcode} {room}");
            }
        }
    }
    // More than any transfer has, in memory that is there many times.
    for flags in [READ, WRITE] {
        let at = guest.bench.data(&header(Opcode::Statfs as u32, &[]));
        let mut pieces = vec![(at, size_of::<InHeader>() as u32, READ)];
        pieces.extend([(0x10_0000, 0x1_0000, flags); 17]);
        pieces.push((0x30_0000, 4096, WRITE));
        guest.bench.rings[REQUESTS].chain(0, &pieces);
        guest.bench.rings[REQUESTS].publish(0);
        guest.bench.kick(REQUESTS);
        assert_eq!(guest.wait(REQUESTS), (0, size_of::<OutHeader>() as u32));
    }
    assert_eq!(guest.init().major, 7);
}

/// Linux has no room for an answer to these.
#[test]
fn what_is_forgotten_without_room_for_an_answer_is_forgotten() {
    let mut guest = guest();
    guest.init();
    for (opcode, payload) in [(Opcode::Forget, 1_u64.to_le_bytes().to_vec()), (Opcode::BatchForget, vec![])] {
        let path = guest.path().join("file");
        std::fs::write(&path, "").unwrap();
        let nodeid = guest.lookup(b"file").nodeid;
        assert!(is_open(&path));
        let one = [nodeid.to_le_bytes(), 1_u64.to_le_bytes()].concat();
        let batch = [&1_u32.to_le_bytes()[..], &[0; 4], &one].concat();
        let payload = if payload.is_empty() { batch } else { payload };
        let len = (size_of::<InHeader>() + payload.len()) as u32;
        let header = InHeader { len, opcode: opcode as u32, nodeid, ..InHeader::default() };
        let at = guest.bench.data(&[header.as_slice(), &payload].concat());
        guest.bench.rings[HIGH_PRIORITY].chain(0, &[(at, len, READ)]);
        guest.bench.rings[HIGH_PRIORITY].publish(0);
        guest.bench.kick(HIGH_PRIORITY);
        assert_eq!(guest.wait(HIGH_PRIORITY), (0, 0));
        assert!(!is_open(&path), "{opcode:?}");
    }
}

/// As one that a server who is gone does not answer: the open of a file on which somebody has a lease.
#[test]
fn requests_that_the_host_does_not_answer_hold_up_no_others() {
    const WAITING: usize = 10;
    let mut guest = guest();
    guest.init();
    let lease = |file: &File, kind: libc::c_int| {
        // SAFETY: neither command takes a pointer. The signal that comes when somebody opens the file is ignored.
        let set = unsafe {
            libc::fcntl(file.as_raw_fd(), 10 /* F_SETSIG */, libc::SIGURG) == 0
                && libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) == 0
        };
        assert!(set, "{}", io::Error::last_os_error());
    };
    let mut leased = Vec::new();
    let mut heads = Vec::new();
    for number in 0..WAITING {
        let name = format!("leased{number}");
        let file = File::create(guest.path().join(&name)).unwrap();
        lease(&file, libc::F_WRLCK);
        leased.push(file);
        let node = guest.lookup(name.as_bytes()).nodeid;
        heads.push(guest.send(Opcode::Open, node, 0, &[&libc::O_RDWR.to_le_bytes(), &[0; 4]]));
        // Whoever else asks is answered.
        assert_eq!(guest.request(Opcode::Getattr, ROOT, 0, &[&[0; 16]]).0, 0);
    }
    for file in &leased {
        lease(file, libc::F_UNLCK);
    }
    let mut answered: Vec<_> = heads.iter().map(|_| guest.wait(REQUESTS).0).collect();
    answered.sort_unstable();
    assert_eq!(answered, heads);
}
