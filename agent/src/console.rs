//! Log lines to standard error, which is the guest's console, and the shell on the debug console.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use log::{LevelFilter, Log, Metadata, Record};
use nix::errno::Errno;
use nix::pty;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

use crate::start_error::StartError;
use crate::stream::Stream;
use crate::streams;

struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // One write for the line: lines of the agent and of the kernel do not mix.
            let line = format!("kata-agent: {}: {}\n", record.level(), record.args());
            let _ = nix::unistd::write(std::io::stderr(), line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends log lines up to `level` to standard error.
pub fn start(level: LevelFilter) -> Result<(), StartError> {
    log::set_logger(&Console).map_err(|e| StartError::new("start the log", &e))?;
    log::set_max_level(level);
    Ok(())
}

/// The level that the kernel command line asks for (`agent.log=debug`). Warnings only otherwise: each byte on the
/// console costs an exit from the guest.
pub fn level(command_line: &str) -> LevelFilter {
    let asked = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix("agent.log="));
    asked.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::Warn)
}

const SHELL: &str = "/bin/sh";

/// Gives each connection of the host to the debug console's vsock port a shell on a terminal of its own.
pub async fn serve_shells(port: u32) {
    if !std::path::Path::new(SHELL).exists() {
        log::warn!("debug console: this guest image has no {SHELL}");
        return;
    }
    match listen(port) {
        Ok(listener) => {
            while let Ok((connection, from)) = accept(&listener).await {
                // A container reaches the port by the guest's own address: it would get a shell outside of all
                // containers.
                if from != libc::VMADDR_CID_HOST {
                    log::warn!(
                        "debug console: a connection from context {from}, which is not the host, is refused"
                    );
                } else if let Err(error) = start_shell(connection) {
                    log::warn!("debug console: {error}");
                }
            }
        }
        Err(error) => log::warn!("debug console: listen on vsock port {port}: {error}"),
    }
}

fn listen(port: u32) -> std::io::Result<Stream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    socket::bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    socket::listen(&listener, Backlog::new(4)?)?;
    Stream::new(listener)
}

/// A connection, and the vsock context that it comes from.
async fn accept(listener: &Stream) -> std::io::Result<(Stream, u32)> {
    let accepted =
        listener.when_readable(|fd| Ok(socket::accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?)).await?;
    // SAFETY: accept4 has just made this descriptor and nothing else owns it.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    let from: VsockAddr = socket::getpeername(accepted.as_raw_fd())?;
    Ok((Stream::new(accepted)?, from.cid()))
}

fn start_shell(connection: Stream) -> std::io::Result<()> {
    let terminal = pty::openpty(None, None)?;
    nix::fcntl::fcntl(&terminal.master, nix::fcntl::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    let mut shell = Command::new(SHELL);
    shell
        .arg("-i")
        .env_clear()
        .env("TERM", "linux")
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .current_dir("/");
    shell.stdin(Stdio::from(terminal.slave.try_clone()?));
    shell.stdout(Stdio::from(terminal.slave.try_clone()?)).stderr(Stdio::from(terminal.slave));
    // SAFETY: setsid and ioctl may be called between fork and exec.
    unsafe {
        shell.pre_exec(|| {
            nix::unistd::setsid()?;
            Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            Ok(())
        });
    }
    shell.spawn()?;
    drop(shell);
    let master = Stream::new(terminal.master)?;
    tokio::spawn(streams::join(connection, master));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_sets_the_level() {
        assert_eq!(level("console=hvc0 agent.log=debug quiet"), LevelFilter::Debug);
        assert_eq!(level("console=hvc0"), LevelFilter::Warn);
        assert_eq!(level("agent.log=loud"), LevelFilter::Warn);
    }
}
