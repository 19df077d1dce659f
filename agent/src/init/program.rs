//! The program of a process: working directory, search in $PATH, execve.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, access, chdir, execve, fexecve, getcwd};
use oci_spec::runtime::Process;

use super::control::{Failure, Kind, Result, reason};
use super::identity;
use crate::seccomp::Filter;

/// Makes a container's working directory where it is missing; what goes wrong shows when it is entered.
pub fn make_working_directory(process: &Process) {
    let _ = fs::create_dir_all(Path::new("/").join(process.cwd()));
}

/// Enters the working directory. False if only the process's user may.
pub fn change_directory(directory: &Path) -> Result<bool> {
    match chdir(directory) {
        Ok(()) => Ok(true),
        Err(Errno::EACCES | Errno::EPERM) => Ok(false),
        Err(error) => Err(directory_failure(directory, error)),
    }
}

/// Enters the working directory as the process's user.
pub fn change_directory_as_user(directory: &Path) -> Result<()> {
    chdir(directory).map_err(|error| directory_failure(directory, error))
}

fn directory_failure(directory: &Path, error: Errno) -> Failure {
    let kind = kind_of(error);
    let (directory, why) = (directory.display(), reason(&error.into()));
    Failure::new(kind, format!("chdir to cwd (\"{directory}\") set in config.json failed: {why}"))
}

/// Refuses a working directory outside of the container's root, which a leaked descriptor could lead to
/// (CVE-2024-21626).
pub fn check_working_directory(directory: &Path) -> Result<()> {
    match getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(Failure::invalid(format!("cwd {:?} is outside of the container", directory.display()))),
    }
}

/// No descriptor of this program reaches the container's.
pub fn close_descriptors_on_exec() -> Result<()> {
    // SAFETY: numbers only.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    Errno::result(result).map(drop).map_err(Failure::during("close descriptors"))
}

/// Bytes of a program that is small.
const SMALL: u64 = 4 << 20;

/// A program that was found, ready to run.
#[derive(Debug)]
pub struct Program {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Finds the program of a process, by its own $PATH and with its own rights.
    pub fn find(process: &Process, passwd: &Path) -> Result<Self> {
        let arguments = process.args().as_deref().unwrap_or_default();
        let name = arguments.first().ok_or_else(|| Failure::invalid("args must not be empty"))?;
        let mut environment = process.env().clone().unwrap_or_default();
        if !environment.iter().any(|variable| variable.starts_with("HOME=")) {
            let passwd = fs::read(passwd).unwrap_or_default();
            environment
                .push(format!("HOME={}", home(&String::from_utf8_lossy(&passwd), process.user().uid())));
        }
        // The last of several, as a shell would have it.
        let path =
            environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
        let path = find_executable(name, path)?;
        Ok(Self {
            path: c_string(path.as_os_str())?,
            arguments: arguments.iter().map(|text| c_string(text.as_ref())).collect::<Result<_>>()?,
            environment: environment.iter().map(|text| c_string(text.as_ref())).collect::<Result<_>>()?,
        })
    }

    /// Whether it is one that need not be read in large pieces to start quickly.
    pub fn is_small(&self) -> bool {
        // Not the standard library's metadata(), which asks the host for the time of birth as well.
        nix::sys::stat::stat(self.path.as_c_str())
            .is_ok_and(|file| u64::try_from(file.st_size).is_ok_and(|length| length <= SMALL))
    }

    /// Becomes the program.
    pub fn execute(&self, seccomp: Option<&Filter>) -> Result<Infallible> {
        reset_signals().map_err(Failure::during("reset signals"))?;
        if let Some(filter) = seccomp {
            identity::seccomp(filter)?;
        }
        let Err(error) = execve(&self.path, &self.arguments, &self.environment);
        let (path, why) = (self.path.to_string_lossy(), reason(&error.into()));
        Err(Failure::new(kind_of(error), format!("exec {path}: {why}")))
    }
}

/// This program, to be run again where no path leads to it.
#[derive(Debug)]
pub struct Itself(OwnedFd);

impl Itself {
    /// Opens it, while the guest's /proc is in sight.
    pub fn open() -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let opened = open("/proc/self/exe", flags, Mode::empty());
        opened.map(Self).map_err(Failure::during("open /proc/self/exe"))
    }

    /// Becomes it, as the program of this name with these arguments.
    pub fn execute(&self, name: &str, arguments: &[String]) -> Result<Infallible> {
        reset_signals().map_err(Failure::during("reset signals"))?;
        let words = ["kata-agent", name].into_iter().chain(arguments.iter().map(String::as_str));
        let words = words.map(|word| c_string(word.as_ref())).collect::<Result<Vec<_>>>()?;
        let Err(error) = fexecve(&self.0, &words, &[] as &[CString]);
        Err(Failure::new(kind_of(error), format!("exec {name}: {}", reason(&error.into()))))
    }
}

