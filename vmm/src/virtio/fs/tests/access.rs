//! Who gets in: ACLs, and what somebody else has made meanwhile.

use std::os::unix::fs::MetadataExt;

use super::*;

const ACCESS: &[u8] = b"system.posix_acl_access\0";
const DEFAULT: &[u8] = b"system.posix_acl_default\0";
const NOBODY: u32 = u32::MAX;

/// linux/posix_acl_xattr.h: the owner may all, and then these entries of tag, permissions and id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let entries = [&[(1, 7, NOBODY)], entries].concat();
    let entries = entries.into_iter().flat_map(|(tag, permissions, id)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    });
    2_u32.to_le_bytes().into_iter().chain(entries).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Guest {
    fn set_acl(&mut self, node: u64, name: &[u8], value: &[u8], kill: u32) -> i32 {
        // struct fuse_setxattr_in.
        let head = words(&[value.len() as u32, 0, kill, 0]);
        self.request(Opcode::Setxattr, node, 0, &[&head, name, value]).0
    }

    fn get_acl(&mut self, node: u64, name: &[u8]) -> Answer {
        self.request(Opcode::Getxattr, node, 0, &[&words(&[4096, 0]), name])
    }

    fn make_directory(
        &mut self,
        parent: u64,
        uid: u32,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<u64, i32> {
        match self.request(Opcode::Mkdir, parent, uid, &[&words(&[mode, umask]), name]) {
            (0, answer) => Ok(object::<EntryOut>(&answer).nodeid),
            (error, _) => Err(error),
        }
    }

    fn create(&mut self, parent: u64, uid: u32, name: &[u8], flags: i32) -> (i32, Vec<u8>) {
        let head = words(&[flags.cast_unsigned(), 0o666, 0o022, 0]);
        self.request(Opcode::Create, parent, uid, &[&head, name])
    }
}

#[test]
fn the_guest_learns_acls_and_sets_them() {
    let mut guest = guest();
    // POSIX_ACL, DONT_MASK and SETXATTR_EXT.
    let wanted = 1 << 20 | 1 << 6 | 1 << 29;
    assert_eq!(guest.init().flags & wanted, wanted);
    let directory = guest.make_directory(ROOT, 0, b"directory\0", 0o755, 0).unwrap();
    assert_eq!(guest.get_acl(directory, ACCESS).0, libc::ENODATA);
    let value = acl(&[(2, 6, 1000), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)]);
    assert_eq!(guest.set_acl(directory, ACCESS, &value, 0), 0);
    assert_eq!(guest.get_acl(directory, ACCESS), (0, value));
    let path = guest.path().join("directory");
    let mode = || path.metadata().unwrap().mode() & 0o7777;
    assert_eq!(mode(), 0o760, "the group's bits are the mask");

    // chmod changes the mask.
    let set = SetattrIn { valid: 1, mode: 0o2740, ..SetattrIn::default() };
    assert_eq!(guest.request(Opcode::Setattr, directory, 0, &[set.as_slice()]).0, 0);
    let masked = acl(&[(2, 6, 1000), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)]);
    assert_eq!(guest.get_acl(directory, ACCESS), (0, masked.clone()));
    // Set-group-ID goes only if the ACL is set, and if the guest says so.
    assert_eq!(guest.set_acl(directory, ACCESS, &acl(&[]), 1), libc::EINVAL);
    assert_eq!(mode(), 0o2740);
    assert_eq!(guest.set_acl(directory, DEFAULT, &masked, 1), 0);
    assert_eq!(mode(), 0o2740);
    assert_eq!(guest.set_acl(directory, ACCESS, &masked, 1), 0);
    assert_eq!(mode(), 0o740);
}

/// A link is what is at hand that has none, wherever this runs.
#[test]
fn where_there_are_no_acls_there_are_none_to_obey() {
    let mut guest = guest();
    guest.init();
    std::os::unix::fs::symlink("nowhere", guest.path().join("link")).unwrap();
    let link = guest.lookup(b"link").nodeid;
    assert_eq!(guest.get_acl(link, ACCESS).0, libc::ENODATA);
    assert_eq!(guest.set_acl(link, ACCESS, &acl(&[(4, 0, NOBODY), (32, 0, NOBODY)]), 0), libc::EOPNOTSUPP);
}

