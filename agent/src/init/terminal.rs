//! The terminal of a process: opened in the container's devpts, its master given to the agent.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use katana_protocol::mount::{attach_mount, clone_mount};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::fstatfs;
use oci_spec::runtime::Process;

use super::confined::Make;
use super::control::{Control, Failure, Report, Result};
use super::mounts::check_proc;
use super::rootfs::Rootfs;

const MULTIPLEXER: &str = "/dev/pts/ptmx";
/// linux/magic.h
const DEVPTS_SUPER_MAGIC: libc::c_long = 0x1cd1;

fn open_terminal(control: &Control, process: &Process, rootfs: Option<&Rootfs>) -> io::Result<OwnedFd> {
    let master = open_master(rootfs)?;
    let zero: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int, which lives through the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &zero) })?;
    // Not by its path: what /dev/pts/N is, is the container's business. The flags of TIOCGPTPEER are those of open.
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes a number and answers a new descriptor.
    let slave = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made this descriptor.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    if let Some(size) = process.console_size() {
        let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
        resize(&master, cells(size.width()), cells(size.height()))?;
    }
    // SAFETY: TIOCSCTTY takes a number.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    if let Some(rootfs) = rootfs {
        let console = rootfs.root.ensure(Path::new("/dev/console"), Make::File)?;
        // An image's link may have led there.
        check_proc(&console, false)?;
        attach_mount(clone_mount(&slave, false)?, console)?;
    }
    control.report(&Report::Terminal, &[master.as_fd()]);
    Ok(slave)
}

/// Opens a terminal, makes it this session's, and sends its master to the agent. With `rootfs`, before that has become
/// the root, the terminal is its /dev/console as well (runtime-spec, runtime-linux.md).
pub fn open_for(control: &Control, process: &Process, rootfs: Option<&Rootfs>) -> Result<OwnedFd> {
    open_terminal(control, process, rootfs).map_err(Failure::during("open a terminal"))
}

/// The multiplexer of the container's devpts; of the guest's for a container that has none.
fn open_master(rootfs: Option<&Rootfs>) -> io::Result<OwnedFd> {
    // Whatever lies there, a fifo say, must not block.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let path = Path::new(MULTIPLEXER);
    let Some(rootfs) = rootfs else {
        let master = open(path, flags, Mode::empty())?;
        return if is_devpts(&master) { Ok(master) } else { Err(io::Error::other("/dev/pts is no devpts")) };
    };
    match rootfs.root.open_file(path, flags) {
        Ok(master) if is_devpts(&master) => Ok(master),
        _ => Ok(open(path, flags, Mode::empty())?),
    }
}

fn is_devpts(fd: &OwnedFd) -> bool {
    fstatfs(fd).is_ok_and(|fs| fs.filesystem_type().0 == DEVPTS_SUPER_MAGIC)
}

/// Sets a terminal's size.
pub fn resize(terminal: &impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives through the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) })?;
    Ok(())
}
