//! Whether this machine's kernel obeys POSIX ACLs in what is shared.
//!
//! Linux (6.12) does not where it counts, in submounts of FUSE; `guest-kernel/patches` mends that. With a kernel
//! without it, whom an ACL keeps out could get in, so such a machine runs nothing that is shared.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use katana_protocol::GUEST_SHARE;
use oci_spec::runtime::Spec;

/// An ACL of nothing but an entry for the owner, who may all: there is no such thing. Where ACLs are known, EINVAL says
/// so before anybody asks the host (`set_posix_acl` in fs/posix_acl.c), and where they are not, EOPNOTSUPP.
const IMPOSSIBLE: [u8; 12] = [2, 0, 0, 0, 1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff];

/// This kernel is not as it has to be.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest's kernel does not obey POSIX ACLs in what is shared (is it one of your own? it needs guest-kernel/patches)"
)]
pub struct NotObeyed;

/// Looks at the first root or volume of the machine that is a file system of its own.
///
/// # Errors
/// When ACLs would not count in there.
pub fn check(spec: &Spec) -> Result<(), NotObeyed> {
    static OBEYED: OnceLock<bool> = OnceLock::new();
    let paths = || {
        let root = spec.root().as_ref().map(|root| root.path().as_path());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_deref());
        root.into_iter().chain(sources).filter(|path| path.starts_with(GUEST_SHARE))
    };
    let obeyed = match OBEYED.get() {
        Some(obeyed) => *obeyed,
        None => match paths().filter(|path| is_submount(path)).find_map(obeys) {
            Some(obeyed) => *OBEYED.get_or_init(|| obeyed),
            None => true,
        },
    };
    if obeyed { Ok(()) } else { Err(NotObeyed) }
}

/// Whether ACLs are obeyed in a directory, if that can be found out.
fn obeys(directory: &Path) -> Option<bool> {
    let path = CString::new(directory.as_os_str().as_bytes()).ok()?;
    let (name, value): (&CStr, _) = (c"system.posix_acl_access", IMPOSSIBLE);
    // SAFETY: the strings and the value live through the call, and the length is the value's.
    unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EINVAL) => Some(true),
        Some(libc::EOPNOTSUPP) => Some(false),
        _ => None,
    }
}

/// Whether it is another device than the share, which is known without asking the host.
fn is_submount(path: &Path) -> bool {
    let devices = [Path::new(GUEST_SHARE), path].map(device);
    matches!(devices, [Some(share), Some(device)] if share != device)
}

fn device(path: &Path) -> Option<(u32, u32)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_STATX_DONT_SYNC;
    // SAFETY: the string lives through the call, which fills in the structure.
    let result = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, 0, status.as_mut_ptr()) };
    // SAFETY: zeroes are such a structure as well.
    let status = unsafe { status.assume_init() };
    (result == 0).then_some((status.stx_dev_major, status.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn obedience_is_found_out_without_an_acl_being_set() {
        let directory = std::env::temp_dir().join(format!("katana-acls-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("mkdir");
        let obeyed = obeys(&directory);
        std::fs::remove_dir(&directory).expect("rmdir");
        // Any file system that programs are built on has them.
        assert_eq!(obeyed, Some(true));
        assert_ne!(obeys(Path::new("/proc/self")), Some(true));
        assert_eq!(obeys(&directory), None);
    }
}