fn c_string(text: &OsStr) -> Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| Failure::invalid("an argument or variable has a zero byte"))
}

fn kind_of(error: Errno) -> Kind {
    match error {
        Errno::ENOENT | Errno::ENOTDIR => Kind::NotFound,
        Errno::EACCES | Errno::EPERM => Kind::PermissionDenied,
        _ => Kind::Internal,
    }
}

/// The kernel's `struct sigaction`, rt_sigaction(2).
#[repr(C)]
#[derive(Default)]
struct SignalAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Every signal does what it does in a new program. This program, and the ones before it, ignore SIGPIPE and block
/// SIGCHLD. Not through the C library, which keeps two signals to itself.
fn reset_signals() -> nix::Result<()> {
    let (default, old) = (SignalAction::default(), std::ptr::null_mut::<SignalAction>());
    for signal in 1..=64 {
        // SAFETY: the default action runs no code of this program; the size is that of the kernel's signal mask.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, old, size_of::<u64>())
        };
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            Errno::result(result)?;
        }
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// Finds a program as Go's os/exec does, in whose words users of containers know what is wrong.
fn find_executable(name: &str, path: &str) -> Result<PathBuf> {
    let failure = |kind, why: &str| Failure::new(kind, format!("exec: {name:?}: {why}"));
    if name.contains('/') {
        return match check_executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(error) if error == Errno::ENOENT || error == Errno::ENOTDIR => {
                Err(failure(Kind::NotFound, &format!("stat {name}: {}", reason(&error.into()))))
            }
            Err(error) => Err(failure(kind_of(error), &reason(&error.into()))),
        };
    }
    for directory in path.split(':').filter(|_| !path.is_empty()) {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        if check_executable(&candidate).is_ok() {
            if !candidate.is_absolute() {
                return Err(failure(
                    Kind::Invalid,
                    "cannot run executable found relative to current directory",
                ));
            }
            return Ok(candidate);
        }
    }
    Err(failure(Kind::NotFound, "executable file not found in $PATH"))
}

fn check_executable(path: &Path) -> nix::Result<()> {
    let status = nix::sys::stat::stat(path)?;
    if super::confined::is(&status, nix::sys::stat::SFlag::S_IFDIR) {
        return Err(Errno::EISDIR);
    }
    if status.st_mode & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    // The kernel's opinion counts the user and the mount's noexec.
    access(path, AccessFlags::X_OK)
}

/// A user's home directory in the container's passwd(5), "/" for one that has none.
fn home(passwd: &str, uid: u32) -> String {
    let uid = uid.to_string();
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut homes = line
        .filter(|fields| fields.get(2) == Some(&uid.as_str()))
        .filter_map(|fields| fields.get(5).copied());
    homes.next().filter(|home| !home.is_empty()).unwrap_or("/").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(name: &str, path: &str) -> (Kind, String) {
        let failure = find_executable(name, path).unwrap_err();
        (failure.kind, failure.message)
    }

    #[test]
    fn errors_have_the_words_that_users_know() {
        let missing = r#"exec: "nonexistent": executable file not found in $PATH"#;
        assert_eq!(failure("nonexistent", "/bin:/usr/bin"), (Kind::NotFound, missing.to_owned()));
        assert_eq!(failure("nonexistent", "").0, Kind::NotFound);
        assert_eq!(failure("", "/bin").0, Kind::NotFound);
        let denied = r#"exec: "/etc/passwd": permission denied"#;
        assert_eq!(failure("/etc/passwd", ""), (Kind::PermissionDenied, denied.to_owned()));
        assert_eq!(failure("/bin/", ""), (Kind::Internal, r#"exec: "/bin/": is a directory"#.to_owned()));
        let absent = r#"exec: "/no/such": stat /no/such: no such file or directory"#;
        assert_eq!(failure("/no/such", ""), (Kind::NotFound, absent.to_owned()));
    }

    #[test]
    fn programs_are_found_along_the_path() {
        assert_eq!(find_executable("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(find_executable("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        assert_eq!(failure("passwd", "/etc").0, Kind::NotFound, "a file that cannot be run is passed over");
    }

    #[test]
    fn the_home_directory_is_that_of_the_user() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nshort:x:7\nnobody:x:65534:65534::/nonexistent:/bin/false\n:::::\n";
        assert_eq!(home(passwd, 0), "/root");
        assert_eq!(home(passwd, 65534), "/nonexistent");
        assert_eq!(home(passwd, 7), "/");
        assert_eq!(home("", 0), "/");
    }
}
