//! What code of an attacker could do in a thread of the file server: everything that takes a path and that its filter
//! lets pass, with every descriptor that there is, must end in the share.
//!
//! The devices' descriptors are not here: `tests/tests/e2e/jail.rs` looks at those of a VMM that runs a guest.

use std::ffi::CString;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::null;

use libc::c_long;

use super::*;
use crate::seccomp::{self, Kind};
use crate::virtio::fs::Fs;

/// Stands for a disk that may only be read: a file of the host, opened as the shim does it
/// (shim/src/storage/vmm_files.rs).
const HANDED: RawFd = 100;
const MOST_DESCRIPTORS: RawFd = 512;
/// With every descriptor of a directory, with each as the working directory, and with none.
const NAMES: &[&CStr] = &[
    c"",
    c".",
    c"..",
    c"../..",
    c"../../..",
    c"../mem",
    c"../root",
    c"../cwd",
    c"../exe",
    c"../maps",
    c"../environ",
    c"../status",
    c"../ns/mnt",
    c"../fd",
    c"../task",
    c"../map_files",
    c"../oom_score_adj",
    c"../../sys/kernel/core_pattern",
    c"../../sysrq-trigger",
    c"../../1/root",
    c"../../self/mem",
    c"../../thread-self/mem",
    c"../../etc/passwd",
    c"../../../../../../../../proc/self/mem",
    c"../../../../../../../../etc/passwd",
    c"/proc/self/mem",
    c"/proc/sys/kernel/core_pattern",
    c"/sys/kernel",
    c"/dev/null",
    c"/dev/kvm",
    c"/etc/passwd",
    c"/../etc/passwd",
    c"/marker",
    c"/later/hello",
    c"/later/../../etc/passwd",
    c"/link0",
    c"/link1",
    c"/link2",
    c"/link3",
    c"/link4",
];
/// What links in the share lead to.
const TARGETS: [&CStr; 5] =
    [c"/proc/self/fd/100", c"/proc/1/root/etc/passwd", c"../../../../etc/passwd", c"/dev/kvm", c"/.."];

/// Called before the jail: what the shim hands over.
pub fn hand_over() {
    let path = format!("/tmp/katana-escape-{}", std::process::id());
    fs::write(&path, "outside").unwrap();
    let mount = copy_mount(Path::new(&path), false).unwrap();
    let file = File::open(format!("/proc/self/fd/{}", mount.as_raw_fd())).unwrap();
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV,
        ..MountAttributes::default()
    };
    set_mount(&mount, &attributes, false).unwrap();
    fs::remove_file(&path).unwrap();
    // SAFETY: the number is free.
    Errno::result(unsafe { libc::dup3(file.as_raw_fd(), HANDED, libc::O_CLOEXEC) }).unwrap();
}

/// Device and inode.
type Identity = (u64, u64);

struct Attempt {
    /// The file systems in the share.
    share: Vec<u64>,
    /// The directory of the descriptors.
    own: Identity,
    /// What there are descriptors of.
    held: Vec<(RawFd, Identity)>,
    escapes: Vec<String>,
}

fn stat(directory: RawFd, name: &CStr, flags: c_int) -> Option<libc::stat> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the string is one, and the kernel fills in the structure or fails.
    let result = unsafe { libc::fstatat(directory, name.as_ptr(), status.as_mut_ptr(), flags) };
    // SAFETY: it did not fail.
    (result == 0).then(|| unsafe { status.assume_init() })
}

fn identity(fd: RawFd) -> Option<Identity> {
    stat(fd, c"", libc::AT_EMPTY_PATH).map(|status| (status.st_dev, status.st_ino))
}

/// A system call with up to five arguments.
fn call(number: c_long, arguments: [c_long; 5]) -> Option<RawFd> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: what is called here reads strings and structures that outlive the call, and writes to buffers of their
    // size.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    RawFd::try_from(result).ok().filter(|result| *result >= 0)
}

