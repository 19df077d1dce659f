//! What the guest may keep without asking.

use std::fs;
use std::os::unix::fs::MetadataExt;

use katana_protocol::{OWN_ROOT, SHARED_ROOT};
use virtiofsd::fuse::{CreateIn, OpenOptions};

use super::*;

const SECOND: u64 = 1;
const DAY: u64 = 24 * 3600;

impl Guest {
    fn find(&mut self, parent: u64, name: &str) -> EntryOut {
        let (error, answer) = self.request(Opcode::Lookup, parent, 0, &[name.as_bytes(), b"\0"]);
        assert_eq!(error, 0, "{name}");
        object(&answer)
    }

    /// Opens and closes it; what the server answered besides the handle.
    fn options(&mut self, opcode: Opcode, node: u64, flags: i32) -> OpenOptions {
        let (error, answer) = self.request(opcode, node, 0, &[&flags.to_le_bytes(), &[0; 4]]);
        assert_eq!(error, 0);
        let opened: OpenOut = object(&answer);
        let close = if matches!(opcode, Opcode::Opendir) { Opcode::Releasedir } else { Opcode::Release };
        assert_eq!(self.request(close, node, 0, &[&opened.fh.to_le_bytes(), &[0; 16]]).0, 0);
        OpenOptions::from_bits_truncate(opened.open_flags)
    }

    fn keeps(&mut self, node: u64) -> bool {
        self.options(Opcode::Open, node, libc::O_RDONLY).contains(OpenOptions::KEEP_CACHE)
    }
}

/// Both kinds of roots, with a file and a directory in each.
fn roots() -> (Guest, [u64; 2]) {
    let mut guest = guest();
    guest.init();
    let mut find = |name: &str| {
        let root = guest.path().join("c").join(name);
        fs::create_dir_all(root.join("directory")).unwrap();
        fs::write(root.join("file"), "contents").unwrap();
        let top = guest.find(ROOT, "c").nodeid;
        let entry = guest.find(top, name);
        entry.nodeid
    };
    let nodes = [find(OWN_ROOT), find(SHARED_ROOT)];
    (guest, nodes)
}

/// The file's last change was long ago: it is not possible to say when it was, only to wait.
fn settle(path: &Path) {
    let changed = fs::metadata(path).unwrap().ctime();
    let age = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_secs() as i64 - changed
    };
    while age() < 4 {
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn what_only_the_guest_changes_holds_for_a_day() {
    let (mut guest, roots) = roots();
    for (root, time) in roots.into_iter().zip([DAY, SECOND]) {
        let file = guest.find(root, "file");
        let directory = guest.find(root, "directory");
        assert_eq!(
            [file.entry_valid, file.attr_valid, directory.entry_valid, directory.attr_valid],
            [time; 4]
        );
        let (_, answer) = guest.request(Opcode::Getattr, file.nodeid, 0, &[&[0; 16]]);
        assert_eq!(object::<AttrOut>(&answer).attr_valid, time);
        let mode = SetattrIn { valid: 1, mode: 0o600, ..SetattrIn::default() };
        let (_, answer) = guest.request(Opcode::Setattr, file.nodeid, 0, &[mode.as_slice()]);
        assert_eq!(object::<AttrOut>(&answer).attr_valid, time);
        // Whatever is made there is the guest's as well, however deep.
        let made =
            guest.request(Opcode::Mkdir, directory.nodeid, 0, &[&0o755_u32.to_le_bytes(), &[0; 4], b"new\0"]);
        let made: EntryOut = object(&made.1);
        assert_eq!((made.entry_valid, made.attr_valid), (time, time));
        let linked = guest.request(Opcode::Link, made.nodeid, 0, &[&file.nodeid.to_le_bytes(), b"name\0"]);
        assert_eq!(object::<EntryOut>(&linked.1).entry_valid, time);
    }
}

#[test]
fn that_there_is_nothing_holds_only_where_nobody_else_makes_it() {
    let (mut guest, [own, shared]) = roots();
    let nothing = guest.find(own, "missing");
    assert_eq!((nothing.nodeid, nothing.entry_valid), (0, DAY));
    assert_eq!(guest.request(Opcode::Lookup, shared, 0, &[b"missing\0"]).0, libc::ENOENT);
    assert_eq!(guest.request(Opcode::Lookup, ROOT, 0, &[b"missing\0"]).0, libc::ENOENT);
}

#[test]
fn a_name_makes_nothing_the_guests_own() {
    let (mut guest, [_, shared]) = roots();
    // In a root, in a volume, and right below the share.
    for place in ["c/rootfs", ".volumes/0", ""] {
        let directory = guest.path().join(place).join(OWN_ROOT);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("file"), "x").unwrap();
    }
    let volumes = guest.find(ROOT, ".volumes").nodeid;
    let volume = guest.find(volumes, "0").nodeid;
    for parent in [shared, volume, ROOT] {
        let directory = guest.find(parent, OWN_ROOT);
        let file = guest.find(directory.nodeid, "file");
        assert_eq!((directory.entry_valid, file.entry_valid), (SECOND, SECOND));
        assert!(!guest.keeps(file.nodeid));
    }
}

