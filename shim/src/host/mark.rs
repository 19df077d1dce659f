//! Extended attributes whose value means nothing, by which files and directories that a shim made are known again.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// Marks a file or directory. Links are not followed.
pub fn mark(path: &Path, name: &CStr) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: strings that outlive the call, and a value of one byte.
    let marked = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
    Ok(Errno::result(marked).map(drop)?)
}

/// Whether it was marked so.
pub fn is_marked(path: &Path, name: &CStr) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: strings that outlive the call; without a buffer only the length is asked for.
    unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}