fn at(text: &CStr) -> c_long {
    text.as_ptr() as c_long
}

impl Attempt {
    fn new(jail: &Jail) -> Self {
        let share = [c"/", c"/later"].map(|path| stat(libc::AT_FDCWD, path, 0).unwrap().st_dev).to_vec();
        let held = (0..MOST_DESCRIPTORS).filter_map(|fd| Some((fd, identity(fd)?))).collect();
        Self { share, own: identity(jail.proc_self_fd.as_raw_fd()).unwrap(), held, escapes: Vec::new() }
    }

    fn in_share(&self, (device, _): Identity) -> bool {
        self.share.contains(&device)
    }

    /// Pipes and the like have no place where they could be found, so they are this process's own.
    fn is_nowhere(fd: RawFd) -> bool {
        const PIPEFS: libc::__fsword_t = 0x5049_5045;
        const ANON_INODE: libc::__fsword_t = 0x0904_1934;
        let mut status = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the kernel fills in the structure or fails.
        let result = unsafe { libc::fstatfs(fd, status.as_mut_ptr()) };
        // SAFETY: it did not fail.
        result == 0 && [PIPEFS, ANON_INODE].contains(&unsafe { status.assume_init() }.f_type)
    }

    /// What was opened: it may be in the share, or a descriptor's link, or what there is a descriptor of, as long as it
    /// is a mere place or `read_only` like that one.
    fn judge(&mut self, what: &str, opened: RawFd, read_only: bool) {
        let Some(status) = stat(opened, c"", libc::AT_EMPTY_PATH) else { return };
        let fine = self.is_fine(&status) || Self::is_nowhere(opened) || self.is_known(&status) && read_only;
        if !fine {
            self.escapes.push(format!("{what}: opened {:?}", (status.st_dev, status.st_ino)));
        }
    }

    fn is_known(&self, status: &libc::stat) -> bool {
        let found = (status.st_dev, status.st_ino);
        self.is_fine(status) || self.held.iter().any(|(_, held)| *held == found)
    }

    fn is_fine(&self, status: &libc::stat) -> bool {
        let found = (status.st_dev, status.st_ino);
        let link = found.0 == self.own.0 && status.st_mode & libc::S_IFMT == libc::S_IFLNK;
        self.in_share(found) || found == self.own || link
    }

    fn open(&mut self, directory: RawFd, name: &CStr) {
        let common = libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY;
        for flags in [
            libc::O_PATH,
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDONLY | libc::O_DIRECTORY,
            libc::O_RDWR | libc::O_TMPFILE,
            libc::O_RDWR | libc::O_CREAT,
        ] {
            let what = format!("open {directory} {name:?} {flags:#o}");
            let read_only = flags & libc::O_ACCMODE == libc::O_RDONLY;
            let flags = flags | common;
            let simple = call(libc::SYS_openat, [directory.into(), at(name), flags.into(), 0o600, 0]);
            let resolved = [0, libc::RESOLVE_IN_ROOT, libc::RESOLVE_NO_XDEV].map(|resolve| {
                let mode = if flags & (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) != 0 {
                    0o600
                } else {
                    0
                };
                let how = [flags as u64, mode, resolve];
                let size = size_of_val(&how) as c_long;
                call(libc::SYS_openat2, [directory.into(), at(name), how.as_ptr() as c_long, size, 0])
            });
            for opened in [simple].into_iter().chain(resolved).flatten() {
                self.judge(&what, opened, read_only);
                // SAFETY: a descriptor of this function's own.
                drop(unsafe { OwnedFd::from_raw_fd(opened) });
            }
        }
    }