#[test]
fn pages_of_the_guests_own_files_and_directories_stay() {
    let (mut guest, [own, shared]) = roots();
    let all = OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR;
    for (root, kept) in [(own, true), (shared, false)] {
        let file = guest.find(root, "file").nodeid;
        for _ in 0..2 {
            assert_eq!(guest.keeps(file), kept);
        }
        let directory = guest.find(root, "directory").nodeid;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        assert_eq!(guest.options(Opcode::Opendir, directory, flags).contains(all), kept);
    }
}

#[test]
fn pages_of_a_shared_file_stay_while_it_is_unchanged() {
    let (mut guest, [_, shared]) = roots();
    let path = guest.path().join("c/rootfs/file");
    let file = guest.find(shared, "file").nodeid;
    settle(&path);
    assert!(!guest.keeps(file), "what the guest has may be older");
    assert!(guest.keeps(file) && guest.keeps(file));
    // The same length, and the old time of modification: only the change's own time tells.
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "CONTENTS").unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    // As long as the next change may bear the same time, nothing is believed.
    assert!(!guest.keeps(file) && !guest.keeps(file));
    settle(&path);
    assert!(!guest.keeps(file));
    assert!(guest.keeps(file));
    // A guest that forgets a file has no pages of it.
    guest.send(Opcode::Forget, file, 0, &[&1_u64.to_le_bytes()]);
    guest.wait(REQUESTS);
    let file = guest.find(shared, "file").nodeid;
    assert!(!guest.keeps(file));
}

#[test]
fn only_what_was_opened_to_write_and_is_shared_is_flushed() {
    let (mut guest, roots) = roots();
    for (root, shared) in roots.into_iter().zip([false, true]) {
        let file = guest.find(root, "file").nodeid;
        for (flags, writes) in [(libc::O_RDONLY, false), (libc::O_WRONLY, true), (libc::O_RDWR, true)] {
            let flushed = !guest.options(Opcode::Open, file, flags).contains(OpenOptions::NOFLUSH);
            assert_eq!(flushed, shared && writes, "{flags}");
        }
        let create = CreateIn { flags: libc::O_WRONLY.cast_unsigned(), mode: 0o600, ..CreateIn::default() };
        let (error, answer) = guest.request(Opcode::Create, root, 0, &[create.as_slice(), b"new\0"]);
        let options = object::<OpenOut>(&answer[size_of::<EntryOut>()..]).open_flags;
        let flushed = !OpenOptions::from_bits_truncate(options).contains(OpenOptions::NOFLUSH);
        assert_eq!((error, flushed), (0, shared));
    }
}

/// What is written by the inode without a name changes the one with a name as if the host did it.
#[test]
fn a_file_that_had_no_name_is_asked_for_while_both_are_known() {
    let (mut guest, [own, _]) = roots();
    let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
    let create = CreateIn { flags, mode: 0o600, ..CreateIn::default() };
    let (error, answer) = guest.request(Opcode::TmpFile, own, 0, &[create.as_slice(), b"/\0"]);
    let unnamed = object::<EntryOut>(&answer).nodeid;
    let fh = object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh;
    let (linked, _) = guest.request(Opcode::Link, own, 0, &[&unnamed.to_le_bytes(), b"name\0"]);
    assert_eq!((error, linked), (0, 0));
    let named = guest.find(own, "name");
    assert_eq!((named.entry_valid, named.attr_valid), (SECOND, SECOND));
    assert!(!guest.keeps(named.nodeid));
    guest.request(Opcode::Release, unnamed, 0, &[&fh.to_le_bytes(), &[0; 16]]);
    assert_eq!(guest.find(own, "name").attr_valid, SECOND);
    guest.send(Opcode::Forget, unnamed, 0, &[&1_u64.to_le_bytes()]);
    guest.wait(REQUESTS);
    assert_eq!(guest.find(own, "name").attr_valid, DAY);
}
