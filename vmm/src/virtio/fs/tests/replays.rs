//! What the layer above the file server answers to replays, and that it does none of it.

use katana_protocol::{REPLAY_GID, REPLAY_LEARN, REPLAY_SOURCE};

use super::*;

impl Guest {
    /// Asks as the agent's replaying thread.
    fn replay(&mut self, opcode: Opcode, node: u64, payload: &[&[u8]]) -> Answer {
        self.request(opcode, node, REPLAY_GID, payload)
    }

    fn found(&mut self, directory: u64, name: &[u8]) -> Result<EntryOut, i32> {
        match self.replay(Opcode::Lookup, directory, &[name, b"\0"]) {
            (0, answer) => Ok(object(&answer)),
            (error, _) => Err(error),
        }
    }

    fn learn(&mut self, name: &[u8]) -> i32 {
        // struct fuse_getxattr_in: size, padding.
        self.replay(Opcode::Getxattr, ROOT, &[&[0; 8], REPLAY_LEARN.as_bytes(), name, b"\0"]).0
    }

    fn forget(&mut self, node: u64, count: u64) {
        // It has no answer: the next request is served after it, by another thread maybe.
        self.send(Opcode::Forget, node, 0, &[&count.to_le_bytes()]);
        self.wait(REQUESTS);
    }
}

fn names(guest: &Guest) -> Vec<String> {
    let entries = std::fs::read_dir(guest.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_name_that_is_gone_is_there_to_be_removed() {
    let mut guest = guest();
    guest.init();
    let path = guest.path().join("file");
    std::fs::write(&path, "x").unwrap();
    let seen = guest.lookup(b"file").nodeid;
    assert_eq!(guest.learn(b""), 0);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[b"file\0"]).0, libc::ENOENT);
    let before = guest.found(ROOT, b"file").unwrap();
    // With the link that is to be taken away.
    assert_eq!((before.nodeid, before.attr.nlink, before.entry_valid), (seen, 1, 0));
    assert_eq!(guest.replay(Opcode::Unlink, ROOT, &[b"file\0"]).0, 0);
    assert_eq!(guest.found(ROOT, b"file").err(), Some(libc::ENOENT));
    // Two answers were the guest's; then nobody knows the inode.
    assert_eq!(guest.request(Opcode::Getattr, seen, 0, &[&[0; 16]]).0, 0);
    guest.forget(seen, 2);
    assert_eq!(guest.request(Opcode::Getattr, seen, 0, &[&[0; 16]]).0, libc::EBADF);
}

#[test]
fn a_name_that_came_is_not_there_before_it_is_made() {
    let mut guest = guest();
    guest.init();
    assert_eq!(guest.learn(b""), 0);
    std::fs::write(guest.path().join("file"), "x").unwrap();
    std::fs::create_dir(guest.path().join("directory")).unwrap();
    let inode = guest.lookup(b"file").nodeid;
    assert_eq!(guest.found(ROOT, b"file").err(), Some(libc::ENOENT));
    // struct fuse_mknod_in and fuse_mkdir_in.
    let mknod = [&libc::S_IFREG.to_le_bytes()[..], &[0; 12]].concat();
    let (error, made) = guest.replay(Opcode::Mknod, ROOT, &[&mknod, b"file\0"]);
    assert_eq!((error, object::<EntryOut>(&made).nodeid), (0, inode));
    assert_eq!(guest.found(ROOT, b"file").unwrap().nodeid, inode);
    assert_eq!(guest.replay(Opcode::Mkdir, ROOT, &[&[0; 8], b"directory\0"]).0, 0);
    // Of another kind; not there at all.
    assert_eq!(guest.replay(Opcode::Mknod, ROOT, &[&mknod, b"directory\0"]).0, libc::EEXIST);
    assert_eq!(guest.replay(Opcode::Mknod, ROOT, &[&mknod, b"missing\0"]).0, libc::ENOENT);
    assert_eq!(names(&guest), ["directory", "file"]);
}

#[test]
fn what_was_replaced_is_there_to_be_replaced() {
    let mut guest = guest();
    guest.init();
    let path = guest.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let old = guest.lookup(b"file").nodeid;
    assert_eq!(guest.learn(b""), 0);
    std::fs::write(guest.path().join("other"), "new").unwrap();
    std::fs::rename(guest.path().join("other"), &path).unwrap();
    assert_eq!(guest.found(ROOT, b"file").unwrap().nodeid, old);
    let source = guest.found(ROOT, REPLAY_SOURCE.as_bytes()).unwrap();
    let moved = guest.found(source.nodeid, b"moved").unwrap();
    assert_eq!(
        (source.attr.mode & libc::S_IFMT, moved.attr.mode & libc::S_IFMT),
        (libc::S_IFDIR, libc::S_IFREG)
    );
    let rename = |name: &[u8]| [&ROOT.to_le_bytes()[..], b"moved\0", name, b"\0"].concat();
    assert_eq!(guest.replay(Opcode::Rename, source.nodeid, &[&rename(b"file")]).0, 0);
    assert_eq!(guest.replay(Opcode::Rename, source.nodeid, &[&rename(b"gone")]).0, libc::ENOENT);
    assert_ne!(guest.found(ROOT, b"file").unwrap().nodeid, old);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    // Nobody else finds the source, nor can do anything with it.
    let name = [REPLAY_SOURCE.as_bytes(), b"\0"].concat();
    assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[&name]).0, libc::ENOENT);
    assert_ne!(guest.request(Opcode::Rename, source.nodeid, 0, &[&rename(b"file")]).0, 0);
    assert_ne!(guest.request(Opcode::Open, moved.nodeid, 0, &[&[0; 8]]).0, 0);
}

