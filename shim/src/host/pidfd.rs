//! Processes by descriptor: a pid alone may have become another process's by the time it is signalled.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use katana_protocol::kernel;
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// A process as it can be written down: its pid and, against reuse of the pid, the time of its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// Start time in clock ticks after boot: field 22 of /proc/PID/stat, proc(5).
    pub start: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start = start_time(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, start })
    }

    /// The same, if it is a child of this process.
    pub fn of_child(pid: i32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start = start_time(&stat).ok_or(io::ErrorKind::InvalidData)?;
        let is_child = field::<u32>(&stat, 4) == Some(std::process::id());
        if is_child { Ok(Self { pid, start }) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }
}

fn start_time(stat: &str) -> Option<u64> {
    field(stat, 22)
}

/// A field by its number in proc(5), from the third on. The command's name, the second, stands in parentheses and may
/// hold anything, so count behind the last one.
fn field<T: std::str::FromStr>(stat: &str, number: usize) -> Option<T> {
    stat.rsplit_once(") ")?.1.split(' ').nth(number.checked_sub(3)?)?.parse().ok()
}

/// The id of a process's thread that has this id in its own pid namespace.
pub fn thread(process: i32, inner: i32) -> io::Result<u32> {
    for entry in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let path = entry?.path();
        // Threads come and go meanwhile.
        let Ok(status) = std::fs::read_to_string(path.join("status")) else { continue };
        if innermost(&status) == Some(inner) {
            let id = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            return id.ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The last of the ids that stand behind `NSpid`, proc(5).
fn innermost(status: &str) -> Option<i32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().next_back()?.parse().ok()
}

/// A process.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has this pid now.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = Errno::result(fd).map_err(|e| kernel::PIDFD_OPEN.explain(e))?;
        let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A child that has just been started. When there is no descriptor for it, nobody could wait for it: it is killed
    /// and reaped.
    pub fn of_child(child: &mut Child) -> io::Result<Self> {
        let opened =
            i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData.into()).and_then(Self::open);
        if opened.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        opened
    }

    /// The process that was written down, if it still lives.
    pub fn find(id: &ProcessId) -> Option<Self> {
        Self::look_up(id).ok().flatten()
    }

    /// The same, where it matters that this cannot be found out without a free descriptor.
    pub fn look_up(id: &ProcessId) -> io::Result<Option<Self>> {
        // EINVAL and ENOENT: it is the id of another one's thread by now.
        let is_gone =
            |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL | libc::ENOENT));
        let process = match Self::open(id.pid) {
            Err(e) if is_gone(&e) => return Ok(None),
            opened => opened?,
        };
        // Looked up after the descriptor is open, so it is this very process or the descriptor is dropped.
        match ProcessId::of(id.pid) {
            Err(e) if is_gone(&e) => Ok(None),
            found => Ok((found? == *id).then_some(process)),
        }
    }

    /// Kills it.
    pub fn kill(&self) {
        // SAFETY: pidfd_send_signal takes a descriptor, a number, no siginfo and no flags.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, 0, 0);
        }
    }

    /// Waits for the process to end; false when it has not in time. Blocks.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let timeout = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: one pollfd that outlives the call.
            match Errno::result(unsafe { libc::poll(&raw mut poll, 1, timeout) }) {
                Err(Errno::EINTR) if !left.is_zero() => {}
                Ok(ready) => return ready > 0,
                Err(_) => return false,
            }
        }
    }

    /// Waits for the process to end.
    pub async fn ended(&self) -> io::Result<()> {
        // SAFETY: the borrowed descriptor stays open and the same for as long as this future borrows it.
        let fd = unsafe { AsyncFd::register_with_interest(self.0.as_fd(), tokio::io::Interest::READABLE) }?;
        fd.readable().await?.retain_ready();
        Ok(())
    }

    /// Takes the exit status of a child that has ended, once.
    pub fn reap(&self) -> Option<WaitStatus> {
        waitid(Id::PIDFd(self.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).ok()
    }
}

/// A descriptor that is known to be one of a process.
impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_start_time_stands_behind_any_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time("7 (a"), None);
        assert_eq!(start_time("7 (a) S 1"), None);
    }

    #[test]
    fn a_thread_is_found_by_its_id_in_its_own_namespace() {
        assert_eq!(innermost("Name:\tx\nNSpid:\t4711\t12\t7\nNSpgid:\t1\n"), Some(7));
        assert_eq!(innermost("Name:\tx\n"), None);
        let own = std::process::id() as i32;
        let here = nix::unistd::gettid().as_raw();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert_eq!(thread(own, innermost(&status).unwrap()).unwrap(), here as u32);
        // Another process's.
        let error = thread(own, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_error_on_an_older_kernel_names_what_it_lacks() {
        use without::without;
        mod without {
            include!("../../../protocol/src/kernel/without.rs");
        }
        let error = without("pidfd_open", || PidFd::open(1)).unwrap_err().to_string();
        assert!(error.contains("has no pidfd_open(2), which came with Linux 5.3, or"), "{error}");
    }

    #[test]
    fn only_the_process_that_was_written_down_is_found() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        assert!(PidFd::find(&ProcessId { start: id.start + 1, ..id }).is_none());
        let process = PidFd::find(&id).unwrap();
        assert!(!process.wait(Duration::from_millis(10)));
        process.kill();
        assert!(process.wait(Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(PidFd::look_up(&id).unwrap().is_none());
    }
}
