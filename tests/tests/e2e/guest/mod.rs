//! Checks that run inside a container. Other tests bind this program into one and run the ignored tests of a module
//! here in it. All of them work in a directory of their own below `$KATANA_CHECK_DIRECTORY`.

pub mod acls;
pub mod attributes;
mod contents;
mod files;
mod huge_pages;
mod inodes;
mod locks;
mod many;
mod names;
mod permissions;
mod seccomp;
mod sockets;
mod special_bits;
mod unnamed;
mod vsock;
mod watch;

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use katana_tests::{Output, Run};

/// Where containers find this program.
pub const PROGRAM: &str = "/check";
const DIRECTORY: &str = "KATANA_CHECK_DIRECTORY";

/// A container with this program in it.
pub fn mounted(run: Run) -> Run {
    run.bind(&std::env::current_exe().expect("the path of this program"), PROGRAM, "ro")
}

/// The command that runs the checks of some modules in the container. Checks change the umask and the working
/// directory, which threads share.
pub fn command(modules: &str, directory: &str) -> Vec<String> {
    let variable = format!("{DIRECTORY}={directory}");
    let fixed = ["env", &variable, PROGRAM, "--ignored", "--test-threads=1"];
    fixed.into_iter().chain(modules.split(' ')).map(str::to_owned).collect()
}

/// Fails the test unless there were checks, and all passed.
#[track_caller]
pub fn expect_passed(output: Output) {
    let output = output.ok();
    let passed = output.text().contains("test result: ok.") && !output.text().contains("running 0 tests");
    assert!(passed, "no check ran\n{output}");
}

/// Who does something.
#[derive(Debug, Clone, Copy)]
struct User {
    id: u32,
    group: u32,
    others: &'static [u32],
}

const ROOT: User = User { id: 0, group: 0, others: &[] };
/// Owns most files here.
const OWNER: User = User { id: 1001, group: 2001, others: &[2002] };
/// Is in the files' group.
const MEMBER: User = User { id: 1002, group: 2003, others: &[2001] };
const STRANGER: User = User { id: 1003, group: 2003, others: &[] };

impl User {
    /// Does something as this user, in a thread: to the kernel, credentials are a thread's.
    fn does<T: Send>(self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                self.become_this_thread();
                work()
            });
            thread.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload))
        })
    }

    /// Not by the C library's functions, which change all threads.
    fn become_this_thread(self) {
        // SAFETY: plain system calls; the pointer and the length are those of a slice that lives.
        let results = unsafe {
            [
                libc::syscall(libc::SYS_setgroups, self.others.len(), self.others.as_ptr()),
                libc::syscall(libc::SYS_setresgid, self.group, self.group, self.group),
                libc::syscall(libc::SYS_setresuid, self.id, self.id, self.id),
            ]
        };
        assert_eq!(results, [0, 0, 0], "become {self:?}: {}", io::Error::last_os_error());
    }
}

/// An empty directory that everybody may write, gone when this is dropped.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let parent = std::env::var(DIRECTORY).expect("this runs inside a container, for another test");
        let path = Path::new(&parent).join(format!("check-{name}-{}", std::process::id()));
        // SAFETY: umask cannot fail. Modes given here are the modes meant.
        unsafe { libc::umask(0) };
        std::fs::create_dir(&path).expect("make the directory");
        set_mode(&path, 0o777);
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of OWNER and its first group.
    fn file(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.at(name);
        std::fs::write(&path, "content\n").expect("write the file");
        give(&path, OWNER.id, OWNER.group, mode);
        path
    }

    /// A directory of OWNER and its first group.
    fn directory(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.at(name);
        std::fs::create_dir(&path).expect("make the directory");
        give(&path, OWNER.id, OWNER.group, mode);
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::fs::remove_dir_all(&self.0).expect("remove the directory");
        }
    }
}

fn give(path: &Path, user: u32, group: u32, mode: u32) {
    chown(path, Some(user), Some(group)).expect("chown");
    set_mode(path, mode);
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

fn mode_of(path: &Path) -> u32 {
    path.symlink_metadata().expect("stat").permissions().mode() & 0o7777
}

/// The error number, or 0.
fn errno<T>(result: io::Result<T>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| 0)
}

fn name_of(number: i32) -> String {
    if number == 0 { "success".to_owned() } else { nix::errno::Errno::from_raw(number).to_string() }
}

/// Collects what is wrong, so that one run shows all of it.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    fn expect_errno<T>(&mut self, what: &str, result: io::Result<T>, expected: i32) {
        let found = errno(result);
        if found != expected {
            self.0.push(format!("{what}: {}, not {}", name_of(found), name_of(expected)));
        }
    }

    #[allow(clippy::needless_pass_by_value, reason = "callers read better")]
    fn expect<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: T, expected: T) {
        if found != expected {
            self.0.push(format!("{what}: {found:?}, not {expected:?}"));
        }
    }

    #[track_caller]
    fn none(self) {
        assert!(self.0.is_empty(), "\n{}", self.0.join("\n"));
    }
}

/// The result of a C function that answers -1 and errno.
fn checked(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn c_path(path: &Path) -> std::ffi::CString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).expect("no zero byte")
}
