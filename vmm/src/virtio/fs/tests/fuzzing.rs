//! A guest's kernel that asks for anything.
//!
//! Requests look like those of Linux, with fields that are edges, or of another request; whole ones are bytes at
//! random. The share is a directory of a small file system, and beside it lies what nobody may reach.

use katana_fuzz::{Input, fuzz};
use katana_protocol::{REPLAY_GID, REPLAY_LEARN, REPLAY_SOURCE};

use super::*;
use crate::virtio::testing::small_file_system;

/// Of the file system, in pages.
const PAGES: usize = 2048;
/// Descriptors that the guest's files may take.
const DESCRIPTORS: u64 = 200;
/// The last request that there is is FUSE_STATX; those of virtio-fs are beyond.
const OPCODES: usize = 56;
const NAMES: [&[u8]; 16] = [
    b"file",
    b"directory",
    b"link",
    b"fifo",
    b"new",
    b"",
    b".",
    b"..",
    b"/",
    b"../secret",
    b"directory/file",
    b"/etc/passwd",
    b"user.x",
    b"system.posix_acl_access",
    b"security.capability",
    b"\xff\x01",
];

/// Nodes and handles that the guest has seen in answers.
struct Seen {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Seen {
    fn node(&self, input: &mut Input<'_>) -> u64 {
        match input.below(16) {
            0 => input.edge(),
            // Those that the layers above the library have made up.
            1 => 1 << 63 | 1,
            2 => (1 << 62) + input.below(4) as u64,
            _ => input.one_of(&self.nodes),
        }
    }

    fn handle(&self, input: &mut Input<'_>) -> u64 {
        if input.once_in(16) { input.edge() } else { input.one_of(&self.handles) }
    }

    /// The fields of a request, and what comes behind them.
    fn payload(&self, opcode: u32, input: &mut Input<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in shape(opcode).bytes() {
            match field {
                b'h' => bytes.extend(self.handle(input).to_le_bytes()),
                b'n' => bytes.extend(self.node(input).to_le_bytes()),
                b'8' => bytes.extend(input.edge().to_le_bytes()),
                b'4' => bytes.extend((input.edge() as u32).to_le_bytes()),
                // A size, mostly one that there is room for.
                b's' => {
                    bytes.extend((if input.once_in(4) { input.edge() as u32 } else { 4096 }).to_le_bytes());
                }
                b'f' => bytes.extend((input.u32() & 0o7777).to_le_bytes()),
                b'0' => bytes.extend([0; 4]),
                b'a' => bytes.extend(name(input)),
                _ => bytes.extend(input.bytes(32)),
            }
        }
        bytes
    }

    /// Remembers numbers of an answer.
    fn learn(&mut self, opcode: u32, answer: &[u8]) {
        let number = |at: usize| answer.get(at..at + 8).map(|n| u64::from_le_bytes(n.try_into().unwrap()));
        let entry = [1, 6, 8, 9, 13, 35, 51].contains(&opcode);
        let open = match opcode {
            14 | 27 => number(0),
            35 | 51 => number(size_of::<EntryOut>()),
            _ => None,
        };
        for (known, number) in [(&mut self.nodes, number(0).filter(|_| entry)), (&mut self.handles, open)] {
            if known.len() < 32 {
                known.extend(number);
            }
        }
    }
}

fn name(input: &mut Input<'_>) -> Vec<u8> {
    let mut name = match input.below(12) {
        0 => vec![b'x'; 250 + input.below(10)],
        1 => input.bytes(8).to_vec(),
        2 => REPLAY_LEARN.as_bytes().to_vec(),
        3 => REPLAY_SOURCE.as_bytes().to_vec(),
        _ => input.one_of(&NAMES).to_vec(),
    };
    if !input.once_in(32) {
        name.push(0);
    }
    name
}

/// The fields of a request, linux/fuse.h: handles, nodes, numbers, sizes, flags, names, and bytes of any kind.
fn shape(opcode: u32) -> &'static str {
    match opcode {
        // LOOKUP, UNLINK, RMDIR, REMOVEXATTR
        1 | 10 | 11 | 24 => "a",
        // FORGET, and BATCH_FORGET
        2 => "8",
        42 => "40n8n8n8",
        // GETATTR, STATX, SETATTR
        3 => "40h",
        52 => "40h44",
        4 => "40h8888888444440444",
        // SYMLINK, MKNOD, MKDIR, RENAME, RENAME2, LINK
        6 => "aa",
        8 => "4440a.",
        9 => "f4a.",
        12 => "naa",
        45 => "n40aa",
        13 => "na",
        // OPEN and OPENDIR; CREATE and TMPFILE
        14 | 27 => "f4",
        35 | 51 => "4ff0a.",
        // READ, READDIR and READDIRPLUS; WRITE
        15 | 28 | 44 => "h8s4840",
        16 => "h8s48400........",
        // RELEASE, FSYNC, FLUSH
        18 | 29 => "h448",
        20 | 30 => "h40",
        25 => "h408",
        // SETXATTR, GETXATTR, LISTXATTR, ACCESS, INIT
        21 => "s400a.",
        22 => "s0a",
        23 => "s0",
        34 => "40",
        26 => "4444....",
        // IOCTL, FALLOCATE, LSEEK, COPY_FILE_RANGE
        39 => "h448ss..",
        43 => "h8840",
        46 => "h840",
        47 => "h8nh888",
        _ => "...",
    }
}