    /// Changes what is there, which is fine in the share only.
    fn change(&mut self, directory: RawFd, name: &CStr) {
        let here = c_long::from(directory);
        let (planted, size) = (at(c"/planted"), c_long::from(8));
        let there = stat(directory, name, libc::AT_EMPTY_PATH)
            .or_else(|| stat(directory, name, libc::AT_SYMLINK_NOFOLLOW));
        let inside = there.is_none_or(|there| self.in_share((there.st_dev, there.st_ino)));
        let mut attempts = vec![
            ("link", libc::SYS_linkat, [here, at(name), libc::AT_FDCWD.into(), planted, 0]),
            (
                "link what it leads to",
                libc::SYS_linkat,
                [here, at(name), libc::AT_FDCWD.into(), planted, libc::AT_SYMLINK_FOLLOW.into()],
            ),
            (
                "link what is open",
                libc::SYS_linkat,
                [here, at(name), libc::AT_FDCWD.into(), planted, libc::AT_EMPTY_PATH.into()],
            ),
        ];
        // What is reached beyond, `open` has noted. To change that is not tried: it is somebody's.
        let ours = there.is_some_and(|there| self.is_known(&there));
        if !inside && ours {
            attempts.extend([
                ("chmod", libc::SYS_fchmodat, [here, at(name), 0o644, 0, 0]),
                ("chown", libc::SYS_fchownat, [here, at(name), 0, 0, libc::AT_EMPTY_PATH.into()]),
                ("touch", libc::SYS_utimensat, [here, at(name), 0, 0, 0]),
                ("unlink", libc::SYS_unlinkat, [here, at(name), 0, 0, 0]),
                ("rmdir", libc::SYS_unlinkat, [here, at(name), libc::AT_REMOVEDIR.into(), 0, 0]),
                ("rename", libc::SYS_renameat, [here, at(name), libc::AT_FDCWD.into(), planted, 0]),
                ("rename2", libc::SYS_renameat2, [here, at(name), libc::AT_FDCWD.into(), planted, 0]),
                ("mkdir", libc::SYS_mkdirat, [here, at(name), 0o700, 0, 0]),
            ]);
            if directory == libc::AT_FDCWD {
                let attribute = at(c"user.planted");
                attempts.extend([
                    ("set attribute", libc::SYS_setxattr, [at(name), attribute, planted, size, 0]),
                    ("remove attribute", libc::SYS_removexattr, [at(name), attribute, 0, 0, 0]),
                ]);
            }
        }
        for (what, number, arguments) in attempts {
            if call(number, arguments).is_none() {
                continue;
            }
            let linked = stat(libc::AT_FDCWD, c"/planted", libc::AT_SYMLINK_NOFOLLOW);
            let fine = linked.is_some_and(|linked| self.in_share((linked.st_dev, linked.st_ino))) && inside;
            // A pipe has a mode as well.
            if !fine && !self.nowhere(directory, name) {
                self.escapes.push(format!("{what} {directory} {name:?}"));
            }
            call(libc::SYS_unlinkat, [libc::AT_FDCWD.into(), planted, 0, 0, 0]);
        }
    }

    fn nowhere(&self, directory: RawFd, name: &CStr) -> bool {
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        let opened = call(libc::SYS_openat, [directory.into(), at(name), flags.into(), 0, 0]);
        // SAFETY: a descriptor of this function's own.
        let opened = opened.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let held = if name.is_empty() { Some(directory) } else { opened.as_ref().map(AsRawFd::as_raw_fd) };
        held.is_some_and(Self::is_nowhere)
    }

