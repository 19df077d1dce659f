//! The jail as a process in it sees it. Each test forks: the jail is for a process with one thread.

mod escape;

use super::*;
use nix::errno::Errno;
use nix::fcntl::{open, openat};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, Uid, dup2_stderr, fork, getpid};
use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use vmm_sys_util::tempdir::TempDir;
use without::without;

mod without {
    include!("../../../protocol/src/kernel/without.rs");
}

type Check = fn(&Jail) -> Result<(), String>;

#[allow(clippy::needless_pass_by_value, reason = "most are literals")]
fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<(), String> {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:?}, not {should:?}")) }
}

/// Runs `check` in a jail whose root is a file system with the file `marker`, and with a file system that was
/// mounted at `later` afterwards. Answers what it found wrong.
fn in_jail(check: Check) -> Option<String> {
    assert!(Uid::effective().is_root(), "only root can map all ids: these tests have to run as root");
    let share = TempDir::new().unwrap();
    let (report, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    // SAFETY: the child only makes system calls and allocates, which fork leaves possible.
    let outer = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop(report);
            let code = outside(share.as_path(), File::from(writer), check);
            // SAFETY: _exit does not come back.
            unsafe { libc::_exit(code) }
        }
    };
    drop(writer);
    let mut text = String::new();
    File::from(report).read_to_string(&mut text).unwrap();
    let outer = waitpid(outer, None).unwrap();
    assert!(matches!(outer, WaitStatus::Exited(_, 0)), "{outer:?}: {text}");
    let (pid, findings) = text.split_once(':').unwrap();
    // That this works at all is part of the test: the jailed process is a child of its maker's parent.
    let inner = waitpid(Pid::from_raw(pid.parse().unwrap()), None).unwrap();
    let findings = findings.strip_suffix(';').unwrap_or_else(|| panic!("{inner:?}: {findings}"));
    Some(findings.to_owned())
}

fn outside(share: &Path, mut writer: File, check: Check) -> i32 {
    let none: Option<&CStr> = None;
    // Nothing of this is to be seen by the rest of the machine. The network is the one that the shim has made.
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(none, share, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let later = share.join("later");
    fs::create_dir(&later).unwrap();
    fs::write(share.join("marker"), "here").unwrap();

    let directory = copy_mount(share, false).unwrap();
    stand_alone(&[writer.as_raw_fd(), directory.as_raw_fd()]);
    let (mounted, say_mounted) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (done, say_done) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let announced = writer.try_clone().unwrap();
    let jailed = std::sync::Mutex::new(0);
    let announce = |pid: i32| {
        *jailed.lock().unwrap() = pid;
        write!(&announced, "{pid}:")
    };
    let (entered, say_entered) = pipe2(OFlag::O_CLOEXEC).unwrap();
    match enter(&directory, None, announce).unwrap() {
        Side::Outside => {
            let mut listened = [0];
            read(&entered, &mut listened).unwrap();
            // As the shim does it: made here, mounted there.
            mount(none, &later, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            fs::write(later.join("hello"), "from outside").unwrap();
            let pid = *jailed.lock().unwrap();
            fs::copy(format!("/proc/{pid}/status"), later.join("status")).unwrap();
            let made = copy_mount(&later, false).unwrap();
            setns(File::open(format!("/proc/{pid}/ns/mnt")).unwrap(), CloneFlags::CLONE_NEWNS).unwrap();
            attach_mount_at(&made, Path::new("/later")).unwrap();
            drop((say_mounted, say_done));
            let _ = read(&done, &mut [0]);
        }
        Side::Inside(jail) => {
            write(&say_entered, &[1]).unwrap();
            drop(say_mounted);
            let _ = read(&mounted, &mut [0]);
            // Who dies on the way has not said that all is well.
            let finding = check(&jail).err().unwrap_or_default();
            writer.write_all(format!("{finding};").as_bytes()).unwrap();
            drop(say_done);
        }
    }
    0
}

/// Closes what the test runner has open but for these, as the VMM closes what the shim has; gives this process the
/// standard streams of a VMM; and opens what the shim hands over, see [`escape`].
fn stand_alone(kept: &[c_int]) {
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let mut first = 3;
    for next in kept.into_iter().chain([c_int::MAX]) {
        if first < next {
            // SAFETY: nothing in this process uses what is closed here: it is a copy that only runs this test.
            unsafe { libc::close_range(first as libc::c_uint, (next - 1) as libc::c_uint, 0) };
        }
        first = next.saturating_add(1);
    }
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    dup2_stdin(&null).unwrap();
    dup2_stdout(&null).unwrap();
    // The shim reads what a VMM says from a pipe. Nobody reads this one.
    let (_, errors) = pipe2(OFlag::O_CLOEXEC).unwrap();
    dup2_stderr(&errors).unwrap();
    escape::hand_over();
}

/// netdevice(7)
fn raise_loopback() -> Result<(), Errno> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: struct ifreq holds plain integers and pointers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&b"lo".map(|byte| byte as libc::c_char));
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the call reads a struct ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .map(drop)
}

