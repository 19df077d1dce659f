//! Files of the host that the VMM keeps open while a guest runs: disks, taps, /dev/vhost-net.
//!
//! With a descriptor comes more than what it was opened for. The VMM is root in a user namespace in which every id is
//! itself, so a file that root owns is its own: by `fchmod` it could change a device node of the host, and by
//! /proc/self/fd open a disk for writing that it has for reading. Both are up to the mount by which a file was opened.
//! So these are opened by mounts of their own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use super::mounts::{Detached, path_of_fd};

/// Opens a file, or a device that may be written to if the options say so, such that the descriptor is good for its
/// contents only. Blocks.
pub fn open(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let mount = match Detached::copy(path, false) {
        // An unbindable mount.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            log::warn!("{} is on an unbindable mount: kata-vmm gets it as it is on the host", path.display());
            return options.open(path);
        }
        mount => mount?,
    };
    let file = options.open(path_of_fd(mount.as_fd()))?;
    let closed = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    match mount.set(closed | libc::MOUNT_ATTR_RDONLY, 0, 0, false) {
        // A file that the guest may change anyway.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => mount.set(closed, 0, 0, false)?,
        set => set?,
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::share::tests::in_namespace;
    use nix::sys::stat::{Mode, SFlag, mknod};
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    fn readable() -> OpenOptions {
        let mut options = File::options();
        options.read(true);
        options
    }

    fn again(file: &File, write: bool) -> Option<i32> {
        let opened = File::options().read(true).write(write).open(path_of_fd(file.as_fd()));
        opened.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn a_descriptor_is_good_for_contents_only() {
        in_namespace("vmm-files", |top| {
            let (image, node) = (top.join("image"), top.join("node"));
            fs::write(&image, "contents").unwrap();
            mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), libc::makedev(1, 5)).unwrap();
            let change = |file: &File| {
                file.set_permissions(fs::Permissions::from_mode(0o666)).unwrap_err().raw_os_error()
            };

            let mut file = open(&image, &readable()).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "contents");
            assert_eq!(again(&file, true), Some(libc::EROFS));
            assert_eq!(change(&file), Some(libc::EROFS));

            let mut device = open(&node, readable().write(true)).unwrap();
            device.write_all(b"x").unwrap();
            assert_eq!(
                (again(&device, false), again(&device, true)),
                (Some(libc::EACCES), Some(libc::EACCES))
            );
            assert_eq!(change(&device), Some(libc::EROFS));

            let mut written = open(&image, readable().write(true)).unwrap();
            written.write_all(b"CONTENTS").unwrap();
            assert_eq!(fs::read_to_string(&image).unwrap(), "CONTENTS");
            assert_eq!(open(&top.join("none"), &readable()).unwrap_err().kind(), io::ErrorKind::NotFound);
            // Nothing of this stays.
            drop((file, device, written));
            assert_eq!(fs::metadata(&node).unwrap().permissions().mode() & 0o777, 0o600);
        });
    }
}