    /// Makes something there, which only works in the share, and devices nowhere.
    fn make(&mut self, directory: RawFd, below: &CStr) {
        let name = CString::new([below.to_bytes(), b"/planted"].concat()).unwrap();
        let name = if below.is_empty() { c"planted".to_owned() } else { name };
        let (here, path) = (c_long::from(directory), at(&name));
        let device = libc::makedev(1, 1) as c_long;
        for (what, number, arguments, never) in [
            ("directory", libc::SYS_mkdirat, [here, path, 0o700, 0, 0], false),
            ("file", libc::SYS_mknodat, [here, path, (libc::S_IFREG | 0o600).into(), 0, 0], false),
            ("fifo", libc::SYS_mknodat, [here, path, (libc::S_IFIFO | 0o600).into(), 0, 0], false),
            ("symlink", libc::SYS_symlinkat, [at(c"/"), here, path, 0, 0], false),
            (
                "character device",
                libc::SYS_mknodat,
                [here, path, (libc::S_IFCHR | 0o600).into(), device, 0],
                true,
            ),
            (
                "block device",
                libc::SYS_mknodat,
                [here, path, (libc::S_IFBLK | 0o600).into(), device, 0],
                true,
            ),
        ] {
            if call(number, arguments).is_none() {
                continue;
            }
            let made = stat(directory, &name, libc::AT_SYMLINK_NOFOLLOW);
            if never || !made.is_some_and(|made| self.in_share((made.st_dev, made.st_ino))) {
                self.escapes.push(format!("made a {what} at {directory} {name:?}"));
            }
            for flags in [0, libc::AT_REMOVEDIR] {
                call(libc::SYS_unlinkat, [here, path, flags.into(), 0, 0]);
            }
        }
    }

    /// Looks at what is there.
    fn look(&mut self, directory: RawFd, name: &CStr) {
        let mut buffer = [0_u8; 256];
        for flags in [0, libc::AT_SYMLINK_NOFOLLOW, libc::AT_EMPTY_PATH] {
            let Some(status) = stat(directory, name, flags) else { continue };
            let found = (status.st_dev, status.st_ino);
            let fine = self.is_known(&status);
            if !fine {
                self.escapes.push(format!("stat {directory} {name:?}: {found:?}"));
            }
        }
        if stat(directory, name, libc::AT_SYMLINK_NOFOLLOW).is_some() {
            return;
        }
        let room = buffer.as_mut_ptr() as c_long;
        let extended = [0_u8; 256];
        let (size, statx) = (buffer.len() as c_long, extended.as_ptr() as c_long);
        for (what, number, arguments) in [
            ("readlink", libc::SYS_readlinkat, [directory.into(), at(name), room, size, 0]),
            ("statx", libc::SYS_statx, [directory.into(), at(name), 0, 0x7ff, statx]),
        ] {
            // An empty name is the descriptor itself.
            if !name.is_empty() && call(number, arguments).is_some() {
                self.escapes.push(format!("{what} {directory} {name:?}, which is not there"));
            }
        }
        if directory == libc::AT_FDCWD {
            for (what, number, arguments) in [
                ("attribute", libc::SYS_getxattr, [at(name), at(c"user.x"), room, size, 0]),
                ("attributes", libc::SYS_listxattr, [at(name), room, size, 0, 0]),
            ] {
                if call(number, arguments).is_some() {
                    self.escapes.push(format!("{what} of {name:?}, which is not there"));
                }
            }
        }
    }

    fn with(&mut self, directory: RawFd, name: &CStr) {
        self.open(directory, name);
        self.look(directory, name);
        self.change(directory, name);
        self.make(directory, name);
    }

    /// What can be done to the file that was handed over, without any path.
    fn touch_handed(&mut self) {
        let (fd, text) = (c_long::from(HANDED), at(c"planted"));
        const SET_FLAGS: c_long = 0x4008_6602;
        let flags = [0_u64; 4];
        for (what, number, arguments) in [
            ("write", libc::SYS_write, [fd, text, 7, 0, 0]),
            ("pwrite", libc::SYS_pwrite64, [fd, text, 7, 0, 0]),
            ("truncate", libc::SYS_ftruncate, [fd, 0, 0, 0, 0]),
            ("allocate", libc::SYS_fallocate, [fd, 0, 0, 4096, 0]),
            ("chmod", libc::SYS_fchmod, [fd, 0o4777, 0, 0, 0]),
            ("chown", libc::SYS_fchownat, [fd, at(c""), 1, 1, libc::AT_EMPTY_PATH.into()]),
            ("touch", libc::SYS_utimensat, [fd, 0, 0, 0, 0]),
            ("set attribute", libc::SYS_fsetxattr, [fd, at(c"user.planted"), text, 7, 0]),
            ("remove attribute", libc::SYS_fremovexattr, [fd, at(c"user.planted"), 0, 0, 0]),
            ("set flags", libc::SYS_ioctl, [fd, SET_FLAGS, flags.as_ptr() as c_long, 0, 0]),
        ] {
            if call(number, arguments).is_some() {
                self.escapes.push(format!("{what} of what was handed over"));
            }
        }
    }