#[test]
fn nothing_happens_on_the_host() {
    let mut guest = guest();
    guest.init();
    let path = guest.path().join("file");
    std::fs::write(&path, "contents").unwrap();
    let node = guest.lookup(b"file").nodeid;
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut asked = |opcode, node, payload: &[&[u8]]| guest.replay(opcode, node, payload);
    // FATTR_SIZE: to nothing.
    let set = SetattrIn { valid: 1 << 3, ..SetattrIn::default() };
    assert_eq!(asked(Opcode::Setattr, node, &[set.as_slice()]).0, 0);
    let flags = (libc::O_WRONLY | libc::O_TRUNC).to_le_bytes();
    let (error, opened) = asked(Opcode::Open, node, &[&flags, &[0; 4]]);
    let fh = object::<OpenOut>(&opened).fh;
    assert_eq!(error, 0);
    let write = WriteIn { fh, size: 1, ..WriteIn::default() };
    assert_eq!(asked(Opcode::Write, node, &[write.as_slice(), b"y"]).0, libc::EPERM);
    // struct fuse_flush_in, fuse_release_in.
    assert_eq!(asked(Opcode::Flush, node, &[&fh.to_le_bytes(), &[0; 16]]).0, 0);
    assert_eq!(asked(Opcode::Release, node, &[&fh.to_le_bytes(), &[0; 16]]).0, 0);
    assert_eq!(asked(Opcode::Symlink, ROOT, &[b"link\0target\0"]).0, libc::EPERM);
    assert_eq!(asked(Opcode::Link, ROOT, &[&node.to_le_bytes(), b"link\0"]).0, libc::EPERM);
    assert_eq!(asked(Opcode::Rename, ROOT, &[&ROOT.to_le_bytes(), b"file\0other\0"]).0, libc::EPERM);
    assert_eq!(asked(Opcode::Create, ROOT, &[&[0; 16], b"new\0"]).0, libc::EPERM);
    assert_eq!(asked(Opcode::Removexattr, node, &[b"user.x\0"]).0, libc::EPERM);
    assert_eq!(asked(Opcode::Unlink, ROOT, &[b"file\0"]).0, 0);
    assert_eq!(asked(Opcode::Rmdir, ROOT, &[b"file\0"]).0, 0);
    assert_eq!(names(&guest), ["file"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"contents");
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before);
}

#[test]
fn what_a_forgotten_directory_held_is_forgotten() {
    let mut guest = guest();
    guest.init();
    std::fs::create_dir(guest.path().join("directory")).unwrap();
    std::fs::write(guest.path().join("directory/file"), "x").unwrap();
    let node = guest.lookup(b"directory").nodeid;
    guest.lookup(b"directory");
    let learn = [&[0; 8][..], REPLAY_LEARN.as_bytes(), b"\0"].concat();
    assert_eq!(guest.replay(Opcode::Getxattr, node, &[&learn]).0, 0);
    std::fs::remove_file(guest.path().join("directory/file")).unwrap();
    guest.forget(node, 1);
    let file = guest.found(node, b"file").unwrap().nodeid;
    assert_eq!(guest.request(Opcode::Getattr, file, 0, &[&[0; 16]]).0, 0);
    guest.forget(node, 1);
    guest.forget(file, 1);
    assert_eq!(guest.request(Opcode::Getattr, file, 0, &[&[0; 16]]).0, libc::EBADF);
}

/// A machine that knows more files than this process may have descriptors hears of it, until it forgets some.
#[test]
fn beyond_the_limit_of_descriptors_files_are_not_found() {
    let mut guest = guest_with_limit(8);
    guest.init();
    for number in 0..20 {
        std::fs::write(guest.path().join(number.to_string()), "").unwrap();
    }
    let mut known = Vec::new();
    let refused = (0..20).find_map(|number: u32| {
        let name = [number.to_string().as_bytes(), b"\0"].concat();
        let (error, answer) = guest.request(Opcode::Lookup, ROOT, 0, &[&name]);
        if error == 0 {
            known.push(object::<EntryOut>(&answer).nodeid);
        }
        (error != 0).then_some((name, error))
    });
    let (name, error) = refused.unwrap();
    assert_eq!((error, (6..=8).contains(&known.len())), (libc::ENFILE, true), "{}", known.len());
    guest.forget(known[0], 1);
    assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[&name]).0, 0);
}
