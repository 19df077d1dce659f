//! Signals for a program that has only just been started.
//!
//! Who starts a container and stops it at once does not see how far its program has got. Where runtimes run a command
//! for each request, the program has long made itself ready by the time the signal comes. Here it would come before the
//! first instruction: SIGTERM would end a program that is about to handle it, or, for the first process of a pid
//! namespace, would be lost (pid_namespaces(7)), and the container would be killed after its grace period. So the
//! signal waits for a moment until somebody is there to take it.

use std::fs;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

/// How old a program is taken for ready, whatever it does; and how much of that it may have been at work. Loading a
/// program is waiting for the most part, for how long depends on the host.
const GROWN: Duration = Duration::from_secs(10);
/// In clock ticks, which are hundredths of a second (USER_HZ).
const WORK: u64 = 100;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(2);
/// Signals that no program can be ready for, and those that do nothing to one that is not.
const AT_ONCE: [i32; 6] =
    [libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT, libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH];
/// System calls in which a program waits for the file server while it loads what it consists of.
const LOADS: [i64; 15] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_fstat,
    libc::SYS_getdents64,
    // FUSE_FLUSH
    libc::SYS_close,
];

/// Waits until a process that has run its program since `start` can take the signal, `ended` is true, or it has run
/// for [`GROWN`].
pub async fn wait_until_ready(pid: Pid, start: Instant, signal: u32, ended: impl Fn() -> bool) {
    let number = i32::try_from(signal).unwrap_or(0);
    if !(1..=64).contains(&number) || AT_ONCE.contains(&number) {
        return;
    }
    while start.elapsed() < GROWN && !ended() && !is_ready(pid, number) {
        sleep(PAUSE).await;
    }
}

fn is_ready(pid: Pid, signal: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let status = Status::of(&read("status"));
    let is_file = |fd: u64| fs::metadata(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|file| file.is_file());
    let is_idle = || status.sleeps && !loads(&read("syscall"), is_file);
    status.is_gone || status.takes(signal) || is_idle() || work(&read("stat")) >= WORK
}

/// What /proc/PID/status says (proc_pid_status(5)).
#[derive(Debug, PartialEq, Eq)]
struct Status {
    is_gone: bool,
    sleeps: bool,
    /// Signals that are caught, ignored or blocked: bit 0 is signal 1.
    prepared: u64,
}

impl Status {
    fn of(text: &str) -> Self {
        let value = |name: &str| {
            let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            values.next().map(str::trim)
        };
        let set = |name: &str| value(name).and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or(0);
        let state = value("State").and_then(|state| state.chars().next());
        Self {
            is_gone: matches!(state, None | Some('Z' | 'X')),
            sleeps: state == Some('S'),
            prepared: set("SigCgt") | set("SigIgn") | set("SigBlk"),
        }
    }

    fn takes(&self, signal: i32) -> bool {
        (self.prepared >> (signal - 1)) & 1 == 1
    }
}

/// The ticks for which a program has run: utime and stime of proc_pid_stat(5). Its name, before them, may be anything.
fn work(text: &str) -> u64 {
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    rest.split(' ')
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// Whether a process that slept a moment ago and has this in /proc/PID/syscall (proc_pid_syscall(5)) loads something:
/// it names a file, or reads one, or touches memory that has to be read from one, where it is in no system call (-1).
/// If it runs by now, that was what it had waited for.
fn loads(text: &str, is_file: impl Fn(u64) -> bool) -> bool {
    let mut words = text.split_whitespace();
    let Some(first) = words.next() else { return false };
    let Ok(number) = first.parse::<i64>() else { return first == "running" };
    let reads = || {
        let fd = words.next().and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
        [libc::SYS_read, libc::SYS_pread64].contains(&number) && fd.is_some_and(is_file)
    };
    number == -1 || LOADS.contains(&number) || reads()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_ready_when_it_takes_the_signal_or_waits() {
        let status = |state: &str, caught: &str| {
            Status::of(&format!(
                "Name:\tsh\nState:\t{state}\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000004\nSigCgt:\t{caught}\n"
            ))
        };
        let runs = status("R (running)", "0000000000004000");
        assert!(runs.takes(libc::SIGTERM) && runs.takes(libc::SIGQUIT) && !runs.takes(libc::SIGHUP));
        assert!(!runs.sleeps && !runs.is_gone);
        assert!(status("S (sleeping)", "0").sleeps);
        assert!(!status("D (disk sleep)", "0").sleeps);
        assert!(status("Z (zombie)", "0").is_gone && Status::of("").is_gone);
        let loads = |text| loads(text, |fd| fd == 3);
        assert!(loads("257 0xffffff9c 0x7f 0x80000 0x0 0x0 0x0 0x7ffc 0x7f1\n") && loads("59 0x1"));
        assert!(!loads("61 0xffffffffffffffff 0x7ffc 0x0 0x0 0x0 0x0 0x7ffc 0x7f1\n"));
        // Of a file, of standard input, of what is not in memory yet.
        assert!(loads("0 0x3 0x7f 0x340 0x0 0x0 0x0 0x7ffc 0x7f1\n") && !loads("0 0x0 0x7f 0x1"));
        assert!(loads("-1 0x7ffc 0x7f1\n"));
        assert_eq!(work("7 (a) b) R 1 7 7 0 -1 4194304 85 0 0 0 12 30 0 0 20 0 1 0 5 0"), 42);
        assert_eq!((work(""), work("7 (x) R")), (0, 0));
        // It slept when its state was read; now it does not.
        assert!(loads("running\n") && !loads(""));
    }

    #[tokio::test]
    async fn nobody_waits_for_what_is_grown_gone_or_not_to_be_caught() {
        let (own, now) = (nix::unistd::gettid(), Instant::now());
        // This thread runs when it looks, and catches neither.
        wait_until_ready(own, now, libc::SIGKILL.cast_unsigned(), || false).await;
        wait_until_ready(own, now, libc::SIGUSR2.cast_unsigned(), || true).await;
        wait_until_ready(own, now, 0, || false).await;
        wait_until_ready(Pid::from_raw(i32::MAX), now, libc::SIGTERM.cast_unsigned(), || false).await;
        assert!(now.elapsed() < GROWN);
        // What has worked for a while is ready; so is what is old.
        let old = now.checked_sub(GROWN).unwrap();
        wait_until_ready(own, old, libc::SIGUSR2.cast_unsigned(), || false).await;
        assert!(now.elapsed() < GROWN);
    }
}