    fn everything(&mut self) {
        for (number, target) in (0..).zip(TARGETS) {
            let link = CString::new(format!("/link{number}")).unwrap();
            call(libc::SYS_symlinkat, [at(target), libc::AT_FDCWD.into(), at(&link), 0, 0]);
        }
        self.touch_handed();
        let mut names: Vec<CString> = NAMES.iter().map(|name| (*name).to_owned()).collect();
        let held: Vec<RawFd> = self.held.iter().map(|(fd, _)| *fd).collect();
        for fd in &held {
            let below = ["", "/..", "/../..", "/../../sys/kernel/core_pattern", "/../mem"];
            names.extend(below.map(|below| CString::new(format!("{fd}{below}")).unwrap()));
        }
        for directory in held.iter().copied().chain([libc::AT_FDCWD]) {
            names.iter().for_each(|name| self.with(directory, name));
        }
        for directory in held {
            if call(libc::SYS_fchdir, [directory.into(), 0, 0, 0, 0]).is_some() {
                names.iter().for_each(|name| self.with(libc::AT_FDCWD, name));
            }
        }
    }
}

/// What this process has beyond what a VMM would have: the ends of the pipes to the test are pipes, which a VMM has as
/// well.
fn as_file_thread(jail: &Jail) -> Result<(), String> {
    let server =
        Fs::new("share", jail.proc_self_fd.try_clone().unwrap()).map_err(|error| error.to_string())?;
    let mut attempt = Attempt::new(jail);
    same("what was handed over", attempt.held.iter().any(|(fd, _)| *fd == HANDED), true)?;
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        seccomp::install(Kind::Fs).unwrap();
        attempt.everything();
        attempt.escapes
    });
    let escapes = thread.join().map_err(|_| "the thread has panicked")?;
    drop(server);
    // SAFETY: the descriptor is open.
    let handed = unsafe { BorrowedFd::borrow_raw(HANDED) };
    let mut text = [0; 8];
    let length = nix::sys::uio::pread(handed, &mut text, 0).unwrap_or(0);
    same("what was handed over", &text[..length], b"outside")?;
    if escapes.is_empty() { Ok(()) } else { Err(escapes.join("\n")) }
}

#[test]
fn code_in_a_file_thread_stays_in_the_share() {
    assert_eq!(in_jail(as_file_thread).unwrap_or_default(), "");
}

/// Past the test runner, for tests/all to count.
fn say_skipped(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}

/// Landlock's part: not even as it is.
#[test]
fn what_was_handed_over_cannot_be_opened_anew() {
    // SAFETY: this asks for the version; nothing is read.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, null::<u8>(), 0, 1) };
    if version < 2 {
        return say_skipped("this kernel has no Landlock");
    }
    let findings = in_jail(|jail| {
        let name = HANDED.to_string();
        let opened = openat(&jail.proc_self_fd, name.as_str(), OFlag::O_RDONLY, Mode::empty());
        same("opened", opened.err(), Some(Errno::EACCES))?;
        // Within the share, all is as it was.
        fs::create_dir_all("/later/one").unwrap();
        fs::rename("/later/hello", "/later/one/hello").map_err(|error| format!("rename: {error}"))?;
        fs::hard_link("/later/one/hello", "/later/hello").map_err(|error| format!("link: {error}"))?;
        let none = Mode::from_bits_truncate(0o600);
        mknod("/later/whiteout", SFlag::S_IFCHR, none, 0).map_err(|error| format!("whiteout: {error}"))
    });
    assert_eq!(findings.unwrap_or_default(), "");
}
