//! POSIX ACLs: acl(5).
//!
//! The guest's kernel decides about accesses (`default_permissions`), so it asks for the ACL of what is not its user's
//! own, and remembers it for as long as the attributes (fs/fuse/acl.c; for submounts, `guest-kernel/patches`). The
//! host's kernel inherits default ACLs and keeps the mode in step, as it would for a process of the host.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::GetxattrReply;
use virtiofsd::soft_idmap::GuestGid;

/// Decides who may do what.
pub const ACCESS: &CStr = c"system.posix_acl_access";
/// What is made in a directory inherits it.
const DEFAULT: &CStr = c"system.posix_acl_default";
/// Most bytes of one that the guest takes (fs/fuse/acl.c).
pub const MOST_BYTES: u32 = 4096;

/// linux/posix_acl_xattr.h: a version, then entries of tag, permissions and id.
const VERSION: [u8; 4] = [2, 0, 0, 0];
const GROUP: u16 = 8;
const MASK: u16 = 16;
const WRITE_AND_SEARCH: u16 = 3;

/// Whether an attribute is one.
pub fn is_one(name: &CStr) -> bool {
    name == ACCESS || name == DEFAULT
}

/// The answer to the guest's request for an ACL. The guest takes every error but ENODATA for a refusal of the access,
/// and EAGAIN for there being no ACL (`check_acl` in fs/namei.c).
pub fn answer(found: io::Result<GetxattrReply>) -> io::Result<GetxattrReply> {
    found.map_err(|error| {
        let number = match error.raw_os_error() {
            // One connection serves many file systems, and not all have ACLs. ENOSYS would end ACLs in all of them.
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => libc::ENODATA,
            Some(libc::EAGAIN) | None => libc::EIO,
            Some(number) => number,
        };
        io::Error::from_raw_os_error(number)
    })
}

/// The groups to which a directory's ACL gives the right to make something in it.
///
/// The guest has found that somebody may, but reports only the directory's own group (`get_create_supp_group` in
/// fs/fuse/dir.c). Of a member of one of these, the host finds the same; of all others, what it found without: only
/// entries that grant are in here, and it suffices that one does.
pub fn groups_that_make(acl: &[u8]) -> Vec<GuestGid> {
    let Some(entries) = acl.strip_prefix(&VERSION) else { return Vec::new() };
    let entries = entries.chunks_exact(8).map(|entry| {
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        (half(0), half(2), u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]))
    });
    let mask = entries.clone().find(|(tag, ..)| *tag == MASK).map_or(0, |(_, permissions, _)| permissions);
    let granting = |permissions: u16| permissions & mask & WRITE_AND_SEARCH == WRITE_AND_SEARCH;
    entries
        .filter(|(tag, permissions, _)| *tag == GROUP && granting(*permissions))
        .map(|(_, _, id)| id.into())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|(tag, permissions, id)| {
            [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
        });
        VERSION.into_iter().chain(entries).collect()
    }

    #[test]
    fn only_groups_that_may_write_and_search_are_named() {
        let none = u32::MAX;
        let entries = [
            (1, 7, none),
            (2, 7, 1000),
            (4, 7, none),
            (8, 7, 2000),
            (8, 5, 2001),
            (8, 3, 2002),
            (32, 7, none),
        ];
        let with_mask = |mask| groups_that_make(&acl(&[&entries[..], &[(16, mask, none)]].concat()));
        assert_eq!(with_mask(7), [2000.into(), 2002.into()]);
        assert_eq!(with_mask(5), []);
        assert_eq!(groups_that_make(&acl(&entries)), [], "an ACL with groups has a mask");
        for damaged in [&b""[..], b"\x02\0", &[1; 12], &acl(&entries)[..15]] {
            assert_eq!(groups_that_make(damaged), []);
        }
    }

    #[test]
    fn no_error_reads_as_there_being_no_acl() {
        let number =
            |number| answer(Err(io::Error::from_raw_os_error(number))).err().and_then(|e| e.raw_os_error());
        for (found, expected) in [
            (libc::ENODATA, libc::ENODATA),
            (libc::EOPNOTSUPP, libc::ENODATA),
            (libc::ENOSYS, libc::ENODATA),
            (libc::EAGAIN, libc::EIO),
            (libc::EACCES, libc::EACCES),
            (libc::ERANGE, libc::ERANGE),
        ] {
            assert_eq!(number(found), Some(expected));
        }
    }
}