fn step(guest: &mut Guest, seen: &mut Seen, input: &mut Input<'_>) {
    let opcode = if input.once_in(64) { input.u32() } else { input.below(OPCODES) as u32 };
    // Rarely, since all that the guest has seen is gone then.
    let destroys = opcode == Opcode::Destroy as u32;
    if destroys && !input.once_in(64) {
        return;
    }
    let payload = seen.payload(opcode, input);
    let length = (size_of::<InHeader>() + payload.len()) as u32;
    let id = input.one_of(&[0, 0, 0, 1000, REPLAY_GID, u32::MAX]);
    let header = InHeader {
        len: if input.once_in(32) { input.edge() as u32 } else { length },
        opcode,
        unique: 7,
        nodeid: seen.node(input),
        uid: if id == REPLAY_GID { 0 } else { id }.into(),
        gid: id.into(),
        ..InHeader::default()
    };
    let (at, answer) = (0x20_0000, 0x40_0000);
    guest.bench.memory.write_slice(&[header.as_slice(), &payload].concat(), GuestAddress(at)).unwrap();
    let room = if input.once_in(8) { input.edge() as u32 % 0x20_0000 } else { 0x1_0000 };
    let cut = input.below(length as usize) as u32;
    let mut pieces = match input.below(4) {
        0 if cut > 0 => vec![(at, cut, READ), (at + u64::from(cut), length - cut, READ)],
        1 if input.once_in(8) => vec![(at, cut, READ)],
        _ => vec![(at, length, READ)],
    };
    if room > 0 {
        pieces.push((answer, room, WRITE));
    }
    let queue = if input.once_in(8) { HIGH_PRIORITY } else { REQUESTS };
    guest.bench.rings[queue].chain(0, &pieces);
    guest.bench.rings[queue].publish(0);
    guest.bench.kick(queue);
    let (_, written) = guest.wait(queue);
    assert!(written <= room, "{written} bytes of an answer in {room}");
    if written >= size_of::<OutHeader>() as u32 {
        let out: OutHeader = object(&guest.bench.bytes(answer, size_of::<OutHeader>()));
        assert!(out.len == written && out.error <= 0 && out.unique == header.unique, "{out:?} {header:?}");
        if out.error == 0 {
            let payload = written as usize - size_of::<OutHeader>();
            seen.learn(opcode, &guest.bench.bytes(answer + size_of::<OutHeader>() as u64, payload));
        }
    }
    if destroys {
        guest.init();
    }
}

#[test]
fn fuzz_fuse() {
    let top = small_file_system(PAGES);
    std::fs::write(top.as_path().join("secret"), "secret").unwrap();
    let share = TempDir::new_in(top.as_path()).unwrap();
    let mut guest = guest_of(share, DESCRIPTORS);
    let (top, share) = (top.as_path().to_owned(), guest.path().to_owned());
    fuzz("fuse", |input| {
        // Descriptors in a directory that is gone keep nothing: the session begins anew.
        std::fs::read_dir(&share).unwrap().flatten().for_each(|entry| {
            let path = entry.path();
            let directory = entry.file_type().unwrap().is_dir();
            if directory { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
        });
        std::fs::create_dir_all(share.join("directory")).unwrap();
        std::fs::write(share.join("file"), "contents").unwrap();
        std::fs::write(share.join("directory/file"), "contents").unwrap();
        std::os::unix::fs::symlink("../secret", share.join("link")).unwrap();
        guest.init();
        let mut seen = Seen { nodes: vec![ROOT], handles: vec![0] };
        for name in [b"file".as_slice(), b"directory", b"link"] {
            seen.nodes.push(guest.lookup(name).nodeid);
        }
        seen.handles.push(guest.open(seen.nodes[1], libc::O_RDWR));
        seen.handles.push(guest.open(ROOT, libc::O_RDONLY | libc::O_DIRECTORY));
        while !input.is_empty() {
            step(&mut guest, &mut seen, input);
        }
        let mut beside: Vec<_> = top.read_dir().unwrap().flatten().map(|entry| entry.path()).collect();
        beside.sort();
        let mut expected = [share.clone(), top.join("secret")];
        expected.sort();
        assert_eq!(beside, expected, "something was made or removed outside of the share");
        assert_eq!(std::fs::read(top.join("secret")).unwrap(), b"secret");
    });
}