#[test]
fn the_share_is_all_there_is() {
    let findings = in_jail(|_| {
        let mut names: Vec<_> = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        same("names in /", names, vec!["later".into(), "marker".into()])?;
        let inode = |path| fs::metadata(path).unwrap().ino();
        same("/..", inode("/.."), inode("/"))?;
        same("working directory", inode("."), inode("/"))?;
        same("pid", getpid().as_raw(), 1)
    });
    assert_eq!(findings.unwrap_or_default(), "");
}

#[test]
fn what_the_shim_mounts_later_appears_and_owners_can_be_given() {
    let findings = in_jail(|_| {
        same("later mount", fs::read_to_string("/later/hello").unwrap(), "from outside".to_owned())?;
        for path in ["/marker", "/later/hello"] {
            chown(path, Some(1234), Some(5678)).map_err(|error| format!("chown {path}: {error}"))?;
            let metadata = fs::metadata(path).unwrap();
            same(path, (metadata.uid(), metadata.gid()), (1234, 5678))?;
        }
        Ok(())
    });
    assert_eq!(findings.unwrap_or_default(), "");
}

#[test]
fn files_can_be_opened_anew_without_a_proc() {
    let findings = in_jail(|jail| {
        let path = open("/marker", OFlag::O_PATH, Mode::empty()).unwrap();
        let name = path.as_raw_fd().to_string();
        let opened = openat(&jail.proc_self_fd, name.as_str(), OFlag::O_RDONLY, Mode::empty());
        let mut text = String::new();
        File::from(opened.map_err(|error| error.to_string())?).read_to_string(&mut text).unwrap();
        same("content", text, "here".to_owned())
    });
    assert_eq!(findings.unwrap_or_default(), "");
}

#[test]
fn descriptors_have_room_before_there_are_threads() {
    let findings = in_jail(|_| {
        let text = fs::read_to_string("/later/status").unwrap();
        let size = text.lines().find_map(|line| line.strip_prefix("FDSize:")).map(str::trim);
        same("size of the table", size, Some("512"))
    });
    assert_eq!(findings.unwrap_or_default(), "");
}

#[test]
fn nothing_privileged_is_left() {
    let findings = in_jail(|_| {
        let none: Option<&CStr> = None;
        let mode = Mode::from_bits_truncate(0o600);
        same("a device node", mknod("/null", SFlag::S_IFCHR, mode, libc::makedev(1, 3)), Err(Errno::EPERM))?;
        same("a mount", mount(none, "/later", Some("tmpfs"), MsFlags::empty(), none), Err(Errno::EPERM))?;
        // SAFETY: the name is a constant of one byte.
        same("the host name", unsafe { libc::sethostname(c"x".as_ptr(), 1) }, -1)?;
        same("a mount namespace", unshare(CloneFlags::CLONE_NEWNS), Err(Errno::EPERM))?;
        // SAFETY: this one takes no pointers.
        let no_new_privs = unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) };
        same("no new privileges", no_new_privs, 1)?;
        same("core files", getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0))?;
        same("a network namespace", unshare(CloneFlags::CLONE_NEWNET), Err(Errno::EPERM))?;
        same("a change of the network", raise_loopback(), Err(Errno::EPERM))
    });
    assert_eq!(findings.unwrap_or_default(), "");
}

#[test]
fn the_error_names_what_an_older_kernel_lacks() {
    let error = without("clone3", || clone(None)).unwrap_err().to_string();
    let expected = "jail: new namespaces: this host's kernel has no clone3(2), which came with Linux 5.7, or";
    assert!(error.starts_with(expected), "{error}");
    let error = without("close_range", crate::close_strangers).unwrap_err().to_string();
    assert!(error.contains("close_range(2), which came with Linux 5.9"), "{error}");
    for name in ["open_tree", "mount_setattr"] {
        let error = without(name, own_descriptors).unwrap_err().to_string();
        assert!(error.contains(&format!("has no {name}(2)")), "{error}");
    }
}
