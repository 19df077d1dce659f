//! Files that do something when they are opened: devices, FIFOs, sockets. The guest's kernel opens them itself, and
//! never here; whoever asks is no kernel.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;

use nix::sys::stat::{SFlag, mknod};
use nix::unistd::mkfifo;
use virtiofsd::fuse::CreateIn;

use super::*;

const SYNCFS: u32 = 50;

#[test]
fn special_files_are_never_opened_and_nobody_waits_for_their_other_ends() {
    let mut guest = guest();
    guest.init();
    let all = Mode::from_bits_truncate(0o666);
    mkfifo(&guest.path().join("fifo"), all).unwrap();
    let _listener = UnixListener::bind(guest.path().join("socket")).unwrap();
    // /dev/zero: it can be read and written, and nothing that is done to it has consequences.
    mknod(&guest.path().join("device"), SFlag::S_IFCHR, all, libc::makedev(1, 5)).unwrap();
    for name in [&b"fifo"[..], b"socket", b"device"] {
        let what = String::from_utf8_lossy(name).into_owned();
        let entry = guest.lookup(name);
        let node = entry.nodeid;
        assert_ne!(entry.attr.mode & libc::S_IFMT, libc::S_IFREG, "{what}");
        for access in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            for more in [0, libc::O_NONBLOCK, libc::O_TRUNC, libc::O_APPEND, libc::O_CREAT, libc::O_DIRECTORY]
            {
                let flags = [&(access | more).to_le_bytes()[..], &[0; 4]].concat();
                for opcode in [Opcode::Open, Opcode::Opendir] {
                    let (error, _) = guest.request(opcode, node, 0, &[&flags]);
                    assert_ne!(error, 0, "{what}: {opcode:?} {:#o}", access | more);
                }
            }
            let named = [name, b"\0"].concat();
            let create = CreateIn {
                flags: (access | libc::O_CREAT).cast_unsigned(),
                mode: libc::S_IFREG | 0o666,
                umask: 0,
                open_flags: 0,
            };
            assert_ne!(guest.request(Opcode::Create, ROOT, 0, &[create.as_slice(), &named]).0, 0, "{what}");
            assert_ne!(guest.request(Opcode::TmpFile, node, 0, &[create.as_slice(), b"/\0"]).0, 0, "{what}");
        }
        // FATTR_SIZE.
        let size = SetattrIn { valid: 1 << 3, size: 0, ..SetattrIn::default() };
        assert_ne!(guest.request(Opcode::Setattr, node, 0, &[size.as_slice()]).0, 0, "{what}");
        // Whatever is answered: nobody waits.
        guest.request(Opcode::Getxattr, node, 0, &[&[0; 8], b"user.x\0"]);
        guest.request(Opcode::Listxattr, node, 0, &[&[0; 8]]);
        guest.request(Opcode::Removexattr, node, 0, &[b"user.x\0"]);
        guest.send_number(SYNCFS, node, 0, &[&[0; 8]]);
        guest.wait(REQUESTS);
        // FATTR_MODE and times are of the file and not of what is behind it.
        let mode = SetattrIn { valid: 1, mode: 0o600, ..SetattrIn::default() };
        assert_eq!(guest.request(Opcode::Setattr, node, 0, &[mode.as_slice()]).0, 0, "{what}");
        let metadata = guest.path().join(&what).metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{what}");
        assert!(!metadata.file_type().is_file() && !metadata.file_type().is_block_device());
    }
}
