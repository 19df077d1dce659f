//! A command on a terminal: a pseudoterminal whose master end the test holds.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

use nix::pty::{Winsize, openpty};

use crate::command::{Capture, Command, Output, Running};

/// A command that runs on a terminal.
pub struct Terminal {
    master: File,
    running: Running,
}

impl Terminal {
    /// Starts a command in a session of its own on a new terminal of this size.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(command: &Command, rows: u16, columns: u16) -> Self {
        let pair = openpty(&size(rows, columns), None).expect("a pseudoterminal");
        let master = File::from(pair.master);
        // Only the child may hold the other end, or the master never reads the end. Another command that is being
        // started at this moment would inherit it without this flag.
        set_close_on_exec(&pair.slave);
        set_close_on_exec(&master);
        let mut child = command.prepare();
        let slave = || pair.slave.try_clone().expect("the terminal's descriptor");
        child.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing else happens between fork and exec.
        unsafe {
            child.pre_exec(|| {
                nix::unistd::setsid()?;
                let result = libc::ioctl(0, libc::TIOCSCTTY, 0);
                if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        let child = child.spawn().unwrap_or_else(|e| panic!("{}: {e}", command.line()));
        let output = Capture::of(master.try_clone().expect("the terminal's descriptor"));
        let running = Running::new(command.line(), child, output, Capture::closed());
        Self { master, running }
    }

    /// Changes the terminal's size; the kernel notifies the command by SIGWINCH.
    ///
    /// # Panics
    /// When the terminal does not let us.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = size(rows, columns);
        // SAFETY: the descriptor is a terminal's, and the structure lives through the call.
        let result = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert!(result == 0, "TIOCSWINSZ: {}", std::io::Error::last_os_error());
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_keys(&self, keys: &str) {
        (&self.master).write_all(keys.as_bytes()).expect("write to the terminal");
    }

    /// The command, to watch its output.
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Waits for the command's end.
    #[track_caller]
    pub fn finish(self) -> Output {
        self.running.finish()
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn set_close_on_exec(fd: &impl AsRawFd) {
    // SAFETY: the descriptor is open: its owner is borrowed.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
}
