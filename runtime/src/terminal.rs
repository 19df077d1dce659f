//! The terminal that this program runs on, while a process in a guest has another one in its place.

use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;

use katana_protocol::manage::exec::Size;
use nix::errno::Errno;
use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The size of a terminal that nobody sees.
const USUAL: Size = Size { columns: 80, rows: 24 };

/// Whether somebody types and reads.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Its size.
pub fn size() -> Size {
    // SAFETY: winsize is plain data; all zeroes is a valid value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes into the winsize, which lives through the call.
    let asked = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    match Errno::result(asked) {
        Ok(_) if size.ws_col > 0 && size.ws_row > 0 => Size { columns: size.ws_col, rows: size.ws_row },
        _ => USUAL,
    }
}

/// Every key goes to the process, be it Ctrl-C, until this is dropped.
pub struct Raw(Option<Termios>);

impl Raw {
    /// Does nothing where standard input is no terminal.
    pub fn begin() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}