#[test]
fn a_lease_does_not_hide_an_acl() {
    let mut guest = guest();
    let path = guest.path().join("leased");
    std::fs::write(&path, "x").unwrap();
    guest.init();
    let node = guest.lookup(b"leased").nodeid;
    let value = acl(&[(2, 0, 1000), (4, 7, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]);
    assert_eq!(guest.set_acl(node, ACCESS, &value, 0), 0);
    // SAFETY: the signal that asks for the lease is ignored; no handler runs.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let leased = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: the call takes integers.
    let result = unsafe { libc::fcntl(leased.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    let releaser = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        drop(leased);
    });
    assert_eq!(guest.get_acl(node, ACCESS), (0, value));
    releaser.join().unwrap();
}

#[test]
fn a_default_acl_takes_the_umasks_place() {
    let mut guest = guest();
    guest.init();
    let directory = guest.make_directory(ROOT, 0, b"directory\0", 0o777, 0).unwrap();
    let value = acl(&[(2, 6, 1000), (4, 7, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)]);
    assert_eq!(guest.set_acl(directory, DEFAULT, &value, 0), 0);
    let (error, answer) = guest.create(directory, 1234, b"file\0", libc::O_RDWR);
    let file: EntryOut = object(&answer);
    assert_eq!((error, file.attr.mode & 0o777), (0, 0o660));
    let inherited = acl(&[(2, 6, 1000), (4, 7, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)]);
    let inherited = [&inherited[..4], &acl_owner(6), &inherited[12..]].concat();
    assert_eq!(guest.get_acl(file.nodeid, ACCESS), (0, inherited));
    let inner = guest.make_directory(directory, 1234, b"inner\0", 0o777, 0o077).unwrap();
    assert_eq!(guest.get_acl(inner, DEFAULT), (0, value));
    // And elsewhere the umask counts.
    let other = guest.make_directory(ROOT, 0, b"other\0", 0o777, 0o027).unwrap();
    let attr: AttrOut = object(&guest.request(Opcode::Getattr, other, 0, &[&[0; 16]]).1);
    assert_eq!(attr.attr.mode & 0o777, 0o750);
}

fn acl_owner(permissions: u16) -> Vec<u8> {
    [&1_u16.to_le_bytes()[..], &permissions.to_le_bytes(), &NOBODY.to_le_bytes()].concat()
}

/// The guest reports none of its user's further groups but the directory's own.
#[test]
fn members_of_groups_in_an_acl_make_files() {
    let mut guest = guest();
    // INIT_EXT, and in the second word of flags CREATE_SUPP_GROUP: the host decides by its user's groups.
    let init = InitInCompat { major: 7, minor: 36, max_readahead: 1 << 17, flags: 0x7fff_ffff };
    assert_eq!(guest.request(Opcode::Init, 0, 0, &[init.as_slice(), &words(&[1 << 2]), &[0; 44]]).0, 0);
    let directory = guest.make_directory(ROOT, 0, b"directory\0", 0o700, 0).unwrap();
    for (permissions, expected) in [(5, libc::EACCES), (7, 0)] {
        let value = acl(&[(4, 0, NOBODY), (8, permissions, 3000), (16, 7, NOBODY), (32, 0, NOBODY)]);
        assert_eq!(guest.set_acl(directory, ACCESS, &value, 0), 0);
        assert_eq!(guest.create(directory, 1234, b"file\0", libc::O_RDWR).0, expected);
        let made = guest.make_directory(directory, 1234, b"inner\0", 0o755, 0);
        assert_eq!(made.err().unwrap_or(0), expected);
    }
    let file = guest.path().join("directory/file").metadata().unwrap();
    assert_eq!((file.uid(), file.gid()), (1234, 1234));
}

/// To the guest's kernel, what it creates is its user's, who is not asked for any rights.
#[test]
fn what_the_host_has_made_meanwhile_is_not_opened_as_ones_own() {
    let mut guest = guest();
    guest.init();
    std::fs::set_permissions(guest.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::write(guest.path().join("secret"), "x").unwrap();
    let error = guest.create(ROOT, 1234, b"secret\0", libc::O_RDWR).0;
    assert_eq!(error, libc::ESTALE, "the guest looks again");
    assert_eq!(guest.create(ROOT, 1234, b"secret\0", libc::O_RDWR | libc::O_EXCL).0, libc::EEXIST);
    let own = guest.path().join("own");
    std::fs::write(&own, "x").unwrap();
    std::os::unix::fs::chown(&own, Some(1234), None).unwrap();
    for (mode, flags, expected) in [
        (0o400, libc::O_RDONLY, 0),
        (0o466, libc::O_RDWR, libc::ESTALE),
        (0o466, libc::O_RDONLY | libc::O_TRUNC, libc::ESTALE),
        (0o200, libc::O_WRONLY | libc::O_TRUNC, 0),
        (0o277, libc::O_RDONLY, libc::ESTALE),
    ] {
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(guest.create(ROOT, 1234, b"own\0", flags).0, expected, "{mode:o} {flags:o}");
    }
    assert_eq!(own.metadata().unwrap().len(), 0);
}

/// A guest that cannot take ACLs into account is not served.
#[test]
fn acls_are_no_option() {
    let mut guest = guest();
    let init = InitInCompat { major: 7, minor: 36, max_readahead: 1 << 17, flags: 0x3fff_ffff & !(1 << 20) };
    assert_eq!(guest.request(Opcode::Init, 0, 0, &[init.as_slice(), &[0; 48]]).0, libc::EPROTO);
}
